"""The regular files of a mount that are open, and who reads and writes them: the kernel by itself, or this process.

A file is *passed through* when the kernel has its backing file registered and reads, writes and maps that by itself; it
is *served* when READ and WRITE come here, with the kernel's page cache in between. Rules:
- One node is one or the other as long as anybody has it open; the kernel refuses to mix them, and another backing file.
- A small file of the template is served: so it never has to be split when somebody writes to it (see
  ``vzfs.tree.tree``), and its few pages are read once. Everything else is passed through where the kernel agrees, which
  before Linux 6.9 it never does.
- A registration outlives its last close while it is useful, because making one costs more than all else in an open.
  When there are too many, those go first that were closed longest ago.
- What is open stands in memory that a successor of this process maps, each opening and closing as one word together
  with the request that did it: so none is counted twice, whenever this process dies.

Called under the tree's lock.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Iterator

from vzfs.fuse import wire
from vzfs.fuse.client import user_of
from vzfs.fuse.device import Device
from vzfs.fuse.state import OPEN_WORDS
from vzfs.tree.node import Node
from vzfs.tree.tree import Tree

log = logging.getLogger(__name__)

REGISTERED = 8192
"""Registrations above which idle ones are ended; each pins an inode and a struct file in the kernel."""
_ENDED_AT_ONCE = 16
_COUNTED_FROM = 1 / 8
"""Share of the slots in use from which on it is noted whose openings take the next."""
_SCARCE_FROM = 3 / 4
"""Share of the slots in use from which on whoever has taken the most gets no more."""
_COUNT_BITS = 24
_COUNT = (1 << _COUNT_BITS) - 1
_REQUEST = (1 << 64 - _COUNT_BITS) - 1
_MAPPED = 1 << 31
_ID = _MAPPED - 1
_PASSED_FLAGS = wire.FOPEN_PASSTHROUGH | wire.FOPEN_NOFLUSH
_SERVED_FLAGS = wire.FOPEN_NOFLUSH
_NOBODY = 0xFFFFFFFF


class OpenFile:
    """An open file, or one registered for the next opening. ``backing_id`` 0: served; ``own``: the container's, so may
    be written; ``stale``: it has no name or other data now, to be ended by the last who closes it; ``mapped``: somebody
    may write to it through a mapping, of which the kernel tells nobody.
    """

    __slots__ = ("at", "backing_id", "failure", "failures", "mapped", "node", "number", "own", "stale", "told", "user")

    def __init__(self, node: Node, backing_id: int, at: int, *, own: bool) -> None:
        self.node = node
        self.number = node.number
        self.backing_id = backing_id
        self.at = at  # of its slot
        self.own = own
        self.stale = node.dead
        self.mapped = False
        self.user = _NOBODY
        self.failures = 0  # how many flushes failed
        self.failure = 0  # errno of the last
        self.told: dict[int, int] = {}  # how many of them an opening, by its handle, was told of or didn't live to see

    @property
    def openings(self) -> int:
        """How often it is open."""
        return self.node.passed or self.node.served


class OpenFiles:
    """The open files of one mount, in ``known`` by node number; ``slots`` is shared memory (``state.OPEN``), of which
    ``top[0]`` tells how many slots were ever in use. Without ``passes`` everything is served."""

    def __init__(self, device: Device, tree: Tree, slots: memoryview, top: memoryview, *, passes: bool = True) -> None:
        self._device = device
        self._passes = passes
        self._tree = tree
        self._slots = slots
        self._top = top
        self._size = len(slots) // OPEN_WORDS
        self.known: dict[int, OpenFile] = {}
        self._idle: OrderedDict[int, OpenFile] = OrderedDict()  # registered, not open; the first was closed first
        self._free = [at for at in range(0, top[0] * OPEN_WORDS, OPEN_WORDS) if not slots[at]]
        self._users: Counter[int] = Counter()

    # ---------------------------------------------------------------------------------------------------- succession

    def inherited(self) -> Iterator[tuple[int, int, int]]:
        """Place, node number and how often it is open of what a predecessor knew, each to be given to ``inherit``."""
        for at in range(0, self._top[0] * OPEN_WORDS, OPEN_WORDS):
            if self._slots[at]:
                yield at, self._slots[at], self._slots[at + 2] & _COUNT

    def inherit(self, at: int, *, own: bool) -> None:
        """Take over what a predecessor knew of a file."""
        number, kind, count = self._slots[at], self._slots[at + 1], self._slots[at + 2] & _COUNT
        node = self._tree.keep(number)
        file = self.known[number] = OpenFile(node, kind & _ID, at, own=own)
        file.mapped = bool(kind & _MAPPED)
        file.user = kind >> 32
        self._users[file.user] += 1
        if file.backing_id:
            node.passed = count
        else:
            node.served = count
        if not count:
            self._rest(file)
        elif node.dead:
            file.stale = True

    # --------------------------------------------------------------------------------------------- beginning, ending

    def register(self, number: int, fd: int, *, own: bool, client: int) -> OpenFile:
        """Let the kernel read and write the open file ``fd`` by itself for a node that isn't known here; where it
        refuses that, the file is served.

        Raises ``OSError`` ``ENFILE`` when too many files are open in the container, most of them the client's.
        """
        if not self._passes:
            return self.serve(number, own=own, client=client)
        at = self._slot(client)
        try:
            backing_id = self._device.open_backing(fd)
        except OSError as error:
            log.debug("no passthrough for node %d: %s", number, error)
            backing_id = 0
        return self._begin(number, backing_id, at, own=own)

    def serve(self, number: int, *, own: bool, client: int) -> OpenFile:
        """Serve a node that isn't known here. Raises ``OSError`` ``ENFILE`` as ``register``."""
        return self._begin(number, 0, self._slot(client), own=own)

    def _begin(self, number: int, backing_id: int, at: tuple[int, int], *, own: bool) -> OpenFile:
        place, user = at
        file = self.known[number] = OpenFile(self._tree.keep(number), backing_id, place, own=own)
        file.user = user
        self._users[user] += 1
        self._slots[place + 2] = 0
        self._note(file)
        self._slots[place] = number  # last: only now the slot counts
        return file

    def _slot(self, client: int) -> tuple[int, int]:
        """A free slot, and the user who is said to have taken it."""
        if len(self.known) >= REGISTERED:
            self._end_some()
        used = len(self.known)
        user = _NOBODY if used < self._size * _COUNTED_FROM else user_of(client)
        if used >= self._size * _SCARCE_FROM and self._holds_most(user):
            raise OSError(errno.ENFILE, f"{used} files are open in the container, most of them user {user}'s")
        if self._free:
            return self._free.pop(), user
        if self._top[0] >= self._size:
            raise OSError(errno.ENFILE, "too many files are open in the container")
        self._top[0] += 1
        return (self._top[0] - 1) * OPEN_WORDS, user

    def _holds_most(self, user: int) -> bool:
        return user != 0 and self._users[user] >= max(
            (count for one, count in self._users.items() if one not in (0, _NOBODY)), default=0
        )

    def _note(self, file: OpenFile) -> None:
        self._slots[file.at + 1] = file.backing_id | (_MAPPED if file.mapped else 0) | file.user << 32

    def _end_some(self) -> None:
        for _ in range(min(_ENDED_AT_ONCE, len(self._idle))):
            self._end(next(iter(self._idle.values())))

    def _end(self, file: OpenFile) -> None:
        del self.known[file.number]
        self._idle.pop(file.number, None)
        self._users[file.user] -= 1
        if not self._users[file.user]:
            del self._users[file.user]  # a container has as many users as it likes
        self._slots[file.at] = 0
        self._free.append(file.at)
        if file.backing_id:
            try:
                self._device.close_backing(file.backing_id)
            except OSError as error:  # the mount ended meanwhile
                log.debug("backing file %d: %s", file.backing_id, error)
        self._tree.let_go(file.node)

    # ---------------------------------------------------------------------------------------------- opening, closing

    def open(self, file: OpenFile, flags: int, request: int) -> bytes:
        """Count one more opening with the ``flags`` of open(2), by ``request`` (its ``unique``); gives the answer."""
        node = file.node
        if file.backing_id:
            keep, open_flags = 0, _PASSED_FLAGS
            if not node.passed:
                self._idle.pop(file.number, None)
            if flags & os.O_ACCMODE == os.O_RDWR and not file.mapped:
                self._map(file)
        else:
            # What the page cache has of the container's own file may be older than what was passed through since.
            keep = wire.FOPEN_KEEP_CACHE if node.served or not file.own or not self._passes else 0
            open_flags = _SERVED_FLAGS
        self._count(file, +1, request)
        handle = request & ~wire.UNIQUE_RESEND if flags & os.O_ACCMODE != os.O_RDONLY else 0
        if handle and file.failures:
            file.told[handle] = file.failures
        return wire.OPEN_OUT.pack(handle, open_flags | keep, file.backing_id)

    def _map(self, file: OpenFile) -> None:
        """The file may change through a mapping from now on, and what the kernel knows of its times be wrong."""
        file.mapped = True
        self._note(file)
        self.attributes_changed(file.number)

    def attributes_changed(self, number: int) -> None:
        """Let the kernel ask for the node's attributes again."""
        self._device.send(wire.attributes_changed(number))

    def close(self, file: OpenFile, handle: int, request: int) -> None:
        """Count one opening less, by ``request``."""
        if not file.openings or self._counted(file, request):
            return
        file.told.pop(handle, None)
        self._count(file, -1, request)
        if not file.openings:
            self._rest(file)

    def _rest(self, file: OpenFile) -> None:
        """Nobody has the file open any more."""
        if file.stale or not file.backing_id:
            self._end(file)
            return
        self._idle[file.number] = file
        if file.mapped:
            file.mapped = False
            self._note(file)

    def _count(self, file: OpenFile, difference: int, request: int) -> None:
        node = file.node
        count = file.openings + difference
        self._slots[file.at + 2] = (request & _REQUEST) << _COUNT_BITS | count
        if file.backing_id:
            node.passed = count
        else:
            node.served = count

    def _counted(self, file: OpenFile, request: int) -> bool:
        return self._slots[file.at + 2] >> _COUNT_BITS == request & _REQUEST

    def counted(self, number: int, request: int) -> OpenFile | None:
        """The open file of the node if ``request``, resent, was the last that was counted for it."""
        file = self.known.get(number)
        return file if file is not None and file.openings and self._counted(file, request) else None

    def answer(self, file: OpenFile, flags: int, request: int) -> bytes:
        """What ``open`` answered to a ``request`` that was counted already."""
        open_flags = _PASSED_FLAGS if file.backing_id else _SERVED_FLAGS
        handle = request & ~wire.UNIQUE_RESEND if flags & os.O_ACCMODE != os.O_RDONLY else 0
        return wire.OPEN_OUT.pack(handle, open_flags, file.backing_id)

    def is_mapped(self, number: int) -> bool:
        """Whether the node's size and times may change without anybody being told."""
        file = self.known.get(number)
        return file is not None and file.mapped

    # ------------------------------------------------------------------------------------------- what becomes of it

    def changed(self, number: int) -> None:
        """The node is gone or has other data now: end its registration, or let it end with who has it open."""
        file = self.known.get(number)
        if file is None:
            return
        if not file.openings:
            self._end(file)
        elif file.backing_id or file.node.dead:
            file.stale = True
        else:
            file.own = True  # who has it open sees the copy

    def tell_failure(self, number: int, handle: int) -> None:
        """Raise ``OSError`` if a flush of the node failed of which the opening ``handle`` was not told.

        The file system below tells an error to one descriptor; here each opening of before is told of it once.
        """
        file = self.known.get(number)
        if file is not None and file.failures > file.told.get(handle, 0):
            file.told[handle] = file.failures
            raise OSError(file.failure, "what was written did not reach the disk")

    def failed(self, number: int, handle: int, error: OSError) -> None:
        """Take note that a flush of the node failed, of which ``handle`` is told by ``error`` itself."""
        file = self.known.get(number)
        if file is not None and error.errno is not None:
            file.failures += 1
            file.failure = error.errno
            file.told[handle] = file.failures
