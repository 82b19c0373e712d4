"""Finding and mending what an interrupted change, a damaged disk or a foreign hand left wrong in a container.

Rule: nothing of a container's data is deleted silently. What can't stay where it is goes to ``lost+found`` in the
container's folder, as it is; only what was staged or unlinked when a mount died is removed. The problems, by kind:

    leftover           in ``cow/stage``: an interrupted change. Removed.
    orphan             in ``cow/orphans``: unlinked but open when the mount died. Removed.
    missing            a folder of the store's own. Made.
    mode               such a folder with another mode or owner. Set.
    template           conf names none, or it is not in the store. Not mended; links to it are not looked at then.
    malformed          a magic link, or the name or content of a link group's record. To lost+found.
    dangling           a magic link, or such a record, of a template entry that doesn't exist. To lost+found.
    alias              a magic link to what is elsewhere, too. Directory: to lost+found. File: made a hard link.
    duplicate-origin   two things copied up from one entry, or one beside a link to it: the later one forgets it.
    bad-record         a ``trusted.vzfs`` attribute that can't be read. Removed, its value told.
    folds              a directory lacks the mark that it holds folded ones. Set.
    link-count         a link group's record has another number of names than there are. Set.
    orphan-group       a record without any name. To lost+found.

Paths are relative to the container's folder. Counting names costs what was unfolded, not what the template has.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vzfs.store import magic, sys
from vzfs.store.conf import OSTEMPLATE, TEMPLATES, Conf
from vzfs.store.layout import (
    ATTR_XATTR,
    CONF,
    COW,
    DUMP,
    FOLDS_XATTR,
    LINKS,
    NLINK_XATTR,
    ORIGIN_XATTR,
    ORPHANS,
    OWN_FOLDER_MODE,
    PRIVATE_AREA,
    STAGE,
    XATTR_PREFIX,
    Layout,
)
from vzfs.store.lock import Holder, Lock
from vzfs.store.opened import OpenTemplate
from vzfs.store.problem import Problem
from vzfs.store.record import read_record
from vzfs.store.survey import Folder, Form, Spot, Survey, Templates, Thing, identify, open_private_area, read_xattr
from vzfs.store.template import printable

LOST_AND_FOUND = "lost+found"
"""Where repairs put what they must not delete, in the container's folder."""
_ROUNDS = 8
"""Examinations of one repair at most: mending one thing may show another, but never this often."""
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def check_container(layout: Layout, path: Path, *, repair: bool = False) -> list[Problem]:
    """All that is wrong with the container at ``path``, mended where possible if ``repair``; nothing for a sound one.

    Raises ``BusyError`` while it is mounted, ``DamagedError`` when it has no private area.
    """
    lock = Lock.acquire(path, Holder(os.getpid(), "checks", time.time()))
    try:
        with _Checker(layout, path) as checker:
            if repair:
                return checker.repair()
            return [Problem(finding.path, finding.kind, finding.detail) for finding in checker.examine()]
    finally:
        lock.release()


@dataclass(frozen=True, slots=True)
class _Finding:
    """A problem and what mends it, which gives words to add to ``detail``; ``None`` if nothing can."""

    path: str
    kind: str
    detail: str
    mend: Callable[[], str] | None


class _Checker:
    """Examines one container, whose lock is held."""

    def __init__(self, layout: Layout, path: Path) -> None:
        self._layout = layout
        self._stack = contextlib.ExitStack()
        self._root_fd = open_private_area(path)
        self._stack.callback(os.close, self._root_fd)
        self._path = path
        self._top_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._stack.callback(os.close, self._top_fd)
        self._templates = Templates(layout)
        self._stack.callback(self._templates.close)
        self._lost = _LostAndFound(self._top_fd)
        self._findings: list[_Finding] = []

    def __enter__(self) -> _Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def repair(self) -> list[Problem]:
        """Examine and mend until nothing more can be mended; gives all that was found."""
        problems: list[Problem] = []
        for _ in range(_ROUNDS):
            results = [_mend(finding) for finding in self.examine(counting_last=True)]
            problems += [problem for problem in results if problem.repaired]
            left = [problem for problem in results if not problem.repaired]
            if len(left) == len(results):
                break
        return problems + left

    def examine(self, *, counting_last: bool = False) -> list[_Finding]:
        """All findings; with ``counting_last`` without those about link groups if something else can be mended first."""
        self._findings = []
        self._check_folders()
        known = self._check_conf()
        self._check_stage()
        self._check_orphans()
        places = _Places(self._path, self._templates, self._templates.get(known[0]) if known else None)
        visitor = _Visitor(self._report, self._root_fd, self._lost, places.survey, set(known))
        places.survey.read(self._root_fd, visitor.visit)
        visitor.finish()
        self._check_places(places.survey)
        if not (counting_last and any(finding.mend for finding in self._findings)):
            self._check_records(places.survey, set(known))
        return self._findings

    def _report(self, path: bytes | str, kind: str, detail: str, mend: Callable[[], str] | None) -> None:
        self._findings.append(_Finding(os.fsdecode(path), kind, detail, mend))
