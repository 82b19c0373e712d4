"""What the direct engine must reach, as one table; ``benchmarks.report.verdicts`` judges a run by it.

Rule: a limit is written here and nowhere else; the texts of reports and documents are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

JUDGED = "vzfs-direct"
"""The system that has to reach the targets."""


@dataclass(frozen=True, slots=True)
class Other:
    """What a figure is compared with: ``system``'s (empty: the judged one's own) in ``step`` (empty: the same)."""

    system: str = ""
    step: str = ""
    title: str = ""
    """How to call it; the system's name if empty."""

    @property
    def name(self) -> str:
        """For texts."""
        return self.title or self.system


@dataclass(frozen=True, slots=True)
class Target:
    """One figure that has to be at most ``idle`` and ``busy`` (None: not asked under that condition).

    With ``against``, limits are multiples of that system's figure in the same condition; without, they are quantities
    in the figure's own unit (seconds where it has none). ``speed`` only changes the words: "at least 0.95 of ext4's
    speed" instead of "at most 1.05 of its time". Rows with several figures are several targets with the same ``row``.
    """

    row: str
    part: str
    workload: str
    step: str
    idle: Fraction
    busy: Fraction | None
    against: Other | None = None
    speed: bool = False
    clients: int = 1
    unit: str = ""
    """Of a limit that is a quantity; must be the figure's (empty: seconds)."""
    note: str = ""

    def limit(self, condition: str) -> Fraction | None:
        """What is wanted under ``condition``; None where nothing is."""
        return {"idle": self.idle, "busy": self.busy}.get(condition)


def _of_speed(share: str) -> Fraction:
    """The limit of the time for a share of the speed."""
    return 1 / Fraction(share)


OVERLAYFS, FUSE_OVERLAYFS, EXT4 = Other("overlayfs"), Other("fuse-overlayfs"), Other("ext4")
QUARTER, HALF, TWO_THIRDS, ONE = Fraction(1, 4), Fraction(1, 2), Fraction(2, 3), Fraction(1)
CACHED = Fraction("1.1")

_WALK = "walk with attributes (find -printf %s), dentries dropped"
_LSTAT = "lstat of 5,000 names in random order, dentries dropped"
_NEGATIVE = "negative look-ups"
_CACHED = "lstat, cached"
_OPEN = "open+read+close of small files"
_START = "start in chroot, again"
_READ = "reading, backing file cached"
_FILES = "create, rename, unlink of 5,000 files; tar extraction; rm -rf"
_SMALL = "first write to 500 small template files, same durability"
_LARGE = "first write to a 512 MiB template file"
_CHMOD = "chmod of a 512 MiB template file"
_MEMORY = "resident memory of a mount (PSS)"

TARGETS: tuple[Target, ...] = (
    Target(_WALK, "", "walk", "first", Fraction("1.2"), Fraction("1.2"), OVERLAYFS),
    Target(_LSTAT, "", "lstat-random", "first", QUARTER, HALF, FUSE_OVERLAYFS),
    Target(_NEGATIVE, "first", "negative", "first", QUARTER, HALF, FUSE_OVERLAYFS),
    Target(_NEGATIVE, "repeated", "negative", "again", CACHED, CACHED, EXT4),
    Target(_CACHED, "", "lstat-random", "again", CACHED, CACHED, EXT4),
    Target(_OPEN, "first time", "small-files", "first", QUARTER, HALF, FUSE_OVERLAYFS),
    Target(_OPEN, "again", "small-files", "again", HALF, ONE, FUSE_OVERLAYFS),
    Target(_START, "sh", "start", "sh", HALF, TWO_THIRDS, FUSE_OVERLAYFS),
    Target(_START, "perl", "start", "perl", HALF, TWO_THIRDS, FUSE_OVERLAYFS),
    Target(_START, "dpkg", "start", "dpkg", HALF, TWO_THIRDS, FUSE_OVERLAYFS),
    Target(_READ, "sequential", "sequential-read", "first", _of_speed("0.95"), _of_speed("0.95"), EXT4, speed=True),
    Target(_READ, "4 KiB, random", "random-read", "first", _of_speed("0.95"), _of_speed("0.95"), EXT4, speed=True),
    Target(_READ, "mmap touch", "mmap-touch", "first", _of_speed("0.95"), _of_speed("0.95"), EXT4, speed=True),
    Target(
        "sequential write of 1 GiB into a new file",
        "",
        "sequential-write",
        "write",
        _of_speed("0.9"),
        _of_speed("0.9"),
        EXT4,
        speed=True,
    ),
    Target(_FILES, "create", "files", "create", _of_speed("1.5"), ONE, FUSE_OVERLAYFS),
    Target(_FILES, "rename", "files", "rename", _of_speed("1.5"), ONE, FUSE_OVERLAYFS),
    Target(_FILES, "unlink", "files", "unlink", _of_speed("1.5"), ONE, FUSE_OVERLAYFS),
    Target(_FILES, "tar -x", "tar", "extract", _of_speed("1.5"), ONE, FUSE_OVERLAYFS),
    Target(_FILES, "rm -rf", "tar", "remove", _of_speed("1.5"), ONE, FUSE_OVERLAYFS),
    Target("rm -rf of a template directory", "", "remove-template", "remove", HALF, TWO_THIRDS, FUSE_OVERLAYFS),
    Target(_SMALL, "of few directories", "first-write-small", "durable", _of_speed("1.5"), ONE, FUSE_OVERLAYFS),
    Target(_SMALL, "of many directories", "first-write-small", "spread", _of_speed("1.5"), ONE, FUSE_OVERLAYFS),
    Target(
        _LARGE,
        "",
        "first-write-large",
        "write",
        _of_speed("0.9"),
        None,
        Other(step="cp", title="cp of it on the disk's file system"),
        speed=True,
        note="constant time with reflink is for file systems that have it; a test shows it",
    ),
    Target(_CHMOD, "first change in its directory", "chmod-large", "first", Fraction("100e-6"), None),
    Target(_CHMOD, "again", "chmod-large", "again", Fraction("100e-6"), None),
    Target(
        "look-ups of another process while that copy runs",
        "99th percentile",
        "look-ups-during-copy",
        "p99",
        Fraction(5000),
        None,
        unit="µs",
    ),
    Target(
        "page cache added by a second container reading the same 512 MiB",
        "",
        "page-cache",
        "second-container",
        Fraction("5.12"),
        None,
        unit="MiB",
        note="1 % of the file",
    ),
    Target(_MEMORY, "idle", "memory", "idle", Fraction(30), None, unit="MiB"),
    Target(_MEMORY, "after a walk", "memory", "walked", Fraction(40), None, unit="MiB"),
    Target(
        "descriptors open after that walk",
        "",
        "memory",
        "descriptors",
        Fraction(100),
        None,
        unit="descriptors",
        note="not growing with the entries: far below their number",
    ),
)
