"""The FUSE protocol as bytes: requests of the kernel decoded, replies encoded. No input or output happens here.

Source: uapi/linux/fuse.h, protocol 7.45 (Linux 6.18). Rules:
- Every struct that crosses the device is defined here and nowhere else.
- Whatever bytes come in, a decoder returns values or raises ``Malformed``; names it returns are not empty and
  without NUL, which the tree looks at more closely.
- Encoders trust their arguments: they are ours.
"""

from __future__ import annotations

import enum
import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vzfs.store.index import LIFETIME_S, Attributes

Buffer = bytes | bytearray | memoryview

MAJOR, MINOR = 7, 45
"""The protocol that is spoken here; an older kernel's minor is accepted, see ``negotiate``."""
LEAST_MINOR = 31
"""Linux 5.4: anything older lacks what the engine can't do without (init flags of 32 bits, MAX_PAGES, RENAME2)."""
ROOT_ID = 1
NS = 1_000_000_000


class Opcode(enum.IntEnum):
    """What a request asks for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


OPCODES = 64
"""All opcodes that are known lie below this number."""


class InitFlag(enum.IntFlag):
    """What kernel and server agree upon at the start; bits from 32 on travel in ``flags2``."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    FLOCK_LOCKS = 1 << 10
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    SUBMOUNTS = 1 << 27
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    SECURITY_CTX = 1 << 32
    CREATE_SUPP_GROUP = 1 << 34
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40
    OVER_IO_URING = 1 << 41


# Open reply flags.
FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NOFLUSH = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
FOPEN_PASSTHROUGH = 1 << 7

# Which fields of a SETATTR count.
FATTR_MODE = 1 << 0
FATTR_UID = 1 << 1
FATTR_GID = 1 << 2
FATTR_SIZE = 1 << 3
FATTR_ATIME = 1 << 4
FATTR_MTIME = 1 << 5
FATTR_FH = 1 << 6
FATTR_ATIME_NOW = 1 << 7
FATTR_MTIME_NOW = 1 << 8
FATTR_KILL_SUIDGID = 1 << 11

OPEN_KILL_SUIDGID = 1 << 0
WRITE_KILL_SUIDGID = 1 << 2
SETXATTR_ACL_KILL_SGID = 1 << 0
FSYNC_FDATASYNC = 1 << 0
IOCTL_DIR = 1 << 4
UNIQUE_RESEND = 1 << 63
"""Set in the ``unique`` of a request that another server had read before and not answered."""

NOTIFY_INVAL_INODE = 2
NOTIFY_RESEND = 7

# Structs, by the header's names without ``fuse_``.
IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
ATTR = struct.Struct("<6Q10I")
ENTRY_OUT = struct.Struct("<4Q2I" + "6Q10I")
ATTR_OUT = struct.Struct("<QII" + "6Q10I")
FORGET_IN = struct.Struct("<Q")
FORGET_ONE = struct.Struct("<QQ")
BATCH_FORGET_IN = struct.Struct("<II")
GETATTR_IN = struct.Struct("<IIQ")
STATX_IN = struct.Struct("<IIQII")
SX_TIME = struct.Struct("<qIi")
STATX = struct.Struct("<IIQIIIHHQQQQ" + "qIi" * 4 + "IIII" + "14Q")
STATX_OUT = struct.Struct("<QII2Q" + "IIQIIIHHQQQQ" + "qIi" * 4 + "IIII" + "14Q")
MKNOD_IN = struct.Struct("<IIII")
MKDIR_IN = struct.Struct("<II")
RENAME_IN = struct.Struct("<Q")
RENAME2_IN = struct.Struct("<QII")
LINK_IN = struct.Struct("<Q")
SETATTR_IN = struct.Struct("<II6Q8I")
OPEN_IN = struct.Struct("<II")
CREATE_IN = struct.Struct("<IIII")
OPEN_OUT = struct.Struct("<QIi")
RELEASE_IN = struct.Struct("<QIIQ")
FLUSH_IN = struct.Struct("<QIIQ")
READ_IN = struct.Struct("<QQIIQII")
WRITE_IN = struct.Struct("<QQIIQII")
WRITE_OUT = struct.Struct("<II")
STATFS_OUT = struct.Struct("<5Q4I6I")
FSYNC_IN = struct.Struct("<QII")
SETXATTR_IN = struct.Struct("<IIII")
SETXATTR_COMPAT_IN = struct.Struct("<II")
GETXATTR_IN = struct.Struct("<II")
GETXATTR_OUT = struct.Struct("<II")
ACCESS_IN = struct.Struct("<II")
INIT_IN = struct.Struct("<5I11I")
INIT_OUT = struct.Struct("<4I2H2I2H2IH11H")
INTERRUPT_IN = struct.Struct("<Q")
IOCTL_IN = struct.Struct("<QIIQII")
IOCTL_OUT = struct.Struct("<iIII")
FALLOCATE_IN = struct.Struct("<QQQII")
DIRENT = struct.Struct("<QQII")
LSEEK_IN = struct.Struct("<QQII")
LSEEK_OUT = struct.Struct("<Q")
COPY_FILE_RANGE_IN = struct.Struct("<7Q")
COPY_FILE_RANGE_OUT = struct.Struct("<Q")
NOTIFY_INVAL_INODE_OUT = struct.Struct("<Qqq")
BACKING_MAP = struct.Struct("<iIQ")

