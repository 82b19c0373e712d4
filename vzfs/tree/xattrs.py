"""Extended attributes, POSIX ACLs among them.

Rules:
- ``trusted.vzfs.*`` is the store's: a container neither sees nor sets it.
- A template's regular file keeps changed ones in its record; an ACL goes with the mode (``vzfs.store.acl``).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from vzfs import linux
from vzfs.store.acl import is_minimal, permissions
from vzfs.store.record import Record
from vzfs.store.xattrs import RESERVED_PREFIX
from vzfs.tree.attributes import AttributeReader
from vzfs.tree.become.directory import Directories
from vzfs.tree.become.file import Copies
from vzfs.tree.become.record import Records, can_record, no_space
from vzfs.tree.caller import ROOT, Caller
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Kind, Node, Place, refuse_damaged


class ExtendedAttributes:
    """Of the nodes of one mount."""

    def __init__(
        self,
        lock: AbstractContextManager[object],
        lookup: Lookup,
        attributes: AttributeReader,
        records: Records,
        directories: Directories,
        copying: Copies,
    ) -> None:
        self._lock = lock
        self._lookup = lookup
        self._attributes = attributes
        self._records = records
        self._directories = directories
        self._copying = copying

    def get(self, number: int, name: bytes) -> bytes:
        """Value of an extended attribute. Raises ``OSError`` ``ENODATA``."""
        with self._lock:
            node = self._lookup.get(number)
            if not _is_reserved(name):
                if node.kind is Kind.OWN or node.kind is Kind.DIRECTORY:
                    place = self._lookup.place_of(node)
                    return os.getxattr(place.path, name, follow_symlinks=place.follow)
                value = self._shown(node).get(os.fsdecode(name))
                if value is not None:
                    return value
                _check_xattr_name(name)
            raise OSError(errno.ENODATA, "no such attribute", name)

    def list(self, number: int, caller: Caller = ROOT) -> list[bytes]:
        """Names of the extended attributes that the caller may see: ``trusted.*`` is root's."""
        with self._lock:
            node = self._lookup.get(number)
            if node.kind is Kind.OWN or node.kind is Kind.DIRECTORY:
                place = self._lookup.place_of(node)
                names = os.listxattr(place.path, follow_symlinks=place.follow)
            else:
                names = list(self._shown(node))
            hidden = RESERVED_PREFIX.encode() if caller.uid == 0 else b"trusted."
            return [raw for raw in map(os.fsencode, names) if not raw.startswith(hidden)]

    def _shown(self, node: Node) -> dict[str, bytes]:
        """Of a node that has no object of its own in the private area."""
        return {} if node.dead or node.kind is Kind.DAMAGED else self._attributes.xattrs_of(node)

    def set(self, number: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute, with the flags of setxattr(2)."""

        def change(xattrs: dict[str, bytes]) -> int | None:
            key = os.fsdecode(name)
            if flags & os.XATTR_CREATE and key in xattrs:
                raise FileExistsError(errno.EEXIST, "the attribute exists", name)
            if flags & os.XATTR_REPLACE and key not in xattrs:
                raise OSError(errno.ENODATA, "no such attribute", name)
            if key == linux.DEFAULT_ACL:
                raise PermissionError(errno.EACCES, "only a directory has a default ACL", name)
            mode = permissions(value) if key == linux.ACCESS_ACL else None
            if key == linux.ACCESS_ACL and is_minimal(value):
                xattrs.pop(key, None)  # the mode says it all
            else:
                xattrs[key] = value
            return mode

        self._change(
            number,
            name,
            change,
            lambda place: os.setxattr(place.path, name, value, flags, follow_symlinks=place.follow),
        )

    def remove(self, number: int, name: bytes) -> None:
        """Remove an extended attribute. Raises ``OSError`` ``ENODATA``; not for an ACL, as on ext4."""

        def change(xattrs: dict[str, bytes]) -> None:
            key = os.fsdecode(name)
            if xattrs.pop(key, None) is None and key not in linux.ACL_XATTRS:
                raise OSError(errno.ENODATA, "no such attribute", name)

        self._change(number, name, change, lambda place: os.removexattr(place.path, name, follow_symlinks=place.follow))

    def _change(
        self,
        number: int,
        name: bytes,
        change: Callable[[dict[str, bytes]], int | None],
        change_own: Callable[[Place], None],
    ) -> None:
        _check_xattr_name(name)
        with self._lock:
            node = self._lookup.get(number)
            refuse_damaged(node)
            recorded = node.kind in (Kind.TEMPLATE, Kind.RECORD) and can_record(node)
            if recorded:
                change(dict(self._attributes.xattrs_of(node)))  # what fails changes nothing
        if node.kind is Kind.FOLDED:
            self._directories.own(number)
        elif node.kind in (Kind.TEMPLATE, Kind.RECORD):
            if recorded and self._recorded(number, change):
                return
            self._copying.own(number)
        with self._lock:
            change_own(self._lookup.place_of(self._lookup.get(number)))

    def _recorded(self, number: int, change: Callable[[dict[str, bytes]], int | None]) -> bool:
        """Keep the change in a record, if it fits there; ``change`` gives the permission bits that go with it."""
        self._directories.own_place(number)
        with self._lock:
            node = self._lookup.get(number)
            if node.dead or node.kind not in (Kind.TEMPLATE, Kind.RECORD):
                return False
            xattrs = dict(self._attributes.xattrs_of(node))
            bits = change(xattrs)
            mode = None if bits is None else stat.S_IMODE(self._attributes.of(node).mode) & ~0o777 | bits

            def changed(record: Record) -> Record:
                return replace(record, own_xattrs=True, mode=record.mode if mode is None else mode)

            try:
                self._records.change(node, changed, xattrs)
            except OSError as error:
                if not no_space(error):
                    raise
                return False
            return True


def _check_xattr_name(name: bytes) -> None:
    """Refuse what no file system of Linux takes (xattr(7)), and the store's own names."""
    if _is_reserved(name):
        raise PermissionError(errno.EPERM, "a reserved attribute", name)
    linux.check_xattr_namespace(name)


def _is_reserved(name: bytes) -> bool:
    return name.startswith(RESERVED_PREFIX.encode())
