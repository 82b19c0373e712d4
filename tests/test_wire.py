"""The protocol's structs, numbers, decoders and encoders, against what the kernel's header says and for any bytes.

The tables are those of protocol 7.45 (Linux 6.18). What the header of the machine has is also asked of its compiler;
Debian 12's is 7.38.
"""

from __future__ import annotations

import errno
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vzfs.fuse import wire
from vzfs.fuse.wire import InitFlag, Malformed, Opcode
from vzfs.store.index import LIFETIME_S, Attributes

HEADER = Path("/usr/include/linux/fuse.h")

STRUCT_TABLE = """
attr 88: u64 ino, u64 size, u64 blocks, u64 atime, u64 mtime, u64 ctime, u32 atimensec, u32 mtimensec, u32
    ctimensec, u32 mode, u32 nlink, u32 uid, u32 gid, u32 rdev, u32 blksize, u32 flags
sx_time 16: s64 tv_sec, u32 tv_nsec, s32 __reserved
statx 256: u32 mask, u32 blksize, u64 attributes, u32 nlink, u32 uid, u32 gid, u16 mode, u16 __spare0[1], u64 ino,
    u64 size, u64 blocks, u64 attributes_mask, sx_time atime, sx_time btime, sx_time ctime, sx_time mtime, u32
    rdev_major, u32 rdev_minor, u32 dev_major, u32 dev_minor, u64 __spare2[14]
kstatfs 80: u64 blocks, u64 bfree, u64 bavail, u64 files, u64 ffree, u32 bsize, u32 namelen, u32 frsize, u32
    padding, u32 spare[6]
entry_out 128: u64 nodeid, u64 generation, u64 entry_valid, u64 attr_valid, u32 entry_valid_nsec, u32
    attr_valid_nsec, attr attr
forget_in 8: u64 nlookup
forget_one 16: u64 nodeid, u64 nlookup
batch_forget_in 8: u32 count, u32 dummy
getattr_in 16: u32 getattr_flags, u32 dummy, u64 fh
attr_out 104: u64 attr_valid, u32 attr_valid_nsec, u32 dummy, attr attr
statx_in 24: u32 getattr_flags, u32 reserved, u64 fh, u32 sx_flags, u32 sx_mask
statx_out 288: u64 attr_valid, u32 attr_valid_nsec, u32 flags, u64 spare[2], statx stat
mknod_in 16: u32 mode, u32 rdev, u32 umask, u32 padding
mkdir_in 8: u32 mode, u32 umask
rename_in 8: u64 newdir
rename2_in 16: u64 newdir, u32 flags, u32 padding
link_in 8: u64 oldnodeid
setattr_in 88: u32 valid, u32 padding, u64 fh, u64 size, u64 lock_owner, u64 atime, u64 mtime, u64 ctime, u32
    atimensec, u32 mtimensec, u32 ctimensec, u32 mode, u32 unused4, u32 uid, u32 gid, u32 unused5
open_in 8: u32 flags, u32 open_flags
create_in 16: u32 flags, u32 mode, u32 umask, u32 open_flags
open_out 16: u64 fh, u32 open_flags, s32 backing_id
release_in 24: u64 fh, u32 flags, u32 release_flags, u64 lock_owner
flush_in 24: u64 fh, u32 unused, u32 padding, u64 lock_owner
read_in 40: u64 fh, u64 offset, u32 size, u32 read_flags, u64 lock_owner, u32 flags, u32 padding
write_in 40: u64 fh, u64 offset, u32 size, u32 write_flags, u64 lock_owner, u32 flags, u32 padding
write_out 8: u32 size, u32 padding
statfs_out 80: kstatfs st
fsync_in 16: u64 fh, u32 fsync_flags, u32 padding
setxattr_in 16: u32 size, u32 flags, u32 setxattr_flags, u32 padding
getxattr_in 8: u32 size, u32 padding
getxattr_out 8: u32 size, u32 padding
access_in 8: u32 mask, u32 padding
init_in 64: u32 major, u32 minor, u32 max_readahead, u32 flags, u32 flags2, u32 unused[11]
init_out 64: u32 major, u32 minor, u32 max_readahead, u32 flags, u16 max_background, u16 congestion_threshold, u32
    max_write, u32 time_gran, u16 max_pages, u16 map_alignment, u32 flags2, u32 max_stack_depth, u16
    request_timeout, u16 unused[11]
interrupt_in 8: u64 unique
ioctl_in 32: u64 fh, u32 flags, u32 cmd, u64 arg, u32 in_size, u32 out_size
ioctl_out 16: s32 result, u32 flags, u32 in_iovs, u32 out_iovs
fallocate_in 32: u64 fh, u64 offset, u64 length, u32 mode, u32 padding
in_header 40: u32 len, u32 opcode, u64 unique, u64 nodeid, u32 uid, u32 gid, u32 pid, u16 total_extlen, u16 padding
out_header 16: u32 len, s32 error, u64 unique
dirent 24: u64 ino, u64 off, u32 namelen, u32 type
backing_map 16: s32 fd, u32 flags, u64 padding
notify_inval_inode_out 24: u64 ino, s64 off, s64 len
lseek_in 24: u64 fh, u64 offset, u32 whence, u32 padding
lseek_out 8: u64 offset
copy_file_range_in 56: u64 fh_in, u64 off_in, u64 nodeid_out, u64 fh_out, u64 off_out, u64 len, u64 flags
copy_file_range_out 8: u64 bytes_copied
"""
"""Every struct by the header's name without ``fuse_``: its bytes and its fields."""


