"""How long work tells what it has done, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""Called as ``progress(phase, done, total)``; ``total`` is ``None`` while unknown. Must be cheap and must not raise."""


def no_progress(phase: str, done: int, total: int | None) -> None:
    """The listener that doesn't listen."""
