"""A directory as the source of a template: a copy like ``cp -ax``, every attribute kept to the nanosecond.

Rule: the source is only read, beneath its own descriptor and through no symbolic link; a file that changes meanwhile is
an error, not a mixture. A directory on which something else is mounted is copied empty. Access times of the source stay
as they are, but for those of symbolic links, which can't be read without.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Mapping

from vzfs import linux
from vzfs.errors import SourceError, UsageError
from vzfs.store.progress import Progress
from vzfs.store.sources import attributes as attrs
from vzfs.store.sources import mistaken
from vzfs.store.sources.attributes import Attributes
from vzfs.store.sources.budget import Budget
from vzfs.store.sources.errors import XattrError, entry_error, refused, shown
from vzfs.store.sources.options import SourceOptions
from vzfs.store.sources.sink import device_refused

_log = logging.getLogger(__name__)

_REPORT_EVERY = 256
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def copy(source_fd: int, target_fd: int, options: SourceOptions, budget: Budget, progress: Progress) -> None:
    """Copy everything below the directory ``source_fd``, and its own attributes, to the empty directory ``target_fd``.

    Progress counts entries, total unknown. Raises ``UsageError`` when one directory contains the other,
    ``SourceError``, ``FullError``.
    """
    if _is_below(target_fd, source_fd):
        raise UsageError(
            "the source directory contains the store",
            remedy="make a tar archive of it without the store, or name a directory elsewhere",
        )
    if _is_below(source_fd, target_fd):
        raise UsageError("the source directory is the template's own")
    mistaken.refuse_image(source_fd)
    _Copy(source_fd, target_fd, options, budget, progress).run()


def _is_below(inner_fd: int, outer_fd: int) -> bool:
    """Whether the directory ``inner_fd`` is ``outer_fd`` or somewhere below it, seen by going up."""
    outer = os.fstat(outer_fd)
    fd = os.dup(inner_fd)
    try:
        while True:
            here = os.fstat(fd)
            if os.path.samestat(here, outer):
                return True
            above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = above
            if os.path.samestat(os.fstat(fd), here):
                return False
    finally:
        os.close(fd)


def _open_unseen(dir_fd: int, name: bytes, flags: int, resolve: int) -> int:
    """Open without leaving an access time, where the kernel lets us (the owner's privilege)."""
    try:
        return linux.openat2(dir_fd, name, flags | os.O_NOATIME, resolve=resolve)
    except PermissionError:
        return linux.openat2(dir_fd, name, flags, resolve=resolve)


class _Copy:
    def __init__(
        self, source_fd: int, target_fd: int, options: SourceOptions, budget: Budget, progress: Progress
    ) -> None:
        self._source = source_fd
        self._target = target_fd
        self._allow_devices = options.allow_devices
        self._budget = budget
        self._progress = progress
        self._done = 0
        self._first_names: dict[tuple[int, int], bytes] = {}  # of files with several names, by device and inode
        self._directories: list[tuple[bytes, Attributes]] = []
        self._left: list[bytes] = [b""]

    def run(self) -> None:
        # Paths, not descriptors, wait on the stack: a deep tree must not exhaust the process's limit of open files.
        while self._left:
            path = self._left.pop()
            try:
                self._copy_directory(path)
            except OSError as error:
                raise entry_error(error, path or b".", self._target) from error
        for path, attributes in reversed(self._directories):  # a directory was noted before those below it
            try:
                self._finish_directory(path, attributes)
            except OSError as error:
                raise entry_error(error, path or b".", self._target) from error
        self._progress("copying", self._done, self._done)

    def _copy_directory(self, path: bytes) -> None:
        try:
            source = _open_unseen(self._source, path or b".", _DIRECTORY, linux.RESOLVE_STRICT | linux.RESOLVE_NO_XDEV)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._note_mount_point(path)
            return
        try:
            mistaken.refuse_part_of_store(source, path)
            self._directories.append((path, attrs.from_stat(os.fstat(source), self._xattrs(source, path))))
            target = linux.openat2(self._target, path or b".", _DIRECTORY)
            try:
                self._copy_entries(source, target, path + b"/" if path else b"")
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _note_mount_point(self, path: bytes) -> None:
        _log.info("%s is a mount point: copied as an empty directory", shown(path))
        fd = _open_unseen(self._source, path, _DIRECTORY, linux.RESOLVE_STRICT)
        try:
            self._directories.append((path, attrs.from_stat(os.fstat(fd), self._xattrs(fd, path))))
        finally:
            os.close(fd)

    def _finish_directory(self, path: bytes, attributes: Attributes) -> None:
        fd = linux.openat2(self._target, path or b".", _DIRECTORY)
        try:
            attrs.apply_to_fd(fd, attributes)
        finally:
            os.close(fd)

    def _copy_entries(self, source: int, target: int, prefix: bytes) -> None:
        with os.scandir(source) as entries:
            for entry in sorted(entries, key=os.DirEntry.inode):  # the order on disk: far fewer seeks
                name = os.fsencode(entry.name)
                path = prefix + name
                try:
                    if entry.is_dir(follow_symlinks=False):
                        os.mkdir(name, 0o700, dir_fd=target)
                        self._left.append(path)
                    elif entry.is_file(follow_symlinks=False):
                        self._copy_file(source, target, name, path)
                    else:
                        self._copy_other(source, target, name, path)
                except OSError as error:
                    raise entry_error(error, path, self._target) from error
                self._count()

    def _count(self) -> None:
        self._done += 1
        if self._done % _REPORT_EVERY == 0:
            self._progress("copying", self._done, None)

    def _copy_file(self, source: int, target: int, name: bytes, path: bytes) -> None:
        # One component and O_NOFOLLOW need no openat2; a bind-mounted file is copied, as cp -x does.
        try:
            fd = os.open(name, _FILE | os.O_NOATIME, dir_fd=source)
        except PermissionError:
            fd = os.open(name, _FILE, dir_fd=source)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise _changed(path)
            if not self._linked(info, target, name, path):
                self._copy_content(fd, info, target, name, path)
        finally:
            os.close(fd)

    def _copy_content(self, source_fd: int, info: os.stat_result, target: int, name: bytes, path: bytes) -> None:
        attributes = attrs.from_stat(info, self._xattrs(source_fd, path))
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=target)
        try:
            if info.st_size:
                self._copy_data(source_fd, fd, info, path)
            attrs.apply_to_fd(fd, attributes)
        finally:
            os.close(fd)

    def _copy_data(self, source_fd: int, fd: int, info: os.stat_result, path: bytes) -> None:
        size = data_size(info)
        if self._budget.is_explicit:
            self._budget.spend(size, path)
        try:
            is_written = linux.copy_data(source_fd, fd, info.st_size)
        finally:
            after = os.fstat(source_fd)
            if (after.st_size, after.st_mtime_ns) != (info.st_size, info.st_mtime_ns):
                raise _changed(path)
        if is_written and not self._budget.is_explicit:  # what shares its blocks needs no free space
            self._budget.spend(size, path)

    def _copy_other(self, source: int, target: int, name: bytes, path: bytes) -> None:
        info = os.lstat(name, dir_fd=source)
        kind = stat.S_IFMT(info.st_mode)
        if kind == stat.S_IFSOCK:
            _log.warning("%s is a socket: left out", shown(path))
            return
        if kind in (stat.S_IFCHR, stat.S_IFBLK) and not self._allow_devices:
            raise device_refused(path)
        if self._linked(info, target, name, path):
            return
        attributes = attrs.from_stat(info, self._xattrs(linux.entry_path(source, name), path))
        if kind == stat.S_IFLNK:
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
            attrs.apply_to_symlink(target, name, attributes)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO):
            os.mknod(name, kind | 0o600, info.st_rdev, dir_fd=target)
            attrs.apply_to_node(target, name, attributes)
        else:
            raise _changed(path)

    def _linked(self, info: os.stat_result, target: int, name: bytes, path: bytes) -> bool:
        """Make ``name`` a hard link when another name of the same file was copied before; else note it as the first."""
        if info.st_nlink == 1:
            return False
        first = self._first_names.setdefault((info.st_dev, info.st_ino), path)
        if first == path:
            return False
        # Every component of the path below the target is a directory that this copy made.
        os.link(first, name, src_dir_fd=self._target, dst_dir_fd=target, follow_symlinks=False)
        return True

    def _xattrs(self, entry: int | bytes, path: bytes) -> Mapping[bytes, bytes]:
        """The extended attributes of a descriptor, or of a path whose last component is not followed."""
        follow = isinstance(entry, int)  # what the functions want for descriptors
        try:
            names = os.listxattr(entry, follow_symlinks=follow)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return {}
            raise
        if not names:
            return {}
        values: dict[bytes, bytes] = {}
        for text in names:
            name = os.fsencode(text)
            if attrs.is_reserved(name):
                continue
            if not attrs.is_known(name):
                _log.warning("%s: extended attribute %s is left out", shown(path), shown(name))
                continue
            try:
                values[name] = os.getxattr(entry, name, follow_symlinks=follow)
            except OSError as error:
                raise XattrError(error, name, 0) from error
        return values


def spend_all(top_fd: int, budget: Budget) -> None:
    """Count the files that are below the directory ``top_fd`` already. Raises ``FullError``."""
    counted = set()
    for folder, _, names, fd in os.fwalk(b".", dir_fd=top_fd):
        for name in names:
            info = os.lstat(name, dir_fd=fd)
            if stat.S_ISREG(info.st_mode) and info.st_ino not in counted:
                counted.add(info.st_ino)
                budget.spend(data_size(info), folder.removeprefix(b"./") + b"/" + name)


def data_size(info: os.stat_result) -> int:
    """Bytes of a file without its holes."""
    return min(info.st_size, info.st_blocks * 512)


def _changed(path: bytes) -> SourceError:
    return refused(path, "it changed while it was copied", remedy="stop what writes to the source, try again")
