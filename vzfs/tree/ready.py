"""Answers that lie ready in a template's index, in the form in which the kernel wants them.

Rule: no method makes a system call or a node. ``None`` means that the index can't tell, and the tree's own methods must
be asked; anything else is what they would answer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from vzfs.tree.node import Kind
from vzfs.tree.nodes import NAME_MAX, Nodes


class Ready:
    """The ready-made answers about the nodes of one mount."""

    def __init__(self, nodes: Nodes, lock: AbstractContextManager[object]) -> None:
        self._nodes = nodes
        self._lock = lock

    def lookup(self, parent: int, name: bytes) -> bytes | None:
        """What ``name`` in directory ``parent`` is, counted as known to the kernel: the 128 bytes of a
        ``fuse_entry_out``; ``b""`` when there certainly is none.
        """
        with self._lock:
            nodes = self._nodes
            template = nodes.folded(parent)
            if template is None:
                return None
            index = template.index
            entry = index.find(parent - template.base, name)
            if not entry:
                return b"" if len(name) <= NAME_MAX else None
            number = template.base + index.leader[entry]
            node = nodes.registered(number)
            if node is not None:
                if node.dead or (node.kind is not Kind.TEMPLATE and node.kind is not Kind.FOLDED):
                    return None
                node.lookups += 1
            elif number in nodes.groups:
                return None
            if index.next_link[entry] != entry and nodes.is_passed(template, entry):
                return index.entry_out_unsure(entry)
            return index.entry_out(entry)

    def attributes(self, number: int) -> bytes | None:
        """What stat tells of the node: the 88 bytes of a ``fuse_attr``."""
        with self._lock:
            found = self._nodes.unchanged(number)
            return None if found is None else found[0].index.attributes_out(found[1])

    def listing(self, number: int, offset: int, size: int) -> memoryview | bytearray | None:
        """As many whole records of a directory's listing with attributes (``fuse_direntplus``), after the first
        ``offset`` ones, as fit into ``size`` bytes. The records of ``.`` and ``..`` are not counted as known.
        """
        with self._lock:
            found = self._nodes.even_listing(number)
            if found is None:
                return None
            template, entry = found
            unsure = self._nodes.unsure_names(template)
            if unsure:
                return template.index.listing_part_unsure(entry, offset, size, unsure)
            return template.index.listing_part(entry, offset, size)

    def no_xattrs(self, number: int) -> bool:
        """Whether the node certainly has no extended attributes at all."""
        with self._lock:
            found = self._nodes.unchanged(number)
            return found is not None and not found[0].index.has_xattrs(found[1])
