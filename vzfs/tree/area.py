"""The private area and copy-on-write area of one container, by descriptors.

Rule: everything is reached relative to a directory descriptor and through no symbolic link. Descriptors given out by
``directory`` are borrowed: they may be closed by the next call, so they are used under the tree's lock and not kept.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections import OrderedDict
from pathlib import Path

from vzfs import linux
from vzfs.store.layout import COW, LINKS, ORPHANS, OWN_FOLDER_MODE, PRIVATE_AREA, STAGE
from vzfs.store.view import View
from vzfs.tree.node import Node

_PATH = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
DIRECTORY_CACHE = 256
"""Directory descriptors kept open at most: the working set of a package installation, far below any limit."""


class Sync(enum.Enum):
    """When copied-up data is flushed; fsync(2) of a program always is. Metadata is kept in order by a journal."""

    NONE = "none"
    """Never: a power failure may lose or, on file systems without ordered data, empty a just copied-up file."""
    DATA = "data"
    """A staged copy's data before the rename that makes it visible: old or new after a power failure."""
    FULL = "full"
    """The directory after that rename, too: what a program saw done stays done."""


class PrivateArea:
    """Descriptors of a container's folders; ``cow`` folders are made as needed unless ``read_only``; both are
    opened through ``view``."""

    def __init__(self, container: Path, view: View, *, read_only: bool) -> None:
        self.read_only = read_only
        self.root_fd = view.open_directory(container / PRIVATE_AREA)
        self.stage_fd = self.links_fd = self.orphans_fd = -1
        self._open: OrderedDict[Node, int] = OrderedDict()
        self._staged = 0
        self._cow_fd = view.open_directory(container / COW)
        with contextlib.suppress(FileNotFoundError):
            self.links_fd = self._cow_folder(LINKS, make=not read_only)
            self.stage_fd = self._cow_folder(STAGE, make=not read_only)
            self.orphans_fd = self._cow_folder(ORPHANS, make=not read_only)

    def _cow_folder(self, name: bytes, *, make: bool) -> int:
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, OWN_FOLDER_MODE, dir_fd=self._cow_fd)
        return os.open(name, _PATH | os.O_NOFOLLOW, dir_fd=self._cow_fd)

    def close(self) -> None:
        """Close every descriptor."""
        while self._open:
            os.close(self._open.popitem()[1])
        for fd in (self.root_fd, self._cow_fd, self.stage_fd, self.links_fd, self.orphans_fd):
            if fd >= 0:
                os.close(fd)

    def clear_stage(self) -> None:
        """Remove what an interrupted change staged."""
        for name in list_names(self.stage_fd):
            linux.remove_tree(self.stage_fd, name)

    def clear_orphans(self) -> None:
        """Remove what was only kept because it was known to the kernel."""
        for name in list_names(self.orphans_fd):
            linux.remove_tree(self.orphans_fd, name)

    def stage_name(self) -> bytes:
        """A name in ``stage_fd`` that nothing has."""
        self._staged += 1
        return b"%d" % self._staged

    def cached(self, directory: Node) -> int | None:
        """The directory's descriptor, borrowed, if it is open."""
        fd = self._open.get(directory)
        if fd is not None:
            self._open.move_to_end(directory)
        return fd

    def directory(self, chain: list[Node]) -> int:
        """Open, and give borrowed, the last of ``chain``: real directories from below the root to the wanted one."""
        if not chain:
            return self.root_fd
        fd = self._walk(chain)
        self._open[chain[-1]] = fd
        if len(self._open) > DIRECTORY_CACHE:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def _walk(self, chain: list[Node]) -> int:
        """Open ``chain`` from its nearest open directory on, in steps that fit a path."""
        start, fd = 0, self.root_fd
        for position in range(len(chain) - 1, -1, -1):
            known = self._open.get(chain[position])
            if known is not None:
                start, fd = position + 1, known
                break
        names = [node_name(node) for node in chain[start:]]
        temporary = -1
        while names:
            step, length = 0, 0
            while step < len(names) and length + len(names[step]) + 1 < linux.PATH_MAX:
                length += len(names[step]) + 1
                step += 1
            try:
                opened = linux.openat2(fd, b"/".join(names[:step]), os.O_PATH | os.O_DIRECTORY)
            finally:
                if temporary >= 0:
                    os.close(temporary)
            fd = temporary = opened
            names = names[step:]
        return fd

    def forget(self, node: Node) -> None:
        """Close a directory's descriptor, if it is open."""
        fd = self.take(node)
        if fd is not None:
            os.close(fd)

    def take(self, node: Node) -> int | None:
        """Give away a directory's descriptor, if it is open."""
        return self._open.pop(node, None)


def node_name(node: Node) -> bytes:
    """The name under which the node lies in its parent."""
    if node.parent is None and node.template is not None:
        return node.template.index.name(node.entry)
    return node.name


def list_names(folder_fd: int) -> list[bytes]:
    """Names in the directory ``folder_fd`` (which may be an ``O_PATH`` descriptor, or -1 for one that isn't there)."""
    if folder_fd < 0:
        return []
    fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME | os.O_CLOEXEC, dir_fd=folder_fd)
    try:
        return [os.fsencode(name) for name in os.listdir(fd)]
    finally:
        os.close(fd)
