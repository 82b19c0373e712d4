"""rename and renameat2, errno by errno; RENAME_WHITEOUT is not asked for."""

from __future__ import annotations

import errno
import os
import stat

from .base import behaviour
from .libc import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from .place import Place, append, expect_errno, get, mode_of, names, opened, put
from .seeds import SEED_TIME, CharDev, Dir, Fifo, File, HardLink, Symlink

TREE = (
    File("tree/top", b"top"),
    File("tree/x/y/z/deep", b"deep", mode=0o600, uid=3, gid=4),
    File("tree/x/y/mid", b"mid"),
    Symlink("tree/x/link", "y/mid"),
    HardLink("tree/x/hard", "tree/top"),
    Dir("elsewhere"),
)


@behaviour(seeds=[File("a/f", b"data", mode=0o640, uid=3, gid=4), Dir("b")])
def rename_moves_a_file(d: Place) -> None:
    os.rename(d / "a/f", d / "b/g")
    found = os.stat(d / "b/g")
    assert get(d / "b/g") == b"data"
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (3, 4, 0o640)
    assert (found.st_mtime_ns, found.st_nlink) == (SEED_TIME, 1)
    assert names(d / "a") == []
    assert names(d / "b") == ["g"]
    expect_errno(errno.ENOENT, os.stat, d / "a/f")


@behaviour(seeds=[File("a/f", b"data")])
def rename_within_one_directory(d: Place) -> None:
    os.rename(d / "a/f", d / "a/g")
    assert names(d / "a") == ["g"]
    assert get(d / "a/g") == b"data"


@behaviour(seeds=[File("a/f", b"new"), File("b/g", b"old")])
def rename_replaces_a_file(d: Place) -> None:
    ino = os.stat(d / "a/f").st_ino
    os.rename(d / "a/f", d / "b/g")
    assert get(d / "b/g") == b"new"
    assert os.stat(d / "b/g").st_ino == ino
    assert names(d / "a") == []


@behaviour(seeds=[File("a/f", b"new"), File("b/g", b"old")])
def rename_replaces_and_open_files_survive(d: Place) -> None:
    with opened(d / "a/f") as new, opened(d / "b/g", os.O_RDWR) as old:
        os.rename(d / "a/f", d / "b/g")
        assert os.pread(new, 10, 0) == b"new"
        assert os.pread(old, 10, 0) == b"old"
        assert os.fstat(old).st_nlink == 0
        os.pwrite(old, b"OLD!", 0)
        assert os.pread(old, 10, 0) == b"OLD!"
        append(d / "b/g", b"+")
    assert get(d / "b/g") == b"new+"


@behaviour(seeds=[File("a/f", b"x")])
def rename_onto_itself(d: Place) -> None:
    os.rename(d / "a/f", d / "a/f")
    os.rename(d / "a", d / "a")
    assert get(d / "a/f") == b"x"


@behaviour(seeds=[File("a/f", b"x"), HardLink("b/g", "a/f")])
def rename_between_links_of_one_inode_keeps_both(d: Place) -> None:
    os.rename(d / "a/f", d / "b/g")
    assert get(d / "a/f") == get(d / "b/g") == b"x"
    assert os.stat(d / "a/f").st_nlink == 2


@behaviour(seeds=[File("a/f", b"x")])
def rename_between_new_links_keeps_both(d: Place) -> None:
    os.link(d / "a/f", d / "g")
    append(d / "g", b"y")
    os.rename(d / "g", d / "a/f")
    assert names(d.path) == ["a", "g"]
    assert os.stat(d / "a/f").st_nlink == 2


@behaviour(seeds=TREE)
def rename_into_own_subtree(d: Place) -> None:
    expect_errno(errno.EINVAL, os.rename, d / "tree", d / "tree/sub")
    expect_errno(errno.EINVAL, os.rename, d / "tree", d / "tree/x/y/z/sub")
    expect_errno(errno.EINVAL, os.rename, d / "tree/x", d / "tree/x/y/x")
    assert get(d / "tree/x/y/z/deep") == b"deep"


