"""How much a template may hold, for a small archive can unpack to any size.

Rule: what would exceed it is refused before it is written. Bytes of files are counted as the source has them: those of
an archive with the zeros that are written as holes, those of a directory without its holes.
"""

from __future__ import annotations

import os

from vzfs.errors import FullError
from vzfs.store.sources.errors import shown

KEPT_FREE = 20
"""One part in so many of the free space is left, if nobody says how much a template may hold."""


class Budget:
    """Counts down from ``limit`` bytes; ``None`` stands for what is free on the file system of ``target_fd``.

    ``is_explicit`` tells whether somebody chose the limit.
    """

    def __init__(self, target_fd: int, limit: int | None) -> None:
        self.is_explicit = limit is not None
        self._limit = _free(target_fd) if limit is None else limit
        self._left = self._limit

    def spend(self, size: int, name: bytes) -> None:
        """Take ``size`` bytes for the entry ``name``. Raises ``FullError`` when there aren't so many."""
        self._left -= size
        if self._left >= 0:
            return
        what = f"at {shown(name)} the source has more data than the {self._limit} bytes that"
        if self.is_explicit:
            raise FullError(f"{what} the template may have", remedy="allow more with --max-size")
        raise FullError(
            f"there is no space for it: {what} are free in the store, less five percent",
            remedy="free some space there; or say how much it may be with --max-size, if most of it is zeros",
        )


def _free(target_fd: int) -> int:
    space = os.fstatvfs(target_fd)
    free = space.f_bavail * space.f_frsize
    return free - free // KEPT_FREE
