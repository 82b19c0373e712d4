"""Medians, ratios and how sure they are, for the report and for ``compare``.

Rules:
- What was measured in turns is compared in turns: a ratio resamples rounds, not single values, so that a disturbance
  that hit both systems of a round counts once.
- The same values always give the same interval: the generator's seed is fixed.
- An interval says how much the rounds of one run differ. It knows nothing of what differs between two runs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

CONFIDENCE = 0.95
RESAMPLES = 4000
"""Of the bootstrap. The intervals' ends then vary by less than 1 % of their length with the seed."""
SEED = 20_240_229
SIGNIFICANCE = 0.05

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Summary:
    """What the rounds gave: the middle, the ends, how many."""

    median: float
    smallest: float
    largest: float
    count: int

    @property
    def spread(self) -> float:
        """Largest to smallest as a share of the median; 0 where the median is 0."""
        return (self.largest - self.smallest) / self.median if self.median else 0.0


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio of medians with its bootstrap confidence interval (see ``CONFIDENCE``).

    With a single round nothing is known about the spread: the interval is then 0 to infinity.
    """

    value: float
    low: float
    high: float

    @property
    def excludes_one(self) -> bool:
        """Whether the two sides differ by more than their rounds vary."""
        return self.low > 1 or self.high < 1

    def below(self, limit: float) -> bool | None:
        """Whether the ratio is at most ``limit``: True or False where the whole interval says so, else None."""
        if self.high <= limit:
            return True
        return False if self.low > limit else None


@dataclass(frozen=True, slots=True)
class Change:
    """How new values relate to old ones of another run. ``p`` is Mann and Whitney's, exact, two-sided."""

    ratio: Interval
    p: float

    @property
    def larger_than_noise(self) -> bool:
        """Both tests agree: the interval leaves out 1, and the ranks differ."""
        return self.ratio.excludes_one and self.p < SIGNIFICANCE


def summary(values: Sequence[float]) -> Summary:
    """Median, smallest, largest, number. Raises ``ValueError`` if there are none or one is no number."""
    if not values:
        raise ValueError("no values to summarize")
    if any(math.isnan(value) for value in values):
        raise ValueError("one of the values is not a number")
    return Summary(float(np.median(values)), float(min(values)), float(max(values)), len(values))


def median(values: Sequence[float]) -> float:
    """The middle of the values. Raises ``ValueError`` as ``summary``."""
    return summary(values).median


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Median of ours by median of theirs, over the rounds that both have; None if they have none in common.

    Both map the round's number to its value. Where theirs is 0, the ratio is infinite, or 1 if ours is 0 as well.
    """
    rounds = sorted(ours.keys() & theirs.keys())
    if not rounds:
        return None
    return _interval(tuple(ours[turn] for turn in rounds), tuple(theirs[turn] for turn in rounds), True)


def change(old: Sequence[float], new: Sequence[float]) -> Change:
    """How ``new`` relates to ``old``, whose rounds have nothing to do with each other. Raises as ``summary``."""
    summary(old), summary(new)
    test = stats.mannwhitneyu(new, old, alternative="two-sided", method=_method([*old, *new]))
    return Change(_interval(tuple(new), tuple(old), False), float(test.pvalue))


def _method(values: Sequence[float]) -> str:
    """Ties forbid the exact distribution."""
    return "exact" if len(set(values)) == len(values) else "asymptotic"


@lru_cache(maxsize=65_536)
def _interval(ours: tuple[float, ...], theirs: tuple[float, ...], paired: bool) -> Interval:
    """The ratio of medians and its interval by the percentile method."""
    value = float(_quotient(np.asarray(ours), np.asarray(theirs)))
    if min(len(ours), len(theirs)) < 2:
        return Interval(value, 0.0, math.inf)
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found: Any = stats.bootstrap(
            (np.asarray(ours), np.asarray(theirs)),
            _quotient,
            paired=paired,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(SEED),
        )
    low, high = float(found.confidence_interval.low), float(found.confidence_interval.high)
    # Interpolating between two infinite quotients gives no number.
    return Interval(value, low if not math.isnan(low) else 0.0, high if not math.isnan(high) else math.inf)


def _quotient(ours: Values, theirs: Values, axis: int = -1) -> Values:
    """Median by median along ``axis``; see ``ratio`` for zeros."""
    above, below = np.median(ours, axis=axis), np.median(theirs, axis=axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((above == 0) & (below == 0), 1.0, np.asarray(above / below))
