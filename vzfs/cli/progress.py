"""A progress bar on standard error, for work that takes long.

Rule: only people see it. When standard error is no terminal nothing is written, and rich is not even loaded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vzfs.cli.show import size
from vzfs.store.progress import Progress, no_progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

IN_BYTES = frozenset({"unpacking"})
"""Phases that are counted in bytes; the others in entries."""
REDRAW_SECONDS = 0.1
"""Reports that come faster than this are dropped; the eye can't tell and the work goes on."""


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A listener that draws one bar per phase while the ``with`` block runs, and takes them away at its end."""
    if not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Listener(bars)


def _amount(done: int, total: int | None, speed: float | None, *, in_bytes: bool) -> str:
    """How much is done, of how much, and how fast: ``1.2 GiB of 3.0 GiB, 210.0 MiB/s``."""

    def text(count: float) -> str:
        return size(round(count)) if in_bytes else f"{count:,.0f}"

    whole = f" of {text(total)}" if total is not None else ""
    return f"{text(done)}{whole}" + (f", {text(speed)}/s" if speed else "")


class _Listener:
    """Turns ``(phase, done, total)`` into the bars of rich."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._next = 0.0

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if phase in self._tasks and now < self._next and done != total:
            return
        self._next = now + REDRAW_SECONDS
        if phase not in self._tasks:
            self._finish_all()
            self._tasks[phase] = self._bars.add_task(phase, total=total, amount="")
        task = self._bars.tasks[self._bars.task_ids.index(self._tasks[phase])]
        amount = _amount(done, total, task.finished_speed or task.speed, in_bytes=phase in IN_BYTES)
        self._bars.update(self._tasks[phase], completed=done, total=total, amount=amount)

    def _finish_all(self) -> None:
        """Phases follow each other, so the start of one is the end of those before."""
        for task in self._bars.tasks:
            if not task.finished:
                self._bars.update(task.id, total=max(task.completed, 1), completed=max(task.completed, 1))
