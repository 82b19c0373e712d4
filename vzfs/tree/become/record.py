"""Changed attributes of a template's regular file, kept with its magic link instead of a copy of its data.

Rule: the record is staged, and takes the place of the shared magic link by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable

from vzfs import linux
from vzfs.store.faults import step
from vzfs.store.record import Record, read_own_xattrs
from vzfs.store.xattrs import ATTR_XATTR, XATTR_PREFIX
from vzfs.tree.area import PrivateArea
from vzfs.tree.attributes import AttributeReader
from vzfs.tree.become.stage import Stage
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Kind, Node
from vzfs.tree.table import Table


class Records:
    """The records of one mount."""

    def __init__(
        self, area: PrivateArea, lookup: Lookup, table: Table, attributes: AttributeReader, stage: Stage
    ) -> None:
        self._area = area
        self._lookup = lookup
        self._table = table
        self._attributes = attributes
        self._stage = stage

    def change(self, node: Node, change: Callable[[Record], Record], xattrs: dict[str, bytes] | None = None) -> None:
        """Keep changed attributes, and the whole set of extended ones if given, of a template file without its data."""
        before = self._attributes.record_or_none(node)
        record = change(before)
        if node.kind is Kind.RECORD:
            path = self._lookup.path(node)
            if xattrs is not None:
                self._replace_xattrs(path, xattrs)
            os.setxattr(path, ATTR_XATTR, record.encode(), follow_symlinks=False)
            if record == before:
                _touch(path)  # the same value again does not move the change time
            node.record = record
            return
        self.make(node, record, xattrs, self._attributes.of(node).nlink)

    def touch(self, node: Node) -> None:
        """Move the change time of what stores the node."""
        _touch(self._lookup.path(node))

    def make(self, node: Node, record: Record, xattrs: dict[str, bytes] | None, nlink: int) -> None:
        """Stage a magic link with attributes and put it in the place of the node's shared one."""
        template = node.template
        assert template is not None
        staged = self._area.stage_name()
        stage = self._area.stage_fd
        path = linux.entry_path(stage, staged)
        os.symlink(template.link_text(node.entry), staged, dir_fd=stage)
        try:
            step("record:made")
            os.setxattr(path, ATTR_XATTR, record.encode(), follow_symlinks=False)
            for xattr, value in (xattrs or {}).items():
                os.setxattr(path, XATTR_PREFIX + xattr, value, follow_symlinks=False)
            step("record:staged")
            self._stage.place(node, staged, nlink, "record:renamed")
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged, dir_fd=stage)
            raise
        node.kind = Kind.RECORD
        node.record = record
        self._table.register(node)

    @staticmethod
    def _replace_xattrs(path: bytes, wanted: dict[str, bytes]) -> None:
        present = read_own_xattrs(path)
        for name in present.keys() - wanted.keys():
            os.removexattr(path, XATTR_PREFIX + name, follow_symlinks=False)
        for name, value in wanted.items():
            if present.get(name) != value:
                os.setxattr(path, XATTR_PREFIX + name, value, follow_symlinks=False)


def _touch(path: bytes) -> None:
    """Move the change time of what is at ``path``, not followed."""
    info = os.lstat(path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def no_space(error: OSError) -> bool:
    """Whether the error says that an extended attribute did not fit where one was tried to be kept."""
    return error.errno in (errno.ENOSPC, errno.E2BIG, errno.ERANGE)


def can_record(node: Node) -> bool:
    """Whether a record can hold changed attributes of the node: those of a regular file."""
    assert node.template is not None
    return stat.S_ISREG(node.template.index.mode(node.entry))
