"""An entry's attributes: owner, mode, times and extended attributes, read from a source and put on a new entry.

Rule: everything is kept but what belongs to the store (``trusted.vzfs.*``) or to overlayfs (``trusted.overlay.*``,
which would make a kernel overlay read the template as something else). ACLs are the two ``system.posix_acl_*``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from vzfs import linux
from vzfs.store.sources.errors import XattrError

ACL_ACCESS = b"system.posix_acl_access"
ACL_DEFAULT = b"system.posix_acl_default"

_RESERVED = (b"trusted.vzfs.", b"trusted.overlay.")
_NAMESPACES = (b"user.", b"trusted.", b"security.")


@dataclass(frozen=True, slots=True)
class Attributes:
    """``mode`` has the 12 permission bits only; times are ns since the epoch; ``xattrs`` has binary values."""

    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    xattrs: Mapping[bytes, bytes]


def is_reserved(name: bytes) -> bool:
    """Whether an extended attribute of this name must not enter a template."""
    return name.startswith(_RESERVED)


def is_known(name: bytes) -> bool:
    """Whether a template can hold extended attributes of this name at all."""
    if name in (ACL_ACCESS, ACL_DEFAULT):
        return True
    return name.startswith(_NAMESPACES) and not name.endswith(b".") and b"\0" not in name


def from_stat(info: os.stat_result, xattrs: Mapping[bytes, bytes]) -> Attributes:
    """The attributes of an entry whose ``stat`` and extended attributes were read."""
    return Attributes(info.st_mode & 0o7777, info.st_uid, info.st_gid, info.st_atime_ns, info.st_mtime_ns, xattrs)


def apply_to_fd(fd: int, attributes: Attributes) -> None:
    """Give them to the open file or directory ``fd``; its data must be complete, for writing would change the times.

    The order matters: chown clears set-id bits and file capabilities, so both come after it. Raises ``OSError``.
    """
    os.fchown(fd, attributes.uid, attributes.gid)
    os.fchmod(fd, attributes.mode)
    for name, value in attributes.xattrs.items():
        try:
            os.setxattr(fd, name, value)
        except OSError as error:
            raise XattrError(error, name, len(value)) from error
    os.utime(fd, ns=(attributes.atime_ns, attributes.mtime_ns))


def apply_to_node(dir_fd: int, name: bytes, attributes: Attributes) -> None:
    """Give them to the device or FIFO that was just made as ``name`` in ``dir_fd``."""
    os.chown(name, attributes.uid, attributes.gid, dir_fd=dir_fd, follow_symlinks=False)
    os.chmod(name, attributes.mode, dir_fd=dir_fd)
    _finish_unopened(dir_fd, name, attributes)


def apply_to_symlink(dir_fd: int, name: bytes, attributes: Attributes) -> None:
    """Give them to the symbolic link ``name`` in ``dir_fd``, which has no mode of its own."""
    os.chown(name, attributes.uid, attributes.gid, dir_fd=dir_fd, follow_symlinks=False)
    _finish_unopened(dir_fd, name, attributes)


def _finish_unopened(dir_fd: int, name: bytes, attributes: Attributes) -> None:
    for xattr, value in attributes.xattrs.items():
        try:
            os.setxattr(linux.entry_path(dir_fd, name), xattr, value, follow_symlinks=False)
        except OSError as error:
            raise XattrError(error, xattr, len(value)) from error
    os.utime(name, ns=(attributes.atime_ns, attributes.mtime_ns), dir_fd=dir_fd, follow_symlinks=False)


def remove_acls(fd: int) -> None:
    """Take away the ACLs that the directory ``fd`` got from its parent, lest everything made in it inherits them."""
    for name in os.listxattr(fd):
        if os.fsencode(name) in (ACL_ACCESS, ACL_DEFAULT):
            os.removexattr(fd, name)
