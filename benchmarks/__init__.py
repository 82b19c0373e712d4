"""Measurements of vzfs. As root, in a checkout:

    python -m benchmarks                      every measurement, one after the other
    python -m benchmarks mount_time memory    some of them
    python -m benchmarks --quick --json       small and short, to see that they work; results for programs

Rules:
- Every figure says what was measured, on which machine, under which load; it is the median of at least five rounds,
  with the smallest and the largest value beside it.
- Whatever is compared is measured in turns within each round, so that a disturbance hits all alike.
- Caches are what a program would find them to be. Where names are to be unknown to the kernel, they are dropped by
  remounting (which drops a mount's unused names and nothing else), and a control figure shows that they were.
- Everything happens in one scratch folder and in a mount namespace of its own; it is unmounted and removed at the end,
  also after a failure or a signal.

A measurement is a module with a ``measure(bench)`` that gives a ``Report``; it gets its store, its templates and its
number of rounds from the ``Bench``.
"""

from __future__ import annotations
