"""Open files, attributes and extended attributes of a container's nodes.

See ``vzfs.tree.tree`` for the rules.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, replace

from vzfs.store import sys
from vzfs.store.acl import is_minimal, permissions, with_permissions
from vzfs.store.index import Attributes
from vzfs.store.layout import RESERVED_PREFIX
from vzfs.store.record import Record
from vzfs.tree.core import ROOT, Caller, Changes, Core
from vzfs.tree.node import Handle, Kind, Node, Place, refuse_damaged
from vzfs.tree.own import no_space

BACKING_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC
"""Flags of a program's open(2) that are passed on; the kernel itself deals with O_APPEND and O_DIRECT."""


ACCESS_ACL = sys.ACL_XATTRS[0]


class Files(Core):
    """What is done to a node itself, whatever its names."""

    def close(self) -> None:
        """Close all files and descriptors; unlinked ones are gone."""
        with self.lock:
            for number in list(self._handles):
                self.release(number)
            if not self._read_only:
                self._area.clear_stage()
                self._area.clear_orphans()
            self._pins.close()
            self._nodes.close()
            self._area.close()
            self._view.close()

    # --------------------------------------------------------------------------------------------------- open files

    def open(self, number: int, flags: int, caller: Caller = ROOT) -> Handle:
        """Open a regular file with the flags of open(2); opening a template's file for writing copies it up."""
        self._check_room(caller)
        writing = flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC
        if writing:
            self.own_file(number, 0 if flags & os.O_TRUNC else None)
        with self.lock:
            fd, own = self.data_of(number, flags)
            if own and flags & os.O_TRUNC and caller.uid:
                sys.drop_set_id(fd)
            node = self._nodes.get(number)
            self._nodes.register(node)
            return self._add_handle(node, fd, flags, caller)

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
            refuse_damaged(node)
            if node.kind is Kind.OWN:
                return self._open_own(node, flags), True
            assert node.template is not None
            if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
                raise OSError(errno.ESTALE, "the copy has a node of its own")
            if not stat.S_ISREG(node.template.index.mode(node.entry)):
                raise OSError(errno.EINVAL, "not a regular file")
            return node.template.open_file(node.entry), False

    def is_served(self, number: int) -> bool:
        """Whether the node is a small regular file of the template, unchanged: its data is asked for by READ, never
        passed through, so that it never has to be split.
        """
        with self.lock:
            node = self._nodes.get(number)
            if node.kind is not Kind.TEMPLATE and node.kind is not Kind.RECORD:
                return False
            assert node.template is not None
            regular = stat.S_ISREG(node.template.index.mode(node.entry))
            return regular and not self._nodes.is_passed(node.template, node.entry)

    def keep(self, number: int) -> Node:
        """Keep the node until ``let_go``, for who counts in it, under the lock, how often it is open."""
        with self.lock:
            node = self._nodes.get(number)
            node.kept = True
            self._nodes.register(node)
            return node

    def let_go(self, node: Node) -> None:
        """The reverse of ``keep``."""
        with self.lock:
            node.kept = False
            self._closed(node)

    def _check_room(self, caller: Caller) -> None:
        """Refuse one more open file with ``ENFILE`` before descriptors run out, first to the user who has the most.

        Root gets some that nobody else gets, and the tree keeps some for its own work.
        """
        used = len(self._handles)
        if used < self._scarce_from:
            return
        with self.lock:
            most = max((count for uid, count in self._holders.items() if uid), default=0)
            if used >= self._most_handles or (caller.uid and self._holders[caller.uid] >= most):
                raise OSError(errno.ENFILE, f"{used} files are open in the container")

    def _add_handle(self, node: Node, fd: int, flags: int, caller: Caller) -> Handle:
        handle = Handle(self._next_handle, node, fd, flags, caller.uid)
        self._next_handle += 1
        self._holders[caller.uid] += 1
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
            self._holders[handle.uid] -= 1
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
            refuse_damaged(node)
            kind, dead = node.kind, node.dead
            if changes.size is not None and kind is not Kind.OWN:
                raise OSError(errno.ESTALE, "the copy has a node of its own")
            if self._is_kept(node):
                return self._set_kept(node, changes)
        if kind is Kind.FOLDED:
            self._own_directory(number)
        elif kind in (Kind.TEMPLATE, Kind.RECORD):
            if dead or not _can_record(node):
                self.own_file(number)
            else:
                self._own_place(number)
        with self.lock:
            node = self._nodes.get(number)
            if node.kind in (Kind.TEMPLATE, Kind.RECORD):
                self._record_changes(node, changes)
            elif not (node.dead and node.kind is Kind.FOLDED):
                self._set_own(node, changes, self._handles.get(handle) if handle is not None else None)
            return self._nodes.attributes(node)

    def _record_changes(self, node: Node, changes: Changes) -> None:
        """Keep changed attributes of a template's regular file in its record; an ACL changes with the mode."""
        xattrs = None
        if changes.mode is not None:
            given = self._owner.xattrs(node)
            acl = given.get(ACCESS_ACL)
            if acl is not None:
                xattrs = {**given, ACCESS_ACL: with_permissions(acl, changes.mode)}

        def change(record: Record) -> Record:
            record = self._changed_record(node, record, changes)
            return record if xattrs is None else replace(record, own_xattrs=True)

        self._owner.change_record(node, change, xattrs)

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

        Raises ``OSError``; ``EOPNOTSUPP`` for what an owner may not change on ext4 either, such as what would keep the
        store from moving or removing the file, charge another project or journal its data.
        """
        with self.lock:
            node = self._nodes.get(number)
            refuse_damaged(node)
            directory = node.is_directory
            refused = (flags ^ self.file_flags(number)) & ~sys.FS_OWNERS_FL
            if refused:
                raise OSError(errno.EOPNOTSUPP, f"file attributes {refused:#x} can't be changed here")
            if node.passed and node.kind in (Kind.TEMPLATE, Kind.RECORD):
                raise OSError(errno.EOPNOTSUPP, "who asks has the template's file open, which would not be the copy")
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

    def _set_kept(self, node: Node, changes: Changes) -> Attributes:
        """Change attributes that nobody but who has the file open can see, so no further than in memory."""
        given = {name: value for name, value in asdict(changes).items() if value is not None}
        now = self._nodes.attributes(node)
        if "mode" in given:
            given["mode"] |= stat.S_IFMT(now.mode)
        node.last = now._replace(ctime_ns=time.time_ns(), **given)
        return node.last

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
        if changes.size is not None:
            self._truncate(node, changes.size, handle)
        folder, name, follow = self._nodes.place_of(node)
        if changes.uid is not None or changes.gid is not None:
            uid, gid = (-1 if changes.uid is None else changes.uid), (-1 if changes.gid is None else changes.gid)
            os.chown(name, uid, gid, dir_fd=folder, follow_symlinks=follow)
        if changes.mode is not None:
            # chmod(2) would follow a symbolic link; kernels before 6.6 do ask for this
            if not node.is_directory and stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=follow).st_mode):
                raise OSError(errno.EOPNOTSUPP, "a symbolic link has no mode")
            os.chmod(name, changes.mode & 0o7777, dir_fd=folder)
        atime_ns, mtime_ns = changes.atime_ns, changes.mtime_ns
        if atime_ns is not None or mtime_ns is not None:
            if atime_ns is None or mtime_ns is None:
                info = os.stat(name, dir_fd=folder, follow_symlinks=follow)
                atime_ns = info.st_atime_ns if atime_ns is None else atime_ns
                mtime_ns = info.st_mtime_ns if mtime_ns is None else mtime_ns
            os.utime(name, ns=(atime_ns, mtime_ns), dir_fd=folder, follow_symlinks=follow)

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
        folder, name, follow = self._nodes.place_of(node)
        if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=follow).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        last = 0 if follow else os.O_NOFOLLOW
        return os.open(name, flags & BACKING_FLAGS | last | os.O_CLOEXEC, dir_fd=folder)

    # --------------------------------------------------------------------------------------------- extended attributes

    def getxattr(self, number: int, name: bytes) -> bytes:
        """Value of an extended attribute. Raises ``OSError`` ``ENODATA``."""
        with self.lock:
            node = self._nodes.get(number)
            if not _is_reserved(name):
                if node.kind is Kind.OWN or node.kind is Kind.DIRECTORY:
                    place = self._nodes.place_of(node)
                    return os.getxattr(place.path, name, follow_symlinks=place.follow)
                value = self._shown_xattrs(node).get(os.fsdecode(name))
                if value is not None:
                    return value
                _check_xattr_name(name)
            raise OSError(errno.ENODATA, "no such attribute", name)

    def listxattr(self, number: int, caller: Caller = ROOT) -> list[bytes]:
        """Names of the extended attributes that the caller may see: ``trusted.*`` is root's."""
        with self.lock:
            node = self._nodes.get(number)
            if node.kind is Kind.OWN or node.kind is Kind.DIRECTORY:
                place = self._nodes.place_of(node)
                names = os.listxattr(place.path, follow_symlinks=place.follow)
            else:
                names = list(self._shown_xattrs(node))
            hidden = RESERVED_PREFIX.encode() if caller.uid == 0 else b"trusted."
            return [raw for raw in map(os.fsencode, names) if not raw.startswith(hidden)]

    def _shown_xattrs(self, node: Node) -> dict[str, bytes]:
        """Of a node that has no object of its own in the private area."""
        return {} if node.dead or node.kind is Kind.DAMAGED else self._owner.xattrs(node)

    def setxattr(self, number: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute, with the flags of setxattr(2)."""

        def change(xattrs: dict[str, bytes]) -> int | None:
            key = os.fsdecode(name)
            if flags & os.XATTR_CREATE and key in xattrs:
                raise FileExistsError(errno.EEXIST, "the attribute exists", name)
            if flags & os.XATTR_REPLACE and key not in xattrs:
                raise OSError(errno.ENODATA, "no such attribute", name)
            if key == sys.ACL_XATTRS[1]:
                raise PermissionError(errno.EACCES, "only a directory has a default ACL", name)
            mode = permissions(value) if key == ACCESS_ACL else None
            if key == ACCESS_ACL and is_minimal(value):
                xattrs.pop(key, None)  # the mode says it all
            else:
                xattrs[key] = value
            return mode

        self._change_xattrs(
            number,
            name,
            change,
            lambda place: os.setxattr(place.path, name, value, flags, follow_symlinks=place.follow),
        )

    def removexattr(self, number: int, name: bytes) -> None:
        """Remove an extended attribute. Raises ``OSError`` ``ENODATA``; not for an ACL, as on ext4."""

        def change(xattrs: dict[str, bytes]) -> None:
            key = os.fsdecode(name)
            if xattrs.pop(key, None) is None and key not in sys.ACL_XATTRS:
                raise OSError(errno.ENODATA, "no such attribute", name)

        self._change_xattrs(
            number, name, change, lambda place: os.removexattr(place.path, name, follow_symlinks=place.follow)
        )

    def _change_xattrs(
        self,
        number: int,
        name: bytes,
        change: Callable[[dict[str, bytes]], int | None],
        change_own: Callable[[Place], None],
    ) -> None:
        _check_xattr_name(name)
        with self.lock:
            node = self._nodes.get(number)
            refuse_damaged(node)
            recorded = node.kind in (Kind.TEMPLATE, Kind.RECORD) and _can_record(node)
            if recorded:
                change(dict(self._owner.xattrs(node)))  # what fails changes nothing
        if node.kind is Kind.FOLDED:
            self._own_directory(number)
        elif node.kind in (Kind.TEMPLATE, Kind.RECORD):
            if recorded and self._recorded_xattrs(number, change):
                return
            self.own_file(number)
        with self.lock:
            change_own(self._nodes.place_of(self._nodes.get(number)))

    def _recorded_xattrs(self, number: int, change: Callable[[dict[str, bytes]], int | None]) -> bool:
        """Keep the change in a record, if it fits there; ``change`` gives the permission bits that go with it."""
        self._own_place(number)
        with self.lock:
            node = self._nodes.get(number)
            if node.dead or node.kind not in (Kind.TEMPLATE, Kind.RECORD):
                return False
            xattrs = dict(self._owner.xattrs(node))
            bits = change(xattrs)
            mode = None if bits is None else stat.S_IMODE(self._nodes.attributes(node).mode) & ~0o777 | bits

            def changed(record: Record) -> Record:
                return replace(record, own_xattrs=True, mode=record.mode if mode is None else mode)

            try:
                self._owner.change_record(node, changed, xattrs)
            except OSError as error:
                if not no_space(error):
                    raise
                return False
            return True


def _can_record(node: Node) -> bool:
    """Whether a record can hold changed attributes of the node: those of a regular file."""
    assert node.template is not None
    return stat.S_ISREG(node.template.index.mode(node.entry))


def _check_xattr_name(name: bytes) -> None:
    """Refuse what no file system of Linux takes (xattr(7)), and the store's own names."""
    if _is_reserved(name):
        raise PermissionError(errno.EPERM, "a reserved attribute", name)
    sys.check_xattr_namespace(name)


def _is_reserved(name: bytes) -> bool:
    return name.startswith(RESERVED_PREFIX.encode())
