"""Files and directories that are open, but have no name any more."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat

from .base import behaviour
from .place import ALICE, Place, expect_errno, get, names, opened, patch, put
from .seeds import Dir, File

SEED = File("a/b/f", b"content", mode=0o640, xattrs={"user.k": b"v"})


@behaviour(seeds=[SEED])
def unlinked_file_stays_readable(d: Place) -> None:
    with opened(d / "a/b/f") as fd:
        os.unlink(d / "a/b/f")
        assert os.pread(fd, 100, 0) == b"content"
        expect_errno(errno.ENOENT, os.stat, d / "a/b/f")
        assert names(d / "a/b") == []


@behaviour(seeds=[SEED])
def unlinked_file_has_nlink_zero(d: Place) -> None:
    with opened(d / "a/b/f") as fd:
        before = os.fstat(fd)
        os.unlink(d / "a/b/f")
        after = os.fstat(fd)
    assert after.st_nlink == 0
    assert (after.st_ino, after.st_size, after.st_mode) == (before.st_ino, before.st_size, before.st_mode)


@behaviour(seeds=[SEED])
def unlinked_file_stays_writable(d: Place) -> None:
    with opened(d / "a/b/f", os.O_RDWR) as fd:
        os.unlink(d / "a/b/f")
        os.pwrite(fd, b"CON", 0)
        os.pwrite(fd, b"!", 20_000)
        assert os.pread(fd, 10, 0) == b"CONtent\0\0\0"
        assert os.fstat(fd).st_size == 20_001
        os.ftruncate(fd, 3)
        assert os.pread(fd, 10, 0) == b"CON"
        os.fsync(fd)


@behaviour(seeds=[SEED])
def unlinked_after_write_stays_usable(d: Place) -> None:
    with opened(d / "a/b/f", os.O_RDWR) as fd:
        os.pwrite(fd, b"CON", 0)
        os.unlink(d / "a/b/f")
        assert os.pread(fd, 100, 0) == b"CONtent"
        os.pwrite(fd, b"X", 3)
        assert os.pread(fd, 100, 0) == b"CONXent"


@behaviour(seeds=[Dir("a")])
def unlinked_new_file_stays_usable(d: Place) -> None:
    with opened(d / "a/t", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600) as fd:
        os.unlink(d / "a/t")
        os.write(fd, b"temporary")
        assert os.pread(fd, 100, 0) == b"temporary"
        assert os.fstat(fd).st_nlink == 0
    assert names(d / "a") == []


@behaviour(seeds=[SEED])
def unlinked_file_takes_attributes(d: Place) -> None:
    with opened(d / "a/b/f", os.O_RDWR) as fd:
        os.unlink(d / "a/b/f")
        os.fchmod(fd, 0o604)
        os.fchown(fd, ALICE, 7)
        os.utime(fd, ns=(1_000_000_001, 2_000_000_002))
        found = os.fstat(fd)
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o604, ALICE, 7)
        assert found.st_mtime_ns == 2_000_000_002
        assert os.pread(fd, 100, 0) == b"content"


@behaviour(seeds=[SEED])
def unlinked_file_keeps_and_takes_xattrs(d: Place) -> None:
    with opened(d / "a/b/f", os.O_RDWR) as fd:
        os.unlink(d / "a/b/f")
        assert os.getxattr(fd, "user.k") == b"v"
        os.setxattr(fd, "user.new", b"n")
        assert sorted(os.listxattr(fd)) == ["user.k", "user.new"]
        os.removexattr(fd, "user.k")
        expect_errno(errno.ENODATA, os.getxattr, fd, "user.k")


@behaviour(seeds=[SEED])
def unlinked_file_and_new_file_of_same_name(d: Place) -> None:
    with opened(d / "a/b/f", os.O_RDWR) as old:
        os.unlink(d / "a/b/f")
        put(d / "a/b/f", b"successor")
        os.pwrite(old, b"CON", 0)
        assert os.pread(old, 100, 0) == b"CONtent"
        assert get(d / "a/b/f") == b"successor"
        assert os.fstat(old).st_ino != os.stat(d / "a/b/f").st_ino
    assert get(d / "a/b/f") == b"successor"


@behaviour(needs={"coherent-readers"}, seeds=[SEED])
def unlinked_file_open_twice(d: Place) -> None:
    with opened(d / "a/b/f") as reader:
        with opened(d / "a/b/f", os.O_RDWR) as writer:
            os.unlink(d / "a/b/f")
            os.pwrite(writer, b"X", 0)
            assert os.pread(writer, 2, 0) == b"Xo"
        assert os.fstat(reader).st_nlink == (0 if d.has("coherent-readers") else 1)
        assert os.pread(reader, 100, 1) == b"ontent"


@behaviour(needs={"coherent-readers"}, seeds=[SEED])
def unlinked_file_reopened_through_proc(d: Place) -> None:
    with opened(d / "a/b/f") as fd:
        os.unlink(d / "a/b/f")
        if not d.has("coherent-readers"):
            expect_errno(errno.ETXTBSY, os.open, f"/proc/self/fd/{fd}", os.O_WRONLY)
            assert get(f"/proc/self/fd/{fd}") == b"content"
            return
        patch(f"/proc/self/fd/{fd}", 0, b"PROC")
        assert get(f"/proc/self/fd/{fd}") == b"PROCent"


@behaviour(seeds=[SEED])
def unlinked_file_is_mapped(d: Place) -> None:
    with opened(d / "a/b/f", os.O_RDWR) as fd, mmap.mmap(fd, 0) as view:
        os.unlink(d / "a/b/f")
        view[0:3] = b"MAP"
        assert os.pread(fd, 100, 0) == b"MAPtent"


@behaviour(seeds=[SEED])
def unlinked_file_mapped_after_close(d: Place) -> None:
    fd = os.open(d / "a/b/f", os.O_RDONLY)
    view = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
    os.close(fd)
    os.unlink(d / "a/b/f")
    assert view[:] == b"content"
    view.close()


@behaviour(seeds=[SEED])
def unlinked_file_takes_locks(d: Place) -> None:
    with opened(d / "a/b/f", os.O_RDWR) as fd:
        os.unlink(d / "a/b/f")
        fcntl.flock(fd, fcntl.LOCK_EX)
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


@behaviour(seeds=[File("a/f", b"new"), File("b/g", b"old")])
def replaced_file_stays_usable(d: Place) -> None:
    with opened(d / "b/g", os.O_RDWR) as fd:
        os.rename(d / "a/f", d / "b/g")
        os.pwrite(fd, b"O", 0)
        assert os.pread(fd, 10, 0) == b"Old"
        assert os.fstat(fd).st_nlink == 0
    assert get(d / "b/g") == b"new"


@behaviour(seeds=[SEED])
def unlinked_file_in_removed_directory(d: Place) -> None:
    with opened(d / "a/b/f", os.O_RDWR) as fd:
        os.unlink(d / "a/b/f")
        os.rmdir(d / "a/b")
        os.rmdir(d / "a")
        os.pwrite(fd, b"CON", 0)
        assert os.pread(fd, 100, 0) == b"CONtent"


@behaviour(seeds=[File("a/d/f", b"x")])
def removed_open_directory(d: Place) -> None:
    with opened(d / "a/d", os.O_DIRECTORY) as fd:
        os.unlink(d / "a/d/f")
        os.rmdir(d / "a/d")
        assert os.fstat(fd).st_nlink == 0
        assert os.listdir(fd) == []
        expect_errno(errno.ENOENT, os.open, "f", os.O_RDONLY, dir_fd=fd)
        expect_errno(errno.ENOENT, os.open, "new", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        expect_errno(errno.ENOENT, os.mkdir, "new", dir_fd=fd)
        expect_errno(errno.ENOENT, os.symlink, "x", "new", dir_fd=fd)


@behaviour(seeds=[Dir("a/d")])
def removed_working_directory(d: Place) -> None:
    def work() -> None:
        os.chdir("a/d")
        os.rmdir("../d")
        expect_errno(errno.ENOENT, os.getcwd)
        expect_errno(errno.ENOENT, put, "new", b"")
        assert os.listdir(".") == []
        assert stat.S_ISDIR(os.stat(".").st_mode)
        assert os.stat(".").st_nlink == 0

    d.in_child(work)


@behaviour(seeds=[Dir("a/d"), Dir("b")])
def replaced_open_directory(d: Place) -> None:
    with opened(d / "a/d", os.O_DIRECTORY) as fd:
        os.rename(d / "b", d / "a/d")
        assert os.fstat(fd).st_nlink == 0
        expect_errno(errno.ENOENT, os.mkdir, "new", dir_fd=fd)
    os.mkdir(d / "a/d/new")


@behaviour(seeds=[File(f"m/f{number}", b"%d" % number) for number in range(50)])
def many_unlinked_files_stay_apart(d: Place) -> None:
    fds = [os.open(d / f"m/f{number}", os.O_RDWR) for number in range(50)]
    for number in range(50):
        os.unlink(d / f"m/f{number}")
    for fd in fds:
        os.pwrite(fd, b"x", 5)
    for number, fd in enumerate(fds):
        text = b"%d" % number
        assert os.pread(fd, 10, 0) == text + bytes(5 - len(text)) + b"x"
        os.close(fd)
    os.rmdir(d / "m")
