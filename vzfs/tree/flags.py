"""File attributes as chattr(1) and lsattr(1) show them (ioctl_iflags(2))."""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager

from vzfs import linux
from vzfs.tree.become.directory import Directories
from vzfs.tree.become.file import Copies
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Kind, Node, refuse_damaged
from vzfs.tree.open import OpenFiles


class FileFlags:
    """Of the nodes of one mount."""

    def __init__(
        self,
        lock: AbstractContextManager[object],
        lookup: Lookup,
        directories: Directories,
        copying: Copies,
        opening: OpenFiles,
    ) -> None:
        self._lock = lock
        self._lookup = lookup
        self._directories = directories
        self._copying = copying
        self._opening = opening

    def get(self, number: int) -> int:
        """The ``FS_*_FL`` of a regular file or directory (ioctl_iflags(2)); a folded directory has none."""
        with self._lock:
            node = self._lookup.get(number)
            if node.kind is Kind.FOLDED:
                return 0
            fd = self._open(node)
            try:
                return linux.get_file_flags(fd)
            finally:
                os.close(fd)

    def set(self, number: int, flags: int) -> None:
        """Set the ``FS_*_FL`` of a regular file or directory, which becomes the container's own.

        Raises ``OSError``; ``EOPNOTSUPP`` for what an owner may not change on ext4 either, such as what would keep the
        store from moving or removing the file, charge another project or journal its data.
        """
        with self._lock:
            node = self._lookup.get(number)
            refuse_damaged(node)
            directory = node.is_directory
            refused = (flags ^ self.get(number)) & ~linux.FS_OWNERS_FL
            if refused:
                raise OSError(errno.EOPNOTSUPP, f"file attributes {refused:#x} can't be changed here")
            if node.passed and node.kind in (Kind.TEMPLATE, Kind.RECORD):
                raise OSError(errno.EOPNOTSUPP, "who asks has the template's file open, which would not be the copy")
        if directory:
            self._directories.own(number)
        else:
            self._copying.own(number)
        with self._lock:
            fd = self._open(self._lookup.get(number))
            try:
                linux.set_file_flags(fd, flags)
            finally:
                os.close(fd)

    def _open(self, node: Node) -> int:
        if node.kind is not Kind.DIRECTORY:
            return self._opening.data_of(node.number, os.O_RDONLY)[0]
        folder = self._lookup.living_directory_fd(node)
        return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
