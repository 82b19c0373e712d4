"""The direct engine under requests that no kernel sends: it answers every one of them and stays in its container.

The engine runs on one end of a socket pair that keeps message boundaries, in place of the device; it only reads and
writes messages, and registering backing files fails there, so all data goes through READ and WRITE. Each example is a
conversation with a container of its own on a small file system, which also bounds what FALLOCATE can take.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import select
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import SMALL, make_source
from tests.engines import PATIENCE_S
from tests.realuse_helpers import loop_mounted
from vzfs import Container, Store
from vzfs.fuse import wire
from vzfs.fuse.direct import MAX_WRITE, WANTED, Engine
from vzfs.fuse.state import State
from vzfs.fuse.wire import Opcode
from vzfs.tree.tree import Tree

SILENT = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY}
SPARE_INODES = 20_000
_SO_SNDBUFFORCE = 32  # <asm/socket.h>
BUFFER = 4 * MAX_WRITE


# ------------------------------------------------------------------------------------------------------- the engine


class Rig:
    """A container's engine and the kernel's end of its device."""

    def __init__(self, store: Store, container: Container) -> None:
        self.kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.kernel, device):
            end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, BUFFER)
        self._device = device
        self._state = State.create()
        self._state.agree(int(WANTED), wire.MINOR, MAX_WRITE)

        def changed(number: int) -> None:
            self._engine.changed(number)

        self._tree = Tree(store.layout, container.path, passthrough_above=0, changed=changed)
        self._engine = Engine(self._tree, device.fileno(), self._state)
        receive = self._engine._device.receive

        def receive_or_end() -> int:
            length = receive()
            if not length:
                raise OSError(errno.ENODEV, "the kernel's end is closed")
            return length

        send = self._engine._device.send

        def send_or_fail(answer: bytes) -> None:
            try:
                send(answer)
            except OSError as error:
                if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                    raise
                send(wire.failure(wire.OUT_HEADER.unpack_from(answer)[2], error.errno))  # a socket has less room

        self._engine._device.receive = receive_or_end
        self._engine._device.send = send_or_fail  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._engine.run)
        self._thread.start()
        self._uniques = itertools.count(2, 2)

    @property
    def words(self) -> list[int]:
        return self._state.words.tolist()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def unique(self) -> int:
        return next(self._uniques)

    def receive(self, seconds: float = PATIENCE_S) -> bytes:
        """The next answer; there must be one."""
        assert select.select([self.kernel], [], [], seconds)[0], "no answer"
        return self.kernel.recv(BUFFER)

    def ask(self, opcode: int, node: int, body: bytes, *, pid: int = 0) -> tuple[int, bytes]:
        """Errno and body of the answer to one well-formed request."""
        unique = self.unique()
        self.kernel.send(request(opcode, unique, node, body, pid=pid))
        answer = self.receive()
        length, error, to = wire.OUT_HEADER.unpack_from(answer)
        assert (length, to) == (len(answer), unique)
        return -error, answer[wire.OUT_HEADER.size :]

    def end(self) -> list[bytes]:
        """End the engine; what it had sent and nobody had received."""
        self.kernel.shutdown(socket.SHUT_WR)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        left = []
        while select.select([self.kernel], [], [], 0)[0]:
            left.append(self.kernel.recv(BUFFER))
        self.kernel.close()
        self._device.close()
        self._tree.close()
        os.close(self._state.fd)  # the map goes with those who count in it
        return left


def request(
    opcode: int, unique: int, node: int, body: bytes, *, uid: int = 0, gid: int = 0, pid: int = 0, length: int = -1
) -> bytes:
    size = wire.IN_HEADER.size + len(body) if length < 0 else length
    return wire.IN_HEADER.pack(size, opcode, unique, node, uid, gid, pid, 0, 0) + body


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    top = tmp_path_factory.mktemp("fuzz")
    source = make_source(top / "source")
    with loop_mounted(top / "image", top / "disk", 160 << 20, options=["-N", str(SPARE_INODES)]) as disk:
        store = Store(disk / "store")
        store.create_template(SMALL, str(source))
        (disk / "outside").mkdir()
        (disk / "outside/file").write_bytes(b"not of any container\n")
        (store.root / "private/outside").mkdir(parents=True)
        store.create(100, template=SMALL)
        yield store


_containers = itertools.count(101)


@contextlib.contextmanager
def conversation(store: Store) -> Iterator[Rig]:
    """A rig on a new container. Afterwards everything else must be as it was, and the container be clean."""
    top = store.root.parent
    container = store.create(next(_containers), template=SMALL)
    before = manifest(top, container.path)
    own = sorted(os.listdir(container.path))
    umask = os.umask(0)  # the tree uses and leaves it so, as in a serving process
    rig = Rig(store, container)
    try:
        yield rig
        assert rig.alive, "the engine ended"
    finally:
        left = rig.end()
        os.umask(umask)
        problems, names, after = container.check(), os.listdir(container.path), manifest(top, container.path)
        container.destroy()
    assert not left, "answers that nobody asked for"
    assert problems == []
    assert sorted({*names, "cow"}) == sorted({*own, "cow"})
    assert after == before


def manifest(top: Path, without: Path) -> dict[str, tuple[object, ...]]:
    """Everything below ``top`` but for one container: what it is, its data and times (not those of reading)."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if Path(folder, name) != without and name != "lost+found"]
        for name in folders + files:
            path = os.path.join(folder, name)
            info = os.lstat(path)
            data = Path(path).read_bytes() if info.st_size < 4096 and os.path.isfile(path) else b""
            attributes = {key: os.getxattr(path, key, follow_symlinks=False) for key in sorted(_xattrs(path))}
            # Every container's magic links are hard links of the template's, so they change with each new one.
            when = () if stat.S_ISLNK(info.st_mode) else (info.st_nlink, info.st_ctime_ns, info.st_mtime_ns)
            found[path] = (info.st_mode, info.st_uid, info.st_gid, info.st_size, data, attributes, *when)
    return found


