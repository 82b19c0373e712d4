"""Raw system calls that Python's ``os`` module lacks, and the copying of file data.

Rule: the only module that calls into libc by ctypes. Everything takes descriptors and ``bytes`` names, never follows a
symbolic link that it was not given as a descriptor, and reports failures as ``OSError``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import stat
import struct
from collections.abc import Iterator

# <linux/openat2.h>
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_STRICT = RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH
"""Below the given directory only, through no symbolic link of any kind."""

# <linux/fs.h>
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
FICLONE = 0x40049409
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IMMUTABLE_FL = 0x10
FS_APPEND_FL = 0x20
FS_OWNERS_FL = 0x01 | 0x02 | 0x04 | 0x08 | 0x40 | 0x80 | 0x8000 | 0x10000 | 0x20000 | 0x800000
"""What a file's owner may change: SECRM, UNRM, COMPR, SYNC, NODUMP, NOATIME, NOTAIL, DIRSYNC, TOPDIR, NOCOW."""

CAP_SYS_RESOURCE = 24  # <linux/capability.h>
_CAPABILITY_VERSION_3 = 0x20080522
_AT_FDCWD = -100  # <linux/fcntl.h>
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_NO_AUTOMOUNT = 0x800
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_OPEN_TREE_CLONE = 1  # <linux/mount.h>
MOUNT_RDONLY = 0x1
MOUNT_NOSUID = 0x2
MOUNT_NOATIME = 0x10
_MOUNT_ATTR_ATIME = 0x70  # the mask of all that say when access times are written
_STATX_BTIME = 0x800  # <linux/stat.h>
_STATX_SIZE = 256
_STATX_BTIME_AT = 80
_STATX_DEVICE_AT = 136
CLONE_NEWNS = 0x00020000  # <linux/sched.h>
_DIRENT64 = struct.Struct("=QqHB")  # <linux/dirent.h>, without the name

ACCESS_ACL, DEFAULT_ACL = ACL_XATTRS = ("system.posix_acl_access", "system.posix_acl_default")

# <sys/mount.h>
MS_RDONLY = 1
MS_NOATIME = 1 << 10
MS_POSIXACL = 1 << 16
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_FALLOC_FL_KEEP_SIZE = 1  # <linux/falloc.h>

PATH_MAX = 4096
"""Bytes of a path in one system call, the final NUL included (<linux/limits.h>)."""

_NR_OPEN_TREE, _NR_OPENAT2, _NR_MOUNT_SETATTR = 428, 437, 442  # the same on every architecture
_NR_RENAMEAT2 = {"x86_64": 316, "aarch64": 276, "riscv64": 276, "ppc64le": 357, "s390x": 347}.get(
    platform.machine(), -1
)
_WRITE_AND_WAIT = 1 | 2 | 4  # SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE, _WAIT_AFTER of <linux/fs.h>
_COPY_AT_ONCE = 64 << 10
"""Bytes of a file up to which reading and writing it takes less time than finding its holes."""
_COPY_CHUNK = 128 << 20
"""Bytes given to one copy_file_range call: long enough to be free of overhead, short enough to be interruptible."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, name: bytes = b"") -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
    return result


def drop_capability(capability: int) -> None:
    """Give up a capability for good, in this thread and those that it starts (capset(2)). Raises ``OSError``."""
    head = struct.pack("=II", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(ctypes.c_char_p(head), data))
    words = list(struct.unpack("=6I", data.raw))
    for word in range(3):  # effective, permitted, inheritable
        words[capability // 32 * 3 + word] &= ~(1 << capability % 32)
    _check(_libc.capset(ctypes.c_char_p(head), ctypes.c_char_p(struct.pack("=6I", *words))))


def openat2(dir_fd: int, path: bytes, flags: int, mode: int = 0, resolve: int = RESOLVE_STRICT) -> int:
    """Open ``path`` below ``dir_fd`` under the ``RESOLVE_*`` rules (openat2(2), Linux 5.6); close-on-exec is set.

    Raises ``OSError``: ``ELOOP`` for a symbolic link on the way, ``EXDEV`` for an attempt to leave ``dir_fd``.
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    while True:
        fd: int = _libc.syscall(_NR_OPENAT2, dir_fd, ctypes.c_char_p(path), ctypes.c_char_p(how), ctypes.c_size_t(24))
        if fd >= 0 or ctypes.get_errno() not in (errno.EINTR, errno.EAGAIN):  # EAGAIN: a rename raced, openat2(2)
            return _check(fd, path)


