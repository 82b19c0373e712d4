"""A container's own symbolic links as they are stored: escaped, so that none is a magic link.

The escape makes a text one byte longer. Where that no longer fits into a symbolic link, its last byte is kept in the
extended attribute ``trusted.vzfs.tail``.
"""

from __future__ import annotations

import os

from vzfs import linux
from vzfs.store import magic
from vzfs.store.xattrs import TAIL_XATTR


def make_own_link(dir_fd: int, name: bytes, text: bytes) -> None:
    """Make ``name`` in ``dir_fd`` the container's own link with ``text``, up to 4,095 bytes. Raises ``OSError``."""
    stored = magic.escape(text)
    if len(stored) <= magic.TARGET_MAX or len(text) > magic.TARGET_MAX:
        os.symlink(stored, name, dir_fd=dir_fd)
        return
    os.symlink(stored[:-1], name, dir_fd=dir_fd)
    try:
        os.setxattr(linux.entry_path(dir_fd, name), TAIL_XATTR, stored[-1:], follow_symlinks=False)
    except BaseException:
        os.unlink(name, dir_fd=dir_fd)
        raise


def read_own_link(dir_fd: int, name: bytes) -> bytes:
    """The text of the container's own link ``name`` in ``dir_fd`` as the container made it."""
    stored = os.readlink(name, dir_fd=dir_fd)
    text = magic.unescape(stored)
    if len(stored) == magic.TARGET_MAX and len(text) < len(stored):
        path = linux.entry_path(dir_fd, name)
        if TAIL_XATTR in os.listxattr(path, follow_symlinks=False):
            text += os.getxattr(path, TAIL_XATTR, follow_symlinks=False)
    return text