def _xattrs(path: str) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


# ----------------------------------------------------------------------------------------------------- conversations

NAMES = [
    *(b"bin", b"etc", b"lib", b"usr", b"var", b"dev", b"tmp", b"odd", b"share", b"conf.d", b"deep", b"er", b"log"),
    *(b"tool", b"su", b"ping", b"passwd", b"shadow", b"empty", b"a.conf", b"large", b"sparse", b"pair-a", b"pair-b"),
    *(b"fifo", b"null", b"symlink", b"symlink-again", b"relative", b"tool-again", b"with-acl", b"acl", b"\xff\xfe"),
    *(b"x", b"y", b"z", b".", b"..", b"/", b"a/b", b"../outside", b"../../../outside/file", b"N" * 255, b"N" * 256),
    *(b"cow", b"conf", b".vzfs", b"-", b"\n"),
]
TARGETS = [
    b"x",
    b"/etc/passwd",
    b"//vz/template/small/etc/passwd",
    b"///vz/template/small",
    b"//vz/template/",
    b"t" * 4095,
]
XATTRS = [
    *(b"user.a", b"user.note", b"trusted.a", b"trusted.vzfs.attr", b"trusted.vzfs.origin", b"trusted.vzfs.x.user.a"),
    *(
        b"security.capability",
        b"system.posix_acl_access",
        b"system.posix_acl_default",
        b"user.",
        b"nothing",
        b"user.a/b",
    ),
    b"user." + b"n" * 250,
]
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
SIZES = st.sampled_from([0, 1, 100, 4096, 128 << 10, MAX_WRITE]) | U32
_NEAR = st.sampled_from([0, 1, 2, 3, 4095, 4096, 70_000, 1 << 20])
OFFSETS = _NEAR | _NEAR | st.sampled_from([1 << 32, (1 << 32) + 5, (1 << 63) - 1, 1 << 63]) | U64
SECONDS = st.integers(0, 1 << 33)  # up to the year 2242
OPEN_FLAGS = st.sampled_from(
    [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_DIRECT]
)
MODES = st.sampled_from([0, 0o644, 0o4755, 0o2755, 0o7777, 0o100644, 0o40755, 0o120777, 0o10644, 0o20666, 0o60660])
COMMANDS = st.sampled_from([0x80086601, 0x40086602, 0x80046601, 0x40046602, 0x5401])


