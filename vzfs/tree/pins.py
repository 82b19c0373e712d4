"""Removed files that the kernel still knows, kept by a descriptor instead of a name.

A file of the container's own that loses its last name while nobody has it open goes at once. Until the kernel forgets
it, mostly right away, a descriptor keeps its inode, so that no new file gets its number and what still refers to it (a
descriptor opened with ``O_PATH``) stays usable.

Rule: the numbers stand in ``slots``, memory that a successor of this process maps. It can't have the descriptors, but
knows what not to take for a new file; 0 is a free slot.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableSequence
from typing import TypeAlias

from vzfs.tree.node import Node

Slots: TypeAlias = MutableSequence[int] | memoryview
PINS = 1024
"""Files kept so at the same time; any further one gets a name in ``cow/orphans``."""
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Pins:
    """The kept files of one mount. Called under the tree's lock."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._held: dict[int, tuple[Node | None, int]] = {}
        self._free = [at for at in range(len(slots) - 1, -1, -1) if not slots[at]]

    def inherited(self) -> Iterator[int]:
        """Numbers that a predecessor kept: without descriptor from now on, until ``release``."""
        for at, number in enumerate(self._slots):
            if number:
                self._held[number] = None, at
                yield number

    def pin(self, node: Node, folder: int, name: bytes) -> bool:
        """Keep the node, which is ``name`` in ``folder`` and about to lose that name; whether that was possible."""
        if not self._free:
            return False
        try:
            node.pin = os.open(name, _PATH, dir_fd=folder)
        except OSError:  # no descriptor left
            return False
        at = self._free.pop()
        self._slots[at] = node.number
        self._held[node.number] = node, at
        return True

    def release(self, number: int) -> bool:
        """Keep the node no longer; whether it was kept."""
        node, at = self._held.pop(number, (None, -1))
        if at < 0:
            return False
        self._slots[at] = 0
        self._free.append(at)
        if node is not None:
            os.close(node.pin)
            node.pin = -1
        return True

    def close(self) -> None:
        """Keep nothing any more."""
        for number in list(self._held):
            self.release(number)
