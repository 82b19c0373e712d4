"""Copy-up: what is no directory becomes an object of the private area, with the template's data and attributes.

Rule: who has the file open goes on with the copy, on the same node. Only where the kernel reads the template's file by
itself (``Node.passed``) the node is split: it is left to its readers, and its names to a new node.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from contextlib import AbstractContextManager

from vzfs import linux
from vzfs.store.faults import step
from vzfs.store.flush import flusher
from vzfs.store.opened import apply_attributes
from vzfs.store.ownlink import make_own_link
from vzfs.store.xattrs import ORIGIN_XATTR, SPLIT_XATTR
from vzfs.tree.area import PrivateArea, Sync
from vzfs.tree.attributes import AttributeReader
from vzfs.tree.become.directory import Directories
from vzfs.tree.become.protocol import Protocol
from vzfs.tree.become.speed import NOTHING_IS_QUICK, Speed
from vzfs.tree.become.stage import Stage
from vzfs.tree.counters import Counters
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Kind, Node
from vzfs.tree.table import Table

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SET_ID = stat.S_ISUID | stat.S_ISGID


class Copies:
    """The copies of one mount."""

    def __init__(
        self,
        area: PrivateArea,
        lock: AbstractContextManager[object],
        sync: Sync,
        speed: Speed,
        counters: Counters,
        table: Table,
        lookup: Lookup,
        attributes: AttributeReader,
        stage: Stage,
        protocol: Protocol,
        directories: Directories,
    ) -> None:
        self._area = area
        self._lock = lock
        self._sync = sync
        self._speed = speed
        self._counters = counters
        self._table = table
        self._lookup = lookup
        self._attributes = attributes
        self._stage = stage
        self._protocol = protocol
        self._directories = directories
        self._flush = os.fdatasync if area.read_only else flusher(area.stage_fd)

    def own(self, number: int, size: int | None = None) -> None:
        """Copy up ``number``, which is no directory, with the first ``size`` bytes of its content (``None``: all)."""
        if self._protocol.is_own(number):
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
                self._stage_special(node, staged)
                return
            length = attributes.size if size is None else min(size, attributes.size)
            source = node.template.open_source(node.entry)
            try:
                fd = self._stage_file(source, staged, length, attributes.mode)
            finally:
                os.close(source)

        def commit(node: Node, staged: bytes) -> None:
            self._commit(node, staged, fd, time.time_ns() if cut else None)
            self._counters.copied_bytes += length

        with self._lock:
            if self.is_kept(self._lookup.get(number)):
                raise OSError(errno.ETXTBSY, "its template's data is in use, and it has no name to make a copy under")
        try:
            self._directories.own_place(number)
            self._protocol.own(number, lambda node: node.kind in (Kind.TEMPLATE, Kind.RECORD), stage, commit)
        finally:
            if fd >= 0:
                os.close(fd)

    def slow_to_own(self, number: int, *, size: int | None = None) -> bool:
        """Whether making the node the container's own is long work, to be done in a thread.

        ``size`` is how many bytes of a file's content will be kept (all if ``None``).
        """
        if self._protocol.is_own(number):
            return False
        with self._lock:
            node = self._lookup.get(number)
            template = node.template
            if number in self._protocol.busy:
                return True
            if template is None or node.kind is Kind.OWN or node.kind is Kind.DIRECTORY:
                return False
            if node.kind is not Kind.FOLDED:
                content = template.index.attributes(node.entry).size
                return min(
                    content, content if size is None else size
                ) > self._speed.copy or self._directories.parent_is_slow(node)
            return template.index.child_count[node.entry] > self._speed.unfold or self._directories.parent_is_slow(node)

    def slow_to_change(self, number: int) -> bool:
        """Whether changing attributes of the node is long work: mostly it copies no data, however large the file is."""
        if self._protocol.is_own(number):
            return False
        with self._lock:
            node = self._lookup.get(number)
            if node.kind in (Kind.TEMPLATE, Kind.RECORD) and number not in self._protocol.busy and not node.dead:
                assert node.template is not None
                recorded = stat.S_ISREG(node.template.index.mode(node.entry))
                if recorded:
                    return self._speed.copy == NOTHING_IS_QUICK or self._directories.parent_is_slow(node)
        return self.slow_to_own(number)

    def _stage_file(self, source_fd: int, name: bytes, size: int, mode: int) -> int:
        """Stage a copy of the first ``size`` bytes of ``source_fd``, of the template's ``mode``, without its other
        attributes yet; gives a descriptor of it."""
        fd = os.open(name, _NEW_FILE, stat.S_IMODE(mode) & ~_SET_ID, dir_fd=self._area.stage_fd)
        while self._stage.stands_in(self._area.stage_fd, name):
            os.close(fd)
            fd = os.open(name, _NEW_FILE, stat.S_IMODE(mode) & ~_SET_ID, dir_fd=self._area.stage_fd)
        try:
            step("copy-up:made")
            written = size > 0 and linux.copy_data(source_fd, fd, size)
            step("copy-up:copied")
            if written and self._sync is not Sync.NONE:  # names and shared blocks are the journal's, which keeps order
                self._flush(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _stage_special(self, node: Node, name: bytes) -> None:
        """Stage a symbolic link, device, FIFO or socket like the template's."""
        template = node.template
        assert template is not None
        attributes = template.index.attributes(node.entry)
        if stat.S_ISLNK(attributes.mode):
            make_own_link(self._area.stage_fd, name, template.index.target(node.entry))
        else:
            os.mknod(name, attributes.mode, attributes.rdev, dir_fd=self._area.stage_fd)
        step("copy-up:copied")

    def _commit(self, node: Node, staged: bytes, fd: int, mtime_ns: int | None = None) -> None:
        """Give the staged copy the node's attributes and put it in the place of the node's magic link or record.

        ``fd`` is a descriptor of it, or -1. ``mtime_ns`` replaces its modification time: a copy that lacks a part of
        the content is a modified file.
        """
        template = node.template
        assert template is not None
        copy = fd if fd >= 0 else linux.entry_path(self._area.stage_fd, staged)
        follow = fd >= 0
        attributes, xattrs = self._attributes.of(node), self._attributes.xattrs_of(node)
        os.setxattr(copy, ORIGIN_XATTR, template.origin(node.entry), follow_symlinks=follow)
        apply_attributes(copy, attributes if mtime_ns is None else attributes._replace(mtime_ns=mtime_ns), xattrs)
        backing = os.stat(copy, follow_symlinks=follow).st_ino
        keep_readers = node.passed > 0 and not node.dead
        if keep_readers:
            os.setxattr(copy, SPLIT_XATTR, b"1", follow_symlinks=follow)
        with contextlib.ExitStack() as cleaning:
            fds = [] if keep_readers else self._for_handles(node, staged, cleaning)
            step("copy-up:staged")
            self._place(node, staged, attributes.nlink)
            self._counters.copy_ups += 1
            if keep_readers:
                node.last = attributes
                self._table.split(node, backing, linux.generation_of(fd, b""))
                self._table.changed(node.number)
                return
            self._table.set_own(node, Kind.OWN, backing)
            self._table.register(node)
            for handle, fd in zip(node.handles or (), fds, strict=True):
                os.dup2(fd, handle.fd, inheritable=False)
            self._table.changed(node.number)

    def _place(self, node: Node, staged: bytes, nlink: int) -> None:
        """Put the finished copy in the place of what stood for the node."""
        if node.dead:
            orphan = b"%d" % node.number
            os.rename(staged, orphan, src_dir_fd=self._area.stage_fd, dst_dir_fd=self._area.orphans_fd)
            node.orphan = orphan
        else:
            self._stage.place(node, staged, nlink, "copy-up:renamed")

    def _for_handles(self, node: Node, staged: bytes, cleaning: contextlib.ExitStack) -> list[int]:
        """Descriptors of the copy: who has the file open already shall see it, as on any other file system."""
        fds = []
        for _ in node.handles or ():
            fds.append(os.open(staged, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._area.stage_fd))
            cleaning.callback(os.close, fds[-1])
        return fds

    def is_kept(self, node: Node) -> bool:
        """Whether the node is only what its readers have open any more: a template's data, read by the kernel."""
        return node.dead and node.passed > 0 and node.kind in (Kind.TEMPLATE, Kind.RECORD)