def renameat2(src_fd: int, src: bytes, dst_fd: int, dst: bytes, flags: int = 0) -> None:
    """rename(2) between two directories with ``RENAME_*`` flags."""
    if not flags:
        os.rename(src, dst, src_dir_fd=src_fd, dst_dir_fd=dst_fd)
        return
    _check(
        _libc.syscall(_NR_RENAMEAT2, src_fd, ctypes.c_char_p(src), dst_fd, ctypes.c_char_p(dst), ctypes.c_uint(flags)),
        dst,
    )


def mount(source: bytes, target: bytes, fstype: bytes, flags: int, data: bytes) -> None:
    """Mount a file system (mount(2))."""
    _check(
        _libc.mount(*map(ctypes.c_char_p, (source, target, fstype)), ctypes.c_ulong(flags), ctypes.c_char_p(data)),
        target,
    )


def clone_mount(path: str | os.PathLike[str] | bytes, attributes: int) -> int:
    """A descriptor (``O_PATH``) of the directory ``path`` in a private copy of its mount with the ``MOUNT_*``
    ``attributes``, to which nobody else has a way (open_tree(2) and mount_setattr(2), Linux 5.12).

    Raises ``OSError``: ``EPERM`` without CAP_SYS_ADMIN, ``ENOSYS``.
    """
    name = os.fsencode(path)
    fd = _check(_libc.syscall(_NR_OPEN_TREE, _AT_FDCWD, ctypes.c_char_p(name), _OPEN_TREE_CLONE | os.O_CLOEXEC), name)
    cleared = _MOUNT_ATTR_ATIME if attributes & MOUNT_NOATIME else 0
    wanted = struct.pack("=QQQQ", attributes, cleared, 0, 0)
    size = ctypes.c_size_t(len(wanted))
    try:
        _check(
            _libc.syscall(_NR_MOUNT_SETATTR, fd, ctypes.c_char_p(b""), _AT_EMPTY_PATH, ctypes.c_char_p(wanted), size)
        )
    except BaseException:
        os.close(fd)
        raise
    return fd


def umount2(path: bytes, flags: int = 0) -> None:
    """Unmount what is mounted at ``path`` (umount2(2))."""
    _check(_libc.umount2(ctypes.c_char_p(path), flags), path)


def reserve(fd: int, size: int) -> None:
    """Give the file blocks for ``size`` bytes without changing its size (fallocate(2)), where the file system can."""
    with contextlib.suppress(OSError):
        _check(_libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size)))


def write_out(fd: int) -> None:
    """Write the file's data to the disk and wait until it is there (sync_file_range(2)).

    Its size and where its data lies, which are metadata, may follow later. Raises ``OSError``.
    """
    _check(_libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_WRITE_AND_WAIT)))


def syncfs(fd: int) -> None:
    """Write everything of the file system that holds ``fd`` to the disk (syncfs(2))."""
    _check(_libc.syncfs(fd))


def read_directory(fd: int, cookie: int, size: int) -> list[tuple[bytes, int]]:
    """Names in the directory ``fd`` after the place ``cookie``, as many as have room in ``size`` bytes, each with the
    cookie of the place after it (getdents64(2)).

    Cookies are the file system's own, 0 being the beginning: names that stay are told exactly once, whatever comes and
    goes meanwhile. Nothing is told at the end.
    """
    os.lseek(fd, cookie, os.SEEK_SET)
    buffer = ctypes.create_string_buffer(size)
    length = _check(_libc.getdents64(fd, buffer, ctypes.c_size_t(size)))
    data = buffer.raw
    found = []
    at = 0
    while at < length:
        _, next_cookie, record_length, _ = _DIRENT64.unpack_from(data, at)
        start = at + _DIRENT64.size
        found.append((data[start : data.index(0, start)], next_cookie))
        at += record_length
    return found


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Give a range of a file blocks, or take them away, as the ``FALLOC_FL_*`` in ``mode`` say (fallocate(2))."""
    while True:
        result: int = _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))
        if result == 0 or ctypes.get_errno() != errno.EINTR:
            _check(result)
            return


def birth_time(path: bytes) -> int | None:
    """When what is at ``path``, not followed, was made, in nanoseconds since 1970 (statx(2)).

    ``None`` where the file system doesn't know. Raises ``OSError``.
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    _check(_libc.statx(_AT_FDCWD, ctypes.c_char_p(path), _AT_SYMLINK_NOFOLLOW, _STATX_BTIME, buffer), path)
    if not int.from_bytes(buffer.raw[:4], "little") & _STATX_BTIME:
        return None
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, _STATX_BTIME_AT)
    return int(seconds * 1_000_000_000 + nanoseconds)


