"""Open files: by handles with a descriptor each, or counted by an engine that needs none.

Rule: a handle's descriptor stays the same number through a copy-up, what it refers to does not.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections import Counter
from contextlib import AbstractContextManager

from vzfs import linux
from vzfs.tree.become.file import Copies
from vzfs.tree.caller import ROOT, Caller
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Handle, Kind, Node, refuse_damaged
from vzfs.tree.orphans import Orphans
from vzfs.tree.table import Table

BACKING_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC
"""Flags of a program's open(2) that are passed on; the kernel itself deals with O_APPEND and O_DIRECT."""
OWN_DESCRIPTORS = 4096
"""Descriptors that open files of the container don't get: for directories, removed files, copies."""


class OpenFiles:
    """The open files of one mount."""

    def __init__(
        self, lock: AbstractContextManager[object], table: Table, lookup: Lookup, copying: Copies, orphans: Orphans
    ) -> None:
        self._lock = lock
        self._table = table
        self._lookup = lookup
        self._copying = copying
        self._orphans = orphans
        self.handles: dict[int, Handle] = {}
        self._next_handle = 1
        self._holders: Counter[int] = Counter()  # open files by the user who opened them
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_handles = max(limit - OWN_DESCRIPTORS, limit // 2)
        self._scarce_from = self._most_handles * 3 // 4

    def open(self, number: int, flags: int, caller: Caller = ROOT) -> Handle:
        """Open a regular file with the flags of open(2); opening a template's file for writing copies it up."""
        self.check_room(caller)
        writing = flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC
        if writing:
            self._copying.own(number, 0 if flags & os.O_TRUNC else None)
        with self._lock:
            fd, own = self.data_of(number, flags)
            if own and flags & os.O_TRUNC and caller.uid:
                linux.drop_set_id(fd)
            node = self._lookup.get(number)
            self._table.register(node)
            return self.add_handle(node, fd, flags, caller)

    def data_of(self, number: int, flags: int) -> tuple[int, bool]:
        """A new descriptor, which the caller closes, of the regular file that holds the node's data.

        ``flags`` are open(2)'s; also told: whether that file is the container's own. Raises ``OSError``: ``EISDIR``,
        ``EINVAL`` for what is neither file nor directory, ``ESTALE`` when ``flags`` are for writing and the node still
        has the template's data (``own_file`` comes first, and its copy has a number of its own where readers keep the
        template's).
        """
        with self._lock:
            node = self._lookup.get(number)
            if node.is_directory:
                raise IsADirectoryError(errno.EISDIR, "is a directory")
            refuse_damaged(node)
            if node.kind is Kind.OWN:
                return self.open_own(node, flags), True
            assert node.template is not None
            if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
                raise OSError(errno.ESTALE, "the copy has a node of its own")
            if not stat.S_ISREG(node.template.index.mode(node.entry)):
                raise OSError(errno.EINVAL, "not a regular file")
            return node.template.open_file(node.entry), False

    def open_own(self, node: Node, flags: int) -> int:
        """Open a regular file of the container's own; anything else, maybe a device, is refused untouched."""
        folder, name, follow = self._lookup.place_of(node)
        if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=follow).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        last = 0 if follow else os.O_NOFOLLOW
        return os.open(name, flags & BACKING_FLAGS | last | os.O_CLOEXEC, dir_fd=folder)

    def keep(self, number: int) -> Node:
        """Keep the node until ``let_go``, for who counts in it, under the lock, how often it is open."""
        with self._lock:
            node = self._lookup.get(number)
            node.kept = True
            self._table.register(node)
            return node

    def let_go(self, node: Node) -> None:
        """The reverse of ``keep``."""
        with self._lock:
            node.kept = False
            self._closed(node)

    def check_room(self, caller: Caller) -> None:
        """Refuse one more open file with ``ENFILE`` before descriptors run out, first to the user who has the most.

        Root gets some that nobody else gets, and the tree keeps some for its own work.
        """
        used = len(self.handles)
        if used < self._scarce_from:
            return
        with self._lock:
            most = max((count for uid, count in self._holders.items() if uid), default=0)
            if used >= self._most_handles or (caller.uid and self._holders[caller.uid] >= most):
                raise OSError(errno.ENFILE, f"{used} files are open in the container")

    def add_handle(self, node: Node, fd: int, flags: int, caller: Caller) -> Handle:
        handle = Handle(self._next_handle, node, fd, flags, caller.uid)
        self._next_handle += 1
        self._holders[caller.uid] += 1
        self.handles[handle.number] = handle
        if node.handles is None:
            node.handles = []
        node.handles.append(handle)
        return handle

    def handle(self, number: int) -> Handle:
        """The open file ``number``. Raises ``OSError`` ``EBADF``."""
        try:
            return self.handles[number]
        except KeyError:
            raise OSError(errno.EBADF, "no such open file") from None

    def release(self, number: int) -> None:
        """Close an open file; what was unlinked meanwhile is removed with its last one."""
        with self._lock:
            handle = self.handles.pop(number, None)
            if handle is None:
                return
            os.close(handle.fd)
            self._holders[handle.uid] -= 1
            node = handle.node
            assert node.handles is not None
            node.handles.remove(handle)
            if not node.handles:
                node.handles = None
                self._closed(node)

    def _closed(self, node: Node) -> None:
        """One who had the node open has closed it."""
        if not node.is_open and (self._table.drop_if_unused(node) or not node.dead):
            self._orphans.discard(node)