_INIT_IN_OLD = 16
"""Bytes of an INIT before protocol 7.36 brought ``flags2``."""

# Device ioctls.
BACKING_OPEN = 0x4010E501
BACKING_CLOSE = 0x4004E502

_ATTR_VALID = struct.Struct("<QII").pack(LIFETIME_S, 0, 0)
NO_ENTRY = ENTRY_OUT.pack(0, 0, LIFETIME_S, LIFETIME_S, *(0,) * 18)
"""The answer to a look-up of a name that isn't there, to be kept by the kernel."""


class Malformed(OSError):
    """A request that no kernel sends. Its errno is ``EINVAL``."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EINVAL, f"malformed request: {why}")


class Header(NamedTuple):
    """What begins every request. ``uid`` and ``gid`` are the caller's, or all ones under an ID-mapped mount."""

    length: int
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    total_extlen: int
    padding: int


# ------------------------------------------------------------------------------------------------------- decoding


def header(data: Buffer, length: int) -> Header:
    """The header of a request of ``length`` bytes that begins ``data``."""
    if length < IN_HEADER.size:
        raise Malformed(f"{length} bytes are no request")
    found = Header._make(IN_HEADER.unpack_from(data))
    if found.length != length:
        raise Malformed(f"it says {found.length} bytes and has {length}")
    return found


def fields(layout: struct.Struct, body: Buffer) -> tuple[int, ...]:
    """The fixed fields that begin the body of a request."""
    try:
        return layout.unpack_from(body)
    except struct.error:
        raise Malformed(f"{len(body)} bytes are too few") from None


def position(given: int) -> int:
    """An offset or a length in a file: unsigned in requests, signed in every system call."""
    if given >> 63:
        raise Malformed(f"no file has a byte {given}")
    return given


def name(body: memoryview) -> bytes:
    """The one name that a body consists of."""
    found = body.tobytes()
    end = len(found) - 1
    if end < 1 or found.find(0) != end:
        raise Malformed("its name is empty or without an end")
    return found[:end]


def two_names(body: memoryview) -> tuple[bytes, bytes]:
    """The two names, or name and link text, that a body consists of."""
    first, separator, second = body.tobytes().partition(b"\0")
    end = len(second) - 1
    if not first or not separator or end < 1 or second.find(0) != end:
        raise Malformed("it needs two names")
    return first, second[:end]


def name_and_value(body: memoryview, size: int) -> tuple[bytes, bytes]:
    """The name of an extended attribute and its value of ``size`` bytes."""
    found, separator, value = body.tobytes().partition(b"\0")
    if not found or not separator or len(value) != size:
        raise Malformed("its value has another size than it says")
    return found, value


def forgotten(body: Buffer) -> list[tuple[int, int]]:
    """The node numbers of a BATCH_FORGET with their counts."""
    count = fields(BATCH_FORGET_IN, body)[0]
    if len(body) < BATCH_FORGET_IN.size + count * FORGET_ONE.size:
        raise Malformed(f"it doesn't hold {count} nodes")
    return [
        FORGET_ONE.unpack_from(body, BATCH_FORGET_IN.size + position * FORGET_ONE.size) for position in range(count)
    ]


# ------------------------------------------------------------------------------------------------------- encoding


def reply(unique: int, body: Buffer = b"") -> bytes:
    """A successful answer."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def failure(unique: int, code: int) -> bytes:
    """An answer that is the errno ``code``."""
    return OUT_HEADER.pack(OUT_HEADER.size, -code, unique)


def notification(code: int) -> bytes:
    """A message to the kernel that answers nothing and has no body."""
    return OUT_HEADER.pack(OUT_HEADER.size, code, 0)


def attributes_changed(number: int) -> bytes:
    """A message that what the kernel knows of the node's attributes, ACLs among them, is not true any more."""
    return OUT_HEADER.pack(
        OUT_HEADER.size + NOTIFY_INVAL_INODE_OUT.size, NOTIFY_INVAL_INODE, 0
    ) + NOTIFY_INVAL_INODE_OUT.pack(number, -1, 0)


def attr(one: Attributes) -> tuple[int, ...]:
    """The fields of a ``fuse_attr``. Times before 1970 are negative seconds, sent as their two's complement."""
    ino, mode, nlink, uid, gid, rdev, size, blocks, blksize, atime, mtime, ctime = one
    return (
        ino,
        size,
        blocks,
        atime // NS & 0xFFFFFFFFFFFFFFFF,
        mtime // NS & 0xFFFFFFFFFFFFFFFF,
        ctime // NS & 0xFFFFFFFFFFFFFFFF,
        atime % NS,
        mtime % NS,
        ctime % NS,
        mode,
        nlink,
        uid,
        gid,
        rdev & 0xFFFFFFFF,
        blksize,
        0,
    )


