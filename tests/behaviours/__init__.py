"""The behaviour suite: named behaviours of a Linux file system, each knowing nothing but a directory.

Rule: nothing in this package knows which file system it judges. A behaviour gets a directory of its own in which its
seeds exist already, does something there and asserts what ext4 does. Whoever runs it decides where the directory lies
and how the seeds came there: planted directly, planted through a mount, or sealed in a template. Where a file system
lacks a documented feature, the behaviour asserts the documented refusal instead; none is ever skipped.

``BEHAVIOURS`` maps each name to its :class:`Behaviour`, in the order of definition. The idea is go-fuse's posixtest.
"""

from __future__ import annotations

from .base import BEHAVIOURS, FEATURES, Behaviour, behaviour
from .place import Place
from .seeds import (
    SEED_TIME,
    BlockDev,
    CharDev,
    Dir,
    Fifo,
    File,
    HardLink,
    Seed,
    Symlink,
    plant,
)

# Importing a group registers its behaviours; this list is the order in which they run.
from . import (  # isort: skip  # noqa: F401
    lookup_attr,
    create,
    data,
    links,
    symlinks,
    rename,
    directories,
    unlinked,
    xattrs,
    permissions,
    setid,
    openfiles,
    times,
    locks,
    special,
    exec,  # noqa: A004
    trees,
)

__all__ = [
    "BEHAVIOURS",
    "FEATURES",
    "SEED_TIME",
    "Behaviour",
    "BlockDev",
    "CharDev",
    "Dir",
    "Fifo",
    "File",
    "HardLink",
    "Place",
    "Seed",
    "Symlink",
    "behaviour",
    "plant",
]
