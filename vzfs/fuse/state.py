"""What a serving process shares with its successor and with everybody who asks how it is doing.

One memfd per mount, of fixed size, little-endian 64-bit words. The serving process maps it and counts with plain
``words[n] += 1``; ``vzfs stats`` maps it read-only through ``/proc/PID/fd``, so asking costs the server nothing. Rules:
- One thread writes a word, but for SLOW and ERRORS, where workers may lose a count to each other; no locks.
- Nothing is ever reset, so that two snapshots can be subtracted; a successor goes on from its predecessor's counts.
- The words' meaning changes only together with VERSION.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from vzfs.errors import UnsupportedError
from vzfs.fuse.wire import OPCODES, InitFlag, Opcode
from vzfs.tree.counters import COUNTERS, Counters
from vzfs.tree.durable import DURABLE_WORDS

MAGIC = int.from_bytes(b"vzfsstat", "little")
VERSION = 3
NAME = "vzfs-state"

# Header.
_MAGIC, _VERSION = 0, 1
FLAGS = 2
"""``InitFlag`` that kernel and server agreed upon; 0: not known."""
MINOR = 3
"""Minor number of the protocol version 7."""
MAX_WRITE = 4
"""Bytes in the largest WRITE; 0: not known."""
INCARNATION = 5
"""How many processes have served the mount, the present one included."""
MOUNTED = 6
"""When the first of them began, in ns of CLOCK_BOOTTIME."""
STARTED = 7
"""When the present one began, in the same."""
LAST_DONE = 8
"""``unique`` of the last request that the serving thread answered."""
OPEN_TOP = 9
"""How many of the slots in OPEN were ever in use."""

ERRORS = 16
"""Requests answered with an errno."""
INTERRUPTED = 17
"""Requests given up because their program did not want to wait any longer."""
TREE = 18
"""The words of ``vzfs.tree.counters``."""

ANSWERED = 24
"""Requests answered from the index, from what the tree knows, with a system call to the store."""
REQUESTS = 32
"""Requests by opcode."""
PAUSES = REQUESTS + OPCODES
"""How long one request kept the serving thread busy: how many took ``ns.bit_length()`` of n, for each n."""
BUCKETS = 64
SLOW = PAUSES + BUCKETS
"""The same of requests that a worker thread answered, from their start to their end."""
DURABLE = SLOW + BUCKETS
"""What a tree remembers for its successor, see ``vzfs.tree.durable``."""
OPEN = DURABLE + DURABLE_WORDS
"""To the end: files that are open or registered, see ``vzfs.fuse.openfiles``; ``OPEN_WORDS`` words each: node number
(0: free); backing id (0: served), in bit 31 whether it may be mapped for writing, and above it the user who opened it;
how often it is open (24 bits), and above that the request that opened or closed it last."""
OPEN_WORDS = 3
OPEN_SLOTS = 1 << 17
WORDS = OPEN + OPEN_SLOTS * OPEN_WORDS
SIZE = WORDS * 8

_BACKING_ID, _OPENINGS = (1 << 31) - 1, (1 << 24) - 1
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class Pauses:
    """How long requests took, in nanoseconds.

    ``buckets[n]`` requests took from 2**(n-1) to 2**n - 1 ns; there are as many buckets as are in use. The percentiles
    are interpolated within a bucket, so they are right to a factor of two; none took longer than ``longest_ns``, which
    is the end of the last bucket.
    """

    count: int
    p50_ns: int
    p90_ns: int
    p99_ns: int
    longest_ns: int
    buckets: tuple[int, ...]

    @classmethod
    def of(cls, buckets: Sequence[int]) -> Pauses:
        """The figures of a histogram; all 0 for an empty one."""
        used = max((n + 1 for n, count in enumerate(buckets) if count), default=0)
        p50, p90, p99 = (percentile(buckets, share) for share in (0.5, 0.9, 0.99))
        return cls(sum(buckets), p50, p90, p99, max(0, (1 << used >> 1) - 1), tuple(buckets[:used]))

    def since(self, earlier: Pauses) -> Pauses:
        """Those that came after an earlier snapshot of the same mount."""
        return Pauses.of([now - then for now, then in zip_longest(self.buckets, earlier.buckets, fillvalue=0)])


def percentile(buckets: Sequence[int], share: float) -> int:
    """The value below or at which ``share`` (0 to 1) of the values of a histogram lie; 0 for an empty one.

    ``buckets[n]`` counts the values whose ``bit_length()`` is n.
    """
    rank = share * sum(buckets)
    for n, count in enumerate(buckets):
        if count and rank <= count:
            low, high = (1 << n) >> 1, (1 << n) - 1
            return low + round((high - low) * rank / count)
        rank -= count
    return 0


@dataclass(frozen=True, slots=True)
class Answered:
    """Requests by what their answer came from: the template's index alone, what the tree knew, the store."""

    index: int
    tree: int
    store: int