@behaviour(seeds=TREE)
def rename_onto_an_ancestor(d: Place) -> None:
    expect_errno(errno.ENOTEMPTY, os.rename, d / "tree/x/y", d / "tree")
    expect_errno(errno.ENOTEMPTY, os.rename, d / "tree/x/y/mid", d / "tree/x")
    assert get(d / "tree/x/y/mid") == b"mid"


@behaviour(seeds=[File("a/f", b"x"), Dir("b/d")])
def rename_file_over_directory(d: Place) -> None:
    expect_errno(errno.EISDIR, os.rename, d / "a/f", d / "b/d")
    assert get(d / "a/f") == b"x"
    assert stat.S_ISDIR(os.stat(d / "b/d").st_mode)


@behaviour(seeds=[File("a/f", b"x"), Dir("b/d"), Symlink("b/l", "d")])
def rename_directory_over_file(d: Place) -> None:
    expect_errno(errno.ENOTDIR, os.rename, d / "b/d", d / "a/f")
    expect_errno(errno.ENOTDIR, os.rename, d / "b/d", d / "b/l")
    assert get(d / "a/f") == b"x"


@behaviour(seeds=[Dir("a"), File("b/f", b"x")])
def rename_directory_over_non_empty_directory(d: Place) -> None:
    expect_errno(errno.ENOTEMPTY, os.rename, d / "a", d / "b")
    assert names(d.path) == ["a", "b"]


@behaviour(seeds=[File("a/f", b"x"), Dir("b", mode=0o700)])
def rename_directory_over_empty_directory(d: Place) -> None:
    ino = os.stat(d / "a").st_ino
    os.rename(d / "a", d / "b")
    assert names(d.path) == ["b"]
    assert get(d / "b/f") == b"x"
    assert (os.stat(d / "b").st_ino, mode_of(d / "b")) == (ino, 0o755)


@behaviour(seeds=[File("a/f", b"x"), File("b/gone", b"y")])
def rename_directory_over_emptied_directory(d: Place) -> None:
    os.unlink(d / "b/gone")
    os.rename(d / "a", d / "b")
    assert names(d / "b") == ["f"]
    expect_errno(errno.ENOENT, os.stat, d / "b/gone")


@behaviour(seeds=[File("a/f", b"x")])
def rename_of_missing_names(d: Place) -> None:
    expect_errno(errno.ENOENT, os.rename, d / "none", d / "g")
    expect_errno(errno.ENOENT, os.rename, d / "a/f", d / "none/g")
    expect_errno(errno.ENOTDIR, os.rename, d / "a/f", d / "a/f/g")
    expect_errno(errno.ENOTDIR, os.rename, d / "a/f/g", d / "h")
    assert get(d / "a/f") == b"x"


@behaviour(seeds=[Dir("a/d"), File("a/f", b"x")])
def rename_of_dot_and_trailing_slash(d: Place) -> None:
    expect_errno(errno.EBUSY, os.rename, f"{d.path}/a/d/.", d / "e")
    expect_errno(errno.EBUSY, os.rename, f"{d.path}/a/d/..", d / "e")
    expect_errno(errno.ENOTDIR, os.rename, f"{d.path}/a/f/", d / "g")
    expect_errno(errno.ENOTDIR, os.rename, d / "a/f", f"{d.path}/g/")
    os.rename(f"{d.path}/a/d/", f"{d.path}/e/")
    assert names(d.path) == ["a", "e"]


@behaviour(seeds=[File("a/f", b"x")])
def rename_to_too_long_name(d: Place) -> None:
    expect_errno(errno.ENAMETOOLONG, os.rename, d / "a/f", d / ("n" * 256))
    os.rename(d / "a/f", d / ("n" * 255))
    assert get(d / ("n" * 255)) == b"x"


