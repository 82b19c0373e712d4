"""Backing files: what the kernel reads and writes by itself for files of the mount (passthrough).

Rules:
- One node has one backing file as long as anybody has it open; the kernel refuses another meanwhile.
- A registration outlives its last close while it is useful, because making one costs more than all else in an open;
  the least recently closed ones go when there are too many.
- What is registered stands in memory that a successor of this process maps, with how often it is open: a registration
  is the kernel's and lives on.

Called under the tree's lock.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator

from vzfs.fuse import wire
from vzfs.fuse.device import Device
from vzfs.fuse.state import BACKING_WORDS

log = logging.getLogger(__name__)

IDLE = 8192
"""Registrations kept though nothing has the file open; each pins one inode and one struct file in the kernel."""


class Backing:
    """The backing file of node ``number``, open ``count`` times. ``own``: it is the container's, so may be written."""

    __slots__ = ("answer", "backing_id", "count", "guarded", "number", "own", "slot", "stale")

    def __init__(self, number: int, backing_id: int, slot: int, *, own: bool, count: int = 0) -> None:
        self.number = number
        self.backing_id = backing_id
        self.slot = slot
        self.own = own
        self.count = count
        self.guarded = True  # it may have set-id bits, so whoever wants to write is looked at
        self.stale = False  # the node is gone or has other data now: to be closed with the last who has it open
        # The kernel takes no FOPEN_KEEP_CACHE beside passthrough (fs/fuse/iomode.c).
        self.answer = wire.OPEN_OUT.pack(0, wire.FOPEN_PASSTHROUGH | wire.FOPEN_NOFLUSH, backing_id)


class BackingFiles:
    """The registrations of one mount. ``slots`` is the shared memory (``state.BACKING``)."""

    def __init__(self, device: Device, slots: memoryview) -> None:
        self._device = device
        self._slots = slots
        self._known: dict[int, Backing] = {}
        self._idle: OrderedDict[int, Backing] = OrderedDict()
        self._free = [
            slot for slot in range(len(slots) // BACKING_WORDS - 1, -1, -1) if not slots[slot * BACKING_WORDS]
        ]

    def inherited(self) -> Iterator[tuple[int, int]]:
        """Node number and open count of what a predecessor registered; to be given to ``inherit`` one by one."""
        for at in range(0, len(self._slots), BACKING_WORDS):
            if self._slots[at]:
                yield self._slots[at], self._slots[at + 2]

    def inherit(self, *, own: frozenset[int]) -> None:
        """Take over a predecessor's registrations; ``own`` are the numbers of nodes that are the container's."""
        for slot in range(len(self._slots) // BACKING_WORDS):
            number, backing_id, count = self._slots[slot * BACKING_WORDS : slot * BACKING_WORDS + BACKING_WORDS]
            if number:
                backing = Backing(number, backing_id, slot, own=number in own, count=count)
                self._known[number] = backing
                if not count:
                    self._idle[number] = backing

    def get(self, number: int) -> Backing | None:
        """The node's registration, if there is one."""
        return self._known.get(number)

    def register(self, number: int, fd: int, *, own: bool) -> Backing | None:
        """Register the open file ``fd`` for a node that has no registration; ``None`` where passthrough is refused."""
        if not self._free:
            self._shrink(0)
            if not self._free:
                return None
        try:
            backing_id = self._device.open_backing(fd)
        except OSError as error:
            log.debug("no passthrough for node %d: %s", number, error)
            return None
        slot = self._free.pop()
        backing = self._known[number] = Backing(number, backing_id, slot, own=own)
        at = slot * BACKING_WORDS
        self._slots[at + 1], self._slots[at + 2] = backing_id, 0
        self._slots[at] = number  # last: only now the slot counts
        self._idle[number] = backing
        return backing

    def opened(self, backing: Backing) -> bool:
        """Count one more opening; whether it is the first."""
        backing.count += 1
        self._slots[backing.slot * BACKING_WORDS + 2] = backing.count
        if backing.count > 1:
            return False
        self._idle.pop(backing.number, None)
        return True

    def closed(self, number: int) -> bool:
        """Count one opening less; whether it was the last."""
        backing = self._known.get(number)
        if backing is None or not backing.count:
            return False
        backing.count -= 1
        self._slots[backing.slot * BACKING_WORDS + 2] = backing.count
        if backing.count:
            return False
        if backing.stale:
            self._close(backing)
        else:
            self._idle[number] = backing
            self._shrink(IDLE)
        return True

    def guard(self, number: int) -> None:
        """The file has got set-id bits."""
        backing = self._known.get(number)
        if backing is not None:
            backing.guarded = True

    def forget(self, number: int) -> None:
        """The node is gone or has other data now: end its registration, or let it end with who has it open."""
        backing = self._known.get(number)
        if backing is None:
            return
        if backing.count:
            backing.stale = True
        else:
            del self._idle[number]
            self._close(backing)

    def _shrink(self, room: int) -> None:
        while len(self._idle) > room:
            self._close(self._idle.popitem(last=False)[1])

    def _close(self, backing: Backing) -> None:
        del self._known[backing.number]
        self._slots[backing.slot * BACKING_WORDS] = 0
        self._free.append(backing.slot)
        try:
            self._device.close_backing(backing.backing_id)
        except OSError as error:  # the mount ended meanwhile
            log.debug("backing file %d: %s", backing.backing_id, error)

    @property
    def registered(self) -> int:
        """How many registrations there are."""
        return len(self._known)
