"""What an examination notes, and the place for what a repair must not delete."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from vzfs import linux
from vzfs.store.escape import printable
from vzfs.store.layout import OWN_FOLDER_MODE
from vzfs.store.problem import Problem

LOST_AND_FOUND = "lost+found"
"""Where repairs put what they must not delete, in the container's folder."""

NAME_MAX = 255
_NAME_ROOM = 240
"""Bytes kept of a name that gets a number."""

Mend = Callable[[], str]
"""Repairs one thing and says what it did, or ``""`` where that goes without saying. Raises ``OSError``."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem and what mends it, ``None`` if nothing can."""

    path: str
    kind: str
    detail: str
    mend: Mend | None


class Report:
    """Findings in the order they were made; ``mendable`` says whether any of them can be mended."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.mendable = False

    def __call__(self, path: bytes | str, kind: str, detail: str, mend: Mend | None) -> None:
        """Note a problem at ``path``, relative to the container's folder."""
        self.findings.append(Finding(os.fsdecode(path), kind, detail, mend))
        self.mendable = self.mendable or mend is not None


def mend(finding: Finding) -> Problem:
    """Repair what can be; a repair that fails is told in the problem and leaves things as they were."""
    if finding.mend is None:
        return Problem(finding.path, finding.kind, finding.detail)
    try:
        done = finding.mend()
    except OSError as error:
        return Problem(finding.path, finding.kind, f"{finding.detail}; could not be repaired: {error.strerror}")
    return Problem(finding.path, finding.kind, f"{finding.detail}; {done}" if done else finding.detail, repaired=True)


class LostAndFound:
    """The container's ``lost+found``, made with the first thing that comes in."""

    def __init__(self, top_fd: int) -> None:
        self._top_fd = top_fd
        self._fd = -1
        self._taken: Counter[bytes] = Counter()

    def close(self) -> None:
        """Close the folder."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def take(self, dir_fd: int, name: bytes) -> str:
        """Move ``name`` in ``dir_fd`` here as it is, under a name that is free; tells which."""
        folder = self._folder()
        while True:
            number = self._taken[name]
            self._taken[name] += 1
            free = name[:_NAME_ROOM] + b".%d" % number if number else name
            try:
                linux.renameat2(dir_fd, name, folder, free, linux.RENAME_NOREPLACE)
            except FileExistsError:
                continue
            return f"moved to {LOST_AND_FOUND}/{printable(free)}"

    def _folder(self) -> int:
        if self._fd < 0:
            try:
                os.mkdir(LOST_AND_FOUND, OWN_FOLDER_MODE, dir_fd=self._top_fd)
            except FileExistsError:
                pass  # an earlier repair's
            self._fd = os.open(
                LOST_AND_FOUND, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._top_fd
            )
        return self._fd