def entry_out(
    number: int, generation: int, attributes: Attributes, name_s: int = LIFETIME_S, attributes_s: int = LIFETIME_S
) -> bytes:
    """The answer to a look-up; the kernel keeps the name for ``name_s`` and the attributes for ``attributes_s``."""
    return ENTRY_OUT.pack(number, generation, name_s, attributes_s, 0, 0, *attr(attributes))


def attr_out(attributes: Attributes, attributes_s: int = LIFETIME_S) -> bytes:
    """The answer to GETATTR and SETATTR; the kernel keeps the attributes for ``attributes_s``."""
    if attributes_s != LIFETIME_S:
        return ATTR_OUT.pack(attributes_s, 0, 0, *attr(attributes))
    return _ATTR_VALID + ATTR.pack(*attr(attributes))


def ready_attr_out(attributes: bytes) -> bytes:
    """The same of ready-made attributes."""
    return _ATTR_VALID + attributes


def direntplus(entry: bytes, ino: int, offset: int, mode: int, called: bytes) -> bytes:
    """One record of a listing with attributes; ``entry`` is its ``fuse_entry_out``."""
    return entry + dirent(ino, offset, mode, called)


def dirent(ino: int, offset: int, mode: int, called: bytes) -> bytes:
    """One record of a plain listing; ``offset`` is where the listing goes on after it."""
    return DIRENT.pack(ino, offset, len(called), mode >> 12 & 15) + called + b"\0" * (-len(called) % 8)


STATX_BASIC_STATS = 0x7FF
STATX_BTIME = 0x800


def statx_out(attributes: Attributes, birth_ns: int | None) -> bytes:
    """The answer to STATX, with the time of birth if it is known."""
    one = attributes
    times = []
    for moment in (one.atime_ns, birth_ns or 0, one.ctime_ns, one.mtime_ns):
        times += [moment // NS, moment % NS, 0]
    mask = STATX_BASIC_STATS | (STATX_BTIME if birth_ns is not None else 0)
    major, minor = one.rdev >> 8 & 0xFFF, one.rdev & 0xFF | one.rdev >> 12 & 0xFFF00
    return STATX_OUT.pack(
        LIFETIME_S,
        0,
        0,
        0,
        0,
        mask,
        one.blksize,
        0,
        one.nlink,
        one.uid,
        one.gid,
        one.mode,
        0,
        one.ino,
        one.size,
        one.blocks,
        0,
        *times,
        major,
        minor,
        *(0,) * 16,
    )


def statfs_out(values: Sequence[int]) -> bytes:
    """The answer to STATFS: blocks, free, available, files, free files, block size, name length, fragment size."""
    return STATFS_OUT.pack(*values, *(0,) * 7)


def xattr_out(data: bytes, room: int) -> bytes:
    """The answer to GETXATTR and LISTXATTR for a caller with ``room`` bytes, 0 asking for the size only.

    Raises ``OSError`` ``ERANGE``.
    """
    if not room:
        return GETXATTR_OUT.pack(len(data), 0)
    if len(data) > room:
        raise OSError(errno.ERANGE, "the attribute is larger")
    return data


# ------------------------------------------------------------------------------------------------------- the start


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What kernel and server agreed upon; ``max_write`` in bytes."""

    minor: int
    flags: InitFlag
    max_write: int

    @property
    def passthrough(self) -> bool:
        return bool(self.flags & InitFlag.PASSTHROUGH)


def offered(body: Buffer) -> tuple[int, InitFlag, int]:
    """Protocol minor, flags and read-ahead bytes that the kernel's INIT offers.

    Raises ``OSError`` ``EPROTO`` for a protocol that isn't ours.
    """
    if len(body) < _INIT_IN_OLD:
        raise Malformed(f"{len(body)} bytes are no INIT")
    major, minor, readahead, flags, flags2, *_ = INIT_IN.unpack(bytes(body[: INIT_IN.size]).ljust(INIT_IN.size, b"\0"))
    if major != MAJOR or minor < LEAST_MINOR:
        raise OSError(errno.EPROTO, f"the kernel speaks FUSE {major}.{minor}, {MAJOR}.{LEAST_MINOR} is needed")
    if flags & InitFlag.INIT_EXT:
        flags |= flags2 << 32
    return minor, InitFlag(flags), readahead


def init_out(agreed: Negotiated, readahead: int, *, max_background: int, stack_depth: int) -> bytes:
    """The answer to INIT."""
    page = 4096
    return INIT_OUT.pack(
        MAJOR,
        MINOR,
        readahead,
        agreed.flags & 0xFFFFFFFF,
        max_background,
        max_background * 3 // 4,
        agreed.max_write,
        1,  # time granularity in ns
        max(1, agreed.max_write // page),
        0,
        agreed.flags >> 32,
        stack_depth if agreed.passthrough else 0,
        *(0,) * 12,
    )
