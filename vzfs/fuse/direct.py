"""The direct engine: one mount served on /dev/fuse itself, without libfuse, at the speed of the kernel's interface.

A thread that sleeps in read(2) takes a request, answers it from the index or the tree and sleeps again; on its
client's CPU that is a plain switch (``follow``). Reads and writes don't come here at all where the kernel can do them
on the backing files that an open hands to it; else they come in large pieces, for the page cache (``openfiles``).

Rules:
- What takes long is done by a worker, which sends the answer itself; the serving thread never waits for the disk if it
  can know that before.
- No exception leaves a request: an ``OSError`` is answered with its errno, a malformed request with EINVAL, anything
  else with EIO and a log entry that names the request.
- Node numbers and handles mean the same to a successor of this process (``resume``): it asks the kernel for what was
  read and not answered, and takes such a request that finds its work done for answered.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import time
from collections.abc import Callable

from vzfs.errors import UnsupportedError
from vzfs.fuse import wire
from vzfs.fuse.device import MAX_WRITE, Device, ended
from vzfs.fuse.follow import EVERY, Follower, Mode
from vzfs.fuse.handlers import Answer, Handlers, RawHeader
from vzfs.fuse.openfiles import OpenFiles
from vzfs.fuse.resent import Resent
from vzfs.fuse.state import ERRORS, LAST_DONE, OPEN, OPEN_TOP, PAUSES, REQUESTS, SLOW, State
from vzfs.fuse.wire import InitFlag, Opcode
from vzfs.fuse.workers import Workers
from vzfs.tree.tree import Tree

log = logging.getLogger(__name__)

THREADS = 16
"""Requests that may wait for the disk at once."""
AWAKE_US = 50
"""For how long to look for the next request of a client on another CPU: about what waking this one would cost."""
COLLECT_AFTER = 100_000
"""Objects made and not freed before cycles are looked for: hardly any arise, and to look takes ms with many nodes."""
STACK_DEPTH = 1
"""Backing files lie on a plain file system; another one stacked on this mount is still allowed."""
WANTED = (
    InitFlag.ASYNC_READ
    | InitFlag.ATOMIC_O_TRUNC
    | InitFlag.EXPORT_SUPPORT
    | InitFlag.BIG_WRITES
    | InitFlag.DONT_MASK
    | InitFlag.HAS_IOCTL_DIR
    | InitFlag.AUTO_INVAL_DATA
    | InitFlag.DO_READDIRPLUS
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.POSIX_ACL
    | InitFlag.ABORT_ERROR
    | InitFlag.MAX_PAGES
    | InitFlag.CACHE_SYMLINKS
    | InitFlag.NO_OPENDIR_SUPPORT
    | InitFlag.HANDLE_KILLPRIV_V2
    | InitFlag.SETXATTR_EXT
    | InitFlag.INIT_EXT
    | InitFlag.DIRECT_IO_ALLOW_MMAP
    | InitFlag.PASSTHROUGH
    | InitFlag.HAS_RESEND
    | InitFlag.ALLOW_IDMAP
)
"""What is taken of what the kernel offers."""
NEEDED = InitFlag.INIT_EXT
"""Offered by Linux 5.17 and later; older ones lack too much of what this engine is made for."""


def negotiate(fd: int, state: State, withheld: int = 0) -> None:
    """Answer the kernel's INIT on the new mount's device ``fd``, and note in ``state`` what was agreed upon.

    ``withheld``: flags that are not taken, as if the kernel didn't offer them. Raises ``UnsupportedError`` when it is
    too old.
    """
    device = Device(fd, MAX_WRITE)
    length = device.receive()
    header = wire.header(device.buffer, length)
    minor, offer, readahead = wire.offered(memoryview(device.buffer)[wire.IN_HEADER.size : length])
    offer &= ~InitFlag(withheld)
    if offer & NEEDED != NEEDED:
        raise UnsupportedError("this kernel is too old for it", remedy="Linux 5.17 isn't; or: --engine pyfuse3")
    agreed = wire.Negotiated(min(minor, wire.MINOR), _taken(offer), MAX_WRITE)
    device.send(wire.reply(header.unique, wire.init_out(agreed, readahead, max_background=64, stack_depth=STACK_DEPTH)))
    state.words[REQUESTS + Opcode.INIT] += 1
    flags = agreed.flags
    if not agreed.passthrough:
        log.info("this kernel has no FUSE passthrough: data goes through this process")
    elif not _may_pass(device):
        log.info("FUSE passthrough needs CAP_SYS_ADMIN on the node: data goes through this process")
        flags &= ~InitFlag.PASSTHROUGH
    state.agree(int(flags), agreed.minor, agreed.max_write)


def _taken(offer: InitFlag) -> InitFlag:
    """What is taken of an offer.

    Where nothing is passed through, all that changes a file goes through one page cache, which is then never out of
    date. AUTO_INVAL_DATA would throw it away at the first stat(2) after a write, dirty pages of mappings included.
    """
    taken = offer & WANTED
    return taken if taken & InitFlag.PASSTHROUGH else taken & ~InitFlag.AUTO_INVAL_DATA


def _may_pass(device: Device) -> bool:
    """Whether this process may register backing files at all."""
    fd = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
    try:
        device.close_backing(device.open_backing(fd))
    except OSError as error:
        if error.errno == errno.EPERM:
            return False
        log.debug("this program's own files can't be passed through: %s", error)
    finally:
        os.close(fd)
    return True


class Ended(Exception):
    """The serving thread was told to end while it waited."""


class Engine:
    """Serves one mount whose device ``fd`` and ``state`` have been through ``negotiate``, here or in a predecessor."""

    def __init__(self, tree: Tree, fd: int, state: State, *, busy_poll_us: int = 0) -> None:
        self._tree = tree
        self._words = state.words
        state.note(tree.counters)
        self._device = Device(fd, state.max_write)
        self._busy_poll_us = busy_poll_us
        self._can_resend = state.has(InitFlag.HAS_RESEND)
        self._files = OpenFiles(
            self._device,
            tree,
            state.words[OPEN:],
            state.words[OPEN_TOP : OPEN_TOP + 1],
            passes=state.has(InitFlag.PASSTHROUGH),
        )
        self._follower = Follower()
        self._workers = Workers(THREADS, self._follower.leave)
        self._answer = Handlers(tree, self._files, self._words, self._later).table()
        self._waiting = False
        self._ending = False

    def changed(self, number: int) -> None:
        """To be called by the tree, under its lock, when a node's data is another object's from now on, or gone."""
        self._files.changed(number)

    def resume(self) -> None:
        """Take over from a predecessor: what it had registered, and what it had read and not answered.

        Raises ``UnsupportedError`` where the kernel can't tell the latter: who asked for it would wait for ever.
        """
        if not self._can_resend:
            raise UnsupportedError(
                "this kernel doesn't resend what a dead serving process had not answered",
                remedy="Linux 6.9 does; unmount it, and mount it again",
            )
        tree = self._tree
        with tree.lock:
            for at, number, count in list(self._files.inherited()):
                self._take_over(at, number, count)
        at_once = Handlers(tree, self._files, self._words, lambda _, function, *arguments: function(*arguments))
        self._answer = Resent(tree, self._files, at_once, self._words[LAST_DONE]).table(self._answer)
        self._device.send(wire.notification(wire.NOTIFY_RESEND))

    def _take_over(self, at: int, number: int, count: int) -> None:
        try:
            fd, own = self._tree.data_of(number, os.O_RDONLY)
        except OSError as error:
            log.warning("node %d, which is open %d times, is gone: %s", number, count, error)
            return
        os.close(fd)
        self._files.inherit(at, own=own)

    def end(self) -> None:
        """Stop serving soon; to be called by a signal handler in the serving thread, which must be the main one."""
        self._ending = True
        if self._waiting:
            raise Ended

    def run(self) -> None:
        """Serve until the mount ends, or ``end`` is called."""
        gc.freeze()  # what lives as long as the process
        gc.set_threshold(COLLECT_AFTER)
        try:
            self._serve()
        except Ended:
            pass
        finally:
            self._workers.finish()

    def _serve(self) -> None:
        device, words, follower = self._device, self._words, self._follower
        buffer, view, fd = device.buffer, memoryview(device.buffer), device.fd
        unpack, head = wire.IN_HEADER.unpack_from, wire.IN_HEADER.size
        pack, tail = wire.OUT_HEADER.pack, wire.OUT_HEADER.size
        answers, known, clock, write = self._answer, wire.OPCODES, time.perf_counter_ns, os.write
        self._wait_as(follower.mode)
        receive = device.receive
        served = 0
        while not self._ending:
            self._waiting = True
            try:
                length = receive()
            except OSError as error:
                if ended(error):
                    return
                continue
            finally:
                self._waiting = False
            start = clock()
            header = unpack(buffer)
            opcode = header[1]
            try:
                if opcode >= known or header[0] != length or length < head:
                    raise _unknown(header, length)
                words[REQUESTS + opcode] += 1
                answer = answers[opcode](header[3], view[head:length], header)
                if answer is not None:
                    words[LAST_DONE] = header[2]
                    write(fd, pack(tail + len(answer), 0, header[2]) + answer)
            except Exception as error:  # noqa: BLE001
                self._fail(header, error, length)
            words[PAUSES + (clock() - start).bit_length()] += 1
            served += 1
            if not served % EVERY and header[6]:
                self._wait_as(follower.look(header[6]))
                receive = device.receive

    def _wait_as(self, mode: Mode) -> None:
        """Wait for requests as suits ``mode``: awake only where that doesn't keep the client from running."""
        awake_us = self._busy_poll_us or (AWAKE_US if mode is Mode.APART else 0)
        self._device.wait_awake(0 if mode is Mode.TOGETHER else awake_us)

    def _later(self, header: RawHeader | None, function: Callable[..., Answer], *arguments: object) -> None:
        """Let a worker do what takes long and answer with what it gives; without a header nobody waits for that."""
        self._workers.submit(self._work, header, function, arguments)

    def _work(self, header: RawHeader | None, function: Callable[..., Answer], arguments: tuple[object, ...]) -> None:
        start = time.perf_counter_ns()
        try:
            answer = function(*arguments)
            if header is not None:
                self._device.send(wire.reply(header[2], answer or b""))
        except Exception as error:  # noqa: BLE001
            self._fail(header, error, 0)
        self._words[SLOW + (time.perf_counter_ns() - start).bit_length()] += 1

    def _fail(self, header: RawHeader | None, error: Exception, length: int) -> None:
        """Answer a request with what went wrong; log what should not have happened."""
        shown = "work" if header is None else _shown(header)
        code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        if isinstance(error, wire.Malformed):
            log.warning("%s of %d bytes: %s", shown, length, error)
        elif not isinstance(error, OSError) or not error.errno:
            log.error("%s failed", shown, exc_info=error)
        elif code == errno.EIO:  # damage or a bad disk: the program that sees it may not say where
            log.error("%s: %s", shown, error)
        self._words[ERRORS] += 1
        if header is not None and header[1] not in _UNANSWERED:
            try:
                self._device.send(wire.failure(header[2], code))
            except OSError:
                log.exception("%s stays without an answer", shown)


_UNANSWERED = (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY)


def _unknown(header: RawHeader, length: int) -> OSError:
    if header[0] != length:
        return wire.Malformed(f"it says {header[0]} bytes and has {length}")
    return OSError(errno.ENOSYS, "an unknown request")


def _shown(header: RawHeader) -> str:
    """How the log names a request."""
    opcode = header[1]
    name = Opcode(opcode).name if opcode in set(Opcode) else f"opcode {opcode}"
    return f"{name} of node {header[3]} by process {header[6]}"
