"""Fault points: places where a test can make the process die, to try every crash point of a change.

Rule: costs one comparison when not armed, and it is armed only by ``VZFS_CRASH_AT`` in the serving process's
environment: ``NAME`` dies at the first step of that name, ``NAME:K`` at its K-th, ``*:K`` at the K-th step of any name.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "VZFS_CRASH_AT"


class FaultPoints:
    """Counts steps down to the one at which the process kills itself."""

    def __init__(self, setting: str) -> None:
        name, _, count = setting.rpartition(":")  # names have colons in them, too
        self._name, self._left = (name, int(count)) if name and count.isdecimal() else (setting, 1 if setting else 0)

    def step(self, name: str) -> None:
        """Pass the step ``name``: die here with SIGKILL if it is the chosen one."""
        if self._left and self._name in (name, "*"):
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


step = FaultPoints(os.environ.get(VARIABLE, "")).step
"""Pass a step of a change, by name (see ``FaultPoints.step``)."""
