"""Where the serving thread runs and how it waits, by where its client runs.

Waking a sleeping thread on another CPU costs several times what a request itself costs, on virtual machines above all;
on the client's own CPU it is a plain switch, and the client waits meanwhile anyway. Rules:
- While one client dominates, the thread follows it to its CPU: *together*.
- Where the scheduler takes the client away to an idle CPU again and again, following is in vain; then the thread lets
  itself be placed and, after a request, looks for the next one for a moment before it sleeps: *apart*.
- With several clients on several CPUs it does neither: *free*.
"""

from __future__ import annotations

import contextlib
import enum
import os
import threading
from collections import deque

EVERY = 64
"""Requests between two looks at who asks: a look costs 10 to 20 µs."""
SAMPLES = 3
"""How many looks in a row must find the same client, or clients on the same CPU: programs started one by one."""
IN_VAIN = 3
"""How many times in a row the client must have left the CPU that the thread followed it to."""
_PROCESSOR = 39 - 3
"""Position of ``processor`` in /proc/PID/stat after the name in parentheses (proc(5) numbers it 39)."""


class Mode(enum.Enum):
    """How the serving thread lives with its clients."""

    FREE = "free"
    TOGETHER = "together"
    APART = "apart"


class Follower:
    """Places the calling thread; to be used by that thread only."""

    def __init__(self) -> None:
        self._anywhere = os.sched_getaffinity(0)
        self._seen: deque[tuple[int, int]] = deque(maxlen=SAMPLES)
        self._cpu = -1
        self._lost = 0
        self.mode = Mode.FREE
        self.moves = 0

    def look(self, client: int) -> Mode:
        """Take note that thread ``client`` asked, and give how to go on."""
        cpu = self._processor(client)
        self._seen.append((client, cpu))
        alone = len(self._seen) == SAMPLES and all(one == client or on == cpu for one, on in self._seen)
        if not alone or cpu not in self._anywhere or len(self._anywhere) < 2:
            self._go(Mode.FREE)
        elif self.mode is Mode.APART:
            self._lost = max(0, self._lost - (cpu == self._processor(threading.get_native_id())))
            if not self._lost:  # the scheduler has put both on one CPU: the others have work now
                self._go(Mode.TOGETHER, cpu)
        elif self.mode is Mode.TOGETHER and cpu != self._cpu:
            self._lost += 1
            if self._lost < IN_VAIN:
                self._go(Mode.TOGETHER, cpu)
            else:
                self._go(Mode.APART)
        else:
            self._lost = 0
            self._go(Mode.TOGETHER, cpu)
        return self.mode

    def _go(self, mode: Mode, cpu: int = -1) -> None:
        self.mode = mode
        if mode is Mode.FREE:
            self._lost = 0
        if cpu == self._cpu:
            return
        with contextlib.suppress(OSError):  # a CPU taken away from us: stay
            os.sched_setaffinity(0, {cpu} if cpu >= 0 else self._anywhere)
            self._cpu = cpu
            self.moves += 1

    def leave(self) -> None:
        """Let the calling thread, which inherited the place, run anywhere."""
        os.sched_setaffinity(0, self._anywhere)

    @staticmethod
    def _processor(thread: int) -> int:
        """On which CPU a thread runs, or -1 if that can't be seen (it ended, or is in another PID namespace)."""
        try:
            fd = os.open(f"/proc/{thread}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return -1
        try:
            return int(os.read(fd, 1024).rpartition(b")")[2].split()[_PROCESSOR])
        except (OSError, IndexError, ValueError):
            return -1
        finally:
            os.close(fd)
