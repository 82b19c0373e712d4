"""Symbolic links: any text reads back exactly, and the kernel follows it."""

from __future__ import annotations

import errno
import os
import stat

from .base import behaviour
from .place import Place, expect_errno, get, names, put
from .seeds import SEED_TIME, Dir, File, Symlink

LONGEST = "x" * 4095  # PATH_MAX includes the NUL

# Texts that a file system with markers of its own might mistake for them.
ODD_TEXTS = (
    "//vz/template/x/y",
    "//vz/template/x",
    "//vz/template/",
    "//vz/template",
    "///vz/template/x",
    "///vz/template/x/y",
    "////vz/template/x",
    "/vz/template/x/y",
    "vz/template/x",
    "//vz/template/../../etc/passwd",
    "//vz/template/x/%2e%2e",
    "//vz//template/x",
    "//vz/templatex/y",
    "//",
    "/",
    ".",
    "..",
    " ",
    "a b\nc\td",
    "trailing/",
    "a//b///c",
    "%s%n%00",
    os.fsdecode(b"\xff\xfe\x80"),
    "ümläut/日本",
)


@behaviour(seeds=[Dir("a")])
def symlink_reads_back(d: Place) -> None:
    os.symlink("some/where", d / "a/l")
    found = os.lstat(d / "a/l")
    assert os.readlink(d / "a/l") == "some/where"
    assert stat.S_ISLNK(found.st_mode)
    assert (found.st_size, found.st_nlink, stat.S_IMODE(found.st_mode)) == (10, 1, 0o777)


@behaviour(seeds=[Symlink("a/l", "../b/f"), File("b/f", b"there")])
def symlink_is_followed(d: Place) -> None:
    assert get(d / "a/l") == b"there"
    put(d / "a/l", b"changed")
    assert get(d / "b/f") == b"changed"
    assert os.readlink(d / "a/l") == "../b/f"


@behaviour(seeds=[Symlink("dir", "real/inner"), File("real/inner/f", b"x")])
def symlink_to_directory_is_walked(d: Place) -> None:
    assert names(d / "dir") == ["f"]
    put(d / "dir/g", b"new")
    assert get(d / "real/inner/g") == b"new"
    assert os.stat(f"{d.path}/dir/..").st_ino == os.stat(d / "real").st_ino


@behaviour()
def symlink_texts_read_back_exactly(d: Place) -> None:
    for number, text in enumerate(ODD_TEXTS):
        os.symlink(text, d / f"l{number}")
    for number, text in enumerate(ODD_TEXTS):
        assert os.readlink(d / f"l{number}") == text
        found = os.lstat(d / f"l{number}")
        assert stat.S_ISLNK(found.st_mode)
        assert found.st_size == len(os.fsencode(text)), text


@behaviour(seeds=[Symlink(f"a/l{number}", text) for number, text in enumerate(ODD_TEXTS)])
def symlink_seeds_read_back_exactly(d: Place) -> None:
    for number, text in enumerate(ODD_TEXTS):
        assert os.readlink(d / f"a/l{number}") == text
        assert os.lstat(d / f"a/l{number}").st_size == len(os.fsencode(text)), text


@behaviour(seeds=[Symlink(f"a/l{number}", text) for number, text in enumerate(ODD_TEXTS)])
def symlink_seeds_survive_rename_chown_and_link(d: Place) -> None:
    for number, text in enumerate(ODD_TEXTS):
        os.lchown(d / f"a/l{number}", 3, 4)
        os.rename(d / f"a/l{number}", d / f"m{number}")
        os.link(d / f"m{number}", d / f"n{number}", follow_symlinks=False)
        assert os.readlink(d / f"m{number}") == os.readlink(d / f"n{number}") == text
        assert os.lstat(d / f"m{number}").st_uid == 3
        assert stat.S_ISLNK(os.lstat(d / f"n{number}").st_mode)


@behaviour()
def symlink_like_a_marker_leads_where_it_says(d: Place) -> None:
    os.symlink("//vz/template/none-such/etc/passwd", d / "l")
    expect_errno(errno.ENOENT, os.stat, d / "l")
    expect_errno(errno.ENOENT, get, d / "l")
    os.symlink("//dev/null", d / "null")
    assert stat.S_ISCHR(os.stat(d / "null").st_mode)


@behaviour()
def symlink_of_4095_bytes(d: Place) -> None:
    os.symlink(LONGEST, d / "l")
    assert os.readlink(d / "l") == LONGEST
    assert os.lstat(d / "l").st_size == 4095
    expect_errno(errno.ENAMETOOLONG, os.symlink, "x" * 4096, d / "long")
    expect_errno(errno.ENAMETOOLONG, os.stat, d / "l")


@behaviour()
def symlink_of_4094_bytes_like_a_marker(d: Place) -> None:
    for number, start in enumerate(("//vz/template/", "///vz/template/")):
        text = start.ljust(4094, "y")
        os.symlink(text, d / f"l{number}")
        assert os.readlink(d / f"l{number}") == text
        assert os.lstat(d / f"l{number}").st_size == 4094


