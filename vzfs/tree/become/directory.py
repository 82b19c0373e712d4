"""Unfolding: a template's directory becomes a real one, its entries magic links.

Rule: a directory is unfolded before what lies in it, from the top downwards.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from vzfs import linux
from vzfs.store.faults import step
from vzfs.store.layout import OWN_FOLDER_MODE
from vzfs.store.opened import OpenTemplate
from vzfs.store.xattrs import FOLDS_XATTR
from vzfs.tree.area import PrivateArea
from vzfs.tree.become.effort import best_effort
from vzfs.tree.become.protocol import Protocol
from vzfs.tree.become.speed import Speed
from vzfs.tree.become.times import unchanged_times
from vzfs.tree.counters import Counters
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Kind, Node
from vzfs.tree.table import Table

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Directories:
    """The directories of one mount."""

    def __init__(
        self,
        area: PrivateArea,
        lock: AbstractContextManager[object],
        speed: Speed,
        counters: Counters,
        table: Table,
        lookup: Lookup,
        protocol: Protocol,
    ) -> None:
        self._area = area
        self._lock = lock
        self._speed = speed
        self._counters = counters
        self._table = table
        self._lookup = lookup
        self._protocol = protocol

    def own(self, number: int) -> None:
        """Unfold the directory ``number``, its parents before it."""
        if self._protocol.is_own(number):
            return
        for folded in self._folded_above(number):
            self._protocol.own(folded, _is_folded, self._stage_node, self._commit)

    def _folded_above(self, number: int) -> list[int]:
        """The directory ``number`` and those above it that have to be unfolded for a change in it, from the top."""
        with self._lock:
            node = self._lookup.get(number)
            chain = [node.number]
            while not node.dead:
                node = self._lookup.parent(node)
                if node.kind is not Kind.FOLDED:
                    break
                chain.append(node.number)
        chain.reverse()
        return chain

    def own_place(self, number: int) -> None:
        """Make the directory real in which the node's magic link shall be replaced."""
        with self._lock:
            node = self._lookup.get(number)
            if node.group or node.dead:
                return
            parent = self._lookup.parent(node).number
        self.own(parent)

    def parent_is_slow(self, node: Node) -> bool:
        """Whether one of the folded directories above the node takes long to unfold."""
        while not (node.dead or node.group):
            node = self._lookup.parent(node)
            if node.kind is not Kind.FOLDED:
                return False
            assert node.template is not None
            if node.number in self._protocol.busy or node.template.index.child_count[node.entry] > self._speed.unfold:
                return True
        return False

    def _stage_node(self, node: Node, staged: bytes) -> None:
        assert node.template is not None
        self._stage(node.template, node.entry, staged)

    def _stage(self, template: OpenTemplate, entry: int, name: bytes) -> None:
        """Stage the template directory ``entry`` as a real one called ``name``, its children magic links."""
        stage = self._area.stage_fd
        os.mkdir(name, OWN_FOLDER_MODE, dir_fd=stage)
        step("unfold:made")
        fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=stage)
        try:
            template.unfold_into(fd, entry)
        finally:
            os.close(fd)
        step("unfold:staged")

    def _commit(self, node: Node, staged: bytes) -> None:
        """Swap the staged directory in for the magic link of the folded ``node``."""
        parent = self._lookup.parent(node)
        backing = os.lstat(staged, dir_fd=self._area.stage_fd).st_ino
        folder, name = self._lookup.location(node)
        with unchanged_times(folder):
            linux.renameat2(self._area.stage_fd, staged, folder, name, linux.RENAME_EXCHANGE)
            step("unfold:swapped")
        if parent.folded_children:
            parent.folded_children -= 1
        self._table.unfolded(node, backing)
        self._counters.unfolds += 1
        with best_effort("remove the magic link that came back"):
            os.unlink(staged, dir_fd=self._area.stage_fd)

    def mark_folds(self, directory: Node) -> None:
        """Say on disk that a real directory is about to hold a folded one."""
        if directory.folded_children is None or not directory.folded_children:
            os.setxattr(self._lookup.path(directory), FOLDS_XATTR, b"1", follow_symlinks=False)


def _is_folded(node: Node) -> bool:
    return node.kind is Kind.FOLDED