def generation_of(dir_fd: int, name: bytes) -> int:
    """What tells the object ``name``, not followed (``b""``: ``dir_fd`` itself), from others that have had its inode
    number or will: 31 bits of when it was made, never 0; 0 where the file system doesn't know that. Raises ``OSError``.
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    flags = _AT_SYMLINK_NOFOLLOW | _AT_EMPTY_PATH
    _check(_libc.statx(dir_fd, ctypes.c_char_p(name), flags, _STATX_BTIME, buffer), name)
    if not int.from_bytes(buffer.raw[:4], "little") & _STATX_BTIME:
        return 0
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, _STATX_BTIME_AT)
    return int(1 + (seconds * 1_000_000_000 + nanoseconds) % 0x7FFFFFFE)


def device_of(path: str | bytes) -> str:
    """``major:minor``, as the mount table has it, of the file system that holds what ``path`` leads to (statx(2)).

    That file system isn't asked (AT_STATX_DONT_SYNC), so this doesn't wait for a FUSE server that hangs.

    Raises ``OSError``.
    """
    name = os.fsencode(path)
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    flags = _AT_STATX_DONT_SYNC | _AT_NO_AUTOMOUNT
    _check(_libc.statx(_AT_FDCWD, ctypes.c_char_p(name), flags, 0, buffer), name)
    major, minor = struct.unpack_from("=II", buffer, _STATX_DEVICE_AT)
    return f"{major}:{minor}"


def enter_mounts(fd: int) -> None:
    """Go over to the mount namespace ``fd``, and to its root directory (setns(2)); this process has one thread only."""
    _check(_libc.setns(fd, CLONE_NEWNS))


def get_file_flags(fd: int) -> int:
    """The ``FS_*_FL`` of an open file, as lsattr(1) shows them."""
    buffer = bytearray(8)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, buffer)
    return int.from_bytes(buffer[:4], "little")


def set_file_flags(fd: int, flags: int) -> None:
    """Set the ``FS_*_FL`` of an open file, as chattr(1) does."""
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, flags.to_bytes(8, "little"))


def without_set_id(mode: int) -> int:
    """What is left of ``mode`` when somebody else than root writes to, truncates or gives away a file."""
    return mode & ~stat.S_ISUID & ~(stat.S_ISGID if mode & stat.S_IXGRP else 0)


def drop_set_id(fd: int) -> None:
    """Take setuid and setgid from an open file, which the kernel does for others but not for a root's file server."""
    mode = os.fstat(fd).st_mode
    kept = without_set_id(mode)
    if kept != mode:
        os.fchmod(fd, stat.S_IMODE(kept))


def check_xattr_namespace(name: bytes) -> None:
    """Refuse an extended attribute that no file system of Linux takes (xattr(7)): ``EOPNOTSUPP``, ``EINVAL``."""
    namespace, _, rest = name.partition(b".")
    if namespace not in (b"user", b"trusted", b"security") and os.fsdecode(name) not in ACL_XATTRS:
        raise OSError(errno.EOPNOTSUPP, "no such namespace of attributes", name)
    if not rest:
        raise OSError(errno.EINVAL, "an attribute without a name", name)


def ficlone(dst_fd: int, src_fd: int) -> None:
    """Make ``dst_fd`` share all of ``src_fd``'s blocks (reflink); ``OSError`` where the file system can't."""
    fcntl.ioctl(dst_fd, FICLONE, src_fd)


