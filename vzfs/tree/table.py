"""The table of registered nodes: by number, by the object that stores them, and where they lie.

Rules:
- A node of a template entry is registered only if it differs from what its number already says (see ``Node``): the
  entries of folded directories need no memory, whatever the kernel knows of them.
- Numbers: 1 is the root; a template's entries have ``base + leader``; everything else has the inode number it has in
  the private area's file system, shifted by ``PRIVATE_SHIFT`` if a template could have that number.
- ``folded`` knows directories that are folded for certain, wherever they lie now. A directory leaves it when it is
  unfolded or removed; then all below it are still what they were.
- Knows names and numbers only: asks the disk nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from vzfs import linux
from vzfs.store.opened import OpenTemplate
from vzfs.tree.area import PrivateArea
from vzfs.tree.node import ROOT_NUMBER, Kind, Node, private_number
from vzfs.tree.pins import Pins
from vzfs.tree.scan import Places
from vzfs.tree.templates import TemplatesInUse

FOLDED_CACHE = 1 << 16
"""Numbers of directories remembered as folded, about 100 bytes each."""


class Table:
    """The nodes of one mount; ``changed`` is called when the object that holds a node's data is another from now on."""

    def __init__(
        self, area: PrivateArea, pins: Pins, templates: TemplatesInUse, changed: Callable[[int], None] | None
    ) -> None:
        self._area = area
        self._pins = pins
        self._templates = templates
        self.changed = changed or _nobody
        self.nodes: dict[int, Node] = {}
        self.by_backing: dict[int, Node] = {}
        self.folded: dict[int, OpenTemplate] = {}
        self.places: Places | None = None  # of what a scan has found, see ``vzfs.tree.scan``
        self.resumed = False  # the kernel goes on with what a dead process told it
        self.stand_ins: set[int] = set()  # of ``Pins.lost``, those in cow/orphans
        base = templates.root.base
        self.root = Node(ROOT_NUMBER, Kind.DIRECTORY, base, templates.root, 0)
        self.root.backing = os.stat(linux.fd_path(area.root_fd)).st_ino
        self.root.lookups = 1
        self.nodes[ROOT_NUMBER] = self.nodes[base] = self.root
        self.by_backing[self.root.backing] = self.root

    def registered(self, number: int) -> Node | None:
        """The node of ``number`` if the table has it."""
        return self.nodes.get(number)

    def register(self, node: Node) -> None:
        """Put the node into the table."""
        self.nodes[node.number] = node

    def new_own(self, kind: Kind, backing: int, generation: int) -> Node:
        """A node for an object of the private area that came from no template, not yet registered.

        ``generation`` is the object's (``linux.generation_of``): the kernel tells by it a new object from one of the
        same number that is gone, whoever serves it.
        """
        number = private_number(backing)
        node = Node(number, kind, number)
        node.generation = generation
        previous = self.nodes.get(number)
        if previous is not None:  # unlinked, forgotten by the file system, not yet by the kernel
            node.generation = generation or previous.generation + 1
            node.lookups = previous.lookups
            self._pins.release(number)
        return node

    def set_own(self, node: Node, kind: Kind, backing: int) -> None:
        """Say that the node is now the object ``backing`` of the private area."""
        node.kind = kind
        node.record = None
        node.backing = backing
        self.by_backing[backing] = node

    def place(self, node: Node, parent: Node, name: bytes) -> None:
        """Say that the node lies at ``name`` in ``parent``."""
        node.lost = False
        if self.places is not None:
            self.places[node.number] = parent.number, name
        if self.is_default_place(node, parent, name):
            self._leave_place(node)
            return
        parent.children += 1
        self._leave_place(node)
        node.parent, node.name = parent, name

    def is_default_place(self, node: Node, parent: Node, name: bytes) -> bool:
        template = node.template
        if template is None or self._templates.number_of(template, template.index.parent[node.entry]) != parent.number:
            return False
        return name == template.index.name(node.entry)

    def _leave_place(self, node: Node) -> None:
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
        return not node.lost and self.is_default_place(node, parent, name)

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
            self._leave_place(node)
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

    def _leave_all_places(self, node: Node) -> None:
        """Let go of the directories that the node lies in."""
        self._leave_place(node)
        for parent, name in list(node.others or ()):
            self._leave_other(node, parent, name)

    def is_lost(self, backing: int) -> bool:
        """Whether an object of the inode number ``backing`` would be taken for one that is gone, see ``Pins.lost``."""
        return bool(self._pins.lost) and private_number(backing) in self._pins.lost

    def bury(self, node: Node) -> None:
        """Say that the node has no name any more."""
        node.dead = True
        node.lost = False
        self.folded.pop(node.number, None)
        if self.resumed:
            node.lookups = max(node.lookups, 1)  # the kernel forgets it for certain
        self.by_backing.pop(node.backing, None)
        fd = self._area.take(node)
        if fd is not None and node.lookups > 0 and not node.orphan and node.last is not None:
            self._pins.keep(node, fd, node.last)  # a process may be in it
        elif fd is not None:
            os.close(fd)
        self._leave_all_places(node)
        self.register(node)
        self.changed(node.number)

    def forget(self, number: int, count: int) -> Node | None:
        """The kernel has forgotten ``count`` look-ups of ``number``; gives the node if it was dropped by that."""
        node = self.nodes.get(number)
        if node is None or node is self.root:
            return None
        node.lookups -= count
        if not self.drop_if_unused(node):
            return None
        self._area.forget(node)
        return node

    def drop_if_unused(self, node: Node) -> bool:
        """Drop the node from the table unless somebody or something still needs it there.

        Its descriptor, if it is a directory, may be borrowed just now and so is left to the cache's own order.
        """
        if node.known or node.kept or node.children or node is self.root:
            return False
        if node.moved and not node.dead:
            return False
        if self.nodes.get(node.number) is node:
            del self.nodes[node.number]
        if self.by_backing.get(node.backing) is node:
            del self.by_backing[node.backing]
        self._leave_all_places(node)
        return True

    @contextlib.contextmanager
    def holding(self, *directories: Node) -> Iterator[None]:
        """Keep directories in the table for a ``with`` block in which names come and go there.

        The kernel may know one uncounted, from when it was folded: with its last child it would be dropped, and be
        another node from then on.
        """
        for directory in directories:
            directory.children += 1
        try:
            yield
        finally:
            for directory in directories:
                directory.children -= 1
                self.drop_if_unused(directory)

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
        self.folded.pop(node.number, None)
        node.folded_children = node.template.index.attributes(node.entry).nlink - 2
        self.set_own(node, Kind.DIRECTORY, backing)
        self.register(node)

    @property
    def count(self) -> int:
        """How many nodes are registered."""
        return len(self.nodes)

    def note_folded(self, number: int, template: OpenTemplate) -> None:
        if len(self.folded) >= FOLDED_CACHE:
            self.folded.clear()
        self.folded[number] = template

    def is_known(self, node: Node) -> bool:
        """Whether the kernel or an open file may still ask for the node."""
        return node.known or self.resumed


def _nobody(number: int) -> None:
    """Nobody wants to know that the node's data is elsewhere."""
