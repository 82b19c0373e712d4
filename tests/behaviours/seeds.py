"""Seeds: the files that must exist before a behaviour starts, as values, and how they are planted.

Rule: a seed says everything about its file that a file system keeps (content, owner, mode, times, extended
attributes, links), so that planting it twice, anywhere, gives files that differ in nothing but inode number and ctime.
Sockets are no seeds: no archive holds them, so no image of a tree does; behaviours make their own.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Every seed's atime and mtime unless it says otherwise: in the past, with all nine digits of the nanoseconds in use.
SEED_TIME = 1_600_000_000_123_456_789


@dataclass(frozen=True, slots=True)
class File:
    """A regular file: ``data``, then ``pieces`` of (offset, bytes) with holes between; ``size`` bytes when given."""

    path: str
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = SEED_TIME
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    pieces: tuple[tuple[int, bytes], ...] = ()
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Dir:
    """A directory. Directories that are only mentioned in other seeds' paths are made with mode 0755, owner root."""

    path: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = SEED_TIME
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Symlink:
    """A symbolic link whose text is ``text``."""

    path: str
    text: str
    uid: int = 0
    gid: int = 0
    mtime_ns: int = SEED_TIME
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HardLink:
    """One more name, ``path``, of the earlier seed ``to``."""

    path: str
    to: str


@dataclass(frozen=True, slots=True)
class Fifo:
    """A named pipe."""

    path: str
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = SEED_TIME


@dataclass(frozen=True, slots=True)
class CharDev:
    """A character device."""

    path: str
    major: int
    minor: int
    mode: int = 0o666
    uid: int = 0
    gid: int = 0
    mtime_ns: int = SEED_TIME


@dataclass(frozen=True, slots=True)
class BlockDev:
    """A block device."""

    path: str
    major: int
    minor: int
    mode: int = 0o660
    uid: int = 0
    gid: int = 0
    mtime_ns: int = SEED_TIME


Seed = File | Dir | Symlink | HardLink | Fifo | CharDev | BlockDev


def plant(seeds: Iterable[Seed], directory: Path) -> None:
    """Make ``directory`` (mode 0755) with ``seeds`` in it, in their order.

    ``directory`` may exist, but be empty. Must run as root. Raises OSError as the system calls do.
    """
    old = os.umask(0)
    try:
        directory.mkdir(mode=0o755, exist_ok=True)
        folders: dict[Path, Dir] = {directory: Dir(".")}
        for seed in seeds:
            path = directory / seed.path
            _make_parents(path.parent, directory, folders)
            _make(seed, path, directory)
            if isinstance(seed, Dir):
                folders[path] = seed
        # Last and innermost first, because making entries changes a directory's times.
        for path in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
            _dress(folders[path], path)
    finally:
        os.umask(old)


def _make_parents(path: Path, top: Path, folders: dict[Path, Dir]) -> None:
    if path == top or path in folders:
        return
    _make_parents(path.parent, top, folders)
    os.mkdir(path, 0o755)
    folders[path] = Dir(str(path.relative_to(top)))


def _make(seed: Seed, path: Path, top: Path) -> None:
    match seed:
        case Dir():
            os.mkdir(path, 0o755)
            return
        case HardLink():
            os.link(top / seed.to, path, follow_symlinks=False)
            return
        case File():
            _write(seed, path)
        case Symlink():
            os.symlink(seed.text, path)
        case Fifo():
            os.mkfifo(path)
        case CharDev():
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(seed.major, seed.minor))
        case BlockDev():
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(seed.major, seed.minor))
    _dress(seed, path)


def _write(seed: File, path: Path) -> None:
    with open(path, "xb", buffering=0) as file:
        for offset, data in ((0, seed.data), *seed.pieces):
            view = memoryview(data)
            while view:
                count = os.pwrite(file.fileno(), view, offset)
                view, offset = view[count:], offset + count
        if seed.size is not None:
            file.truncate(seed.size)


def _dress(seed: File | Dir | Symlink | Fifo | CharDev | BlockDev, path: Path) -> None:
    # The order matters: chown drops setuid bits and capabilities, and an ACL's mask replaces the group's bits.
    os.chown(path, seed.uid, seed.gid, follow_symlinks=False)
    if not isinstance(seed, Symlink):
        os.chmod(path, seed.mode)
    if isinstance(seed, File | Dir | Symlink):
        for name, value in seed.xattrs.items():
            os.setxattr(path, name, value, follow_symlinks=False)
    os.utime(path, ns=(seed.mtime_ns, seed.mtime_ns), follow_symlinks=False)
