"""Removed files that the kernel still knows, kept by a descriptor instead of a name.

A file of the container's own that loses its last name while nobody has it open goes at once. Until the kernel forgets
it, mostly right away, a descriptor keeps its inode, so that no new file gets its number and what still refers to it (a
descriptor opened with ``O_PATH``) stays usable. So do removed directories that could not be given another name.

Rule: number and attributes of each are in memory that a successor of this process maps (``Durable``). It can't have the
descriptors, but knows what to tell of them, and that no new object may have such a number: see ``lost``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from vzfs.store.index import Attributes
from vzfs.tree.durable import Durable
from vzfs.tree.node import Node

_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Pins:
    """The kept files of one mount. Called under the tree's lock."""

    def __init__(self, durable: Durable) -> None:
        self._durable = durable
        self._held: dict[int, tuple[Node | None, int]] = {}
        self.lost: set[int] = set()
        """Numbers of what a predecessor kept. To the kernel, a new object of such a number would be the end of the old
        one: whoever still refers to that would get EIO."""

    def inherited(self) -> Iterator[tuple[int, Attributes]]:
        """Number and attributes of what a predecessor kept: without descriptor from now on, until ``release``."""
        for number, at in self._durable.pinned():
            self._held[number] = None, at
            self.lost.add(number)
            yield number, self._durable.pinned_attributes(at)

    def pin(self, node: Node, folder: int, name: bytes, attributes: Attributes) -> bool:
        """Keep the node, which is ``name`` in ``folder`` and about to lose that name; whether that was possible."""
        try:
            fd = os.open(name, _PATH, dir_fd=folder)
        except OSError:  # no descriptor left
            return False
        return self.keep(node, fd, attributes)

    def keep(self, node: Node, fd: int, attributes: Attributes) -> bool:
        """Keep the node by the descriptor ``fd``, which is closed if that is not possible."""
        at = self._durable.pin(node.number, attributes)
        if at < 0:
            os.close(fd)
            return False
        node.pin = fd
        self._held[node.number] = node, at
        return True

    def release(self, number: int) -> bool:
        """Keep the node no longer; whether it was kept."""
        node, at = self._held.pop(number, (None, -1))
        if at < 0:
            return False
        self._durable.unpin(at)
        self.lost.discard(number)
        if node is not None:
            os.close(node.pin)
            node.pin = -1
        return True

    def close(self) -> None:
        """Keep nothing any more."""
        for number in list(self._held):
            self.release(number)
