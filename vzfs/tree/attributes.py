"""What stat(2) and the extended attributes of a node tell.

Rule: reads only; called under the tree's lock.
"""

from __future__ import annotations

import errno
import os
import stat

from vzfs import linux
from vzfs.store.identify import Form, follow
from vzfs.store.index import LIFETIME_S, Attributes
from vzfs.store.ownlink import read_own_link
from vzfs.store.record import Record, read_own_xattrs, read_record
from vzfs.store.xattrs import FOLDS_XATTR, NLINK_XATTR
from vzfs.tree.area import PrivateArea
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Entry, Kind, Node
from vzfs.tree.table import Table
from vzfs.tree.templates import TemplatesInUse


class AttributeReader:
    """Reads what the nodes of one mount are."""

    def __init__(self, area: PrivateArea, templates: TemplatesInUse, table: Table, lookup: Lookup) -> None:
        self._area = area
        self._templates = templates
        self._table = table
        self._lookup = lookup

    def entry(self, node: Node, info: os.stat_result | None = None) -> Entry:
        """What a look-up of the node answers; ``info`` as for ``attributes``."""
        name_s = 0 if node.group and self.may_split(node) else LIFETIME_S
        return Entry(node.number, node.generation, self.of(node, info), name_s)

    def may_split(self, node: Node) -> bool:
        """Whether the next writer may get a node of its own, because the kernel reads the template's file by itself."""
        if node.kind is not Kind.TEMPLATE and node.kind is not Kind.RECORD:
            return False
        assert node.template is not None
        return self._templates.is_passed(node.template, node.entry)

    def of(self, node: Node, info: os.stat_result | None = None) -> Attributes:
        """What stat tells of the node; ``info`` is what stat(2) just said of the object that holds its data."""
        if node.dead and not node.orphan and node.last is not None:
            if node.pin >= 0 and not stat.S_ISLNK(node.last.mode):
                return Attributes.of(os.fstat(node.pin), node.ino, 0)
            return node.last
        if node.kind is Kind.OWN or node.kind is Kind.DIRECTORY:
            return self._of_own(node, info)
        if node.kind is Kind.DAMAGED:
            info = os.lstat(self._lookup.path(node))
            return Attributes.of(info, node.ino, 1)._replace(mode=stat.S_IFREG, size=0)
        template = node.template
        assert template is not None
        base = template.index.attributes(node.entry)
        if node.kind is Kind.RECORD:
            folder, name = self._lookup.location(node)
            info = os.lstat(name, dir_fd=folder)
            nlink = self.group_nlink(node) if node.group else base.nlink
            return self.record_of(node).apply(base, nlink, info.st_ctime_ns)
        return base

    def record_of(self, node: Node) -> Record:
        """The record of a node that has one."""
        if node.record is None:
            node.record = read_record(linux.entry_path(*self._lookup.location(node))) or Record()
        return node.record

    def record_or_none(self, node: Node) -> Record:
        if node.kind is not Kind.RECORD or node.dead:
            return Record()
        return self.record_of(node)

    def xattrs_of(self, node: Node) -> dict[str, bytes]:
        """All extended attributes of a node that still has the template's data."""
        assert node.template is not None
        if node.kind is Kind.RECORD and self.record_or_none(node).own_xattrs:
            return read_own_xattrs(self._lookup.path(node))
        return node.template.index.xattrs(node.entry)

    def _of_own(self, node: Node, info: os.stat_result | None) -> Attributes:
        if node.kind is Kind.DIRECTORY:
            if node.orphan:
                return Attributes.of(os.lstat(self._lookup.path(node)), node.ino, 0)
            info = info or os.fstat(self._lookup.living_directory_fd(node))
            if info.st_nlink == 1:  # btrfs, for one, doesn't count subdirectories, and says so by 1
                return Attributes.of(info, node.ino, 1)
            return Attributes.of(info, node.ino, info.st_nlink + self._folded_children(node, info.st_nlink))
        if info is None:
            folder, name = self._lookup.location(node)
            info = os.lstat(name, dir_fd=folder)
        nlink = info.st_nlink - bool(node.orphan)
        if node.group:
            nlink = 0 if node.dead else self.group_nlink(node)
        attributes = Attributes.of(info, node.ino, nlink)
        if stat.S_ISLNK(info.st_mode):
            attributes = attributes._replace(size=len(read_own_link(*self._lookup.location(node))))
        return attributes

    def group_nlink(self, node: Node) -> int:
        """How many names the node's link group has in this container."""
        assert node.template is not None
        if node.template.base + node.template.index.leader[node.entry] not in self._templates.groups:
            return node.template.index.attributes(node.entry).nlink
        try:
            nlink = int(os.getxattr(linux.entry_path(*self._lookup.location(node)), NLINK_XATTR, follow_symlinks=False))
        except (ValueError, OSError) as error:
            raise OSError(errno.EIO, f"link group without a valid {NLINK_XATTR}") from error
        if not 0 <= nlink < 2**31:
            raise OSError(errno.EIO, f"link group with an impossible {NLINK_XATTR}")
        return nlink

    def _folded_children(self, node: Node, real_nlink: int) -> int:
        """How many folded directories a real one holds: they count as links of it, but aren't any on the disk."""
        if node.folded_children is None:
            node.folded_children = self._count_folded(node) if self._may_hold_folded(node) else 0
        return node.folded_children

    def _may_hold_folded(self, node: Node) -> bool:
        if node.template is not None and node.template.index.attributes(node.entry).nlink > 2:
            return True
        try:
            os.getxattr(self._lookup.path(node), FOLDS_XATTR, follow_symlinks=False)
        except OSError:
            return False
        return True

    def _count_folded(self, node: Node) -> int:
        directory = self._lookup.directory_fd(node)
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME | os.O_CLOEXEC, dir_fd=directory)
        try:
            with os.scandir(fd) as entries:
                links = [os.fsencode(entry.name) for entry in entries if entry.is_symlink()]
            return sum(self._means_directory(os.readlink(name, dir_fd=fd)) for name in links)
        finally:
            os.close(fd)

    def _means_directory(self, text: bytes) -> bool:
        meant = follow(self._templates.get_or_none, text)
        return not isinstance(meant, Form) and meant[0].index.is_directory(meant[1])
