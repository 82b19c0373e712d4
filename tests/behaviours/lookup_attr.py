"""Looking names up, reading attributes, changing modes and owners."""

from __future__ import annotations

import errno
import os
import stat

from .base import behaviour
from .place import ALICE, ALICES, Place, append, expect_errno, get, mode_of, opened, patch, put
from .seeds import SEED_TIME, BlockDev, CharDev, Dir, Fifo, File, HardLink, Symlink

ALL_TYPES = (
    File("t/file", b"data\n", mode=0o640, uid=ALICE, gid=ALICES),
    Dir("t/dir", mode=0o750, uid=ALICE, gid=ALICES),
    Symlink("t/link", "file", uid=ALICE, gid=ALICES),
    Fifo("t/fifo", mode=0o620, uid=ALICE, gid=ALICES),
    CharDev("t/null", 1, 3, uid=ALICE, gid=ALICES),
    BlockDev("t/block", 7, 200, uid=ALICE, gid=ALICES),
)


@behaviour(seeds=[Dir("a")])
def lookup_of_missing_name(d: Place) -> None:
    expect_errno(errno.ENOENT, os.stat, d / "none")
    expect_errno(errno.ENOENT, os.stat, d / "a/none")
    expect_errno(errno.ENOENT, os.stat, d / "none/none")


@behaviour(seeds=[File("a/f")])
def lookup_through_a_file(d: Place) -> None:
    expect_errno(errno.ENOTDIR, os.stat, d / "a/f/x")
    expect_errno(errno.ENOTDIR, os.stat, f"{d.path}/a/f/")
    expect_errno(errno.ENOTDIR, os.stat, f"{d.path}/a/f/.")


@behaviour(seeds=[File("a/Readme")])
def lookup_minds_case(d: Place) -> None:
    expect_errno(errno.ENOENT, os.stat, d / "a/README")
    put(d / "a/README", b"other")
    assert names_of(d, "a") == ["README", "Readme"]
    assert get(d / "a/Readme") == b""


def names_of(d: Place, name: str) -> list[str]:
    return sorted(os.listdir(d / name))


@behaviour()
def lookup_after_miss_finds_new_file(d: Place) -> None:
    expect_errno(errno.ENOENT, os.stat, d / "f")
    d.in_child(put, "f", b"x")
    assert os.stat(d / "f").st_size == 1


@behaviour(seeds=[File("a/f")])
def lookup_after_unlink_misses(d: Place) -> None:
    os.stat(d / "a/f")
    d.in_child(os.unlink, "a/f")
    expect_errno(errno.ENOENT, os.stat, d / "a/f")


@behaviour(seeds=[File("a/b/f")])
def lookup_of_dot_and_dotdot(d: Place) -> None:
    assert os.stat(f"{d.path}/a/b/.").st_ino == os.stat(d / "a/b").st_ino
    assert os.stat(f"{d.path}/a/b/..").st_ino == os.stat(d / "a").st_ino
    assert os.stat(f"{d.path}/a/b/../../a/b/f").st_ino == os.stat(d / "a/b/f").st_ino


@behaviour(seeds=ALL_TYPES)
def stat_tells_each_type(d: Place) -> None:
    kinds = {name: stat.S_IFMT(os.lstat(d / "t" / name).st_mode) for name in os.listdir(d / "t")}
    assert kinds == {
        "file": stat.S_IFREG,
        "dir": stat.S_IFDIR,
        "link": stat.S_IFLNK,
        "fifo": stat.S_IFIFO,
        "null": stat.S_IFCHR,
        "block": stat.S_IFBLK,
    }


@behaviour(seeds=ALL_TYPES)
def stat_tells_each_mode(d: Place) -> None:
    modes = {name: mode_of(d / "t" / name) for name in os.listdir(d / "t")}
    assert modes == {
        "file": 0o640,
        "dir": 0o750,
        "link": 0o777,
        "fifo": 0o620,
        "null": 0o666,
        "block": 0o660,
    }


