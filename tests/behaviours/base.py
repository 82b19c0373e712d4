"""The registry of behaviours and how one of them is run.

Rule: a behaviour's name is its function's name, unique in the whole suite, because it also names its directory.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from .place import Place
from .seeds import Seed

# What a file system may lack without being wrong; a target says which of these it has.
FEATURES = frozenset(
    {
        "coherent-readers",  # who opened a file to read, before anybody opened it to write, has the same file open
        "coherent-mappings",  # what was mapped before anybody opened the file to write shows what is written
        "directory-ctime",  # renaming a directory moves its change time
        "fallocate",  # fallocate(2), all modes that ext4 has
        "getflags",  # FS_IOC_GETFLAGS and FS_IOC_SETFLAGS
        "seek-hole",  # lseek(2) with SEEK_HOLE and SEEK_DATA finds real holes
        "setgid-without-execute",  # a writer outside the group takes setgid also where the group may not execute
        "tmpfile",  # open(2) with O_TMPFILE
    }
)

# A behaviour takes milliseconds on ext4, the one with 100,000 entries seconds, on a busy machine ten times that;
# what takes longer than this hangs.
TIME_LIMIT = 600.0


@dataclass(frozen=True, slots=True)
class Behaviour:
    """One named behaviour: ``function`` asserts it in a directory where ``seeds`` exist."""

    name: str
    group: str
    function: Callable[[Place], None]
    seeds: tuple[Seed, ...]
    needs: frozenset[str]

    def run(self, directory: Path, features: frozenset[str] = FEATURES) -> None:
        """Run in ``directory``, which holds the planted seeds and nothing else.

        Raises AssertionError when the file system behaves differently or the behaviour leaves a descriptor open,
        TimeoutError after ``TIME_LIMIT`` seconds, and OSError for a failure nobody expected.
        """
        before = _descriptors()
        umask = os.umask(0o022)
        cwd = os.open(".", os.O_PATH | os.O_DIRECTORY)
        old = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
        try:
            self.function(Place(directory, features, self.needs))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
            os.fchdir(cwd)
            os.close(cwd)
            os.umask(umask)
        left = _descriptors() - before
        assert not left, f"{self.name} left descriptors open: {sorted(left)}"


BEHAVIOURS: dict[str, Behaviour] = {}


def behaviour(
    *, seeds: Iterable[Seed] = (), needs: Iterable[str] = ()
) -> Callable[[Callable[[Place], None]], Callable[[Place], None]]:
    """Register the decorated function as a behaviour over ``seeds``.

    ``needs`` names the ``FEATURES`` that the function asks :meth:`Place.has` about.
    """
    wanted = frozenset(needs)
    unknown = wanted - FEATURES
    if unknown:
        raise ValueError(f"unknown features {sorted(unknown)}; add them to FEATURES")

    def register(function: Callable[[Place], None]) -> Callable[[Place], None]:
        name = function.__name__
        if name in BEHAVIOURS:
            raise ValueError(f"two behaviours are called {name}")
        group = function.__module__.rpartition(".")[2]
        BEHAVIOURS[name] = Behaviour(name, group, function, tuple(seeds), wanted)
        return function

    return register


def _descriptors() -> set[int]:
    names = os.listdir("/proc/self/fd")
    return {int(name) for name in names if os.path.lexists(f"/proc/self/fd/{name}")}


def _too_long(_signal: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"a behaviour took more than {TIME_LIMIT:.0f} s")
