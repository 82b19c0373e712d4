"""The benchmark suite ``vzfs-bench``: vzfs against what a user would pick instead. See docs/benchmarks.md.

cli.py         the command line; plan.py: what was asked for, checked before anything is made
supervise.py   a worker in a mount namespace of its own, and nothing left behind; session.py: one run in it
runner.py      systems in turns, fresh mounts, caches, proofs
systems.py     what is compared        workloads/, scale.py   what is done      template.py   on what
conditions.py  idle and busy           caches.py   cache states made and verified
results.py     the result file         statistics.py, compare.py, targets.py, report/   what follows from it
"""

from __future__ import annotations
