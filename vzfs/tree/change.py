"""chmod(2), chown(2), truncate(2), utimensat(2): what SETATTR changes.

Rule: a template's regular file keeps changed attributes in a record; only another size needs a copy of its data.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace

from vzfs import linux
from vzfs.store.acl import with_permissions
from vzfs.store.index import Attributes
from vzfs.store.record import Record
from vzfs.tree.attributes import AttributeReader
from vzfs.tree.become.directory import Directories
from vzfs.tree.become.file import Copies
from vzfs.tree.become.record import Records, can_record
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Handle, Kind, Node, refuse_damaged
from vzfs.tree.open import OpenFiles


@dataclass(frozen=True, slots=True)
class Changes:
    """Attributes to set, ``None`` leaving one alone: permission bits, ids, bytes, nanoseconds."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class Changing:
    """Changes attributes of the nodes of one mount."""

    def __init__(
        self,
        lock: AbstractContextManager[object],
        lookup: Lookup,
        attributes: AttributeReader,
        records: Records,
        directories: Directories,
        copying: Copies,
        opening: OpenFiles,
    ) -> None:
        self._lock = lock
        self._lookup = lookup
        self._attributes = attributes
        self._records = records
        self._directories = directories
        self._copying = copying
        self._opening = opening

    def setattr(self, number: int, changes: Changes, handle: int | None = None) -> Attributes:
        """Change attributes and give the new ones; a template's file is copied only if its size changes."""
        if changes.size is not None:
            self._copying.own(number, changes.size)
        with self._lock:
            node = self._lookup.get(number)
            refuse_damaged(node)
            kind, dead = node.kind, node.dead
            if changes.size is not None and kind is not Kind.OWN:
                raise OSError(errno.ESTALE, "the copy has a node of its own")
            if self._copying.is_kept(node):
                return self._set_kept(node, changes)
        if kind is Kind.FOLDED:
            self._directories.own(number)
        elif kind in (Kind.TEMPLATE, Kind.RECORD):
            if dead or not can_record(node):
                self._copying.own(number)
            else:
                self._directories.own_place(number)
        with self._lock:
            node = self._lookup.get(number)
            if node.kind in (Kind.TEMPLATE, Kind.RECORD):
                self._record_changes(node, changes)
            elif not (node.dead and node.kind is Kind.FOLDED):
                self._set_own(node, changes, self._opening.handles.get(handle) if handle is not None else None)
            return self._attributes.of(node)

    def _record_changes(self, node: Node, changes: Changes) -> None:
        """Keep changed attributes of a template's regular file in its record; an ACL changes with the mode."""
        xattrs = None
        if changes.mode is not None:
            given = self._attributes.xattrs_of(node)
            acl = given.get(linux.ACCESS_ACL)
            if acl is not None:
                xattrs = {**given, linux.ACCESS_ACL: with_permissions(acl, changes.mode)}

        def change(record: Record) -> Record:
            record = self._changed_record(node, record, changes)
            return record if xattrs is None else replace(record, own_xattrs=True)

        self._records.change(node, change, xattrs)

    def _set_kept(self, node: Node, changes: Changes) -> Attributes:
        """Change attributes that nobody but who has the file open can see, so no further than in memory."""
        given = {name: value for name, value in asdict(changes).items() if value is not None}
        now = self._attributes.of(node)
        if "mode" in given:
            given["mode"] |= stat.S_IFMT(now.mode)
        node.last = now._replace(ctime_ns=time.time_ns(), **given)
        return node.last

    def _changed_record(self, node: Node, record: Record, changes: Changes) -> Record:
        mode = changes.mode
        if mode is None and (changes.uid is not None or changes.gid is not None):
            now = self._attributes.of(node).mode
            kept = linux.without_set_id(now)  # as chown(2) does
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
        folder, name, follow = self._lookup.place_of(node)
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
        fd = self._opening.open_own(node, os.O_WRONLY)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)
