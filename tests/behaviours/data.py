"""Reading and writing: offsets, append, truncate, holes, large files, mapped memory, direct I/O."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .base import behaviour
from .libc import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FS_IOC_GETFLAGS,
    fallocate,
)
from .place import Place, append, expect_errno, get, mode_of, open_close, opened, patch, put
from .seeds import Dir, File

GIB = 1 << 30
BIG = bytes(range(256)) * 4096 * 5  # 5 MiB, no two neighbouring bytes alike
PAGE = mmap.PAGESIZE
SPARSE = File("a/b/sparse", b"head", pieces=((8 << 20, b"middle"),), size=16 << 20)


@contextmanager
def mapped(path: Path, *, shared: bool, writable: bool = True) -> Iterator[mmap.mmap]:
    flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    access = os.O_RDWR if shared and writable else os.O_RDONLY
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    with opened(path, access) as fd, mmap.mmap(fd, 0, flags, protection) as view:
        yield view


@behaviour(seeds=[File("a/b/f", b"hello world\n")])
def read_gives_the_content(d: Place) -> None:
    assert get(d / "a/b/f") == b"hello world\n"
    with opened(d / "a/b/f") as fd:
        assert os.pread(fd, 5, 6) == b"world"
        assert os.pread(fd, 100, 12) == b""
        assert os.pread(fd, 100, 10_000) == b""


@behaviour(seeds=[File("a/b/big", BIG)])
def read_of_five_mebibytes(d: Place) -> None:
    assert hashlib.sha256(get(d / "a/b/big")).digest() == hashlib.sha256(BIG).digest()
    with opened(d / "a/b/big") as fd:
        assert os.pread(fd, 10_000, 3_333_333) == BIG[3_333_333:3_343_333]


@behaviour(seeds=[File("a/f")])
def read_of_empty_file(d: Place) -> None:
    assert get(d / "a/f") == b""


@behaviour(seeds=[File("a/b/f", b"hello world\n")])
def write_in_the_middle(d: Place) -> None:
    patch(d / "a/b/f", 6, b"there")
    assert get(d / "a/b/f") == b"hello there\n"


@behaviour(seeds=[File("a/b/big", BIG)])
def write_in_the_middle_of_five_mebibytes(d: Place) -> None:
    patch(d / "a/b/big", 2_500_000, b"###")
    assert get(d / "a/b/big") == BIG[:2_500_000] + b"###" + BIG[2_500_003:]


@behaviour(seeds=[File("a/b/f", b"12345")])
def write_beyond_the_end_leaves_zeros(d: Place) -> None:
    patch(d / "a/b/f", 10_000, b"x")
    assert get(d / "a/b/f") == b"12345" + bytes(9_995) + b"x"


@behaviour(seeds=[File("a/f", b"12345")])
def write_moves_the_offset(d: Place) -> None:
    with opened(d / "a/f", os.O_RDWR) as fd:
        os.write(fd, b"ab")
        assert os.lseek(fd, 0, os.SEEK_CUR) == 2
        assert os.read(fd, 2) == b"34"
        assert os.lseek(fd, -1, os.SEEK_END) == 4
        assert os.read(fd, 10) == b"5"
        expect_errno(errno.EINVAL, os.lseek, fd, -1, os.SEEK_SET)


@behaviour(seeds=[File("a/f", b"12345")])
def write_is_seen_by_same_descriptor(d: Place) -> None:
    with opened(d / "a/f", os.O_RDWR) as fd:
        assert os.pread(fd, 5, 0) == b"12345"
        os.pwrite(fd, b"X", 2)
        assert os.pread(fd, 5, 0) == b"12X45"
        assert os.fstat(fd).st_size == 5
        os.pwrite(fd, b"Y", 9)
        assert os.fstat(fd).st_size == 10


@behaviour(seeds=[File("a/f", b"12345")])
def write_of_nothing_changes_nothing(d: Place) -> None:
    before = os.stat(d / "a/f").st_mtime_ns
    with opened(d / "a/f", os.O_WRONLY) as fd:
        assert os.pwrite(fd, b"", 100) == 0
    assert get(d / "a/f") == b"12345"
    assert os.stat(d / "a/f").st_mtime_ns == before


@behaviour(seeds=[File("a/f", b"12345")])
def wrong_direction_is_ebadf(d: Place) -> None:
    with opened(d / "a/f") as fd:
        expect_errno(errno.EBADF, os.write, fd, b"x")
    with opened(d / "a/f", os.O_WRONLY) as fd:
        expect_errno(errno.EBADF, os.read, fd, 1)


@behaviour(seeds=[File("a/f", b"12345")])
def vectored_read_and_write(d: Place) -> None:
    with opened(d / "a/f", os.O_RDWR) as fd:
        assert os.pwritev(fd, [b"ab", b"", b"cdefg"], 3) == 7
        buffers = [bytearray(4), bytearray(3), bytearray(10)]
        assert os.preadv(fd, buffers, 0) == 10
        assert b"".join(buffers) == b"123abcdefg" + bytes(7)


@behaviour(seeds=[File("a/b/f", b"one\n")])
def append_goes_to_the_end(d: Place) -> None:
    append(d / "a/b/f", b"two\n")
    append(d / "a/b/f", b"three\n")
    assert get(d / "a/b/f") == b"one\ntwo\nthree\n"


@behaviour(seeds=[File("a/f", b"one")])
def append_ignores_the_offset(d: Place) -> None:
    with opened(d / "a/f", os.O_RDWR | os.O_APPEND) as fd:
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"two")
        os.pwrite(fd, b"three", 0)  # appends on Linux, man 2 pwrite BUGS
        assert os.lseek(fd, 0, os.SEEK_CUR) == 6
    assert get(d / "a/f") == b"onetwothree"


@behaviour(seeds=[File("log", b"")])
def append_by_processes_loses_nothing(d: Place) -> None:
    def work(letter: bytes) -> None:
        with opened("log", os.O_WRONLY | os.O_APPEND) as fd:
            for _ in range(100):
                os.write(fd, letter * 20 + b"\n")

    children = [d.start(work, letter) for letter in (b"a", b"b", b"c")]
    for child in children:
        child.result()
    lines = get(d / "log").splitlines()
    assert sorted(lines) == [letter * 20 for letter in (b"a", b"b", b"c") for _ in range(100)]


@behaviour(seeds=[File("a/b/f", b"0123456789", mode=0o640, uid=3, gid=4)])
def truncate_shorter(d: Place) -> None:
    os.truncate(d / "a/b/f", 4)
    assert get(d / "a/b/f") == b"0123"
    found = os.stat(d / "a/b/f")
    assert (found.st_size, found.st_uid, found.st_gid, mode_of(d / "a/b/f")) == (4, 3, 4, 0o640)


@behaviour(seeds=[File("a/b/f", b"0123456789")])
def truncate_to_nothing(d: Place) -> None:
    os.truncate(d / "a/b/f", 0)
    assert os.stat(d / "a/b/f").st_size == 0
    assert os.stat(d / "a/b/f").st_blocks == 0
    append(d / "a/b/f", b"x")
    assert get(d / "a/b/f") == b"x"


@behaviour(seeds=[File("a/b/f", b"0123456789")])
def truncate_longer_gives_zeros(d: Place) -> None:
    os.truncate(d / "a/b/f", 20_000)
    assert get(d / "a/b/f") == b"0123456789" + bytes(19_990)


@behaviour(seeds=[File("a/b/f", b"0123456789")])
def truncate_shorter_then_longer_forgets(d: Place) -> None:
    os.truncate(d / "a/b/f", 3)
    os.truncate(d / "a/b/f", 10)
    assert get(d / "a/b/f") == b"012" + bytes(7)


@behaviour(seeds=[File("a/b/f", b"0123456789")])
def truncate_to_same_size_keeps_content(d: Place) -> None:
    os.truncate(d / "a/b/f", 10)
    assert get(d / "a/b/f") == b"0123456789"


@behaviour(seeds=[File("a/f", b"0123456789")])
def ftruncate_through_descriptor(d: Place) -> None:
    with opened(d / "a/f", os.O_RDWR) as fd:
        os.ftruncate(fd, 5)
        assert os.fstat(fd).st_size == 5
        assert os.pread(fd, 10, 0) == b"01234"
    with opened(d / "a/f") as fd:
        expect_errno(errno.EINVAL, os.ftruncate, fd, 0)
    assert get(d / "a/f") == b"01234"


@behaviour(seeds=[Dir("a/d"), File("a/f", b"x")])
def truncate_errors(d: Place) -> None:
    expect_errno(errno.EISDIR, os.truncate, d / "a/d", 0)
    expect_errno(errno.EINVAL, os.truncate, d / "a/f", -1)
    expect_errno(errno.ENOTDIR, os.truncate, d / "a/f/x", 0)
    assert get(d / "a/f") == b"x"


@behaviour(seeds=[File("a/f", b"0123456789")])
def truncate_is_seen_by_open_descriptor(d: Place) -> None:
    with opened(d / "a/f", os.O_RDWR) as fd:
        d.in_child(os.truncate, "a/f", 3)
        assert os.fstat(fd).st_size == 3
        assert os.pread(fd, 10, 0) == b"012"


@behaviour(seeds=[SPARSE])
def sparse_file_reads_zeros_in_holes(d: Place) -> None:
    data = get(d / "a/b/sparse")
    assert len(data) == 16 << 20
    assert hashlib.sha256(data).digest() == hashlib.sha256(_sparse_content()).digest()


@behaviour(seeds=[SPARSE])
def sparse_file_stays_sparse_after_write(d: Place) -> None:
    patch(d / "a/b/sparse", 4 << 20, b"new")
    assert os.stat(d / "a/b/sparse").st_size == 16 << 20
    assert os.stat(d / "a/b/sparse").st_blocks * 512 < 1 << 20
    expected = bytearray(_sparse_content())
    expected[4 << 20 : (4 << 20) + 3] = b"new"
    assert get(d / "a/b/sparse") == bytes(expected)


def _sparse_content() -> bytes:
    content = bytearray(16 << 20)
    content[0:4] = b"head"
    content[8 << 20 : (8 << 20) + 6] = b"middle"
    return bytes(content)


@behaviour()
def file_above_four_gibibytes(d: Place) -> None:
    with opened(d / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"start", 0)
        os.pwrite(fd, b"four", 4 * GIB - 2)
        os.pwrite(fd, b"five", 5 * GIB)
        assert os.fstat(fd).st_size == 5 * GIB + 4
        assert os.pread(fd, 8, 4 * GIB - 4) == b"\0\0four\0\0"
        assert os.pread(fd, 10, 5 * GIB) == b"five"
        os.ftruncate(fd, 4 * GIB + 1)
        assert os.lseek(fd, 0, os.SEEK_END) == 4 * GIB + 1
    assert os.stat(d / "f").st_size == 4 * GIB + 1
    assert os.stat(d / "f").st_blocks * 512 < 1 << 20


@behaviour(seeds=[File("a/f", b"x")])
def truncate_to_a_tebibyte(d: Place) -> None:
    os.truncate(d / "a/f", 1 << 40)
    assert os.stat(d / "a/f").st_size == 1 << 40
    with opened(d / "a/f") as fd:
        assert os.pread(fd, 2, (1 << 40) - 1) == b"\0"
        assert os.pread(fd, 2, 0) == b"x\0"


@behaviour(seeds=[File("a/b/f", b"m" * 10_000)])
def mmap_private_read(d: Place) -> None:
    with mapped(d / "a/b/f", shared=False, writable=False) as view:
        assert view[:] == b"m" * 10_000


@behaviour(seeds=[File("a/b/f", b"m" * 10_000)])
def mmap_private_write_stays_private(d: Place) -> None:
    with mapped(d / "a/b/f", shared=False) as view:
        view[5_000:5_003] = b"NEW"
        assert view[4_999:5_004] == b"mNEWm"
    assert get(d / "a/b/f") == b"m" * 10_000


@behaviour(seeds=[File("a/b/f", b"m" * 10_000)])
def mmap_shared_read_only(d: Place) -> None:
    with mapped(d / "a/b/f", shared=True, writable=False) as view:
        assert view[:] == b"m" * 10_000


@behaviour(seeds=[File("a/b/f", b"m" * 10_000)])
def mmap_shared_write_reaches_the_file(d: Place) -> None:
    with mapped(d / "a/b/f", shared=True) as view:
        view[5_000:5_003] = b"NEW"
        view.flush()
        assert d.in_child(get, "a/b/f") == b"m" * 5_000 + b"NEW" + b"m" * 4_997
    assert get(d / "a/b/f") == b"m" * 5_000 + b"NEW" + b"m" * 4_997


@behaviour(seeds=[File("a/b/f", b"m" * 10_000)])
def mmap_shared_write_without_flush(d: Place) -> None:
    with mapped(d / "a/b/f", shared=True) as view:
        view[0:3] = b"NEW"
    assert get(d / "a/b/f") == b"NEW" + b"m" * 9_997
    assert os.stat(d / "a/b/f").st_size == 10_000


@behaviour(seeds=[File("a/b/f", b"m" * 10_000)])
def mmap_shared_write_after_close(d: Place) -> None:
    fd = os.open(d / "a/b/f", os.O_RDWR)
    view = mmap.mmap(fd, 0)
    os.close(fd)
    view[9_000] = ord("X")
    view.close()
    assert get(d / "a/b/f") == b"m" * 9_000 + b"X" + b"m" * 999


@behaviour(seeds=[File("a/f", b"m" * 10_000)])
def mmap_shared_sees_write_of_same_descriptor(d: Place) -> None:
    with opened(d / "a/f", os.O_RDWR) as fd, mmap.mmap(fd, 0) as view:
        os.pwrite(fd, b"NEW", 100)
        assert view[99:104] == b"mNEWm"
        view[0:1] = b"#"
        assert os.pread(fd, 2, 0) == b"#m"


@behaviour(seeds=[File("a/f", bytes(8192))])
def mmap_shared_between_processes(d: Place) -> None:
    def work() -> None:
        with mapped(Path("a/f"), shared=True) as view:
            view[4096:4101] = b"child"

    with mapped(d / "a/f", shared=True) as view:
        view[0:6] = b"parent"
        d.in_child(work)
        assert view[4096:4101] == b"child"
    assert get(d / "a/f")[:6] == b"parent"


@behaviour(seeds=[File("a/f", b"m" * 100)])
def mmap_tail_of_last_page_is_zero(d: Place) -> None:
    with opened(d / "a/f") as fd, mmap.mmap(fd, 100, mmap.MAP_PRIVATE, mmap.PROT_READ) as view:
        assert view[:] == b"m" * 100
    with opened(d / "a/f", os.O_RDWR) as fd:
        os.ftruncate(fd, 200)
        assert os.pread(fd, 200, 0) == b"m" * 100 + bytes(100)


@behaviour(seeds=[File("a/f", b"m" * 100)])
def mmap_needs_matching_descriptor(d: Place) -> None:
    with opened(d / "a/f") as fd:
        expect_errno(errno.EACCES, mmap.mmap, fd, 100, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with opened(d / "a/f", os.O_WRONLY) as fd:
        expect_errno(errno.EACCES, mmap.mmap, fd, 100, mmap.MAP_SHARED, mmap.PROT_READ)


@behaviour(seeds=[File("a/b/big", BIG)])
def direct_read(d: Place) -> None:
    with opened(d / "a/b/big", os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 65_536) as buffer:
        assert os.preadv(fd, [buffer], 1 << 20) == 65_536
        assert buffer[:] == BIG[1 << 20 : (1 << 20) + 65_536]


@behaviour(seeds=[File("a/b/big", BIG)])
def direct_write(d: Place) -> None:
    with mmap.mmap(-1, 65_536) as buffer:
        buffer[:] = b"D" * 65_536
        with opened(d / "a/b/big", os.O_RDWR | os.O_DIRECT) as fd:
            assert os.pwritev(fd, [buffer], 1 << 20) == 65_536
    assert get(d / "a/b/big") == BIG[: 1 << 20] + b"D" * 65_536 + BIG[(1 << 20) + 65_536 :]


@behaviour(seeds=[File("a/b/f", b"c" * 8192)])
def direct_write_is_seen_by_cached_reader(d: Place) -> None:
    with opened(d / "a/b/f", os.O_RDWR) as cached, mmap.mmap(-1, 4096) as buffer:
        assert os.pread(cached, 3, 0) == b"ccc"
        buffer[:] = b"D" * 4096
        with opened(d / "a/b/f", os.O_RDWR | os.O_DIRECT) as fd:
            os.pwritev(fd, [buffer], 0)
        assert os.pread(cached, 3, 0) == b"DDD"


@behaviour(needs={"coherent-readers"}, seeds=[File("a/b/f", b"old content")])
def open_reader_sees_write(d: Place) -> None:
    with opened(d / "a/b/f") as reader:
        assert os.pread(reader, 3, 0) == b"old"
        d.in_child(patch, "a/b/f", 0, b"new")
        _judge(d, os.pread(reader, 100, 0), b"old content", b"new content")
    assert get(d / "a/b/f") == b"new content"


@behaviour(needs={"coherent-readers"}, seeds=[File("a/b/f", b"old content")])
def open_reader_without_cache_sees_write(d: Place) -> None:
    with opened(d / "a/b/f") as reader:
        d.in_child(put, "a/b/f", b"new")
        assert get(d / "a/b/f") == b"new"
        _judge(d, os.pread(reader, 100, 0), b"old content", b"new")


@behaviour(needs={"coherent-readers"}, seeds=[File("a/b/f", b"old" * 4000)])
def mmap_reader_sees_write(d: Place) -> None:
    with mapped(d / "a/b/f", shared=True, writable=False) as view:
        assert view[0:3] == b"old"
        d.in_child(patch, "a/b/f", 0, b"new")
        _judge(d, view[0:3], b"old", b"new")
    assert get(d / "a/b/f")[:6] == b"newold"


def _judge(d: Place, seen: bytes, old: bytes, new: bytes) -> None:
    # Where readers are not coherent, one page may still be shared: old or new, but never a mixture.
    expected = [new] if d.has("coherent-readers") else [old, new]
    assert seen in expected, f"read {seen!r}, expected one of {expected!r}"


@behaviour(seeds=[File("a/f", b"old")])
def reader_after_first_write_sees_later_writes(d: Place) -> None:
    append(d / "a/f", b"1")
    with opened(d / "a/f") as reader:
        d.in_child(append, "a/f", b"2")
        assert os.pread(reader, 100, 0) == b"old12"
        d.in_child(append, "a/f", b"3")
        assert os.pread(reader, 100, 0) == b"old123"


@behaviour(seeds=[File("a/f", b"0123456789")])
def two_writers_see_each_other(d: Place) -> None:
    with opened(d / "a/f", os.O_RDWR) as one, opened(d / "a/f", os.O_RDWR) as two:
        os.pwrite(one, b"ONE", 0)
        os.pwrite(two, b"TWO", 5)
        assert os.pread(one, 10, 0) == b"ONE34TWO89"
        assert os.pread(two, 10, 0) == b"ONE34TWO89"


@behaviour(seeds=[File("a/from", BIG)])
def copy_file_range_copies(d: Place) -> None:
    with opened(d / "a/from") as source, opened(d / "a/to", os.O_CREAT | os.O_RDWR) as target:
        done = 0
        while done < 1_000_000:
            count = os.copy_file_range(source, target, 1_000_000 - done, 5_000 + done, done)
            assert count > 0
            done += count
    assert get(d / "a/to") == BIG[5_000:1_005_000]


@behaviour(seeds=[File("a/from", BIG)])
def sendfile_copies(d: Place) -> None:
    with opened(d / "a/from") as source, opened(d / "a/to", os.O_CREAT | os.O_RDWR) as target:
        done = 0
        while done < len(BIG):
            done += os.sendfile(target, source, done, len(BIG) - done)
    assert get(d / "a/to") == BIG


@behaviour(needs={"seek-hole"}, seeds=[SPARSE])
def seek_hole_and_data(d: Place) -> None:
    with opened(d / "a/b/sparse") as fd:
        if not d.has("seek-hole"):
            # lseek(2): the simplest implementation is one piece of data and a hole at the end.
            assert os.lseek(fd, 4 << 20, os.SEEK_DATA) == 4 << 20
            assert os.lseek(fd, 0, os.SEEK_HOLE) == 16 << 20
        else:
            assert os.lseek(fd, 4 << 20, os.SEEK_DATA) == 8 << 20
            assert os.lseek(fd, 0, os.SEEK_HOLE) <= 1 << 20
            expect_errno(errno.ENXIO, os.lseek, fd, 12 << 20, os.SEEK_DATA)
        expect_errno(errno.ENXIO, os.lseek, fd, 16 << 20, os.SEEK_DATA)
        expect_errno(errno.ENXIO, os.lseek, fd, 16 << 20, os.SEEK_HOLE)


@behaviour(needs={"fallocate"}, seeds=[File("a/f", b"x")])
def fallocate_reserves_space(d: Place) -> None:
    with opened(d / "a/f", os.O_RDWR) as fd:
        if not d.has("fallocate"):
            expect_errno(errno.EOPNOTSUPP, fallocate, fd, 0, 0, 1 << 20)
            assert os.fstat(fd).st_size == 1
            return
        fallocate(fd, 0, 0, 1 << 20)
        assert os.fstat(fd).st_size == 1 << 20
        assert os.fstat(fd).st_blocks * 512 >= 1 << 20
        assert os.pread(fd, 3, 0) == b"x\0\0"
    expect_errno(errno.EBADF, _fallocate_read_only, d / "a/f")


def _fallocate_read_only(path: Path) -> None:
    with opened(path) as fd:
        fallocate(fd, 0, 0, 10)


@behaviour(needs={"fallocate"}, seeds=[File("a/f", b"y" * 65_536)])
def fallocate_keeps_size_and_punches_holes(d: Place) -> None:
    punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    with opened(d / "a/f", os.O_RDWR) as fd:
        if not d.has("fallocate"):
            expect_errno(errno.EOPNOTSUPP, fallocate, fd, FALLOC_FL_KEEP_SIZE, 0, 1 << 20)
            expect_errno(errno.EOPNOTSUPP, fallocate, fd, punch, 4096, 8192)
        else:
            fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 1 << 20)
            assert os.fstat(fd).st_size == 65_536
            fallocate(fd, punch, 4096, 8192)
            assert os.pread(fd, 65_536, 0) == b"y" * 4096 + bytes(8192) + b"y" * 53_248
            return
    assert get(d / "a/f") == b"y" * 65_536


@behaviour(seeds=[File("a/f", b"x")])
def posix_fallocate_always_works(d: Place) -> None:
    # The C library writes zeros where the file system has no fallocate: databases and mail servers rely on it.
    with opened(d / "a/f", os.O_RDWR) as fd:
        os.posix_fallocate(fd, 0, 100_000)
        assert os.fstat(fd).st_size == 100_000
        assert os.pread(fd, 3, 0) == b"x\0\0"


@behaviour(needs={"getflags"}, seeds=[File("a/f", b"x")])
def inode_flags_can_be_read(d: Place) -> None:
    with opened(d / "a/f") as fd:
        if not d.has("getflags"):
            expect_errno(errno.ENOTTY, fcntl.ioctl, fd, FS_IOC_GETFLAGS, bytes(8))
            return
        (flags,) = struct.unpack_from("I", fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8)))
        assert flags & 0x10 == 0  # FS_IMMUTABLE_FL


@behaviour(seeds=[File("a/f", b"0123456789" * 1000)])
def descriptors_have_their_own_offsets(d: Place) -> None:
    with opened(d / "a/f") as one, opened(d / "a/f") as two:
        os.read(one, 105)
        assert os.read(two, 3) == b"012"
        copy = os.dup(one)
        assert os.read(copy, 2) == b"56"
        os.close(copy)
        assert os.read(one, 1) == b"7"


@behaviour(needs={"coherent-readers"}, seeds=[File("a/b/f", b"seed", mode=0o644)])
def reopen_through_proc_writes_the_file(d: Place) -> None:
    with opened(d / "a/b/f") as reader:
        if not d.has("coherent-readers"):  # what it has open stays what it is, and can't be written
            expect_errno(errno.ETXTBSY, os.open, f"/proc/self/fd/{reader}", os.O_RDWR)
            assert os.pread(reader, 10, 0) == get(d / "a/b/f") == b"seed"
            return
        with opened(f"/proc/self/fd/{reader}", os.O_RDWR) as writer:
            os.pwrite(writer, b"SEED", 0)
    assert get(d / "a/b/f") == b"SEED"


@behaviour(seeds=[File("a/b/f", b"seed", mode=0o444)])
def open_path_descriptor_reopened_for_writing(d: Place) -> None:
    with opened(d / "a/b/f", os.O_PATH) as fd:
        append(f"/proc/self/fd/{fd}", b"+")
    assert get(d / "a/b/f") == b"seed+"


@behaviour(seeds=[Dir("a")])
def many_small_writes_add_up(d: Place) -> None:
    with opened(d / "a/f", os.O_CREAT | os.O_WRONLY) as fd:
        for number in range(1000):
            os.write(fd, b"%06d\n" % number)
    assert get(d / "a/f") == b"".join(b"%06d\n" % number for number in range(1000))


@behaviour(seeds=[Dir("a")])
def one_large_write(d: Place) -> None:
    data = BIG * 3 + b"odd"
    with opened(d / "a/f", os.O_CREAT | os.O_RDWR) as fd:
        done = 0
        while done < len(data):
            done += os.pwrite(fd, memoryview(data)[done:], done)
        os.fsync(fd)
    assert get(d / "a/f") == data


@behaviour(seeds=[File("a/f", b"x" * 100)])
def synchronous_writes(d: Place) -> None:
    for flag in (os.O_SYNC, os.O_DSYNC):
        with opened(d / "a/f", os.O_WRONLY | flag) as fd:
            assert os.write(fd, b"y" * 10) == 10
    assert get(d / "a/f") == b"y" * 10 + b"x" * 90


@behaviour(seeds=[File("a/f", b"x" * 100)])
def file_size_limit_of_process(d: Place) -> None:
    def work() -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with opened("a/f", os.O_WRONLY) as fd:
            assert os.pwrite(fd, b"z" * 100, 4950) == 50
            expect_errno(errno.EFBIG, os.pwrite, fd, b"z", 5000)
            expect_errno(errno.EFBIG, os.ftruncate, fd, 6000)

    d.in_child(work)
    assert os.stat(d / "a/f").st_size == 5000


@behaviour(seeds=[File("a/f", b"q" * 5000)])
def advice_and_readahead_are_harmless(d: Place) -> None:
    with opened(d / "a/f") as fd:
        for advice in (os.POSIX_FADV_SEQUENTIAL, os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED):
            os.posix_fadvise(fd, 0, 0, advice)
        assert os.pread(fd, 5000, 0) == b"q" * 5000


@behaviour(seeds=[File("a/f", b"seed")])
def flags_without_meaning_for_files_are_accepted(d: Place) -> None:
    open_close(d / "a/f", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    assert get(d / "a/f") == b"seed"
