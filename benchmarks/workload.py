"""What a workload is, and what it gets and gives. Workloads themselves are in ``benchmarks.workloads``.

A run goes like this, for each workload, condition and number of clients; the systems take turns within a round:

    for round:
        for system:
            mount the system afresh over the unchanged template; workload.prepare(place)
            for step in workload.steps:
                make and check step.cache; outcome = workload.run(place, step); check the cache again
            unmount, throw away what was changed

Rule: a workload does the same work in the same order on every system, and its ``proof`` shows that it did: a count or
checksum of what the file system returned. Random choices come from ``place.rng``, which depends on the round only.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar


class Group(StrEnum):
    """What a workload is about; a heading of the report."""

    LOOKUP = "lookup"
    READ = "read"
    WRITE = "write"
    CONTAINER = "container"
    DENSITY = "density"
    SCALE = "scale"


class Condition(StrEnum):
    """What else the machine does meanwhile."""

    IDLE = "idle"
    """Nothing."""
    BUSY = "busy"
    """All CPUs but CPU 0 run a process that never sleeps; see ``benchmarks.conditions``."""


class Cache(StrEnum):
    """What the kernel knows when a step begins, and how the framework makes and verifies it, alike for all systems."""

    DENTRIES = "names dropped"
    """``sync; echo 2 > drop_caches``: no unused dentries and inodes, file contents stay cached. Verified: the kernel's
    number of dentries grows by at least ``Outcome.names`` during the step."""
    ALL = "everything dropped"
    """``sync; echo 3 > drop_caches``: file contents are read from disk as well. Verified: dentries as above, and the
    page cache grows by at least ``Outcome.bytes`` (of files read). Left out with several clients, which would
    measure the disk."""
    BACKING = "contents cached below"
    """Everything dropped, then the files in ``Step.files`` were read where the system stores them (``place.stored``),
    not through the mount. Verified: mincore(2) shows them resident there."""
    WARM = "warm"
    """Nothing is dropped: an earlier step (or ``prepare``) did the same. Verified: dentries and page cache don't
    grow."""
    FRESH = "fresh mount"
    """Names dropped before the step, nothing said about contents: steps that change things. Not verified further."""
    ANY = "as it is"
    """What the step before left; not verified."""


@dataclass(frozen=True, slots=True)
class Step:
    """One measured part of a workload; gives one figure per system, condition and number of clients.

    The figure is the time per operation in seconds, unless ``unit`` names another quantity, which the outcome then
    carries as ``value`` (KiB, MiB, ms, µs, descriptors …). Less is better, always. ``files`` are paths in the template,
    for ``Cache.BACKING``. ``title`` is what tables say ("lstat in random order, first time").
    """

    name: str
    title: str
    cache: Cache
    unit: str = ""
    files: tuple[str, ...] = ()
    throughput: bool = False
    """Whether bytes per second are what readers expect to see (the figure is still seconds per operation)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step took and returned.

    ``seconds``: the measured time, around the calls only. ``operations``: how many were done (what the figure is
    divided by; 1 for a program that is measured as a whole). ``bytes``: read or written through the system.
    ``latencies_ns``: of single operations, where percentiles are asked (the framework keeps percentiles only).
    ``proof``: equal on all systems, any text; leave out what rightly differs (device numbers, times of creation).
    ``names``: how many distinct names the step made the kernel look up, for verifying the cache; 0 = not verified.
    ``value``: the figure where ``Step.unit`` says so. ``extra``: further figures, name with unit to
    value.
    """

    seconds: float
    operations: int
    proof: str
    bytes: int = 0
    latencies_ns: Sequence[int] = ()
    names: int = 0
    value: float | None = None
    extra: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large things are: full, or small enough for a smoke test. Workloads take their sizes from here."""

    quick: bool = False
    small_files: int = 20_000
    """Files of 100 to 8,000 bytes in the template's ``bench/small/dNNN/fNNNNN``."""
    large_bytes: int = 512 << 20
    """Of the template's ``bench/large``, random bytes."""
    lookups: int = 5_000
    """How many names a look-up or open workload touches."""
    huge_entries: int = 20_000
    """Entries of the template's ``bench/huge``."""
    copy_ups: int = 500
    new_file_bytes: int = 1 << 30
    """Size of the file that sequential writing makes."""
    containers: int = 50

    def scaled(self, count: int, least: int = 1) -> int:
        """``count``, or a twentieth of it but at least ``least`` when quick."""
        return max(least, count // 20) if self.quick else count


FULL = Sizes()
QUICK = Sizes(
    quick=True,
    small_files=600,
    large_bytes=8 << 20,
    lookups=400,
    huge_entries=1_000,
    copy_ups=25,
    new_file_bytes=16 << 20,
    containers=5,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A generated template of empty files, for what the usual one doesn't show: how cost grows.

    ``directories`` maps paths to numbers of files (``f000000`` …) in them; ``title`` says it in words.
    """

    name: str
    title: str
    directories: Callable[[Sizes], Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Facts:
    """What lies in the template; paths are relative to its root, in a fixed order."""

    entries: int
    """All entries, the root included."""
    files: int
    small: tuple[str, ...]
    """The small files."""
    small_bytes: int
    """Their sizes added up."""
    large: str
    huge: str
    """A directory of ``Sizes.huge_entries`` files named f000000 …, 16 bytes each."""
    deep: str
    """A file below 24 directories."""
    programs: bool
    """Whether it is a Debian root that one can chroot into (sh, perl, dpkg); container workloads need it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a workload works: one freshly mounted system.

    ``root``: the mounted container root. ``stored``: the same template where the system keeps its files (a folder on
    the disk's file system; for ext4 it is ``root`` itself): never change anything there. ``scratch``: an empty folder
    on the same disk, outside the mount, the same for all systems, removed after the round. ``servers``: the serving
    processes of this mount (empty for kernel file systems). ``another``: mounts one more container of the same system
    on the same template, unmounted and removed by the framework after the round; gives its ``Place``.
    """

    system: str
    root: Path
    stored: Path
    scratch: Path
    servers: tuple[int, ...]
    facts: Facts
    sizes: Sizes
    clients: int
    condition: Condition
    rng: random.Random
    another: Callable[[], Place]
    kept: tuple[Path, ...] = ()
    """The folders on disk that hold what this container has for itself (upper and work directory; vzfs's container);
    empty for systems without containers (read-only ones, ext4)."""


class Skip(Exception):
    """Raised by ``prepare`` or ``run``: this system or template can't do it; the text says why. It is reported."""


class Workload(ABC):
    """One workload. Subclasses set the class variables and write ``run``; instances keep nothing between rounds but
    what ``prepare`` finds out."""

    name: ClassVar[str]
    """As on the command line: lower case, words joined by ``-``."""
    title: ClassVar[str]
    group: ClassVar[Group]
    steps: ClassVar[tuple[Step, ...]]
    conditions: ClassVar[tuple[Condition, ...]] = (Condition.IDLE, Condition.BUSY)
    """IDLE alone for what costs no round trip (memory, disk space, bulk data) or would take too long."""
    clients: ClassVar[tuple[int, ...]] = (1,)
    """Numbers of client processes to measure with; ``place.clients`` says which it is now."""
    writes: ClassVar[bool] = False
    """Whether it changes anything: systems that have no copy-on-write are left out, ext4's copy is restored."""
    needs_programs: ClassVar[bool] = False
    """Whether it needs ``facts.programs``."""
    shape: ClassVar[Shape | None] = None
    """The template it needs, if not the usual one. Of ``facts``, only the counts are set then."""

    def furnish(self, tree: Path, sizes: Sizes) -> None:  # noqa: B027
        """Put what this workload needs into the template being made, below ``tree/bench/<name>``; called once."""

    def prepare(self, place: Place) -> None:  # noqa: B027
        """Before the first step, not measured: start nothing that keeps running, list paths, build archives …"""

    @abstractmethod
    def run(self, place: Place, step: Step) -> Outcome:
        """Do ``step``. Raises ``Skip``; any other exception is a failure of the system, reported as such."""