@behaviour()
def symlink_of_4095_bytes_like_a_marker(d: Place) -> None:
    # A file system that escapes such texts by a byte must find another place for the longest.
    for number, start in enumerate(("//vz/template/", "///vz/template/")):
        text = start.ljust(4095, "y")
        os.symlink(text, d / f"l{number}")
        assert os.readlink(d / f"l{number}") == text
        assert os.lstat(d / f"l{number}").st_size == 4095


@behaviour()
def symlink_lengths_around_the_inline_limit(d: Place) -> None:
    for length in (1, 58, 59, 60, 61, 255, 256, 1023, 1024, 4094):
        os.symlink("y" * length, d / f"l{length}")
        assert os.readlink(d / f"l{length}") == "y" * length


@behaviour(seeds=[Symlink("long", "x/" * 1500)])
def symlink_seed_of_3000_bytes(d: Place) -> None:
    assert os.readlink(d / "long") == "x/" * 1500
    os.rename(d / "long", d / "moved")
    assert os.readlink(d / "moved") == "x/" * 1500


@behaviour(seeds=[File("a/f"), Dir("a/d"), Symlink("a/l", "none")])
def symlink_errors(d: Place) -> None:
    for name in ("f", "d", "l"):
        expect_errno(errno.EEXIST, os.symlink, "x", d / "a" / name)
    expect_errno(errno.ENOENT, os.symlink, "", d / "e")
    expect_errno(errno.ENOENT, os.symlink, "x", d / "none/l")
    expect_errno(errno.ENOTDIR, os.symlink, "x", d / "a/f/l")
    expect_errno(errno.EINVAL, os.readlink, d / "a/f")
    expect_errno(errno.EINVAL, os.readlink, d / "a/d")
    expect_errno(errno.ENOENT, os.readlink, d / "a/none")


@behaviour(seeds=[Symlink("a/x", "y"), Symlink("a/y", "x"), Symlink("a/self", "self")])
def symlink_loops_are_eloop(d: Place) -> None:
    for name in ("x", "y", "self", "self/z"):
        expect_errno(errno.ELOOP, os.stat, d / "a" / name)
    expect_errno(errno.ELOOP, get, d / "a/x")
    assert stat.S_ISLNK(os.lstat(d / "a/x").st_mode)


@behaviour()
def symlink_chain_of_forty(d: Place) -> None:
    put(d / "l0", b"end")
    for number in range(41):
        os.symlink(f"l{number}", d / f"l{number + 1}")
    assert get(d / "l40") == b"end"  # 40 links are followed, man 7 path_resolution
    expect_errno(errno.ELOOP, get, d / "l41")


@behaviour(seeds=[Symlink("a/l", "none"), Dir("a/real"), Symlink("a/dirlink", "real")])
def unlink_removes_the_symlink_only(d: Place) -> None:
    os.unlink(d / "a/l")
    expect_errno(errno.ENOTDIR, os.rmdir, d / "a/dirlink")
    os.unlink(d / "a/dirlink")
    assert names(d / "a") == ["real"]


@behaviour(seeds=[Symlink("a/l", "none")])
def dangling_symlink_is_enoent(d: Place) -> None:
    expect_errno(errno.ENOENT, os.stat, d / "a/l")
    expect_errno(errno.ENOENT, get, d / "a/l")
    expect_errno(errno.ENOENT, os.chmod, d / "a/l", 0o600)


@behaviour(seeds=[Symlink("a/l", "f"), File("a/f", b"x")])
def symlink_has_its_own_owner_and_times(d: Place) -> None:
    os.lchown(d / "a/l", 3, 4)
    os.utime(d / "a/l", ns=(1_000_000_007, 2_000_000_009), follow_symlinks=False)
    link, file = os.lstat(d / "a/l"), os.stat(d / "a/f")
    assert (link.st_uid, link.st_gid, link.st_mtime_ns) == (3, 4, 2_000_000_009)
    assert (file.st_uid, file.st_gid, file.st_mtime_ns) == (0, 0, SEED_TIME)
    assert os.readlink(d / "a/l") == "f"


@behaviour(seeds=[Symlink("a/l", "old")])
def symlink_replaced_by_rename(d: Place) -> None:
    os.symlink("new", d / "a/tmp")
    os.rename(d / "a/tmp", d / "a/l")
    assert os.readlink(d / "a/l") == "new"
    assert names(d / "a") == ["l"]


@behaviour(seeds=[Symlink("a/l", "old"), File("a/f", b"data")])
def symlink_and_file_replace_each_other(d: Place) -> None:
    os.rename(d / "a/f", d / "a/l")
    assert get(d / "a/l") == b"data"
    assert not stat.S_ISLNK(os.lstat(d / "a/l").st_mode)
    os.symlink("x", d / "a/m")
    os.rename(d / "a/m", d / "a/l")
    assert os.readlink(d / "a/l") == "x"


@behaviour()
def symlink_mode_cannot_be_changed(d: Place) -> None:
    os.symlink("x", d / "l")
    fd = os.open(d / "l", os.O_PATH | os.O_NOFOLLOW)
    try:
        expect_errno(errno.EOPNOTSUPP, os.chmod, f"/proc/self/fd/{fd}", 0o600)
    finally:
        os.close(fd)
    assert stat.S_IMODE(os.lstat(d / "l").st_mode) == 0o777