@behaviour(seeds=ALL_TYPES)
def stat_tells_each_owner_and_time(d: Place) -> None:
    for name in os.listdir(d / "t"):
        found = os.lstat(d / "t" / name)
        assert (found.st_uid, found.st_gid) == (ALICE, ALICES), name
        assert found.st_mtime_ns == SEED_TIME, name


@behaviour(seeds=ALL_TYPES)
def stat_tells_device_numbers(d: Place) -> None:
    assert os.stat(d / "t/null").st_rdev == os.makedev(1, 3)
    assert os.stat(d / "t/block").st_rdev == os.makedev(7, 200)
    assert os.stat(d / "t/file").st_rdev == 0


@behaviour(seeds=ALL_TYPES)
def stat_tells_sizes(d: Place) -> None:
    assert os.stat(d / "t/file").st_size == 5
    assert os.lstat(d / "t/link").st_size == 4
    assert os.lstat(d / "t/fifo").st_size == 0
    assert os.lstat(d / "t/null").st_size == 0


@behaviour(seeds=[File("a/f", b"12345"), Symlink("l", "a/f")])
def stat_follows_and_lstat_does_not(d: Place) -> None:
    assert os.stat(d / "l").st_ino == os.stat(d / "a/f").st_ino
    assert os.lstat(d / "l").st_ino != os.stat(d / "a/f").st_ino
    assert stat.S_ISLNK(os.lstat(d / "l").st_mode)


@behaviour(seeds=ALL_TYPES)
def inode_numbers_are_distinct(d: Place) -> None:
    found = [os.lstat(d / "t" / name) for name in os.listdir(d / "t")] + [os.stat(d / "t"), os.stat(d.path)]
    assert len({one.st_ino for one in found}) == len(found)
    assert all(one.st_ino > 0 for one in found)
    assert len({one.st_dev for one in found}) == 1


@behaviour(seeds=[File("a/f", b"x")])
def fstat_equals_stat(d: Place) -> None:
    with opened(d / "a/f") as fd:
        assert os.fstat(fd) == os.stat(d / "a/f")
    with opened(d / "a", os.O_DIRECTORY) as fd:
        assert os.fstat(fd) == os.stat(d / "a")


@behaviour(seeds=[File("a/b/f", b"x" * 5000)])
def ino_survives_write(d: Place) -> None:
    before = os.stat(d / "a/b/f").st_ino
    patch(d / "a/b/f", 10, b"y")
    assert os.stat(d / "a/b/f").st_ino == before


@behaviour(seeds=[File("a/b/f", b"x" * 5000)])
def ino_survives_truncating_open(d: Place) -> None:
    before = os.stat(d / "a/b/f").st_ino
    put(d / "a/b/f", b"new")
    assert os.stat(d / "a/b/f").st_ino == before


@behaviour(seeds=[File("a/b/f", b"x")])
def ino_survives_chmod_chown_utime(d: Place) -> None:
    path = d / "a/b/f"
    before = os.stat(path).st_ino
    os.chmod(path, 0o600)
    assert os.stat(path).st_ino == before
    os.chown(path, ALICE, ALICES)
    assert os.stat(path).st_ino == before
    os.utime(path, (1, 1))
    assert os.stat(path).st_ino == before


@behaviour(seeds=[File("a/b/f", b"x"), Dir("c")])
def ino_survives_rename(d: Place) -> None:
    before = os.stat(d / "a/b/f").st_ino
    os.rename(d / "a/b/f", d / "c/g")
    assert os.stat(d / "c/g").st_ino == before
    append(d / "c/g", b"y")
    assert os.stat(d / "c/g").st_ino == before


@behaviour(seeds=[File("a/b/f", b"x")])
def ino_of_directory_survives_changes(d: Place) -> None:
    before = os.stat(d / "a/b").st_ino, os.stat(d / "a").st_ino
    put(d / "a/b/new", b"")
    os.unlink(d / "a/b/f")
    os.chmod(d / "a/b", 0o700)
    assert (os.stat(d / "a/b").st_ino, os.stat(d / "a").st_ino) == before


