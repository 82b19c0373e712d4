"""Leaving the cgroup of whoever called ``vzfs mount``.

A serving process outlives its caller's session or container, and must not share its limits: a caller that is frozen,
throttled, out of memory or killed with its whole cgroup would take a container's root with it.

Rule: best effort. What a service manager started stays where that put it, because it counts on finding it there; where
the process can't leave it stays, and the log says why.
"""

from __future__ import annotations

import os
from pathlib import Path

from vzfs.fuse.table import mount_table

OWN = "vzfs"
"""The cgroup of all serving processes, below the root of cgroup v2; administrators may limit it."""


def leave_cgroup() -> str:
    """Move this process to the cgroup ``vzfs``; gives where it is now, and why it stayed if it did, for the log."""
    own = _own()
    if own is None:
        return "none of cgroup v2"
    if own == "/":
        return "the root's"
    if own.endswith(".service"):
        return f"{own}, which a service manager has put it in"
    top = next((entry.mountpoint for entry in mount_table() if entry.fstype == "cgroup2"), None)
    if top is None:
        return f"{own}, its caller's, because no cgroup2 is mounted"
    target = Path(top) / OWN
    try:
        target.mkdir(mode=0o755, exist_ok=True)
        (target / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        return f"{own}, its caller's, because {target} can't be used: {error.strerror}"
    return f"/{OWN}"


def _own() -> str | None:
    """The path of this process's cgroup of version 2, as far as its cgroup namespace shows it (cgroups(7))."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line.removeprefix("0::")
    return None
