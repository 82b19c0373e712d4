"""One mounted container: the operations of a file system on node numbers and names.

Synchronous, knows nothing of FUSE, works without a mount. Rules:
- Every method may be called from any thread. The lock, which may be entered again and whose holder sees nothing change,
  is held for what is quick; copying data and building directories happen without it (``Owner.stage_*``), so that
  look-ups go on.
- Errors are ``OSError`` with the errno that the program shall see.
- Permission has been checked by the caller (the kernel, with ``default_permissions``); ownership of what is made is set
  here.
- Names are single components of 1 to 255 bytes without ``/`` and NUL, which the kernel guarantees but for the length.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from vzfs.store import sys
from vzfs.store.conf import OSTEMPLATE, Conf
from vzfs.store.faults import step
from vzfs.store.index import Attributes
from vzfs.store.layout import CONF, RESERVED_PREFIX, Layout
from vzfs.store.opened import OpenTemplate
from vzfs.store.ownlink import make_own_link, read_own_link
from vzfs.store.record import Record
from vzfs.tree.area import PrivateArea, Sync, list_names
from vzfs.tree.counters import Counters
from vzfs.tree.listing import REAL_OFFSETS, Listing, list_folded, list_real
from vzfs.tree.node import Entry, Handle, Kind, Node, Readers
from vzfs.tree.nodes import Nodes, check_name
from vzfs.tree.own import Owner, no_space
from vzfs.tree.ready import Ready

log = logging.getLogger(__name__)

SLOW_COPY = 128 << 10
"""Bytes of a file whose copy-up is long work: about a millisecond with its flush."""
SLOW_UNFOLD = 64
"""Entries of a directory whose unfolding is long work: about a millisecond."""
SLOW_FREE = 64 << 20
"""Bytes of an unlinked file whose removal is long work."""
SLOW_LISTING = 2048
"""Names in a directory whose reading is long work; 64 bytes each in a directory's size."""
_BACKING_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC
"""Flags of a program's open(2) that are passed on; the kernel itself deals with O_APPEND and O_DIRECT."""


class Caller(NamedTuple):
    """Who asks for something: its file system user and group, and the mask for the modes of what it makes."""

    uid: int
    gid: int
    umask: int = 0


