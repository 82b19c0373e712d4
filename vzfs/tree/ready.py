"""Answers that lie ready in a template's index, in the form in which the kernel wants them.

Rule: no method makes a system call or a node. ``None`` means that the index can't tell, and the tree's own methods must
be asked; anything else is what they would answer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from vzfs.store.opened import OpenTemplate
from vzfs.tree.lookup import NAME_MAX
from vzfs.tree.node import Kind
from vzfs.tree.table import Table
from vzfs.tree.templates import TemplatesInUse


class Ready:
    """The ready-made answers about the nodes of one mount."""

    def __init__(self, lock: AbstractContextManager[object], templates: TemplatesInUse, table: Table) -> None:
        self._lock = lock
        self._templates = templates
        self._table = table
        self._nodes, self._folded, self._groups = table.nodes, table.folded, templates.groups

    def lookup(self, parent: int, name: bytes) -> bytes | None:
        """What ``name`` in directory ``parent`` is, counted as known to the kernel: the 128 bytes of a
        ``fuse_entry_out``; ``b""`` when there certainly is none.
        """
        with self._lock:
            template = self.folded(parent)
            if template is None:
                return None
            index = template.index
            entry = index.find(parent - template.base, name)
            if not entry:
                return b"" if len(name) <= NAME_MAX else None
            number = template.base + index.leader[entry]
            node = self._nodes.get(number)
            if node is not None:
                if node.dead or (node.kind is not Kind.TEMPLATE and node.kind is not Kind.FOLDED):
                    return None
                node.lookups += 1
            elif number in self._groups:
                return None
            if index.next_link[entry] != entry and self._templates.is_passed(template, entry):
                return index.entry_out_unsure(entry)
            return index.entry_out(entry)

    def attributes(self, number: int) -> bytes | None:
        """What stat tells of the node: the 88 bytes of a ``fuse_attr``."""
        with self._lock:
            found = self.unchanged(number)
            return None if found is None else found[0].index.attributes_out(found[1])

    def listing(self, number: int, offset: int, size: int) -> memoryview | bytearray | None:
        """As many whole records of a directory's listing with attributes (``fuse_direntplus``), after the first
        ``offset`` ones, as fit into ``size`` bytes. The records of ``.`` and ``..`` are not counted as known.
        """
        with self._lock:
            found = self.even_listing(number)
            if found is None:
                return None
            template, entry = found
            unsure = self._templates.unsure_names(template)
            if unsure:
                return template.index.listing_part_unsure(entry, offset, size, unsure)
            return template.index.listing_part(entry, offset, size)

    def no_xattrs(self, number: int) -> bool:
        """Whether the node certainly has no extended attributes at all."""
        with self._lock:
            found = self.unchanged(number)
            return found is not None and not found[0].index.has_xattrs(found[1])

    def folded(self, number: int) -> OpenTemplate | None:
        """The template of the directory ``number`` if that is certainly folded; asks the disk nothing."""
        template = self._folded.get(number)
        if template is not None:
            return template
        template = self._templates.of(number)
        if template is None or not template.index.is_directory(number - template.base):
            return None
        above, parents = number, template.index.parent
        while above not in self._folded:
            node = self._nodes.get(above)
            if node is not None:
                if node.dead or node.kind is not Kind.FOLDED:
                    return None
                break
            if above == template.base:
                return None
            above = template.base + parents[above - template.base]
        self._table.note_folded(number, template)
        return template

    def unchanged(self, number: int) -> tuple[OpenTemplate, int] | None:
        """Template and entry of the node if it is certainly as in the index; asks the disk nothing."""
        node = self._nodes.get(number)
        if node is not None:
            if node.dead or (node.kind is not Kind.TEMPLATE and node.kind is not Kind.FOLDED):
                return None
            assert node.template is not None
            return node.template, node.entry
        if number in self._groups:
            return None
        template = self._folded.get(number)
        if template is not None:
            return template, number - template.base
        template = self._templates.of(number)
        if template is None:
            return None
        entry, index = number - template.base, template.index
        if index.next_link[entry] != entry or self.folded(template.base + index.parent[entry]) is not None:
            return template, entry
        return None

    def even_listing(self, number: int) -> tuple[OpenTemplate, int] | None:
        """Template and entry of a directory whose listing is certainly the index's; asks the disk nothing."""
        template = self.folded(number)
        if template is None or (self._templates.uneven and self._templates.uneven[number]):
            return None
        node = self._nodes.get(number)
        if node is not None and node.parent is not None:  # elsewhere, so ``..`` is another one
            return None
        return template, number - template.base