@behaviour(seeds=[File("a/f", b"x")])
def ino_of_open_file_survives_write(d: Place) -> None:
    with opened(d / "a/f") as reader:
        append(d / "a/f", b"y")
        assert os.fstat(reader).st_ino == os.stat(d / "a/f").st_ino


@behaviour(seeds=[File("f"), File("g")])
def ino_is_not_reused_while_open(d: Place) -> None:
    with opened(d / "f") as fd:
        ino = os.fstat(fd).st_ino
        os.unlink(d / "f")
        for number in range(50):
            put(d / f"new{number}", b"")
            assert os.stat(d / f"new{number}").st_ino != ino


@behaviour(seeds=[File("a/empty"), File("a/big", b"z" * 1_000_000), File("a/sparse", b"z", size=8 << 20)])
def blocks_count_what_is_stored(d: Place) -> None:
    assert os.stat(d / "a/empty").st_blocks == 0
    assert os.stat(d / "a/big").st_blocks * 512 >= 1_000_000
    assert os.stat(d / "a/sparse").st_blocks * 512 < 1 << 20


@behaviour(seeds=[File("a/b/f", b"data")])
def chmod_sets_all_twelve_bits(d: Place) -> None:
    for mode in (0o7777, 0o0000, 0o4755, 0o2755, 0o1644, 0o640):
        os.chmod(d / "a/b/f", mode)
        assert mode_of(d / "a/b/f") == mode
    assert get(d / "a/b/f") == b"data"


@behaviour(seeds=[File("a/b/f", b"data")])
def chmod_of_directory(d: Place) -> None:
    for mode in (0o7777, 0o0700, 0o2755, 0o1777):
        os.chmod(d / "a/b", mode)
        assert mode_of(d / "a/b") == mode
    assert get(d / "a/b/f") == b"data"
    assert mode_of(d / "a") == 0o755


@behaviour(seeds=[File("a/f", mode=0o644), Symlink("a/l", "f")])
def chmod_follows_symlink(d: Place) -> None:
    os.chmod(d / "a/l", 0o600)
    assert mode_of(d / "a/f") == 0o600
    assert mode_of(d / "a/l") == 0o777


@behaviour(seeds=[Fifo("a/fifo"), CharDev("a/null", 1, 3), BlockDev("a/block", 7, 200)])
def chmod_and_chown_of_special_files(d: Place) -> None:
    os.mknod(d / "a/socket", stat.S_IFSOCK | 0o600)
    for name in ("fifo", "socket", "null", "block"):
        kind = stat.S_IFMT(os.stat(d / "a" / name).st_mode), os.stat(d / "a" / name).st_rdev
        os.chown(d / "a" / name, ALICE, ALICES)
        os.chmod(d / "a" / name, 0o604)
        found = os.stat(d / "a" / name)
        assert (found.st_uid, found.st_gid, mode_of(d / "a" / name)) == (ALICE, ALICES, 0o604), name
        assert (stat.S_IFMT(found.st_mode), found.st_rdev) == kind, name


@behaviour(seeds=[File("a/f", b"data"), Dir("a/d"), Symlink("a/l", "f")])
def chown_of_each_type(d: Place) -> None:
    for name in ("f", "d", "l"):
        os.lchown(d / "a" / name, ALICE, ALICES + 5)
        found = os.lstat(d / "a" / name)
        assert (found.st_uid, found.st_gid) == (ALICE, ALICES + 5), name
    assert os.readlink(d / "a/l") == "f"
    assert get(d / "a/f") == b"data"


@behaviour(seeds=[File("a/f"), Symlink("a/l", "f")])
def chown_follows_symlink(d: Place) -> None:
    os.chown(d / "a/l", ALICE, ALICES)
    assert os.stat(d / "a/f").st_uid == ALICE
    assert os.lstat(d / "a/l").st_uid == 0


