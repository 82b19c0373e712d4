"""Who asks for something."""

from __future__ import annotations

from typing import NamedTuple


class Caller(NamedTuple):
    """Who asks for something: its file system user and group, and the mask for the modes of what it makes."""

    uid: int
    gid: int
    umask: int = 0


ROOT = Caller(0, 0)
