"""Judging a run by ``benchmarks.targets``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from benchmarks.report.units import factor, interval, number, quantity
from benchmarks.report.view import Key, View
from benchmarks.statistics import Interval
from benchmarks.targets import JUDGED, TARGETS, Other, Target

CONDITIONS = ("idle", "busy")


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one target was met under one condition.

    ``measured`` is a ratio of times where the target has one (shown as speed where the target says so), else the
    median in ``target.unit``; None if there is no figure, ``reason`` then says why. ``sure``: whether the whole
    confidence interval (the whole range, for a quantity) is on the same side of the limit.
    """

    target: Target
    condition: str
    limit: float | None
    measured: Interval | None
    reason: str = ""
    unverified: int = 0
    """Samples of either side whose cache state could not be verified."""

    @property
    def asked(self) -> bool:
        """Whether the target holds under this condition at all."""
        return self.limit is not None

    @property
    def met(self) -> bool | None:
        """None when it wasn't asked or not measured."""
        if self.limit is None or self.measured is None:
            return None
        return self.measured.value <= self.limit

    @property
    def sure(self) -> bool:
        """Whether noise leaves no doubt."""
        return self.measured is not None and self.limit is not None and self.measured.below(self.limit) is not None

    @property
    def missed_by(self) -> float:
        """By how much of what was wanted, in per cent: time or quantity too much, speed too little; 0 if not missed."""
        if self.met is not False or self.measured is None or not self.limit:
            return 0.0
        if self.target.speed:
            return (1 - self.limit / self.measured.value) * 100
        return (self.measured.value / self.limit - 1) * 100

    @property
    def wanted_text(self) -> str:
        """For tables; empty where nothing is asked."""
        return wanted_text(self.target, self.condition)

    @property
    def measured_text(self) -> str:
        """For tables; empty where nothing is asked."""
        if not self.asked:
            return ""
        if self.measured is None:
            return self.reason
        if self.target.against is None:
            ends = f"{quantity(self.measured.low, self.target.unit)} – {quantity(self.measured.high, self.target.unit)}"
            return f"{quantity(self.measured.value, self.target.unit)} [{ends}]"
        shown = inverse(self.measured) if self.target.speed else self.measured
        return f"{factor(shown.value)} [{interval(shown)}]"

    @property
    def verdict_text(self) -> str:
        """For tables; empty where nothing is asked."""
        if not self.asked:
            return ""
        if self.met is None:
            return "not measured"
        doubt = "" if self.sure else ", within noise"
        doubt += f", cache unverified in {self.unverified} samples" if self.unverified else ""
        return f"met{doubt}" if self.met else f"missed by {number(self.missed_by)} %{doubt}"


def judge(
    view: View, system: str = JUDGED, targets: tuple[Target, ...] = TARGETS
) -> list[tuple[Target, list[Verdict]]]:
    """Each target with its verdicts, in the order of ``CONDITIONS``."""
    return [(target, [_judge(view, system, target, condition) for condition in CONDITIONS]) for target in targets]


def wanted_text(target: Target, condition: str) -> str:
    """What is wanted under ``condition``, in words; empty where nothing is."""
    limit = target.limit(condition)
    if limit is None:
        return ""
    if target.against is None:
        return f"≤ {quantity(float(limit), target.unit)}"
    if target.speed:
        return f"≥ {_share(1 / limit)} × the speed of {target.against.name}"
    if limit == 1:
        return f"not slower than {target.against.name}"
    return f"≤ {_share(limit)} × {target.against.name}"


def inverse(found: Interval) -> Interval:
    """A ratio of speeds from one of times."""
    value, low, high = (1 / part if part else math.inf for part in (found.value, found.high, found.low))
    return Interval(value, low, high)


def _share(share: Fraction) -> str:
    """0.95 and 1.2 as they are; 1/4 and 2/3 as fractions."""
    return str(share) if share.denominator in {1, 2, 3, 4} and share < 1 else f"{float(share):.4g}"


def _judge(view: View, system: str, target: Target, condition: str) -> Verdict:
    limit = target.limit(condition)
    key = Key(target.workload, target.step, condition, target.clients)
    if limit is None:
        return Verdict(target, condition, None, None)
    figure = view.figure_of(target.workload, target.step)
    if figure and target.against is None and figure.unit != target.unit:
        reason = f"the run has {figure.unit or 'seconds'}, wanted are {target.unit or 'seconds'}"
        return Verdict(target, condition, float(limit), None, reason)
    measured = _measured(view, system, target, key)
    if measured is None:
        return Verdict(target, condition, float(limit), None, _reason(view, system, target, key))
    sides = [(key, system)] if target.against is None else [(key, system), _other(system, target, key)]
    unverified = sum(not one.evidence.verified for side in sides for one in view.samples(*side))
    return Verdict(target, condition, float(limit), measured, unverified=unverified)


def _measured(view: View, system: str, target: Target, key: Key) -> Interval | None:
    if target.against is None:
        cell = view.cell(key, system)
        return Interval(cell.figure.median, cell.figure.smallest, cell.figure.largest) if cell else None
    return view.ratio(key, system, *_other(system, target, key))


def _other(system: str, target: Target, key: Key) -> tuple[Key, str]:
    """Step and system that a target compares with."""
    against = target.against or Other()
    return Key(key.workload, against.step or key.step, key.condition, key.clients), against.system or system


def _reason(view: View, system: str, target: Target, key: Key) -> str:
    """Why there is no figure: the judged system's reason first."""
    names = [system] if target.against is None else [system, target.against.system or system]
    for name in names:
        if view.samples(key, name):
            continue
        info = next((item for item in view.systems if item.name == name), None)
        if info is None:
            return f"{name} was not part of the run"
        return f"{name}: {view.why_not(key, info)}"
    return "no round has both figures"