def structs() -> dict[str, tuple[str, int]]:
    """``STRUCT_TABLE``: fields and bytes by name."""
    table = re.sub(r"\n +", " ", STRUCT_TABLE.strip())
    parts = (re.fullmatch(r"(\w+) (\d+): (.*)", line) for line in table.splitlines())
    return {part[1]: (part[3], int(part[2])) for part in parts if part}


STRUCTS = structs()
NOT_IN_7_38 = {"sx_time", "statx", "statx_in", "statx_out", "backing_map", "copy_file_range_out"}
FIELDS_NOT_IN_7_38 = {("open_out", "backing_id"), ("init_out", "max_stack_depth"), ("init_out", "request_timeout")}


def numbers(table: str) -> dict[str, int]:
    """Names and numbers of a table of ``NAME number`` pairs."""
    return {name: int(number) for name, number in re.findall(r"(\w+)\s+(\d+)", table)}


OPCODES = numbers("""
LOOKUP 1, FORGET 2, GETATTR 3, SETATTR 4, READLINK 5, SYMLINK 6, MKNOD 8, MKDIR 9, UNLINK 10, RMDIR 11, RENAME 12,
LINK 13, OPEN 14, READ 15, WRITE 16, STATFS 17, RELEASE 18, FSYNC 20, SETXATTR 21, GETXATTR 22, LISTXATTR 23,
REMOVEXATTR 24, FLUSH 25, INIT 26, OPENDIR 27, READDIR 28, RELEASEDIR 29, FSYNCDIR 30, GETLK 31, SETLK 32, SETLKW
33, ACCESS 34, CREATE 35, INTERRUPT 36, BMAP 37, DESTROY 38, IOCTL 39, POLL 40, NOTIFY_REPLY 41, BATCH_FORGET 42,
FALLOCATE 43, READDIRPLUS 44, RENAME2 45, LSEEK 46, COPY_FILE_RANGE 47, SETUPMAPPING 48, REMOVEMAPPING 49, SYNCFS
50, TMPFILE 51, STATX 52, COPY_FILE_RANGE_64 53
""")
OPCODES_NOT_IN_7_38 = {"STATX", "COPY_FILE_RANGE_64"}