@dataclass(frozen=True, slots=True)
class Sent:
    """A request: ``node`` and ``handles`` are looked up among those that were given, if they are small."""

    opcode: int
    node: int
    body: bytes
    uid: int = 0
    gid: int = 0
    pid: int = 0
    length: int = -1
    known: tuple[tuple[int, str], ...] = ()
    """Where in the body a node number or handle stands that is to be one that was given."""


@st.composite
def well_formed(draw: st.DrawFn) -> Sent:
    """A request of the right form with any values."""
    opcode = draw(st.sampled_from(sorted(BODIES)))
    parts: list[bytes] = []
    known: list[tuple[int, str]] = []
    for value in draw(BODIES[opcode]):
        if isinstance(value, _Known):
            known.append((sum(len(part) for part in parts), value.of))
            value = struct.pack("<Q", value.number)
        parts.append(value)
    callers = st.sampled_from([0, 1000, 0xFFFFFFFF])
    pids = st.sampled_from([0, 1, os.getpid(), 0xFFFFFFFF])
    node = draw(_NODES)
    return Sent(opcode, node, b"".join(parts), draw(callers), draw(callers), draw(pids), known=tuple(known))


@dataclass(frozen=True, slots=True)
class _Known:
    of: str
    number: int


_GIVEN = st.integers(0, 40)
_NODES = st.one_of(_GIVEN, _GIVEN, _GIVEN, _GIVEN, st.just(1), st.integers(0, 1000), U64)
_NODE = st.builds(_Known, st.just("nodes"), _NODES)
_HANDLE = st.builds(_Known, st.just("handles"), st.one_of(_GIVEN, _GIVEN, _GIVEN, U64))
_EXISTING = b"\x01"
"""Stands for a name that is known to exist; the request then goes to the directory that it is in."""
_NAME = (st.just(_EXISTING) | st.sampled_from(NAMES)).map(lambda name: name + b"\0")
_XATTR = st.sampled_from(XATTRS).map(lambda name: name + b"\0")


def packed(layout: str, *values: st.SearchStrategy[int] | int) -> st.SearchStrategy[bytes]:
    drawn = [st.just(value) if isinstance(value, int) else value for value in values]
    return st.tuples(*drawn).map(lambda fields: struct.pack("<" + layout, *fields))


def _with_size(value: bytes, flags: int) -> tuple[bytes, bytes]:
    return struct.pack("<IIII", len(value), flags & 3, flags >> 2 & 1, 0), value


def _setxattr(name: bytes, value: bytes, flags: int) -> tuple[bytes, ...]:
    head, value = _with_size(value, flags)
    return head, name, value


def _write(handle: _Known, offset: int, data: bytes, flags: int) -> tuple[bytes | _Known, ...]:
    return handle, struct.pack("<QIIQII", offset, len(data), flags, 0, 0, 0), data


def _forgets(nodes: list[tuple[int, int]]) -> tuple[bytes]:
    return (struct.pack("<II", len(nodes), 0) + b"".join(struct.pack("<QQ", *node) for node in nodes),)


