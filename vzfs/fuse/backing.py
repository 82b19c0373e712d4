"""Backing files: what the kernel reads and writes by itself for files of the mount (passthrough).

Rules:
- One node has one backing file as long as anybody has it open; the kernel refuses another meanwhile.
- A registration outlives its last close while it is useful, because making one costs more than all else in an open.
  When there are too many, those go that nobody has opened since the last time.
- What is registered stands in memory that a successor of this process maps, with how often it is open: a registration
  is the kernel's and lives on.

Called under the tree's lock.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from vzfs.fuse import wire
from vzfs.fuse.device import Device
from vzfs.fuse.state import BACKING_WORDS
from vzfs.tree.node import Node
from vzfs.tree.tree import Tree

log = logging.getLogger(__name__)

REGISTERED = 8192
"""Registrations above which idle ones are ended; each pins an inode and a struct file in the kernel."""
_ENDED_AT_ONCE = REGISTERED // 16


class Backing:
    """The backing file of ``node``, which is open ``node.held`` times. ``own``: the container's, so may be written."""

    __slots__ = ("answer", "at", "backing_id", "guarded", "node", "number", "own", "stale", "used")

    def __init__(self, node: Node, backing_id: int, at: int, *, own: bool) -> None:
        self.node = node
        self.number = node.number
        self.backing_id = backing_id
        self.at = at  # of its slot
        self.own = own
        self.guarded = True  # it may have set-id bits, so whoever wants to write is looked at
        self.stale = node.dead  # it has no name or other data now: to be ended by the last who closes it
        self.used = True  # since the last look for one to end
        # The kernel takes no FOPEN_KEEP_CACHE beside passthrough (fs/fuse/iomode.c).
        self.answer = wire.OPEN_OUT.pack(0, wire.FOPEN_PASSTHROUGH | wire.FOPEN_NOFLUSH, backing_id)


class BackingFiles:
    """The registrations of one mount, in ``known`` by node number; ``slots`` is shared memory (``state.BACKING``)."""

    def __init__(self, device: Device, tree: Tree, slots: memoryview) -> None:
        self._device = device
        self._tree = tree
        self._slots = slots
        self.known: dict[int, Backing] = {}
        self._free = [at for at in range(len(slots) - BACKING_WORDS, -1, -BACKING_WORDS) if not slots[at]]

    def inherited(self) -> Iterator[tuple[int, int, int]]:
        """Place, node number and open count of what a predecessor registered, each to be given to ``inherit``."""
        for at in range(0, len(self._slots), BACKING_WORDS):
            if self._slots[at]:
                yield at, self._slots[at], self._slots[at + 2]

    def inherit(self, at: int, *, own: bool) -> None:
        """Take over a predecessor's registration."""
        number, backing_id, count = self._slots[at : at + BACKING_WORDS]
        node = self._tree.keep(number)
        node.held = count
        self.known[number] = Backing(node, backing_id, at, own=own)
        if node.dead:
            self.forget(number)

    def register(self, number: int, fd: int, *, own: bool) -> Backing | None:
        """Register the open file ``fd`` for a node that has no registration; ``None`` where passthrough is refused."""
        if len(self.known) >= REGISTERED:
            self._end_some()
        if not self._free:
            return None
        try:
            backing_id = self._device.open_backing(fd)
        except OSError as error:
            log.debug("no passthrough for node %d: %s", number, error)
            return None
        at = self._free.pop()
        backing = self.known[number] = Backing(self._tree.keep(number), backing_id, at, own=own)
        self._slots[at + 1], self._slots[at + 2] = backing_id, 0
        self._slots[at] = number  # last: only now the slot counts
        return backing

    def open(self, backing: Backing) -> bytes:
        """Count one more opening; gives the answer to it."""
        backing.node.held = self._slots[backing.at + 2] = backing.node.held + 1
        backing.used = True
        return backing.answer

    def close(self, backing: Backing) -> None:
        """Count one opening less."""
        if backing.node.held:  # else an opening that a dead predecessor had not counted
            backing.node.held = self._slots[backing.at + 2] = backing.node.held - 1
            if backing.stale and not backing.node.held:
                self._end(backing)

    def guard(self, number: int) -> None:
        """The file has got set-id bits."""
        backing = self.known.get(number)
        if backing is not None:
            backing.guarded = True

    def forget(self, number: int) -> None:
        """The node is gone or has other data now: end its registration, or let it end with who has it open."""
        backing = self.known.get(number)
        if backing is None:
            return
        if backing.node.held:
            backing.stale = True
        else:
            self._end(backing)

    def _end_some(self) -> None:
        """End registrations that nobody has open, those first that have not been used since the last time."""
        idle = [backing for backing in self.known.values() if not backing.node.held]
        idle.sort(key=lambda backing: backing.used)
        for backing in idle[:_ENDED_AT_ONCE]:
            self._end(backing)
        for backing in idle[_ENDED_AT_ONCE:]:
            backing.used = False

    def _end(self, backing: Backing) -> None:
        del self.known[backing.number]
        self._slots[backing.at] = 0
        self._free.append(backing.at)
        try:
            self._device.close_backing(backing.backing_id)
        except OSError as error:  # the mount ended meanwhile
            log.debug("backing file %d: %s", backing.backing_id, error)
        self._tree.let_go(backing.node)
