"""The stage: where everything is made that appears by one rename.

Rule: nobody looks at ``cow/stage``, and what is left there is removed at the next mount.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from vzfs import linux
from vzfs.store.faults import step
from vzfs.store.layout import OWN_FOLDER_MODE
from vzfs.store.xattrs import NLINK_XATTR
from vzfs.tree.area import PrivateArea
from vzfs.tree.become.effort import best_effort
from vzfs.tree.become.times import unchanged_times
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Node, private_number
from vzfs.tree.table import Table
from vzfs.tree.templates import TemplatesInUse

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Stage:
    """Of one mount."""

    def __init__(self, area: PrivateArea, templates: TemplatesInUse, table: Table, lookup: Lookup) -> None:
        self._area = area
        self._templates = templates
        self._table = table
        self._lookup = lookup

    @contextlib.contextmanager
    def folder_like(self, folder: int) -> Iterator[int]:
        """A folder on the stage that gives what is made in it the ACLs that ``folder`` would give it."""
        try:
            acl = os.getxattr(linux.entry_path(folder, b"."), linux.ACL_XATTRS[1])
        except OSError:  # ENODATA, EOPNOTSUPP: there is none
            yield self._area.stage_fd
            return
        name = self._area.stage_name()
        os.mkdir(name, OWN_FOLDER_MODE, dir_fd=self._area.stage_fd)
        with contextlib.ExitStack() as cleaning:
            cleaning.callback(self._clear, name)
            fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._area.stage_fd)
            cleaning.callback(os.close, fd)
            os.setxattr(fd, linux.ACL_XATTRS[1], acl)
            yield fd

    def stands_in(self, folder: int, staged: bytes) -> bool:
        """Whether what was just made has a number that it may not have, and so was put where it keeps others off it."""
        backing = os.lstat(staged, dir_fd=folder).st_ino
        if not self._table.is_lost(backing):
            return False
        number = private_number(backing)
        os.rename(staged, b"%d" % number, src_dir_fd=folder, dst_dir_fd=self._area.orphans_fd)
        self._table.stand_ins.add(number)
        return True

    def _clear(self, staged: bytes) -> None:
        with best_effort("clear the stage"):
            self.discard(staged)

    def discard(self, staged: bytes) -> None:
        """Remove what was staged in vain."""
        linux.remove_tree(self._area.stage_fd, staged)

    def place(self, node: Node, staged: bytes, nlink: int, placed: str) -> None:
        """Put the finished object in the place of what stood for the node; ``placed`` is the step that this is."""
        if node.group:
            self._place_in_group(node, staged, nlink)
            return
        folder, name = self._lookup.location(node)
        with unchanged_times(folder):
            os.rename(staged, name, src_dir_fd=self._area.stage_fd, dst_dir_fd=folder)
            step(placed)

    def _place_in_group(self, node: Node, staged: bytes, nlink: int) -> None:
        """Make the staged object the record of the node's link group: all its names change at once."""
        assert node.template is not None
        stage = self._area.stage_fd
        key = node.template.group_key(node.entry)
        os.setxattr(linux.entry_path(stage, staged), NLINK_XATTR, b"%d" % nlink, follow_symlinks=False)
        step("link-group:staged")
        os.rename(staged, key, src_dir_fd=stage, dst_dir_fd=self._area.links_fd)
        step("link-group:renamed")
        self._templates.add_group(node.template, node.entry)
