"""Figures and how they are shown: a table for people, JSON for programs.

Rule: a figure keeps every round's value; median and spread are computed where they are shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured thing: its value in every round, in ``unit``; ``target`` is what the median should stay below."""

    name: str
    unit: str
    values: tuple[float, ...]
    target: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.values)

    @property
    def verdict(self) -> str:
        """``ok`` or ``missed``; empty when there is no target."""
        if self.target is None:
            return ""
        return "ok" if self.median < self.target else "missed"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
            "target": self.target,
            "verdict": self.verdict or None,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one measurement; ``what`` says in sentences what was done and under which conditions."""

    name: str
    what: str
    figures: Sequence[Figure] = field(default_factory=tuple)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "what": self.what, "figures": [figure.as_dict() for figure in self.figures]}

    def table(self) -> str:
        """The figures as a Markdown table, which is readable as it is."""
        rows = [("", "median", "min – max", "target", "")]
        rows += [
            (
                figure.name + (f" ({figure.note})" if figure.note else ""),
                f"{_number(figure.median)} {figure.unit}",
                f"{_number(min(figure.values))} – {_number(max(figure.values))}",
                "" if figure.target is None else f"< {_number(figure.target)} {figure.unit}",
                figure.verdict,
            )
            for figure in self.figures
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(lines)

    def text(self) -> str:
        """Everything, for people."""
        return f"## {self.name}\n\n{self.what}\n\n{self.table()}\n"


def _number(value: float) -> str:
    """Three significant digits, whole numbers in full."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if 1 <= abs(value) < 10 else f"{value:.3g}"
