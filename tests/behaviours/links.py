"""Hard links: counts, identity, what is shared between names, and removing names."""

from __future__ import annotations

import errno
import os
import stat

from .base import behaviour
from .libc import link_descriptor
from .place import Place, append, expect_errno, get, mode_of, names, opened, patch, put, tick
from .seeds import CharDev, Dir, Fifo, File, HardLink, Symlink

# Three names of one file in three directories, and one file of its own beside them.
GROUP = (
    File("a/one", b"shared", mode=0o640, xattrs={"user.k": b"v"}),
    HardLink("a/two", "a/one"),
    HardLink("b/c/three", "a/one"),
    File("a/other", b"alone"),
)
NAMES = ("a/one", "a/two", "b/c/three")


@behaviour(seeds=[File("a/f", b"data"), Dir("b")])
def link_makes_a_second_name(d: Place) -> None:
    os.link(d / "a/f", d / "b/g")
    one, two = os.stat(d / "a/f"), os.stat(d / "b/g")
    assert one.st_ino == two.st_ino
    assert (one.st_nlink, two.st_nlink) == (2, 2)
    assert get(d / "b/g") == b"data"


@behaviour(seeds=[File("a/f", b"data")])
def link_within_one_directory(d: Place) -> None:
    os.link(d / "a/f", d / "a/g")
    assert names(d / "a") == ["f", "g"]
    assert os.stat(d / "a/f").st_nlink == 2
    assert os.stat(d / "a").st_nlink == 2


@behaviour(seeds=[File("a/f", b"data")])
def link_then_write_shows_in_both(d: Place) -> None:
    os.link(d / "a/f", d / "g")
    append(d / "g", b"+g")
    append(d / "a/f", b"+f")
    assert get(d / "a/f") == get(d / "g") == b"data+g+f"
    assert os.stat(d / "a/f").st_ino == os.stat(d / "g").st_ino


@behaviour(seeds=[File("a/f", b"data")])
def write_then_link_shows_in_both(d: Place) -> None:
    append(d / "a/f", b"+")
    os.link(d / "a/f", d / "g")
    append(d / "g", b"+")
    assert get(d / "a/f") == b"data++"
    assert os.stat(d / "g").st_nlink == 2


@behaviour(seeds=[File("a/f", b"data")])
def link_then_chmod_then_write(d: Place) -> None:
    os.link(d / "a/f", d / "g")
    os.chmod(d / "g", 0o600)
    assert mode_of(d / "a/f") == 0o600
    append(d / "a/f", b"+")
    assert get(d / "g") == b"data+"
    assert mode_of(d / "g") == 0o600


@behaviour(seeds=[File("a/f", b"data")])
def chmod_then_link_then_chmod(d: Place) -> None:
    os.chmod(d / "a/f", 0o600)
    os.link(d / "a/f", d / "g")
    assert mode_of(d / "g") == 0o600
    os.chmod(d / "a/f", 0o644)
    assert mode_of(d / "g") == 0o644
    assert os.stat(d / "g").st_nlink == 2


@behaviour(seeds=GROUP)
def group_shares_one_inode(d: Place) -> None:
    found = [os.stat(d / name) for name in NAMES]
    assert len({one.st_ino for one in found}) == 1
    assert [one.st_nlink for one in found] == [3, 3, 3]
    assert os.stat(d / "a/other").st_nlink == 1


@behaviour(seeds=GROUP)
def group_member_written_shows_in_all(d: Place) -> None:
    patch(d / "b/c/three", 0, b"SH")
    assert [get(d / name) for name in NAMES] == [b"SHared"] * 3
    assert len({os.stat(d / name).st_ino for name in NAMES}) == 1
    assert [os.stat(d / name).st_nlink for name in NAMES] == [3, 3, 3]
    assert get(d / "a/other") == b"alone"


@behaviour(seeds=GROUP)
def group_members_written_in_turn(d: Place) -> None:
    for number, name in enumerate(NAMES):
        append(d / name, b"%d" % number)
    assert [get(d / name) for name in NAMES] == [b"shared012"] * 3


@behaviour(seeds=GROUP)
def group_member_truncated_by_open(d: Place) -> None:
    put(d / "a/two", b"new")
    assert [get(d / name) for name in NAMES] == [b"new"] * 3
    assert os.stat(d / "a/one").st_nlink == 3


@behaviour(seeds=GROUP)
def group_member_chmod_shows_in_all(d: Place) -> None:
    os.chmod(d / "a/two", 0o604)
    os.chown(d / "b/c/three", 3, 4)
    for name in NAMES:
        found = os.stat(d / name)
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_nlink) == (0o604, 3, 4, 3), name


@behaviour(seeds=GROUP)
def group_member_chmod_then_other_written(d: Place) -> None:
    os.chmod(d / "a/two", 0o604)
    append(d / "b/c/three", b"+")
    assert [get(d / name) for name in NAMES] == [b"shared+"] * 3
    assert {mode_of(d / name) for name in NAMES} == {0o604}