INIT_FLAGS = numbers("""
ASYNC_READ 0, POSIX_LOCKS 1, FILE_OPS 2, ATOMIC_O_TRUNC 3, EXPORT_SUPPORT 4, BIG_WRITES 5, DONT_MASK 6, SPLICE_WRITE
7, SPLICE_MOVE 8, SPLICE_READ 9, FLOCK_LOCKS 10, HAS_IOCTL_DIR 11, AUTO_INVAL_DATA 12, DO_READDIRPLUS 13,
READDIRPLUS_AUTO 14, ASYNC_DIO 15, WRITEBACK_CACHE 16, NO_OPEN_SUPPORT 17, PARALLEL_DIROPS 18, HANDLE_KILLPRIV 19,
POSIX_ACL 20, ABORT_ERROR 21, MAX_PAGES 22, CACHE_SYMLINKS 23, NO_OPENDIR_SUPPORT 24, EXPLICIT_INVAL_DATA 25,
MAP_ALIGNMENT 26, SUBMOUNTS 27, HANDLE_KILLPRIV_V2 28, SETXATTR_EXT 29, INIT_EXT 30, INIT_RESERVED 31, SECURITY_CTX
32, HAS_INODE_DAX 33, CREATE_SUPP_GROUP 34, HAS_EXPIRE_ONLY 35, DIRECT_IO_ALLOW_MMAP 36, PASSTHROUGH 37,
NO_EXPORT_SUPPORT 38, HAS_RESEND 39, ALLOW_IDMAP 40, OVER_IO_URING 41, REQUEST_TIMEOUT 42
""")
INIT_FLAGS_NOT_IN_7_38 = {
    "CREATE_SUPP_GROUP",
    "DIRECT_IO_ALLOW_MMAP",
    "PASSTHROUGH",
    "NO_EXPORT_SUPPORT",
    "HAS_RESEND",
    "ALLOW_IDMAP",
    "OVER_IO_URING",
    "REQUEST_TIMEOUT",
}

BITS = numbers("""
FOPEN_DIRECT_IO 0, FOPEN_KEEP_CACHE 1, FOPEN_NOFLUSH 5, FOPEN_PARALLEL_DIRECT_WRITES 6, FOPEN_PASSTHROUGH 7,
FATTR_MODE 0, FATTR_UID 1, FATTR_GID 2, FATTR_SIZE 3, FATTR_ATIME 4, FATTR_MTIME 5, FATTR_FH 6, FATTR_ATIME_NOW 7,
FATTR_MTIME_NOW 8, FATTR_KILL_SUIDGID 11, OPEN_KILL_SUIDGID 0, WRITE_KILL_SUIDGID 2, SETXATTR_ACL_KILL_SGID 0,
FSYNC_FDATASYNC 0, IOCTL_DIR 4, UNIQUE_RESEND 63
""")
"""Further flags as ``wire`` calls them; in the header most begin with FUSE_."""

CODES = {"u16": "H", "u32": "I", "s32": "i", "u64": "Q", "s64": "q"}
FIELD = re.compile(r"(\w+) (\w+)(?:\[(\d+)\])?")


def layout(name: str) -> str:
    """The struct's fields as letters of ``struct``."""
    letters = ""
    for kind, _, count in FIELD.findall(STRUCTS[name][0]):
        letters += (CODES[kind] if kind in CODES else layout(kind)) * int(count or 1)
    return letters


def spelled_out(given_format: str) -> str:
    assert given_format[0] == "<", "the device speaks little-endian without padding"
    return re.sub(r"(\d+)(\w)", lambda found: found[2] * int(found[1]), given_format[1:])


def ours() -> dict[str, struct.Struct]:
    """The structs of ``wire`` by the header's names."""
    found = {name.lower(): value for name, value in vars(wire).items() if isinstance(value, struct.Struct)}
    return {name: value for name, value in found.items() if not name.startswith("_")}


