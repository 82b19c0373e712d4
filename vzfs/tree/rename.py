"""rename(2), with the flags of renameat2(2).

Rule: a folded directory moves as one link; so renaming a directory never fails with EXDEV.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from contextlib import AbstractContextManager

from vzfs import linux
from vzfs.store.faults import step
from vzfs.tree.become.directory import Directories
from vzfs.tree.become.file import Copies
from vzfs.tree.become.record import Records
from vzfs.tree.durable import Durable
from vzfs.tree.lookup import Lookup, check_name
from vzfs.tree.node import Kind, Node
from vzfs.tree.orphans import Orphans
from vzfs.tree.remove import Removing
from vzfs.tree.table import Table


class Renaming:
    """Renames in one mount."""

    def __init__(
        self,
        lock: AbstractContextManager[object],
        durable: Durable,
        table: Table,
        lookup: Lookup,
        records: Records,
        directories: Directories,
        copying: Copies,
        orphans: Orphans,
        removing: Removing,
    ) -> None:
        self._lock = lock
        self._durable = durable
        self._table = table
        self._lookup = lookup
        self._records = records
        self._directories = directories
        self._copying = copying
        self._orphans = orphans
        self._removing = removing

    def rename(
        self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int = 0, request: int = 0
    ) -> None:
        """rename(2) with the flags of renameat2(2); a successor can ask about ``request``, see ``renamed``."""
        if flags & ~(linux.RENAME_NOREPLACE | linux.RENAME_EXCHANGE | linux.RENAME_WHITEOUT):
            raise OSError(errno.EINVAL, "unknown rename flags")
        check_name(new_name)
        self._directories.own(old_parent)
        self._directories.own(new_parent)
        with self._lock:
            source_dir, target_dir = (
                self._lookup.living_directory(old_parent),
                self._lookup.living_directory(new_parent),
            )
            source, _ = self._removing.existing(source_dir, old_name)
            target, info = self._lookup.find(target_dir, new_name)
            self._check(source, target, source_dir, target_dir, flags)
            first = self._to_be_own(source, target, flags)
            if first is None:
                with self._table.holding(source_dir, target_dir):
                    self._rename(source_dir, old_name, source, target_dir, new_name, target, info, flags, request)
                return
        if first.is_directory:
            self._directories.own(first.number)
        else:
            self._copying.own(first.number)
        self.rename(old_parent, old_name, new_parent, new_name, flags, request)

    def renamed(self, request: int, old_parent: int, old_name: bytes) -> bool:
        """Whether ``request``, one that leaves something at the old name, had been carried out by a predecessor."""
        noted = self._durable.noted_rename(request)
        if noted is None:
            return False
        with self._lock:
            directory = self._lookup.directory(old_parent)
            if directory.kind is not Kind.DIRECTORY or directory.dead:
                return False
            fd = self._lookup.directory_fd(directory)
            return os.lstat(old_name, dir_fd=fd).st_ino != noted

    def _check(self, source: Node, target: Node | None, source_dir: Node, target_dir: Node, flags: int) -> None:
        """What the kernel checks as well, and what only we know."""
        if target is None:
            if flags & linux.RENAME_EXCHANGE:
                raise FileNotFoundError(errno.ENOENT, "nothing to exchange with")
            self._check_not_below(source, target_dir)
            return
        if flags & linux.RENAME_NOREPLACE:
            raise FileExistsError(errno.EEXIST, "exists")
        self._check_not_below(source, target_dir)
        if flags & linux.RENAME_EXCHANGE:
            self._check_not_below(target, source_dir)
            return
        if target is source:
            return
        if source.is_directory and not target.is_directory:
            raise NotADirectoryError(errno.ENOTDIR, "can't replace by a directory")
        if target.is_directory and not source.is_directory:
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        if target.kind is Kind.FOLDED:
            self._removing.check_empty(target)

    def _check_not_below(self, node: Node, directory: Node) -> None:
        """A directory can't be moved below itself."""
        while node.is_directory and directory is not self._table.root:
            if directory.number == node.number:
                raise OSError(errno.EINVAL, "can't move a directory into itself")
            directory = self._lookup.parent(directory)

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
        request: int,
    ) -> None:
        if target is not None and target.number == source.number:
            return  # two names of one inode: rename(2) does nothing
        self._table.register(source)
        exchange = bool(flags & linux.RENAME_EXCHANGE)
        last = target is not None and not exchange and self._removing.loses_last_name(target, target_info)
        if source.kind is Kind.FOLDED and target_dir is not source_dir:
            self._directories.mark_folds(target_dir)
        if exchange and target is not None and target.kind is Kind.FOLDED:
            self._directories.mark_folds(source_dir)
        self._change_ctime(source)
        if exchange and target is not None:
            self._change_ctime(target)
        if last and target is not None and target.kind is Kind.DIRECTORY:
            self._lookup.directory_fd(target)  # open, so that it keeps its inode number
        source_fd, target_fd = self._lookup.directory_fd(source_dir), self._lookup.directory_fd(target_dir)
        keep = target is not None and not exchange and self._removing.must_keep(target, target_dir, new_name, last=last)
        if keep and last and target is not None and self._removing.pin(target, target_fd, new_name):
            keep = False
        with self._removing.losing_name(target) if target is not None and not exchange else contextlib.nullcontext():
            if keep and target is not None:
                self._orphans.link(target, target_fd, new_name)
            if request and flags & (linux.RENAME_EXCHANGE | linux.RENAME_WHITEOUT):
                self._durable.note_rename(request, os.lstat(old_name, dir_fd=source_fd).st_ino)
            step("rename:before")
            linux.renameat2(source_fd, old_name, target_fd, new_name, flags)
            step("rename:done")
        if source.kind is Kind.FOLDED:
            self._removing.count_folded(source_dir, -1)
            self._removing.count_folded(target_dir, +1)
        if target is not None and target.kind is Kind.FOLDED:
            self._removing.count_folded(target_dir, -1)
            if exchange:
                self._removing.count_folded(source_dir, +1)
        if target is not None and not exchange:
            self._removing.after_losing_name(target, target_dir, new_name, last=last)
        self._moved(source, source_dir, old_name, target_dir, new_name)
        if target is not None and exchange:
            self._moved(target, target_dir, new_name, source_dir, old_name)

    @staticmethod
    def _to_be_own(source: Node, target: Node | None, flags: int) -> Node | None:
        """What has to be made the container's own before a rename, if anything.

        A template's symbolic link or device, since a record holds the new change time of regular files only; and one of
        two directories, see ``_must_be_real``.
        """
        if target is not None and target.number == source.number:
            return None
        for node in (source, target if flags & linux.RENAME_EXCHANGE else None):
            if node is not None and node.kind is Kind.TEMPLATE:
                assert node.template is not None
                if not stat.S_ISREG(node.template.index.mode(node.entry)):
                    return node
        return None if target is None or flags else _must_be_real(source, target)

    def _change_ctime(self, node: Node) -> None:
        """Give what is renamed a change time of its own, by which incremental backups go, where the store's rename(2)
        doesn't: a template's regular file, and what lies in a link group's record."""
        if node.kind in (Kind.TEMPLATE, Kind.RECORD):
            self._records.change(node, lambda record: record)
        elif node.group:
            self._records.touch(node)

    def _moved(self, node: Node, old_directory: Node, old_name: bytes, directory: Node, name: bytes) -> None:
        if not node.group:
            self._table.move_name(node, old_directory, old_name, directory, name)
            self._table.register(node)


def _must_be_real(source: Node, target: Node) -> Node | None:
    """Which of two directories has to be unfolded so that ``source`` can replace ``target``, if one has.

    A folded directory lies in the private area as a link, which can't replace a real one or be replaced by one.
    """
    if source.kind is Kind.FOLDED and target.kind is Kind.DIRECTORY:
        return source
    return target if source.kind is Kind.DIRECTORY and target.kind is Kind.FOLDED else None
