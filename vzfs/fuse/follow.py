"""Co-location: the serving thread runs on its client's CPU.

Waking a sleeping thread on another CPU costs several times what the request itself costs, on virtual machines above
all; on the client's own CPU it is a plain switch, and the client waits meanwhile anyway. Rule: while one client
dominates, follow it; with several at once, let the scheduler decide.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque

EVERY = 64
"""Requests between two looks at who asks: the look costs 10 µs."""
SAMPLES = 3
"""How many looks in a row must find the same client, or clients on the same CPU: programs started one by one."""
_PROCESSOR = 39 - 3
"""Position of ``processor`` in /proc/PID/stat after the name in parentheses (proc(5) numbers it 39)."""


class Follower:
    """Places the calling thread; to be used by that thread only."""

    def __init__(self) -> None:
        self._anywhere = os.sched_getaffinity(0)
        self._seen: deque[tuple[int, int]] = deque(maxlen=SAMPLES)
        self._cpu = -1
        self.moves = 0

    def look(self, client: int) -> None:
        """Take note that thread ``client`` asked, and move if nobody else did, or nobody elsewhere."""
        cpu = self._processor(client)
        self._seen.append((client, cpu))
        alone = len(self._seen) == SAMPLES and all(one == client or on == cpu for one, on in self._seen)
        wanted = cpu if alone and cpu in self._anywhere else -1
        if wanted == self._cpu:
            return
        with contextlib.suppress(OSError):  # a CPU taken away from us: stay
            os.sched_setaffinity(0, {wanted} if wanted >= 0 else self._anywhere)
            self._cpu = wanted
            self.moves += 1

    def leave(self) -> None:
        """Let the calling thread, which inherited the place, run anywhere."""
        os.sched_setaffinity(0, self._anywhere)

    @staticmethod
    def _processor(client: int) -> int:
        """On which CPU the client runs, or -1 if that can't be seen (it ended, or is in another PID namespace)."""
        try:
            fd = os.open(f"/proc/{client}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return -1
        try:
            return int(os.read(fd, 1024).rpartition(b")")[2].split()[_PROCESSOR])
        except (OSError, IndexError, ValueError):
            return -1
        finally:
            os.close(fd)
