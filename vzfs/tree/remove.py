"""unlink(2) and rmdir(2), and what else takes the last name of something: rename(2) over it.

Rule: what is open, or known to the kernel, stays usable, and its number isn't given to another.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager

from vzfs.store.faults import step
from vzfs.store.index import Attributes
from vzfs.tree.attributes import AttributeReader
from vzfs.tree.become.directory import Directories
from vzfs.tree.become.speed import SLOW_COPY
from vzfs.tree.durable import Durable
from vzfs.tree.groups import Groups
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Kind, Node
from vzfs.tree.orphans import Orphans
from vzfs.tree.pins import Pins
from vzfs.tree.table import Table


class Removing:
    """Takes names away in one mount."""

    def __init__(
        self,
        lock: AbstractContextManager[object],
        pins: Pins,
        durable: Durable,
        table: Table,
        lookup: Lookup,
        attributes: AttributeReader,
        groups: Groups,
        directories: Directories,
        orphans: Orphans,
    ) -> None:
        self._lock = lock
        self._pins = pins
        self._durable = durable
        self._table = table
        self._lookup = lookup
        self._attributes = attributes
        self._groups = groups
        self._directories = directories
        self._orphans = orphans

    def unlink(self, parent: int, name: bytes) -> int | None:
        """Remove a name of something that is no directory.

        Gives the number of a node whose much space should be given back at once, by ``free``, because nobody has it
        open and the kernel forgets it in its own time.
        """
        self._directories.own(parent)
        with self._lock:
            directory = self._lookup.living_directory(parent)
            node, info = self.existing(directory, name)
            if node.is_directory:
                raise IsADirectoryError(errno.EISDIR, "is a directory", name)
            last = self.loses_last_name(node, info)
            fd = self._lookup.directory_fd(directory)
            keep = self.must_keep(node, directory, name, last=last)
            if keep and last and self.pin(node, fd, name):
                keep = False
            with self.losing_name(node):
                step("unlink:before")
                if keep and last:
                    self._orphans.move(node, fd, name)
                else:
                    if keep:
                        self._orphans.link(node, fd, name)
                    os.unlink(name, dir_fd=fd)
                step("unlink:done")
            self.after_losing_name(node, directory, name, last=last)
            much = node.orphan and not node.is_open and node.last is not None and node.last.blocks * 512 > SLOW_COPY
            return node.number if much else None

    def existing(self, directory: Node, name: bytes) -> tuple[Node, os.stat_result | None]:
        node, info = self._lookup.find(directory, name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "no such name", name)
        return node, info

    def must_keep(self, node: Node, directory: Node, name: bytes, *, last: bool) -> bool:
        """Whether the node, about to lose this name, needs another one to stay usable for who knows it already."""
        if node.kind is not Kind.OWN or node.group or node.orphan:
            return False
        if last:
            return self._table.is_known(node)
        return node.is_open and not node.others and self._table.lies_at(node, directory, name)

    def pin(self, node: Node, folder: int, name: bytes) -> bool:
        """Let the node, about to lose its last name, need none: if nobody has it open and it takes little space.

        After a predecessor's death nobody knows for certain what is open.
        """
        assert node.last is not None
        if node.is_open or self._table.resumed or node.last.blocks * 512 > SLOW_COPY:
            return False
        return self._pins.pin(node, folder, name, node.last)

    def loses_last_name(self, node: Node, info: os.stat_result | None) -> bool:
        """Whether the node, about to lose a name, has only that; then its attributes without it are noted."""
        if node.kind is Kind.OWN and not node.group and info is not None and not stat.S_ISLNK(info.st_mode):
            last = info.st_nlink - bool(node.orphan) <= 1  # all that ``attributes`` would look at
            if last:
                node.last = Attributes.of(info, node.ino, 0)
            return last
        now = self._attributes.of(node, info)
        last = now.nlink <= 1 or node.is_directory
        if last:
            node.last = now._replace(nlink=0)
        return last

    @contextlib.contextmanager
    def losing_name(self, node: Node) -> Iterator[None]:
        """Around what takes a name of the node away.

        A link group is counted afterwards: dying in between leaves it counted too high, which keeps its data, while
        counted too low it would be given up with a name still there.
        """
        orphan = node.orphan
        if node.group:
            self._durable.doubt = node.number
            self._groups.begin_counting(node)
        try:
            yield
        except BaseException:
            if node.orphan != orphan:
                self._orphans.leave(node)
            self._pins.release(node.number)
            raise
        if node.group:
            self._groups.count_lost_name(node)

    def after_losing_name(self, node: Node, directory: Node, name: bytes, *, last: bool) -> None:
        if node.group:
            if last:
                self._groups.end(node)
            self._durable.doubt = 0
        if last:
            self._table.bury(node)
        elif not node.group:
            self._table.remove_name(node, directory, name)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        self._directories.own(parent)
        with self._lock:
            directory = self._lookup.living_directory(parent)
            node, info = self.existing(directory, name)
            fd = self._lookup.directory_fd(directory)
            if not node.is_directory:
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", name)
            self.loses_last_name(node, info)
            step("rmdir:before")
            if node.kind is Kind.FOLDED:
                self.check_empty(node)
                os.unlink(name, dir_fd=fd)
                self.count_folded(directory, -1)
            elif self._table.is_known(node):
                self._orphans.move_directory(node, fd, name)
            else:
                os.rmdir(name, dir_fd=fd)
            step("rmdir:done")
            self._table.bury(node)

    @staticmethod
    def check_empty(node: Node) -> None:
        assert node.template is not None
        if node.template.index.child_count[node.entry]:
            raise OSError(errno.ENOTEMPTY, "directory not empty")

    @staticmethod
    def count_folded(directory: Node, difference: int) -> None:
        if directory.folded_children is not None:
            directory.folded_children += difference
