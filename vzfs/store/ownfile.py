"""The store's own files in a container (``lock``, ``conf``, ``vzfs.log``), opened without trusting what lies there.

Rule: a container directory may come from anywhere, so anything may have the name of such a file. The one place that
opens them: nothing but a regular file is ever opened, through no symbolic link of that name, and never more of it is
read than it can hold. What is no regular file is looked at with ``O_PATH`` only, which neither waits for the other end
of a FIFO nor starts a device.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vzfs import linux
from vzfs.errors import DamagedError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFREG: "a file",
}
_TRIES = 10
"""Attempts to open a file that is made and removed at the same time."""


def kind_of(mode: int) -> str:
    """What an inode with the ``st_mode`` is, for people, with its article."""
    return _KINDS.get(stat.S_IFMT(mode), "something unknown")


def open_own(path: Path, flags: int, *, mode: int = 0o600) -> int:
    """A descriptor of the regular file ``path``, made with ``mode`` if ``flags`` have ``O_CREAT`` and it isn't there.

    Raises ``DamagedError`` for whatever else has that name, ``FileNotFoundError`` and other ``OSError``.
    """
    name = os.fspath(path)
    for _ in range(_TRIES):
        try:
            seen = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
            try:
                return os.open(name, flags | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
            except FileExistsError:
                continue
        try:
            _refuse_other_kinds(path, os.fstat(seen).st_mode)
            return os.open(linux.fd_path(seen), flags & ~os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            error.filename = name  # not that of the descriptor
            raise
        finally:
            os.close(seen)
    raise damaged(path, "comes and goes")


def read_own(path: Path, limit: int) -> bytes:
    """What is in the regular file ``path``. Raises ``DamagedError`` for more than ``limit`` bytes, and as above."""
    fd = open_own(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise damaged(path, f"has {size} bytes, more than the {limit} that it can have")
        return os.read(fd, size)  # if it grows meanwhile, as it was
    finally:
        os.close(fd)


def damaged(path: Path, what: str) -> DamagedError:
    """The error for a file of the store's own, at ``path`` in a container, that ``what`` is said of."""
    return DamagedError(
        f"container {path.parent} is damaged: its {path.name} {what}",
        remedy=f"move {path} away and bring the right one back, or destroy the container",
    )


def _refuse_other_kinds(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise damaged(path, f"is {kind_of(mode)}, not a file")
