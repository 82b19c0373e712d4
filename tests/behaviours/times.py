"""Times: setting them to the nanosecond, and which operation moves which of them."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from .base import behaviour
from .libc import AT_SYMLINK_NOFOLLOW, RENAME_EXCHANGE, UTIME_NOW, UTIME_OMIT, renameat2, utimensat
from .place import Place, append, expect_errno, get, opened, patch, put, tick
from .seeds import SEED_TIME, Dir, Fifo, File, HardLink, Symlink

SEED = File("a/b/f", b"content")


def mtime(path: Path) -> int:
    return os.lstat(path).st_mtime_ns


def ctime(path: Path) -> int:
    return os.lstat(path).st_ctime_ns


def changed_by(action: Callable[[], object], paths: Iterable[Path]) -> list[str]:
    """Which times ``action`` moved: words such as ``m:f``, one per moved mtime (m) or ctime (c), by file name."""
    watched = list(paths)
    before = [(mtime(path), ctime(path)) for path in watched]
    tick()
    action()
    moved = []
    for path, (old_mtime, old_ctime) in zip(watched, before, strict=True):
        new_mtime, new_ctime = mtime(path), ctime(path)
        if new_mtime != old_mtime:
            assert new_mtime > old_mtime, f"mtime of {path} went back"
            moved.append(f"m:{path.name}")
        if new_ctime != old_ctime:
            assert new_ctime > old_ctime, f"ctime of {path} went back"
            moved.append(f"c:{path.name}")
    return moved


@behaviour(seeds=[SEED])
def times_of_seed(d: Place) -> None:
    found = os.stat(d / "a/b/f")
    assert (found.st_mtime_ns, found.st_atime_ns) == (SEED_TIME, SEED_TIME)
    assert os.stat(d / "a/b").st_mtime_ns == SEED_TIME


@behaviour(seeds=[SEED])
def utime_keeps_nanoseconds(d: Place) -> None:
    for atime, mtime_ in ((1_111_111_111_222_222_223, 1_333_333_333_444_444_447), (999_999_999, 1), (0, 0)):
        os.utime(d / "a/b/f", ns=(atime, mtime_))
        found = os.stat(d / "a/b/f")
        assert (found.st_atime_ns, found.st_mtime_ns) == (atime, mtime_)
    assert get(d / "a/b/f") == b"content"


@behaviour(seeds=[SEED])
def utime_now(d: Place) -> None:
    before = time.time() - 1
    utimensat(d / "a/b/f", (0, UTIME_NOW), (0, UTIME_NOW))
    found = os.stat(d / "a/b/f")
    assert before < found.st_atime < before + 60
    assert before < found.st_mtime < before + 60


@behaviour(seeds=[SEED])
def utime_omit(d: Place) -> None:
    utimensat(d / "a/b/f", (0, UTIME_OMIT), (7, 9))
    assert (os.stat(d / "a/b/f").st_atime_ns, mtime(d / "a/b/f")) == (SEED_TIME, 7_000_000_009)
    utimensat(d / "a/b/f", (8, 3), (0, UTIME_OMIT))
    assert (os.stat(d / "a/b/f").st_atime_ns, mtime(d / "a/b/f")) == (8_000_000_003, 7_000_000_009)


@behaviour(seeds=[SEED])
def utime_omit_both_changes_nothing(d: Place) -> None:
    moved = changed_by(lambda: utimensat(d / "a/b/f", (0, UTIME_OMIT), (0, UTIME_OMIT)), [d / "a/b/f"])
    assert moved == []


@behaviour(seeds=[SEED])
def utime_mixes_now_and_value(d: Place) -> None:
    before = time.time() - 1
    utimensat(d / "a/b/f", (0, UTIME_NOW), (5, 6))
    found = os.stat(d / "a/b/f")
    assert found.st_atime > before
    assert found.st_mtime_ns == 5_000_000_006
    utimensat(d / "a/b/f", (5, 6), (0, UTIME_NOW))
    found = os.stat(d / "a/b/f")
    assert found.st_atime_ns == 5_000_000_006
    assert found.st_mtime > before


@behaviour(seeds=[SEED])
def utime_bad_nanoseconds(d: Place) -> None:
    expect_errno(errno.EINVAL, utimensat, d / "a/b/f", (1, 1_000_000_000), (1, 0))
    expect_errno(errno.EINVAL, utimensat, d / "a/b/f", (1, 0), (1, -1))
    assert mtime(d / "a/b/f") == SEED_TIME


@behaviour(seeds=[SEED, Dir("a/d"), Symlink("a/l", "d")])
def utime_before_1970(d: Place) -> None:
    for name in ("b/f", "d", "l"):
        for seconds in (-1, -2_000_000_000):
            utimensat(d / "a" / name, (seconds, 5), (seconds, 999_999_999), AT_SYMLINK_NOFOLLOW)
            found = os.lstat(d / "a" / name)
            assert found.st_atime_ns == seconds * 10**9 + 5
            assert found.st_mtime_ns == seconds * 10**9 + 999_999_999


@behaviour(seeds=[SEED, Dir("a/d"), Symlink("a/l", "d")])
def utime_after_2038(d: Place) -> None:
    for name in ("b/f", "d", "l"):
        for seconds in (2**31, 2**32 + 5, 15_000_000_000):  # ext4 reaches 2446: 15,032,385,535
            utimensat(d / "a" / name, (seconds, 1), (seconds, 2), AT_SYMLINK_NOFOLLOW)
            found = os.lstat(d / "a" / name)
            assert (found.st_atime_ns, found.st_mtime_ns) == (seconds * 10**9 + 1, seconds * 10**9 + 2)


@behaviour(
    seeds=[File("a/old", b"x", mtime_ns=-86_400_000_000_001), File("a/new", b"y", mtime_ns=4_102_444_800_000_000_001)]
)
def seeds_with_odd_times(d: Place) -> None:
    assert mtime(d / "a/old") == -86_400_000_000_001
    assert mtime(d / "a/new") == 4_102_444_800_000_000_001
    os.chmod(d / "a/old", 0o600)
    os.chown(d / "a/new", 3, 4)
    assert mtime(d / "a/old") == -86_400_000_000_001
    assert mtime(d / "a/new") == 4_102_444_800_000_000_001


@behaviour(seeds=[SEED, Symlink("a/l", "b/f")])
def utime_follows_symlink_or_not(d: Place) -> None:
    utimensat(d / "a/l", (1, 0), (2, 0))
    assert (mtime(d / "a/b/f"), mtime(d / "a/l")) == (2_000_000_000, SEED_TIME)
    utimensat(d / "a/l", (1, 0), (3, 0), AT_SYMLINK_NOFOLLOW)
    assert (mtime(d / "a/b/f"), mtime(d / "a/l")) == (2_000_000_000, 3_000_000_000)


@behaviour(seeds=[SEED])
def utime_through_descriptor(d: Place) -> None:
    with opened(d / "a/b/f") as fd:
        os.utime(fd, ns=(4, 5))
        assert (os.fstat(fd).st_atime_ns, os.fstat(fd).st_mtime_ns) == (4, 5)
    assert mtime(d / "a/b/f") == 5


@behaviour(seeds=[SEED])
def utime_then_write_then_utime(d: Place) -> None:
    os.utime(d / "a/b/f", ns=(1, 2))
    append(d / "a/b/f", b"+")
    assert mtime(d / "a/b/f") > SEED_TIME
    os.utime(d / "a/b/f", ns=(3, 4))
    assert mtime(d / "a/b/f") == 4
    assert get(d / "a/b/f") == b"content+"


@behaviour(seeds=[SEED])
def utime_with_file_open_for_writing(d: Place) -> None:
    # What tar and cp -p do: write, set the times, close. The close must not move them.
    with opened(d / "a/b/f", os.O_WRONLY) as fd:
        os.write(fd, b"restored")
        os.utime(fd, ns=(1_000_000_001, 2_000_000_002))
    found = os.stat(d / "a/b/f")
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_001, 2_000_000_002)


@behaviour(seeds=[Dir("a/d"), Fifo("a/p")])
def utime_of_directories_and_fifos(d: Place) -> None:
    for name in ("d", "p"):
        os.utime(d / "a" / name, ns=(1_000_000_001, 2_000_000_002))
        assert mtime(d / "a" / name) == 2_000_000_002


@behaviour(seeds=[SEED])
def write_moves_times_of_file_not_of_parent(d: Place) -> None:
    moved = changed_by(lambda: patch(d / "a/b/f", 0, b"C"), [d / "a/b/f", d / "a/b", d / "a"])
    assert moved == ["m:f", "c:f"]
    assert mtime(d / "a/b") == mtime(d / "a") == SEED_TIME


@behaviour(seeds=[SEED])
def truncate_moves_times_of_file_not_of_parent(d: Place) -> None:
    paths = [d / "a/b/f", d / "a/b", d / "a"]
    assert changed_by(lambda: os.truncate(d / "a/b/f", 3), paths) == ["m:f", "c:f"]
    assert changed_by(lambda: put(d / "a/b/f", b""), paths) == ["m:f", "c:f"]


@behaviour(seeds=[File("a/empty")])
def truncating_open_of_empty_file_moves_mtime(d: Place) -> None:
    assert changed_by(lambda: put(d / "a/empty", b""), [d / "a/empty", d / "a"]) == ["m:empty", "c:empty"]


@behaviour(seeds=[SEED])
def chmod_chown_move_ctime_only(d: Place) -> None:
    paths = [d / "a/b/f", d / "a/b", d / "a"]
    assert changed_by(lambda: os.chmod(d / "a/b/f", 0o600), paths) == ["c:f"]
    assert changed_by(lambda: os.chown(d / "a/b/f", 3, 4), paths) == ["c:f"]
    assert changed_by(lambda: os.chmod(d / "a/b", 0o700), paths) == ["c:b"]
    assert mtime(d / "a/b/f") == SEED_TIME


@behaviour(seeds=[SEED])
def utime_moves_ctime(d: Place) -> None:
    assert changed_by(lambda: os.utime(d / "a/b/f", ns=(5, SEED_TIME)), [d / "a/b/f", d / "a/b"]) == ["c:f"]


@behaviour(seeds=[SEED])
def create_moves_times_of_parent(d: Place) -> None:
    paths = [d / "a/b/f", d / "a/b", d / "a"]
    assert changed_by(lambda: put(d / "a/b/new", b""), paths) == ["m:b", "c:b"]
    assert changed_by(lambda: os.mkdir(d / "a/b/dir"), paths) == ["m:b", "c:b"]
    assert changed_by(lambda: os.symlink("x", d / "a/b/l"), paths) == ["m:b", "c:b"]
    assert changed_by(lambda: os.mkfifo(d / "a/b/p"), paths) == ["m:b", "c:b"]


@behaviour(seeds=[SEED, File("a/b/g"), Dir("a/b/d")])
def removal_moves_times_of_parent(d: Place) -> None:
    paths = [d / "a/b/f", d / "a/b", d / "a"]
    assert changed_by(lambda: os.unlink(d / "a/b/g"), paths) == ["m:b", "c:b"]
    assert changed_by(lambda: os.rmdir(d / "a/b/d"), paths) == ["m:b", "c:b"]


@behaviour(seeds=[SEED])
def link_moves_times_of_parent_and_ctime(d: Place) -> None:
    paths = [d / "a/b/f", d / "a/b", d / "a"]
    assert changed_by(lambda: os.link(d / "a/b/f", d / "a/g"), paths) == ["c:f", "m:a", "c:a"]
    assert changed_by(lambda: os.unlink(d / "a/g"), paths) == ["c:f", "m:a", "c:a"]


@behaviour(seeds=[SEED, Dir("c")])
def rename_moves_times_of_both_parents(d: Place) -> None:
    def move() -> None:
        os.rename(d / "a/b/f", d / "c/f")

    assert changed_by(move, [d / "a/b", d / "c", d / "a"]) == ["m:b", "c:b", "m:c", "c:c"]
    assert mtime(d / "c/f") == SEED_TIME


@behaviour(seeds=[SEED])
def rename_moves_ctime_of_a_file(d: Place) -> None:
    before = ctime(d / "a/b/f")
    tick()
    os.rename(d / "a/b/f", d / "a/b/g")
    assert ctime(d / "a/b/g") > before
    assert mtime(d / "a/b/g") == SEED_TIME


@behaviour(seeds=[SEED, Dir("a/d")], needs={"directory-ctime"})
def rename_moves_ctime_of_a_directory(d: Place) -> None:
    before = ctime(d / "a/d")
    tick()
    os.rename(d / "a/d", d / "a/e")
    if d.has("directory-ctime"):
        assert ctime(d / "a/e") > before
    else:  # a directory that moves without being touched keeps its change time
        assert ctime(d / "a/e") == before
    assert mtime(d / "a/e") == SEED_TIME


@behaviour(seeds=[SEED, File("c/g", b"g")])
def exchange_moves_times_of_both_parents(d: Place) -> None:
    def swap() -> None:
        renameat2(d / "a/b/f", d / "c/g", RENAME_EXCHANGE)

    assert changed_by(swap, [d / "a/b", d / "c", d / "a"]) == ["m:b", "c:b", "m:c", "c:c"]
    assert (mtime(d / "a/b/f"), mtime(d / "c/g")) == (SEED_TIME, SEED_TIME)


@behaviour(seeds=[SEED, Dir("a/d")])
def failed_operations_move_nothing(d: Place) -> None:
    def fail() -> None:
        expect_errno(errno.EEXIST, os.mkdir, d / "a/b")
        expect_errno(errno.ENOTEMPTY, os.rmdir, d / "a/b")
        expect_errno(errno.ENOENT, os.unlink, d / "a/b/none")
        expect_errno(errno.EISDIR, os.rename, d / "a/b/f", d / "a/d")
        expect_errno(errno.ENOTEMPTY, os.rename, d / "a/b/f", d / "a/b")
        expect_errno(errno.EEXIST, os.link, d / "a/b/f", d / "a/b/f")

    assert changed_by(fail, [d / "a/b/f", d / "a/b", d / "a"]) == []


@behaviour(seeds=[SEED, Symlink("a/l", "b/f"), Dir("a/d")])
def reading_moves_neither_mtime_nor_ctime(d: Place) -> None:
    def look() -> None:
        get(d / "a/b/f")
        os.listdir(d / "a/b")
        os.readlink(d / "a/l")
        os.stat(d / "a/b/f")
        os.listxattr(d / "a/b/f")
        os.access(d / "a/b/f", os.W_OK)

    assert changed_by(look, [d / "a/b/f", d / "a/b", d / "a", d / "a/l"]) == []


@behaviour(seeds=[SEED])
def deep_change_moves_only_its_own_directory(d: Place) -> None:
    os.makedirs(d / "a/b/x/y")
    paths = [d / "a/b/x/y", d / "a/b/x", d / "a/b", d / "a"]
    assert changed_by(lambda: put(d / "a/b/x/y/new", b""), paths) == ["m:y", "c:y"]


@behaviour(seeds=[File("t/u/v/f", b"x"), File("t/u/w/g", b"y")])
def change_inside_leaves_times_of_ancestors_and_siblings(d: Place) -> None:
    # A file system that copies directories on the first change must hide that it did.
    paths = [d / "t", d / "t/u", d / "t/u/v", d / "t/u/w", d / "t/u/w/g"]
    assert changed_by(lambda: append(d / "t/u/v/f", b"+"), paths) == []
    assert changed_by(lambda: os.chmod(d / "t/u/v/f", 0o600), paths) == []
    assert changed_by(lambda: os.unlink(d / "t/u/v/f"), paths) == ["m:v", "c:v"]
    assert [mtime(path) for path in (d / "t", d / "t/u", d / "t/u/w")] == [SEED_TIME] * 3


@behaviour(seeds=[SEED, HardLink("a/g", "a/b/f")])
def write_moves_times_of_every_name(d: Place) -> None:
    moved = changed_by(lambda: append(d / "a/g", b"+"), [d / "a/b/f", d / "a/g"])
    assert moved == ["m:f", "c:f", "m:g", "c:g"]


@behaviour(seeds=[File("a/f", b"x" * 8192)])
def mapped_write_moves_mtime(d: Place) -> None:
    import mmap

    def write() -> None:
        with opened(d / "a/f", os.O_RDWR) as fd, mmap.mmap(fd, 0) as view:
            view[5000] = 7
            view.flush()

    assert changed_by(write, [d / "a/f", d / "a"]) == ["m:f", "c:f"]


@behaviour(seeds=[Dir("a")])
def new_files_have_the_present_time(d: Place) -> None:
    before = time.time() - 1
    put(d / "a/f", b"")
    os.mkdir(d / "a/d")
    os.symlink("x", d / "a/l")
    for name in ("f", "d", "l"):
        found = os.lstat(d / "a" / name)
        for value in (found.st_atime, found.st_mtime, found.st_ctime):
            assert before < value < before + 60, name


@behaviour(seeds=[SEED])
def explicit_atime_survives_stat_and_chmod(d: Place) -> None:
    os.utime(d / "a/b/f", ns=(123_456_789_012, SEED_TIME))
    os.chmod(d / "a/b/f", 0o600)
    os.setxattr(d / "a/b/f", "user.k", b"v")
    assert os.stat(d / "a/b/f").st_atime_ns == 123_456_789_012


@behaviour(seeds=[File("f", b"x", mode=0o644)])
def chmod_to_the_same_mode_moves_ctime(d: Place) -> None:
    for _ in range(3):
        before = os.stat(d / "f").st_ctime_ns
        tick()
        os.chmod(d / "f", 0o600)
        assert os.stat(d / "f").st_ctime_ns > before


@behaviour(
    seeds=[
        File("f", b"x"),
        Symlink("l", "target"),
        Fifo("p"),
        File("one", b"x"),
        HardLink("two", "one"),
        Symlink("s1", "target"),
        HardLink("s2", "s1"),
    ]
)
def rename_moves_ctime_of_everything(d: Place) -> None:
    for name in ("f", "l", "p", "one", "s1"):
        before = os.lstat(d / name)
        tick()
        os.rename(d / name, d / f"{name}-moved")
        after = os.lstat(d / f"{name}-moved")
        assert after.st_ctime_ns > before.st_ctime_ns, name
        assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)
        assert after.st_nlink == before.st_nlink
    assert os.lstat(d / "two").st_ctime_ns == os.lstat(d / "one-moved").st_ctime_ns
    assert os.readlink(d / "l-moved") == os.readlink(d / "s2") == "target"
