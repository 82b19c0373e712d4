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

from vzfs import linux
from vzfs.errors import BusyError, NotFoundError, UnsupportedError
from vzfs.store.layout import LOCK
from vzfs.store.ownfile import open_own

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

        Raises ``UnsupportedError`` where nothing can be written: the lock must say who holds it; ``DamagedError`` when
        it is no file; ``NotFoundError``, ``BusyError`` when the container was removed or replaced meanwhile.
        """
        fd = _open(container)
        for _ in range(PROBE_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                other = read_holder(container)
                if other is not None:
                    break
                time.sleep(0.01)  # somebody was only asking who holds it
            else:
                _refuse_other_file(container, fd)
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
        linux.reserve(self._fd, ROOM)
        os.close(self._fd)


def _open(container: Path) -> int:
    try:
        return open_own(container / LOCK, os.O_RDWR | os.O_CREAT)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no container at {container}", remedy="vzfs list shows all") from error
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        raise UnsupportedError(
            f"{container} lies on a read-only file system, and its lock can't be taken",
            remedy="make that file system writable, or copy the container to one that is",
        ) from error


def _refuse_other_file(container: Path, fd: int) -> None:
    """Close ``fd`` and raise unless it still is the container's lock: that of a removed one locks nothing, and whoever
    takes it for the lock works on whatever has been put there since."""
    try:
        now = os.lstat(container / LOCK)
    except OSError as error:
        os.close(fd)
        raise NotFoundError(
            f"the container at {container} was removed meanwhile", remedy="vzfs list shows all"
        ) from error
    if not os.path.samestat(now, os.fstat(fd)):
        os.close(fd)
        raise BusyError(f"the container at {container} was replaced by another meanwhile", remedy="try again")


def make_lock(container: Path) -> None:
    """Make the lock of a new container, held by nobody."""
    fd = os.open(container / LOCK, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        linux.reserve(fd, ROOM)
    finally:
        os.close(fd)


def _busy(container: Path, holder: Holder | None) -> str:
    if holder is None:
        return f"container {container} is in use"
    where = f" at {holder.mountpoint}" if holder.mountpoint else ""
    return f"container {container} is in use: process {holder.pid} {holder.doing} it{where}"


def read_holder(container: Path) -> Holder | None:
    """Who holds the container's lock now, or ``None``. Raises ``DamagedError`` when it is no file."""
    try:
        fd = open_own(container / LOCK, os.O_RDONLY)
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
    """Who holds the container's lock, or held it when it died without releasing it; ``None`` if nobody did.

    Raises ``DamagedError`` when it is no file.
    """
    try:
        fd = open_own(container / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _told(fd)
    finally:
        os.close(fd)


def _told(fd: int) -> Holder | None:
    """The holder that the lock's text names, if it is one."""
    # The first line only: behind a shorter one that was just written lies the rest of a longer one.
    return _parse(os.pread(fd, ROOM, 0).partition(b"\n")[0])


def _parse(line: bytes) -> Holder | None:
    """The holder that a lock's text tells of; ``None`` for a text that says nothing of the kind."""
    try:
        told = json.loads(line)
        holder = Holder(**told)
    except (ValueError, TypeError, RecursionError):
        return None
    texts = (holder.mountpoint, holder.engine, holder.device)
    sound = (
        isinstance(holder.doing, str)
        and isinstance(holder.since, int | float)
        and isinstance(holder.read_only, bool)
        and all(isinstance(text, str | None) for text in texts)
        and all(type(number) is int and number >= 0 for number in (holder.pid, holder.state or 0, holder.lock or 0))
    )
    return holder if sound else None