@behaviour(seeds=TREE)
def rename_of_deep_tree(d: Place) -> None:
    inos = [os.lstat(d / "tree" / name).st_ino for name in ("", "top", "x/y/z/deep", "x/link")]
    os.rename(d / "tree", d / "elsewhere/moved")
    moved = d / "elsewhere/moved"
    assert [os.lstat(moved / name).st_ino for name in ("", "top", "x/y/z/deep", "x/link")] == inos
    assert get(moved / "x/y/z/deep") == b"deep"
    assert get(moved / "x/link") == b"mid"
    assert os.stat(moved / "x/hard").st_ino == os.stat(moved / "top").st_ino
    assert names(moved / "x") == ["hard", "link", "y"]
    expect_errno(errno.ENOENT, os.stat, d / "tree")
    expect_errno(errno.ENOENT, os.stat, d / "tree/x/y/mid")


@behaviour(seeds=TREE)
def rename_tree_then_write_inside(d: Place) -> None:
    os.rename(d / "tree", d / "elsewhere/moved")
    append(d / "elsewhere/moved/x/y/z/deep", b"+")
    put(d / "elsewhere/moved/x/y/new", b"new")
    os.unlink(d / "elsewhere/moved/x/y/mid")
    os.chmod(d / "elsewhere/moved/top", 0o600)
    assert names(d / "elsewhere/moved/x/y") == ["new", "z"]
    assert get(d / "elsewhere/moved/x/y/z/deep") == b"deep+"
    assert mode_of(d / "elsewhere/moved/x/hard") == 0o600


@behaviour(seeds=TREE)
def rename_subtree_out_of_tree(d: Place) -> None:
    os.rename(d / "tree/x/y", d / "elsewhere/y")
    assert names(d / "tree/x") == ["hard", "link"]
    assert get(d / "elsewhere/y/z/deep") == b"deep"
    expect_errno(errno.ENOENT, os.stat, d / "tree/x/link")
    found = os.stat(d / "elsewhere/y/z/deep")
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (3, 4, 0o600)


@behaviour(seeds=TREE)
def rename_tree_twice_and_back(d: Place) -> None:
    os.rename(d / "tree", d / "t2")
    append(d / "t2/x/y/mid", b"+")
    os.rename(d / "t2/x", d / "elsewhere/x")
    os.rename(d / "t2", d / "tree")
    os.rename(d / "elsewhere/x", d / "tree/x")
    assert get(d / "tree/x/link") == b"mid+"
    assert get(d / "tree/x/y/z/deep") == b"deep"
    assert names(d.path) == ["elsewhere", "tree"]


@behaviour(seeds=TREE)
def rename_after_change_inside(d: Place) -> None:
    append(d / "tree/x/y/z/deep", b"+")
    os.unlink(d / "tree/x/link")
    os.rename(d / "tree/x", d / "elsewhere/x")
    assert get(d / "elsewhere/x/y/z/deep") == b"deep+"
    assert names(d / "elsewhere/x") == ["hard", "y"]
    assert get(d / "elsewhere/x/y/mid") == b"mid"


@behaviour(seeds=TREE)
def rename_tree_with_open_files_and_cwd(d: Place) -> None:
    def work() -> None:
        os.chdir("tree/x/y")
        with opened("z/deep", os.O_RDWR) as fd, opened(".", os.O_DIRECTORY) as folder:
            os.rename("../../../tree", "../../../renamed")
            os.pwrite(fd, b"DEEP", 0)
            assert get("z/deep") == b"DEEP"
            assert os.fstat(fd).st_nlink == 1
            put("new", b"n")
            assert os.fstat(folder).st_ino == os.stat("../y").st_ino
            assert sorted(os.listdir(".")) == ["mid", "new", "z"]
            assert sorted(os.listdir("..")) == ["hard", "link", "y"]

    d.in_child(work)
    assert get(d / "renamed/x/y/z/deep") == b"DEEP"
    assert get(d / "renamed/x/y/new") == b"n"


