"""From a failed system call on one entry of a source to an error that names the entry and the remedy.

Rule: names come from hostile archives, so none reaches a terminal with control characters in it, or at any length.
"""

from __future__ import annotations

import errno
import os

from vzfs.errors import FullError, SourceError, VzfsError

_SHOWN = 200
"""Characters of a name in a message; the rest is left out."""

_REASONS = {
    errno.ELOOP: "a symbolic link stands in its path",
    errno.ENOTDIR: "a part of its path is not a directory",
    errno.EXDEV: "its path leads out of the template",
    errno.ENAMETOOLONG: "its name or link text is too long",
    errno.ENOTEMPTY: "it would replace a directory that is not empty",
    errno.EFBIG: "its size is more than the store's file system can hold",
    errno.EMLINK: "it has more hard links than the store's file system can hold",
}


class XattrError(OSError):
    """An extended attribute that can't be read or written; ``name`` and ``size`` (bytes of the value) say which."""

    def __init__(self, error: OSError, name: bytes, size: int) -> None:
        super().__init__(error.errno, error.strerror)
        self.name = name
        self.size = size


def shown(name: bytes) -> str:
    """``name`` as quoted text that is safe to print."""
    text = name.decode("utf-8", "backslashreplace")
    if len(text) > _SHOWN:
        text = text[:_SHOWN] + "…"
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"'{safe}'"


def refused(name: bytes, reason: str, *, remedy: str = "") -> SourceError:
    """The error for an entry that must not enter a template."""
    return SourceError(f"{shown(name)}: {reason}", remedy=remedy)


def entry_error(error: OSError, name: bytes, target_fd: int) -> VzfsError:
    """What to raise when a system call failed while the entry ``name`` was read, or written below ``target_fd``."""
    if isinstance(error, XattrError):
        return _xattr_error(error, name, target_fd)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _full(name)
    return refused(name, _REASONS.get(error.errno or 0, error.strerror or str(error)))


def _xattr_error(error: XattrError, name: bytes, target_fd: int) -> VzfsError:
    # ext4 answers ENOSPC both for a full disk and for a value that doesn't fit into an inode's attribute block.
    if error.errno == errno.EDQUOT or (error.errno == errno.ENOSPC and _is_full(target_fd)):
        return _full(name)
    what = f"extended attribute {shown(error.name)} of {error.size} bytes"
    if error.errno in (errno.ENOSPC, errno.E2BIG, errno.ERANGE):
        return refused(
            name,
            f"{what} does not fit into the store's file system",
            remedy="keep the store on xfs or btrfs, or on ext4 with the ea_inode feature",
        )
    if error.errno == errno.EOPNOTSUPP:
        return refused(
            name,
            f"{what} is not supported by the store's file system",
            remedy="keep the store on ext4, xfs or btrfs",
        )
    return refused(name, f"{what}: {error.strerror}")


def _full(name: bytes) -> FullError:
    return FullError(
        f"the disk became full or a quota was reached at {shown(name)}", remedy="free some space, try again"
    )


def _is_full(target_fd: int) -> bool:
    space = os.fstatvfs(target_fd)
    return space.f_bfree < 16 or (space.f_files > 0 and space.f_ffree == 0)