def test_every_struct_is_in_the_table() -> None:
    assert set(ours()) - {"setxattr_compat_in"} <= set(STRUCTS)


@pytest.mark.parametrize("name", STRUCTS)
def test_the_table_agrees_with_itself(name: str) -> None:
    assert struct.calcsize("<" + layout(name)) == struct.calcsize("@" + layout(name)) == STRUCTS[name][1]


@pytest.mark.parametrize("name", ours())
def test_structs_are_the_tables(name: str) -> None:
    if name == "setxattr_compat_in":  # what is sent without SETXATTR_EXT: the first two fields
        assert spelled_out(wire.SETXATTR_COMPAT_IN.format) == layout("setxattr_in")[:2]
        return
    assert spelled_out(ours()[name].format) == layout(name)
    assert ours()[name].size == STRUCTS[name][1]


def test_numbers_are_the_tables() -> None:
    assert {opcode.name: opcode.value for opcode in Opcode} == OPCODES
    assert max(Opcode) < wire.OPCODES
    for flag in InitFlag:
        assert flag == 1 << INIT_FLAGS[str(flag.name)], flag
    for name, bit in BITS.items():
        assert getattr(wire, name) == 1 << bit, name
    constants = {name for name in vars(wire) if re.match(r"FOPEN_|FATTR_", name)}
    assert constants <= set(BITS)
    assert (wire.NOTIFY_RESEND, wire.BACKING_OPEN, wire.BACKING_CLOSE) == (7, 0x4010E501, 0x4004E502)
    assert (wire.MAJOR, wire.ROOT_ID) == (7, 1)


# --------------------------------------------------------------------------------------------------- the compiler


@pytest.fixture(scope="module")
def header() -> str:
    if not HEADER.exists() or not shutil.which("gcc"):
        pytest.skip("needs gcc and the kernel's headers")
    return HEADER.read_text()


