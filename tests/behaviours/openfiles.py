"""A file that somebody has open while others first change it: one file for all, by whatever name or descriptor."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import subprocess
import time
from pathlib import Path

from .base import behaviour
from .libc import link_descriptor
from .place import Place, append, expect_errno, get, opened, patch, put, tick
from .seeds import Dir, File, HardLink

OLD = b"template's line\n"


@behaviour(needs={"coherent-readers"}, seeds=[File("log", OLD)])
def a_follower_sees_what_is_appended(d: Place) -> None:
    with opened(d / "log") as fd:
        assert os.read(fd, 100) == OLD
        append(d / "log", b"second\n")
        if d.has("coherent-readers"):
            assert os.read(fd, 100) == b"second\n"
            assert os.readlink(f"/proc/self/fd/{fd}").endswith("/log")
            assert os.fstat(fd).st_size == len(OLD) + 7
        else:
            assert os.read(fd, 100) == b""


@behaviour(needs={"coherent-mappings"}, seeds=[File("f", OLD * 300)])
def an_old_mapping_sees_what_is_written(d: Place) -> None:
    with opened(d / "f") as fd, mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        assert view[:4] == b"temp"
        patch(d / "f", 0, b"TEMP")
        if d.has("coherent-mappings"):
            assert view[:4] == b"TEMP"
        with opened(d / "f") as again, mmap.mmap(again, 0, mmap.MAP_SHARED, mmap.PROT_READ) as new:
            assert new[:4] == b"TEMP"


@behaviour(needs={"coherent-readers"}, seeds=[File("one", OLD), HardLink("two", "one"), HardLink("d/three", "one")])
def every_name_shows_what_is_written_through_another(d: Place) -> None:
    names = [d / "one", d / "two", d / "d/three"]
    with opened(names[0]) as reader:
        assert {os.stat(name).st_ino for name in names} == {os.fstat(reader).st_ino}
        assert {get(name) for name in names} == {OLD}
        append(names[1], b"2")
        assert [get(name) for name in names] == [OLD + b"2"] * 3
        append(names[2], b"3")
        append(names[0], b"1")
        assert [get(name) for name in names] == [OLD + b"231"] * 3
        assert len({os.stat(name).st_ino for name in names}) == 1
        assert {os.stat(name).st_size for name in names} == {len(OLD) + 3}
        if d.has("coherent-readers"):
            assert os.pread(reader, 100, 0) == OLD + b"231"
        os.unlink(names[1])
        assert get(names[2]) == OLD + b"231"


@behaviour(needs={"coherent-readers"}, seeds=[File("lock", OLD)])
def locks_bind_readers_from_before_and_writers(d: Place) -> None:
    def attempt(how: str) -> int:
        with opened("lock", os.O_RDWR) as fd:
            try:
                if how == "flock":
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                return error.errno or 0
            return 0

    if not d.has("coherent-readers"):
        return  # each side has a file of its own: see docs/direct-engine.md
    with opened(d / "lock") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        fcntl.lockf(reader, fcntl.LOCK_SH)
        assert d.in_child(attempt, "flock") == errno.EAGAIN
        assert d.in_child(attempt, "lockf") in (errno.EAGAIN, errno.EACCES)
        fcntl.flock(reader, fcntl.LOCK_UN)
        fcntl.lockf(reader, fcntl.LOCK_UN)
        assert d.in_child(attempt, "flock") == 0
        assert d.in_child(attempt, "lockf") == 0


@behaviour(needs={"coherent-readers"}, seeds=[File("f", OLD), File("other", b"")])
def a_bind_mount_of_a_file_goes_on_being_it(d: Place) -> None:
    subprocess.run(["mount", "--bind", d / "f", d / "other"], check=True)
    try:
        with opened(d / "other") as reader:
            append(d / "f", b"+")
            if d.has("coherent-readers"):
                assert get(d / "other") == OLD + b"+"
                append(d / "other", b"-")
                assert get(d / "f") == os.pread(reader, 100, 0) == OLD + b"+-"
    finally:
        subprocess.run(["umount", d / "other"], check=True)


@behaviour(seeds=[File("f", OLD)])
def a_store_through_a_mapping_moves_the_time(d: Place) -> None:
    """Also when somebody has asked for the times between mapping and storing."""
    for path in (d / "f", d / "own"):
        if path.name == "own":
            put(path, OLD)
        os.utime(path, (1, 1))
        with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 0) as view:
            assert os.stat(path).st_mtime == 1
            assert os.fstat(fd).st_mtime == 1
            tick()
            before = time.time() - 1
            view[0] = ord("T")
            view.flush()
        assert os.stat(path).st_mtime > before, path.name
        assert os.stat(path).st_ctime > before, path.name
        assert get(path)[:1] == b"T"


@behaviour(seeds=[File("acl", OLD)])
def an_acl_can_be_set_through_a_reader(d: Place) -> None:
    """The descriptor was opened for reading and is all that the program has."""
    none = 0xFFFFFFFF
    entries = ((1, 6, none), (2, 4, 1234), (4, 4, none), (16, 6, none), (32, 4, none))
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + who.to_bytes(4, "little") for tag, bits, who in entries
    )
    with opened(d / "acl") as fd:
        os.setxattr(fd, "system.posix_acl_access", acl)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o664
        assert os.getxattr(d / "acl", "system.posix_acl_access") == acl
        os.fchmod(fd, 0o640)
        assert stat.S_IMODE(os.stat(d / "acl").st_mode) == 0o640
        changed = os.getxattr(fd, "system.posix_acl_access")
        assert changed == acl.replace(b"\x10\x00\x06", b"\x10\x00\x04").replace(b"\x20\x00\x04", b"\x20\x00\x00")
        os.removexattr(fd, "system.posix_acl_access")
        expect_errno(errno.ENODATA, os.getxattr, fd, "system.posix_acl_access")
        assert get(d / "acl") == OLD


@behaviour(seeds=[File("f", OLD), Dir("d")])
def what_is_open_stays_the_same_while_names_change(d: Place) -> None:
    with opened(d / "f") as reader, opened(d / "f", os.O_RDWR) as writer:
        os.rename(d / "f", d / "d/g")
        os.pwrite(writer, b"T", 0)
        assert get(d / "d/g")[:1] == b"T"
        os.unlink(d / "d/g")
        os.pwrite(writer, b"U", 0)
        assert os.pread(writer, 1, 0) == b"U"
        assert os.fstat(writer).st_nlink == 0
        link_descriptor_or_not(writer, d / "again")
        assert os.pread(reader, 100, 0).endswith(b"line\n")


def link_descriptor_or_not(fd: int, path: Path) -> None:
    """A file whose last name went gets no new one."""
    expect_errno(errno.ENOENT, link_descriptor, fd, path)


@behaviour(seeds=[File("deep/f", OLD)])
def attributes_change_through_a_reader(d: Place) -> None:
    with opened(d / "deep/f") as fd:
        os.fchmod(fd, 0o600)
        os.fchown(fd, 1, 2)
        os.setxattr(fd, "user.tag", b"value")
        os.utime(fd, ns=(5, 7))
        found = os.stat(d / "deep/f")
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns) == (0o600, 1, 2, 7)
        assert os.getxattr(d / "deep/f", "user.tag") == b"value"
        assert os.fstat(fd).st_ino == found.st_ino
