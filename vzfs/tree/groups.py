"""Link groups: several names of one template file, whose truth lies in ``cow/links`` once it changes.

Rule: names are counted before they appear and after they went, so that dying in between leaves the count too high,
which keeps the data; the group that is just being counted is on record (``Durable.doubt``), and counted anew by a
successor.
"""

from __future__ import annotations

import os

from vzfs.store.faults import step
from vzfs.store.record import Record
from vzfs.store.xattrs import NLINK_XATTR
from vzfs.tree.area import PrivateArea
from vzfs.tree.attributes import AttributeReader
from vzfs.tree.become.effort import best_effort
from vzfs.tree.become.record import Records
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Kind, Node
from vzfs.tree.table import Table
from vzfs.tree.templates import TemplatesInUse


class Groups:
    """The link groups of one mount."""

    def __init__(
        self,
        area: PrivateArea,
        templates: TemplatesInUse,
        table: Table,
        lookup: Lookup,
        attributes: AttributeReader,
        records: Records,
    ) -> None:
        self._area = area
        self._templates = templates
        self._table = table
        self._lookup = lookup
        self._attributes = attributes
        self._records = records

    def make(self, node: Node) -> None:
        """Let a template entry with one name become a link group, so that it can have more."""
        record, own = self._attributes.record_or_none(node), None
        if record.own_xattrs:
            own = self._attributes.xattrs_of(node)
        nlink = self._attributes.of(node).nlink
        node.group = True
        try:
            self._records.make(node, record, own, nlink)
        except BaseException:
            node.group = False
            raise
        self._table._leave_place(node)

    def begin_counting(self, node: Node) -> None:
        """Make sure that the count of the group's names can be changed without needing space, by making its record."""
        if node.kind is Kind.TEMPLATE:
            self._records.make(node, Record(), None, self._attributes.group_nlink(node))

    def change_nlink(self, node: Node, difference: int) -> None:
        """Count names of the node's link group that are to come (or, negative, didn't)."""
        self.begin_counting(node)
        nlink = self._attributes.group_nlink(node) + difference
        os.setxattr(self._lookup.path(node), NLINK_XATTR, b"%d" % nlink, follow_symlinks=False)
        step("link-group:counted")

    def count_lost_name(self, node: Node) -> None:
        """Count a name of the link group that is gone."""
        with best_effort("count the names of a link group"):
            self.change_nlink(node, -1)

    def end(self, node: Node) -> None:
        """The last name of the group is gone: remove its record, or keep it as an orphan while it is known."""
        assert node.template is not None
        key = node.template.group_key(node.entry)
        with best_effort("remove a link group's record"):
            if self._table.is_known(node) and node.kind is Kind.OWN:
                orphan = b"%d" % node.number
                os.rename(key, orphan, src_dir_fd=self._area.links_fd, dst_dir_fd=self._area.orphans_fd)
                node.orphan = orphan
            else:
                os.unlink(key, dir_fd=self._area.links_fd)
        step("link-group:ended")
        self._templates.end_group(node.template, node.entry)