@behaviour(seeds=GROUP)
def group_member_xattr_shows_in_all(d: Place) -> None:
    os.setxattr(d / "a/two", "user.k", b"new")
    os.setxattr(d / "a/two", "user.l", b"more")
    for name in NAMES:
        assert os.getxattr(d / name, "user.k") == b"new"
        assert os.getxattr(d / name, "user.l") == b"more"


@behaviour(seeds=GROUP)
def group_member_utime_shows_in_all(d: Place) -> None:
    os.utime(d / "a/one", ns=(5_000_000_001, 6_000_000_002))
    assert {os.stat(d / name).st_mtime_ns for name in NAMES} == {6_000_000_002}
    assert {os.stat(d / name).st_atime_ns for name in NAMES} == {5_000_000_001}


@behaviour(seeds=GROUP)
def group_shrinks_with_unlink(d: Place) -> None:
    os.unlink(d / "a/one")
    assert [os.stat(d / name).st_nlink for name in NAMES[1:]] == [2, 2]
    os.unlink(d / "a/two")
    assert os.stat(d / "b/c/three").st_nlink == 1
    assert get(d / "b/c/three") == b"shared"
    append(d / "b/c/three", b"+")
    assert get(d / "b/c/three") == b"shared+"


@behaviour(seeds=GROUP)
def group_unlink_then_write(d: Place) -> None:
    os.unlink(d / "a/one")
    append(d / "a/two", b"+")
    assert get(d / "b/c/three") == b"shared+"
    assert os.stat(d / "b/c/three").st_nlink == 2
    assert not os.path.lexists(d / "a/one")


@behaviour(seeds=GROUP)
def group_write_then_unlink(d: Place) -> None:
    append(d / "a/one", b"+")
    os.unlink(d / "a/one")
    assert get(d / "a/two") == b"shared+"
    assert os.stat(d / "a/two").st_nlink == 2
    os.unlink(d / "b/c/three")
    assert os.stat(d / "a/two").st_nlink == 1


@behaviour(seeds=GROUP)
def group_grows_with_link(d: Place) -> None:
    os.link(d / "a/two", d / "four")
    assert [os.stat(d / name).st_nlink for name in (*NAMES, "four")] == [4] * 4
    append(d / "four", b"+")
    assert [get(d / name) for name in (*NAMES, "four")] == [b"shared+"] * 4
    assert len({os.stat(d / name).st_ino for name in (*NAMES, "four")}) == 1


@behaviour(seeds=GROUP)
def group_member_renamed_stays_a_member(d: Place) -> None:
    os.rename(d / "a/one", d / "b/moved")
    assert os.stat(d / "b/moved").st_nlink == 3
    append(d / "b/moved", b"+")
    assert get(d / "a/two") == get(d / "b/c/three") == b"shared+"
    assert os.stat(d / "a/two").st_ino == os.stat(d / "b/moved").st_ino


@behaviour(seeds=GROUP)
def group_member_replaced_by_rename(d: Place) -> None:
    os.rename(d / "a/other", d / "a/one")
    assert get(d / "a/one") == b"alone"
    assert os.stat(d / "a/one").st_nlink == 1
    assert [os.stat(d / name).st_nlink for name in NAMES[1:]] == [2, 2]
    assert get(d / "a/two") == b"shared"


@behaviour(seeds=GROUP)
def group_member_replaced_by_new_file(d: Place) -> None:
    put(d / "a/new", b"fresh")  # what editors and package managers do
    os.rename(d / "a/new", d / "a/two")
    assert get(d / "a/two") == b"fresh"
    assert get(d / "a/one") == get(d / "b/c/three") == b"shared"
    assert os.stat(d / "a/one").st_nlink == 2


@behaviour(seeds=GROUP)
def group_fstat_follows_the_count(d: Place) -> None:
    with opened(d / "a/one") as fd:
        os.unlink(d / "a/two")
        assert os.fstat(fd).st_nlink == 2
        os.unlink(d / "a/one")
        assert os.fstat(fd).st_nlink == 1
        os.link(d / "b/c/three", d / "again")
        assert os.fstat(fd).st_nlink == 2


@behaviour(seeds=GROUP)
def group_all_unlinked_while_open(d: Place) -> None:
    with opened(d / "a/one", os.O_RDWR) as fd:
        for name in NAMES:
            os.unlink(d / name)
        assert os.fstat(fd).st_nlink == 0
        os.pwrite(fd, b"SH", 0)
        assert os.pread(fd, 10, 0) == b"SHared"


@behaviour(seeds=GROUP)
def group_directory_of_members_removed(d: Place) -> None:
    for name in ("one", "two", "other"):
        os.unlink(d / "a" / name)
    os.rmdir(d / "a")
    assert os.stat(d / "b/c/three").st_nlink == 1
    assert get(d / "b/c/three") == b"shared"


@behaviour(seeds=GROUP)
def group_directory_renamed(d: Place) -> None:
    os.rename(d / "b", d / "moved")
    append(d / "moved/c/three", b"+")
    assert get(d / "a/one") == b"shared+"
    assert os.stat(d / "moved/c/three").st_ino == os.stat(d / "a/one").st_ino
    assert os.stat(d / "a/one").st_nlink == 3


