"""What a behaviour works with: its directory, other processes and users, and the suite's small vocabulary.

Rule: helpers add no judgement of their own; what is right is written in the behaviour.
"""

from __future__ import annotations

import errno
import os
import pickle
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Users and groups that own nothing on the machine. No passwd entry is needed.
ALICE, BOB = 20_001, 20_002
ALICES, BOBS, STAFF = 20_001, 20_002, 20_050

# A child that takes longer than this is killed by its alarm, and its parent reports it.
CHILD_LIMIT = 300

# More than a timer tick of any kernel (10 ms at 100 Hz): file times are taken from the tick.
TICK = 0.012
CLOCK_REALTIME_COARSE = 5  # <linux/time.h>: the clock of file times; Python has no name for it


class ChildDiedError(Exception):
    """A child process ended without giving an answer; the text names its wait status."""


@dataclass(frozen=True, slots=True)
class Child:
    """A running child process and the pipe that will carry its answer."""

    pid: int
    pipe: int

    def result(self) -> Any:
        """Wait for the child's answer: what its function returned, or the exception that it raised, raised here."""
        with os.fdopen(self.pipe, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        if not answer:
            raise ChildDiedError(f"child ended with wait status {status:#x}")
        good, value = pickle.loads(answer)
        if good:
            return value
        raise value


@dataclass(frozen=True, slots=True)
class Place:
    """One behaviour's directory, where its seeds exist already, and what the file system is said to have."""

    path: Path
    features: frozenset[str]
    needs: frozenset[str] = frozenset()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def has(self, feature: str) -> bool:
        """Whether the file system has ``feature``, which the behaviour must have declared in ``needs``."""
        if feature not in self.needs:
            raise ValueError(f"declare needs={{{feature!r}}}")
        return feature in self.features

    def start(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Child:
        """Start ``fn`` in a child process, as root, in this directory."""
        return _fork(self.path, None, lambda: fn(*args, **kwargs))

    def in_child(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``fn``'s result from a child process, as root, in this directory."""
        return self.start(fn, *args, **kwargs).result()  # type: ignore[no-any-return]

    def as_user(
        self, uid: int, gid: int, groups: list[int], fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """``fn``'s result from a child process of that user without capabilities.

        The child enters this directory while still root, since the directories above may be closed to others, so
        ``fn`` must use relative paths. What it raises is raised here.
        """
        child = _fork(self.path, (uid, gid, groups), lambda: fn(*args, **kwargs))
        return child.result()  # type: ignore[no-any-return]

    def alice(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``fn``'s result as ALICE, in her own group only."""
        return self.as_user(ALICE, ALICES, [], fn, *args, **kwargs)

    def bob(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``fn``'s result as BOB, in his own group only."""
        return self.as_user(BOB, BOBS, [], fn, *args, **kwargs)


def _fork(directory: Path, user: tuple[int, int, list[int]] | None, work: Callable[[], Any]) -> Child:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return Child(pid, reader)
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, CHILD_LIMIT)
        os.close(reader)
        os.chdir(directory)
        if user:
            uid, gid, groups = user
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        os.umask(0o022)
        try:
            answer = pickle.dumps((True, work()))
        except BaseException as error:
            answer = pickle.dumps((False, _portable(error)))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
    finally:
        os._exit(0)  # whatever happens, the test runner's own code must not go on in the child


def _portable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return AssertionError(f"{type(error).__name__}: {error}")
    return error


def expect_errno(number: int, fn: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> None:
    """Assert that ``fn`` fails with exactly this errno."""
    wanted = errno.errorcode[number]
    try:
        result = fn(*args, **kwargs)
    except OSError as error:
        if error.errno == number:
            return
        got = errno.errorcode.get(error.errno or 0, str(error.errno))
        raise AssertionError(f"expected {wanted}, got {got}: {error}") from error
    raise AssertionError(f"expected {wanted}, got success: {result!r}")


def attempt(allowed: int, fn: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> bool:
    """Whether ``fn`` succeeded; False when it failed with the errno ``allowed``. Any other OSError goes on."""
    try:
        fn(*args, **kwargs)
    except OSError as error:
        if error.errno != allowed:
            raise
        return False
    return True


def open_close(path: str | Path, flags: int, mode: int = 0o644) -> None:
    """Open and close again: for asking whether an open is allowed."""
    os.close(os.open(path, flags, mode))


@contextmanager
def opened(path: str | Path, flags: int = os.O_RDONLY, mode: int = 0o644, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor for the length of a ``with`` block."""
    fd = os.open(path, flags, mode, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def put(path: str | Path, data: bytes) -> None:
    """Write a file anew: O_CREAT, O_TRUNC."""
    with open(path, "wb", buffering=0) as file:
        count = file.write(data)
    assert count == len(data), f"short write: {count} of {len(data)}"


def append(path: str | Path, data: bytes) -> None:
    """Append to a file that exists."""
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        count = os.write(fd, data)
    assert count == len(data), f"short write: {count} of {len(data)}"


def patch(path: str | Path, offset: int, data: bytes) -> None:
    """Overwrite a part of a file that exists."""
    with opened(path, os.O_WRONLY) as fd:
        count = os.pwrite(fd, data, offset)
    assert count == len(data), f"short write: {count} of {len(data)}"


def get(path: str | Path) -> bytes:
    """A file's whole content."""
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def mode_of(path: str | Path) -> int:
    """The twelve permission bits, of the link itself where it is one."""
    return stat.S_IMODE(os.lstat(path).st_mode)


def names(path: str | Path) -> list[str]:
    """A directory's entries, sorted."""
    return sorted(os.listdir(path))


def tick() -> None:
    """Wait until the clock of file times has moved: a busy virtual machine may miss ticks."""
    start = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
    time.sleep(TICK)
    while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) <= start:
        time.sleep(TICK)
