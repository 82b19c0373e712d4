"""Two file systems side by side: a plain copy of a template and what vzfs makes of it.

``FileSystem`` is the waist: path-based operations below one root, done by ``PosixFs`` on any directory (a mount, a
plain copy) and by ``TreeFs`` on a ``vzfs.tree.Tree`` without a mount. ``Pair`` does the same on both and compares.

Rule: the plain side is the oracle; nothing here knows what a right answer is. Paths are ``bytes`` relative to the root,
``b""`` is the root itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vzfs import linux as calls
from vzfs.store.layout import Layout
from vzfs.tree.area import Sync
from vzfs.tree.node import ROOT_NUMBER
from vzfs.tree.tree import ROOT, Caller, Changes, Tree

MS_REMOUNT, MS_NOATIME = 32, 1024
_libc = ctypes.CDLL(None, use_errno=True)


class Stat(NamedTuple):
    """What is compared of an inode. ``size`` is 0 for directories, whose size is the file system's own affair."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    atime_ns: int
    mtime_ns: int

    @property
    def comparable(self) -> tuple[object, ...]:
        """All but the inode number and the times."""
        return (oct(self.mode), self.nlink, self.uid, self.gid, self.rdev, self.size)


def _stat(info: Any) -> Stat:
    size = 0 if stat.S_ISDIR(info.st_mode) else info.st_size
    rdev = info.st_rdev if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode) else 0
    return Stat(
        info.st_ino,
        info.st_mode,
        info.st_nlink,
        info.st_uid,
        info.st_gid,
        rdev,
        size,
        info.st_atime_ns,
        info.st_mtime_ns,
    )


class FileSystem(Protocol):
    """Operations below one root; failures are ``OSError``. Descriptors are numbers that the file system gives out."""

    def lstat(self, path: bytes) -> Stat: ...
    def listdir(self, path: bytes) -> list[bytes]: ...
    def readlink(self, path: bytes) -> bytes: ...
    def xattrs(self, path: bytes) -> dict[bytes, bytes]: ...
    def open(self, path: bytes, flags: int, mode: int = 0o644) -> int: ...
    def pread(self, fd: int, size: int, offset: int) -> bytes: ...
    def pwrite(self, fd: int, data: bytes, offset: int) -> int: ...
    def append(self, fd: int, data: bytes) -> int: ...
    def ftruncate(self, fd: int, size: int) -> None: ...
    def fchmod(self, fd: int, mode: int) -> None: ...
    def fstat(self, fd: int) -> Stat: ...
    def fsync(self, fd: int) -> None: ...
    def close(self, fd: int) -> None: ...
    def mkdir(self, path: bytes, mode: int) -> None: ...
    def mknod(self, path: bytes, mode: int, rdev: int = 0) -> None: ...
    def symlink(self, text: bytes, path: bytes) -> None: ...
    def link(self, old: bytes, new: bytes) -> None: ...
    def unlink(self, path: bytes) -> None: ...
    def rmdir(self, path: bytes) -> None: ...
    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None: ...
    def truncate(self, path: bytes, size: int) -> None: ...
    def chmod(self, path: bytes, mode: int) -> None: ...
    def chown(self, path: bytes, uid: int, gid: int) -> None: ...
    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> None: ...
    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int = 0) -> None: ...
    def removexattr(self, path: bytes, name: bytes) -> None: ...


# --------------------------------------------------------------------------------------------------------- a directory


