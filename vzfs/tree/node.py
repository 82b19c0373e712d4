"""A node: what the kernel may hold a number of, and where its truth lies now.

The life of a node, by kind; every arrow is one rename in the private area, so a crash leaves one side of it:

    FOLDED ──unfold──────────────────────────▶ DIRECTORY        directories
    TEMPLATE ──change attributes──▶ RECORD ──copy up──▶ OWN     everything else
           └──────────────copy up──────────────────────▲

Rule: a kind never goes back while the node lives. ``dead`` means that no name is left.
"""

from __future__ import annotations

import enum
import errno
from typing import NamedTuple

from vzfs import linux
from vzfs.store.index import INO_START, LIFETIME_S, Attributes
from vzfs.store.opened import OpenTemplate
from vzfs.store.record import Record

ROOT_NUMBER = 1
"""Node number of a mount's root (FUSE_ROOT_ID)."""
PRIVATE_SHIFT = 1 << 52
"""Added to inode numbers of the private area that reach into the templates' range; still exact as a double."""


class Kind(enum.Enum):
    """Where a node's attributes and content are."""

    FOLDED = "folded"  # a template directory and all below it, unchanged
    DIRECTORY = "directory"  # a real directory of the private area
    TEMPLATE = "template"  # any other template entry, unchanged
    RECORD = "record"  # the template's data with attributes of the container's own, kept with a magic link
    OWN = "own"  # an object of the private area
    DAMAGED = "damaged"  # a magic link that means nothing; shown as an empty file that nobody may use


class Node:
    """One inode of the mounted container.

    ``number`` is what the kernel calls it and ``ino`` what programs see. ``template`` and ``entry`` tell what it is or
    was copied from. ``parent`` and ``name`` place it; ``parent is None`` means its default place, the one its template
    entry has. Nodes of a ``group`` (several hard links to one template entry) live in the record ``cow/links/<key>``
    once changed, under no name of their own.
    """

    __slots__ = (
        "backing",
        "children",
        "dead",
        "entry",
        "folded_children",
        "generation",
        "group",
        "handles",
        "ino",
        "kept",
        "kind",
        "last",
        "lookups",
        "lost",
        "name",
        "number",
        "orphan",
        "others",
        "parent",
        "passed",
        "pin",
        "record",
        "served",
        "template",
    )

    def __init__(
        self,
        number: int,
        kind: Kind,
        ino: int,
        template: OpenTemplate | None = None,
        entry: int = 0,
        *,
        group: bool = False,
    ) -> None:
        self.number = number
        self.kind = kind
        self.ino = ino
        self.template = template
        self.entry = entry
        self.group = group
        self.parent: Node | None = None
        self.name = b""
        self.generation = 0
        self.lookups = 0
        self.handles: list[Handle] | None = None
        self.passed = 0  # how often it is open by passthrough: the kernel has the file that holds its data
        self.served = 0  # how often it is open without a handle of ours: its data is asked for by its number
        self.kept = False  # somebody has this object and counts in it
        self.children = 0  # registered nodes that have this one as their parent
        self.backing = 0  # inode number in the private area's file system, for OWN and DIRECTORY
        self.folded_children: int | None = None  # folded directories in this real one; None until counted
        self.dead = False
        self.last: Attributes | None = None  # of a dead node that left nothing on the disk
        self.others: set[tuple[Node, bytes]] | None = None  # further names of an own file that the kernel knows
        self.lost = False  # every name that the kernel knew went, others exist that nobody has looked up
        self.orphan = b""  # name in cow/orphans while known but without a known name
        self.record: Record | None = None  # of a RECORD, once it was read
        self.pin = -1  # descriptor of what is known but has no name at all, see ``Pins``

    @property
    def is_directory(self) -> bool:
        return self.kind is Kind.DIRECTORY or self.kind is Kind.FOLDED

    @property
    def known(self) -> bool:
        """Whether the kernel or an open file may still ask for the node."""
        return self.lookups > 0 or self.is_open

    @property
    def is_open(self) -> bool:
        """Whether somebody has it open, by a handle or by other means."""
        return self.handles is not None or self.passed > 0 or self.served > 0

    @property
    def moved(self) -> bool:
        """A template entry away from its default place: nothing but this node knows where it went."""
        return self.parent is not None and self.template is not None


def private_number(backing: int) -> int:
    """Node and inode number of an object that has the inode number ``backing`` in the private area's file system."""
    return backing if backing < INO_START else backing + PRIVATE_SHIFT


class Place(NamedTuple):
    """By what an object of the private area is reached: its name in a directory, which is not to be followed, or
    (``follow``) a path that leads to a descriptor of it."""

    folder: int | None
    name: bytes
    follow: bool

    @property
    def path(self) -> bytes:
        """For the calls that take no descriptor of a directory."""
        return self.name if self.folder is None else linux.entry_path(self.folder, self.name)


def refuse_damaged(node: Node) -> None:
    """Raise ``OSError`` ``EIO`` for what can only be seen and removed."""
    if node.kind is Kind.DAMAGED:
        raise OSError(errno.EIO, "a damaged magic link")


class Handle:
    """An open file: ``fd`` stays the same number through a copy-up, what it refers to does not."""

    __slots__ = ("fd", "flags", "node", "number", "uid")

    def __init__(self, number: int, node: Node, fd: int, flags: int, uid: int) -> None:
        self.uid = uid
        self.number = number
        self.node = node
        self.fd = fd
        self.flags = flags


class Entry(NamedTuple):
    """The answer to a look-up: node number, generation of that number, attributes, for how many seconds the name is
    certain."""

    number: int
    generation: int
    attributes: Attributes
    name_s: int = LIFETIME_S
