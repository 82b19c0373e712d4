"""Making files, directories, links and devices, with a name or without.

Rule: no name ever has another owner than who made it: what another than this process's user makes is made on the stage.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from vzfs import linux
from vzfs.store.faults import step
from vzfs.store.ownlink import make_own_link
from vzfs.tree.area import PrivateArea
from vzfs.tree.attributes import AttributeReader
from vzfs.tree.become.directory import Directories
from vzfs.tree.become.stage import Stage
from vzfs.tree.caller import Caller
from vzfs.tree.lookup import Lookup, check_name
from vzfs.tree.node import Entry, Handle, Kind, Node
from vzfs.tree.open import BACKING_FLAGS, OpenFiles
from vzfs.tree.orphans import Orphans
from vzfs.tree.pins import Pins
from vzfs.tree.table import Table

Made = TypeVar("Made")


class Making:
    """Makes what is new in one mount."""

    def __init__(
        self,
        area: PrivateArea,
        lock: AbstractContextManager[object],
        pins: Pins,
        table: Table,
        lookup: Lookup,
        attributes: AttributeReader,
        stage: Stage,
        directories: Directories,
        orphans: Orphans,
        opening: OpenFiles,
    ) -> None:
        self._area = area
        self._lock = lock
        self._pins = pins
        self._table = table
        self._lookup = lookup
        self._attributes = attributes
        self._stage = stage
        self._directories = directories
        self._orphans = orphans
        self._opening = opening

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
        self._directories.own(parent)
        with self._lock:
            return self._make_in(self._lookup.living_directory(parent), name, caller, make)

    def _make_in(
        self, directory: Node, name: bytes, caller: Caller, make: Callable[[int, bytes], Made]
    ) -> tuple[Made, Entry]:
        """Let ``make`` make ``name`` as the caller's own, and give what it gave; ``name`` never has another owner.

        The umask is the process's, and applied by the file system unless a default ACL decides instead; all else that
        is made here gets its mode by chmod(2) afterwards.
        """
        fd = self._lookup.directory_fd(directory)
        gid = _given_group(fd)
        rooted = caller.uid == os.geteuid() and (gid is not None or caller.gid == os.getegid())
        if rooted and not self._pins.lost:
            os.umask(caller.umask)
            try:
                made = make(fd, name)
            finally:
                os.umask(0)
            step("make:made")
            return made, self._adopt(directory, fd, name)
        with self._made_on_stage(fd, gid, caller, make) as (made, stage, staged):
            linux.renameat2(stage, staged, fd, name, linux.RENAME_NOREPLACE)
            step("make:named")
        return made, self._adopt(directory, fd, name)

    @contextlib.contextmanager
    def _made_on_stage(
        self, fd: int, gid: int | None, caller: Caller, make: Callable[[int, bytes], Made]
    ) -> Iterator[tuple[Made, int, bytes]]:
        """What ``make`` made for the directory ``fd``, which gives it the group ``gid``; removed if the block fails."""
        with self._stage.folder_like(fd) as stage:
            staged = self._area.stage_name()
            try:
                os.umask(caller.umask)
                try:
                    made = make(stage, staged)
                    while self._stage.stands_in(stage, staged):
                        made = make(stage, staged)
                finally:
                    os.umask(0)
                step("make:made")
                _give_to(stage, staged, caller.uid, caller.gid if gid is None else gid)
                if gid is not None and stat.S_ISDIR(os.lstat(staged, dir_fd=stage).st_mode):
                    _add_mode(stage, staged, stat.S_ISGID)
                yield made, stage, staged
            except BaseException:
                linux.remove_tree(stage, staged)
                raise

    def _adopt(self, directory: Node, fd: int, name: bytes) -> Entry:
        """Give the just made ``name`` a node; if that fails, it is unmade."""
        try:
            info = os.lstat(name, dir_fd=fd)
            node = self._lookup.adopt(directory, name, info)
            node.lookups += 1
            return self._attributes.entry(node, info)
        except BaseException:
            linux.remove_tree(fd, name)
            raise

    def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Handle, Entry]:
        """Make a regular file and open it, or open it if it is there and ``flags`` don't have ``O_EXCL``."""
        check_name(name)
        self._opening.check_room(caller)
        self._directories.own(parent)
        while True:
            with self._lock:
                directory = self._lookup.living_directory(parent)
                present = None if flags & os.O_EXCL else self._lookup.child(directory, name)
                if present is None:
                    return self._create(directory, name, mode, flags, caller)
            # Not under the lock: it may be waiting for whoever is copying the file.
            handle = self._opening.open(present.number, flags, caller)
            with self._lock:
                node = self._lookup.child(self._lookup.directory(parent), name)
                if node is handle.node:
                    node.lookups += 1
                    return handle, self._attributes.entry(node)
            self._opening.release(handle.number)  # it is another file by now

    def _create(self, directory: Node, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Handle, Entry]:
        with _NewFile(mode, flags) as make:
            backing, entry = self._make_in(directory, name, caller, make)
        return self._opening.add_handle(self._lookup.get(entry.number), backing, flags, caller), entry

    def tmpfile(self, parent: int, mode: int, flags: int, caller: Caller) -> tuple[Handle, Entry]:
        """Make a regular file without a name and open it (``O_TMPFILE``); ``link`` may give it one."""
        self._opening.check_room(caller)
        self._directories.own(parent)
        with self._lock:
            fd = self._lookup.directory_fd(self._lookup.living_directory(parent))
            with (
                _NewFile(mode, flags) as make,
                self._made_on_stage(fd, _given_group(fd), caller, make) as (backing, stage, staged),
            ):
                node = self._table.new_own(Kind.OWN, os.fstat(backing).st_ino, linux.generation_of(backing, b""))
                self._orphans.move(node, stage, staged)
            node.dead = True
            node.lookups += 1
            node.last = self._attributes.of(node)
            self._table.register(node)
            return self._opening.add_handle(node, backing, flags, caller), self._attributes.entry(node)


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


class _NewFile:
    """Makes and opens a regular file with the flags of open(2), when called; called again, it closes the one of before.

    It is closed again if the block fails.
    """

    __slots__ = ("_fd", "_flags", "_mode")

    def __init__(self, mode: int, flags: int) -> None:
        self._flags = flags & BACKING_FLAGS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._mode = mode & 0o7777
        self._fd = -1

    def __call__(self, folder: int, name: bytes) -> int:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._fd = os.open(name, self._flags, self._mode, dir_fd=folder)
        return self._fd

    def __enter__(self) -> _NewFile:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if failed is not None and self._fd >= 0:
            os.close(self._fd)