_READ = st.tuples(_HANDLE, packed("QIIQII", OFFSETS, SIZES, 0, 0, 0, 0))
_CREATE = st.tuples(packed("IIII", OPEN_FLAGS, MODES, st.sampled_from([0, 0o22]), 0), _NAME)
_SETATTR = st.tuples(
    packed("II", st.integers(0, 0xFFF), 0),
    _HANDLE,
    packed("QQQQQ", OFFSETS, 0, SECONDS, SECONDS, 0),
    packed("IIIIIIII", U32, U32, 0, MODES | U32, 0, U32, U32, 0),
)
_COPY = st.tuples(
    _HANDLE, packed("Q", OFFSETS), _NODE, _HANDLE, packed("QQQ", OFFSETS, OFFSETS, st.sampled_from([0, 0, 1]))
)
BODIES: dict[int, st.SearchStrategy[tuple[bytes | _Known, ...]]] = {
    Opcode.LOOKUP: st.tuples(_NAME),
    Opcode.FORGET: st.tuples(packed("Q", st.integers(0, 3) | U64)),
    Opcode.GETATTR: st.tuples(packed("II", st.integers(0, 1), 0), _HANDLE),
    Opcode.SETATTR: _SETATTR,
    Opcode.READLINK: st.just((b"",)),
    Opcode.SYMLINK: st.tuples(_NAME, st.sampled_from(TARGETS).map(lambda text: text + b"\0")),
    Opcode.MKNOD: st.tuples(packed("IIII", MODES | U32, U32, st.sampled_from([0, 0o22]), 0), _NAME),
    Opcode.MKDIR: st.tuples(packed("II", MODES, st.sampled_from([0, 0o22])), _NAME),
    Opcode.UNLINK: st.tuples(_NAME),
    Opcode.RMDIR: st.tuples(_NAME),
    Opcode.RENAME: st.tuples(_NODE, _NAME, _NAME),
    Opcode.LINK: st.tuples(_NODE, _NAME),
    Opcode.OPEN: st.tuples(packed("II", OPEN_FLAGS, st.integers(0, 1))),
    Opcode.READ: _READ,
    Opcode.WRITE: st.builds(_write, _HANDLE, OFFSETS, st.binary(max_size=200), st.integers(0, 7)),
    Opcode.STATFS: st.just((b"",)),
    Opcode.RELEASE: st.tuples(_HANDLE, packed("IIQ", OPEN_FLAGS, 0, 0)),
    Opcode.FSYNC: st.tuples(_HANDLE, packed("II", st.integers(0, 1), 0)),
    Opcode.SETXATTR: st.builds(_setxattr, _XATTR, st.binary(max_size=60), st.integers(0, 7)),
    Opcode.GETXATTR: st.tuples(packed("II", SIZES, 0), _XATTR),
    Opcode.LISTXATTR: st.tuples(packed("II", SIZES, 0)),
    Opcode.REMOVEXATTR: st.tuples(_XATTR),
    Opcode.FLUSH: st.tuples(_HANDLE, packed("IIQ", 0, 0, 0)),
    Opcode.OPENDIR: st.tuples(packed("II", OPEN_FLAGS, 0)),
    Opcode.READDIR: _READ,
    Opcode.READDIRPLUS: _READ,
    Opcode.FSYNCDIR: st.tuples(_HANDLE, packed("II", st.integers(0, 1), 0)),
    Opcode.ACCESS: st.tuples(packed("II", st.integers(0, 7), 0)),
    Opcode.CREATE: _CREATE,
    Opcode.TMPFILE: _CREATE,
    Opcode.INTERRUPT: st.tuples(packed("Q", U64)),
    Opcode.IOCTL: st.tuples(
        _HANDLE, packed("IIQII", 0, COMMANDS, 0, st.integers(0, 16), st.integers(0, 16)), st.binary(max_size=16)
    ),
    Opcode.NOTIFY_REPLY: st.tuples(st.binary(max_size=40)),
    Opcode.BATCH_FORGET: st.lists(st.tuples(st.integers(0, 40) | U64, st.integers(0, 3)), max_size=5).map(_forgets),
    Opcode.FALLOCATE: st.tuples(
        _HANDLE, packed("QQII", OFFSETS, OFFSETS, st.sampled_from([0, 1, 3, 16, 17]) | st.integers(0, 127), 0)
    ),
    Opcode.RENAME2: st.tuples(_NODE, packed("II", st.integers(0, 2) | st.integers(0, 7), 0), _NAME, _NAME),
    Opcode.LSEEK: st.tuples(_HANDLE, packed("QII", OFFSETS, st.sampled_from([3, 4]) | st.integers(0, 5), 0)),
    Opcode.COPY_FILE_RANGE: _COPY,
    Opcode.COPY_FILE_RANGE_64: _COPY,
    Opcode.SYNCFS: st.tuples(packed("Q", 0)),
    Opcode.STATX: st.tuples(packed("II", st.integers(0, 1), 0), _HANDLE, packed("II", U32, U32)),
}


