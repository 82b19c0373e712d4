"""The nodes of one mount: from a node number or a name to a node, and from a node to its place and attributes.

Rules:
- A node of a template entry is registered only if it differs from what its number already says (see ``Node``): the
  entries of folded directories need no memory, whatever the kernel knows of them.
- Numbers: 1 is the root; a template's entries have ``base + leader``; everything else has the inode number it has in
  the private area's file system, shifted by ``PRIVATE_SHIFT`` if a template could have that number.
- ``_folded`` knows directories that are folded for certain, wherever they lie now. A directory leaves it when it is
  unfolded or removed; then all below it are still what they were.
- All methods are called under the tree's lock.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable

from vzfs.errors import VzfsError
from vzfs.store import magic, sys
from vzfs.store.index import LIFETIME_S, Attributes
from vzfs.store.layout import FOLDS_XATTR, NLINK_XATTR, ORIGIN_XATTR
from vzfs.store.opened import SPLIT_XATTR, OpenTemplate
from vzfs.store.ownlink import read_own_link
from vzfs.store.record import Record, read_record
from vzfs.store.survey import parse_origin, read_xattr
from vzfs.tree.area import PrivateArea, list_names, node_name
from vzfs.tree.durable import unknown_attributes
from vzfs.tree.node import ROOT_NUMBER, Entry, Kind, Node, Place, private_number
from vzfs.tree.pins import Pins
from vzfs.tree.resume import Places, scan
from vzfs.tree.times import restore_times

log = logging.getLogger(__name__)

FOLDED_CACHE = 1 << 16
"""Numbers of directories remembered as folded, about 100 bytes each."""
NAME_MAX = 255
_NO_NAMES = (b"", b".", b"..")
"""Bytes of a name, as on ext4; the kernel lets longer ones through to a FUSE server."""


class Nodes:
    """The table of registered nodes and everything that finds, places and describes nodes."""

    def __init__(
        self,
        area: PrivateArea,
        pins: Pins,
        load_template: Callable[[str], OpenTemplate],
        os_template: str,
        changed: Callable[[int], None] | None = None,
        *,
        passthrough_above: int | None = None,
    ) -> None:
        self.area = area
        self._pins = pins
        self.changed = changed or _nobody
        self._passthrough_above = passthrough_above
        self.resumed = False
        self.stand_ins: set[int] = set()  # of ``Pins.lost``, those that something in cow/orphans keeps from being used
        self._prefix: tuple[Node | None, bytes] = (None, b"")  # a directory and how links to its children begin
        self._places: Places | None = None
        self._load_template = load_template
        self._templates: dict[str, OpenTemplate] = {}
        self._unsure: dict[str, list[int]] = {}
        self._table: dict[int, Node] = {}
        self._by_backing: dict[int, Node] = {}
        self._folded: dict[int, OpenTemplate] = {}
        self._records = set(list_names(area.links_fd))  # of templates that are not open yet
        self.groups: set[int] = set()  # numbers of link groups that have a record
        self._uneven: Counter[int] = (
            Counter()
        )  # directories whose listing in the index is wrong of a member's link group
        template = self._add_template(os_template)
        self.root = Node(ROOT_NUMBER, Kind.DIRECTORY, template.base, template, 0)
        self.root.backing = os.stat(sys.fd_path(area.root_fd)).st_ino
        self.root.lookups = 1
        self._table[ROOT_NUMBER] = self._table[template.base] = self.root
        self._by_backing[self.root.backing] = self.root
        if not area.read_only:
            restore_times(sys.entry_path(area.root_fd, b"."))

    # ------------------------------------------------------------------------------------------------- templates

    def template(self, name: str) -> OpenTemplate:
        """The template ``name``, opened once. Raises ``OSError`` ``EIO`` when it isn't there."""
        known = self._templates.get(name)
        if known is None:
            try:
                known = self._add_template(name)
            except VzfsError as error:
                raise OSError(errno.EIO, str(error)) from error
        return known

    def _add_template(self, name: str) -> OpenTemplate:
        template = self._templates[name] = self._load_template(name)
        prefix = name.encode() + b":"
        for key in [key for key in self._records if key.startswith(prefix)]:
            entry = key.removeprefix(prefix)
            if entry.isdigit() and int(entry) < template.index.count and template.group_key(int(entry)) == key:
                self.add_group(template, int(entry))
        return template

    def close(self) -> None:
        """Close the templates."""
        for template in self._templates.values():
            template.close()

    def _template_of(self, number: int) -> OpenTemplate | None:
        for template in self._templates.values():
            if template.base <= number < template.end:
                return template
        return None

    def _find_origin(self, data: bytes) -> tuple[OpenTemplate, int] | None:
        origin = parse_origin(data)
        if origin is None:
            return None
        try:
            template = self.template(origin[0])
        except OSError:
            return None  # what was copied is the container's own also where the original is missing
        return (template, origin[1]) if origin[1] < template.index.count else None

    def add_group(self, template: OpenTemplate, entry: int) -> None:
        """Say that the link group of ``entry`` has a record now."""
        number = template.base + template.index.leader[entry]
        if number not in self.groups:
            self.groups.add(number)
            self._uneven.update(self._holders(template, entry))

    def end_group(self, template: OpenTemplate, entry: int) -> None:
        """Say that the link group of ``entry`` has no record any more."""
        number = template.base + template.index.leader[entry]
        if number in self.groups:
            self.groups.remove(number)
            self._uneven.subtract(self._holders(template, entry))

    @staticmethod
    def _holders(template: OpenTemplate, entry: int) -> list[int]:
        index = template.index
        return [template.base + index.parent[member] for member in index.members(entry)]

    def _in_group(self, template: OpenTemplate, entry: int) -> bool:
        """Whether the entry has several names in the template or this container, or had."""
        return template.index.next_link[entry] != entry or template.base + entry in self.groups

    # ---------------------------------------------------------------------------------------- from number to node

    def get(self, number: int) -> Node:
        """The node of ``number``. Raises ``OSError`` ``ESTALE`` when nothing alive has it."""
        node = self._table.get(number)
        if node is not None:
            return node
        if not self.resumed:
            return self._by_default(number)
        try:
            return self._by_default(number)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        return self._scanned(number) or self._lost(number)

    def _by_default(self, number: int) -> Node:
        """The node of a template's number, at its default place."""
        template = self._template_of(number)
        if template is None:
            raise OSError(errno.ESTALE, "unknown node")
        entry = number - template.base
        if number in self._folded:
            return self._unchanged(template, entry)
        index = template.index
        if self._in_group(template, entry):
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
        while above and self.number_of(template, above) not in self._table:
            if self.number_of(template, above) in self._folded:
                break
            chain.append(above)
            above = parents[above]
        node = self.get(self.number_of(template, above))
        for below in reversed(chain):
            if node.dead:
                break
            node = self._child_by_default(node, template, below)
        return node

    def living(self, number: int) -> Node:
        """The node of a number that a file handle has, which may be of an earlier mount. Raises ``OSError`` ``ESTALE``.

        The first unknown one of the container's own costs a few microseconds for each name in a real directory.
        """
        node = self._table.get(number)
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

    def _child_by_default(self, parent: Node, template: OpenTemplate, entry: int) -> Node:
        """The node of a directory of the template that lies in ``parent``, or where a scan has found it."""
        if parent.kind is not Kind.DIRECTORY:
            return self._unchanged(template, entry)
        number = self.number_of(template, entry)
        try:
            return self._found_at_default_place(parent, number, template.index.name(entry))
        except OSError as error:
            if not self.resumed or error.errno != errno.ESTALE:
                raise
        return self._scanned(number) or self._lost(number)

    # --------------------------------------------------------------------------------------------------- resuming

    def resume(self) -> None:
        """Understand, from now on, every number that a dead process gave the kernel for what is here."""
        self.resumed = True
        for number, attributes in self._pins.inherited():
            self._lost(number, attributes)
        for name in list_names(self.area.orphans_fd):
            if name.isdigit() and int(name) in self._pins.lost:
                self.stand_ins.add(int(name))
            elif name.isdigit():
                self._register_orphan(name)

    def is_known(self, node: Node) -> bool:
        """Whether the kernel or an open file may still ask for the node."""
        return node.known or self.resumed

    def _register_orphan(self, name: bytes) -> None:
        info = os.lstat(name, dir_fd=self.area.orphans_fd)
        number = int(name)
        origin, split = self.read_origin(sys.entry_path(self.area.orphans_fd, name))
        node = Node(number, Kind.OWN, number)
        if origin is not None and (split or number == self.number_of(*origin)):
            node = Node(number, Kind.OWN, self.number_of(*origin), *origin)
        if node.number != node.ino or node.template is None:
            node.generation = sys.generation_of(self.area.orphans_fd, name)
        node.orphan = name
        node.lookups = 1
        if stat.S_ISDIR(info.st_mode):
            node.kind, node.dead = Kind.DIRECTORY, True
        elif info.st_nlink > 1:
            node.lost = True
            self.set_own(node, Kind.OWN, info.st_ino)
        else:
            node.dead = True
            node.backing = info.st_ino
            node.last = self.attributes(node)
        self.register(node)

    def _scanned(self, number: int) -> Node | None:
        """The living node of a number that isn't at its default place."""
        if self._places is None:
            self._places = scan(self)
            with contextlib.suppress(OSError):
                return self._by_default(number)  # its template may be known only now
        chain = []
        above = number
        while above in self._places and (above == number or above not in self._table):
            above, name = self._places[above]
            chain.append(name)
        if not chain:
            return None
        node: Node | None = self.get(above)
        for name in reversed(chain):
            if node is None or node.dead or node.kind is not Kind.DIRECTORY:
                return None
            node = self.child(node, name)
        return node if node is not None and node.number == number else None

    def _lost(self, number: int, last: Attributes | None = None) -> Node:
        """A node for what is not here any more; ``last`` is what was told of it, if that is known."""
        template = self._template_of(number)
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
        self.register(node)
        return node

    def registered(self, number: int) -> Node | None:
        """The node of ``number`` if the table has it."""
        return self._table.get(number)

    def _unchanged(self, template: OpenTemplate, entry: int) -> Node:
        kind = Kind.FOLDED if template.index.is_directory(entry) else Kind.TEMPLATE
        number = self.number_of(template, entry)
        if kind is Kind.FOLDED:
            self._note_folded(number, template)
        return Node(number, kind, number, template, entry)

    def _note_folded(self, number: int, template: OpenTemplate) -> None:
        if len(self._folded) >= FOLDED_CACHE:
            self._folded.clear()
        self._folded[number] = template

    def folded(self, number: int) -> OpenTemplate | None:
        """The template of the directory ``number`` if that is certainly folded; asks the disk nothing."""
        template = self._folded.get(number)
        if template is not None:
            return template
        template = self._template_of(number)
        if template is None or not template.index.is_directory(number - template.base):
            return None
        above, parents = number, template.index.parent
        while above not in self._folded:
            node = self._table.get(above)
            if node is not None:
                if node.dead or node.kind is not Kind.FOLDED:
                    return None
                break
            if above == template.base:
                return None
            above = template.base + parents[above - template.base]
        self._note_folded(number, template)
        return template

    def unchanged(self, number: int) -> tuple[OpenTemplate, int] | None:
        """Template and entry of the node if it is certainly as in the index; asks the disk nothing."""
        node = self._table.get(number)
        if node is not None:
            if node.dead or (node.kind is not Kind.TEMPLATE and node.kind is not Kind.FOLDED):
                return None
            assert node.template is not None
            return node.template, node.entry
        if number in self.groups:
            return None
        template = self._folded.get(number)
        if template is not None:
            return template, number - template.base
        template = self._template_of(number)
        if template is None:
            return None
        entry, index = number - template.base, template.index
        if index.next_link[entry] != entry or self.folded(template.base + index.parent[entry]) is not None:
            return template, entry
        return None

    def even_listing(self, number: int) -> tuple[OpenTemplate, int] | None:
        """Template and entry of a directory whose listing is certainly the index's; asks the disk nothing."""
        template = self.folded(number)
        if template is None or (self._uneven and self._uneven[number]):
            return None
        node = self._table.get(number)
        if node is not None and node.parent is not None:  # elsewhere, so ``..`` is another one
            return None
        return template, number - template.base

    def _found_at_default_place(self, parent: Node, number: int, name: bytes) -> Node:
        node = self.child(parent, name)
        if node is None or node.number != number:
            raise OSError(errno.ESTALE, "the node is gone")
        return node

    def number_of(self, template: OpenTemplate, entry: int) -> int:
        """Node number of a template's entry."""
        number: int = template.base + template.index.leader[entry]
        return ROOT_NUMBER if number == self.root.ino else number

    # ------------------------------------------------------------------------------------------ from name to node

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
        known = info.st_ino in self._by_backing
        node = self._own(parent, name, info)
        return node, info if known or not node.is_directory else None  # meeting a directory may set back its times

    def _known_at_default_place(self, template: OpenTemplate, entry: int) -> Node | None:
        """The node that lies where the template has ``entry`` (0: nowhere), if it is known that one does."""
        node = self._table.get(template.base + entry) if entry else None
        if node is None or node.dead or node.lost or node.group or node.parent is not None or node.entry != entry:
            return None
        return node

    def _folded_child(self, template: OpenTemplate, entry: int) -> Node:
        number = self.number_of(template, entry)
        known = self._table.get(number)
        if known is not None and not known.dead:
            return known
        if self._in_group(template, entry):
            return self._group_node(template, entry)
        return self._unchanged(template, entry)

    def _linked(self, parent: Node, name: bytes, info: os.stat_result, text: bytes) -> Node:
        """The node that the magic link ``name`` means."""
        meant = self._meant(parent, name, text)
        if meant is None:
            return self._damaged(parent, name, info)
        template, entry = meant
        if self._in_group(template, entry):
            return self._group_node(template, entry)
        number = template.base + entry
        node = self._table.get(number)
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
        self.place(node, parent, name)
        self.register(node)
        return node

    def _meant(self, parent: Node, name: bytes, text: bytes) -> tuple[OpenTemplate, int] | None:
        """The entry that the magic link ``text`` called ``name`` names; ``None`` when it is damaged."""
        if parent.template is not None:  # mostly that which the template has here
            if self._prefix[0] is not parent:
                self._prefix = parent, parent.template.link_text(parent.entry) + b"/"
            here = parent.template.index.find(parent.entry, name)
            if here and text == self._prefix[1] + name:
                return parent.template, here
        link = magic.parse(text)
        template = self._template_or_none(link.template) if link else None
        entry = template.index.find_path(link.path) if link and template else None
        if template is None or entry is None or self.number_of(template, entry) == ROOT_NUMBER:
            log.error("%r is a malformed or dangling magic link: %r", name, text)
            return None
        return template, entry

    def _template_or_none(self, name: str) -> OpenTemplate | None:
        try:
            return self.template(name)
        except OSError as error:
            log.error("a magic link can't be followed: %s", error.strerror)  # noqa: TRY400
            return None

    def _damaged(self, parent: Node, name: bytes, info: os.stat_result) -> Node:
        """The node of a magic link that means nothing here: it can be seen and removed, and nothing else."""
        node = self._by_backing.get(info.st_ino)
        if node is None:
            node = self.new_own(Kind.DAMAGED, info.st_ino, sys.generation_of(self.directory_fd(parent), name))
            self.set_own(node, Kind.DAMAGED, info.st_ino)
            self.place(node, parent, name)
            self.register(node)
        else:
            self.add_name(node, parent, name)
        return node

    def _group_node(self, template: OpenTemplate, entry: int) -> Node:
        """The node of a link group, registered because its state is that of no single name."""
        leader: int = template.index.leader[entry]
        number = template.base + leader
        node = self._table.get(number)
        if node is not None and not node.dead:
            return node
        if number not in self.groups:
            node = Node(number, Kind.TEMPLATE, number, template, leader, group=True)
            self.register(node)
            return node
        key = template.group_key(leader)
        info = os.lstat(key, dir_fd=self.area.links_fd)
        known = self._by_backing.get(info.st_ino)
        if known is not None:
            return known
        own = not (stat.S_ISLNK(info.st_mode) and magic.is_magic(os.readlink(key, dir_fd=self.area.links_fd)))
        split = own and self.read_origin(sys.entry_path(self.area.links_fd, key))[1]
        # A dead node of that number is what readers keep, see ``split``.
        free = number if node is None and not split else private_number(info.st_ino)
        node = Node(free, Kind.RECORD, number, template, leader, group=True)
        if free != number:
            node.generation = sys.generation_of(self.area.links_fd, key)
        if own:
            self.set_own(node, Kind.OWN, info.st_ino)
        self.register(node)
        return node

    def _own(self, parent: Node, name: bytes, info: os.stat_result) -> Node:
        """The node of an object of the container's own."""
        node = self._by_backing.get(info.st_ino)
        if node is not None:
            if (info.st_nlink > 1 or node.lost) and not node.is_directory:
                self.add_name(node, parent, name)
            return node
        kind = Kind.DIRECTORY if stat.S_ISDIR(info.st_mode) else Kind.OWN
        node = self._copied(parent, name, kind, info.st_ino)
        if node is None:
            node = self.new_own(kind, info.st_ino, sys.generation_of(self.directory_fd(parent), name))
        self.place(node, parent, name)
        self.set_own(node, kind, info.st_ino)
        self.register(node)
        if kind is Kind.DIRECTORY and not self.area.read_only:
            restore_times(self._at(parent, name))
        return node

    def _copied(self, parent: Node, name: bytes, kind: Kind, backing: int) -> Node | None:
        """The template's node if the object was copied from one, so that it keeps that inode number."""
        origin, split = self.read_origin(self._at(parent, name))
        if origin is None or origin[0].index.is_directory(origin[1]) != (kind is Kind.DIRECTORY):
            return None
        number = self.number_of(*origin)
        if split:
            copy = Node(private_number(backing), kind, number, *origin)
            copy.generation = sys.generation_of(self.directory_fd(parent), name)
            return copy
        if number not in self._table:
            return Node(number, kind, number, *origin)
        return None  # somebody copied the object together with its origin: only one can keep the number

    def read_origin(self, path: bytes) -> tuple[tuple[OpenTemplate, int] | None, bool]:
        """What the object at ``path`` was copied from, and whether its readers kept the number, see ``split``."""
        data = read_xattr(path, ORIGIN_XATTR)
        origin = None if data is None else self._find_origin(data)
        return origin, origin is not None and self._passthrough_above is not None and read_xattr(
            path, SPLIT_XATTR
        ) is not None

    def new_own(self, kind: Kind, backing: int, generation: int) -> Node:
        """A node for an object of the private area that came from no template, not yet registered.

        ``generation`` is the object's (``sys.generation_of``): the kernel tells by it a new object from one of the same
        number that is gone, whoever serves it.
        """
        number = private_number(backing)
        node = Node(number, kind, number)
        node.generation = generation
        previous = self._table.get(number)
        if previous is not None:  # unlinked, forgotten by the file system, not yet by the kernel
            node.generation = generation or previous.generation + 1
            node.lookups = previous.lookups
            self._pins.release(number)
        return node

    # --------------------------------------------------------------------------------------------------- the table

    def register(self, node: Node) -> None:
        """Put the node into the table."""
        self._table[node.number] = node

    def set_own(self, node: Node, kind: Kind, backing: int) -> None:
        """Say that the node is now the object ``backing`` of the private area."""
        node.kind = kind
        node.record = None
        node.backing = backing
        self._by_backing[backing] = node

    def place(self, node: Node, parent: Node, name: bytes) -> None:
        """Say that the node lies at ``name`` in ``parent``."""
        node.lost = False
        if self._places is not None:
            self._places[node.number] = parent.number, name
        if self._is_default_place(node, parent, name):
            self.leave_place(node)
            return
        parent.children += 1
        self.leave_place(node)
        node.parent, node.name = parent, name

    def _is_default_place(self, node: Node, parent: Node, name: bytes) -> bool:
        template = node.template
        if template is None or self.number_of(template, template.index.parent[node.entry]) != parent.number:
            return False
        return name == template.index.name(node.entry)

    def leave_place(self, node: Node) -> None:
        """Say that the node lies at its default place, or needs none."""
        parent = node.parent
        node.parent = None
        if parent is not None:
            parent.children -= 1
            self.drop_if_unused(parent)

    def lies_at(self, node: Node, parent: Node, name: bytes) -> bool:
        """Whether the node's place, the first of its names, is ``name`` in ``parent``."""
        if node.parent is not None:
            return node.parent is parent and node.name == name
        return not node.lost and self._is_default_place(node, parent, name)

    def add_name(self, node: Node, parent: Node, name: bytes) -> None:
        """Say that an own file lies at ``name`` in ``parent``, too."""
        if node.lost:
            self.place(node, parent, name)
        elif not self.lies_at(node, parent, name):
            node.others = node.others or set()
            if (parent, name) not in node.others:
                node.others.add((parent, name))
                parent.children += 1

    def remove_name(self, node: Node, parent: Node, name: bytes) -> None:
        """Say that the node does not lie at ``name`` in ``parent`` any more, while others of its names exist."""
        if node.others and (parent, name) in node.others:
            self._leave_other(node, parent, name)
        elif self.lies_at(node, parent, name):
            self.leave_place(node)
            node.lost = not node.others
            if node.others:
                other_parent, other_name = next(iter(node.others))
                self.place(node, other_parent, other_name)
                self._leave_other(node, other_parent, other_name)

    def _leave_other(self, node: Node, parent: Node, name: bytes) -> None:
        assert node.others is not None
        node.others.remove((parent, name))
        node.others = node.others or None
        parent.children -= 1
        self.drop_if_unused(parent)

    def move_name(self, node: Node, old_parent: Node, old_name: bytes, parent: Node, name: bytes) -> None:
        """Say that what was ``old_name`` in ``old_parent`` is ``name`` in ``parent`` now."""
        if node.others and (old_parent, old_name) in node.others:
            self._leave_other(node, old_parent, old_name)
            self.add_name(node, parent, name)
        else:
            self.place(node, parent, name)

    def leave_all_places(self, node: Node) -> None:
        """Let go of the directories that the node lies in."""
        self.leave_place(node)
        for parent, name in list(node.others or ()):
            self._leave_other(node, parent, name)

    def is_lost(self, backing: int) -> bool:
        """Whether an object of the inode number ``backing`` would be taken for one that is gone, see ``Pins.lost``."""
        return bool(self._pins.lost) and private_number(backing) in self._pins.lost

    def adopt(self, parent: Node, name: bytes, info: os.stat_result) -> Node:
        """The node of the just made object ``name``."""
        kind = Kind.DIRECTORY if stat.S_ISDIR(info.st_mode) else Kind.OWN
        node = self.new_own(kind, info.st_ino, sys.generation_of(self.directory_fd(parent), name))
        node.folded_children = 0
        self.place(node, parent, name)
        self.set_own(node, kind, info.st_ino)
        self.register(node)
        return node

    def bury(self, node: Node) -> None:
        """Say that the node has no name any more."""
        node.dead = True
        node.lost = False
        self._folded.pop(node.number, None)
        if self.resumed:
            node.lookups = max(node.lookups, 1)  # the kernel forgets it for certain
        self._by_backing.pop(node.backing, None)
        fd = self.area.take(node)
        if fd is not None and node.lookups > 0 and not node.orphan and node.last is not None:
            self._pins.keep(node, fd, node.last)  # a process may be in it
        elif fd is not None:
            os.close(fd)
        self.leave_all_places(node)
        self.register(node)
        self.changed(node.number)

    def forget(self, number: int, count: int) -> Node | None:
        """The kernel has forgotten ``count`` look-ups of ``number``; gives the node if it was dropped by that."""
        node = self._table.get(number)
        if node is None or node is self.root:
            return None
        node.lookups -= count
        if not self.drop_if_unused(node):
            return None
        self.area.forget(node)
        return node

    def drop_if_unused(self, node: Node) -> bool:
        """Drop the node from the table unless somebody or something still needs it there.

        Its descriptor, if it is a directory, may be borrowed just now and so is left to the cache's own order.
        """
        if node.known or node.kept or node.children or node is self.root:
            return False
        if node.moved and not node.dead:
            return False
        if node.kind is Kind.DIRECTORY and node.template is not None and not node.dead:
            return False  # the kernel may know it uncounted, from when it was folded, and what lies in it refers to it
        if self._table.get(node.number) is node:
            del self._table[node.number]
        if self._by_backing.get(node.backing) is node:
            del self._by_backing[node.backing]
        self.leave_all_places(node)
        return True

    def split(self, node: Node, backing: int, generation: int) -> Node:
        """Leave the node to who has it open, and its names to a new node for the object ``backing``."""
        copy = Node(private_number(backing), Kind.OWN, node.ino, node.template, node.entry, group=node.group)
        copy.generation = generation
        copy.parent, copy.name, node.parent = node.parent, node.name, None
        node.dead = True
        self.register(node)
        self.set_own(copy, Kind.OWN, backing)
        self.register(copy)
        return copy

    def unfolded(self, node: Node, backing: int) -> None:
        """The folded directory has become the real one ``backing``."""
        assert node.template is not None
        self._folded.pop(node.number, None)
        node.folded_children = node.template.index.attributes(node.entry).nlink - 2
        self.set_own(node, Kind.DIRECTORY, backing)
        self.register(node)

    @property
    def count(self) -> int:
        """How many nodes are registered."""
        return len(self._table)

    # ------------------------------------------------------------------------------------------ from node to place

    def parent(self, node: Node) -> Node:
        """The directory that holds the node; the root's is the root."""
        if node is self.root:
            return node
        if node.parent is not None:
            return node.parent
        if node.template is None or node.dead or node.lost:
            raise OSError(errno.ESTALE, "the node has no place")
        return self.get(self.number_of(node.template, node.template.index.parent[node.entry]))

    def directory_fd(self, node: Node) -> int:
        """Descriptor of a real directory, borrowed (see ``PrivateArea``)."""
        fd = self.area.cached(node)
        if fd is not None:
            return fd
        chain: list[Node] = []
        while node is not self.root:
            chain.append(node)
            node = self.parent(node)
        chain.reverse()
        return self.area.directory(chain)

    def location(self, node: Node) -> tuple[int, bytes]:
        """Directory descriptor and name of what stores the node: its name, its group's record or its orphan."""
        if node.orphan:
            return self.area.orphans_fd, node.orphan
        if node.dead:
            raise OSError(errno.ESTALE, "the node is gone")
        if node.group:
            assert node.template is not None
            return self.area.links_fd, node.template.group_key(node.entry)
        if node is self.root:
            return self.area.root_fd, b"."
        return self.directory_fd(self.parent(node)), node_name(node)

    def place_of(self, node: Node) -> Place:
        """By what that which stores the node can be changed."""
        if node.pin >= 0:
            return Place(None, sys.fd_path(node.pin), follow=True)
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
        return sys.entry_path(self.directory_fd(parent), name)

    # ------------------------------------------------------------------------------------------------- attributes

    def entry(self, node: Node, info: os.stat_result | None = None) -> Entry:
        """What a look-up of the node answers; ``info`` as for ``attributes``."""
        name_s = 0 if node.group and self.may_split(node) else LIFETIME_S
        return Entry(node.number, node.generation, self.attributes(node, info), name_s)

    def may_split(self, node: Node) -> bool:
        """Whether the next writer may get a node of its own, because the kernel reads the template's file by itself."""
        if node.kind is not Kind.TEMPLATE and node.kind is not Kind.RECORD:
            return False
        assert node.template is not None
        return self.is_passed(node.template, node.entry)

    def unsure_names(self, template: OpenTemplate) -> list[int]:
        """Entries, ascending, of which another name may lead to another node from one moment to the next: see
        ``may_split``. Their names must not be kept by the kernel."""
        unsure = self._unsure.get(template.name)
        if unsure is None:
            links = enumerate(template.index.next_link)
            unsure = [entry for entry, link in links if link != entry and self.is_passed(template, entry)]
            self._unsure[template.name] = unsure
        return unsure

    def is_passed(self, template: OpenTemplate, entry: int) -> bool:
        """Whether the kernel shall read the regular file ``entry`` of a template by itself, being large."""
        above = self._passthrough_above
        return above is not None and template.index.attributes(entry).size > above

    def attributes(self, node: Node, info: os.stat_result | None = None) -> Attributes:
        """What stat tells of the node; ``info`` is what stat(2) just said of the object that holds its data."""
        if node.dead and not node.orphan and node.last is not None:
            if node.pin >= 0 and not stat.S_ISLNK(node.last.mode):
                return Attributes.of(os.fstat(node.pin), node.ino, 0)
            return node.last
        if node.kind is Kind.OWN or node.kind is Kind.DIRECTORY:
            return self._own_attributes(node, info)
        if node.kind is Kind.DAMAGED:
            info = os.lstat(self.path(node))
            return Attributes.of(info, node.ino, 1)._replace(mode=stat.S_IFREG, size=0)
        template = node.template
        assert template is not None
        base = template.index.attributes(node.entry)
        if node.kind is Kind.RECORD:
            folder, name = self.location(node)
            info = os.lstat(name, dir_fd=folder)
            nlink = self.group_nlink(node) if node.group else base.nlink
            return self.record(node).apply(base, nlink, info.st_ctime_ns)
        return base

    def record(self, node: Node) -> Record:
        """The record of a node that has one."""
        if node.record is None:
            node.record = read_record(sys.entry_path(*self.location(node))) or Record()
        return node.record

    def _own_attributes(self, node: Node, info: os.stat_result | None) -> Attributes:
        if node.kind is Kind.DIRECTORY:
            if node.orphan:
                return Attributes.of(os.lstat(self.path(node)), node.ino, 0)
            info = info or os.fstat(self.living_directory_fd(node))
            if info.st_nlink == 1:  # btrfs, for one, doesn't count subdirectories, and says so by 1
                return Attributes.of(info, node.ino, 1)
            return Attributes.of(info, node.ino, info.st_nlink + self._folded_children(node, info.st_nlink))
        if info is None:
            folder, name = self.location(node)
            info = os.lstat(name, dir_fd=folder)
        nlink = info.st_nlink - bool(node.orphan)
        if node.group:
            nlink = 0 if node.dead else self.group_nlink(node)
        attributes = Attributes.of(info, node.ino, nlink)
        if stat.S_ISLNK(info.st_mode):
            attributes = attributes._replace(size=len(read_own_link(*self.location(node))))
        return attributes

    def group_nlink(self, node: Node) -> int:
        """How many names the node's link group has in this container."""
        assert node.template is not None
        if node.template.base + node.template.index.leader[node.entry] not in self.groups:
            return node.template.index.attributes(node.entry).nlink
        try:
            nlink = int(os.getxattr(sys.entry_path(*self.location(node)), NLINK_XATTR, follow_symlinks=False))
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
            os.getxattr(self.path(node), FOLDS_XATTR, follow_symlinks=False)
        except OSError:
            return False
        return True

    def _count_folded(self, node: Node) -> int:
        directory = self.directory_fd(node)
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME | os.O_CLOEXEC, dir_fd=directory)
        try:
            with os.scandir(fd) as entries:
                links = [os.fsencode(entry.name) for entry in entries if entry.is_symlink()]
            return sum(self._means_directory(os.readlink(name, dir_fd=fd)) for name in links)
        finally:
            os.close(fd)

    def _means_directory(self, text: bytes) -> bool:
        link = magic.parse(text)
        if link is None:
            return False
        try:
            index = self.template(link.template).index
        except OSError:
            return False
        entry = index.find_path(link.path)
        return entry is not None and index.is_directory(entry)


def _nobody(number: int) -> None:
    """Nobody wants to know that the node's data is elsewhere."""


def check_name(name: bytes) -> None:
    """Refuse what is no single component: ``ENAMETOOLONG``, and ``EINVAL`` for what the kernel never asks for."""
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, "name too long", name)
    if name in _NO_NAMES or b"/" in name:
        raise OSError(errno.EINVAL, "no name in a directory", name)
