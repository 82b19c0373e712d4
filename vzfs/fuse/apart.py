"""Questions to the kernel that may never be answered, each asked by a process of its own.

Whoever waits for a FUSE server that hangs can't be interrupted once the server has taken the request
(request_wait_answer in fs/fuse/dev.c), and a thread that waits so keeps its whole process from ending.

Rule: the asker waits as long as it said and no longer. The process that hangs is a grandchild, so that nobody has to
wait for its end, and holds nothing of its starter: no descriptor, so no pipe either that somebody reads to its end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
import warnings
from collections.abc import Callable, Sequence

_AT_ONCE = 64
"""Processes at a time: enough for answers to overlap, few enough for any machine."""


def apart(works: Sequence[Callable[[], bytes]], patience_s: float) -> list[bytes | None]:
    """What each of ``works`` gives, all done at once; ``None`` for one that failed or took more than ``patience_s``.

    They do system calls only: they run in forked processes, and this one may have threads that hold locks.
    """
    answers: list[bytes | None] = []
    for start in range(0, len(works), _AT_ONCE):
        running = [_start(work) for work in works[start : start + _AT_ONCE]]
        end = time.monotonic() + patience_s
        for child, _ in running:  # it ends as soon as it has started the grandchild
            os.waitpid(child, 0)
        answers += [_collect(fd, end) for _, fd in running]
    return answers


def _start(work: Callable[[], bytes]) -> tuple[int, int]:
    """Do it in a grandchild; gives the child, and the descriptor from which to read the grandchild's number, a line,
    and then its answer.
    """
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, from Python 3.12 on: see above
        child = os.fork()
    if not child:
        _be_child(work, write_end)
    os.close(write_end)
    return child, read_end


def _be_child(work: Callable[[], bytes], fd: int) -> None:
    try:
        if not os.fork():
            os.closerange(0, fd)
            os.closerange(fd + 1, 1 << 30)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.write(fd, b"%d\n" % os.getpid())
            answer = work()
            while answer:
                answer = answer[os.write(fd, answer) :]
    finally:
        os._exit(0)


def _collect(fd: int, end: float) -> bytes | None:
    data = b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    try:
        while poll.poll(max(0.0, end - time.monotonic()) * 1000):
            chunk = os.read(fd, 65536)
            if not chunk:
                return data.partition(b"\n")[2] or None
            data += chunk
    finally:
        os.close(fd)
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(data.partition(b"\n")[0]), signal.SIGKILL)  # it heeds that if its request wasn't taken yet
    return None