def compiled(statements: list[str], folder: Path) -> dict[str, int]:
    """What a C program prints: ``name value`` lines."""
    source = folder / "print.c"
    body = "\n".join(statements)
    includes = "#include <linux/fuse.h>\n#include <stddef.h>\n#include <stdio.h>\n"
    source.write_text(f"{includes}int main(void) {{\n{body}\nreturn 0;\n}}\n")
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", folder / "print", source], check=True)
    lines = subprocess.run([folder / "print"], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def shown(what: str, expression: str) -> str:
    return f'printf("%s %lld\\n", "{what}", (long long)({expression}));'


def minor_of(header: str) -> int:
    found = re.search(r"#define FUSE_KERNEL_MINOR_VERSION (\d+)", header)
    assert found
    return int(found[1])


def test_the_compiler_sees_the_same_structs(header: str, tmp_path: Path) -> None:
    statements = []
    for name, (fields, _) in STRUCTS.items():
        body = re.search(rf"^struct fuse_{name} \{{(.*?)^\}}", header, re.DOTALL | re.MULTILINE)
        if body is None:
            assert name in NOT_IN_7_38 and minor_of(header) < 45, name
            continue

        statements.append(
            shown(name, f"offsetof(struct fuse_{name}, name)" if name == "dirent" else f"sizeof(struct fuse_{name})")
        )
        for _, field, _ in FIELD.findall(fields):
            if not re.search(rf"\b{field}\b", body[1]):
                hidden = field in ("padding", "unused", "reserved", "dummy", "spare", "open_flags")
                assert hidden or (name, field) in FIELDS_NOT_IN_7_38, (name, field)
                continue
            statements.append(shown(f"{name}.{field}", f"offsetof(struct fuse_{name}, {field})"))
            statements.append(shown(f"{name}:{field}", f"sizeof(((struct fuse_{name} *)0)->{field})"))
    seen = compiled(statements, tmp_path)
    assert len(seen) > 200
    for name, (fields, size) in STRUCTS.items():
        if name not in seen:
            continue
        assert seen[name] == size, name
        at = 0
        for kind, field, times in FIELD.findall(fields):
            width = struct.calcsize("<" + (CODES.get(kind) or layout(kind))) * int(times or 1)
            known = f"{name}.{field}" in seen
            # Later protocols cut new fields out of the front of a spare array, so what is left of it moves.
            if known and not times:
                assert (seen[f"{name}.{field}"], seen[f"{name}:{field}"]) == (at, width), (name, field)
            at += width
        assert at == size


def test_the_compiler_sees_the_same_numbers(header: str, tmp_path: Path) -> None:
    wanted = {f"FUSE_{name}": value for name, value in OPCODES.items()}
    wanted |= {f"FUSE_{name}": 1 << bit for name, bit in INIT_FLAGS.items()}
    wanted |= {
        name if name.startswith(("FOPEN_", "FATTR_")) else f"FUSE_{name}": 1 << bit for name, bit in BITS.items()
    }
    wanted |= {"FUSE_ROOT_ID": 1, "FUSE_KERNEL_VERSION": 7, "FUSE_NOTIFY_RESEND": wire.NOTIFY_RESEND}
    wanted |= {"FUSE_DEV_IOC_BACKING_OPEN": wire.BACKING_OPEN, "FUSE_DEV_IOC_BACKING_CLOSE": wire.BACKING_CLOSE}
    present = [name for name in wanted if re.search(rf"\b{name}\b(?=\s*=|[ \t]+[^*\s])", header)]
    seen = compiled([shown(name, f"(unsigned long long){name}") for name in present], tmp_path)
    for name, value in seen.items():
        bits = 32 if name == "FUSE_INIT_RESERVED" else 64  # 1 << 31 is negative in C
        assert value % (1 << bits) == wanted[name], name
    younger = {f"FUSE_{name}" for name in OPCODES_NOT_IN_7_38 | INIT_FLAGS_NOT_IN_7_38} | {
        "FOPEN_PASSTHROUGH",
        "FUSE_UNIQUE_RESEND",
        "FUSE_NOTIFY_RESEND",
        "FUSE_DEV_IOC_BACKING_OPEN",
        "FUSE_DEV_IOC_BACKING_CLOSE",
    }
    missing = set(wanted) - set(seen)
    assert not missing - younger, "the header has another name for these"
    if minor_of(header) >= 45:
        assert not missing


# ------------------------------------------------------------------------------------------------------ round trips

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
NAMES = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)
TIMES_NS = st.integers(-(1 << 62), 1 << 62)
ATTRIBUTES = st.builds(
    Attributes, U64, st.integers(0, 0o177777), U32, U32, U32, U32, U64, U64, U32, TIMES_NS, TIMES_NS, TIMES_NS
)
NS = 1_000_000_000


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def body(data: bytes) -> memoryview:
    """As the engine gives bodies: a part of a larger buffer."""
    return memoryview(b"before" + data + b"behind")[6 : 6 + len(data)]


@given(U32, U64, U64, U32, U32, U32, U16, st.binary(max_size=100))
def test_a_header_comes_back(
    opcode: int, unique: int, nodeid: int, uid: int, gid: int, pid: int, total_extlen: int, rest: bytes
) -> None:
    length = wire.IN_HEADER.size + len(rest)
    sent = wire.IN_HEADER.pack(length, opcode, unique, nodeid, uid, gid, pid, total_extlen, 0) + rest
    found = wire.header(sent, length)
    assert found == (length, opcode, unique, nodeid, uid, gid, pid, total_extlen, 0)
    for lie in (length - 1, length + 1):
        with pytest.raises(Malformed):
            wire.header(sent + b"\0", lie)


@given(NAMES, NAMES)
def test_names_come_back(first: bytes, second: bytes) -> None:
    assert wire.name(body(first + b"\0")) == first
    assert wire.two_names(body(first + b"\0" + second + b"\0")) == (first, second)


