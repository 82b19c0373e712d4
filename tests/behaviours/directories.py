"""Directories: making, removing, counting links, and listing while entries come and go."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from .base import behaviour
from .libc import DT_BLK, DT_CHR, DT_DIR, DT_FIFO, DT_LNK, DT_REG, DT_SOCK, directory_stream
from .place import Place, append, expect_errno, get, names, opened, put
from .seeds import BlockDev, CharDev, Dir, Fifo, File, HardLink, Seed, Symlink

MANY = 100_000
# Names so long that one buffer of getdents (32 KiB in glibc) or of FUSE can't hold them all.
COUNT = 600
TAIL = "-" + "x" * 100
SEVERAL = [File(f"many/f{number:04}{TAIL}", b"%d" % number) for number in range(COUNT)]
TYPES: list[Seed] = [
    File("t/file"),
    Dir("t/dir"),
    Symlink("t/link", "file"),
    Fifo("t/fifo"),
    CharDev("t/null", 1, 3),
    BlockDev("t/block", 7, 200),
]


def member(d: Place, number: int) -> Path:
    return d / f"many/f{number:04}{TAIL}"


@behaviour(seeds=[Dir("a/d"), File("a/full/f")])
def rmdir_of_empty_and_full(d: Place) -> None:
    expect_errno(errno.ENOTEMPTY, os.rmdir, d / "a/full")
    os.rmdir(d / "a/d")
    assert names(d / "a") == ["full"]
    assert names(d / "a/full") == ["f"]


@behaviour(seeds=[File("a/full/f"), File("a/full/g")])
def rmdir_after_emptying(d: Place) -> None:
    os.unlink(d / "a/full/f")
    expect_errno(errno.ENOTEMPTY, os.rmdir, d / "a/full")
    os.unlink(d / "a/full/g")
    os.rmdir(d / "a/full")
    assert names(d / "a") == []


@behaviour(seeds=[File("a/f"), Dir("a/d")])
def rmdir_errors(d: Place) -> None:
    expect_errno(errno.ENOTDIR, os.rmdir, d / "a/f")
    expect_errno(errno.ENOENT, os.rmdir, d / "a/none")
    expect_errno(errno.EINVAL, os.rmdir, f"{d.path}/a/d/.")
    expect_errno(errno.ENOTEMPTY, os.rmdir, f"{d.path}/a/d/..")
    os.rmdir(f"{d.path}/a/d/")


@behaviour(seeds=[Dir("a/d"), File("a/f")])
def unlink_errors(d: Place) -> None:
    expect_errno(errno.EISDIR, os.unlink, d / "a/d")
    expect_errno(errno.ENOENT, os.unlink, d / "a/none")
    expect_errno(errno.ENOTDIR, os.unlink, f"{d.path}/a/f/")
    expect_errno(errno.ENOTDIR, os.unlink, d / "a/f/x")
    assert names(d / "a") == ["d", "f"]


@behaviour(seeds=[Dir("a/d"), Dir("a/e/inner"), File("a/f")])
def nlink_of_directories_counts_children(d: Place) -> None:
    assert os.stat(d / "a").st_nlink == 4
    assert os.stat(d / "a/d").st_nlink == 2
    assert os.stat(d / "a/e").st_nlink == 3
    assert os.stat(d.path).st_nlink == 3


@behaviour(seeds=[Dir("a/d"), File("a/f")])
def nlink_grows_with_mkdir_and_shrinks_with_rmdir(d: Place) -> None:
    os.mkdir(d / "a/new")
    assert os.stat(d / "a").st_nlink == 4
    put(d / "a/file", b"")
    assert os.stat(d / "a").st_nlink == 4
    os.rmdir(d / "a/d")
    os.rmdir(d / "a/new")
    assert os.stat(d / "a").st_nlink == 2
    assert os.stat(d.path).st_nlink == 3


@behaviour(seeds=[File("a/b/f"), Dir("a/b/c"), Symlink("a/b/l", "f")])
def listing_has_dot_and_dotdot(d: Place) -> None:
    with directory_stream(d / "a/b") as stream:
        entries = {entry.name: entry for entry in stream.rest()}
    assert set(entries) == {b".", b"..", b"f", b"c", b"l"}
    assert entries[b"."].ino == os.stat(d / "a/b").st_ino
    assert entries[b".."].ino == os.stat(d / "a").st_ino
    assert entries[b"."].type == entries[b".."].type == DT_DIR


@behaviour(seeds=TYPES)
def listing_tells_types(d: Place) -> None:
    os.mknod(d / "t/socket", stat.S_IFSOCK | 0o600)
    with directory_stream(d / "t") as stream:
        types = {entry.name: entry.type for entry in stream.rest()}
    expected = {
        b"file": DT_REG,
        b"dir": DT_DIR,
        b"link": DT_LNK,
        b"fifo": DT_FIFO,
        b"socket": DT_SOCK,
        b"null": DT_CHR,
        b"block": DT_BLK,
    }
    assert types == {b".": DT_DIR, b"..": DT_DIR, **expected}


@behaviour(seeds=[*TYPES, HardLink("t/hard", "t/file")])
def listing_tells_inode_numbers(d: Place) -> None:
    _check_numbers(d, "t")
    assert len(names(d / "t")) == 7


@behaviour(seeds=[*TYPES, HardLink("t/hard", "t/file")])
def listing_tells_inode_numbers_after_changes(d: Place) -> None:
    append(d / "t/hard", b"x")
    os.lchown(d / "t/link", 3, 4)
    os.chmod(d / "t/null", 0o600)
    put(d / "t/dir/new", b"")
    put(d / "t/new", b"")
    os.rename(d / "t/fifo", d / "t/pipe")
    _check_numbers(d, "t")
    _check_numbers(d, "t/dir")


def _check_numbers(d: Place, name: str) -> None:
    with directory_stream(d / name) as stream:
        for entry in stream.rest():
            found = os.lstat(os.fsencode(d / name) + b"/" + entry.name)
            assert entry.ino == found.st_ino, entry.name
            assert entry.type == stat.S_IFMT(found.st_mode) >> 12, entry.name


@behaviour(seeds=[Dir("a/empty")])
def listing_of_empty_directory(d: Place) -> None:
    assert names(d / "a/empty") == []
    with directory_stream(d / "a/empty") as stream:
        assert sorted(entry.name for entry in stream.rest()) == [b".", b".."]
        assert stream.read() is None


@behaviour(seeds=[File("a/f")])
def listing_of_a_file(d: Place) -> None:
    expect_errno(errno.ENOTDIR, os.listdir, d / "a/f")
    expect_errno(errno.ENOENT, os.listdir, d / "a/none")


@behaviour(seeds=SEVERAL)
def listing_of_many_seeds(d: Place) -> None:
    assert names(d / "many") == [f"f{number:04}{TAIL}" for number in range(COUNT)]
    assert os.stat(d / "many").st_nlink == 2


@behaviour(seeds=SEVERAL)
def listing_after_changes_among_many_seeds(d: Place) -> None:
    os.unlink(member(d, 100))
    append(member(d, 200), b"+")
    os.rename(member(d, 300), d / "many/renamed")
    put(d / "many/new", b"")
    expected = {f"f{number:04}{TAIL}" for number in range(COUNT) if number not in (100, 300)} | {"renamed", "new"}
    assert names(d / "many") == sorted(expected)
    assert get(member(d, 200)) == b"200+"
    assert get(member(d, 599)) == b"599"


@behaviour(seeds=SEVERAL)
def listing_while_removing_what_was_read(d: Place) -> None:
    removed = set()
    with directory_stream(d / "many") as stream:
        while entry := stream.read():
            if not entry.name.startswith(b"."):
                os.unlink(os.fsencode(d / "many") + b"/" + entry.name)
                removed.add(entry.name)
    assert len(removed) == COUNT
    os.rmdir(d / "many")


@behaviour(seeds=SEVERAL)
def listing_while_others_come_and_go(d: Place) -> None:
    with directory_stream(d / "many") as stream:
        seen = [entry.name for _ in range(100) if (entry := stream.read())]
        for number in range(0, COUNT, 2):
            os.unlink(member(d, number))
        for number in range(COUNT):
            put(d / f"many/new{number:04}{TAIL}", b"")
        seen += [entry.name for entry in stream.rest()]
    # POSIX: what is neither added nor removed is given exactly once; the others at most once.
    assert len(seen) == len(set(seen))
    assert {os.fsencode(member(d, number).name) for number in range(1, COUNT, 2)} <= set(seen)


@behaviour(seeds=SEVERAL)
def listing_while_entries_are_renamed(d: Place) -> None:
    with directory_stream(d / "many") as stream:
        seen = [entry.name for _ in range(100) if (entry := stream.read())]
        for number in range(0, COUNT, 2):
            os.rename(member(d, number), d / f"many/g{number:04}{TAIL}")
        seen += [entry.name for entry in stream.rest()]
    assert len(seen) == len(set(seen))
    assert {os.fsencode(member(d, number).name) for number in range(1, COUNT, 2)} <= set(seen)


@behaviour(seeds=SEVERAL)
def listing_while_files_are_changed(d: Place) -> None:
    with directory_stream(d / "many") as stream:
        seen = [entry.name for _ in range(100) if (entry := stream.read())]
        for number in range(0, COUNT, 20):
            append(member(d, number), b"+")
            os.chmod(member(d, number + 1), 0o600)
        seen += [entry.name for entry in stream.rest()]
    assert sorted(seen) == sorted([b".", b"..", *(os.fsencode(member(d, number).name) for number in range(COUNT))])


@behaviour(seeds=SEVERAL)
def rewinddir_starts_again_and_sees_changes(d: Place) -> None:
    with directory_stream(d / "many") as stream:
        first = [entry.name for entry in stream.rest()]
        put(d / "many/new", b"")
        os.unlink(member(d, 1))
        stream.rewind()
        second = {entry.name for entry in stream.rest()}
    assert second == set(first) - {os.fsencode(member(d, 1).name)} | {b"new"}


@behaviour(seeds=SEVERAL)
def seekdir_returns_to_a_position(d: Place) -> None:
    with directory_stream(d / "many") as stream:
        positions = []
        order = []
        while True:
            positions.append(stream.tell())
            entry = stream.read()
            if entry is None:
                break
            order.append(entry.name)
        for index in (0, 1, 2, 3, 300, COUNT - 1, COUNT, COUNT + 1, 5, len(order)):
            stream.seek(positions[index])
            assert [entry.name for entry in stream.rest()] == order[index:]
    assert len(order) == COUNT + 2


@behaviour(seeds=SEVERAL)
def seekdir_after_removal_loses_nothing(d: Place) -> None:
    with directory_stream(d / "many") as stream:
        head = [entry.name for _ in range(250) if (entry := stream.read())]
        position = stream.tell()
        rest = {entry.name for entry in stream.rest()}
        gone = {name for name in head if not name.startswith(b".")}
        for name in gone:
            os.unlink(os.fsencode(d / "many") + b"/" + name)
        stream.seek(position)
        assert {entry.name for entry in stream.rest()} == rest


@behaviour(seeds=[File("a/f"), File("a/g")])
def listing_by_old_descriptor_is_up_to_date(d: Place) -> None:
    # Each listing starts again at offset 0 of a descriptor that is kept open, as find, rm and daemons do.
    with opened(d / "a", os.O_DIRECTORY) as fd:
        put(d / "a/new", b"")
        assert sorted(os.listdir(fd)) == ["f", "g", "new"]
        os.unlink(d / "a/f")
        assert sorted(os.listdir(fd)) == ["g", "new"]


@behaviour(seeds=[File("a/f"), File("a/g")])
def two_streams_are_independent(d: Place) -> None:
    with directory_stream(d / "a") as one, directory_stream(d / "a") as two:
        one.read()
        one.read()
        assert len(two.rest()) == 4
        assert len(one.rest()) == 2


@behaviour(seeds=[Dir("big")])
def directory_of_100000_entries(d: Place) -> None:
    with opened(d / "big", os.O_DIRECTORY) as fd:
        for number in range(MANY):
            os.mknod(f"entry-{number:06}", stat.S_IFREG | 0o644, dir_fd=fd)
    listed = os.listdir(d / "big")
    assert len(listed) == MANY
    assert len(set(listed)) == MANY
    assert os.stat(d / "big/entry-054321").st_size == 0
    expect_errno(errno.ENOENT, os.stat, d / "big/entry-100000")
    put(d / "big/entry-077777", b"x")
    assert get(d / "big/entry-077777") == b"x"
    expect_errno(errno.ENOTEMPTY, os.rmdir, d / "big")
    os.rename(d / "big", d / "renamed")
    assert len(os.listdir(d / "renamed")) == MANY


@behaviour()
def directory_of_1000_directories(d: Place) -> None:
    for number in range(1_000):
        os.mkdir(d / f"d{number}")
    assert os.stat(d.path).st_nlink == 1_002
    for number in range(1_000):
        os.rmdir(d / f"d{number}")
    assert os.stat(d.path).st_nlink == 2
    assert names(d.path) == []


@behaviour(seeds=[File("a/f", b"x")])
def fchdir_and_relative_paths(d: Place) -> None:
    def work() -> tuple[bytes, str]:
        with opened("a", os.O_DIRECTORY) as fd:
            os.fchdir(fd)
        return get("f"), os.getcwd()

    content, cwd = d.in_child(work)
    assert content == b"x"
    assert cwd == os.path.realpath(d / "a")


@behaviour()
def mkdir_rmdir_race_leaves_one_state(d: Place) -> None:
    def work() -> int:
        made = 0
        for _ in range(100):
            try:
                os.mkdir("d")
                made += 1
            except FileExistsError:
                pass
            try:
                os.rmdir("d")
            except FileNotFoundError:
                pass
        return made

    children = [d.start(work) for _ in range(3)]
    assert sum(child.result() for child in children) >= 100
    assert names(d.path) == []
    assert os.stat(d.path).st_nlink == 2


@behaviour(seeds=[Dir("a")])
def names_that_look_special_are_ordinary(d: Place) -> None:
    odd = ["...", ".hidden", "-rf", " ", "a b", "tab\t", "new\nline", "*", "?", "\\", "'", '"', "$HOME", ".wh.f", "~"]
    odd += [".fuse_hidden0001", ".vzfs", "cow", "conf", "lock", "private", ".wh..wh..opq", ".#f", "lost+found"]
    for name in odd:
        put(d / "a" / name, name.encode())
    assert names(d / "a") == sorted(odd)
    for name in odd:
        assert get(d / "a" / name) == name.encode()
        os.unlink(d / "a" / name)
    assert names(d / "a") == []
