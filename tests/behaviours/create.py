"""Making files: open with its flags, modes and umask, mkdir, who owns what is made."""

from __future__ import annotations

import errno
import os
import stat

from .base import behaviour
from .libc import link_descriptor
from .place import Place, expect_errno, get, mode_of, names, open_close, opened, put
from .seeds import Dir, File, Symlink

NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY


@behaviour(seeds=[Dir("a/b")])
def create_makes_an_empty_file(d: Place) -> None:
    open_close(d / "a/b/f", NEW, 0o640)
    found = os.stat(d / "a/b/f")
    assert stat.S_ISREG(found.st_mode)
    assert (found.st_size, found.st_nlink, found.st_blocks) == (0, 1, 0)
    assert names(d / "a/b") == ["f"]


@behaviour()
def create_obeys_umask(d: Place) -> None:
    old = os.umask(0o027)
    try:
        open_close(d / "f", NEW, 0o666)
        os.mkdir(d / "d", 0o777)
        os.mknod(d / "p", stat.S_IFIFO | 0o666)
    finally:
        os.umask(old)
    assert (mode_of(d / "f"), mode_of(d / "d"), mode_of(d / "p")) == (0o640, 0o750, 0o640)


@behaviour()
def create_keeps_special_bits(d: Place) -> None:
    open_close(d / "f", NEW, 0o7755)
    assert mode_of(d / "f") == 0o7755


@behaviour()
def mkdir_keeps_sticky_and_drops_set_id(d: Place) -> None:
    os.mkdir(d / "d", 0o7755)
    assert mode_of(d / "d") == 0o1755  # man 2 mkdir: (mode & ~umask & 01777)


@behaviour()
def create_with_mode_zero_stays_usable(d: Place) -> None:
    with opened(d / "f", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0) as fd:
        os.write(fd, b"x")
        assert os.pread(fd, 1, 0) == b"x"
    assert mode_of(d / "f") == 0


@behaviour()
def create_read_only_mode_allows_its_writer(d: Place) -> None:
    os.chmod(d.path, 0o777)

    def work() -> bytes:
        with opened("f", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o444) as fd:
            os.write(fd, b"mine")
        expect_errno(errno.EACCES, open_close, "f", os.O_WRONLY)
        return get("f")

    assert d.alice(work) == b"mine"


@behaviour(seeds=[File("a/f", b"old"), Dir("a/d"), Symlink("a/dangling", "nowhere")])
def create_exclusive_refuses_what_exists(d: Place) -> None:
    for name in ("f", "d", "dangling"):
        expect_errno(errno.EEXIST, open_close, d / "a" / name, NEW)
    assert get(d / "a/f") == b"old"
    assert names(d / "a") == ["d", "dangling", "f"]


@behaviour(seeds=[File("a/f", b"old", mode=0o600)])
def create_without_exclusive_opens_what_exists(d: Place) -> None:
    with opened(d / "a/f", os.O_CREAT | os.O_RDWR, 0o777) as fd:
        assert os.read(fd, 10) == b"old"
    assert mode_of(d / "a/f") == 0o600


@behaviour(seeds=[Symlink("a/l", "target")])
def create_through_dangling_symlink(d: Place) -> None:
    put(d / "a/l", b"made")
    assert get(d / "a/target") == b"made"
    assert stat.S_ISLNK(os.lstat(d / "a/l").st_mode)


@behaviour(seeds=[File("a/f", b"x")])
def create_in_missing_or_wrong_parent(d: Place) -> None:
    expect_errno(errno.ENOENT, open_close, d / "none/f", NEW)
    expect_errno(errno.ENOTDIR, open_close, d / "a/f/g", NEW)
    expect_errno(errno.ENOTDIR, os.mkdir, d / "a/f/g")
    expect_errno(errno.ENOENT, os.mkdir, d / "none/g")


@behaviour(seeds=[Dir("a/d")])
def open_of_directory(d: Place) -> None:
    expect_errno(errno.EISDIR, open_close, d / "a/d", os.O_WRONLY)
    expect_errno(errno.EISDIR, open_close, d / "a/d", os.O_RDWR)
    expect_errno(errno.EISDIR, open_close, d / "a/d", os.O_CREAT | os.O_RDONLY)
    expect_errno(errno.EISDIR, open_close, d / "a/d", os.O_RDONLY | os.O_TRUNC)
    with opened(d / "a/d") as fd:
        expect_errno(errno.EISDIR, os.read, fd, 1)


@behaviour(seeds=[File("a/f")])
def open_of_file_as_directory(d: Place) -> None:
    expect_errno(errno.ENOTDIR, open_close, d / "a/f", os.O_DIRECTORY)


@behaviour(seeds=[File("a/f"), Symlink("a/l", "f")])
def open_nofollow_refuses_symlink(d: Place) -> None:
    expect_errno(errno.ELOOP, open_close, d / "a/l", os.O_NOFOLLOW)
    with opened(d / "a/l", os.O_NOFOLLOW | os.O_PATH) as fd:
        assert stat.S_ISLNK(os.fstat(fd).st_mode)