@st.composite
def damaged(draw: st.DrawFn) -> Sent:
    """A request of any opcode whose body was cut, lengthened or overwritten, or whose length is a lie."""
    sent = draw(well_formed())
    opcode = draw(st.just(sent.opcode) | st.integers(0, 70) | U32)
    body = bytearray(sent.body)
    how = draw(st.sampled_from(["cut", "longer", "flip", "random", "lie", "opcode"]))
    length = -1
    if how == "cut":
        body = body[: draw(st.integers(0, len(body)))]
    elif how == "longer":
        body += draw(st.binary(min_size=1, max_size=100))
    elif how == "flip" and body:
        for _ in range(draw(st.integers(1, 4))):
            body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    elif how == "random":
        body = bytearray(draw(st.binary(max_size=200)))
    elif how == "lie":
        length = draw(st.integers(0, 400) | U32)
    return Sent(
        opcode, sent.node, bytes(body), sent.uid, sent.gid, sent.pid, length, sent.known if how == "opcode" else ()
    )


_NAME_AT: dict[int, int] = {
    Opcode.LOOKUP: 0,
    Opcode.MKDIR: 8,
    Opcode.MKNOD: 16,
    Opcode.CREATE: 16,
    Opcode.SYMLINK: 0,
    Opcode.LINK: 8,
}


