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

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from vzfs import linux
from vzfs.store.index import Index
from vzfs.tree.area import list_names
from vzfs.tree.attributes import AttributeReader
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Entry, Kind
from vzfs.tree.table import Table

log = logging.getLogger(__name__)
SLOW_LISTING = 2048
"""Names in a directory whose reading is long work; 64 bytes each in a directory's size."""

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
            found = linux.read_directory(fd, cookie, room)
        finally:
            os.close(fd)
        if not found:
            return
        for name, after in found:
            yield name, after if after == END else after + REAL_OFFSETS
        cookie = found[-1][1]


class Listings:
    """Lists the directories of one mount."""

    def __init__(
        self, lock: AbstractContextManager[object], table: Table, lookup: Lookup, attributes: AttributeReader
    ) -> None:
        self._lock = lock
        self._table = table
        self._lookup = lookup
        self._attributes = attributes

    def start(self, number: int) -> Listing:
        """Start listing the directory ``number``."""
        return Listing(number, self._names, self._describe)

    def go_on(self, number: int, offset: int, size: int) -> Iterator[tuple[bytes, Entry | None, int]]:
        """List the directory ``number`` after ``offset`` (0, or what was given with a name) without keeping it open.

        Yields name, what it is (``None``: gone), and the offset after it; ``size`` bytes are about what will be used of
        it, as a READDIRPLUS answer. Names that stay are given exactly once while others come and go, also if the
        directory is unfolded meanwhile. Offsets: see ``vzfs.tree.listing``.
        """
        with self._lock:
            node = self._lookup.directory(number)
            if node.dead:
                return
            template, real = node.template, node.kind is Kind.DIRECTORY
            fd = os.dup(self._lookup.directory_fd(node)) if real else -1
        try:
            if real and (offset == 0 or offset >= REAL_OFFSETS):
                names = list_real(fd, offset, size)
            else:
                names = list_folded(template.index, node.entry, offset) if template else iter(())
            for name, after in names:
                entry = self._describe(number, name)
                try:
                    yield name, entry, after
                finally:
                    if entry is not None:
                        self._drop_if_unused(entry.number)
        finally:
            if real:
                os.close(fd)

    def _drop_if_unused(self, number: int) -> None:
        """What was listed only, and not remembered by the kernel, needs no memory.

        Real directories stay: the kernel may know them uncounted from when they were folded, and their link count is
        dear.
        """
        with self._lock:
            node = self._table.registered(number)
            if node is not None and not node.dead and node.kind is not Kind.DIRECTORY:
                self._table.drop_if_unused(node)

    def slow_to_list(self, number: int) -> bool:
        """Whether reading the names of the directory is long work, to be done in a thread."""
        with self._lock:
            node = self._lookup.directory(number)
            if node.dead:
                return False
            if node.kind is Kind.FOLDED:
                assert node.template is not None
                return node.template.index.child_count[node.entry] > SLOW_LISTING
            return os.stat(linux.fd_path(self._lookup.directory_fd(node))).st_size > SLOW_LISTING * 64

    def _names(self, number: int) -> Sequence[bytes]:
        with self._lock:
            node = self._lookup.directory(number)
            if node.dead:
                return []
            if node.kind is Kind.FOLDED:
                assert node.template is not None
                index = node.template.index
                return [b".", b"..", *(index.name(child) for child in index.children(node.entry))]
            fd = os.dup(self._lookup.directory_fd(node))
        try:
            return [b".", b"..", *list_names(fd)]
        finally:
            os.close(fd)

    def _describe(self, number: int, name: bytes) -> Entry | None:
        with self._lock:
            directory = self._lookup.get(number)
            if name == b".":
                return self._attributes.entry(directory)
            if name == b"..":
                return self._attributes.entry(directory if directory.dead else self._lookup.parent(directory))
            try:
                node, info = self._lookup.find(directory, name)
                return self._attributes.entry(node, info) if node else None
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                log.error("%r is left out of a listing: %s", name, error)  # noqa: TRY400
                return None  # a damaged record of a link group must not make the rest unreadable