class PosixFs:
    """A directory of this machine, mounted or not. ``known_dir``s are no part of it: every call walks the path."""

    def __init__(self, root: Path) -> None:
        self.root = os.fsencode(root)

    def at(self, path: bytes) -> bytes:
        """The whole path of ``path``."""
        return self.root + b"/" + path if path else self.root

    def lstat(self, path: bytes) -> Stat:
        return _stat(os.lstat(self.at(path)))

    def listdir(self, path: bytes) -> list[bytes]:
        return sorted(os.listdir(self.at(path)))

    def readlink(self, path: bytes) -> bytes:
        return os.readlink(self.at(path))

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        full = self.at(path)
        names = os.listxattr(full, follow_symlinks=False)
        return {os.fsencode(name): os.getxattr(full, name, follow_symlinks=False) for name in names}

    def open(self, path: bytes, flags: int, mode: int = 0o644) -> int:
        return os.open(self.at(path), flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        return os.pread(fd, size, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def append(self, fd: int, data: bytes) -> int:
        return os.write(fd, data)

    def ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def fchmod(self, fd: int, mode: int) -> None:
        os.fchmod(fd, mode)

    def fstat(self, fd: int) -> Stat:
        return _stat(os.fstat(fd))

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def mkdir(self, path: bytes, mode: int) -> None:
        os.mkdir(self.at(path), mode)

    def mknod(self, path: bytes, mode: int, rdev: int = 0) -> None:
        os.mknod(self.at(path), mode, rdev)

    def symlink(self, text: bytes, path: bytes) -> None:
        os.symlink(text, self.at(path))

    def link(self, old: bytes, new: bytes) -> None:
        os.link(self.at(old), self.at(new), follow_symlinks=False)

    def unlink(self, path: bytes) -> None:
        os.unlink(self.at(path))

    def rmdir(self, path: bytes) -> None:
        os.rmdir(self.at(path))

    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        calls.renameat2(-100, self.at(old), -100, self.at(new), flags)  # AT_FDCWD, ignored for absolute paths

    def truncate(self, path: bytes, size: int) -> None:
        os.truncate(self.at(path), size)

    def chmod(self, path: bytes, mode: int) -> None:
        os.chmod(self.at(path), mode)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        os.chown(self.at(path), uid, gid, follow_symlinks=False)

    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        os.utime(self.at(path), ns=(atime_ns, mtime_ns), follow_symlinks=False)

    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int = 0) -> None:
        os.setxattr(self.at(path), name, value, flags, follow_symlinks=False)

    def removexattr(self, path: bytes, name: bytes) -> None:
        os.removexattr(self.at(path), name, follow_symlinks=False)


def copy_tree(source: Path, target: Path) -> Path:
    """A plain copy with everything kept: owners, times, links, extended attributes, holes."""
    subprocess.run(["cp", "-a", "--sparse=auto", str(source), str(target)], check=True)
    return target


def drop_kernel_cache(mountpoint: Path) -> None:
    """Let the kernel forget all names and inodes of the mount that nobody uses: a remount shrinks its dentry cache."""
    if _libc.mount(None, os.fsencode(mountpoint), None, ctypes.c_ulong(MS_REMOUNT | MS_NOATIME), None) != 0:
        raise OSError(ctypes.get_errno(), "remount failed", str(mountpoint))


# -------------------------------------------------------------------------------------------------------------- a tree


@dataclass
class _Open:
    handle: int
    number: int
    flags: int


class TreeFs:
    """A ``Tree``, driven as the kernel would drive it: every path walked by counted look-ups, forgotten later.

    ``eager`` forgets after each operation all that no descriptor needs; else ``forget_all`` does when it is called.
    What the kernel checks before it asks a FUSE server is checked here.
    """

    def __init__(self, layout: Layout, container: Path, *, eager: bool = False, caller: Caller = ROOT) -> None:
        self.tree = Tree(layout, container, sync=Sync.NONE)
        self.eager = eager
        self.caller = caller
        self._known: Counter[int] = Counter()
        self._open: dict[int, _Open] = {}
        self._next = 1
        self._shut = False

    # --------------------------------------------------------------------------------------------- what the kernel does

    def shut(self) -> None:
        """Close everything, as an unmount does; a second time does nothing."""
        if self._shut:
            return
        self._shut = True
        for fd in list(self._open):
            self.close(fd)
        self.forget_all()
        self.tree.close()

    def forget_all(self) -> None:
        """Forget every node that no descriptor needs."""
        self.forget_some(1, 0)

    def forget_some(self, each: int, first: int) -> None:
        """Forget one in ``each`` of the nodes that no descriptor needs, the latest first, beyond ``first``."""
        pinned = {opened.number for opened in self._open.values()}
        known = [number for number in reversed(self._known) if number not in pinned]
        for number in known[first % each :: each]:
            self.tree.forget(number, self._known.pop(number))

    @contextlib.contextmanager
    def _operation(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self.eager:
                self.forget_all()

    def _lookup(self, parent: int, name: bytes) -> Any:
        if name in (b".", b".."):
            raise ValueError("walk no dots")
        entry = self.tree.lookup(parent, name)
        if entry is not None:
            self._known[entry.number] += 1
        return entry

    def _walk(self, path: bytes) -> tuple[int, Any]:
        """Node number and attributes of ``path``."""
        number, attributes = ROOT_NUMBER, self.tree.getattr(ROOT_NUMBER)
        for name in path.split(b"/") if path else ():
            if not stat.S_ISDIR(attributes.mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", path)
            entry = self._lookup(number, name)
            if entry is None:
                raise FileNotFoundError(errno.ENOENT, "no such name", path)
            number, attributes = entry.number, entry.attributes
        return number, attributes

    def _parent(self, path: bytes) -> tuple[int, bytes]:
        folder, _, name = path.rpartition(b"/")
        number, attributes = self._walk(folder)
        if not stat.S_ISDIR(attributes.mode):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", path)
        return number, name

    def _vacant(self, path: bytes) -> tuple[int, bytes]:
        """The place for something new."""
        number, name = self._parent(path)
        if self._lookup(number, name) is not None:
            raise FileExistsError(errno.EEXIST, "exists", path)
        return number, name

    def _made(self, entry: Any) -> None:
        self._known[entry.number] += 1

    # ------------------------------------------------------------------------------------------------------- operations

    def lstat(self, path: bytes) -> Stat:
        with self._operation():
            return self._stat_of(self._walk(path)[0])

    def _stat_of(self, number: int) -> Stat:
        now = self.tree.getattr(number)
        size = 0 if stat.S_ISDIR(now.mode) else now.size
        rdev = now.rdev if stat.S_ISCHR(now.mode) or stat.S_ISBLK(now.mode) else 0
        return Stat(now.ino, now.mode, now.nlink, now.uid, now.gid, rdev, size, now.atime_ns, now.mtime_ns)

    def listdir(self, path: bytes) -> list[bytes]:
        with self._operation():
            number, attributes = self._walk(path)
            if not stat.S_ISDIR(attributes.mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", path)
            listing = self.tree.listing(number)
            names = []
            for position in range(len(listing)):
                name, entry = listing.at(position)
                if entry is None or position < 2:
                    continue
                self.tree.remember(entry.number)
                self._known[entry.number] += 1
                names.append(name)
            return sorted(names)

    def readlink(self, path: bytes) -> bytes:
        with self._operation():
            number, attributes = self._walk(path)
            if not stat.S_ISLNK(attributes.mode):
                raise OSError(errno.EINVAL, "not a symbolic link", path)
            return self.tree.readlink(number)

    def xattrs(self, path: bytes) -> dict[bytes, bytes]:
        with self._operation():
            number = self._walk(path)[0]
            return {name: self.tree.getxattr(number, name) for name in self.tree.listxattr(number)}

    def open(self, path: bytes, flags: int, mode: int = 0o644) -> int:
        with self._operation():
            number, attributes = self._to_open(path, flags)
            if number is None:
                parent, name = self._parent(path)
                handle, entry = self.tree.create(parent, name, stat.S_IFREG | mode, flags, self.caller)
                self._made(entry)
                number = entry.number
            else:
                assert attributes is not None
                handle = self.tree.open(number, flags)
            self._next += 1
            self._open[self._next] = _Open(handle.number, number, flags)
            return self._next

    def _to_open(self, path: bytes, flags: int) -> tuple[int | None, Any]:
        """The node to open, ``None`` if it has to be made; refuses what the kernel refuses."""
        try:
            number, attributes = self._walk(path)
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
            self._parent(path)
            return None, None
        if flags & os.O_CREAT and flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, "exists", path)
        if stat.S_ISLNK(attributes.mode):
            raise OSError(errno.ELOOP, "a symbolic link", path)
        writing = flags & os.O_ACCMODE != os.O_RDONLY or flags & (os.O_CREAT | os.O_TRUNC)
        if stat.S_ISDIR(attributes.mode) and writing:
            raise IsADirectoryError(errno.EISDIR, "is a directory", path)
        return number, attributes

    def _opened(self, fd: int) -> _Open:
        return self._open[fd]

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        opened = self._opened(fd)
        if opened.flags & os.O_ACCMODE == os.O_WRONLY:
            raise OSError(errno.EBADF, "not open for reading")
        return os.pread(self.tree.handle(opened.handle).fd, size, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        opened = self._opened(fd)
        if opened.flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not open for writing")
        if opened.flags & os.O_APPEND:
            offset = self.tree.getattr(opened.number).size
        return os.pwrite(self.tree.handle(opened.handle).fd, data, offset)

    def append(self, fd: int, data: bytes) -> int:
        return self.pwrite(fd, data, self.tree.getattr(self._opened(fd).number).size)

    def ftruncate(self, fd: int, size: int) -> None:
        opened = self._opened(fd)
        if opened.flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EINVAL, "not open for writing")
        self.tree.setattr(opened.number, Changes(size=size), opened.handle)

    def fchmod(self, fd: int, mode: int) -> None:
        opened = self._opened(fd)
        self.tree.setattr(opened.number, Changes(mode=mode), opened.handle)

    def fstat(self, fd: int) -> Stat:
        return self._stat_of(self._opened(fd).number)

    def fsync(self, fd: int) -> None:
        os.fsync(self.tree.handle(self._opened(fd).handle).fd)

    def close(self, fd: int) -> None:
        with self._operation():
            self.tree.release(self._open.pop(fd).handle)

    def mkdir(self, path: bytes, mode: int) -> None:
        with self._operation():
            self._made(self.tree.mkdir(*self._vacant(path), stat.S_IFDIR | mode, self.caller))

    def mknod(self, path: bytes, mode: int, rdev: int = 0) -> None:
        with self._operation():
            self._made(self.tree.mknod(*self._vacant(path), mode, rdev, self.caller))

    def symlink(self, text: bytes, path: bytes) -> None:
        with self._operation():
            self._made(self.tree.symlink(*self._vacant(path), text, self.caller))

    def link(self, old: bytes, new: bytes) -> None:
        with self._operation():
            number, attributes = self._walk(old)
            parent, name = self._vacant(new)
            if stat.S_ISDIR(attributes.mode):
                raise PermissionError(errno.EPERM, "a directory", old)
            self._made(self.tree.link(number, parent, name))

    def unlink(self, path: bytes) -> None:
        with self._operation():
            parent, name = self._parent(path)
            entry = self._lookup(parent, name)
            if entry is None:
                raise FileNotFoundError(errno.ENOENT, "no such name", path)
            if stat.S_ISDIR(entry.attributes.mode):
                raise IsADirectoryError(errno.EISDIR, "is a directory", path)
            self.tree.unlink(parent, name)

    def rmdir(self, path: bytes) -> None:
        with self._operation():
            parent, name = self._parent(path)
            if self._lookup(parent, name) is None:
                raise FileNotFoundError(errno.ENOENT, "no such name", path)
            self.tree.rmdir(parent, name)

    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        with self._operation():
            old_parent, old_name = self._parent(old)
            new_parent, new_name = self._parent(new)
            source = self._lookup(old_parent, old_name)
            if source is None:
                raise FileNotFoundError(errno.ENOENT, "no such name", old)
            target = self._lookup(new_parent, new_name)
            if target is not None and flags & calls.RENAME_NOREPLACE:
                raise FileExistsError(errno.EEXIST, "exists", new)
            if target is None and flags & calls.RENAME_EXCHANGE:
                raise FileNotFoundError(errno.ENOENT, "no such name", new)
            if new.startswith(old + b"/"):
                raise OSError(errno.EINVAL, "into itself", new)
            if old.startswith(new + b"/"):
                code = errno.EINVAL if flags & calls.RENAME_EXCHANGE else errno.ENOTEMPTY
                raise OSError(code, "onto its own parent", new)
            if target is not None and target.number == source.number:
                return
            self.tree.rename(old_parent, old_name, new_parent, new_name, flags)

    def truncate(self, path: bytes, size: int) -> None:
        with self._operation():
            number, attributes = self._walk(path)
            if stat.S_ISDIR(attributes.mode):
                raise IsADirectoryError(errno.EISDIR, "is a directory", path)
            if not stat.S_ISREG(attributes.mode):
                raise OSError(errno.EINVAL, "no regular file", path)
            self.tree.setattr(number, Changes(size=size))

    def chmod(self, path: bytes, mode: int) -> None:
        with self._operation():
            self.tree.setattr(self._walk(path)[0], Changes(mode=mode))

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        with self._operation():
            number, attributes = self._walk(path)
            mode = attributes.mode
            if not stat.S_ISDIR(mode):  # notify_change() of the kernel: no rights pass to the new owner
                if b"security.capability" in self.tree.listxattr(number):
                    self.tree.removexattr(number, b"security.capability")
                mode &= ~(stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))
            changes = Changes(
                uid=None if uid == -1 else uid,
                gid=None if gid == -1 else gid,
                mode=None if mode == attributes.mode else stat.S_IMODE(mode),
            )
            if changes != Changes():
                self.tree.setattr(number, changes)

    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        with self._operation():
            self.tree.setattr(self._walk(path)[0], Changes(atime_ns=atime_ns, mtime_ns=mtime_ns))

    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int = 0) -> None:
        with self._operation():
            number, attributes = self._walk(path)
            self._may_have(attributes.mode, name)
            self.tree.setxattr(number, name, value, flags)

    def removexattr(self, path: bytes, name: bytes) -> None:
        with self._operation():
            number, attributes = self._walk(path)
            self._may_have(attributes.mode, name)
            self.tree.removexattr(number, name)

    @staticmethod
    def _may_have(mode: int, name: bytes) -> None:
        """xattr_permission() of the kernel: user attributes are for files and directories."""
        if name.startswith(b"user.") and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise PermissionError(errno.EPERM, "no user attributes here", name)


# ----------------------------------------------------------------------------------------------------------- snapshots


class Row(NamedTuple):
    """One path of a snapshot."""

    info: Stat
    target: bytes | None
    xattrs: dict[bytes, bytes]
    content: bytes | None


def row(fs: FileSystem, path: bytes, *, content: bool = True) -> Row:
    """Everything of one path."""
    info = fs.lstat(path)
    target = fs.readlink(path) if stat.S_ISLNK(info.mode) else None
    data = read_all(fs, path) if content and stat.S_ISREG(info.mode) else None
    return Row(info, target, fs.xattrs(path), data)


def read_all(fs: FileSystem, path: bytes) -> bytes:
    """The whole content of a regular file."""
    fd = fs.open(path, os.O_RDONLY)
    try:
        parts = []
        offset = 0
        while part := fs.pread(fd, 1 << 20, offset):
            parts.append(part)
            offset += len(part)
        return b"".join(parts)
    finally:
        fs.close(fd)


def snapshot(fs: FileSystem, *, content: bool = True) -> dict[bytes, Row]:
    """Everything below the root, by path."""
    found = {b"": row(fs, b"", content=content)}
    folders = [b""]
    while folders:
        folder = folders.pop()
        for name in fs.listdir(folder):
            path = folder + b"/" + name if folder else name
            found[path] = row(fs, path, content=content)
            if stat.S_ISDIR(found[path].info.mode):
                folders.append(path)
    return found


# ------------------------------------------------------------------------------------------------------- the comparison


class Result(NamedTuple):
    """What an operation gave: a value, or the name of its errno."""

    value: object
    error: str | None


def attempt(call: Callable[..., object], *arguments: object) -> Result:
    """Call it and give what came of it."""
    try:
        return Result(call(*arguments), None)
    except OSError as error:
        return Result(None, errno.errorcode.get(error.errno or 0, str(error)))


class Disagreement(AssertionError):
    """vzfs did something else than the plain file system."""


class Pair:
    """The plain file system and vzfs; ``start_ns`` is when the comparison began.

    Inodes of the plain side are pinned by descriptors, so that their numbers are not given out again and each stands
    for one identity; ``_inodes`` has what vzfs calls each of them, ``_mtimes`` the last modification times seen.
    """

    def __init__(self, plain: PosixFs, ours: FileSystem) -> None:
        self.plain = plain
        self.ours = ours
        self.start_ns = time.time_ns() - 100_000_000  # file times come from a coarser clock
        self._pins: dict[int, int] = {}
        self._inodes: dict[int, int] = {}
        self._mtimes: dict[int, tuple[int, int]] = {}
        self._descriptors: list[tuple[int, int]] = []
        for path, now in snapshot(plain).items():
            self._pin(path, now.info.ino)
            self._mtimes[now.info.ino] = (now.info.mtime_ns, now.info.mtime_ns)

    def close(self) -> None:
        """Close all descriptors."""
        self.close_descriptors()
        for pin in self._pins.values():
            os.close(pin)
        self._pins.clear()

    def _pin(self, path: bytes, ino: int) -> None:
        if ino not in self._pins:
            self._pins[ino] = os.open(self.plain.at(path), os.O_PATH | os.O_NOFOLLOW)

    # ----------------------------------------------------------------------------------------------------- doing things

    def do(self, name: str, *arguments: object) -> Result:
        """Do the operation ``name`` on both sides; their results must be equal."""
        wanted = attempt(getattr(self.plain, name), *arguments)
        got = attempt(getattr(self.ours, name), *arguments)
        if isinstance(wanted.value, Stat) and isinstance(got.value, Stat):
            self._compare_stat(f"{name}{arguments!r}", wanted.value, got.value)
        elif wanted != got:
            raise Disagreement(f"{name}{arguments!r}: plain {_short(wanted)}, vzfs {_short(got)}")
        return wanted

    def keep_open(self, path: bytes, flags: int, mode: int = 0o644) -> bool:
        """Open on both sides and keep it; whether that succeeded."""
        wanted = attempt(self.plain.open, path, flags, mode)
        got = attempt(self.ours.open, path, flags, mode)
        if wanted.error != got.error:
            for fs, opened in ((self.plain, wanted), (self.ours, got)):
                if opened.error is None:
                    fs.close(opened.value)  # type: ignore[arg-type]
            raise Disagreement(f"open({path!r}, {flags:#o}, {mode:o}): plain {wanted.error}, vzfs {got.error}")
        if wanted.error is not None:
            return False
        self._descriptors.append((wanted.value, got.value))  # type: ignore[arg-type]
        return True

    @property
    def descriptor_count(self) -> int:
        return len(self._descriptors)

    def do_open(self, which: int, name: str, *arguments: object) -> Result:
        """Do the operation ``name`` on the kept descriptor number ``which`` of both sides."""
        first, second = self._descriptors[which]
        wanted = attempt(getattr(self.plain, name), first, *arguments)
        got = attempt(getattr(self.ours, name), second, *arguments)
        if isinstance(wanted.value, Stat) and isinstance(got.value, Stat):
            self._compare_stat(f"{name} of descriptor {which}", wanted.value, got.value)
        elif wanted != got:
            raise Disagreement(f"{name}(descriptor {which}, {arguments!r}): plain {_short(wanted)}, vzfs {_short(got)}")
        return wanted

    def close_descriptor(self, which: int) -> None:
        """Close one kept descriptor."""
        first, second = self._descriptors.pop(which)
        self.plain.close(first)
        self.ours.close(second)

    def close_descriptors(self) -> None:
        """Close all kept descriptors."""
        while self._descriptors:
            self.close_descriptor(-1)

    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        """Set times on both sides and see that they are exactly the same then."""
        if self.do("utime", path, atime_ns, mtime_ns).error is None:
            wanted, got = self.plain.lstat(path), self.ours.lstat(path)
            if stat.S_ISLNK(wanted.mode):  # the server reads a link to tell its length, which moves its access time
                wanted, got = wanted._replace(atime_ns=0), got._replace(atime_ns=0)
            if (wanted.atime_ns, wanted.mtime_ns) != (got.atime_ns, got.mtime_ns):
                raise Disagreement(f"times of {path!r}: plain {wanted}, vzfs {got}")

    # -------------------------------------------------------------------------------------------------------- comparing

    def _compare_stat(self, what: str, wanted: Stat, got: Stat) -> None:
        if wanted.comparable != got.comparable:
            raise Disagreement(f"{what}: plain {wanted.comparable}, vzfs {got.comparable}")
        known = self._inodes.setdefault(wanted.ino, got.ino)
        if known != got.ino:
            raise Disagreement(f"{what}: inode number {got.ino}, was {known}")
        self._compare_mtime(what, wanted, got)

    def _compare_mtime(self, what: str, wanted: Stat, got: Stat) -> None:
        before = self._mtimes.get(wanted.ino)
        self._mtimes[wanted.ino] = (wanted.mtime_ns, got.mtime_ns)
        if wanted.mtime_ns == got.mtime_ns:
            return
        if before is None:
            if min(wanted.mtime_ns, got.mtime_ns) < self.start_ns:
                raise Disagreement(f"{what}: modified {wanted.mtime_ns} on plain, {got.mtime_ns} on vzfs")
            return
        changed = (wanted.mtime_ns != before[0], got.mtime_ns != before[1])
        if changed[0] != changed[1]:
            raise Disagreement(f"{what}: modification time changed on plain {changed[0]}, on vzfs {changed[1]}")
        if changed[0] and min(wanted.mtime_ns, got.mtime_ns) < self.start_ns:
            raise Disagreement(f"{what}: modified {wanted.mtime_ns} on plain, {got.mtime_ns} on vzfs")

    def compare(self, path: bytes) -> None:
        """Compare one path, which may be missing on both sides."""
        wanted, got = attempt(row, self.plain, path), attempt(row, self.ours, path)
        if wanted.error != got.error:
            raise Disagreement(f"{path!r}: plain {_short(wanted)}, vzfs {_short(got)}")
        if isinstance(wanted.value, Row) and isinstance(got.value, Row):
            self._pin(path, wanted.value.info.ino)
            self._compare_rows(path, wanted.value, got.value)

    def _compare_rows(self, path: bytes, wanted: Row, got: Row) -> None:
        self._compare_stat(repr(path), wanted.info, got.info)
        for what in ("target", "xattrs", "content"):
            first, second = getattr(wanted, what), getattr(got, what)
            if first != second:
                raise Disagreement(f"{what} of {path!r}: plain {_short(first)}, vzfs {_short(second)}")

    def compare_all(self) -> None:
        """Compare everything, and which names share an inode."""
        wanted, got = snapshot(self.plain), snapshot(self.ours)
        if wanted.keys() != got.keys():
            raise Disagreement(f"only plain has {wanted.keys() - got.keys()}, only vzfs {got.keys() - wanted.keys()}")
        for path, one in wanted.items():
            self._pin(path, one.info.ino)
            self._compare_rows(path, one, got[path])
        pairs = {(one.info.ino, got[path].info.ino) for path, one in wanted.items()}
        if len(pairs) != len({ours for _, ours in pairs}):
            raise Disagreement(f"several inodes have one number: {_shared(wanted, got)}")


def _shared(wanted: dict[bytes, Row], got: dict[bytes, Row]) -> list[bytes]:
    owners: dict[int, set[int]] = {}
    for path, one in wanted.items():
        owners.setdefault(got[path].info.ino, set()).add(one.info.ino)
    return [path for path, one in got.items() if len(owners[one.info.ino]) > 1]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 400 else f"{text[:200]} … {text[-100:]} ({len(text)} characters)"
