"""Numbers as people read them: three significant digits, a fitting unit, nothing that suggests more precision."""

from __future__ import annotations

import math
import re

from benchmarks.statistics import Interval, Summary

TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Text without what XML can't hold."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def number(value: float) -> str:
    """Three significant digits, with a comma between thousands; zeros at the end say how precise it is."""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    places = 2 - math.floor(math.log10(abs(value)))
    if abs(round(value, places)) >= 10 ** (3 - places):  # 9.996 becomes 10.0
        places -= 1
    return f"{round(value, places):,.{max(0, places)}f}"


def scale(value: float, unit: str) -> tuple[float, str]:
    """What to divide by, and the unit after that, for a figure in ``unit`` (empty: seconds)."""
    if unit:
        return 1.0, unit
    return next(((size, name) for size, name in TIMES if abs(value) >= size), TIMES[-1] if value else TIMES[0])


def quantity(value: float, unit: str) -> str:
    """A figure in ``unit`` (empty: seconds)."""
    if not math.isfinite(value):
        return number(value)
    size, name = scale(value, unit)
    return f"{number(value / size)} {name}"


def middle_and_ends(found: Summary, unit: str) -> tuple[str, str]:
    """The median with its unit; smallest and largest in the same unit, without it."""
    size, name = scale(found.median, unit)
    ends = f"{number(found.smallest / size)} – {number(found.largest / size)}"
    return f"{number(found.median / size)} {name}", ends


def factor(value: float) -> str:
    """A ratio."""
    return f"{number(value)} ×"


def interval(found: Interval) -> str:
    """A ratio's confidence interval."""
    if found.low == 0 and math.isinf(found.high):
        return "one round"
    return f"{number(found.low)} – {number(found.high)}"


def nanoseconds(value: float) -> str:
    """A latency."""
    return quantity(value * 1e-9, "")
