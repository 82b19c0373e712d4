"""From a node number or a name to the node, and from the node to its place in the private area.

Rule: all methods are called under the tree's lock.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat

from vzfs import linux
from vzfs.store import magic
from vzfs.store.identify import Form, follow, read_xattr
from vzfs.store.index import Attributes
from vzfs.store.opened import OpenTemplate
from vzfs.store.record import read_record
from vzfs.store.xattrs import ORIGIN_XATTR, SPLIT_XATTR
from vzfs.tree.area import PrivateArea, node_name
from vzfs.tree.become.times import restore_times
from vzfs.tree.durable import unknown_attributes
from vzfs.tree.node import Kind, Node, Place, private_number
from vzfs.tree.pins import Pins
from vzfs.tree.scan import scan
from vzfs.tree.table import Table
from vzfs.tree.templates import TemplatesInUse

log = logging.getLogger(__name__)
NAME_MAX = 255
"""Bytes of a name, as on ext4; the kernel lets longer ones through to a FUSE server."""
_NO_NAMES = (b"", b".", b"..")


class Lookup:
    """Finds the nodes of one mount."""

    def __init__(self, area: PrivateArea, pins: Pins, templates: TemplatesInUse, table: Table) -> None:
        self._area = area
        self._pins = pins
        self._templates = templates
        self._table = table
        self._prefix: tuple[Node | None, bytes] = (None, b"")  # a directory and how links to its children begin
        if not area.read_only:
            restore_times(linux.entry_path(area.root_fd, b"."))

    def get(self, number: int) -> Node:
        """The node of ``number``. Raises ``OSError`` ``ESTALE`` when nothing alive has it."""
        node = self._table.nodes.get(number)
        if node is not None:
            return node
        if not self._table.resumed:
            return self._by_default(number)
        try:
            return self._by_default(number)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        return self._scanned(number) or self.lost(number)

    def living(self, number: int) -> Node:
        """The node of a number that a file handle has, which may be of an earlier mount. Raises ``OSError`` ``ESTALE``.

        The first unknown one of the container's own costs a few microseconds for each name in a real directory.
        """
        node = self._table.nodes.get(number)
        if node is None:
            try:
                node = self._by_default(number)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                node = self._scanned(number)
        if node is None or node.dead:
            raise OSError(errno.ESTALE, "nothing has that number any more")
        return node

    def _by_default(self, number: int) -> Node:
        """The node of a template's number, at its default place."""
        template = self._templates.of(number)
        if template is None:
            raise OSError(errno.ESTALE, "unknown node")
        entry = number - template.base
        if number in self._table.folded:
            return self._unchanged(template, entry)
        index = template.index
        if self._templates.in_group(template, entry):
            node = self._group_node(template, entry)
            if node.number != number:
                raise OSError(errno.ESTALE, "the group has another node since it was copied up")
            return node
        if not entry:
            return Node(number, Kind.FOLDED, number, template, 0)
        parent = self._parent_by_default(template, entry)
        if parent.dead:
            raise OSError(errno.ESTALE, "the node is gone with its directory")
        if parent.kind is Kind.DIRECTORY:
            return self._found_at_default_place(parent, number, index.name(entry))
        return self._unchanged(template, entry)

    def _parent_by_default(self, template: OpenTemplate, entry: int) -> Node:
        """The node of the directory that the template has ``entry`` in, found from the nearest known one downwards."""
        parents = template.index.parent
        chain = []
        above = parents[entry]
        while above and self._templates.number_of(template, above) not in self._table.nodes:
            if self._templates.number_of(template, above) in self._table.folded:
                break
            chain.append(above)
            above = parents[above]
        node = self.get(self._templates.number_of(template, above))
        for below in reversed(chain):
            if node.dead:
                break
            node = self._child_by_default(node, template, below)
        return node

    def _child_by_default(self, parent: Node, template: OpenTemplate, entry: int) -> Node:
        """The node of a directory of the template that lies in ``parent``, or where a scan has found it."""
        if parent.kind is not Kind.DIRECTORY:
            return self._unchanged(template, entry)
        number = self._templates.number_of(template, entry)
        try:
            return self._found_at_default_place(parent, number, template.index.name(entry))
        except OSError as error:
            if not self._table.resumed or error.errno != errno.ESTALE:
                raise
        return self._scanned(number) or self.lost(number)

    def _found_at_default_place(self, parent: Node, number: int, name: bytes) -> Node:
        node = self.child(parent, name)
        if node is None or node.number != number:
            raise OSError(errno.ESTALE, "the node is gone")
        return node

    def _unchanged(self, template: OpenTemplate, entry: int) -> Node:
        kind = Kind.FOLDED if template.index.is_directory(entry) else Kind.TEMPLATE
        number = self._templates.number_of(template, entry)
        if kind is Kind.FOLDED:
            self._table.note_folded(number, template)
        return Node(number, kind, number, template, entry)

    def directory(self, number: int) -> Node:
        node = self.get(number)
        if not node.is_directory:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory")
        return node

    def living_directory(self, number: int) -> Node:
        """The real directory ``number`` for a change in it; ``ENOENT`` when it was removed."""
        node = self.directory(number)
        if node.dead:
            raise FileNotFoundError(errno.ENOENT, "the directory was removed")
        return node

    def child(self, parent: Node, name: bytes) -> Node | None:
        """The node called ``name`` in ``parent``, or ``None``; registered unless ``parent`` is folded."""
        return self.find(parent, name)[0]

    def find(self, parent: Node, name: bytes) -> tuple[Node | None, os.stat_result | None]:
        """Like ``child``, with what stat(2) just said of the object that holds the node's data, if it was asked."""
        check_name(name)
        if parent.dead:
            return None, None
        template = parent.template
        if parent.kind is Kind.FOLDED:
            assert template is not None
            entry = template.index.find(parent.entry, name)
            return (self._folded_child(template, entry) if entry else None), None
        if parent.kind is not Kind.DIRECTORY:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", name)
        if template is not None:
            node = self._known_at_default_place(template, template.index.find(parent.entry, name))
            if node is not None:
                return node, None
        directory = self.directory_fd(parent)
        try:
            info = os.lstat(name, dir_fd=directory)
        except FileNotFoundError:
            return None, None
        if stat.S_ISLNK(info.st_mode):
            text = os.readlink(name, dir_fd=directory)
            if magic.is_magic(text):
                return self._linked(parent, name, info, text), None
        known = info.st_ino in self._table.by_backing
        node = self._own(parent, name, info)
        return node, info if known or not node.is_directory else None  # meeting a directory may set back its times

    def _known_at_default_place(self, template: OpenTemplate, entry: int) -> Node | None:
        """The node that lies where the template has ``entry`` (0: nowhere), if it is known that one does."""
        node = self._table.nodes.get(template.base + entry) if entry else None
        if node is None or node.dead or node.lost or node.group or node.parent is not None or node.entry != entry:
            return None
        return node

    def _folded_child(self, template: OpenTemplate, entry: int) -> Node:
        number = self._templates.number_of(template, entry)
        known = self._table.nodes.get(number)
        if known is not None and not known.dead:
            return known
        if self._templates.in_group(template, entry):
            return self._group_node(template, entry)
        return self._unchanged(template, entry)

    def _linked(self, parent: Node, name: bytes, info: os.stat_result, text: bytes) -> Node:
        """The node that the magic link ``name`` means."""
        meant = self._meant(parent, name, text)
        if meant is None:
            return self._damaged(parent, name, info)
        template, entry = meant
        if self._templates.in_group(template, entry):
            return self._group_node(template, entry)
        number = template.base + entry
        node = self._table.nodes.get(number)
        if node is not None:
            return node
        node = self._unchanged(template, entry)
        if info.st_nlink == 1 and not node.is_directory:
            try:
                if read_record(self._at(parent, name)) is not None:
                    node.kind = Kind.RECORD
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                log.error("%r: %s", name, error.strerror)  # noqa: TRY400
                return self._damaged(parent, name, info)
        self._table.place(node, parent, name)
        self._table.register(node)
        return node

    def _meant(self, parent: Node, name: bytes, text: bytes) -> tuple[OpenTemplate, int] | None:
        """The entry that the magic link ``text`` called ``name`` names; ``None`` when it is damaged."""
        if parent.template is not None:  # mostly that which the template has here
            if self._prefix[0] is not parent:
                self._prefix = parent, parent.template.link_text(parent.entry) + b"/"
            here = parent.template.index.find(parent.entry, name)
            if here and text == self._prefix[1] + name:
                return parent.template, here
        meant = follow(self._templates.get_or_none, text)
        if isinstance(meant, Form):
            log.error("%r is a %s: %r", name, meant.value, text)
            return None
        return meant

    def _damaged(self, parent: Node, name: bytes, info: os.stat_result) -> Node:
        """The node of a magic link that means nothing here: it can be seen and removed, and nothing else."""
        node = self._table.by_backing.get(info.st_ino)
        if node is None:
            node = self._table.new_own(Kind.DAMAGED, info.st_ino, linux.generation_of(self.directory_fd(parent), name))
            self._table.set_own(node, Kind.DAMAGED, info.st_ino)
            self._table.place(node, parent, name)
            self._table.register(node)
        else:
            self._table.add_name(node, parent, name)
        return node

    def _group_node(self, template: OpenTemplate, entry: int) -> Node:
        """The node of a link group, registered because its state is that of no single name."""
        leader: int = template.index.leader[entry]
        number = template.base + leader
        node = self._table.nodes.get(number)
        if node is not None and not node.dead:
            return node
        if number not in self._templates.groups:
            node = Node(number, Kind.TEMPLATE, number, template, leader, group=True)
            self._table.register(node)
            return node
        key = template.group_key(leader)
        info = os.lstat(key, dir_fd=self._area.links_fd)
        known = self._table.by_backing.get(info.st_ino)
        if known is not None:
            return known
        own = not (stat.S_ISLNK(info.st_mode) and magic.is_magic(os.readlink(key, dir_fd=self._area.links_fd)))
        split = own and self.read_origin(linux.entry_path(self._area.links_fd, key))[1]
        # A dead node of that number is what readers keep, see ``split``.
        free = number if node is None and not split else private_number(info.st_ino)
        node = Node(free, Kind.RECORD, number, template, leader, group=True)
        if free != number:
            node.generation = linux.generation_of(self._area.links_fd, key)
        if own:
            self._table.set_own(node, Kind.OWN, info.st_ino)
        self._table.register(node)
        return node

    def _own(self, parent: Node, name: bytes, info: os.stat_result) -> Node:
        """The node of an object of the container's own."""
        node = self._table.by_backing.get(info.st_ino)
        if node is not None:
            if (info.st_nlink > 1 or node.lost) and not node.is_directory:
                self._table.add_name(node, parent, name)
            return node
        kind = Kind.DIRECTORY if stat.S_ISDIR(info.st_mode) else Kind.OWN
        node = self._copied(parent, name, kind, info.st_ino)
        if node is None:
            node = self._table.new_own(kind, info.st_ino, linux.generation_of(self.directory_fd(parent), name))
        self._table.place(node, parent, name)
        self._table.set_own(node, kind, info.st_ino)
        self._table.register(node)
        if kind is Kind.DIRECTORY and not self._area.read_only:
            restore_times(self._at(parent, name))
        return node

    def _copied(self, parent: Node, name: bytes, kind: Kind, backing: int) -> Node | None:
        """The template's node if the object was copied from one, so that it keeps that inode number."""
        origin, split = self.read_origin(self._at(parent, name))
        if origin is None or origin[0].index.is_directory(origin[1]) != (kind is Kind.DIRECTORY):
            return None
        number = self._templates.number_of(*origin)
        if split:
            copy = Node(private_number(backing), kind, number, *origin)
            copy.generation = linux.generation_of(self.directory_fd(parent), name)
            return copy
        if number not in self._table.nodes:
            return Node(number, kind, number, *origin)
        return None  # somebody copied the object together with its origin: only one can keep the number

    def read_origin(self, path: bytes) -> tuple[tuple[OpenTemplate, int] | None, bool]:
        """What the object at ``path`` was copied from, and whether its readers kept the number, see ``split``."""
        data = read_xattr(path, ORIGIN_XATTR)
        origin = None if data is None else self._templates.find_origin(data)
        return origin, origin is not None and self._templates.passthrough_above is not None and read_xattr(
            path, SPLIT_XATTR
        ) is not None

    def adopt(self, parent: Node, name: bytes, info: os.stat_result) -> Node:
        """The node of the just made object ``name``."""
        kind = Kind.DIRECTORY if stat.S_ISDIR(info.st_mode) else Kind.OWN
        node = self._table.new_own(kind, info.st_ino, linux.generation_of(self.directory_fd(parent), name))
        node.folded_children = 0
        self._table.place(node, parent, name)
        self._table.set_own(node, kind, info.st_ino)
        self._table.register(node)
        return node

    def parent(self, node: Node) -> Node:
        """The directory that holds the node; the root's is the root."""
        if node is self._table.root:
            return node
        if node.parent is not None:
            return node.parent
        if node.template is None or node.dead or node.lost:
            raise OSError(errno.ESTALE, "the node has no place")
        return self.get(self._templates.number_of(node.template, node.template.index.parent[node.entry]))

    def directory_fd(self, node: Node) -> int:
        """Descriptor of a real directory, borrowed (see ``PrivateArea``)."""
        fd = self._area.cached(node)
        if fd is not None:
            return fd
        chain: list[Node] = []
        while node is not self._table.root:
            chain.append(node)
            node = self.parent(node)
        chain.reverse()
        return self._area.directory(chain)

    def location(self, node: Node) -> tuple[int, bytes]:
        """Directory descriptor and name of what stores the node: its name, its group's record or its orphan."""
        if node.orphan:
            return self._area.orphans_fd, node.orphan
        if node.dead:
            raise OSError(errno.ESTALE, "the node is gone")
        if node.group:
            assert node.template is not None
            return self._area.links_fd, node.template.group_key(node.entry)
        if node is self._table.root:
            return self._area.root_fd, b"."
        return self.directory_fd(self.parent(node)), node_name(node)

    def place_of(self, node: Node) -> Place:
        """By what that which stores the node can be changed."""
        if node.pin >= 0:
            return Place(None, linux.fd_path(node.pin), follow=True)
        if node.kind is Kind.DIRECTORY and not node.orphan:
            return Place(self.living_directory_fd(node), b".", follow=False)
        return Place(*self.location(node), follow=False)

    def path(self, node: Node) -> bytes:
        """A path to what stores the node, which has a name, for the calls that need one."""
        return self.place_of(node).path

    def living_directory_fd(self, node: Node) -> int:
        """Like ``directory_fd``, raising ``ESTALE`` for a removed directory."""
        if node.dead:
            raise OSError(errno.ESTALE, "the directory is gone")
        return self.directory_fd(node)

    def _at(self, parent: Node, name: bytes) -> bytes:
        return linux.entry_path(self.directory_fd(parent), name)

    def _scanned(self, number: int) -> Node | None:
        """The living node of a number that isn't at its default place."""
        if self._table.places is None:
            self._table.places = scan(self._area, self._templates, self.read_origin)
            with contextlib.suppress(OSError):
                return self._by_default(number)  # its template may be known only now
        chain = []
        above = number
        while above in self._table.places and (above == number or above not in self._table.nodes):
            above, name = self._table.places[above]
            chain.append(name)
        if not chain:
            return None
        node: Node | None = self.get(above)
        for name in reversed(chain):
            if node is None or node.dead or node.kind is not Kind.DIRECTORY:
                return None
            node = self.child(node, name)
        return node if node is not None and node.number == number else None

    def lost(self, number: int, last: Attributes | None = None) -> Node:
        """A node for what is not here any more; ``last`` is what was told of it, if that is known."""
        template = self._templates.of(number)
        if template is None:
            last = last or unknown_attributes(number)
            kind = Kind.DIRECTORY if stat.S_ISDIR(last.mode) else Kind.OWN
            node = Node(number, kind, last.ino)
        else:
            entry = number - template.base
            kind = Kind.FOLDED if template.index.is_directory(entry) else Kind.TEMPLATE
            node = Node(number, kind, number, template, entry)
            last = last or template.index.attributes(entry)._replace(nlink=0)
        node.last = last
        node.dead = True
        node.lookups = 1
        self._table.register(node)
        return node


def check_name(name: bytes) -> None:
    """Refuse what is no single component: ``ENAMETOOLONG``, and ``EINVAL`` for what the kernel never asks for."""
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, "name too long", name)
    if name in _NO_NAMES or b"/" in name:
        raise OSError(errno.EINVAL, "no name in a directory", name)