@pytest.mark.parametrize("data", [b"", b"\0", b"name", b"a\0b", b"a\0b\0", b"a\0\0", b"\0a\0"])
def test_what_is_no_name(data: bytes) -> None:
    with pytest.raises(Malformed):
        wire.name(body(data))


@pytest.mark.parametrize("data", [b"", b"\0", b"a\0", b"a\0\0", b"\0b\0", b"a\0b", b"a\0b\0c\0", b"a\0b\0\0"])
def test_what_are_no_two_names(data: bytes) -> None:
    with pytest.raises(Malformed):
        wire.two_names(body(data))


@given(NAMES, st.binary(max_size=300))
def test_an_attribute_comes_back(name: bytes, value: bytes) -> None:
    sent = body(name + b"\0" + value)
    assert wire.name_and_value(sent, len(value)) == (name, value)
    with pytest.raises(Malformed):
        wire.name_and_value(sent, len(value) + 1)


@given(st.lists(st.tuples(U64, U64), max_size=20), st.binary(max_size=20))
def test_forgotten_nodes_come_back(nodes: list[tuple[int, int]], behind: bytes) -> None:
    sent = wire.BATCH_FORGET_IN.pack(len(nodes), 0) + b"".join(wire.FORGET_ONE.pack(*node) for node in nodes)
    assert wire.forgotten(body(sent + behind)) == nodes
    if nodes:
        with pytest.raises(Malformed):
            wire.forgotten(body(sent[:-1]))


@given(U64, st.binary(max_size=100))
def test_answers_say_their_length(unique: int, data: bytes) -> None:
    answer = wire.reply(unique, data)
    assert wire.OUT_HEADER.unpack_from(answer) == (len(answer), 0, unique)
    assert answer[16:] == data
    assert wire.OUT_HEADER.unpack(wire.failure(unique, errno.ENOENT)) == (16, -errno.ENOENT, unique)
    assert wire.OUT_HEADER.unpack(wire.notification(wire.NOTIFY_RESEND)) == (16, 7, 0)


def check_attr(fields: tuple[int, ...], told: Attributes) -> None:
    (
        ino,
        size,
        blocks,
        atime,
        mtime,
        ctime,
        atime_ns,
        mtime_ns,
        ctime_ns,
        mode,
        nlink,
        uid,
        gid,
        rdev,
        blksize,
        flags,
    ) = fields
    assert (ino, size, blocks, mode, nlink, uid, gid) == (
        told.ino,
        told.size,
        told.blocks,
        told.mode,
        told.nlink,
        told.uid,
        told.gid,
    )
    assert (rdev, blksize, flags) == (told.rdev, told.blksize, 0)
    for seconds, part, wanted in (
        (atime, atime_ns, told.atime_ns),
        (mtime, mtime_ns, told.mtime_ns),
        (ctime, ctime_ns, told.ctime_ns),
    ):
        assert 0 <= part < NS
        assert signed(seconds) * NS + part == wanted


@given(U64, U64, ATTRIBUTES)
def test_entries_and_attributes_come_back(number: int, generation: int, attributes: Attributes) -> None:
    node, generation_out, *valid = wire.ENTRY_OUT.unpack(wire.entry_out(number, generation, attributes))
    assert (node, generation_out, valid[:4]) == (number, generation, [LIFETIME_S, LIFETIME_S, 0, 0])
    check_attr(tuple(valid[4:]), attributes)
    lifetime, part, _, *fields = wire.ATTR_OUT.unpack(wire.attr_out(attributes))
    assert (lifetime, part) == (LIFETIME_S, 0)
    check_attr(tuple(fields), attributes)
    assert wire.ready_attr_out(wire.ATTR.pack(*wire.attr(attributes))) == wire.attr_out(attributes)