@dataclass(slots=True)
class Client:
    """Sends requests, keeps what it was given, and judges each answer."""

    rig: Rig
    nodes: list[int] = field(default_factory=lambda: [0, 1])
    handles: list[int] = field(default_factory=lambda: [0])
    names: list[tuple[int, bytes]] = field(default_factory=lambda: [(1, b"var"), (1, b"odd"), (1, b"dev")])
    waiting: dict[int, Sent] = field(default_factory=dict)

    def send(self, sent: Sent) -> None:
        body = bytearray(sent.body)
        for at, of in sent.known:
            if at + 8 <= len(body):
                number = self._known(
                    self.nodes if of == "nodes" else self.handles, int.from_bytes(body[at : at + 8], "little")
                )
                body[at : at + 8] = number.to_bytes(8, "little")
        node = self._known(self.nodes, sent.node)
        if _EXISTING + b"\0" in body:
            node, name = self.names[sent.node % len(self.names)]
            body = bytearray(bytes(body).replace(_EXISTING + b"\0", name + b"\0", 1))
        unique = self.rig.unique()
        message = request(
            sent.opcode, unique, node, bytes(body), uid=sent.uid, gid=sent.gid, pid=sent.pid, length=sent.length
        )
        if sent.opcode not in SILENT:
            self.waiting[unique] = Sent(sent.opcode, node, bytes(body), length=sent.length)
        self.rig.kernel.send(message)

    def begin(self) -> None:
        """Learn of some nodes, and open some files."""
        for name in (b"etc", b"bin", b"lib", b"tmp", b"usr"):
            self.send(Sent(Opcode.LOOKUP, wire.ROOT_ID, name + b"\0"))
            self.settle()
        self.send(Sent(Opcode.LOOKUP, self.nodes.index(self.nodes[-1]), b"share\0"))
        self.settle()
        for position, name in ((2, b"passwd"), (2, b"shadow"), (3, b"su"), (7, b"pair-a"), (4, b"large")):
            self.send(Sent(Opcode.LOOKUP, position, name + b"\0"))
            self.settle()
            writing = os.O_RDWR if name in (b"passwd", b"pair-a", b"large") else os.O_RDONLY
            self.send(Sent(Opcode.OPEN, len(self.nodes) - 1, wire.OPEN_IN.pack(writing, 0)))
            self.settle()
        self.send(Sent(Opcode.CREATE, 5, wire.CREATE_IN.pack(os.O_RDWR, 0o100644, 0, 0) + b"x\0"))
        self.settle()
        assert len(self.nodes) > 13 and len(self.handles) > 3

    @staticmethod
    def _known(given_out: list[int], number: int) -> int:
        return given_out[number % len(given_out)] if number < 1000 else number

    def settle(self) -> None:
        """Receive until every request has its answer."""
        while self.waiting:
            answer = self.rig.receive()
            length, error, unique = wire.OUT_HEADER.unpack_from(answer)
            assert length == len(answer)
            assert unique in self.waiting, "an answer to nobody, or the second one"
            self._judge(self.waiting.pop(unique), error, answer[wire.OUT_HEADER.size :])

    def _judge(self, sent: Sent, error: int, body: bytes) -> None:
        if error:
            assert -512 < error < 0, "no errno that the kernel takes"
            assert not body
            assert -error in errno.errorcode
            return
        assert sent.length in (-1, wire.IN_HEADER.size + len(sent.body)), "a lie was believed"
        assert sent.opcode in ANSWERS, f"opcode {sent.opcode} can't have succeeded"
        ANSWERS[sent.opcode](self, sent, body)

    def entry(self, sent: Sent, body: bytes) -> None:
        fields = wire.ENTRY_OUT.unpack_from(body)
        assert len(body) == wire.ENTRY_OUT.size or sent.opcode in (Opcode.CREATE, Opcode.TMPFILE)
        assert fields[0] or sent.opcode == Opcode.LOOKUP
        if fields[0]:
            self.nodes.append(fields[0])
            if sent.opcode in _NAME_AT:
                self.names.append((sent.node, sent.body[_NAME_AT[sent.opcode] :].split(b"\0")[0]))

    def create(self, sent: Sent, body: bytes) -> None:
        assert len(body) == wire.ENTRY_OUT.size + wire.OPEN_OUT.size
        self.entry(sent, body)
        self.open(sent, body[wire.ENTRY_OUT.size :])

    def open(self, sent: Sent, body: bytes) -> None:
        handle, flags, backing = wire.OPEN_OUT.unpack(body)
        assert not flags & wire.FOPEN_PASSTHROUGH and not backing
        self.handles.append(handle)

    def read(self, sent: Sent, body: bytes) -> None:
        assert len(body) <= wire.READ_IN.unpack_from(sent.body)[2]

    def listing(self, sent: Sent, body: bytes) -> None:
        self.read(sent, body)
        at = 0
        while at < len(body):
            if sent.opcode == Opcode.READDIRPLUS:
                node = wire.ENTRY_OUT.unpack_from(body, at)[0]
                at += wire.ENTRY_OUT.size
                if node:
                    self.nodes.append(node)
            _, offset, length, _ = wire.DIRENT.unpack_from(body, at)
            name = body[at + wire.DIRENT.size : at + wire.DIRENT.size + length]
            if name not in (b".", b".."):
                self.names.append((sent.node, name))
            assert len(name) == length > 0 and b"/" not in name and b"\0" not in name and offset
            at += wire.DIRENT.size + length + -length % 8
        assert at == len(body)

    def xattr(self, sent: Sent, body: bytes) -> None:
        room = wire.GETXATTR_IN.unpack_from(sent.body)[0]
        assert len(body) <= room if room else len(body) == wire.GETXATTR_OUT.size

    def ioctl(self, sent: Sent, body: bytes) -> None:
        assert wire.IOCTL_OUT.size <= len(body) <= wire.IOCTL_OUT.size + wire.IOCTL_IN.unpack_from(sent.body)[5]

    def link_text(self, sent: Sent, body: bytes) -> None:
        assert 0 < len(body) < 4096 and b"\0" not in body


