"""What has lost its last name and is needed still: in ``cow/orphans``, under its number.

An own object that loses its last known name gets one there if it is open, large or a directory (else see ``Pins``): so
it stays usable, and its inode number isn't given to another while the kernel still holds it.
"""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager

from vzfs import linux
from vzfs.store.faults import step
from vzfs.tree.area import PrivateArea, list_names
from vzfs.tree.become.effort import best_effort
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Node
from vzfs.tree.pins import Pins
from vzfs.tree.table import Table

SLOW_FREE = 64 << 20
"""Bytes of an unlinked file whose removal is long work."""


class Orphans:
    """The orphans of one mount."""

    def __init__(
        self, area: PrivateArea, lock: AbstractContextManager[object], pins: Pins, table: Table, lookup: Lookup
    ) -> None:
        self._area = area
        self._lock = lock
        self._pins = pins
        self._table = table
        self._lookup = lookup

    def move(self, node: Node, folder: int, name: bytes) -> None:
        """Take the last ``name`` of an own object away."""
        orphan = b"%d" % node.number
        os.rename(name, orphan, src_dir_fd=folder, dst_dir_fd=self._area.orphans_fd)
        step("orphan:moved")
        node.orphan = orphan

    def move_directory(self, node: Node, folder: int, name: bytes) -> None:
        """Take the ``name`` of a directory away. Raises ``OSError`` ``ENOTEMPTY``."""
        fd = self._lookup.directory_fd(node)  # open, so that it keeps its inode number if it can't be moved
        if list_names(fd):
            raise OSError(errno.ENOTEMPTY, "directory not empty", name)
        try:
            self.move(node, folder, name)
        except OSError:  # no space for one more name there
            os.rmdir(name, dir_fd=folder)

    def link(self, node: Node, folder: int, name: bytes) -> None:
        """Keep an own object that is about to lose ``name``."""
        orphan = b"%d" % node.number
        os.link(name, orphan, src_dir_fd=folder, dst_dir_fd=self._area.orphans_fd, follow_symlinks=False)
        step("orphan:linked")
        node.orphan = orphan

    def leave(self, node: Node) -> None:
        """Undo ``link_to_orphans``: the node keeps its name."""
        orphan, node.orphan = node.orphan, b""
        with best_effort("remove an orphan's name"):
            os.unlink(orphan, dir_fd=self._area.orphans_fd)

    def discard(self, node: Node) -> None:
        kept = self._pins.release(node.number)
        if node.number in self._table.stand_ins:
            self._table.stand_ins.remove(node.number)
            linux.remove_tree(self._area.orphans_fd, b"%d" % node.number)
        if node.orphan:
            remove = os.rmdir if node.is_directory else os.unlink
            remove(node.orphan, dir_fd=self._area.orphans_fd)
            node.orphan = b""
            kept = True
        if kept:
            self._table.changed(node.number)

    def free(self, number: int) -> None:
        """Give back the space of an unlinked node unless somebody has it open; for large files this is long work."""
        with self._lock:
            node = self._table.registered(number)
            if node is None or not node.dead or node.is_open or not node.orphan:
                return
            orphan, node.orphan = node.orphan, b""
            self._table.changed(number)
        os.unlink(orphan, dir_fd=self._area.orphans_fd)

    def slow_to_forget(self, number: int) -> bool:
        """Whether forgetting or closing the node may free a large file, which is long work."""
        node = self._table.registered(number)
        return node is not None and bool(node.orphan) and node.last is not None and node.last.size > SLOW_FREE

    def forget(self, number: int, count: int) -> None:
        """The kernel has forgotten ``count`` look-ups of ``number``."""
        with self._lock:
            node = self._table.forget(number, count)
            if node is not None:
                self.discard(node)
