"""A container's ``lock``: held while it is mounted or changed from outside, by whichever path it was reached.

Rule: the kernel's flock on the file is what counts, so a dead holder never blocks; the file's text only says who holds
it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from vzfs.errors import BusyError, UnsupportedError
from vzfs.store import sys
from vzfs.store.layout import LOCK

ROOM = 4096
"""Bytes of disk that an unheld, empty lock keeps: who is to make room on a full disk must be able to mount."""
PROBE_TRIES = 10
"""Attempts at a lock that seems held by nobody: ``read_holder`` takes it for an instant."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock: a process, what it does, and what it serves; ``since`` in seconds since 1970.

    ``device`` is the served file system's ``major:minor``; ``state`` the process's descriptor of what it counts
    (``vzfs.fuse.state``), ``lock`` that of the lock itself: who holds a copy of it keeps the lock held.
    """

    pid: int
    doing: str
    since: float
    mountpoint: str | None = None
    engine: str | None = None
    read_only: bool = False
    device: str | None = None
    state: int | None = None
    lock: int | None = None


class Lock:
    """An acquired lock; released by ``release`` or by the end of the process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @staticmethod
    def acquire(container: Path, holder: Holder) -> Lock:
        """Take the lock of the container at ``container`` or raise ``BusyError`` naming its holder.

        Raises ``UnsupportedError`` where nothing can be written: the lock must say who holds it.
        """
        try:
            fd = os.open(container / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            raise UnsupportedError(
                f"{container} lies on a read-only file system, and its lock can't be taken",
                remedy="make that file system writable, or copy the container to one that is",
            ) from error
        for _ in range(PROBE_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                other = read_holder(container)
                if other is not None:
                    break
                time.sleep(0.01)  # somebody was only asking who holds it
            else:
                lock = Lock(fd)
                lock.describe(holder)
                return lock
        os.close(fd)
        raise BusyError(_busy(container, other), remedy="umount it or wait until that process is done")

    def describe(self, holder: Holder) -> None:
        """Write into the file who holds it."""
        data = json.dumps(asdict(holder)).encode() + b"\n"
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))

    def fileno(self) -> int:
        """The locked file's descriptor."""
        return self._fd

    def release(self) -> None:
        """Empty the file and give the lock up."""
        os.ftruncate(self._fd, 0)
        sys.reserve(self._fd, ROOM)
        os.close(self._fd)


def make_lock(container: Path) -> None:
    """Make the lock of a new container, held by nobody."""
    fd = os.open(container / LOCK, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        sys.reserve(fd, ROOM)
    finally:
        os.close(fd)


def _busy(container: Path, holder: Holder | None) -> str:
    if holder is None:
        return f"container {container} is in use"
    where = f" at {holder.mountpoint}" if holder.mountpoint else ""
    return f"container {container} is in use: process {holder.pid} {holder.doing} it{where}"


def read_holder(container: Path) -> Holder | None:
    """Who holds the container's lock now, or ``None``."""
    try:
        fd = os.open(container / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        return _told(fd) or Holder(0, "holds", 0.0)
    finally:
        os.close(fd)


def last_holder(container: Path) -> Holder | None:
    """Who holds the container's lock, or held it when it died without releasing it; ``None`` if nobody did."""
    try:
        fd = os.open(container / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return _told(fd)
    finally:
        os.close(fd)


def _told(fd: int) -> Holder | None:
    """The holder that the lock's text names, if it is one."""
    with contextlib.suppress(ValueError, TypeError):
        # The first line only: behind a shorter one that was just written lies the rest of a longer one.
        return Holder(**json.loads(os.pread(fd, 65536, 0).partition(b"\n")[0]))
    return None
