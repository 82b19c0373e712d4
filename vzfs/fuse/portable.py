"""The pyfuse3 engine: FUSE requests to the tree's operations, on trio. Runs wherever libfuse 3 does.

Rules:
- Names and attributes are cached by the kernel without limit: this mount is the only writer of its private area.
- What is quick is done at once; what the tree calls slow, flushes to the disk and reads that would wait for it are done
  in a thread, so other requests go on.
- No exception leaves a handler but ``FUSEError``: an ``OSError`` becomes its errno, anything else EIO and a log entry
  that names the request.
- Every request is counted, and for how long it kept the loop from other requests.

Node numbers are inode numbers here, because pyfuse3 has one field for both. FLUSH is refused once (ENOSYS), after which
the kernel sends none. What this engine can't do, because libfuse 3.14 or pyfuse3 don't pass it on: fallocate,
SEEK_HOLE, O_TMPFILE, copy_file_range (the kernel copies through the page cache instead), ioctl, ``..`` of handles.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import stat
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from vzfs.fuse.state import ERRORS, PAUSES, REQUESTS, SLOW, State
from vzfs.fuse.wire import Opcode
from vzfs.store.index import LIFETIME_S, Attributes
from vzfs.tree.listing import Listing
from vzfs.tree.node import ROOT_NUMBER, Entry, Handle
from vzfs.tree.tree import Caller, Changes, Tree

log = logging.getLogger(__name__)

THREADS = 16
"""Requests that may wait for the disk at once."""
SMALL_WRITE = 128 << 10
"""Bytes up to which a write into the page cache is done without a thread: tens of microseconds."""
_RWF_NOWAIT = 8  # <linux/fs.h>: fail with EAGAIN instead of waiting for the disk

T = TypeVar("T")
P = ParamSpec("P")


_OPCODES = {"readdir": Opcode.READDIRPLUS}
"""Handlers that are not called as what the kernel sends to them. RENAME2 and BATCH_FORGET can't be told from their
plain forms here."""


def _request(handler: Callable[..., object], arguments: tuple[object, ...]) -> str:
    """How the log names a request: names in full, data that is written by its length only."""
    shown = (f"{len(one)} bytes" if isinstance(one, bytes) and len(one) > 255 else repr(one) for one in arguments)
    return f"{handler.__name__}({', '.join(shown)})"


def _guarded(
    handler: Callable[Concatenate[Engine, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Engine, P], Coroutine[Any, Any, T]]:
    """Turn whatever goes wrong into an errno, and log what should not have happened; count the request and its time."""
    name = handler.__name__
    word = REQUESTS + (_OPCODES.get(name) or Opcode[name.upper()])
    clock = time.perf_counter_ns

    @functools.wraps(handler)
    async def guarded(engine: Engine, /, *arguments: P.args, **keywords: P.kwargs) -> T:
        words, waits = engine.words, engine.waits
        words[word] += 1
        start = clock()
        try:
            return await handler(engine, *arguments, **keywords)
        except OSError as error:
            words[ERRORS] += 1
            if not error.errno:
                log.exception("%s failed without an errno", _request(handler, arguments))
            elif error.errno == errno.EIO:  # damage or a bad disk: the program that sees it may not say where
                log.error("%s: %s", _request(handler, arguments), error)  # noqa: TRY400
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except pyfuse3.FUSEError:
            words[ERRORS] += 1
            raise
        except Exception:
            words[ERRORS] += 1
            log.exception("%s failed", _request(handler, arguments))
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            # Who waited for a thread counted that; if nobody did meanwhile, this handler ran in one go.
            words[(PAUSES if engine.waits == waits else SLOW) + (clock() - start).bit_length()] += 1

    return guarded


@dataclass(slots=True)
class OpenDirectory:
    """An open directory: its node number and, once it was read from the start, what is listed of it."""

    number: int
    listing: Listing | None = None


class Engine(pyfuse3.Operations):
    """Request handlers of one mount, which count in ``state``."""

    supports_dot_lookup = False
    enable_acl = True
    enable_writeback_cache = False  # write errors such as a full disk must reach the writer

    def __init__(self, tree: Tree, state: State) -> None:
        super().__init__()
        state.note(tree.counters)
        self.words = state.words
        self.waits = 0
        self._tree = tree
        self._limiter = trio.CapacityLimiter(THREADS)
        self._directories: dict[int, OpenDirectory] = {}
        self._next_directory = 1

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        self.waits += 1
        return await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter)

    async def _changing(self, parent: int, function: Callable[..., T], *arguments: Any) -> T:
        """Call what changes directory ``parent``, in a thread if that has to be unfolded at length first."""
        if self._tree.slow_to_own(parent):
            return await self._in_thread(function, *arguments)
        return function(*arguments)

    # ------------------------------------------------------------------------------------------- names and attributes

    @_guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        entry = self._tree.lookup(parent_inode, name)
        if entry is None:
            return _no_entry()
        return _entry_out(entry)

    def init(self) -> None:
        self.words[REQUESTS + Opcode.INIT] += 1

    @_guarded
    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, count in inode_list:
            try:
                if self._tree.slow_to_forget(number):
                    await self._in_thread(self._tree.forget, number, count)
                else:
                    self._tree.forget(number, count)
            except Exception:
                log.exception("forget(%d, %d) failed", number, count)

    @_guarded
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return _attributes_out(self._tree.getattr(inode))

    @_guarded
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        changes = Changes(
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        size = changes.size
        if self._tree.slow_to_change(inode) if size is None else self._tree.slow_to_own(inode, size=size):
            return _attributes_out(await self._in_thread(self._tree.setattr, inode, changes, fh))
        return _attributes_out(self._tree.setattr(inode, changes, fh))

    @_guarded
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._tree.readlink(inode)

    @_guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        info = self._tree.statfs()
        data = pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(data, name, getattr(info, name))
        data.f_namemax = 255
        return data

    @_guarded
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        raise pyfuse3.FUSEError(errno.ENOSYS)  # default_permissions: the kernel checks

    # --------------------------------------------------------------------------------------------------- making names

    @_guarded
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        make = self._tree.mknod
        return _entry_out(await self._changing(parent_inode, make, parent_inode, name, mode, rdev, _caller(ctx)))

    @_guarded
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        make = self._tree.mkdir
        return _entry_out(await self._changing(parent_inode, make, parent_inode, name, mode, _caller(ctx)))

    @_guarded
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        make = self._tree.symlink
        return _entry_out(await self._changing(parent_inode, make, parent_inode, name, target, _caller(ctx)))

    @_guarded
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        make = self._tree.link
        return _entry_out(await self._changing(new_parent_inode, make, inode, new_parent_inode, new_name))

    @_guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        make = self._tree.create
        handle, entry = await self._changing(parent_inode, make, parent_inode, name, mode, flags, _caller(ctx))
        return _file_info(handle), _entry_out(entry)

    # ----------------------------------------------------------------------------------------- removing, moving names

    @_guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        freed = await self._changing(parent_inode, self._tree.unlink, parent_inode, name)
        if freed is not None:
            await self._in_thread(self._tree.free, freed)  # who removes a large file wants its space now

    @_guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._changing(parent_inode, self._tree.rmdir, parent_inode, name)

    @_guarded
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        arguments = (parent_inode_old, name_old, parent_inode_new, name_new, flags)
        if self._tree.slow_to_own(parent_inode_old):
            await self._in_thread(self._tree.rename, *arguments)
        else:
            await self._changing(parent_inode_new, self._tree.rename, *arguments)

    # ------------------------------------------------------------------------------------------------------ open files

    @_guarded
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        writing = flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC
        if writing and self._tree.slow_to_own(inode, size=0 if flags & os.O_TRUNC else None):
            return _file_info(await self._in_thread(self._tree.open, inode, flags, _caller(ctx)))
        return _file_info(self._tree.open(inode, flags, _caller(ctx)))

    @_guarded
    async def read(self, fh: int, off: int, size: int) -> bytes:
        fd = self._tree.handle(fh).fd
        buffer = bytearray(size)
        try:
            done = os.preadv(fd, [buffer], off, _RWF_NOWAIT)
            if done == size or (done and off + done >= os.fstat(fd).st_size):
                return bytes(memoryview(buffer)[:done]) if done < size else buffer  # type: ignore[return-value]
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
        return await self._in_thread(os.pread, fd, size, off)

    @_guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._tree.handle(fh)
        if len(buf) <= SMALL_WRITE and not handle.flags & os.O_DSYNC:
            return os.pwrite(handle.fd, buf, off)
        return await self._in_thread(os.pwrite, handle.fd, buf, off)

    @_guarded
    async def flush(self, fh: int) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @_guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._in_thread(os.fdatasync if datasync else os.fsync, self._tree.handle(fh).fd)

    @_guarded
    async def release(self, fh: int) -> None:
        if self._tree.slow_to_forget(self._tree.handle(fh).node.number):
            await self._in_thread(self._tree.release, fh)
        else:
            self._tree.release(fh)

    # ----------------------------------------------------------------------------------------------------- directories

    @_guarded
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        fh = self._next_directory
        self._next_directory += 1
        self._directories[fh] = OpenDirectory(inode)
        return fh

    async def _list(self, inode: int) -> Listing:
        if self._tree.slow_to_list(inode):
            return await self._in_thread(self._tree.listing, inode)
        return self._tree.listing(inode)

    @_guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self._directories[fh]
        listing = directory.listing
        if listing is None or start_id == 0:  # also rewinddir(3) sees what is there now
            listing = directory.listing = await self._list(directory.number)
        for position in range(start_id, len(listing)):
            name, entry = listing.at(position)
            if entry is None:
                continue
            if not pyfuse3.readdir_reply(token, name, _entry_out(entry), position + 1):
                return
            if position > 1:  # the kernel doesn't count the two dots
                self._tree.remember(entry.number)

    @_guarded
    async def releasedir(self, fh: int) -> None:
        self._directories.pop(fh, None)

    @_guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._in_thread(self._tree.sync_directory, self._directories[fh].number)

    # --------------------------------------------------------------------------------------------- extended attributes

    @_guarded
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return self._tree.getxattr(inode, name)

    @_guarded
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return self._tree.listxattr(inode, _caller(ctx))

    @_guarded
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._changing(inode, self._tree.setxattr, inode, name, value)

    @_guarded
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._changing(inode, self._tree.removexattr, inode, name)


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.umask)


def _file_info(handle: Handle) -> pyfuse3.FileInfo:
    return pyfuse3.FileInfo(fh=handle.number, keep_cache=True)


def _no_entry() -> pyfuse3.EntryAttributes:
    """The answer to a look-up of a name that isn't there, to be cached."""
    out = pyfuse3.EntryAttributes()
    out.st_ino = 0
    out.entry_timeout = LIFETIME_S
    return out


