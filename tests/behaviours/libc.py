"""System calls that Python's os module lacks, each raising OSError as os would.

Rule: arguments as in the man page; nothing else in the suite uses ctypes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # linux/fs.h
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2  # bits/stat.h
AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH = 0x100, 0x1000  # bits/fcntl-linux.h
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x8008_6601, 0x4008_6602  # linux/fs.h, 64-bit
DT_FIFO, DT_CHR, DT_DIR, DT_BLK, DT_REG, DT_LNK, DT_SOCK = 1, 2, 4, 6, 8, 10, 12  # dirent.h


def _check(result: int, *paths: object) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *(str(path) for path in paths[:1]))
    return result


def renameat2(old: str | Path, new: str | Path, flags: int) -> None:
    """rename with RENAME_NOREPLACE or RENAME_EXCHANGE."""
    _check(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)), old)


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


def utimensat(path: str | Path, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0) -> None:
    """Set times given as (seconds, nanoseconds), where the nanoseconds may be UTIME_NOW or UTIME_OMIT."""
    pair = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    _check(_libc.utimensat(AT_FDCWD, os.fsencode(path), pair, flags), path)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate, not the C library's emulation."""
    _check(_libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def syncfs(fd: int) -> None:
    """Flush the file system that ``fd`` lies on."""
    _check(_libc.syncfs(fd))


def link_descriptor(fd: int, path: str | Path) -> None:
    """Give an open file a (new) name; needs CAP_DAC_READ_SEARCH."""
    _check(_libc.linkat(fd, b"", AT_FDCWD, os.fsencode(path), AT_EMPTY_PATH), path)


class _Dirent(ctypes.Structure):
    _fields_ = [
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    ]


_libc.opendir.restype = ctypes.c_void_p
_libc.opendir.argtypes = [ctypes.c_char_p]
_libc.closedir.argtypes = [ctypes.c_void_p]
_libc.readdir.restype = ctypes.POINTER(_Dirent)
_libc.readdir.argtypes = [ctypes.c_void_p]
_libc.rewinddir.argtypes = [ctypes.c_void_p]
_libc.rewinddir.restype = None
_libc.telldir.restype = ctypes.c_long
_libc.telldir.argtypes = [ctypes.c_void_p]
_libc.seekdir.restype = None
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


@dataclass(frozen=True, slots=True)
class Entry:
    """What readdir says of one entry."""

    name: bytes
    ino: int
    type: int


@dataclass(frozen=True, slots=True)
class Stream:
    """An open directory stream, '.' and '..' included."""

    handle: int

    def read(self) -> Entry | None:
        """The next entry, or None at the end."""
        ctypes.set_errno(0)
        found = _libc.readdir(self.handle)
        if found:
            entry = found.contents
            return Entry(entry.d_name, entry.d_ino, entry.d_type)
        if ctypes.get_errno():
            _check(-1)
        return None

    def rest(self) -> list[Entry]:
        """All entries from here to the end."""
        return list(iter(self.read, None))

    def tell(self) -> int:
        """The position, for :meth:`seek`."""
        return int(_libc.telldir(self.handle))

    def seek(self, position: int) -> None:
        """Go to a position that :meth:`tell` gave."""
        _libc.seekdir(self.handle, position)

    def rewind(self) -> None:
        """Go to the start and see the directory as it is now."""
        _libc.rewinddir(self.handle)


@contextmanager
def directory_stream(path: str | Path) -> Iterator[Stream]:
    """opendir, and closedir at the end."""
    handle = _libc.opendir(os.fsencode(path))
    if not handle:
        _check(-1, path)
    try:
        yield Stream(handle)
    finally:
        _libc.closedir(handle)
