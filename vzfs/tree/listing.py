"""Listing directories, in two ways: of an open directory, and stateless by offsets.

A ``Listing`` decides which names there are when it starts (or is rewound), what each one is when it is asked for; so a
listing in pieces never repeats or skips a name that stays, and never brings back one that went.

An engine without open directories has only the offset after the name that it gave last. Offsets below ``REAL_OFFSETS``
count records of a folded directory from 1: ``.`` is 1, ``..`` is 2, child ``k`` is 3 + ``k``. Offsets from there on are
the cookies of the real directory, in which that file system keeps the same promise. A real directory asked with an
offset below was folded when the listing began: it goes on with the template's names after that one, of which those that
are still there will be found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from vzfs.store import sys
from vzfs.store.index import Index
from vzfs.tree.node import Entry

REAL_OFFSETS = 1 << 32
END = (1 << 63) - 1
"""The cookie after the last name on ext4 and others; it stays as it is, for an offset can't be larger."""
_LEAST, _MOST = 1 << 11, 1 << 16
_SHARE = 4
"""A name takes about a fourth of the space in a directory that it takes in a READDIRPLUS answer."""


class Listing:
    """Names in directory ``number``, ``.`` and ``..`` first; a removed directory has none."""

    __slots__ = ("_describe", "_names", "number")

    def __init__(
        self, number: int, names: Callable[[int], Sequence[bytes]], describe: Callable[[int, bytes], Entry | None]
    ) -> None:
        self.number = number
        self._describe = describe
        self._names = names(number)

    def __len__(self) -> int:
        return len(self._names)

    def at(self, position: int) -> tuple[bytes, Entry | None]:
        """The name at ``position`` and what it is now, ``None`` when it is gone."""
        name = self._names[position]
        return name, self._describe(self.number, name)


def list_folded(index: Index, entry: int, offset: int) -> Iterator[tuple[bytes, int]]:
    """Names of the template directory ``entry`` after ``offset``, each with the offset after it."""
    for position, name in enumerate((b".", b".."), 1):
        if offset < position:
            yield name, position
    children = index.children(entry)
    for k in range(max(offset - 2, 0), len(children)):
        yield index.name(children[k]), 3 + k


def list_real(folder_fd: int, offset: int, size: int) -> Iterator[tuple[bytes, int]]:
    """Names of the directory ``folder_fd`` (may be ``O_PATH``) after ``offset``, each with the offset after it."""
    cookie = offset if offset in (0, END) else offset - REAL_OFFSETS
    room = min(max(size // _SHARE, _LEAST), _MOST)
    while True:
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME | os.O_CLOEXEC, dir_fd=folder_fd)
        try:
            found = sys.read_directory(fd, cookie, room)
        finally:
            os.close(fd)
        if not found:
            return
        for name, after in found:
            yield name, after if after == END else after + REAL_OFFSETS
        cookie = found[-1][1]
