"""What else the machine does while something is measured.

*idle*: nothing that the suite starts. A FUSE server then sleeps on another CPU than its client when a request comes,
and waking an idle (virtual) CPU is most of what a request costs.

*busy*: on every CPU but the first a process of normal priority that never sleeps, pinned there. Client and server are
not pinned: the scheduler finds no idle CPU to wake the server on, so it wakes it where the client is, which is about to
wait for it anyway. The switch on one CPU is cheap: peers look better than on an idle machine. Pinning client or server
would measure our placement instead of the scheduler's, and would hand every system for nothing what vzfs works for. How
much of its CPU the spinning process got is part of each sample's evidence: 1 means that client and server kept off it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.systems import DIES_WITH_PARENT
from benchmarks.workload import Condition

SPIN = "while True: pass"
TEXT = {
    Condition.IDLE: "nothing else runs",
    Condition.BUSY: "every CPU but the first runs a pinned process of normal priority that never sleeps; client and "
    "server are not pinned",
}
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Spinners:
    """The processes that keep CPUs busy; none in the idle condition."""

    pids: tuple[int, ...] = ()

    def cpu_seconds(self) -> float:
        """Processor time that they got so far, per process; resolution 10 ms."""
        if not self.pids:
            return 0.0
        ticks = sum(sum(map(int, stat_fields(pid)[11:13])) for pid in self.pids)
        return ticks / _TICKS / len(self.pids)


@contextlib.contextmanager
def condition(which: Condition) -> Iterator[Spinners]:
    """Make a condition and end it again. Raises ``ValueError`` for a busy machine of one CPU."""
    if which is Condition.IDLE:
        yield Spinners()
        return
    _first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        raise ValueError("there is no other CPU to keep busy")
    with contextlib.ExitStack() as stack:
        pids = []
        for cpu in others:
            command = [*DIES_WITH_PARENT, sys.executable, "-I", "-S", "-c", SPIN]
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)
            os.sched_setaffinity(process.pid, {cpu})
            pids.append(process.pid)
        time.sleep(0.2)  # until the interpreters run, and the scheduler has noticed
        yield Spinners(tuple(pids))


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat after the name, see proc(5): field 3 there is number 0 here."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def last_cpu(pid: int) -> int:
    """The CPU where a process ran last (its main thread); -1 if it is gone."""
    try:
        return int(stat_fields(pid)[36])
    except (OSError, IndexError):
        return -1
