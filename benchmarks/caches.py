"""Cache states: made, and verified by what the kernel counts rather than believed.

Rule: caches are dropped for the whole machine, so that no system keeps what another loses. The kernel's counters cover
the whole machine as well: other programs disturb them, so each check has some slack, and what it saw is kept.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.workload import Cache, Outcome, Place, Step

DENTRIES_SLACK = 300
"""A client's interpreter and its modules, and other programs."""
CACHED_SLACK_KIB = 4096
SHARE = 0.9
"""How much of what is expected must be seen, where the rest may be names or pages in use."""
WARM_SHARE = 0.05
READ_SIZE = 1 << 20
_PAGE = mmap.PAGESIZE

TEXT = {
    Cache.DENTRIES: "Unused names and inodes dropped (drop_caches = 2). Verified: the kernel's dentries grow by the "
    "names that are looked up.",
    Cache.ALL: "Names, inodes and file contents dropped (drop_caches = 3). Verified: dentries grow by the names, the "
    "page cache by the bytes read.",
    Cache.BACKING: "Everything dropped, then the stored file read past the mount. Verified: mincore(2) finds it in "
    "memory.",
    Cache.WARM: "Done before, nothing dropped. Verified: neither dentries nor the page cache grow.",
    Cache.FRESH: "Fresh mount, unused names and inodes dropped. Not verified further.",
    Cache.ANY: "As the step before left it. Not verified.",
}


@dataclass(frozen=True, slots=True)
class Level:
    """What the kernel has now: dentries (number), page cache (KiB)."""

    dentries: int
    cached_kib: int


def level() -> Level:
    """Read the kernel's counters, those of the single CPUs added up first."""
    Path("/proc/sys/vm/stat_refresh").read_bytes()
    dentries = int(Path("/proc/sys/fs/dentry-state").read_text().split()[0])
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return Level(dentries, int(fields["Cached"].split()[0]))


def drop(what: str) -> None:
    """Write everything dirty, then drop ``2`` (names and inodes) or ``3`` (contents too) of all file systems."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text(what)


def make(step: Step, place: Place) -> float:
    """Bring about what ``step.cache`` says; return the share of the stored files that is in memory, -1 if not asked."""
    match step.cache:
        case Cache.DENTRIES | Cache.FRESH:
            drop("2")
        case Cache.ALL:
            drop("3")
        case Cache.BACKING:
            drop("3")
            files = [place.stored / path for path in step.files]
            for file in files:
                read_whole(file)
            return resident(files)
        case Cache.WARM | Cache.ANY:
            pass
    return -1.0


def check(step: Step, outcome: Outcome, clients: int, before: Level, after: Level, resident_share: float) -> str:
    """What is not as ``step.cache`` says; empty if all is well or nothing is asked."""
    names, grown = outcome.names, after.dentries - before.dentries
    cached = after.cached_kib - before.cached_kib
    kib = outcome.bytes // 1024 // clients  # each may read the same
    found = []
    if step.cache in (Cache.DENTRIES, Cache.ALL) and grown < SHARE * names:
        found.append(f"{names} names looked up, but dentries grew by {grown}")
    if step.cache is Cache.ALL and cached < SHARE * kib - CACHED_SLACK_KIB:
        found.append(f"at least {kib} KiB read, but the page cache grew by {cached} KiB")
    if step.cache is Cache.BACKING and resident_share < SHARE:
        found.append(f"only {resident_share:.0%} of the stored files are in memory")
    if step.cache is Cache.WARM and grown > WARM_SHARE * max(names, outcome.operations) + DENTRIES_SLACK:
        found.append(f"should be warm, but dentries grew by {grown}")
    if step.cache is Cache.WARM and cached > WARM_SHARE * kib + CACHED_SLACK_KIB:
        found.append(f"should be warm, but the page cache grew by {cached} KiB")
    return "; ".join(found)


def read_whole(path: Path) -> None:
    """Read a file to its end, so that it is in the page cache."""
    buffer = bytearray(READ_SIZE)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def resident(paths: Iterable[Path]) -> float:
    """The share of the files' pages that is in the page cache: mincore(2) on a mapping."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = found = 0
    for path in paths:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                continue
            # Private, since only a writable mapping shows its address to ctypes; nothing is written to it.
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapping:
                start = ctypes.c_char.from_buffer(mapping)
                vector = (ctypes.c_ubyte * -(-size // _PAGE))()
                address = ctypes.c_void_p(ctypes.addressof(start))
                failed = libc.mincore(address, ctypes.c_size_t(size), vector)
                error = ctypes.get_errno()
                del start
                if failed:
                    raise OSError(error, os.strerror(error), str(path))
                pages += len(vector)
                found += sum(byte & 1 for byte in bytes(vector))
    return found / pages if pages else 1.0
