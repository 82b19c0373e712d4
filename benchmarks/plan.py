"""What a run will do, checked before anything is made or mounted."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.systems import SYSTEMS, System
from benchmarks.template import template_bytes
from benchmarks.workload import FULL, QUICK, Condition, Group, Sizes, Workload
from vzfs.errors import FullError, UnsupportedError, UsageError

LEAST_ROUNDS = 5
QUICK_ROUNDS = 1
SPARE_BYTES = 1 << 30
QUICK_SPARE_BYTES = 64 << 20
INODE_COPIES = 4
"""The template's entries, in vzfs's store twice (files and prepared links), and in ext4's copy."""
DEBIAN_ENTRIES = 15_000
TEMPLATE_COPIES = 3
"""The tree, ext4's copy and vzfs's template. A fourth is counted for what is read by a second plain copy."""
NEEDED_PROGRAMS = ("unshare", "mount", "umount", "setpriv", "cp")


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured in turns: one workload with so many clients in one condition."""

    workload: type[Workload]
    clients: int
    condition: Condition


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do. ``base``: tree to start from, empty for none, None for debootstrap."""

    systems: tuple[System, ...]
    missing: dict[str, str]
    """Systems that were wanted and can't be measured here, with the reason; none of them is in ``systems``."""
    workloads: tuple[type[Workload], ...]
    conditions: tuple[Condition, ...]
    rounds: int
    sizes: Sizes
    base: str | None
    mirror: str
    scratch: Path
    output: Path
    profile: bool

    def cells(self) -> Iterator[Cell]:
        """In the order of measuring: workloads on the usual template first, then those of each other shape."""
        for _, group in self.by_shape():
            for workload in group:
                conditions = [condition for condition in self.conditions if condition in workload.conditions]
                pairs = list(itertools.product(workload.clients, conditions))
                if self.sizes.quick:
                    pairs = self._quick(workload, pairs)
                for clients, condition in pairs:
                    yield Cell(workload, clients, condition)

    @staticmethod
    def _quick(workload: type[Workload], pairs: list[tuple[int, Condition]]) -> list[tuple[int, Condition]]:
        """Enough to see that all works: each workload once, look-ups in all conditions and with most clients, too."""
        if workload.group is not Group.LOOKUP or not pairs:
            return pairs[:1]
        fewest, most = pairs[0][0], pairs[-1][0]
        first = pairs[0][1]
        return [pair for pair in pairs if pair[0] == fewest or pair == (most, first)]

    def by_shape(self) -> list[tuple[str, list[type[Workload]]]]:
        """The workloads by the name of the template they need, "" for the usual one, which comes first."""
        groups: dict[str, list[type[Workload]]] = {}
        for workload in sorted(self.workloads, key=lambda workload: workload.shape is not None):
            groups.setdefault(workload.shape.name if workload.shape else "", []).append(workload)
        return list(groups.items())

    def runs(self) -> int:
        """How many times a workload will run."""
        return sum(
            self.rounds * sum(system.writable or not cell.workload.writes for system in self.systems)
            for cell in self.cells()
        )


def choose_systems(names: Sequence[str]) -> tuple[tuple[System, ...], dict[str, str]]:
    """The systems of these names, all for none, that can be measured, and why the others can't.

    Raises ``UsageError`` for an unknown name, ``UnsupportedError`` when none is left.
    """
    known = [system.name for system in SYSTEMS]
    _refuse_unknown("system", names, known)
    wanted = [system() for system in SYSTEMS if not names or system.name in names]
    reasons = {system.name: system.missing() for system in wanted}
    missing = {name: reason for name, reason in reasons.items() if reason}
    systems = tuple(system for system in wanted if system.name not in missing)
    if not systems:
        text = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise UnsupportedError(f"none of the systems can be measured: {text}", remedy="tools/install --bench")
    return systems, missing


def choose_workloads(names: Sequence[str], workloads: Sequence[type[Workload]]) -> tuple[type[Workload], ...]:
    """The workloads of these names or groups, in their own order; all for none. Raises ``UsageError``."""
    groups = [str(group) for group in Group]
    _refuse_unknown("workload", names, [*groups, *(workload.name for workload in workloads)])
    return tuple(
        workload for workload in workloads if not names or workload.name in names or str(workload.group) in names
    )


def _refuse_unknown(kind: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"there is no {kind} {', '.join(unknown)}", remedy=f"there are: {', '.join(known)}")


def sizes_for(*, quick: bool) -> Sizes:
    """Full or quick."""
    return QUICK if quick else FULL


def check_machine(plan: Plan) -> None:
    """Raise what stands against the plan: ``UnsupportedError`` (no root, no program), ``FullError``, ``UsageError``."""
    if os.geteuid() != 0:
        raise UnsupportedError("measuring mounts file systems and needs root", remedy="run it with sudo")
    missing = [program for program in NEEDED_PROGRAMS if shutil.which(program) is None]
    if plan.base is None and shutil.which("debootstrap") is None:
        missing.append("debootstrap")
    if missing:
        raise UnsupportedError(f"not installed: {', '.join(missing)}", remedy="apt-get install them, or tools/install")
    if Condition.BUSY in plan.conditions and len(os.sched_getaffinity(0)) < 2:
        raise UnsupportedError("the busy condition needs a second CPU", remedy="take --conditions idle")
    if not plan.workloads or not list(plan.cells()):
        raise UsageError("nothing is left to measure", remedy="these workloads don't have the condition asked for")
    _check_folder(plan.scratch, "--scratch")
    _check_folder(plan.output.parent, "--output")
    if plan.output.is_dir():
        raise UsageError(f"--output {plan.output} is a directory", remedy="give a file to write")
    if plan.base and not Path(plan.base).is_dir():
        raise UsageError(f"--tree {plan.base} is no directory", remedy="give a directory that holds a root tree")
    check_space(plan)


def check_space(plan: Plan) -> None:
    """Raises ``FullError`` when the scratch folder's disk can't hold what will be made."""
    copies = TEMPLATE_COPIES + any(workload.group is Group.DENSITY for workload in plan.workloads)
    need = copies * template_bytes(plan.sizes, plan.base) + 2 * plan.sizes.new_file_bytes
    need += QUICK_SPARE_BYTES if plan.sizes.quick else SPARE_BYTES
    free = shutil.disk_usage(plan.scratch).free
    if free < need:
        raise FullError(
            f"{plan.scratch} has {free >> 20} MiB free, {need >> 20} MiB are needed",
            remedy="free some, take --scratch DIR on another disk, or --quick",
        )
    state = os.statvfs(plan.scratch)
    inodes = INODE_COPIES * _entries(plan)
    if state.f_files and state.f_favail < inodes:  # 0: made as they are needed
        raise FullError(
            f"{plan.scratch} has {state.f_favail:,} free inodes, {inodes:,} are needed",
            remedy="take --scratch DIR on a file system with more of them, --quick, or leave out the group scale",
        )


def _entries(plan: Plan) -> int:
    """About how many entries the largest template has."""
    sizes = plan.sizes
    usual = sizes.small_files + sizes.huge_entries + sizes.lookups + (0 if plan.base == "" else DEBIAN_ENTRIES)
    shapes = [workload.shape.directories(sizes) for workload in plan.workloads if workload.shape]
    return max(usual, *(len(directories) + sum(directories.values()) for directories in shapes), 0)


def _check_folder(folder: Path, option: str) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {folder} is no directory to write to", remedy="give one that exists")
