"""A run as tables need it: figures by step, condition, clients and system, with their ratios.

Rule: here numbers are computed and nowhere else, so that HTML, Markdown and plots agree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from benchmarks.results import SKIPPED, WRONG, Figure, Problem, Run, Sample, SystemInfo
from benchmarks.statistics import Interval, Summary, median, ratio, summary
from vzfs.errors import UsageError

LIMIT = "ext4"
"""The system that shows what the disk's own file system takes."""
PERCENTILES = {"p50": ("p50", 2), "p99": ("p99", 100), "p999": ("p99.9", 1000)}
"""Field of ``Latency`` to name, and the number of operations from which at least one lies beyond it."""
"""Of problems; what this program doesn't know comes first."""


@dataclass(frozen=True, slots=True)
class Key:
    """What is compared with each other: one step under one condition with one number of clients."""

    workload: str
    step: str
    condition: str
    clients: int


@dataclass(frozen=True, slots=True)
class Checks:
    """What is known about the caches and the place of a cell's samples; counts are summaries over the rounds."""

    verified: int
    samples: int
    same_answers: int
    """Samples that returned what ext4 returned in the same round."""
    compared: int
    """Samples in whose round ext4 has one."""
    dentries_grown: Summary
    cached_grown_mib: Summary
    resident: Summary | None
    spinner: Summary | None
    load: Summary
    server_cpus: tuple[int, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One system's figure for a key. ``rate`` is per second, in ``rate_unit``; latencies in ns, medians over rounds."""

    system: str
    unit: str
    """Of ``figures``; empty = seconds per operation."""
    figures: tuple[float, ...]
    """In the order of rounds."""
    figure: Summary
    rate: Summary | None
    rate_unit: str
    latencies: tuple[float | None, ...]
    """Of ``PERCENTILES``; None where there were too few operations to speak of it; empty without any."""
    to_limit: Interval | None
    """Ratio to ext4; None for ext4 itself."""
    to_peer: Interval | None
    """Ratio to the best peer; None for that peer."""
    best_peer: bool
    checks: Checks
    extra: tuple[tuple[str, Summary], ...]
    """Further quantities, named with their unit."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """Problems of the same text, with the rounds in which they occurred."""

    kind: str
    workload: str
    step: str
    system: str
    condition: str
    clients: int
    text: str
    rounds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Skipped:
    """What a system was not asked to do, with the reason; ``work`` names workloads, or some of their steps."""

    system: str
    work: tuple[str, ...]
    text: str


class View:
    """A run. Raises ``UsageError`` for figures that are no numbers."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._samples: dict[tuple[Key, str], list[Sample]] = defaultdict(list)
        for sample in run.samples:
            _refuse_odd(sample)
            self._samples[self._key(sample), sample.system].append(sample)
        self._cells: dict[tuple[Key, str], Cell | None] = {}
        self._peers: dict[Key, str | None] = {}

    @cached_property
    def systems(self) -> tuple[SystemInfo, ...]:
        """All systems of the run, missing ones as well."""
        return self.run.systems

    @cached_property
    def missing(self) -> tuple[SystemInfo, ...]:
        """Those that could not be measured."""
        return tuple(system for system in self.systems if system.missing)

    @cached_property
    def conditions(self) -> tuple[str, ...]:
        """Those with samples, in the run's order."""
        seen = {sample.condition for sample in self.run.samples}
        return (*(name for name in self.run.conditions if name in seen), *sorted(seen - self.run.conditions.keys()))

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups that have figures, in the run's order."""
        return tuple(dict.fromkeys(figure.group for figure in self.figures))

    @cached_property
    def figures(self) -> tuple[Figure, ...]:
        """The figures that have samples, in the run's order."""
        seen = {(sample.workload, sample.step) for sample in self.run.samples}
        return tuple(figure for figure in self.run.figures if (figure.workload, figure.step) in seen)

    def workloads(self, group: str) -> tuple[str, ...]:
        """Names of the workloads of ``group``."""
        return tuple(dict.fromkeys(figure.workload for figure in self.figures if figure.group == group))

    def steps(self, workload: str) -> tuple[Figure, ...]:
        """The figures of ``workload``."""
        return tuple(figure for figure in self.figures if figure.workload == workload)

    def figure_of(self, workload: str, step: str) -> Figure | None:
        """The figure of one step, if it has samples."""
        return next((item for item in self.figures if (item.workload, item.step) == (workload, step)), None)

    def clients(self, figure: Figure) -> tuple[int, ...]:
        """With how many clients a figure was measured."""
        return tuple(
            sorted(
                {key.clients for key, _ in self._samples if (key.workload, key.step) == (figure.workload, figure.step)}
            )
        )

    def conditions_of(self, figure: Figure, clients: int) -> tuple[str, ...]:
        """Under which conditions."""
        seen = {
            key.condition
            for key, _ in self._samples
            if (key.workload, key.step, key.clients) == (figure.workload, figure.step, clients)
        }
        return tuple(condition for condition in self.conditions if condition in seen)

    def samples(self, key: Key, system: str) -> tuple[Sample, ...]:
        """In the order of rounds; empty if there are none."""
        return tuple(sorted(self._samples.get((key, system), ()), key=lambda sample: sample.round))

    def ratio(self, key: Key, system: str, other_key: Key, other: str) -> Interval | None:
        """A figure of ``system`` by one of ``other``, round by round."""
        return ratio(self._by_round(key, system), self._by_round(other_key, other))

    def best_peer(self, key: Key) -> str | None:
        """The peer with the smallest median."""
        if key not in self._peers:
            medians = {
                system.name: median([sample.figure for sample in samples])
                for system in self.systems
                if system.peer and (samples := self.samples(key, system.name))
            }
            self._peers[key] = min(medians, key=lambda name: medians[name]) if medians else None
        return self._peers[key]

    def cell(self, key: Key, system: str) -> Cell | None:
        """One system's figure; None if it has none."""
        if (key, system) not in self._cells:
            samples = self.samples(key, system)
            self._cells[key, system] = self._make(key, system, samples) if samples else None
        return self._cells[key, system]

    def why_not(self, key: Key, system: SystemInfo) -> str:
        """Why ``system`` has no figure for ``key``."""
        if system.missing:
            return f"missing: {system.missing}"
        here = (key.workload, key.condition, key.clients, system.name)
        for problem in self.run.problems:
            place = (problem.workload, problem.condition, problem.clients, problem.system)
            if place == here and problem.step in {key.step, ""}:
                return f"{problem.kind}: {problem.text}"
        return "not measured"

    @cached_property
    def troubles(self) -> tuple[Trouble, ...]:
        """What went wrong, the worst kind first; those that differ in the round only are one."""
        rounds: dict[Problem, list[int]] = defaultdict(list)
        for problem in self.run.problems:
            if problem.kind != SKIPPED:
                rounds[_without_round(problem)].append(problem.round)
        found = [
            Trouble(
                one.kind,
                one.workload,
                one.step,
                one.system,
                one.condition,
                one.clients,
                one.text,
                tuple(sorted(set(turns))),
            )
            for one, turns in rounds.items()
        ]
        return tuple(sorted(found, key=lambda trouble: WRONG.index(trouble.kind) if trouble.kind in WRONG else -1))

    @cached_property
    def skips(self) -> tuple[Skipped, ...]:
        """What was left out, by system and reason."""
        steps: dict[tuple[str, str], dict[str, dict[str, None]]] = {}
        for problem in self.run.problems:
            if problem.kind == SKIPPED:
                workloads = steps.setdefault((problem.system, problem.text), {})
                workloads.setdefault(problem.workload, {})[problem.step] = None
        return tuple(
            Skipped(system, tuple(_with_steps(name, parts) for name, parts in workloads.items()), text)
            for (system, text), workloads in steps.items()
        )

    def noisiest(self, count: int) -> list[tuple[Key, Cell]]:
        """The cells with the largest spread, that first."""
        return sorted(self.all_cells(), key=lambda item: -item[1].figure.spread)[:count]

    def all_cells(self) -> list[tuple[Key, Cell]]:
        """Every cell that has a figure."""
        found = [(key, self.cell(key, system)) for key, system in list(self._samples)]
        return [(key, cell) for key, cell in found if cell is not None]

    def _make(self, key: Key, system: str, samples: tuple[Sample, ...]) -> Cell:
        figure = self.figure_of(key.workload, key.step)
        rates, unit = _rates(samples, figure)
        peer = self.best_peer(key)
        return Cell(
            system=system,
            unit=figure.unit if figure else "",
            figures=tuple(sample.figure for sample in samples),
            figure=summary([sample.figure for sample in samples]),
            rate=summary(rates) if rates else None,
            rate_unit=unit,
            latencies=latency_medians(samples),
            to_limit=None if system == LIMIT else self.ratio(key, system, key, LIMIT),
            to_peer=None if peer is None or system == peer else self.ratio(key, system, key, peer),
            best_peer=system == peer,
            checks=self._checks(key, samples),
            extra=tuple(
                (name, summary([sample.extra[name] for sample in samples if name in sample.extra]))
                for name in dict.fromkeys(name for sample in samples for name in sample.extra)
            ),
        )

    def _checks(self, key: Key, samples: tuple[Sample, ...]) -> Checks:
        expected = {sample.round: sample.proof for sample in self.samples(key, LIMIT)}
        evidence = [sample.evidence for sample in samples]
        return Checks(
            verified=sum(one.verified for one in evidence),
            samples=len(samples),
            same_answers=sum(expected.get(sample.round) == sample.proof for sample in samples),
            compared=sum(sample.round in expected for sample in samples),
            dentries_grown=summary([one.dentries_grown for one in evidence]),
            cached_grown_mib=summary([one.cached_grown_kib / 1024 for one in evidence]),
            resident=_asked(one.resident for one in evidence),
            spinner=_asked(one.spinner for one in evidence),
            load=summary([one.load for one in evidence]),
            server_cpus=tuple(sorted({cpu for one in evidence for cpu in one.server_cpus})),
            texts=tuple(dict.fromkeys(one.text for one in evidence if one.text)),
        )

    def _by_round(self, key: Key, system: str) -> dict[int, float]:
        return {sample.round: sample.figure for sample in self.samples(key, system)}

    @staticmethod
    def _key(sample: Sample) -> Key:
        return Key(sample.workload, sample.step, sample.condition, sample.clients)


def percentiles(sample: Sample) -> tuple[int | None, ...]:
    """A sample's ``PERCENTILES`` in ns, None where it has too few operations for one; empty without latencies."""
    latency = sample.latency
    if latency is None or latency.count < 2:
        return ()
    return tuple(
        getattr(latency, field) if latency.count >= least else None for field, (_, least) in PERCENTILES.items()
    )


def sample_rate(sample: Sample, figure: Figure | None) -> float | None:
    """What one sample did per second: MiB where the figure is a throughput, else operations; None for quantities."""
    if figure is None or figure.unit or sample.seconds <= 0:
        return None
    return sample.mib_per_second if figure.throughput and sample.bytes else sample.per_second


def rate_unit(samples: Iterable[Sample], figure: Figure | None) -> str:
    """The unit of ``sample_rate``."""
    if figure is None or figure.unit:
        return ""
    return "MiB/s" if figure.throughput and any(sample.bytes for sample in samples) else "/s"


def _rates(samples: tuple[Sample, ...], figure: Figure | None) -> tuple[list[float], str]:
    rates = [rate for sample in samples if (rate := sample_rate(sample, figure)) is not None]
    return rates, rate_unit(samples, figure)


def latency_medians(samples: Iterable[Sample]) -> tuple[float | None, ...]:
    """The median over the rounds of each percentile that all of them have."""
    found = [each for sample in samples if (each := percentiles(sample))]
    return tuple(
        median([value for value in values if value is not None]) if None not in values else None
        for values in zip(*found, strict=True)
    )


def _asked(values: Iterable[float]) -> Summary | None:
    """A summary without the values that say that nothing was asked (-1)."""
    asked = [value for value in values if value >= 0]
    return summary(asked) if asked else None


def _with_steps(workload: str, steps: Iterable[str]) -> str:
    """A workload's name, with its steps if only some are meant."""
    named = ", ".join(step for step in steps if step)
    return f"{workload} ({named})" if named else workload


def _without_round(problem: Problem) -> Problem:
    return Problem(
        problem.kind,
        problem.workload,
        problem.step,
        problem.system,
        problem.condition,
        problem.clients,
        0,
        problem.text,
    )


def _refuse_odd(sample: Sample) -> None:
    """Figures are numbers, times are not negative."""
    odd = not math.isfinite(sample.figure) or not math.isfinite(sample.seconds) or sample.seconds < 0
    if odd:
        raise UsageError(
            f"{sample.workload} {sample.step} on {sample.system}, round {sample.round}: "
            f"{sample.figure} in {sample.seconds} s is no measured figure",
            remedy="measure again; the file was damaged or changed",
        )