ROOT = Caller(0, 0)
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Changes:
    """Attributes to set, ``None`` leaving one alone: permission bits, ids, bytes, nanoseconds."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class Tree:
    """The file system of the container at ``container``; its lock must be held by the caller.

    With ``resume`` the kernel goes on with what it knows from a dead process that served the container: orphans are
    kept and every node number that process gave is understood (see ``vzfs.tree.resume``).

    ``changed(number)`` is called, under the lock, whenever the object that holds the data of the node is another one
    from now on, or gone. Raises ``OSError`` and, at construction, ``VzfsError`` when the container or its template is
    damaged or missing.
    """

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
    ) -> None:
        conf = Conf.load(container / CONF)
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
            self._nodes = Nodes(
                self._area,
                lambda name: OpenTemplate(layout, name),
                conf.get(OSTEMPLATE),
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
        self._owner = Owner(self._nodes, self._area, sync, readers, self.counters)
        ready = Ready(self._nodes, self.lock)
        self.ready_lookup, self.ready_attributes = ready.lookup, ready.attributes
        self.ready_listing, self.ready_xattr = ready.listing, ready.no_xattrs

    def close(self) -> None:
        """Close all files and descriptors; unlinked ones are gone."""
        with self.lock:
            for number in list(self._handles):
                self.release(number)
            if not self._read_only:
                self._area.clear_stage()
                self._area.clear_orphans()
            self._nodes.close()
            self._area.close()

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
        if node.orphan:
            os.unlink(node.orphan, dir_fd=self._area.orphans_fd)
            node.orphan = b""
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
            folder, name = self._nodes.location(node)
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
            return sys.birth_time(self._nodes.path(node))

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
                return min(content, content if size is None else size) > SLOW_COPY or self._parent_is_slow(node)
            return template.index.child_count[node.entry] > SLOW_UNFOLD or self._parent_is_slow(node)

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

        def stage(node: Node, staged: bytes) -> None:
            assert node.template is not None
            self._owner.stage_directory(node.template, node.entry, staged)

        self._own(number, lambda node: node.kind is Kind.FOLDED, stage, self._owner.commit_directory)

    def own_file(self, number: int, size: int | None = None) -> None:
        """Copy up ``number``, which is no directory, with the first ``size`` bytes of its content (``None``: all)."""

        cut = False
        length = 0

        def stage(node: Node, staged: bytes) -> None:
            nonlocal cut, length
            assert node.template is not None
            attributes = node.template.index.attributes(node.entry)
            cut = size is not None and size < attributes.size
            if not stat.S_ISREG(attributes.mode):
                self._owner.stage_special(node, staged)
                return
            length = attributes.size if size is None else min(size, attributes.size)
            source = node.template.open_source(node.entry)
            try:
                self._owner.stage_file(source, staged, length)
            finally:
                os.close(source)

        def commit(node: Node, staged: bytes) -> None:
            self._owner.commit_copy(node, staged, time.time_ns() if cut else None)
            self.counters.copied_bytes += length

        with self.lock:
            if self._is_kept(self._nodes.get(number)):
                raise OSError(errno.ETXTBSY, "its template's data is in use, and it has no name to make a copy under")
        self._own(number, lambda node: node.kind in (Kind.TEMPLATE, Kind.RECORD), stage, commit)

    def _own(
        self,
        number: int,
        wanted: Callable[[Node], bool],
        stage: Callable[[Node, bytes], None],
        commit: Callable[[Node, bytes], None],
    ) -> None:
        """Stage and commit unless the node is the container's own already; one thread does it, others wait for it."""
        if self._is_own(number):
            return
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

    # ---------------------------------------------------------------------------------------------------------- making

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Entry:
        """Make a directory."""
        return self._make(parent, name, caller, lambda fd, name: os.mkdir(name, mode & 0o7777, dir_fd=fd))[1]

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Entry:
        """Make a regular file, device, FIFO or socket; ``mode`` has the type."""
        return self._make(parent, name, caller, lambda fd, name: os.mknod(name, mode, rdev, dir_fd=fd))[1]

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Entry:
        """Make a symbolic link; a text that would be a magic link is stored so that it is none."""
        return self._make(parent, name, caller, lambda fd, name: make_own_link(fd, name, target))[1]

    def _make(self, parent: int, name: bytes, caller: Caller, make: Callable[[int, bytes], Made]) -> tuple[Made, Entry]:
        check_name(name)
        self._own_directory(parent)
        with self.lock:
            return self._make_in(self._living_directory(parent), name, caller, make)

    def _make_in(
        self, directory: Node, name: bytes, caller: Caller, make: Callable[[int, bytes], Made]
    ) -> tuple[Made, Entry]:
        """Let ``make`` make ``name`` as the caller's own, and give what it gave; ``name`` never has another owner."""
        fd = self._nodes.directory_fd(directory)
        gid = _given_group(fd)
        if caller.uid == os.geteuid() and (gid is not None or caller.gid == os.getegid()):
            with _masked(caller.umask):
                made = make(fd, name)
            step("make:made")
            return made, self._adopt(directory, fd, name)
        with self._made_on_stage(fd, gid, caller, make) as (made, stage, staged):
            sys.renameat2(stage, staged, fd, name, sys.RENAME_NOREPLACE)
            step("make:named")
        return made, self._adopt(directory, fd, name)

    @contextlib.contextmanager
    def _made_on_stage(
        self, fd: int, gid: int | None, caller: Caller, make: Callable[[int, bytes], Made]
    ) -> Iterator[tuple[Made, int, bytes]]:
        """What ``make`` made for the directory ``fd``, which gives it the group ``gid``; removed if the block fails."""
        with self._owner.folder_like(fd) as stage:
            staged = self._area.stage_name()
            try:
                with _masked(caller.umask):
                    made = make(stage, staged)
                step("make:made")
                _give_to(stage, staged, caller.uid, caller.gid if gid is None else gid)
                if gid is not None and stat.S_ISDIR(os.lstat(staged, dir_fd=stage).st_mode):
                    _add_mode(stage, staged, stat.S_ISGID)
                yield made, stage, staged
            except BaseException:
                sys.remove_tree(stage, staged)
                raise

    def _adopt(self, directory: Node, fd: int, name: bytes) -> Entry:
        """Give the just made ``name`` a node; if that fails, it is unmade."""
        try:
            info = os.lstat(name, dir_fd=fd)
            node = self._nodes.adopt(directory, name, info)
            node.lookups += 1
            return self._nodes.entry(node, info)
        except BaseException:
            sys.remove_tree(fd, name)
            raise

    def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Handle, Entry]:
        """Make a regular file and open it, or open it if it is there and ``flags`` don't have ``O_EXCL``."""
        check_name(name)
        self._own_directory(parent)
        with self.lock:
            directory = self._living_directory(parent)
            if not flags & os.O_EXCL:
                present = self._nodes.child(directory, name)
                if present is not None:
                    handle = self.open(present.number, flags, caller)
                    present.lookups += 1
                    return handle, self._nodes.entry(present)
            with _making_file(mode, flags) as make:
                backing, entry = self._make_in(directory, name, caller, make)
            return self._add_handle(self._nodes.get(entry.number), backing, flags), entry

    def tmpfile(self, parent: int, mode: int, flags: int, caller: Caller) -> tuple[Handle, Entry]:
        """Make a regular file without a name and open it (``O_TMPFILE``); ``link`` may give it one."""
        self._own_directory(parent)
        with self.lock:
            fd = self._nodes.directory_fd(self._living_directory(parent))
            with (
                _making_file(mode, flags) as make,
                self._made_on_stage(fd, _given_group(fd), caller, make) as (backing, stage, staged),
            ):
                node = self._nodes.new_own(Kind.OWN, os.fstat(backing).st_ino)
                self._owner.move_to_orphans(node, stage, staged)
            node.dead = True
            node.lookups += 1
            node.last = self._nodes.attributes(node)
            self._nodes.register(node)
            return self._add_handle(node, backing, flags), self._nodes.entry(node)

    def link(self, number: int, parent: int, name: bytes) -> Entry:
        """Make ``name`` one more hard link to the node."""
        check_name(name)
        self._own_directory(parent)
        with self.lock:
            node = self._nodes.get(number)
            directory = self._living_directory(parent)
            fd = self._nodes.directory_fd(directory)
            if node.is_directory:
                raise PermissionError(errno.EPERM, "a directory has one name", name)
            if self._exists(fd, name):
                raise FileExistsError(errno.EEXIST, "exists", name)
            if node.dead:
                self._name_again(node, directory, fd, name)
            elif node.kind is Kind.OWN and not node.group:
                source, source_name = self._nodes.location(node)
                os.link(source_name, name, src_dir_fd=source, dst_dir_fd=fd, follow_symlinks=False)
                self._nodes.add_name(node, directory, name)
            else:
                self._link_group(node, fd, name)
            node.lookups += 1
            return self._nodes.entry(node)

    def _name_again(self, node: Node, directory: Node, fd: int, name: bytes) -> None:
        """Give an own file a name that has none."""
        if not node.orphan or node.group:
            raise FileNotFoundError(errno.ENOENT, "the node was unlinked", name)
        backing = os.lstat(node.orphan, dir_fd=self._area.orphans_fd).st_ino
        sys.renameat2(self._area.orphans_fd, node.orphan, fd, name, sys.RENAME_NOREPLACE)
        step("orphan:named")
        node.orphan, node.dead, node.last = b"", False, None
        self._nodes.set_own(node, Kind.OWN, backing)
        self._nodes.place(node, directory, name)

    def _link_group(self, node: Node, fd: int, name: bytes) -> None:
        assert node.template is not None
        if not node.group:
            self._owner.make_group(node)
        self._owner.change_group_nlink(node, +1)
        try:
            node.template.plant_link(fd, name, node.entry)
            step("link-group:planted")
        except BaseException:
            self._owner.change_group_nlink(node, -1)
            raise

    @staticmethod
    def _exists(fd: int, name: bytes) -> bool:
        try:
            os.lstat(name, dir_fd=fd)
        except FileNotFoundError:
            return False
        return True

    # -------------------------------------------------------------------------------------------------------- removing

    def unlink(self, parent: int, name: bytes) -> int | None:
        """Remove a name of something that is no directory.

        Gives the number of a node whose much space should be given back at once, by ``free``, because nobody has it
        open and the kernel forgets it in its own time.
        """
        self._own_directory(parent)
        with self.lock:
            directory = self._living_directory(parent)
            node, info = self._existing(directory, name)
            if node.is_directory:
                raise IsADirectoryError(errno.EISDIR, "is a directory", name)
            last = self._loses_last_name(node, info)
            keep = self._must_keep(node, directory, name, last=last)
            fd = self._nodes.directory_fd(directory)
            with self._losing_name(node):
                step("unlink:before")
                if keep and last:
                    self._owner.move_to_orphans(node, fd, name)
                else:
                    if keep:
                        self._owner.link_to_orphans(node, fd, name)
                    os.unlink(name, dir_fd=fd)
                step("unlink:done")
            self._after_losing_name(node, directory, name, last=last)
            much = node.orphan and not node.is_open and node.last is not None and node.last.blocks * 512 > SLOW_COPY
            return node.number if much else None

    def free(self, number: int) -> None:
        """Give back the space of an unlinked node unless somebody has it open; for large files this is long work."""
        with self.lock:
            node = self._nodes.registered(number)
            if node is None or not node.dead or node.is_open or not node.orphan:
                return
            orphan, node.orphan = node.orphan, b""
            self._nodes.changed(number)
        os.unlink(orphan, dir_fd=self._area.orphans_fd)

    def _existing(self, directory: Node, name: bytes) -> tuple[Node, os.stat_result | None]:
        node, info = self._nodes.find(directory, name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "no such name", name)
        return node, info

    def _must_keep(self, node: Node, directory: Node, name: bytes, *, last: bool) -> bool:
        """Whether the node, about to lose this name, needs another one to stay usable for who knows it already."""
        if node.kind is not Kind.OWN or node.group or node.orphan:
            return False
        if last:
            return self._nodes.is_known(node)
        return node.is_open and not node.others and self._nodes.lies_at(node, directory, name)

    def _loses_last_name(self, node: Node, info: os.stat_result | None) -> bool:
        """Whether the node, about to lose a name, has only that; then its attributes without it are noted."""
        now = self._nodes.attributes(node, info)
        last = now.nlink <= 1 or node.is_directory
        if last:
            node.last = now._replace(nlink=0)
        return last

    @contextlib.contextmanager
    def _losing_name(self, node: Node) -> Iterator[None]:
        """Around what takes a name of the node away.

        A link group is counted afterwards: dying in between leaves it counted too high, which keeps its data, while
        counted too low it would be given up with a name still there.
        """
        orphan = node.orphan
        if node.group:
            self._owner.begin_counting(node)
        try:
            yield
        except BaseException:
            if node.orphan != orphan:
                self._owner.leave_orphans(node)
            raise
        if node.group:
            self._owner.count_lost_name(node)

    def _after_losing_name(self, node: Node, directory: Node, name: bytes, *, last: bool) -> None:
        if node.group and last:
            self._owner.end_group(node)
        if last:
            self._nodes.bury(node)
        elif not node.group:
            self._nodes.remove_name(node, directory, name)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        self._own_directory(parent)
        with self.lock:
            directory = self._living_directory(parent)
            node, info = self._existing(directory, name)
            fd = self._nodes.directory_fd(directory)
            if not node.is_directory:
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", name)
            self._loses_last_name(node, info)
            step("rmdir:before")
            if node.kind is Kind.FOLDED:
                self._check_empty(node)
                os.unlink(name, dir_fd=fd)
                self._count_folded(directory, -1)
            else:
                os.rmdir(name, dir_fd=fd)
            step("rmdir:done")
            self._nodes.bury(node)

    @staticmethod
    def _check_empty(node: Node) -> None:
        assert node.template is not None
        if node.template.index.child_count[node.entry]:
            raise OSError(errno.ENOTEMPTY, "directory not empty")

    @staticmethod
    def _count_folded(directory: Node, difference: int) -> None:
        if directory.folded_children is not None:
            directory.folded_children += difference

    # -------------------------------------------------------------------------------------------------------- renaming

    def rename(self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int = 0) -> None:
        """rename(2) with the flags of renameat2(2)."""
        if flags & ~(sys.RENAME_NOREPLACE | sys.RENAME_EXCHANGE | sys.RENAME_WHITEOUT):
            raise OSError(errno.EINVAL, "unknown rename flags")
        check_name(new_name)
        self._own_directory(old_parent)
        self._own_directory(new_parent)
        with self.lock:
            source_dir, target_dir = self._living_directory(old_parent), self._living_directory(new_parent)
            source, _ = self._existing(source_dir, old_name)
            target, info = self._nodes.find(target_dir, new_name)
            self._check_rename(source, target, source_dir, target_dir, flags)
            folded = None if target is None or flags else _must_be_real(source, target)
            if folded is None:
                self._rename(source_dir, old_name, source, target_dir, new_name, target, info, flags)
                return
        self._own_directory(folded.number)
        self.rename(old_parent, old_name, new_parent, new_name, flags)

    def _check_rename(self, source: Node, target: Node | None, source_dir: Node, target_dir: Node, flags: int) -> None:
        """What the kernel checks as well, and what only we know."""
        if target is None:
            if flags & sys.RENAME_EXCHANGE:
                raise FileNotFoundError(errno.ENOENT, "nothing to exchange with")
            self._check_not_below(source, target_dir)
            return
        if flags & sys.RENAME_NOREPLACE:
            raise FileExistsError(errno.EEXIST, "exists")
        self._check_not_below(source, target_dir)
        if flags & sys.RENAME_EXCHANGE:
            self._check_not_below(target, source_dir)
            return
        if target is source:
            return
        if source.is_directory and not target.is_directory:
            raise NotADirectoryError(errno.ENOTDIR, "can't replace by a directory")
        if target.is_directory and not source.is_directory:
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        if target.kind is Kind.FOLDED:
            self._check_empty(target)

    def _check_not_below(self, node: Node, directory: Node) -> None:
        """A directory can't be moved below itself."""
        while node.is_directory and directory is not self._nodes.root:
            if directory.number == node.number:
                raise OSError(errno.EINVAL, "can't move a directory into itself")
            directory = self._nodes.parent(directory)

    def _rename(
        self,
        source_dir: Node,
        old_name: bytes,
        source: Node,
        target_dir: Node,
        new_name: bytes,
        target: Node | None,
        target_info: os.stat_result | None,
        flags: int,
    ) -> None:
        if target is not None and target.number == source.number:
            return  # two names of one inode: rename(2) does nothing
        self._nodes.register(source)
        exchange = bool(flags & sys.RENAME_EXCHANGE)
        last = target is not None and not exchange and self._loses_last_name(target, target_info)
        if source.kind is Kind.FOLDED and target_dir is not source_dir:
            self._owner.mark_folds(target_dir)
        if exchange and target is not None and target.kind is Kind.FOLDED:
            self._owner.mark_folds(source_dir)
        self._change_ctime(source)
        if exchange and target is not None:
            self._change_ctime(target)
        source_fd, target_fd = self._nodes.directory_fd(source_dir), self._nodes.directory_fd(target_dir)
        keep = target is not None and not exchange and self._must_keep(target, target_dir, new_name, last=last)
        with self._losing_name(target) if target is not None and not exchange else contextlib.nullcontext():
            if keep and target is not None:
                self._owner.link_to_orphans(target, target_fd, new_name)
            step("rename:before")
            sys.renameat2(source_fd, old_name, target_fd, new_name, flags)
            step("rename:done")
        if source.kind is Kind.FOLDED:
            self._count_folded(source_dir, -1)
            self._count_folded(target_dir, +1)
        if target is not None and target.kind is Kind.FOLDED:
            self._count_folded(target_dir, -1)
            if exchange:
                self._count_folded(source_dir, +1)
        if target is not None and not exchange:
            self._after_losing_name(target, target_dir, new_name, last=last)
        self._moved(source, source_dir, old_name, target_dir, new_name)
        if target is not None and exchange:
            self._moved(target, target_dir, new_name, source_dir, old_name)

    def _change_ctime(self, node: Node) -> None:
        """Give a template's regular file that is renamed a change time of its own: incremental backups go by it."""
        if node.kind in (Kind.TEMPLATE, Kind.RECORD):
            assert node.template is not None
            if stat.S_ISREG(node.template.index.mode(node.entry)):
                self._owner.change_record(node, lambda record: record)

    def _moved(self, node: Node, old_directory: Node, old_name: bytes, directory: Node, name: bytes) -> None:
        if not node.group:
            self._nodes.move_name(node, old_directory, old_name, directory, name)
            self._nodes.register(node)

    # --------------------------------------------------------------------------------------------------- open files

    def open(self, number: int, flags: int, caller: Caller = ROOT) -> Handle:
        """Open a regular file with the flags of open(2); opening a template's file for writing copies it up."""
        writing = flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC
        if writing:
            self.own_file(number, 0 if flags & os.O_TRUNC else None)
        with self.lock:
            fd, own = self.data_of(number, flags)
            if own and flags & os.O_TRUNC and caller.uid:
                sys.drop_set_id(fd)
            node = self._nodes.get(number)
            self._nodes.register(node)
            return self._add_handle(node, fd, flags)

    def data_of(self, number: int, flags: int) -> tuple[int, bool]:
        """A new descriptor, which the caller closes, of the regular file that holds the node's data.

        ``flags`` are open(2)'s; also told: whether that file is the container's own. Raises ``OSError``: ``EISDIR``,
        ``EINVAL`` for what is neither file nor directory, ``ESTALE`` when ``flags`` are for writing and the node still
        has the template's data (``own_file`` comes first, and its copy has a number of its own where readers keep the
        template's).
        """
        with self.lock:
            node = self._nodes.get(number)
            if node.is_directory:
                raise IsADirectoryError(errno.EISDIR, "is a directory")
            if node.kind is Kind.OWN:
                return self._open_own(node, flags), True
            assert node.template is not None
            if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
                raise OSError(errno.ESTALE, "the copy has a node of its own")
            if not stat.S_ISREG(node.template.index.mode(node.entry)):
                raise OSError(errno.EINVAL, "not a regular file")
            return node.template.open_file(node.entry), False

    def hold(self, number: int) -> None:
        """The node is open somewhere without a handle here, as passthrough files are: keep it until ``unhold``."""
        with self.lock:
            node = self._nodes.get(number)
            node.held += 1
            self._nodes.register(node)

    def unhold(self, number: int) -> None:
        """The reverse of ``hold``."""
        with self.lock:
            node = self._nodes.registered(number)
            if node is not None and node.held:
                node.held -= 1
                self._closed(node)

    def has_handles(self, number: int) -> bool:
        """Whether the node is open by a handle."""
        node = self._nodes.registered(number)
        return node is not None and node.handles is not None

    def _add_handle(self, node: Node, fd: int, flags: int) -> Handle:
        handle = Handle(self._next_handle, node, fd, flags)
        self._next_handle += 1
        self._handles[handle.number] = handle
        if node.handles is None:
            node.handles = []
        node.handles.append(handle)
        return handle

    def handle(self, number: int) -> Handle:
        """The open file ``number``. Raises ``OSError`` ``EBADF``."""
        try:
            return self._handles[number]
        except KeyError:
            raise OSError(errno.EBADF, "no such open file") from None

    def release(self, number: int) -> None:
        """Close an open file; what was unlinked meanwhile is removed with its last one."""
        with self.lock:
            handle = self._handles.pop(number, None)
            if handle is None:
                return
            os.close(handle.fd)
            node = handle.node
            assert node.handles is not None
            node.handles.remove(handle)
            if not node.handles:
                node.handles = None
                self._closed(node)

    def _closed(self, node: Node) -> None:
        """One who had the node open has closed it."""
        if not node.is_open and (self._nodes.drop_if_unused(node) or not node.dead):
            self._discard_orphan(node)

    def sync_directory(self, number: int) -> None:
        """fsync(2) of a directory; a folded one is on the disk already."""
        with self.lock:
            node = self._directory(number)
            if node.kind is Kind.FOLDED or node.dead:
                return
            fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._nodes.directory_fd(node))
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    # -------------------------------------------------------------------------------------------------- attributes

    def setattr(self, number: int, changes: Changes, handle: int | None = None) -> Attributes:
        """Change attributes and give the new ones; a template's file is copied only if its size changes."""
        if changes.size is not None:
            self.own_file(number, changes.size)
        with self.lock:
            node = self._nodes.get(number)
            kind, dead = node.kind, node.dead
            if changes.size is not None and kind is not Kind.OWN:
                raise OSError(errno.ESTALE, "the copy has a node of its own")
            if self._is_kept(node):
                return self._set_kept(node, changes)
        if kind is Kind.FOLDED:
            self._own_directory(number)
        elif kind in (Kind.TEMPLATE, Kind.RECORD):
            if dead or not self._can_record(node, changes):
                self.own_file(number)
            else:
                self._own_place(number)
        with self.lock:
            node = self._nodes.get(number)
            if node.kind in (Kind.TEMPLATE, Kind.RECORD):
                self._owner.change_record(node, lambda record: self._changed_record(node, record, changes))
            elif not (node.dead and node.kind is Kind.FOLDED):
                self._set_own(node, changes, self._handles.get(handle) if handle is not None else None)
            return self._nodes.attributes(node)

    def file_flags(self, number: int) -> int:
        """The ``FS_*_FL`` of a regular file or directory (ioctl_iflags(2)); a folded directory has none."""
        with self.lock:
            node = self._nodes.get(number)
            if node.kind is Kind.FOLDED:
                return 0
            fd = self._open_for_flags(node)
            try:
                return sys.get_file_flags(fd)
            finally:
                os.close(fd)

    def set_file_flags(self, number: int, flags: int) -> None:
        """Set the ``FS_*_FL`` of a regular file or directory, which becomes the container's own.

        Raises ``OSError``; ``EOPNOTSUPP`` for what would keep the store from moving or removing the file.
        """
        if flags & (sys.FS_IMMUTABLE_FL | sys.FS_APPEND_FL):
            raise OSError(errno.EOPNOTSUPP, "no immutable or append-only files here")
        with self.lock:
            directory = self._nodes.get(number).is_directory
        if directory:
            self._own_directory(number)
        else:
            self.own_file(number)
        with self.lock:
            fd = self._open_for_flags(self._nodes.get(number))
            try:
                sys.set_file_flags(fd, flags)
            finally:
                os.close(fd)

    def _open_for_flags(self, node: Node) -> int:
        if node.kind is not Kind.DIRECTORY:
            return self.data_of(node.number, os.O_RDONLY)[0]
        folder = self._nodes.living_directory_fd(node)
        return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)

    def _is_kept(self, node: Node) -> bool:
        """Whether the node is only what its readers have open any more: a template's data, read by the kernel."""
        return node.dead and node.is_open and node.kind in (Kind.TEMPLATE, Kind.RECORD) and self._keeps_readers

    def _set_kept(self, node: Node, changes: Changes) -> Attributes:
        """Change attributes that nobody but who has the file open can see, so no further than in memory."""
        given = {name: value for name, value in asdict(changes).items() if value is not None}
        now = self._nodes.attributes(node)
        if "mode" in given:
            given["mode"] |= stat.S_IFMT(now.mode)
        node.last = now._replace(ctime_ns=time.time_ns(), **given)
        return node.last

    def _can_record(self, node: Node, changes: Changes) -> bool:
        """Whether a record can hold the changes: of a regular file, and a mode only where no ACL goes with it."""
        assert node.template is not None
        if not stat.S_ISREG(node.template.index.mode(node.entry)):
            return False
        with self.lock:
            return changes.mode is None or not any(name in sys.ACL_XATTRS for name in self._owner.xattrs(node))

    def _changed_record(self, node: Node, record: Record, changes: Changes) -> Record:
        mode = changes.mode
        if mode is None and (changes.uid is not None or changes.gid is not None):
            now = self._nodes.attributes(node).mode
            kept = sys.without_set_id(now)  # as chown(2) does
            mode = stat.S_IMODE(kept) if kept != now else None
        return replace(
            record,
            mode=record.mode if mode is None else mode,
            uid=record.uid if changes.uid is None else changes.uid,
            gid=record.gid if changes.gid is None else changes.gid,
            atime_ns=record.atime_ns if changes.atime_ns is None else changes.atime_ns,
            mtime_ns=record.mtime_ns if changes.mtime_ns is None else changes.mtime_ns,
        )

    def _set_own(self, node: Node, changes: Changes, handle: Handle | None) -> None:
        path = self._nodes.path(node)
        info = os.lstat(path)
        if changes.size is not None:
            self._truncate(node, changes.size, handle)
        if changes.uid is not None or changes.gid is not None:
            uid, gid = (-1 if changes.uid is None else changes.uid), (-1 if changes.gid is None else changes.gid)
            os.chown(path, uid, gid, follow_symlinks=False)
        if changes.mode is not None:
            if stat.S_ISLNK(info.st_mode):  # chmod(2) here would follow it; kernels before 6.6 do ask for this
                raise OSError(errno.EOPNOTSUPP, "a symbolic link has no mode")
            os.chmod(path, changes.mode & 0o7777)
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            info = os.lstat(path)
            atime_ns = info.st_atime_ns if changes.atime_ns is None else changes.atime_ns
            mtime_ns = info.st_mtime_ns if changes.mtime_ns is None else changes.mtime_ns
            os.utime(path, ns=(atime_ns, mtime_ns), follow_symlinks=False)

    def _truncate(self, node: Node, size: int, handle: Handle | None) -> None:
        if handle is not None and handle.flags & os.O_ACCMODE != os.O_RDONLY and handle.node is node:
            os.ftruncate(handle.fd, size)
            return
        fd = self._open_own(node, os.O_WRONLY)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def _open_own(self, node: Node, flags: int) -> int:
        """Open a regular file of the container's own; anything else, maybe a device, is refused untouched."""
        folder, name = self._nodes.location(node)
        if not stat.S_ISREG(os.lstat(name, dir_fd=folder).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return os.open(name, flags & _BACKING_FLAGS | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)

    # --------------------------------------------------------------------------------------------- extended attributes

    def getxattr(self, number: int, name: bytes) -> bytes:
        """Value of an extended attribute. Raises ``OSError`` ``ENODATA``."""
        with self.lock:
            node = self._nodes.get(number)
            if not _is_reserved(name):
                if node.kind is Kind.OWN or node.kind is Kind.DIRECTORY:
                    return os.getxattr(self._nodes.path(node), name, follow_symlinks=False)
                value = self._owner.xattrs(node).get(os.fsdecode(name)) if not node.dead else None
                if value is not None:
                    return value
                _check_xattr_name(name)
            raise OSError(errno.ENODATA, "no such attribute", name)

    def listxattr(self, number: int, caller: Caller = ROOT) -> list[bytes]:
        """Names of the extended attributes that the caller may see: ``trusted.*`` is root's."""
        with self.lock:
            node = self._nodes.get(number)
            if node.kind is Kind.OWN or node.kind is Kind.DIRECTORY:
                names = os.listxattr(self._nodes.path(node), follow_symlinks=False)
            else:
                names = list(self._owner.xattrs(node)) if not node.dead else []
            hidden = RESERVED_PREFIX.encode() if caller.uid == 0 else b"trusted."
            return [raw for raw in map(os.fsencode, names) if not raw.startswith(hidden)]

    def setxattr(self, number: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute, with the flags of setxattr(2)."""

        def change(xattrs: dict[str, bytes]) -> None:
            present = os.fsdecode(name) in xattrs
            if flags & os.XATTR_CREATE and present:
                raise FileExistsError(errno.EEXIST, "the attribute exists", name)
            if flags & os.XATTR_REPLACE and not present:
                raise OSError(errno.ENODATA, "no such attribute", name)
            xattrs[os.fsdecode(name)] = value

        self._change_xattrs(
            number, name, change, lambda path: os.setxattr(path, name, value, flags, follow_symlinks=False)
        )

    def removexattr(self, number: int, name: bytes) -> None:
        """Remove an extended attribute. Raises ``OSError`` ``ENODATA``."""

        def change(xattrs: dict[str, bytes]) -> None:
            if xattrs.pop(os.fsdecode(name), None) is None:
                raise OSError(errno.ENODATA, "no such attribute", name)

        self._change_xattrs(number, name, change, lambda path: os.removexattr(path, name, follow_symlinks=False))

    def _change_xattrs(
        self,
        number: int,
        name: bytes,
        change: Callable[[dict[str, bytes]], None],
        change_own: Callable[[bytes], None],
    ) -> None:
        _check_xattr_name(name)
        with self.lock:
            node = self._nodes.get(number)
            if node.kind in (Kind.TEMPLATE, Kind.RECORD):
                change(dict(self._owner.xattrs(node)))  # what fails changes nothing
        if node.kind is Kind.FOLDED:
            self._own_directory(number)
        elif node.kind in (Kind.TEMPLATE, Kind.RECORD):
            if self._recorded_xattrs(number, name, change):
                return
            self.own_file(number)
        with self.lock:
            change_own(self._nodes.path(self._nodes.get(number)))

    def _recorded_xattrs(self, number: int, name: bytes, change: Callable[[dict[str, bytes]], None]) -> bool:
        """Keep the change in a record, if it fits there; ACLs don't, they go with the mode."""
        self._own_place(number)
        with self.lock:
            node = self._nodes.get(number)
            if node.dead or node.kind not in (Kind.TEMPLATE, Kind.RECORD) or os.fsdecode(name) in sys.ACL_XATTRS:
                return False
            assert node.template is not None
            if not stat.S_ISREG(node.template.index.mode(node.entry)):
                return False
            xattrs = dict(self._owner.xattrs(node))
            change(xattrs)
            try:
                self._owner.change_record(node, lambda record: replace(record, own_xattrs=True), xattrs)
            except OSError as error:
                if not no_space(error):
                    raise
                return False
            return True


def _check_xattr_name(name: bytes) -> None:
    """Refuse what no file system of Linux takes (xattr(7)), and the store's own names."""
    if _is_reserved(name):
        raise PermissionError(errno.EPERM, "a reserved attribute", name)
    sys.check_xattr_namespace(name)


def _is_reserved(name: bytes) -> bool:
    return name.startswith(RESERVED_PREFIX.encode())


def _must_be_real(source: Node, target: Node) -> Node | None:
    """Which of two directories has to be unfolded so that ``source`` can replace ``target``, if one has.

    A folded directory lies in the private area as a link, which can't replace a real one or be replaced by one.
    """
    if source.kind is Kind.FOLDED and target.kind is Kind.DIRECTORY:
        return source
    return target if source.kind is Kind.DIRECTORY and target.kind is Kind.FOLDED else None


def _given_group(folder: int) -> int | None:
    """The group that a directory gives to what is made in it, if it does."""
    info = os.fstat(folder)
    return info.st_gid if info.st_mode & stat.S_ISGID else None


def _give_to(folder: int, name: bytes, uid: int, gid: int) -> None:
    """Set the owner of the new ``name`` and keep its mode, from which chown(2) takes bits."""
    mode = os.lstat(name, dir_fd=folder).st_mode
    os.chown(name, uid, gid, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISLNK(mode):
        _add_mode(folder, name, mode & (stat.S_ISUID | stat.S_ISGID))


def _add_mode(folder: int, name: bytes, bits: int) -> None:
    mode = stat.S_IMODE(os.lstat(name, dir_fd=folder).st_mode)
    if bits & ~mode:
        os.chmod(name, mode | bits, dir_fd=folder)


@contextlib.contextmanager
def _making_file(mode: int, flags: int) -> Iterator[Callable[[int, bytes], int]]:
    """What makes and opens a regular file with the flags of open(2); it is closed again if the block fails."""
    making = flags & _BACKING_FLAGS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.ExitStack() as on_failure:

        def make(fd: int, name: bytes) -> int:
            backing = os.open(name, making, mode & 0o7777, dir_fd=fd)
            on_failure.callback(os.close, backing)
            return backing

        yield make
        on_failure.pop_all()


@contextlib.contextmanager
def _masked(umask: int) -> Iterator[None]:
    """Make something with a program's umask, which the file system applies unless a default ACL decides instead.

    The mask is the process's; all else that is made here gets its mode by chmod(2) afterwards.
    """
    os.umask(umask)
    try:
        yield
    finally:
        os.umask(0)