def _sized(size: int):  # type: ignore[no-untyped-def]
    def judge(_: Client, sent: Sent, body: bytes) -> None:
        assert len(body) == size, sent

    return judge


ANSWERS = {
    **dict.fromkeys((Opcode.LOOKUP, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK), Client.entry),
    **dict.fromkeys((Opcode.CREATE, Opcode.TMPFILE), Client.create),
    **dict.fromkeys((Opcode.GETATTR, Opcode.SETATTR), _sized(wire.ATTR_OUT.size)),
    **dict.fromkeys((Opcode.GETXATTR, Opcode.LISTXATTR), Client.xattr),
    **dict.fromkeys((Opcode.READDIR, Opcode.READDIRPLUS), Client.listing),
    **dict.fromkeys((Opcode.WRITE, Opcode.COPY_FILE_RANGE), _sized(wire.WRITE_OUT.size)),
    **dict.fromkeys((Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME, Opcode.RENAME2, Opcode.RELEASE), _sized(0)),
    **dict.fromkeys((Opcode.FSYNC, Opcode.FSYNCDIR, Opcode.SYNCFS, Opcode.FALLOCATE), _sized(0)),
    **dict.fromkeys((Opcode.SETXATTR, Opcode.REMOVEXATTR), _sized(0)),
    Opcode.STATX: _sized(wire.STATX_OUT.size),
    Opcode.OPEN: Client.open,
    Opcode.READ: Client.read,
    Opcode.READLINK: Client.link_text,
    Opcode.STATFS: _sized(wire.STATFS_OUT.size),
    Opcode.IOCTL: Client.ioctl,
    Opcode.LSEEK: _sized(wire.LSEEK_OUT.size),
    Opcode.COPY_FILE_RANGE_64: _sized(wire.COPY_FILE_RANGE_OUT.size),
}


class Unexpected(logging.Handler):
    """Collects what the engine logs of failures that nobody foresaw."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(self.format(record))


@contextlib.contextmanager
def nothing_unforeseen() -> Iterator[None]:
    """No request in the block may end in an exception that isn't an errno."""
    unexpected = Unexpected()
    logger = logging.getLogger("vzfs")
    logger.addHandler(unexpected)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(unexpected)
        logger.propagate = propagate
    assert not unexpected.records, "\n".join(unexpected.records)


_settings = settings(
    max_examples=int(os.environ.get("VZFS_FUZZ_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def talk(store: Store, sequence: list[Sent], *, at_once: int) -> None:
    with nothing_unforeseen(), conversation(store) as rig:
        client = Client(rig)
        client.begin()
        for start in range(0, len(sequence), at_once):
            for sent in sequence[start : start + at_once]:
                client.send(sent)
            client.settle()
        assert rig.ask(Opcode.GETATTR, wire.ROOT_ID, bytes(wire.GETATTR_IN.size))[0] == 0


@_settings
@given(st.lists(well_formed(), min_size=5, max_size=60))
def test_any_conversation_one_by_one(store: Store, sequence: list[Sent]) -> None:
    talk(store, sequence, at_once=1)


@_settings
@given(st.lists(well_formed() | damaged(), min_size=5, max_size=60))
def test_damaged_requests_among_others_many_at_once(store: Store, sequence: list[Sent]) -> None:
    talk(store, sequence, at_once=16)


@_settings
@given(st.lists(damaged(), min_size=5, max_size=60))
def test_damaged_requests(store: Store, sequence: list[Sent]) -> None:
    talk(store, sequence, at_once=4)
