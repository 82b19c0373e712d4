"""Going on where a dead process stopped: which numbers it gave the kernel, and what it was just counting.

Most numbers tell by themselves where they lie, orphans have theirs as name; ``vzfs.tree.scan`` finds the rest.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vzfs import linux
from vzfs.store.granted import Granted
from vzfs.store.opened import parse_group_key
from vzfs.store.survey import Survey, Templates
from vzfs.store.xattrs import NLINK_XATTR
from vzfs.tree.area import PrivateArea, list_names
from vzfs.tree.attributes import AttributeReader
from vzfs.tree.durable import Durable
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Kind, Node
from vzfs.tree.pins import Pins
from vzfs.tree.table import Table
from vzfs.tree.templates import TemplatesInUse


class Resuming:
    """Takes over what a predecessor knew."""

    def __init__(
        self,
        area: PrivateArea,
        pins: Pins,
        templates: TemplatesInUse,
        table: Table,
        lookup: Lookup,
        attributes: AttributeReader,
    ) -> None:
        self._area = area
        self._pins = pins
        self._templates = templates
        self._table = table
        self._lookup = lookup
        self._attributes = attributes

    def resume(self) -> None:
        """Understand, from now on, every number that a dead process gave the kernel for what is here."""
        self._table.resumed = True
        for number, attributes in self._pins.inherited():
            self._lookup.lost(number, attributes)
        for name in list_names(self._area.orphans_fd):
            if name.isdigit() and int(name) in self._pins.lost:
                self._table.stand_ins.add(int(name))
            elif name.isdigit():
                self._register_orphan(name)

    def _register_orphan(self, name: bytes) -> None:
        info = os.lstat(name, dir_fd=self._area.orphans_fd)
        number = int(name)
        origin, split = self._lookup.read_origin(linux.entry_path(self._area.orphans_fd, name))
        node = Node(number, Kind.OWN, number)
        if origin is not None and (split or number == self._templates.number_of(*origin)):
            node = Node(number, Kind.OWN, self._templates.number_of(*origin), *origin)
        if node.number != node.ino or node.template is None:
            node.generation = linux.generation_of(self._area.orphans_fd, name)
        node.orphan = name
        node.lookups = 1
        if stat.S_ISDIR(info.st_mode):
            node.kind, node.dead = Kind.DIRECTORY, True
        elif info.st_nlink > 1:
            node.lost = True
            self._table.set_own(node, Kind.OWN, info.st_ino)
        else:
            node.dead = True
            node.backing = info.st_ino
            node.last = self._attributes.of(node)
        self._table.register(node)


def count_doubted(granted: Granted, container: Path, area: PrivateArea, durable: Durable) -> None:
    """Count the names of the link group that the predecessor was just counting, if it was, and note the number."""
    if not durable.doubt:
        return
    templates = Templates(granted.open)
    try:
        survey = Survey(container, templates, templates.get(granted.os_template))
        survey.read(area.root_fd)
        for key in list_names(area.links_fd):
            group = parse_group_key(key)
            template = templates.get(group[0]) if group else None
            if group is None or template is None or template.base + group[1] != durable.doubt:
                continue
            names = survey.names_of(template, group[1])
            if names:
                os.setxattr(linux.entry_path(area.links_fd, key), NLINK_XATTR, b"%d" % names, follow_symlinks=False)
            else:
                os.rename(key, b"%d" % durable.doubt, src_dir_fd=area.links_fd, dst_dir_fd=area.orphans_fd)
    finally:
        templates.close()
    durable.doubt = 0
