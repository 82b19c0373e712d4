"""link(2): one more name."""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager

from vzfs import linux
from vzfs.store.faults import step
from vzfs.tree.area import PrivateArea
from vzfs.tree.attributes import AttributeReader
from vzfs.tree.become.directory import Directories
from vzfs.tree.durable import Durable
from vzfs.tree.groups import Groups
from vzfs.tree.lookup import Lookup, check_name
from vzfs.tree.node import Entry, Kind, Node, refuse_damaged
from vzfs.tree.table import Table


class Linking:
    """Gives further names in one mount."""

    def __init__(
        self,
        area: PrivateArea,
        lock: AbstractContextManager[object],
        durable: Durable,
        table: Table,
        lookup: Lookup,
        attributes: AttributeReader,
        groups: Groups,
        directories: Directories,
    ) -> None:
        self._area = area
        self._lock = lock
        self._durable = durable
        self._table = table
        self._lookup = lookup
        self._attributes = attributes
        self._groups = groups
        self._directories = directories

    def link(self, number: int, parent: int, name: bytes) -> Entry:
        """Make ``name`` one more hard link to the node."""
        check_name(name)
        self._directories.own(parent)
        with self._lock:
            node = self._lookup.get(number)
            directory = self._lookup.living_directory(parent)
            fd = self._lookup.directory_fd(directory)
            if node.is_directory:
                raise PermissionError(errno.EPERM, "a directory has one name", name)
            refuse_damaged(node)
            if self._exists(fd, name):
                raise FileExistsError(errno.EEXIST, "exists", name)
            if node.dead:
                self._name_again(node, directory, fd, name)
            elif node.kind is Kind.OWN and not node.group:
                source, source_name = self._lookup.location(node)
                os.link(source_name, name, src_dir_fd=source, dst_dir_fd=fd, follow_symlinks=False)
                self._table.add_name(node, directory, name)
            else:
                self._link_group(node, fd, name)
            node.lookups += 1
            return self._attributes.entry(node)

    def _name_again(self, node: Node, directory: Node, fd: int, name: bytes) -> None:
        """Give an own file a name that has none."""
        if not node.orphan or node.group:
            raise FileNotFoundError(errno.ENOENT, "the node was unlinked", name)
        backing = os.lstat(node.orphan, dir_fd=self._area.orphans_fd).st_ino
        linux.renameat2(self._area.orphans_fd, node.orphan, fd, name, linux.RENAME_NOREPLACE)
        step("orphan:named")
        node.orphan, node.dead, node.last = b"", False, None
        self._table.set_own(node, Kind.OWN, backing)
        self._table.place(node, directory, name)

    def _link_group(self, node: Node, fd: int, name: bytes) -> None:
        assert node.template is not None
        if not node.group:
            self._groups.make(node)
        self._durable.doubt = node.number
        self._groups.change_nlink(node, +1)
        try:
            node.template.plant_link(fd, name, node.entry)
            step("link-group:planted")
        except BaseException:
            self._groups.change_nlink(node, -1)
            raise
        finally:
            self._durable.doubt = 0

    @staticmethod
    def _exists(fd: int, name: bytes) -> bool:
        try:
            os.lstat(name, dir_fd=fd)
        except FileNotFoundError:
            return False
        return True