def test_no_entry_is_node_0_to_be_kept() -> None:
    node, _, lifetime, *_ = wire.ENTRY_OUT.unpack(wire.NO_ENTRY)
    assert (node, lifetime) == (0, LIFETIME_S)


@given(U64, U64, st.integers(0, 0o177777), NAMES, ATTRIBUTES)
def test_records_of_a_listing_come_back(ino: int, offset: int, mode: int, name: bytes, attributes: Attributes) -> None:
    record = wire.dirent(ino, offset, mode, name)
    assert len(record) % 8 == 0 and len(record) - 24 - len(name) < 8
    assert wire.DIRENT.unpack_from(record) == (ino, offset, len(name), mode >> 12)
    assert record[24:].rstrip(b"\0") == name.rstrip(b"\0")
    entry = wire.entry_out(5, 0, attributes)
    assert wire.direntplus(entry, ino, offset, mode, name) == entry + record
    assert len(entry) % 8 == 0


RDEVS = st.tuples(st.integers(0, 0xFFF), st.integers(0, 0xFFFFF))


@given(ATTRIBUTES, st.none() | TIMES_NS, RDEVS)
def test_statx_comes_back(attributes: Attributes, birth_ns: int | None, device: tuple[int, int]) -> None:
    major, minor = device
    attributes = attributes._replace(rdev=minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)  # new_encode_dev
    out = dict(
        zip(
            [name for _, name, _ in FIELD.findall(STRUCTS["statx"][0]) if "spare" not in name and "time" not in name],
            range(100),
            strict=False,
        )
    )
    answer = wire.statx_out(attributes, birth_ns)
    assert wire.STATX_OUT.unpack(answer)[:3] == (LIFETIME_S, 0, 0)
    mask, blksize, _, nlink, uid, gid, mode, _, ino, size, blocks, _, *rest = wire.STATX.unpack(answer[32:])
    assert len(out) == 15
    assert (blksize, nlink, uid, gid, mode, ino, size, blocks) == (
        attributes.blksize,
        attributes.nlink,
        attributes.uid,
        attributes.gid,
        attributes.mode,
        attributes.ino,
        attributes.size,
        attributes.blocks,
    )
    assert mask == 0x7FF | (0x800 if birth_ns is not None else 0)
    moments = [rest[at] * NS + rest[at + 1] for at in (0, 3, 6, 9)]
    assert moments == [attributes.atime_ns, birth_ns or 0, attributes.ctime_ns, attributes.mtime_ns]
    assert rest[12:14] == [major, minor]


def test_statfs_comes_back() -> None:
    values = (1000, 900, 800, 70, 60, 4096, 255, 1024)
    assert wire.STATFS_OUT.unpack(wire.statfs_out(values)) == (*values, *(0,) * 7)


@given(st.binary(max_size=50), st.integers(0, 60))
def test_attributes_fit_or_not(data: bytes, room: int) -> None:
    if not room:
        assert wire.GETXATTR_OUT.unpack(wire.xattr_out(data, 0)) == (len(data), 0)
    elif room < len(data):
        with pytest.raises(OSError) as refusal:
            wire.xattr_out(data, room)
        assert refusal.value.errno == errno.ERANGE
    else:
        assert wire.xattr_out(data, room) == data


@given(U32, U32, U32, U32)
def test_what_the_kernel_offers(minor: int, readahead: int, flags: int, flags2: int) -> None:
    sent = wire.INIT_IN.pack(7, minor, readahead, flags, flags2, *(0,) * 11)
    if minor < wire.LEAST_MINOR:
        with pytest.raises(OSError) as refusal:
            wire.offered(body(sent))
        assert refusal.value.errno == errno.EPROTO
        return
    extended = bool(flags & InitFlag.INIT_EXT)
    assert wire.offered(body(sent)) == (minor, flags | (flags2 << 32 if extended else 0), readahead)
    assert wire.offered(body(sent[:16]))[1] == flags