def data_segments(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield ``(offset, length)`` of every stretch of data below ``size`` bytes; holes are left out."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole follows
                return
            if error.errno != errno.EINVAL:  # EINVAL: the file system doesn't know of holes
                raise
            yield end, size - end
            return
        if start >= size:
            return
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, end - start


def copy_data(src_fd: int, dst_fd: int, size: int) -> bool:
    """Make the empty file ``dst_fd`` equal to the first ``size`` bytes of ``src_fd``: reflink, else a copy with its
    holes kept. Gives whether data was written, so not yet on the disk, rather than shared.

    Raises ``OSError``; ``EIO`` when the source turns out shorter than ``size``.
    """
    with contextlib.suppress(OSError):
        ficlone(dst_fd, src_fd)
        if os.fstat(dst_fd).st_size != size:
            os.ftruncate(dst_fd, size)
        return False
    if size <= _COPY_AT_ONCE and os.fstat(src_fd).st_blocks * 512 >= size:  # no hole
        _copy_at_once(src_fd, dst_fd, size)
        return True
    os.ftruncate(dst_fd, size)
    for offset, length in data_segments(src_fd, size):
        _copy_range(src_fd, dst_fd, offset, length)
    return True


def _copy_at_once(src_fd: int, dst_fd: int, size: int) -> None:
    data = os.pread(src_fd, size, 0)
    if len(data) != size:
        raise OSError(errno.EIO, "the source file became shorter while it was copied")
    done = 0
    while done < size:
        done += os.pwrite(dst_fd, data[done:], done)


def _copy_range(src_fd: int, dst_fd: int, offset: int, length: int) -> None:
    end = offset + length
    while offset < end:
        want = min(end - offset, _COPY_CHUNK)
        try:
            done = os.copy_file_range(src_fd, dst_fd, want, offset, offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            done = os.pwrite(dst_fd, os.pread(src_fd, min(want, 1 << 20), offset), offset)
        if not done:
            raise OSError(errno.EIO, "the source file became shorter while it was copied")
        offset += done


def entry_path(dir_fd: int, name: bytes) -> bytes:
    """A path to ``name`` in ``dir_fd`` for calls that take no descriptor of a directory (the ``*xattr`` family before
    Linux 6.13).

    The last component is not followed by the ``l*`` calls; ``name`` must be one component.
    """
    return b"/proc/self/fd/%d/%s" % (dir_fd, name)


def fd_path(fd: int) -> bytes:
    """A path that means the file of ``fd``, also one opened with ``O_PATH`` or unlinked."""
    return b"/proc/self/fd/%d" % fd


def remove_tree(dir_fd: int, name: bytes) -> None:
    """Remove ``name`` below ``dir_fd`` and, if it is a directory, all that is in it; no symbolic link is followed."""
    try:
        info = os.lstat(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(info.st_mode):
        os.unlink(name, dir_fd=dir_fd)
        return
    # An explicit stack with one descriptor at a time keeps deep hostile trees from exhausting either.
    fd = openat2(dir_fd, name, os.O_RDONLY | os.O_DIRECTORY)
    path = [name]
    try:
        while path:
            child = _empty_directory(fd)
            if child is not None:
                fd = _step(fd, child)
                path.append(child)
                continue
            done = path.pop()
            fd = _step(fd, b"..") if path else _replace(fd, os.dup(dir_fd))
            os.rmdir(done, dir_fd=fd)
    finally:
        os.close(fd)


def _empty_directory(fd: int) -> bytes | None:
    """Unlink everything in ``fd`` but directories that hold something; give one of those, or ``None``."""
    with os.scandir(fd) as entries:
        names = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
    directories = [name for name, is_directory in names if is_directory]
    for name, is_directory in names:
        if not is_directory:
            os.unlink(name, dir_fd=fd)
    while directories:
        try:
            os.rmdir(directories[-1], dir_fd=fd)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return directories[-1]
        directories.pop()
    return None


def _step(fd: int, name: bytes) -> int:
    """Close ``fd`` and give the directory ``name`` (a child, or ``..``) below it."""
    return _replace(fd, os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd))


def _replace(old: int, new: int) -> int:
    os.close(old)
    return new