@behaviour(seeds=[File("a/f", uid=5, gid=6)])
def chown_of_minus_one_keeps(d: Place) -> None:
    os.chown(d / "a/f", -1, 7)
    assert (os.stat(d / "a/f").st_uid, os.stat(d / "a/f").st_gid) == (5, 7)
    os.chown(d / "a/f", 8, -1)
    assert (os.stat(d / "a/f").st_uid, os.stat(d / "a/f").st_gid) == (8, 7)
    os.chown(d / "a/f", -1, -1)
    assert (os.stat(d / "a/f").st_uid, os.stat(d / "a/f").st_gid) == (8, 7)


@behaviour(seeds=[File("a/f")])
def chown_takes_large_ids(d: Place) -> None:
    os.chown(d / "a/f", 4_000_000_000, 4_294_967_294)
    assert (os.stat(d / "a/f").st_uid, os.stat(d / "a/f").st_gid) == (4_000_000_000, 4_294_967_294)


@behaviour(seeds=[File("a/f", b"data")])
def fchmod_and_fchown_of_read_only_descriptor(d: Place) -> None:
    with opened(d / "a/f") as fd:
        os.fchmod(fd, 0o604)
        os.fchown(fd, ALICE, ALICES)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o604
    found = os.stat(d / "a/f")
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (ALICE, ALICES, 0o604)


@behaviour(seeds=[File("a/b/f", b"old", mode=0o640, uid=5, gid=6)])
def chmod_then_write(d: Place) -> None:
    os.chmod(d / "a/b/f", 0o604)
    append(d / "a/b/f", b" new")
    found = os.stat(d / "a/b/f")
    assert get(d / "a/b/f") == b"old new"
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_size) == (0o604, 5, 6, 7)


@behaviour(seeds=[File("a/b/f", b"old", mode=0o640, uid=5, gid=6)])
def write_then_chmod(d: Place) -> None:
    append(d / "a/b/f", b" new")
    assert mode_of(d / "a/b/f") == 0o640
    os.chmod(d / "a/b/f", 0o604)
    assert get(d / "a/b/f") == b"old new"
    assert (os.stat(d / "a/b/f").st_uid, os.stat(d / "a/b/f").st_gid, mode_of(d / "a/b/f")) == (5, 6, 0o604)


@behaviour(seeds=[File("a/b/f", b"old", uid=5, gid=6)])
def chown_then_truncating_open(d: Place) -> None:
    os.chown(d / "a/b/f", 7, 8)
    put(d / "a/b/f", b"new")
    assert (os.stat(d / "a/b/f").st_uid, os.stat(d / "a/b/f").st_gid) == (7, 8)
    assert get(d / "a/b/f") == b"new"


@behaviour(seeds=[File("a/f", b"1"), File("a/g", b"2"), File("a/h", b"3")])
def chmod_leaves_siblings_alone(d: Place) -> None:
    os.chmod(d / "a/g", 0o600)
    assert [mode_of(d / "a" / name) for name in "fgh"] == [0o644, 0o600, 0o644]
    assert [os.stat(d / "a" / name).st_mtime_ns for name in "fgh"] == [SEED_TIME] * 3


@behaviour(seeds=[File("a/f", mode=0o644), HardLink("b/g", "a/f")])
def chmod_shows_through_every_name(d: Place) -> None:
    os.chmod(d / "b/g", 0o600)
    assert mode_of(d / "a/f") == 0o600
    os.chown(d / "a/f", 3, 4)
    assert (os.stat(d / "b/g").st_uid, os.stat(d / "b/g").st_gid) == (3, 4)


@behaviour()
def setattr_of_missing_file(d: Place) -> None:
    expect_errno(errno.ENOENT, os.chmod, d / "none", 0o600)
    expect_errno(errno.ENOENT, os.chown, d / "none", 1, 1)
    expect_errno(errno.ENOENT, os.utime, d / "none")
    expect_errno(errno.ENOENT, os.truncate, d / "none", 0)


@behaviour(seeds=[File("a/f", b"12345678")])
def path_descriptor_gives_attributes_only(d: Place) -> None:
    with opened(d / "a/f", os.O_PATH) as fd:
        assert os.fstat(fd).st_size == 8
        expect_errno(errno.EBADF, os.read, fd, 1)
        expect_errno(errno.EBADF, os.fchmod, fd, 0o600)