@pytest.mark.parametrize("major", [6, 8])
def test_another_protocol_is_refused(major: int) -> None:
    with pytest.raises(OSError) as refusal:
        wire.offered(body(wire.INIT_IN.pack(major, 45, *(0,) * 14)))
    assert refusal.value.errno == errno.EPROTO


@given(st.integers(0, (1 << 43) - 1), st.integers(4096, 1 << 24), U32, st.integers(1, 65535))
def test_what_is_agreed_upon(flags: int, max_write: int, readahead: int, max_background: int) -> None:
    agreed = wire.Negotiated(45, InitFlag(flags), max_write)
    answer = wire.init_out(agreed, readahead, max_background=max_background, stack_depth=1)
    fields = wire.INIT_OUT.unpack(answer)
    assert fields[:4] == (7, wire.MINOR, readahead, flags & 0xFFFFFFFF)
    assert fields[4] == max_background
    assert fields[5] <= max_background
    assert fields[6:8] == (max_write, 1)
    assert fields[8] * 4096 <= max_write < (fields[8] + 1) * 4096
    assert fields[10] == flags >> 32
    assert fields[11] == (1 if flags & InitFlag.PASSTHROUGH else 0)  # 0 and passthrough together make the mount fail


# ------------------------------------------------------------------------------------------------------------- fuzz

DATA = st.binary(max_size=400) | st.lists(st.sampled_from([b"\0", b"a", b"/", b"..", b"\xff" * 8]), max_size=20).map(
    b"".join
)


def values_or_malformed(decode: Callable[..., object], *arguments: object) -> object:
    try:
        return decode(*arguments)
    except Malformed as error:
        assert error.errno == errno.EINVAL
        return None


@given(DATA)
def test_any_bytes_are_a_name_or_malformed(data: bytes) -> None:
    found = values_or_malformed(wire.name, body(data))
    assert found is None or (isinstance(found, bytes) and found and found + b"\0" == data and b"\0" not in found)


@given(DATA)
def test_any_bytes_are_two_names_or_malformed(data: bytes) -> None:
    found = values_or_malformed(wire.two_names, body(data))
    if isinstance(found, tuple):
        first, second = found
        assert first and second and first + b"\0" + second + b"\0" == data


@given(DATA, U32 | st.integers(0, 400))
def test_any_bytes_are_an_attribute_or_malformed(data: bytes, size: int) -> None:
    found = values_or_malformed(wire.name_and_value, body(data), size)
    if isinstance(found, tuple):
        name, value = found
        assert name and b"\0" not in name and len(value) == size


@given(DATA)
def test_any_bytes_are_forgotten_nodes_or_malformed(data: bytes) -> None:
    found = values_or_malformed(wire.forgotten, body(data))
    assert found is None or (isinstance(found, list) and 8 + 16 * len(found) <= len(data))


@given(DATA, st.sampled_from(sorted(ours())))
def test_any_bytes_are_fields_or_malformed(data: bytes, name: str) -> None:
    found = values_or_malformed(wire.fields, ours()[name], body(data))
    assert (found is None) == (len(data) < ours()[name].size)


@given(DATA, st.integers(0, 500))
def test_any_bytes_are_a_header_or_malformed(data: bytes, length: int) -> None:
    """The buffer is larger than the request and holds what is left of the one before."""
    buffer = bytearray(data.ljust(500, b"\xa5"))
    found = values_or_malformed(wire.header, buffer, length)
    assert found is None or (isinstance(found, wire.Header) and found.length == length >= 40)


@given(DATA)
def test_any_bytes_are_an_offer_or_refused(data: bytes) -> None:
    try:
        minor, _, _ = wire.offered(body(data))
    except Malformed:
        assert len(data) < 16
    except OSError as error:
        assert error.errno == errno.EPROTO
    else:
        assert minor >= wire.LEAST_MINOR
