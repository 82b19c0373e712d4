"""All workloads: those on the usual template, and those that show how cost grows."""

from __future__ import annotations

from benchmarks import scale
from benchmarks.workload import Workload
from benchmarks.workloads import WORKLOADS as USUAL

WORKLOADS: tuple[type[Workload], ...] = (*USUAL, *scale.WORKLOADS)
"""In the order in which they run and are shown."""
