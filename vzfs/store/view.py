"""Places of the store seen through a private copy of their mount on which reading leaves access times alone.

The kernel reads passed-through files on the mount that they were opened on, which mostly keeps access times
(``relatime``). Rule: the private area and the link farms of the templates are opened through one view, since files can
be renamed and hard-linked within one mount only.
"""

from __future__ import annotations

import os
from pathlib import Path

from vzfs import linux

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class View:
    """The directory that all ``places`` lie in; where the kernel makes no copy of its mount, the places themselves."""

    def __init__(self, *places: Path) -> None:
        self._top = Path(os.path.commonpath([os.path.realpath(place) for place in places]))
        self._fd = -1
        try:
            self._fd = linux.clone_mount(self._top, linux.MOUNT_NOATIME)
        except OSError:  # not permitted in a container, unknown to an old kernel: as it is, then
            return

    def close(self) -> None:
        """Close the view; what was opened through it stays open."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def open_directory(self, path: Path) -> int:
        """A descriptor (``O_PATH``) of the directory, itself and not what a link there leads to. Raises ``OSError``."""
        plain = os.open(path, _DIRECTORY)
        if self._fd < 0:
            return plain
        below = os.path.relpath(os.path.join(os.path.realpath(path.parent), path.name), self._top)
        try:
            seen = linux.openat2(self._fd, os.fsencode(below), _DIRECTORY, resolve=linux.RESOLVE_STRICT)
        except OSError:  # another mount lies between
            return plain
        if os.path.sameopenfile(seen, plain):
            os.close(plain)
            return seen
        os.close(seen)
        return plain
