"""What ``vzfs check`` and ``vzfs template verify`` report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, which kind (a fixed word), what exactly, and whether it was repaired."""

    path: str
    kind: str
    detail: str
    repaired: bool = False
