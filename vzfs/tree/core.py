"""The core of a container's file system: opening it, finding and telling what is there, making it the container's own.

See ``vzfs.tree.tree`` for the rules.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vzfs.store import sys
from vzfs.store.granted import Granted
from vzfs.store.index import Attributes
from vzfs.store.layout import Layout
from vzfs.store.ownlink import read_own_link
from vzfs.tree.area import PrivateArea, Sync, list_names
from vzfs.tree.counters import Counters
from vzfs.tree.listing import REAL_OFFSETS, Listing, list_folded, list_real
from vzfs.tree.node import Entry, Handle, Kind, Node, Readers
from vzfs.tree.nodes import Nodes
from vzfs.tree.own import Owner
from vzfs.tree.pins import PINS, Pins, Slots
from vzfs.tree.ready import Ready

log = logging.getLogger(__name__)

SLOW_COPY = 128 << 10
"""Bytes of a file whose copy-up is long work even without a flush."""
SLOW_UNFOLD = 64
"""Entries of a directory whose unfolding is long work: about a millisecond."""
_NOTHING_IS_QUICK = -1
SLOW_FREE = 64 << 20
"""Bytes of an unlinked file whose removal is long work."""
SLOW_LISTING = 2048
"""Names in a directory whose reading is long work; 64 bytes each in a directory's size."""


class Caller(NamedTuple):
    """Who asks for something: its file system user and group, and the mask for the modes of what it makes."""

    uid: int
    gid: int
    umask: int = 0


ROOT = Caller(0, 0)