def _entry_out(entry: Entry) -> pyfuse3.EntryAttributes:
    out = _attributes_out(entry.attributes)
    out.generation = entry.generation
    if entry.number == ROOT_NUMBER:
        out.st_ino = ROOT_NUMBER
    return out


def _attributes_out(attributes: Attributes) -> pyfuse3.EntryAttributes:
    out = pyfuse3.EntryAttributes()
    (
        out.st_ino,
        out.st_mode,
        out.st_nlink,
        out.st_uid,
        out.st_gid,
        out.st_rdev,
        out.st_size,
        out.st_blocks,
        out.st_blksize,
        out.st_atime_ns,
        out.st_mtime_ns,
        out.st_ctime_ns,
    ) = attributes
    out.entry_timeout = out.attr_timeout = LIFETIME_S
    return out


# ------------------------------------------------------------------------------------------------------------- serving


def serve_mount(tree: Tree, state: State, fd: int, ready: Callable[[], None], detach: Callable[[], None]) -> None:
    """Serve the mount whose device is ``fd`` until it is unmounted or SIGTERM or SIGINT comes; then ``detach`` it."""
    pyfuse3.init(Engine(tree, state), f"/dev/fd/{fd}", set())  # libfuse serves a descriptor that is mounted already
    try:
        trio.run(_serve_until_signal, ready)
    finally:
        detach()
        pyfuse3.close(unmount=False)


async def _serve_until_signal(ready: Callable[[], None]) -> None:
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            nursery.start_soon(_end_on_signal, signals)
            ready()
            await _serve_until_unmounted()
            nursery.cancel_scope.cancel()


async def _serve_until_unmounted() -> None:
    try:
        await pyfuse3.main()
    except* OSError as failed:
        # A request that was just being read when the mount ended (fuse_dev_do_read in fs/fuse/dev.c): an end as any.
        others = failed.split(lambda error: isinstance(error, OSError) and error.errno == errno.ECONNABORTED)[1]
        if others is not None:
            raise others from None


async def _end_on_signal(signals: AsyncIterator[int]) -> None:
    async for number in signals:
        log.info("ending on signal %d", number)
        pyfuse3.terminate()