@behaviour(seeds=[Dir("a/d"), Dir("b")])
def rename_directory_changes_dotdot_and_nlinks(d: Place) -> None:
    assert (os.stat(d / "a").st_nlink, os.stat(d / "b").st_nlink) == (3, 2)
    os.rename(d / "a/d", d / "b/d")
    assert (os.stat(d / "a").st_nlink, os.stat(d / "b").st_nlink) == (2, 3)
    assert os.stat(f"{d.path}/b/d/..").st_ino == os.stat(d / "b").st_ino


@behaviour(seeds=[Dir("a/d"), Dir("a/e")])
def rename_directory_over_directory_shrinks_nlink(d: Place) -> None:
    assert os.stat(d / "a").st_nlink == 4
    os.rename(d / "a/d", d / "a/e")
    assert os.stat(d / "a").st_nlink == 3


@behaviour(seeds=[File("a/f", b"f"), File("a/g", b"g"), Dir("a/d"), Symlink("a/l", "none")])
def noreplace_refuses_what_exists(d: Place) -> None:
    for name in ("g", "d", "l", "f"):
        expect_errno(errno.EEXIST, renameat2, d / "a/f", d / "a" / name, RENAME_NOREPLACE)
    assert get(d / "a/f") == b"f"
    assert get(d / "a/g") == b"g"
    renameat2(d / "a/f", d / "a/new", RENAME_NOREPLACE)
    assert get(d / "a/new") == b"f"
    expect_errno(errno.ENOENT, renameat2, d / "a/f", d / "a/again", RENAME_NOREPLACE)


@behaviour(seeds=TREE)
def noreplace_moves_a_tree(d: Place) -> None:
    renameat2(d / "tree", d / "elsewhere/t", RENAME_NOREPLACE)
    assert get(d / "elsewhere/t/x/y/mid") == b"mid"
    expect_errno(errno.EEXIST, renameat2, d / "elsewhere/t/top", d / "elsewhere/t/x", RENAME_NOREPLACE)


@behaviour(seeds=[File("a/f", b"f"), File("b/g", b"g", mode=0o600)])
def exchange_files(d: Place) -> None:
    inos = os.stat(d / "a/f").st_ino, os.stat(d / "b/g").st_ino
    renameat2(d / "a/f", d / "b/g", RENAME_EXCHANGE)
    assert (get(d / "a/f"), get(d / "b/g")) == (b"g", b"f")
    assert (os.stat(d / "b/g").st_ino, os.stat(d / "a/f").st_ino) == inos
    assert (mode_of(d / "a/f"), mode_of(d / "b/g")) == (0o600, 0o644)
    append(d / "a/f", b"+")
    assert (get(d / "a/f"), get(d / "b/g")) == (b"g+", b"f")


@behaviour(seeds=TREE)
def exchange_directory_and_file(d: Place) -> None:
    renameat2(d / "tree/x", d / "tree/top", RENAME_EXCHANGE)
    assert get(d / "tree/x") == b"top"
    assert get(d / "tree/top/y/z/deep") == b"deep"
    append(d / "tree/top/y/mid", b"+")
    assert get(d / "tree/top/link") == b"mid+"


@behaviour(seeds=[Dir("a/d"), Dir("b"), File("b/f", b"x"), Symlink("l", "a")])
def exchange_directory_and_file_moves_nlink(d: Place) -> None:
    renameat2(d / "a/d", d / "b/f", RENAME_EXCHANGE)
    assert (os.stat(d / "a").st_nlink, os.stat(d / "b").st_nlink) == (2, 3)
    assert stat.S_ISDIR(os.stat(d / "b/f").st_mode)
    renameat2(d / "l", d / "a/d", RENAME_EXCHANGE)
    assert get(d / "l") == b"x"
    assert os.readlink(d / "a/d") == "a"