@behaviour(seeds=[File("a/f", b"x"), Dir("a/d"), Symlink("a/l", "f")])
def link_errors(d: Place) -> None:
    expect_errno(errno.ENOENT, os.link, d / "a/none", d / "g")
    expect_errno(errno.EEXIST, os.link, d / "a/f", d / "a/d")
    expect_errno(errno.EEXIST, os.link, d / "a/f", d / "a/f")
    expect_errno(errno.EEXIST, os.link, d / "a/f", d / "a/l")
    expect_errno(errno.EPERM, os.link, d / "a/d", d / "g")
    expect_errno(errno.ENOENT, os.link, d / "a/f", d / "none/g")
    expect_errno(errno.ENOTDIR, os.link, d / "a/f", d / "a/f/g")
    assert os.stat(d / "a/f").st_nlink == 1


@behaviour(seeds=[File("a/f", b"x")])
def link_to_other_file_system(d: Place) -> None:
    expect_errno(errno.EXDEV, os.link, "/proc/self/status", d / "g")
    expect_errno(errno.EXDEV, os.rename, d / "a/f", "/proc/g")


@behaviour(seeds=[File("a/f", b"x"), Symlink("a/l", "f")])
def link_of_symlink_links_the_symlink(d: Place) -> None:
    os.link(d / "a/l", d / "m", follow_symlinks=False)
    assert os.readlink(d / "m") == "f"
    assert os.lstat(d / "m").st_ino == os.lstat(d / "a/l").st_ino
    assert os.lstat(d / "m").st_nlink == 2
    assert os.stat(d / "a/f").st_nlink == 1
    os.unlink(d / "a/l")
    assert os.lstat(d / "m").st_nlink == 1


@behaviour(seeds=[Fifo("a/fifo"), CharDev("a/null", 1, 3)])
def link_of_special_files(d: Place) -> None:
    for name in ("fifo", "null"):
        os.link(d / "a" / name, d / name)
        assert os.lstat(d / name).st_ino == os.lstat(d / "a" / name).st_ino
        assert os.lstat(d / name).st_nlink == 2
        os.chmod(d / name, 0o600)
        assert mode_of(d / "a" / name) == 0o600


@behaviour(seeds=[Symlink("a/l", "text"), HardLink("b/m", "a/l"), Fifo("a/p"), HardLink("b/q", "a/p")])
def group_of_symlinks_and_fifos(d: Place) -> None:
    assert os.lstat(d / "a/l").st_ino == os.lstat(d / "b/m").st_ino
    assert os.lstat(d / "a/p").st_nlink == 2
    os.lchown(d / "b/m", 3, 4)
    assert os.lstat(d / "a/l").st_uid == 3
    os.unlink(d / "a/l")
    assert os.lstat(d / "b/m").st_nlink == 1
    assert os.readlink(d / "b/m") == "text"
    os.chmod(d / "a/p", 0o600)
    assert mode_of(d / "b/q") == 0o600


@behaviour(seeds=[File("a/f", b"x")])
def link_of_open_descriptor(d: Place) -> None:
    with opened(d / "a/f", os.O_RDWR) as fd:
        link_descriptor(fd, d / "g")
        assert os.fstat(fd).st_nlink == 2
        os.write(fd, b"y")
    assert get(d / "g") == get(d / "a/f") == b"y"


@behaviour(seeds=[File("a/f", b"x")])
def link_of_unlinked_file(d: Place) -> None:
    with opened(d / "a/f") as fd:
        os.unlink(d / "a/f")
        expect_errno(errno.ENOENT, link_descriptor, fd, d / "g")
    assert names(d.path) == ["a"]


@behaviour(seeds=[File("a/f", b"x")])
def many_links_to_one_file(d: Place) -> None:
    for number in range(500):
        os.link(d / "a/f", d / f"l{number}")
    assert os.stat(d / "l499").st_nlink == 501
    append(d / "l250", b"y")
    assert get(d / "a/f") == get(d / "l0") == b"xy"
    for number in range(500):
        os.unlink(d / f"l{number}")
    assert os.stat(d / "a/f").st_nlink == 1


@behaviour(seeds=GROUP)
def link_changes_ctime_only(d: Place) -> None:
    before = os.stat(d / "a/one")
    tick()
    os.link(d / "a/one", d / "four")
    linked = os.stat(d / "b/c/three")
    assert linked.st_ctime_ns > before.st_ctime_ns
    assert linked.st_mtime_ns == before.st_mtime_ns
    tick()
    os.unlink(d / "four")
    assert os.stat(d / "b/c/three").st_ctime_ns > linked.st_ctime_ns


@behaviour(seeds=[File(f"m/f{n:02}", b"%02d" % n) for n in range(40)])
def each_of_many_files_changed_alone(d: Place) -> None:
    for number in range(0, 40, 2):
        append(d / f"m/f{number:02}", b"+")
    for number in range(40):
        expected = b"%02d" % number + (b"" if number % 2 else b"+")
        assert get(d / f"m/f{number:02}") == expected
    assert len({os.stat(d / f"m/f{number:02}").st_ino for number in range(40)}) == 40
