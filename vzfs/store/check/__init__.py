"""Finding and mending what an interrupted change, a damaged disk or a foreign hand left wrong in a container.

Rule: nothing of a container's data is deleted silently. What can't stay where it is goes to ``lost+found`` in the
container's folder, as it is; only what was staged or unlinked when a mount died is removed. The problems, by kind:

    leftover           in ``cow/stage``: an interrupted change. Removed.
    orphan             in ``cow/orphans``: unlinked, but in use when the mount died. Removed.
    missing            a folder of the store's own. Made.
    mode               such a folder with another mode or owner. Set.
    template           conf names none, or one that is not in the store, is damaged or another one than conf says; or
                       links name one that conf doesn't. Not mended; links to it are left alone then.
    name               another container has the same NAME. Not mended.
    malformed          a magic link, the name or form of a link group's record, a log that is no file. To lost+found.
    dangling           a magic link, or such a record, of a template entry that doesn't exist. To lost+found.
    alias              a magic link to what is elsewhere, too. Directory: to lost+found. File: made a hard link.
    duplicate-origin   two things copied up from one entry, or one beside a link to it: one of them forgets it.
    bad-record         a ``trusted.vzfs`` attribute that can't be meant. Removed, its value told.
    folds              a directory lacks the mark that it holds folded ones. Set.
    link-count         a link group has another number of names than its record or the template says. Set.
    orphan-group       a record without any name. To lost+found.

Paths are relative to the container's folder. Time and memory follow what was unfolded, not what the template has.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from vzfs.store.check.finding import LOST_AND_FOUND, Finding, Report, mend
from vzfs.store.check.folders import check_conf, check_folders, check_log, check_remains
from vzfs.store.check.ground import Ground
from vzfs.store.check.groups import check_records, check_unrecorded
from vzfs.store.check.names import check_name
from vzfs.store.check.places import NameChecker, check_places
from vzfs.store.layout import Layout
from vzfs.store.lock import Holder, Lock
from vzfs.store.problem import Problem
from vzfs.store.survey import Survey

_ROUNDS = 8
"""Examinations of one repair at most: mending one thing may show another, but never this often."""


def check_container(layout: Layout, path: Path, *, repair: bool = False) -> list[Problem]:
    """All that is wrong with the container at ``path``, mended where possible if ``repair``; nothing for a sound one.

    Raises ``BusyError`` while it is mounted, ``DamagedError`` when it has no private area.
    """
    with contextlib.ExitStack() as stack:
        lock = Lock.acquire(path, Holder(os.getpid(), "checks", time.time()))
        stack.callback(lock.release)
        ground = Ground(layout, path)
        stack.callback(ground.close)
        names = Report()
        check_name(layout, ground, names)
        unmended = [Problem(finding.path, finding.kind, finding.detail) for finding in names.findings]
        if repair:
            return unmended + _repair(ground)
        return unmended + [Problem(finding.path, finding.kind, finding.detail) for finding in _examine(ground)]


def _repair(ground: Ground) -> list[Problem]:
    """Examine and mend until nothing more can be mended; gives all that was found."""
    mended: list[Problem] = []
    left: list[Problem] = []
    for _ in range(_ROUNDS):
        results = [mend(finding) for finding in _examine(ground, one_thing_at_a_time=True)]
        mended += [problem for problem in results if problem.repaired]
        left = [problem for problem in results if not problem.repaired]
        if len(left) == len(results):
            break
    return mended + left


def _examine(ground: Ground, *, one_thing_at_a_time: bool = False) -> list[Finding]:
    """All findings; or only those whose mending doesn't change what the others would be."""
    report = Report()
    check_folders(ground, report)
    check_log(ground, report)
    known = check_conf(ground, report)
    check_remains(ground, report)
    survey = Survey(ground.path, ground.templates, ground.templates.get(known[0]) if known else None)
    names = NameChecker(ground, report, survey.groups)
    survey.read(ground.root_fd, names.visit)
    for check in (check_places, check_records, check_unrecorded):
        if one_thing_at_a_time and report.mendable:
            break
        check(ground, report, survey)
    return report.findings


__all__ = ["LOST_AND_FOUND", "check_container"]
