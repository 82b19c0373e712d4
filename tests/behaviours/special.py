"""Devices, pipes, sockets, unusual names and paths, statfs and flushing."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from .base import behaviour
from .libc import syncfs
from .place import Place, append, expect_errno, get, mode_of, names, open_close, opened, put
from .seeds import BlockDev, CharDev, Dir, Fifo, File, Symlink

ODD_NAMES = [
    os.fsdecode(bytes(byte for byte in range(1, 256) if byte != 0x2F)[:128]),
    os.fsdecode(bytes(byte for byte in range(1, 256) if byte != 0x2F)[128:]),
    os.fsdecode(b"\xff\xfe"),
    os.fsdecode(b"\xc3\x28"),
    "ümläut",
    "日本語",
    "new\nline",
    " ",
    "%00",
    "~1",
    "CON",
    "n" * 255,
    "ü" * 127,
]
DEEP = "/".join(f"level{number:02}-{'p' * 90}" for number in range(18))  # about 1,800 bytes


@behaviour(seeds=[Dir("a")])
def mknod_of_every_type(d: Place) -> None:
    kinds = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
    for number, kind in enumerate(kinds):
        device = os.makedev(7, 200 + number) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
        os.mknod(d / f"a/n{number}", kind | 0o640, device)
        found = os.lstat(d / f"a/n{number}")
        assert stat.S_IFMT(found.st_mode) == kind
        assert stat.S_IMODE(found.st_mode) == 0o640
        assert (found.st_rdev, found.st_nlink, found.st_size) == (device, 1, 0)
    expect_errno(errno.EEXIST, os.mknod, d / "a/n0", stat.S_IFREG | 0o600)
    expect_errno(errno.EPERM, os.mknod, d / "a/dir", stat.S_IFDIR | 0o700)


@behaviour(seeds=[Dir("a")])
def mknod_with_large_device_numbers(d: Place) -> None:
    for major, minor in ((0, 0), (255, 255), (256, 256), (4095, 1_048_575)):
        os.mknod(d / f"a/c{major}", stat.S_IFCHR | 0o600, os.makedev(major, minor))
        found = os.lstat(d / f"a/c{major}")
        assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == (major, minor)


@behaviour(seeds=[CharDev("dev/null", 1, 3), CharDev("dev/zero", 1, 5), CharDev("dev/full", 1, 7)])
def character_devices_of_seeds_work(d: Place) -> None:
    append(d / "dev/null", b"swallowed")
    assert get(d / "dev/null") == b""
    with opened(d / "dev/zero") as fd:
        assert os.read(fd, 5) == bytes(5)
    with opened(d / "dev/full", os.O_WRONLY) as fd:
        expect_errno(errno.ENOSPC, os.write, fd, b"x")
    assert os.stat(d / "dev/null").st_size == 0


@behaviour(seeds=[Dir("dev")])
def character_devices_made_here_work(d: Place) -> None:
    os.mknod(d / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chmod(d / "dev/null", 0o666)
    put(d / "dev/null", b"swallowed")
    assert get(d / "dev/null") == b""
    d.alice(append, "dev/null", b"x")
    os.chmod(d / "dev/null", 0o600)
    expect_errno(errno.EACCES, d.alice, append, "dev/null", b"x")


@behaviour(seeds=[CharDev("dev/null", 1, 3), BlockDev("dev/none", 7, 200)])
def devices_after_rename_and_link(d: Place) -> None:
    os.rename(d / "dev/null", d / "null")
    os.link(d / "null", d / "dev/again")
    assert get(d / "dev/again") == b""
    assert os.lstat(d / "null").st_nlink == 2
    os.rename(d / "dev", d / "moved")
    assert os.lstat(d / "moved/none").st_rdev == os.makedev(7, 200)
    os.unlink(d / "moved/none")
    assert names(d / "moved") == ["again"]


@behaviour(seeds=[Dir("dev")])
def device_without_driver_is_enxio(d: Place) -> None:
    os.mknod(d / "dev/none", stat.S_IFCHR | 0o600, os.makedev(4095, 77))
    expect_errno(errno.ENXIO, open_close, d / "dev/none", os.O_RDONLY)


@behaviour(seeds=[Fifo("a/p")])
def fifo_passes_data(d: Place) -> None:
    child = d.start(get, "a/p")
    with opened(d / "a/p", os.O_WRONLY) as fd:
        os.write(fd, b"through ")
        os.write(fd, b"the pipe")
    assert child.result() == b"through the pipe"
    assert os.stat(d / "a/p").st_size == 0


@behaviour(seeds=[Dir("a")])
def fifo_made_here_passes_data(d: Place) -> None:
    os.mkfifo(d / "a/p", 0o600)
    child = d.start(append, "a/p", b"upwards")
    assert get(d / "a/p") == b"upwards"
    child.result()
    assert mode_of(d / "a/p") == 0o600


@behaviour(seeds=[Fifo("a/p")])
def fifo_without_reader_is_enxio(d: Place) -> None:
    expect_errno(errno.ENXIO, open_close, d / "a/p", os.O_WRONLY | os.O_NONBLOCK)
    with opened(d / "a/p", os.O_RDONLY | os.O_NONBLOCK) as reader:
        assert os.read(reader, 10) == b""
        with opened(d / "a/p", os.O_WRONLY | os.O_NONBLOCK) as writer:
            expect_errno(errno.EAGAIN, os.read, reader, 10)
            os.write(writer, b"x")
            assert os.read(reader, 10) == b"x"


@behaviour(seeds=[Dir("s")])
def unix_sockets_connect(d: Place) -> None:
    def work() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("s/sock")
            client.sendall(b"hello")
            assert client.recv(10) == b"world"

    def serve() -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("s/sock")
            server.listen()
            child = Place(Path("."), frozenset()).start(work)
            connection, _ = server.accept()
            with connection:
                assert connection.recv(10) == b"hello"
                connection.sendall(b"world")
            child.result()

    d.in_child(serve)
    found = os.lstat(d / "s/sock")
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o755
    expect_errno(errno.ECONNREFUSED, d.in_child, work)
    os.unlink(d / "s/sock")
    expect_errno(errno.ENOENT, d.in_child, work)


@behaviour(seeds=[File("s/f")])
def socket_files_do_not_open(d: Place) -> None:
    os.mknod(d / "s/sock", stat.S_IFSOCK | 0o600)
    expect_errno(errno.ENXIO, open_close, d / "s/sock", os.O_RDONLY)

    def connect(name: str) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(name)

    def bind() -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("s/f")

    expect_errno(errno.ECONNREFUSED, d.in_child, connect, "s/sock")
    expect_errno(errno.ECONNREFUSED, d.in_child, connect, "s/f")
    expect_errno(errno.EADDRINUSE, d.in_child, bind)


@behaviour(seeds=[Dir("s")])
def unix_socket_obeys_permissions(d: Place) -> None:
    def serve() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
            server.bind("s/sock")
            here = Place(Path("."), frozenset())
            expect_errno(errno.EACCES, here.alice, send)
            os.chmod("s/sock", 0o777)
            here.alice(send)
            assert server.recv(10) == b"x"

    def send() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.sendto(b"x", "s/sock")

    d.in_child(serve)


@behaviour(seeds=[Dir("a")])
def names_of_255_bytes(d: Place) -> None:
    longest = "n" * 255
    put(d / "a" / longest, b"x")
    os.mkdir(d / "a" / ("d" * 255))
    os.symlink("x", d / "a" / ("l" * 255))
    os.link(d / "a" / longest, d / "a" / ("h" * 255))
    assert names(d / "a") == ["d" * 255, "h" * 255, "l" * 255, longest]
    assert get(d / "a" / ("h" * 255)) == b"x"


@behaviour(seeds=[Dir("a"), File("f")])
def names_of_256_bytes(d: Place) -> None:
    long = d / "a" / ("n" * 256)
    for call in (os.stat, os.mkdir, os.unlink, os.rmdir, os.mkfifo, os.listdir):
        expect_errno(errno.ENAMETOOLONG, call, long)
    expect_errno(errno.ENAMETOOLONG, open_close, long, os.O_CREAT | os.O_WRONLY)
    expect_errno(errno.ENAMETOOLONG, os.symlink, "x", long)
    expect_errno(errno.ENAMETOOLONG, os.link, d / "f", long)
    assert names(d / "a") == []


@behaviour(seeds=[Dir("a")])
def names_of_any_bytes(d: Place) -> None:
    for number, name in enumerate(ODD_NAMES):
        put(d / "a" / name, b"%d" % number)
    assert names(d / "a") == sorted(ODD_NAMES)
    for number, name in enumerate(ODD_NAMES):
        assert get(d / "a" / name) == b"%d" % number
        os.rename(d / "a" / name, d / f"r{number}")
    assert names(d / "a") == []


@behaviour(seeds=[File(f"odd/{name}", b"%d" % number) for number, name in enumerate(ODD_NAMES)])
def names_of_seeds_of_any_bytes(d: Place) -> None:
    assert names(d / "odd") == sorted(ODD_NAMES)
    for number, name in enumerate(ODD_NAMES):
        assert get(d / "odd" / name) == b"%d" % number
        append(d / "odd" / name, b"+")
        assert get(d / "odd" / name) == b"%d+" % number


@behaviour(seeds=[File(f"o/{name}/f", b"%d" % number) for number, name in enumerate(ODD_NAMES)])
def directories_of_any_bytes(d: Place) -> None:
    for number, name in enumerate(ODD_NAMES):
        append(d / "o" / name / "f", b"+")
        os.rename(d / "o" / name, d / f"r{number}")
        assert get(d / f"r{number}/f") == b"%d+" % number
    assert names(d / "o") == []


@behaviour(
    seeds=[File("a/%", b"1"), File("a/%41", b"2"), File("a/A", b"3"), File("a/a b", b"4"), File("a/a\\040b", b"5")]
)
def names_like_escapes_stay_apart(d: Place) -> None:
    for name, content in (("%", b"1"), ("%41", b"2"), ("A", b"3"), ("a b", b"4"), ("a\\040b", b"5")):
        assert get(d / "a" / name) == content
        append(d / "a" / name, b"+")
        assert get(d / "a" / name) == content + b"+"
    assert len(names(d / "a")) == 5


@behaviour(seeds=[File(f"{DEEP}/f", b"deep"), File(f"{DEEP}/g", b"other"), Symlink(f"{DEEP}/l", "f")])
def seeds_deep_down_are_changed(d: Place) -> None:
    def work() -> None:
        assert get(f"{DEEP}/l") == b"deep"
        os.chmod(f"{DEEP}/g", 0o600)
        append(f"{DEEP}/f", b"+")
        put(f"{DEEP}/new", b"new")
        assert names(DEEP) == ["f", "g", "l", "new"]
        os.unlink(f"{DEEP}/g")
        assert get(f"{DEEP}/f") == b"deep+"

    d.in_child(work)


@behaviour()
def paths_up_to_path_max(d: Place) -> None:
    def work() -> None:
        part = "p" * 255
        path = ""
        while len(path) + 256 <= 4095 - 2:
            path += part + "/"
            os.mkdir(path[:-1])
        name = path + "f" * (4095 - len(path))
        put(name, b"deep")
        assert len(name) == 4095
        assert get(name) == b"deep"
        os.rename(name, path + "g")
        os.link(path + "g", name)
        append(name, b"+")
        assert get(path + "g") == b"deep+"
        expect_errno(errno.ENAMETOOLONG, os.stat, path + "f" * (4096 - len(path)))
        assert os.stat(path + "g").st_nlink == 2

    d.in_child(work)


@behaviour()
def paths_beyond_path_max_by_steps(d: Place) -> None:
    def work() -> None:
        for number in range(40):
            os.mkdir(f"step{number:02}-" + "s" * 200)
            os.chdir(f"step{number:02}-" + "s" * 200)
        put("f", b"very deep")
        os.symlink("f", "l")
        assert get("l") == b"very deep"
        os.rename("f", "g")
        assert sorted(os.listdir(".")) == ["g", "l"]
        for _ in range(40):
            for name in os.listdir("."):
                if os.path.isdir(name):
                    os.rmdir(name)
                else:
                    os.unlink(name)
            os.chdir("..")

    d.in_child(work)
    (last,) = names(d.path)
    os.rmdir(d / last)


@behaviour()
def three_hundred_levels(d: Place) -> None:
    def work() -> None:
        for _ in range(300):
            os.mkdir("d")
            os.chdir("d")
        put("f", b"bottom")

    d.in_child(work)
    assert get(d.path / ("d/" * 300 + "f")) == b"bottom"
    os.rename(d / "d/d", d / "moved")
    assert get(d.path / ("moved/" + "d/" * 298 + "f")) == b"bottom"
    assert names(d / "d") == []


@behaviour(seeds=[File("f")])
def empty_and_too_long_paths(d: Place) -> None:
    expect_errno(errno.ENOENT, os.stat, "")
    expect_errno(errno.ENOENT, os.mkdir, "")
    expect_errno(errno.ENAMETOOLONG, os.stat, f"{d.path}/" + "./" * 2100)
    assert os.stat(f"{d.path}/" + "./" * 1500 + "f").st_size == 0
    assert os.stat(f"{d.path}//////f").st_ino == os.stat(d / "f").st_ino


@behaviour(seeds=[File("a/f")])
def statfs_is_plausible(d: Place) -> None:
    with opened(d / "a/f") as fd:
        for found in (os.statvfs(d.path), os.statvfs(d / "a"), os.statvfs(fd)):
            assert found.f_namemax == 255
            assert 512 <= found.f_bsize <= 1 << 20
            assert 0 < found.f_bavail <= found.f_bfree <= found.f_blocks
            assert found.f_frsize * found.f_blocks > 1 << 20
            assert 0 < found.f_ffree <= found.f_files
            assert not found.f_flag & os.ST_RDONLY
            assert not found.f_flag & os.ST_NOSUID


@behaviour(seeds=[File("a/f", b"x"), Dir("a/d")])
def everything_can_be_flushed(d: Place) -> None:
    append(d / "a/f", b"y")
    with opened(d / "a/f", os.O_RDWR) as fd:
        os.pwrite(fd, b"z", 0)
        os.fsync(fd)
        os.fdatasync(fd)
        syncfs(fd)
    with opened(d / "a/f") as fd:
        os.fsync(fd)
    with opened(d / "a/d", os.O_DIRECTORY) as fd:
        put(d / "a/d/new", b"")
        os.fsync(fd)
        os.fdatasync(fd)
        syncfs(fd)
    assert get(d / "a/f") == b"zy"


@behaviour(seeds=[File("a/f", b"seed"), Dir("a/d")])
def unchanged_seeds_can_be_flushed(d: Place) -> None:
    for name in ("f", "d"):
        with opened(d / "a" / name) as fd:
            os.fsync(fd)
            os.fdatasync(fd)
    assert get(d / "a/f") == b"seed"


@behaviour(seeds=[Fifo("a/p"), CharDev("a/null", 1, 3), Symlink("a/l", "x")])
def truncate_of_other_types(d: Place) -> None:
    expect_errno(errno.EINVAL, os.truncate, d / "a/p", 0)
    expect_errno(errno.EINVAL, os.truncate, d / "a/null", 0)
    expect_errno(errno.ENOENT, os.truncate, d / "a/l", 0)


@behaviour(seeds=[Fifo("a/p"), CharDev("a/n", 1, 3)])
def special_files_replaced_by_ordinary_ones(d: Place) -> None:
    os.mknod(d / "a/s", stat.S_IFSOCK | 0o600)
    for name in ("p", "n", "s"):
        put(d / "a/tmp", b"plain")
        os.rename(d / "a/tmp", d / "a" / name)
        assert get(d / "a" / name) == b"plain"
        assert stat.S_ISREG(os.lstat(d / "a" / name).st_mode)
