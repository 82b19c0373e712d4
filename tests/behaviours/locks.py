"""flock and fcntl locks between processes and descriptors."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from .base import behaviour
from .place import Place, append, attempt, expect_errno, get, opened, tick
from .seeds import Dir, File

SEED = File("a/f", b"0123456789")
NB = fcntl.LOCK_NB

# struct flock for x86-64 and aarch64: l_type, l_whence, l_start, l_len, l_pid
FLOCK = struct.Struct("hhqqi4x")


def try_flock(path: str, how: int) -> bool:
    with opened(path, os.O_RDWR) as fd:
        try:
            fcntl.flock(fd, how | NB)
        except BlockingIOError:
            return False
        return True


def try_fcntl(path: str, how: int, length: int = 0, start: int = 0) -> bool:
    with opened(path, os.O_RDWR) as fd:
        try:
            fcntl.lockf(fd, how | NB, length, start)
        except (BlockingIOError, PermissionError):
            return False
        return True


def _lockable(d: Place) -> int:
    """Flags to open a file with that shall be locked: where a reader keeps what it opened, so does its lock."""
    return os.O_RDONLY if d.has("coherent-readers") else os.O_RDWR


@behaviour(needs={"coherent-readers"}, seeds=[SEED])
def flock_excludes_other_processes(d: Place) -> None:
    with opened(d / "a/f", _lockable(d)) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert not d.in_child(try_flock, "a/f", fcntl.LOCK_EX)
        assert not d.in_child(try_flock, "a/f", fcntl.LOCK_SH)
        fcntl.flock(fd, fcntl.LOCK_UN)
        assert d.in_child(try_flock, "a/f", fcntl.LOCK_EX)


@behaviour(needs={"coherent-readers"}, seeds=[SEED])
def flock_shared_admits_shared(d: Place) -> None:
    with opened(d / "a/f", _lockable(d)) as fd:
        fcntl.flock(fd, fcntl.LOCK_SH)
        assert d.in_child(try_flock, "a/f", fcntl.LOCK_SH)
        assert not d.in_child(try_flock, "a/f", fcntl.LOCK_EX)


@behaviour(seeds=[SEED])
def flock_belongs_to_the_open_file(d: Place) -> None:
    with opened(d / "a/f") as one, opened(d / "a/f") as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        expect_errno(errno.EAGAIN, fcntl.flock, two, fcntl.LOCK_EX | NB)
        copy = os.dup(one)
        fcntl.flock(copy, fcntl.LOCK_UN)
        fcntl.flock(two, fcntl.LOCK_EX | NB)
        os.close(copy)


@behaviour(seeds=[SEED])
def flock_ends_with_close(d: Place) -> None:
    with opened(d / "a/f") as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
    assert d.in_child(try_flock, "a/f", fcntl.LOCK_EX)


@behaviour(seeds=[SEED])
def flock_waits(d: Place) -> None:
    def work() -> bytes:
        with opened("a/f", os.O_RDWR) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)
            return os.pread(fd, 100, 0)

    with opened(d / "a/f", os.O_RDWR) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        child = d.start(work)
        tick()
        os.pwrite(fd, b"first", 0)
        fcntl.flock(fd, fcntl.LOCK_UN)
        assert child.result() == b"first56789"


@behaviour(seeds=[Dir("a/d")])
def flock_of_directory(d: Place) -> None:
    def work() -> bool:
        with opened("a/d", os.O_DIRECTORY) as fd:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | NB)
            except BlockingIOError:
                return False
            return True

    with opened(d / "a/d", os.O_DIRECTORY) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert not d.in_child(work)
    assert d.in_child(work)


@behaviour(seeds=[SEED])
def flock_survives_the_first_write(d: Place) -> None:
    # The lock was taken while nothing had been written: it must hold for those who come after the write, too.
    with opened(d / "a/f", os.O_RDWR) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.pwrite(fd, b"X", 0)
        assert not d.in_child(try_flock, "a/f", fcntl.LOCK_EX)


@behaviour(needs={"coherent-readers"}, seeds=[SEED])
def flock_survives_rename_and_chmod(d: Place) -> None:
    with opened(d / "a/f", _lockable(d)) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.chmod(d / "a/f", 0o600)
        os.rename(d / "a/f", d / "g")
        assert not d.in_child(try_flock, "g", fcntl.LOCK_EX)


@behaviour(seeds=[SEED])
def fcntl_lock_excludes_other_processes(d: Place) -> None:
    with opened(d / "a/f", os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        assert not d.in_child(try_fcntl, "a/f", fcntl.LOCK_EX)
        assert not d.in_child(try_fcntl, "a/f", fcntl.LOCK_SH)
        fcntl.lockf(fd, fcntl.LOCK_UN)
        assert d.in_child(try_fcntl, "a/f", fcntl.LOCK_EX)


@behaviour(seeds=[SEED])
def fcntl_locks_cover_ranges(d: Place) -> None:
    with opened(d / "a/f", os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 4, 2)
        assert d.in_child(try_fcntl, "a/f", fcntl.LOCK_EX, 2, 0)
        assert not d.in_child(try_fcntl, "a/f", fcntl.LOCK_EX, 3, 0)
        assert not d.in_child(try_fcntl, "a/f", fcntl.LOCK_EX, 1, 5)
        assert d.in_child(try_fcntl, "a/f", fcntl.LOCK_EX, 100, 6)
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, 3)
        assert d.in_child(try_fcntl, "a/f", fcntl.LOCK_EX, 1, 3)


@behaviour(seeds=[SEED])
def fcntl_lock_names_its_holder(d: Place) -> None:
    def work() -> tuple[int, int, int, int]:
        with opened("a/f", os.O_RDWR) as fd:
            asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, start, length, pid = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
            return kind, start, length, pid

    with opened(d / "a/f", os.O_RDWR) as fd:
        assert d.in_child(work)[0] == fcntl.F_UNLCK
        fcntl.lockf(fd, fcntl.LOCK_EX, 4, 2)
        assert d.in_child(work) == (fcntl.F_WRLCK, 2, 4, os.getpid())


@behaviour(seeds=[SEED])
def fcntl_lock_ends_with_any_close(d: Place) -> None:
    with opened(d / "a/f", os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        with opened(d / "a/f"):
            pass
        assert d.in_child(try_fcntl, "a/f", fcntl.LOCK_EX)


@behaviour(seeds=[SEED])
def fcntl_lock_needs_matching_descriptor(d: Place) -> None:
    with opened(d / "a/f") as fd:
        expect_errno(errno.EBADF, fcntl.lockf, fd, fcntl.LOCK_EX)
        fcntl.lockf(fd, fcntl.LOCK_SH)


@behaviour(seeds=[SEED])
def fcntl_lock_waits(d: Place) -> None:
    def work() -> None:
        with opened("a/f", os.O_RDWR) as fd:
            fcntl.lockf(fd, fcntl.LOCK_EX)
            os.pwrite(fd, b"second", 0)

    with opened(d / "a/f", os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        child = d.start(work)
        tick()
        assert os.pread(fd, 3, 0) == b"012"
        fcntl.lockf(fd, fcntl.LOCK_UN)
        child.result()
        assert os.pread(fd, 6, 0) == b"second"


@behaviour(seeds=[SEED])
def fcntl_deadlock_is_edeadlk(d: Place) -> None:
    def deadlocked(fd: int, start: int) -> bool:
        # Who of the two comes last is refused; the other waits until the refused one lets go.
        granted = attempt(errno.EDEADLK, fcntl.lockf, fd, fcntl.LOCK_EX, 1, start)
        fcntl.lockf(fd, fcntl.LOCK_UN)
        return not granted

    def work(ready: int) -> bool:
        with opened("a/f", os.O_RDWR) as fd:
            fcntl.lockf(fd, fcntl.LOCK_EX, 1, 1)
            os.write(ready, b"!")
            return deadlocked(fd, 0)

    reader, writer = os.pipe()
    with opened(d / "a/f", os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0)
        child = d.start(work, writer)
        os.read(reader, 1)
        mine = deadlocked(fd, 1)
        theirs = child.result()
    os.close(reader)
    os.close(writer)
    assert sorted([mine, theirs]) == [False, True]


@behaviour(seeds=[SEED])
def open_file_description_locks(d: Place) -> None:
    lock = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    set_lock = 37  # F_OFD_SETLK, fcntl-linux.h; in Python's fcntl since 3.9 only on some builds
    with opened(d / "a/f", os.O_RDWR) as one, opened(d / "a/f", os.O_RDWR) as two:
        fcntl.fcntl(one, set_lock, lock)
        expect_errno(errno.EAGAIN, fcntl.fcntl, two, set_lock, lock)
        with opened(d / "a/f"):
            pass
        expect_errno(errno.EAGAIN, fcntl.fcntl, two, set_lock, lock)
    with opened(d / "a/f", os.O_RDWR) as two:
        fcntl.fcntl(two, set_lock, lock)


@behaviour(seeds=[SEED])
def locks_end_with_the_process(d: Place) -> None:
    def work() -> None:
        fd = os.open("a/f", os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.lockf(fd, fcntl.LOCK_EX)

    d.in_child(work)
    assert d.in_child(try_flock, "a/f", fcntl.LOCK_EX)
    assert d.in_child(try_fcntl, "a/f", fcntl.LOCK_EX)


@behaviour(seeds=[File("counter", b"0")])
def locks_keep_a_counter_right(d: Place) -> None:
    def work() -> None:
        for _ in range(50):
            with opened("counter", os.O_RDWR) as fd:
                fcntl.flock(fd, fcntl.LOCK_EX)
                value = int(os.pread(fd, 20, 0)) + 1
                os.pwrite(fd, b"%d" % value, 0)

    children = [d.start(work) for _ in range(4)]
    for child in children:
        child.result()
    assert get(d / "counter") == b"200"


@behaviour(seeds=[SEED])
def locks_do_not_stop_writers(d: Place) -> None:
    with opened(d / "a/f") as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        d.in_child(append, "a/f", b"+")
    assert get(d / "a/f") == b"0123456789+"