@dataclass(frozen=True, slots=True)
class Agreed:
    """What kernel and server agreed upon: names of FUSE protocol flags, and bytes in the largest WRITE."""

    protocol: str
    flags: tuple[str, ...]
    passthrough: bool
    max_write: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of one mount since it was mounted, whichever processes served it.

    ``requests`` by the name of their FUSE opcode, those that came only. ``answered`` is ``None`` for an engine that
    doesn't tell. ``errors`` are requests answered with an errno, most of them of the everyday kind (no such attribute,
    not empty). ``copied_bytes`` are the data of ``copy_ups``; ``unfolds`` are template directories made real.
    ``pauses`` kept the thread that takes requests busy, ``slow`` requests were answered beside it. ``incarnation`` is
    how many processes have served the mount; times are in seconds, since it was mounted and since the last began.
    """

    requests: Mapping[str, int]
    answered: Answered | None
    errors: int
    interrupted: int
    copy_ups: int
    copied_bytes: int
    unfolds: int
    backing_open: int
    backing_registered: int
    pauses: Pauses
    slow: Pauses
    incarnation: int
    mounted_s: float
    uptime_s: float

    @property
    def total(self) -> int:
        """All requests."""
        return sum(self.requests.values())


class State:
    """The mapped words. ``words`` is for counting; ``fd`` is what a successor is to be given, -1 if read-only."""

    def __init__(self, fd: int, *, writable: bool) -> None:
        """Map the memory behind ``fd``. Raises ``UnsupportedError`` if it isn't what this version knows."""
        if os.fstat(fd).st_size != SIZE:
            raise _foreign()
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, SIZE, mmap.MAP_SHARED, access)
        self.words: memoryview = memoryview(self._map).cast("Q")
        self.fd = fd if writable else -1

    @classmethod
    def create(cls) -> State:
        """The state of a new mount."""
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, SIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)  # a reader's map can't lose its pages
        state = cls(fd, writable=True)
        words = state.words
        words[_VERSION] = VERSION
        words[MOUNTED] = words[STARTED] = _now_ns()
        words[INCARNATION] = 1
        words[_MAGIC] = MAGIC
        return state

    @classmethod
    def adopt(cls, fd: int) -> State:
        """The state of a mount whose server is gone, to be gone on with; ``fd`` now belongs to the result."""
        state = cls(fd, writable=True)
        state._check()
        state.words[STARTED] = _now_ns()
        state.words[INCARNATION] += 1
        return state

    @classmethod
    def open_of(cls, pid: int, fd: int) -> State:
        """A look at the state that process ``pid`` has at its descriptor ``fd``.

        Raises ``OSError`` if that process is gone or not ours to look at, ``UnsupportedError`` if it is of a version of
        vzfs that counts differently.
        """
        path = f"/proc/{pid}/fd/{fd}"
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):  # another process has that number now
            raise ProcessLookupError(f"process {pid} has no state at {fd}")
        own = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            state = cls(own, writable=False)
            state._check()
        finally:
            os.close(own)
        return state

    def close(self) -> None:
        """Unmap it and close the descriptor. Nobody may count any more."""
        self.words.release()
        self._map.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if (self.words[_MAGIC], self.words[_VERSION]) != (MAGIC, VERSION):
            raise _foreign()

    def agree(self, flags: int, minor: int, max_write: int) -> None:
        """Note what kernel and server agreed upon: ``InitFlag``, minor protocol version, bytes."""
        self.words[MINOR], self.words[MAX_WRITE] = minor, max_write
        self.words[FLAGS] = flags

    def note(self, counters: Counters) -> None:
        """Let a tree count here from now on; to be called once, before it is used."""
        counters.keep_in(self.words[TREE : TREE + COUNTERS])

    def has(self, flag: InitFlag) -> bool:
        """Whether kernel and server agreed upon ``flag``."""
        return bool(self.words[FLAGS] & flag)

    @property
    def max_write(self) -> int:
        """Bytes in the largest WRITE; 0 if not agreed upon."""
        return self.words[MAX_WRITE]

    @property
    def agreed(self) -> Agreed | None:
        """What was agreed upon; ``None`` if that isn't known."""
        bits = self.words[FLAGS]
        if not bits:
            return None
        names = tuple(str(flag.name) for flag in InitFlag if flag & bits)
        passthrough = bool(bits & InitFlag.PASSTHROUGH)
        return Agreed(f"7.{self.words[MINOR]}", names, passthrough, self.words[MAX_WRITE])

    def statistics(self) -> Statistics:
        """A snapshot. Counts that go up meanwhile may be in it or not."""
        now = _now_ns()
        words = self.words[:DURABLE].tolist()
        opened = self.words[OPEN : OPEN + words[OPEN_TOP] * OPEN_WORDS].tolist()
        slots = [opened[at : at + OPEN_WORDS] for at in range(0, len(opened), OPEN_WORDS) if opened[at]]
        answered = Answered(*words[ANSWERED : ANSWERED + 3])
        copy_ups, copied_bytes, unfolds = words[TREE : TREE + COUNTERS]
        return Statistics(
            requests=_by_name(words[REQUESTS : REQUESTS + OPCODES]),
            answered=answered if any((answered.index, answered.tree, answered.store)) else None,
            errors=words[ERRORS],
            interrupted=words[INTERRUPTED],
            copy_ups=copy_ups,
            copied_bytes=copied_bytes,
            unfolds=unfolds,
            backing_open=sum(1 for _, kind, count in slots if kind & _BACKING_ID and count & _OPENINGS),
            backing_registered=sum(1 for _, kind, _ in slots if kind & _BACKING_ID),
            pauses=Pauses.of(words[PAUSES : PAUSES + BUCKETS]),
            slow=Pauses.of(words[SLOW : SLOW + BUCKETS]),
            incarnation=words[INCARNATION],
            mounted_s=(now - words[MOUNTED]) / 1e9,
            uptime_s=(now - words[STARTED]) / 1e9,
        )


def _by_name(counts: Sequence[int]) -> dict[str, int]:
    known = {opcode.value: opcode.name for opcode in Opcode}
    return {known.get(opcode, f"OPCODE_{opcode}"): count for opcode, count in enumerate(counts) if count}


def _now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _foreign() -> UnsupportedError:
    return UnsupportedError(
        "the serving process is of another version of vzfs, which counts differently",
        remedy="ask with that version, or umount and mount it again",
    )
