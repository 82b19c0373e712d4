"""``vzfs-bench compare``: which figures of two runs differ by more than the noise.

Rule: only like is compared with like. A figure has changed when both tests of ``benchmarks.statistics.change`` say so
*and* it changed by more than a least share. What differs between any two runs (another day, another load) is seen in
ext4's own change, which is shown beside each.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.results import Figure, Run
from benchmarks.statistics import Change, change, median
from vzfs.errors import UsageError

CONTROL = "ext4"

Key = tuple[str, str, str, int]
"""Workload, step, condition, clients."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one system in both runs. ``verdict``: ``slower`` (or more), ``faster`` (or less), ``same``."""

    figure: Figure
    condition: str
    clients: int
    system: str
    old: float
    new: float
    change: Change
    control: float | None
    """By how much ext4's figure changed; None if it has none."""
    verdict: str


def changes(old: Run, new: Run, systems: Collection[str], least: float) -> list[Row]:
    """All figures that both runs have, in the order of ``new``.

    ``least`` is the smallest share that counts. Raises ``UsageError`` when the runs can't be compared: other sizes,
    nothing in common, a system that neither has.
    """
    if old.quick != new.quick:
        raise UsageError("one run is --quick, the other is not", remedy="compare runs of the same kind")
    unknown = set(systems) - {system.name for run in (old, new) for system in run.systems}
    if unknown:
        raise UsageError(f"neither run has the system {', '.join(sorted(unknown))}", remedy="see vzfs-bench run --list")
    before, after = _values(old), _values(new)
    described = {(figure.workload, figure.step): figure for figure in new.figures}
    rows = []
    for (key, system), values in after.items():
        if (systems and system not in systems) or (key, system) not in before:
            continue
        found = change(before[key, system], values)
        rows.append(
            Row(
                figure=described[key[0], key[1]],
                condition=key[2],
                clients=key[3],
                system=system,
                old=median(before[key, system]),
                new=median(values),
                change=found,
                control=_control(before, after, key),
                verdict=_verdict(found, least),
            )
        )
    if not rows:
        raise UsageError("the runs have no figure in common", remedy="give runs of the same workloads and systems")
    return rows


def show(old: Run, new: Run, rows: Sequence[Row], *, everything: bool) -> None:
    """Print them."""
    console = Console()
    for name, run in (("old", old), ("new", new)):
        console.print(
            f"{name}: {run.started}, commit {run.commit or 'unknown'}, rounds: {run.rounds}, load {run.load_before} to "
            f"{run.load_after}, Linux {run.machine.kernel}",
            markup=False,
            highlight=False,
        )
    if (old.machine, old.template) != (new.machine, new.template):
        console.print("The machines or templates differ: changes may come from that.", style="yellow")
    shown = [row for row in rows if everything or row.verdict != "same"]
    if shown:
        table = Table("figure", "system", "old", "new", "new / old", "95 %", f"{CONTROL} new / old", "")
        for row in shown:
            table.add_row(*_cells(row), style={"slower": "red", "faster": "green"}.get(row.verdict))
        console.print(table)
    counted = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("slower", "faster", "same")}
    console.print(
        f"{len(rows)} figures: {counted['slower']} slower, {counted['faster']} faster, "
        f"{counted['same']} without a change larger than the noise",
        highlight=False,
    )


def _values(run: Run) -> dict[tuple[Key, str], list[float]]:
    found: dict[tuple[Key, str], list[float]] = {}
    for sample in run.samples:
        key = (sample.workload, sample.step, sample.condition, sample.clients)
        found.setdefault((key, sample.system), []).append(sample.figure)
    return found


def _control(
    before: dict[tuple[Key, str], list[float]], after: dict[tuple[Key, str], list[float]], key: Key
) -> float | None:
    if (key, CONTROL) not in before or (key, CONTROL) not in after:
        return None
    old = median(before[key, CONTROL])
    return median(after[key, CONTROL]) / old if old else None


def _verdict(found: Change, least: float) -> str:
    value = found.ratio.value
    if not found.larger_than_noise or 1 / (1 + least) <= value <= 1 + least:
        return "same"
    return "slower" if value > 1 else "faster"


def _cells(row: Row) -> list[str]:
    from benchmarks.session import seconds

    unit = row.figure.unit
    clients = f", {row.clients} clients" if row.clients > 1 else ""
    ratio = row.change.ratio
    return [
        f"{row.figure.workload}/{row.figure.step}, {row.condition}{clients}",
        row.system,
        *(f"{value:.4g} {unit}" if unit else seconds(value) for value in (row.old, row.new)),
        f"{ratio.value:.2f}",
        f"{ratio.low:.2f} – {ratio.high:.2f}",
        "" if row.control is None else f"{row.control:.2f}",
        row.verdict,
    ]
