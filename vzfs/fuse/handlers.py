"""What the direct engine does for each request: from the protocol's fields to the tree's operations and back.

Rules:
- A handler gets the node number, the body and the whole header as a tuple (see ``wire.Header``) and gives the body of
  the answer, or ``None`` when there is none or a worker will send it. It may raise ``OSError`` with the errno to
  answer.
- What the index knows is answered by the index, without a system call; what takes long is done by a worker.
- No state of an open file is kept in its handle: it is known by its node number, to a successor of this process as
  well. The handle of who may write is a number that nobody else has, so that each is told of a failed flush once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

from vzfs import linux
from vzfs.fuse import ioctl, wire
from vzfs.fuse.client import CAP_SYS_ADMIN, has_capability
from vzfs.fuse.device import MAX_WRITE
from vzfs.fuse.openfiles import OpenFiles
from vzfs.fuse.setid import SET_ID, drop_set_id, guard_set_id, left_of
from vzfs.fuse.state import ANSWERED
from vzfs.fuse.wire import Opcode
from vzfs.store.index import LIFETIME_S
from vzfs.tree.node import Entry, Handle, Kind
from vzfs.tree.tree import Caller, Changes, Tree

RawHeader: TypeAlias = tuple[int, ...]
Answer: TypeAlias = bytes | bytearray | memoryview | None
Handler: TypeAlias = Callable[[int, memoryview, RawHeader], Answer]
Later: TypeAlias = Callable[..., Answer]

UNIQUE, UID, GID, PID = 2, 4, 5, 6
"""Positions in a header."""
SMALL_WRITE = 128 << 10
"""Bytes up to which a write into the page cache is done at once: tens of microseconds."""
SMALL_COPY = 128 << 10
_RWF_NOWAIT = 8  # <linux/fs.h>: fail with EAGAIN instead of waiting for the disk
_MODE = 0o177777
_FLAGS = 0x7FFFFFFF  # of open(2), an int
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
_INDEX, _TREE, _STORE = ANSWERED, ANSWERED + 1, ANSWERED + 2
_DOTS = (b".", b"..")
_SOMETHING = 0x1BF
"""Bits of SETATTR's ``valid`` that change something: mode, owner, group, size and times. Without any of them the kernel
tells that it is about to let somebody write who may not keep set-id bits, by passthrough too, or that chown(2) was
called for nothing, which takes them as well (fs/fuse/dir.c and file_remove_privs in fs/inode.c)."""


class Handlers:
    """One mount's requests. ``later(header, function, *arguments)`` lets a worker answer with what the function gives;
    without a header nobody waits for that. ``words`` are the shared statistics."""

    def __init__(self, tree: Tree, files: OpenFiles, words: memoryview, later: Later) -> None:
        self._tree = tree
        self._files = files
        self._words = words
        self._later = later
        self._sent_back: tuple[int, int] | None = None

    def table(self) -> list[Handler]:
        """Handlers by opcode; unknown ones are refused."""
        table: list[Handler] = [self._refuse] * wire.OPCODES
        for opcode in Opcode:
            table[opcode] = getattr(self, f"_{opcode.name.lower()}", self._refuse)
        return table

    def _refuse(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        """ENOSYS; the kernel mostly doesn't ask again, and FLUSH, OPENDIR and ACCESS are better not asked."""
        raise OSError(errno.ENOSYS, "not a request of this file system")

    def _ignore(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        return None

    _interrupt = _ignore  # what is being done is done soon
    _notify_reply = _ignore

    # ------------------------------------------------------------------------------------------- names and attributes

    def _lookup(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        name = wire.name(body)
        if name in _DOTS:  # who has a file handle, see open_by_handle_at(2)
            self._words[_STORE] += 1
            look_up = self._tree.lookup_number if name == b"." else self._tree.lookup_parent
            return self.entry_out(look_up(node))
        ready = self._tree.ready_lookup(node, name)
        if ready is not None:
            self._words[_INDEX] += 1
            return ready or wire.NO_ENTRY
        self._words[_STORE] += 1
        entry = self._tree.lookup(node, name)
        return wire.NO_ENTRY if entry is None else self.entry_out(entry)

    def entry_out(self, entry: Entry) -> bytes:
        number, generation, attributes, name_s = entry
        return wire.entry_out(number, generation, attributes, name_s, self.lifetime(number))

    def lifetime(self, number: int) -> int:
        """For how many seconds the attributes of the node are certain."""
        return 0 if self._files.is_mapped(number) else LIFETIME_S

    def _forget(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        self._forget_one(node, wire.fields(wire.FORGET_IN, body)[0])
        return None

    def _batch_forget(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        for number, count in wire.forgotten(body):
            self._forget_one(number, count)
        return None

    def _forget_one(self, number: int, count: int) -> None:
        if self._tree.slow_to_forget(number):
            self._later(None, self._tree.forget, number, count)
        else:
            self._tree.forget(number, count)

    def _getattr(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        ready = self._tree.ready_attributes(node)
        if ready is not None:
            self._words[_INDEX] += 1
            return wire.ready_attr_out(ready)
        self._words[_STORE] += 1
        return wire.attr_out(self._tree.getattr(node), self.lifetime(node))

    def _statx(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        wire.fields(wire.STATX_IN, body)
        self._words[_STORE] += 1
        return wire.statx_out(self._tree.getattr(node), self._tree.birth_time(node))

    def _setattr(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        (valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _) = wire.fields(
            wire.SETATTR_IN, body
        )
        now = time.time_ns()
        changes = Changes(
            mode=stat.S_IMODE(mode) if valid & wire.FATTR_MODE else None,
            uid=uid if valid & wire.FATTR_UID else None,
            gid=gid if valid & wire.FATTR_GID else None,
            size=wire.position(size) if valid & wire.FATTR_SIZE else None,
            atime_ns=_moment(valid, wire.FATTR_ATIME, wire.FATTR_ATIME_NOW, now, atime, atime_ns),
            mtime_ns=_moment(valid, wire.FATTR_MTIME, wire.FATTR_MTIME_NOW, now, mtime, mtime_ns),
        )
        self._words[_STORE] += 1
        kill = bool(valid & wire.FATTR_KILL_SUIDGID) or not valid & _SOMETHING
        arguments = (node, changes, kill, header[PID])
        if changes.size is None:
            if self._tree.slow_to_change(node):
                return self._later(header, self._set_attributes, *arguments)
            return self._set_attributes(*arguments)
        if self._tree.slow_to_own(node, size=changes.size):
            return self._later(header, self._by_name, self._set_attributes, node, header[PID], *arguments[1:])
        return self._by_name(self._set_attributes, node, header[PID], *arguments[1:])

    def _set_attributes(self, node: int, changes: Changes, kill: bool, client: int) -> bytes:
        if changes.mode is None and (kill or changes.uid is not None or changes.gid is not None):
            changes = self._losing_set_id(node, changes, kill, client)
        return wire.attr_out(self._tree.setattr(node, changes), self.lifetime(node))

    def _losing_set_id(self, node: int, changes: Changes, kill: bool, client: int) -> Changes:
        """The changes, with the mode that is left to a regular file by a writer or a new owner."""
        now = self._tree.getattr(node)
        if not stat.S_ISREG(now.mode) or not (kill or now.mode & SET_ID):
            return changes
        mode = left_of(now.mode, now.gid, client)
        if not kill and mode & stat.S_ISGID:
            return changes  # chown(2) in the store takes setuid and keeps this
        return replace(changes, mode=stat.S_IMODE(mode))  # also if it stays the same: the change time moves

    def _readlink(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        self._words[_STORE] += 1
        return self._tree.readlink(node)

    def _statfs(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        self._words[_STORE] += 1
        info = self._tree.statfs()
        return wire.statfs_out(
            (info.f_blocks, info.f_bfree, info.f_bavail, info.f_files, info.f_ffree, info.f_bsize, 255, info.f_frsize)
        )

    # --------------------------------------------------------------------------------------------------- making names

    def _changing(self, header: RawHeader, parent: int, function: Callable[..., bytes], *arguments: object) -> Answer:
        """Do what changes directory ``parent``; a worker does if that has to be unfolded at length first."""
        self._words[_STORE] += 1
        if self._tree.slow_to_own(parent):
            return self._later(header, function, *arguments)
        return function(*arguments)

    def _mknod(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        mode, rdev, umask, _ = wire.fields(wire.MKNOD_IN, body)
        name = wire.name(body[wire.MKNOD_IN.size :])
        caller = _caller(header, umask)
        return self._changing(header, node, self._made, self._tree.mknod, node, name, mode & _MODE, rdev, caller)

    def _mkdir(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        mode, umask = wire.fields(wire.MKDIR_IN, body)
        name = wire.name(body[wire.MKDIR_IN.size :])
        caller = _caller(header, umask)
        return self._changing(header, node, self._made, self._tree.mkdir, node, name, mode & _MODE, caller)

    def _symlink(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        name, target = wire.two_names(body)
        return self._changing(header, node, self._made, self._tree.symlink, node, name, target, _caller(header))

    def _link(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        (number,) = wire.fields(wire.LINK_IN, body)
        name = wire.name(body[wire.LINK_IN.size :])
        return self._changing(header, node, self._made, self._tree.link, number, node, name)

    def _made(self, make: Callable[..., Entry], *arguments: object) -> bytes:
        return self.entry_out(make(*arguments))

    def _create(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        name = wire.name(body[wire.CREATE_IN.size :])
        return self._making_open(node, body, header, self._tree.create, name)

    def _tmpfile(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        return self._making_open(node, body, header, self._tree.tmpfile)

    def _making_open(
        self, node: int, body: memoryview, header: RawHeader, make: Callable[..., tuple[Handle, Entry]], *name: bytes
    ) -> Answer:
        flags, mode, umask, _ = wire.fields(wire.CREATE_IN, body)
        flags &= _FLAGS
        arguments = (node, *name, mode & _MODE, flags, _caller(header, umask))
        return self._changing(header, node, self._made_open, flags, header[UNIQUE], header[PID], make, *arguments)

    def _made_open(
        self, flags: int, request: int, client: int, make: Callable[..., tuple[Handle, Entry]], *arguments: object
    ) -> bytes:
        """The answer to who makes and opens, or opens, the container's own file."""
        handle, entry = make(*arguments)
        try:
            with self._tree.lock:
                number = entry.number
                file = self._files.known.get(number) or self._files.register(
                    number, handle.fd, own=handle.node.kind is Kind.OWN, client=client
                )
                opened = self._files.open(file, flags, request)
        finally:
            self._tree.release(handle.number)
        return self.entry_out(entry) + opened

    # ----------------------------------------------------------------------------------------- removing, moving names

    def _unlink(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        name = wire.name(body)
        self._words[_STORE] += 1
        if self._tree.slow_to_own(node):
            return self._later(header, self._unlink_slowly, node, name)
        freed = self._tree.unlink(node, name)
        if freed is None:
            return b""
        return self._later(header, self._done, self._tree.free, freed)  # who removes a large file wants its space now

    def _unlink_slowly(self, parent: int, name: bytes) -> bytes:
        freed = self._tree.unlink(parent, name)
        if freed is not None:
            self._tree.free(freed)
        return b""

    def _rmdir(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        return self._changing(header, node, self._done, self._tree.rmdir, node, wire.name(body))

    def _rename(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        (target,) = wire.fields(wire.RENAME_IN, body)
        return self._rename_to(node, target, 0, body[wire.RENAME_IN.size :], header)

    def _rename2(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        target, flags, _ = wire.fields(wire.RENAME2_IN, body)
        return self._rename_to(node, target, flags, body[wire.RENAME2_IN.size :], header)

    def _rename_to(self, node: int, target: int, flags: int, names: memoryview, header: RawHeader) -> Answer:
        old, new = wire.two_names(names)
        slow = node if self._tree.slow_to_own(node) else target
        request = header[UNIQUE] & ~wire.UNIQUE_RESEND
        return self._changing(header, slow, self._done, self._tree.rename, node, old, target, new, flags, request)

    @staticmethod
    def _done(change: Callable[..., None], *arguments: object) -> bytes:
        change(*arguments)
        return b""

    # ------------------------------------------------------------------------------------------------------ open files

    def _open(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        flags, open_flags = wire.fields(wire.OPEN_IN, body)
        tree, flags = self._tree, flags & _FLAGS
        if not flags & os.O_TRUNC:
            with tree.lock:
                file = self._files.known.get(node)
                if file is not None and (not flags & _WRITING or file.own):
                    self._words[_TREE] += 1
                    return self._files.open(file, flags, header[UNIQUE])
        self._words[_STORE] += 1
        kill = bool(open_flags & wire.OPEN_KILL_SUIDGID)
        arguments = (flags, header[UNIQUE], header[PID], kill)
        if not flags & _WRITING:
            return self.open_data(node, *arguments)
        if tree.slow_to_own(node, size=0 if flags & os.O_TRUNC else None):
            return self._later(header, self._by_name, self.open_data, node, header[PID], *arguments)
        return self._by_name(self.open_data, node, header[PID], *arguments)

    def _by_name(self, function: Callable[..., bytes], node: int, client: int, *arguments: object) -> bytes:
        """Change the data of a node that may be what readers keep of a file which has been copied up since.

        ESTALE sends who came by a name to look that up again, and to the copy; who comes back with the same node at
        once has none (/proc/PID/fd/N), and is told ETXTBSY.
        """
        came = node, client
        try:
            answer = function(node, *arguments)
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.ETXTBSY):
                raise
            if self._sent_back == came:
                self._sent_back = None
                raise OSError(errno.ETXTBSY, "its template's data is in use, and it was not opened by a name") from None
            self._sent_back = came
            raise OSError(errno.ESTALE, "the copy has a node of its own") from None
        if self._sent_back is not None and self._sent_back[1] == client:
            self._sent_back = None
        return answer

    def open_data(self, number: int, flags: int, request: int, client: int, kill: bool = False) -> bytes:
        """The answer to who opens the regular file ``number``; ``kill``: its set-id bits go."""
        tree, writing = self._tree, flags & _WRITING
        if writing:
            tree.own_file(number, 0 if flags & os.O_TRUNC else None)
        with tree.lock:
            if not writing and tree.is_served(number):
                file = self._files.known.get(number) or self._files.serve(number, own=False, client=client)
                return self._files.open(file, flags, request)
            fd, own = tree.data_of(number, flags)
            try:
                if kill:
                    drop_set_id(fd, client)
                file = self._files.known.get(number) or self._files.register(number, fd, own=own, client=client)
                return self._files.open(file, flags, request)
            finally:
                os.close(fd)

    def _release(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        handle = wire.fields(wire.RELEASE_IN, body)[0]
        tree = self._tree
        self._words[_TREE] += 1
        with tree.lock:
            file = self._files.known.get(node)
            if file is None:
                return b""
            if not file.stale or not tree.slow_to_forget(node):
                self._files.close(file, handle, header[UNIQUE])
                return b""
        return self._later(header, self._close, node, handle, header[UNIQUE])

    def _close(self, node: int, handle: int, request: int) -> bytes:
        with self._tree.lock:
            file = self._files.known.get(node)
            if file is not None:
                self._files.close(file, handle, request)
        return b""

    @contextlib.contextmanager
    def _descriptor(self, node: int, flags: int) -> Iterator[int]:
        """A descriptor of the node's data, for one request."""
        fd = self._tree.data_of(node, flags)[0]
        try:
            yield fd
        finally:
            os.close(fd)

    def _read(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        _, offset, size, *_ = wire.fields(wire.READ_IN, body)
        if size > MAX_WRITE:
            raise wire.Malformed(f"{size} bytes are more than the kernel takes at once")
        self._words[_STORE] += 1
        with self._descriptor(node, os.O_RDONLY) as fd:
            buffer = bytearray(size)
            try:
                done = os.preadv(fd, [buffer], wire.position(offset), _RWF_NOWAIT)
                if done == size or (done and offset + done >= os.fstat(fd).st_size):
                    return memoryview(buffer)[:done]
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                    raise
        return self._later(header, self._read_slowly, node, offset, size)

    def _read_slowly(self, node: int, offset: int, size: int) -> bytes:
        with self._descriptor(node, os.O_RDONLY) as fd:
            return os.pread(fd, size, offset)

    def _write(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        _, offset, size, write_flags, *_ = wire.fields(wire.WRITE_IN, body)
        data = body[wire.WRITE_IN.size :]
        if len(data) != size:
            raise wire.Malformed(f"it says {size} bytes of data and has {len(data)}")
        wire.position(offset + size)
        self._words[_STORE] += 1
        kill = bool(write_flags & wire.WRITE_KILL_SUIDGID)
        if size <= SMALL_WRITE:
            return self._write_data(node, data, offset, kill, header[PID])
        return self._later(header, self._write_data, node, data.tobytes(), offset, kill, header[PID])

    def _write_data(self, node: int, data: bytes | memoryview, offset: int, kill: bool, client: int) -> bytes:
        with self._descriptor(node, os.O_WRONLY) as fd:
            if kill:
                drop_set_id(fd, client)
            return wire.WRITE_OUT.pack(os.pwrite(fd, data, offset), 0)

    def _fsync(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        handle, flags, _ = wire.fields(wire.FSYNC_IN, body)
        self._words[_STORE] += 1
        return self._later(header, self._flush_data, node, handle, bool(flags & wire.FSYNC_FDATASYNC))

    def _flush_data(self, node: int, handle: int, data_only: bool) -> bytes:
        with self._tree.lock:
            self._files.tell_failure(node, handle)
        with self._descriptor(node, os.O_RDONLY) as fd:
            try:
                (os.fdatasync if data_only else os.fsync)(fd)
            except OSError as error:
                with self._tree.lock:
                    self._files.failed(node, handle, error)
                raise
        return b""

    def _syncfs(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        self._words[_STORE] += 1
        return self._later(header, self._done, self._tree.sync)

    def _fallocate(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        _, offset, length, mode, _ = wire.fields(wire.FALLOCATE_IN, body)
        wire.position(offset + length)
        self._words[_STORE] += 1
        return self._later(header, self._allocate, node, mode, offset, length, header[PID])

    def _allocate(self, node: int, mode: int, offset: int, length: int, client: int) -> bytes:
        with self._descriptor(node, os.O_RDWR) as fd:
            guard_set_id(fd, client)
            linux.fallocate(fd, mode, offset, length)
        return b""

    def _lseek(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        _, offset, whence, _ = wire.fields(wire.LSEEK_IN, body)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "the kernel seeks otherwise by itself")
        if offset >= 1 << 63:
            raise OSError(errno.ENXIO, "before the beginning")
        self._words[_STORE] += 1
        with self._descriptor(node, os.O_RDONLY) as fd:
            return wire.LSEEK_OUT.pack(os.lseek(fd, offset, whence))

    def _copy_file_range(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        _, source_at, target, _, target_at, length, _ = wire.fields(wire.COPY_FILE_RANGE_IN, body)
        self._words[_STORE] += 1
        for position in (source_at, target_at, length):
            wire.position(position)
        wide = header[1] == Opcode.COPY_FILE_RANGE_64
        arguments = (node, source_at, target, target_at, length, wide, header[PID])
        if length > SMALL_COPY:
            return self._later(header, self._copy, *arguments)
        return self._copy(*arguments)

    _copy_file_range_64 = _copy_file_range

    def _copy(
        self, source: int, source_at: int, target: int, target_at: int, length: int, wide: bool, client: int
    ) -> bytes:
        with (
            self._descriptor(source, os.O_RDONLY) as source_fd,
            self._descriptor(target, os.O_WRONLY) as target_fd,
        ):
            guard_set_id(target_fd, client)
            done = os.copy_file_range(source_fd, target_fd, min(length, 1 << 30), source_at, target_at)
        if wide:
            return wire.COPY_FILE_RANGE_OUT.pack(done)
        return wire.WRITE_OUT.pack(done, 0)

    def _ioctl(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        _, _, command, _, in_size, out_size = wire.fields(wire.IOCTL_IN, body)
        data = body[wire.IOCTL_IN.size :]
        if len(data) < in_size:
            raise wire.Malformed("its argument is shorter than it says")
        self._words[_STORE] += 1
        if command in (ioctl.FS_IOC_GETFLAGS, ioctl.FS_IOC32_GETFLAGS):
            return ioctl.answer(self._tree.file_flags(node), out_size)
        if command == ioctl.FS_IOC_FSGETXATTR:  # the kernel asks that before it changes flags (vfs_fileattr_set)
            flags = self._tree.file_flags(node)
            return ioctl.answer(ioctl.xflags(flags), out_size)
        if command in (ioctl.FS_IOC_SETFLAGS, ioctl.FS_IOC32_SETFLAGS) and in_size >= 4:
            return self._later(header, self._set_flags, node, int.from_bytes(data[:4], "little"))
        raise OSError(errno.ENOTTY, "not an ioctl of this file system")

    def _set_flags(self, node: int, flags: int) -> bytes:
        self._tree.set_file_flags(node, flags)
        self._files.attributes_changed(node)
        return wire.IOCTL_OUT.pack(0, 0, 0, 0)

    # ----------------------------------------------------------------------------------------------------- directories

    def _readdirplus(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        _, offset, size, *_ = wire.fields(wire.READ_IN, body)
        ready = self._tree.ready_listing(node, offset, size)
        if ready is not None:
            self._words[_INDEX] += 1
            return ready
        return self._list(node, offset, size, with_attributes=True)

    def _readdir(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        _, offset, size, *_ = wire.fields(wire.READ_IN, body)
        return self._list(node, offset, size, with_attributes=False)

    def _list(self, node: int, offset: int, size: int, *, with_attributes: bool) -> bytes:
        """Records of as many entries after ``offset`` as fit."""
        self._words[_STORE] += 1
        records: list[bytes] = []
        room = size
        wire.position(offset)
        for name, entry, next_offset in self._tree.list_real(node, offset, size):
            if entry is None:
                continue
            record = wire.dirent(entry.attributes.ino, next_offset, entry.attributes.mode, name)
            if with_attributes:
                dot = name in _DOTS
                record = (_dot_out(entry) if dot else self.entry_out(entry)) + record
            if len(record) > room:
                break
            records.append(record)
            room -= len(record)
            if with_attributes and not dot:
                self._tree.remember(entry.number)
        return b"".join(records)

    def _fsyncdir(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        self._words[_STORE] += 1
        return self._later(header, self._done, self._tree.sync_directory, node)

    # --------------------------------------------------------------------------------------------- extended attributes

    def _getxattr(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        room, _ = wire.fields(wire.GETXATTR_IN, body)
        name = wire.name(body[wire.GETXATTR_IN.size :])
        if self._tree.ready_xattr(node):
            self._words[_INDEX] += 1
            linux.check_xattr_namespace(name)
            raise OSError(errno.ENODATA, "no extended attributes at all")
        self._words[_STORE] += 1
        return wire.xattr_out(self._tree.getxattr(node, name), room)

    def _listxattr(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        room, _ = wire.fields(wire.GETXATTR_IN, body)
        self._words[_STORE] += 1
        names = self._tree.listxattr(node)
        if any(name.startswith(b"trusted.") for name in names) and not has_capability(header[PID], CAP_SYS_ADMIN):
            names = [name for name in names if not name.startswith(b"trusted.")]
        return wire.xattr_out(b"".join(name + b"\0" for name in names), room)

    def _setxattr(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        size, flags, extra, _ = wire.fields(wire.SETXATTR_IN, body)
        name, value = wire.name_and_value(body[wire.SETXATTR_IN.size :], size)
        kill = bool(extra & wire.SETXATTR_ACL_KILL_SGID)
        return self._changing(header, node, self._set_xattr, node, name, value, flags, kill)

    def _set_xattr(self, node: int, name: bytes, value: bytes, flags: int, kill: bool) -> bytes:
        self._tree.setxattr(node, name, value, flags)
        if kill:
            mode = self._tree.getattr(node).mode
            if mode & stat.S_ISGID:
                self._tree.setattr(node, Changes(mode=stat.S_IMODE(mode & ~stat.S_ISGID)))
        return b""

    def _removexattr(self, node: int, body: memoryview, header: RawHeader) -> Answer:
        return self._changing(header, node, self._done, self._tree.removexattr, node, wire.name(body))


def _caller(header: RawHeader, umask: int = 0) -> Caller:
    return Caller(header[UID], header[GID], umask & 0o777)


def _dot_out(entry: Entry) -> bytes:
    """A record of ``.`` or ``..``: the kernel doesn't look at node and attributes, and doesn't count it."""
    return wire.entry_out(0, 0, entry.attributes)


def _moment(valid: int, given: int, now_given: int, now: int, seconds: int, nanoseconds: int) -> int | None:
    """A time of SETATTR in nanoseconds: now, the one given (its seconds are signed), or ``None`` to leave it."""
    if valid & now_given:
        return now
    if not valid & given:
        return None
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * wire.NS + nanoseconds