@dataclass(frozen=True, slots=True)
class Changes:
    """Attributes to set, ``None`` leaving one alone: permission bits, ids, bytes, nanoseconds."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class Core:
    """What every operation needs; for the arguments see ``vzfs.tree.tree.Tree``."""

    def __init__(
        self,
        layout: Layout,
        container: Path,
        *,
        read_only: bool = False,
        sync: Sync = Sync.DATA,
        readers: Readers = Readers.SHARE,
        resume: bool = False,
        changed: Callable[[int], None] | None = None,
        pins: Slots | None = None,
    ) -> None:
        granted = Granted(layout, container)
        self.lock = threading.RLock()
        self._read_only = read_only
        self._busy: dict[int, threading.Event] = {}
        self._handles: dict[int, Handle] = {}
        self._next_handle = 1
        self._area = PrivateArea(container, read_only=read_only)
        try:
            if not read_only:
                self._area.clear_stage()
            if not read_only and not resume:
                self._area.clear_orphans()
            self._pins = Pins([0] * PINS if pins is None else pins)
            self._nodes = Nodes(
                self._area,
                self._pins,
                granted.serve,
                granted.os_template,
                changed,
                heed_splits=readers is Readers.KEEP,
            )
            if resume:
                self._nodes.resume()
        except BaseException:
            self._area.close()
            raise
        self.counters = Counters()
        self._keeps_readers = readers is Readers.KEEP
        self._slow_copy = {Sync.NONE: SLOW_COPY, Sync.DATA: 0, Sync.FULL: _NOTHING_IS_QUICK}[sync]  # a flush is long
        self._slow_unfold = _NOTHING_IS_QUICK if sync is Sync.FULL else SLOW_UNFOLD
        self._owner = Owner(self._nodes, self._area, sync, readers, self.counters)
        ready = Ready(self._nodes, self.lock)
        self.ready_lookup, self.ready_attributes = ready.lookup, ready.attributes
        self.ready_listing, self.ready_xattr = ready.listing, ready.no_xattrs

    # ------------------------------------------------------------------------------------------------ finding, telling

    def lookup(self, parent: int, name: bytes) -> Entry | None:
        """What ``name`` in directory ``parent`` is, counted as known to the kernel; ``None`` if there is none."""
        with self.lock:
            node, info = self._nodes.find(self._nodes.get(parent), name)
            if node is None:
                return None
            node.lookups += 1
            return self._nodes.entry(node, info)

    def remember(self, number: int) -> None:
        """Count one more look-up of ``number`` by the kernel (an entry of a listing with attributes)."""
        with self.lock:
            node = self._nodes.registered(number)
            if node is not None:
                node.lookups += 1

    def forget(self, number: int, count: int) -> None:
        """The kernel has forgotten ``count`` look-ups of ``number``."""
        with self.lock:
            node = self._nodes.forget(number, count)
            if node is not None:
                self._discard_orphan(node)

    def slow_to_forget(self, number: int) -> bool:
        """Whether forgetting or closing the node may free a large file, which is long work."""
        node = self._nodes.registered(number)
        return node is not None and bool(node.orphan) and node.last is not None and node.last.size > SLOW_FREE

    def _discard_orphan(self, node: Node) -> None:
        kept = self._pins.release(node.number)
        if node.orphan:
            remove = os.rmdir if node.is_directory else os.unlink
            remove(node.orphan, dir_fd=self._area.orphans_fd)
            node.orphan = b""
            kept = True
        if kept:
            self._nodes.changed(node.number)

    def getattr(self, number: int) -> Attributes:
        """What stat tells of the node."""
        with self.lock:
            return self._nodes.attributes(self._nodes.get(number))

    def readlink(self, number: int) -> bytes:
        """Text of a symbolic link as the container sees it."""
        with self.lock:
            node = self._nodes.get(number)
            if node.kind is Kind.TEMPLATE or node.kind is Kind.RECORD:
                assert node.template is not None
                if not stat.S_ISLNK(node.template.index.mode(node.entry)):
                    raise OSError(errno.EINVAL, "not a symbolic link")
                return node.template.index.target(node.entry)
            folder, name = (node.pin, b"") if node.pin >= 0 else self._nodes.location(node)
            return read_own_link(folder, name)

    def listing(self, number: int) -> Listing:
        """Start listing the directory ``number``."""
        return Listing(number, self._names, self._describe)

    def list_real(self, number: int, offset: int, size: int) -> Iterator[tuple[bytes, Entry | None, int]]:
        """List the directory ``number`` after ``offset`` (0, or what was given with a name) without keeping it open.

        Yields name, what it is (``None``: gone), and the offset after it; ``size`` bytes are about what will be used of
        it, as a READDIRPLUS answer. Names that stay are given exactly once while others come and go, also if the
        directory is unfolded meanwhile. Offsets: see ``vzfs.tree.listing``.
        """
        with self.lock:
            node = self._directory(number)
            if node.dead:
                return
            template, real = node.template, node.kind is Kind.DIRECTORY
            fd = os.dup(self._nodes.directory_fd(node)) if real else -1
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
        with self.lock:
            node = self._nodes.registered(number)
            if node is not None and not node.dead and node.kind is not Kind.DIRECTORY:
                self._nodes.drop_if_unused(node)

    def slow_to_list(self, number: int) -> bool:
        """Whether reading the names of the directory is long work, to be done in a thread."""
        with self.lock:
            node = self._directory(number)
            if node.dead:
                return False
            if node.kind is Kind.FOLDED:
                assert node.template is not None
                return node.template.index.child_count[node.entry] > SLOW_LISTING
            return os.stat(sys.fd_path(self._nodes.directory_fd(node))).st_size > SLOW_LISTING * 64

    def _names(self, number: int) -> Sequence[bytes]:
        with self.lock:
            node = self._directory(number)
            if node.dead:
                return []
            if node.kind is Kind.FOLDED:
                assert node.template is not None
                index = node.template.index
                return [b".", b"..", *(index.name(child) for child in index.children(node.entry))]
            fd = os.dup(self._nodes.directory_fd(node))
        try:
            return [b".", b"..", *list_names(fd)]
        finally:
            os.close(fd)

    def _describe(self, number: int, name: bytes) -> Entry | None:
        with self.lock:
            directory = self._nodes.get(number)
            if name == b".":
                return self._nodes.entry(directory)
            if name == b"..":
                return self._nodes.entry(directory if directory.dead else self._nodes.parent(directory))
            try:
                node, info = self._nodes.find(directory, name)
                return self._nodes.entry(node, info) if node else None
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                log.error("%r is left out of a listing: %s", name, error)  # noqa: TRY400
                return None  # a damaged entry must not make the rest unreadable

    def statfs(self) -> os.statvfs_result:
        """Space of the file system that holds the private area."""
        return os.statvfs(sys.fd_path(self._area.root_fd))

    def sync(self) -> None:
        """syncfs(2) of the file system that holds the private area."""
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._area.root_fd)
        try:
            sys.syncfs(fd)
        finally:
            os.close(fd)

    def birth_time(self, number: int) -> int | None:
        """When the node's own object was made, in ns since 1970; ``None``: unknown, or it is the template's."""
        with self.lock:
            node = self._nodes.get(number)
            if node.kind is not Kind.OWN and (node.kind is not Kind.DIRECTORY or node.dead):
                return None
            return None if node.pin >= 0 else sys.birth_time(self._nodes.path(node))

    @property
    def node_count(self) -> int:
        """How many nodes are kept in memory."""
        return self._nodes.count

    # ----------------------------------------------------------------------------------------- becoming the container's

    def slow_to_own(self, number: int, *, size: int | None = None) -> bool:
        """Whether making the node the container's own is long work, to be done in a thread.

        ``size`` is how many bytes of a file's content will be kept (all if ``None``).
        """
        if self._is_own(number):
            return False
        with self.lock:
            node = self._nodes.get(number)
            template = node.template
            if number in self._busy:
                return True
            if template is None or node.kind is Kind.OWN or node.kind is Kind.DIRECTORY:
                return False
            if node.kind is not Kind.FOLDED:
                content = template.index.attributes(node.entry).size
                return min(content, content if size is None else size) > self._slow_copy or self._parent_is_slow(node)
            return template.index.child_count[node.entry] > self._slow_unfold or self._parent_is_slow(node)

    def slow_to_change(self, number: int) -> bool:
        """Whether changing attributes of the node is long work: mostly it copies no data, however large the file is."""
        if self._is_own(number):
            return False
        with self.lock:
            node = self._nodes.get(number)
            if node.kind in (Kind.TEMPLATE, Kind.RECORD) and number not in self._busy and not node.dead:
                assert node.template is not None
                recorded = stat.S_ISREG(node.template.index.mode(node.entry))
                if recorded and not any(name in sys.ACL_XATTRS for name in self._owner.xattrs(node)):
                    return self._slow_copy == _NOTHING_IS_QUICK or self._parent_is_slow(node)
        return self.slow_to_own(number)

    def _is_own(self, number: int) -> bool:
        """Whether the node is known to be the container's own; a quick answer, which never turns from yes to no."""
        node = self._nodes.registered(number)
        return node is not None and (node.kind is Kind.DIRECTORY or node.kind is Kind.OWN)

    def _parent_is_slow(self, node: Node) -> bool:
        if node.dead or node.group:
            return False
        parent = self._nodes.parent(node)
        return parent.kind is Kind.FOLDED and self.slow_to_own(parent.number)

    def _own_directory(self, number: int) -> None:
        """Unfold the directory ``number``, its parents before it."""
        if not self._is_own(number):
            self._own(number, _is_folded, self._stage_directory, self._owner.commit_directory)

    def _stage_directory(self, node: Node, staged: bytes) -> None:
        assert node.template is not None
        self._owner.stage_directory(node.template, node.entry, staged)

    def own_file(self, number: int, size: int | None = None) -> None:
        """Copy up ``number``, which is no directory, with the first ``size`` bytes of its content (``None``: all)."""
        if self._is_own(number):
            return
        cut = False
        length = 0
        fd = -1

        def stage(node: Node, staged: bytes) -> None:
            nonlocal cut, length, fd
            assert node.template is not None
            attributes = node.template.index.attributes(node.entry)
            cut = size is not None and size < attributes.size
            if not stat.S_ISREG(attributes.mode):
                self._owner.stage_special(node, staged)
                return
            length = attributes.size if size is None else min(size, attributes.size)
            source = node.template.open_source(node.entry)
            try:
                fd = self._owner.stage_file(source, staged, length, attributes.mode)
            finally:
                os.close(source)

        def commit(node: Node, staged: bytes) -> None:
            self._owner.commit_copy(node, staged, fd, time.time_ns() if cut else None)
            self.counters.copied_bytes += length

        with self.lock:
            if self._is_kept(self._nodes.get(number)):
                raise OSError(errno.ETXTBSY, "its template's data is in use, and it has no name to make a copy under")
        try:
            self._own(number, lambda node: node.kind in (Kind.TEMPLATE, Kind.RECORD), stage, commit)
        finally:
            if fd >= 0:
                os.close(fd)

    def _own(
        self,
        number: int,
        wanted: Callable[[Node], bool],
        stage: Callable[[Node, bytes], None],
        commit: Callable[[Node, bytes], None],
    ) -> None:
        """Stage and commit unless the node is the container's own already; one thread does it, others wait for it."""
        while True:
            with self.lock:
                node = self._nodes.get(number)
                if not wanted(node) or (node.dead and node.is_directory):
                    return
                other = self._busy.get(number)
                if other is None:
                    self._busy[number] = threading.Event()
                    break
            other.wait()
        try:
            self._own_place(number)
            self._stage_and_commit(number, stage, commit)
        finally:
            with self.lock:
                self._busy.pop(number).set()

    def _own_place(self, number: int) -> None:
        """Make the directory real in which the node's magic link shall be replaced."""
        with self.lock:
            node = self._nodes.get(number)
            if node.group or node.dead:
                return
            parent = self._nodes.parent(node).number
        self._own_directory(parent)

    def _stage_and_commit(
        self, number: int, stage: Callable[[Node, bytes], None], commit: Callable[[Node, bytes], None]
    ) -> None:
        with self.lock:
            node = self._nodes.get(number)
            staged = self._area.stage_name()
        flush = None
        try:
            stage(node, staged)
            with self.lock:
                node = self._nodes.get(number)
                if node.dead and node.is_directory:
                    self._owner.discard_stage(staged)
                    return
                commit(node, staged)
                flush = self._owner.flush_place(node)
        except BaseException:
            with contextlib.suppress(OSError):
                self._owner.discard_stage(staged)
            raise
        if flush:
            flush()

    def _is_kept(self, node: Node) -> bool:
        """Whether the node is only what its readers have open any more: a template's data, read by the kernel."""
        return node.dead and node.is_open and node.kind in (Kind.TEMPLATE, Kind.RECORD) and self._keeps_readers

    def _directory(self, number: int) -> Node:
        node = self._nodes.get(number)
        if not node.is_directory:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory")
        return node

    def _living_directory(self, number: int) -> Node:
        """The real directory ``number`` for a change in it; ``ENOENT`` when it was removed."""
        node = self._directory(number)
        if node.dead:
            raise FileNotFoundError(errno.ENOENT, "the directory was removed")
        return node


def _is_folded(node: Node) -> bool:
    return node.kind is Kind.FOLDED