@behaviour(seeds=[File("a/f", b"old content", mode=0o640, uid=5, gid=6)])
def open_truncate_empties_and_keeps_attributes(d: Place) -> None:
    open_close(d / "a/f", os.O_WRONLY | os.O_TRUNC)
    found = os.stat(d / "a/f")
    assert (found.st_size, stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0, 0o640, 5, 6)
    assert get(d / "a/f") == b""


@behaviour(seeds=[File("a/f", b"old content")])
def open_truncate_read_only_empties_on_linux(d: Place) -> None:
    open_close(d / "a/f", os.O_RDONLY | os.O_TRUNC)
    assert get(d / "a/f") == b""


@behaviour(seeds=[File("a/f", b"old")])
def open_for_writing_changes_nothing_yet(d: Place) -> None:
    before = os.stat(d / "a/f")
    open_close(d / "a/f", os.O_RDWR)
    after = os.stat(d / "a/f")
    assert get(d / "a/f") == b"old"
    assert (after.st_ino, after.st_size, after.st_mtime_ns, after.st_mode, after.st_nlink) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
        before.st_mode,
        before.st_nlink,
    )


@behaviour()
def mkdir_makes_an_empty_directory(d: Place) -> None:
    os.mkdir(d / "d", 0o750)
    assert stat.S_ISDIR(os.stat(d / "d").st_mode)
    assert names(d / "d") == []
    assert mode_of(d / "d") == 0o750


@behaviour(seeds=[File("a/f"), Dir("a/d"), Symlink("a/dangling", "nowhere")])
def mkdir_refuses_what_exists(d: Place) -> None:
    for name in ("f", "d", "dangling", "."):
        expect_errno(errno.EEXIST, os.mkdir, f"{d.path}/a/{name}")


@behaviour()
def created_files_belong_to_their_maker(d: Place) -> None:
    os.chmod(d.path, 0o777)

    def work() -> None:
        put("f", b"")
        os.mkdir("d")
        os.symlink("x", "l")
        os.mkfifo("p")

    d.as_user(20_007, 20_008, [20_009], work)
    for name in ("f", "d", "l", "p"):
        found = os.lstat(d / name)
        assert (found.st_uid, found.st_gid) == (20_007, 20_008), name


@behaviour(seeds=[File("a/f", b"1"), Dir("a/d")])
def recreate_after_unlink_is_a_new_file(d: Place) -> None:
    os.unlink(d / "a/f")
    expect_errno(errno.ENOENT, get, d / "a/f")
    open_close(d / "a/f", NEW)
    assert get(d / "a/f") == b""
    os.rmdir(d / "a/d")
    put(d / "a/d", b"a file now")
    assert get(d / "a/d") == b"a file now"


@behaviour(seeds=[File("a/d/deep/f", b"1")])
def recreate_removed_directory_is_empty(d: Place) -> None:
    os.unlink(d / "a/d/deep/f")
    os.rmdir(d / "a/d/deep")
    os.mkdir(d / "a/d/deep")
    assert names(d / "a/d/deep") == []
    expect_errno(errno.ENOENT, os.stat, d / "a/d/deep/f")


@behaviour(seeds=[Dir("a")])
def create_relative_to_directory_descriptor(d: Place) -> None:
    with opened(d / "a", os.O_DIRECTORY) as fd:
        os.mkdir("sub", dir_fd=fd)
        with opened("sub/f", NEW, dir_fd=fd) as file:
            os.write(file, b"x")
        os.rename("sub", "moved", src_dir_fd=fd, dst_dir_fd=fd)
    assert get(d / "a/moved/f") == b"x"


@behaviour(needs={"tmpfile"}, seeds=[Dir("a")])
def tmpfile_has_no_name_until_linked(d: Place) -> None:
    if not d.has("tmpfile"):
        expect_errno(errno.EOPNOTSUPP, open_close, d / "a", os.O_TMPFILE | os.O_RDWR)
        assert names(d / "a") == []
        return
    with opened(d / "a", os.O_TMPFILE | os.O_RDWR, 0o640) as fd:
        os.write(fd, b"hidden")
        assert os.fstat(fd).st_nlink == 0
        assert names(d / "a") == []
        link_descriptor(fd, d / "a/shown")
        assert os.fstat(fd).st_nlink == 1
    assert get(d / "a/shown") == b"hidden"
    assert mode_of(d / "a/shown") == 0o640


@behaviour(needs={"tmpfile"}, seeds=[Dir("a")])
def tmpfile_exclusive_is_never_linked(d: Place) -> None:
    flags = os.O_TMPFILE | os.O_RDWR | os.O_EXCL
    if not d.has("tmpfile"):
        expect_errno(errno.EOPNOTSUPP, open_close, d / "a", flags)
        return
    with opened(d / "a", flags) as fd:
        expect_errno(errno.ENOENT, link_descriptor, fd, d / "a/shown")
    assert names(d / "a") == []


@behaviour()
def create_race_has_one_winner(d: Place) -> None:
    def work() -> bool:
        try:
            open_close("f", NEW)
        except FileExistsError:
            return False
        return True

    children = [d.start(work) for _ in range(6)]
    assert sorted(child.result() for child in children) == [False] * 5 + [True]