@behaviour(seeds=TREE)
def exchange_errors(d: Place) -> None:
    expect_errno(errno.ENOENT, renameat2, d / "tree/top", d / "none", RENAME_EXCHANGE)
    expect_errno(errno.ENOENT, renameat2, d / "none", d / "tree/top", RENAME_EXCHANGE)
    expect_errno(errno.EINVAL, renameat2, d / "tree", d / "tree/x/y", RENAME_EXCHANGE)
    expect_errno(errno.EINVAL, renameat2, d / "tree/x/y", d / "tree", RENAME_EXCHANGE)
    expect_errno(errno.EINVAL, renameat2, d / "tree/top", d / "tree/x", RENAME_EXCHANGE | RENAME_NOREPLACE)
    expect_errno(errno.EINVAL, renameat2, d / "tree/top", d / "tree/x", 0x80)
    assert get(d / "tree/x/y/z/deep") == b"deep"


@behaviour(seeds=[File("a/f", b"x"), HardLink("a/g", "a/f")])
def exchange_with_itself_and_its_link(d: Place) -> None:
    renameat2(d / "a/f", d / "a/f", RENAME_EXCHANGE)
    renameat2(d / "a/f", d / "a/g", RENAME_EXCHANGE)
    assert names(d / "a") == ["f", "g"]
    assert os.stat(d / "a/f").st_nlink == 2


@behaviour(seeds=[Fifo("a/p"), CharDev("a/null", 1, 3), Symlink("a/l", "t"), File("b/f", b"x")])
def rename_of_other_types(d: Place) -> None:
    os.rename(d / "a/p", d / "b/p")
    os.rename(d / "a/null", d / "b/null")
    os.rename(d / "a/l", d / "b/f")
    assert stat.S_ISFIFO(os.lstat(d / "b/p").st_mode)
    assert os.lstat(d / "b/null").st_rdev == os.makedev(1, 3)
    assert os.readlink(d / "b/f") == "t"
    assert names(d / "a") == []


@behaviour(seeds=[File("a/f", b"seed")])
def rename_replacement_is_atomic_for_readers(d: Place) -> None:
    def work() -> None:
        for number in range(200):
            put("a/new", b"%03d" % number)
            os.rename("a/new", "a/f")

    child = d.start(work)
    seen = {get(d / "a/f") for _ in range(400)}
    child.result()
    assert seen <= {b"seed", *(b"%03d" % number for number in range(200))}
    assert get(d / "a/f") == b"199"


@behaviour(seeds=[File("a/f", b"one"), File("a/g", b"two")])
def rename_over_then_recreate_source(d: Place) -> None:
    os.rename(d / "a/f", d / "a/g")
    put(d / "a/f", b"three")
    assert (get(d / "a/f"), get(d / "a/g")) == (b"three", b"one")
    os.rename(d / "a/g", d / "a/f")
    assert (names(d / "a"), get(d / "a/f")) == (["f"], b"one")


@behaviour(seeds=[File("a/f", b"data", xattrs={"user.k": b"v"}), Dir("b")])
def rename_chmod_write_chain(d: Place) -> None:
    os.chmod(d / "a/f", 0o600)
    os.rename(d / "a/f", d / "b/f")
    append(d / "b/f", b"+")
    os.rename(d / "b", d / "a/b")
    assert get(d / "a/b/f") == b"data+"
    assert mode_of(d / "a/b/f") == 0o600
    assert os.getxattr(d / "a/b/f", "user.k") == b"v"


@behaviour(seeds=TREE)
def renamed_directories_swap_places(d: Place) -> None:
    os.rename(d / "tree/x/y", d / "elsewhere/y")
    os.rename(d / "tree/x", d / "elsewhere/y/x")
    os.rename(d / "elsewhere/y/z", d / "tree/z")
    assert get(d / "tree/z/deep") == b"deep"
    assert os.readlink(d / "elsewhere/y/x/link") == "y/mid"
    assert names(d / "tree") == ["top", "z"]
    expect_errno(errno.EINVAL, os.rename, d / "elsewhere/y", d / "elsewhere/y/x/y")
