"""What the direct engine does beyond the behaviours that all engines share, on real mounts.

Some tests count requests: what is not asked costs nothing. Files of the tests' own are called ``new``, files of the
template come from ``tests.conftest.make_source``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.behaviours.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate, link_descriptor
from tests.conftest import ACL, LARGE_SIZE, SMALL, SPARSE_SIZE, make_source
from tests.engines import NEWER, EngineContainer, EngineStore
from tests.realuse_helpers import alive, asked, environment, expect, in_child, loop_mounted, run, settled, wait_for
from vzfs import linux as calls
from vzfs.errors import UnsupportedError
from vzfs.fuse.openfiles import REGISTERED
from vzfs.fuse.wire import InitFlag
from vzfs.store.lock import read_holder

KIB, MIB, PAGE = 1 << 10, 1 << 20, mmap.PAGESIZE
FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_ZERO_RANGE = 8, 16
O_TMPFILE = os.O_TMPFILE
FILES = 400
"""Files in the template's directory ``many``: their listing takes several pages."""
libc = ctypes.CDLL(None, use_errno=True)


def plant(top: Path) -> Path:
    """The source of the template."""
    make_source(top)
    (top / "many").mkdir()
    for number in range(FILES):
        (top / f"many/file-{number:04}").write_bytes(b"%d\n" % number)
    (top / "big").write_bytes(os.urandom(1 * MIB) * 16)
    return top


@pytest.fixture
def container(clean_path: Path) -> EngineContainer:
    store = EngineStore(clean_path / "vz", "direct")
    store.create_template(SMALL, str(plant(clean_path / "source")))
    return store.create(101, template=SMALL)


@pytest.fixture
def root(container: EngineContainer) -> Iterator[Path]:
    """The mounted root, all files passed through, as large ones are; ``test_served`` has the small ones. At the end the
    template must be what it was, and the container clean."""
    with container.mounted(passthrough_above=0) as mounted:
        assert container.status().engine == "direct"
        yield mounted
    assert container.check() == []
    assert container.store.template(SMALL).verify() == []
    assert "Traceback" not in (container.path / "vzfs.log").read_text()


# ------------------------------------------------------------------------------------------------------- counting


@contextlib.contextmanager
def counting(container: EngineContainer) -> Iterator[dict[str, int]]:
    """What is requested within the block, to be looked at after it."""
    before = asked(settled(container))
    counted: dict[str, int] = {}
    yield counted
    after = asked(settled(container))
    counted.update({name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)})


def as_user(root: Path, work: Callable[..., object], *arguments: object, uid: int = 1000) -> None:
    """Call ``work`` in a child that is an ordinary user, in ``root``, to which no path leads a user."""

    def become() -> None:
        os.chdir(root)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        work(*arguments)

    in_child(become)


@contextlib.contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


# ----------------------------------------------------------------------------------------------------- fallocate, holes


@pytest.mark.parametrize("name", ["new", "lib/large"])
def test_fallocate(root: Path, name: str) -> None:
    path = root / name
    if name == "new":
        path.write_bytes(b"x" * LARGE_SIZE)
    data = path.read_bytes()
    with opened(path, os.O_RDWR) as fd:
        used = os.fstat(fd).st_blocks
        fallocate(fd, FALLOC_FL_KEEP_SIZE, LARGE_SIZE, 4 * MIB)
        assert os.fstat(fd).st_size == LARGE_SIZE
        assert os.fstat(fd).st_blocks >= used + 4 * MIB // 512
        fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, PAGE, 8 * PAGE)
        assert os.pread(fd, 10 * PAGE, 0) == data[:PAGE] + bytes(8 * PAGE) + data[9 * PAGE : 10 * PAGE]
        assert os.lseek(fd, 0, os.SEEK_HOLE) == PAGE
        assert os.lseek(fd, PAGE, os.SEEK_DATA) == 9 * PAGE
        fallocate(fd, FALLOC_FL_ZERO_RANGE, LARGE_SIZE - 10, 100)
        assert os.fstat(fd).st_size == LARGE_SIZE + 90
        assert os.pread(fd, 200, LARGE_SIZE - 20) == data[-20:-10] + bytes(100)
        fallocate(fd, 0, 0, 2 * MIB)
        assert os.fstat(fd).st_size == path.stat().st_size == 2 * MIB
        expect(errno.EOPNOTSUPP, fallocate, fd, FALLOC_FL_COLLAPSE_RANGE, 0, PAGE)  # the kernel's FUSE refuses it
    with opened(path, os.O_RDONLY) as fd:
        expect(errno.EBADF, fallocate, fd, 0, 0, PAGE)


def test_what_a_mapping_sees_of_a_punched_hole(root: Path) -> None:
    (root / "new").write_bytes(b"x" * 4 * PAGE)
    with opened(root / "new", os.O_RDWR) as fd, mmap.mmap(fd, 4 * PAGE) as view:
        view[PAGE] = ord("y")
        fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, PAGE, PAGE)
        assert view[: 4 * PAGE] == b"x" * PAGE + bytes(PAGE) + b"x" * 2 * PAGE
        view[PAGE + 1] = ord("z")
        assert os.pread(fd, 2, PAGE) == b"\0z"


def test_seek_data_and_hole(root: Path) -> None:
    for path in (root / "var/log/sparse", root / "new"):
        if path.name == "new":
            path.write_bytes(b"head")
            os.truncate(path, SPARSE_SIZE - 4)
            with open(path, "ab") as file:
                file.write(b"tail")
        with opened(path, os.O_RDONLY) as fd:
            assert os.lseek(fd, 0, os.SEEK_DATA) == 0
            assert os.lseek(fd, 0, os.SEEK_HOLE) == PAGE
            assert os.lseek(fd, PAGE, os.SEEK_DATA) == SPARSE_SIZE - PAGE
            assert os.lseek(fd, SPARSE_SIZE - 1, os.SEEK_HOLE) == SPARSE_SIZE
            expect(errno.ENXIO, os.lseek, fd, SPARSE_SIZE, os.SEEK_DATA)
            expect(errno.ENXIO, os.lseek, fd, SPARSE_SIZE, os.SEEK_HOLE)


# ------------------------------------------------------------------------------------------------------ copy_file_range


def copy_all(source: Path, target: Path, size: int) -> None:
    with opened(source, os.O_RDONLY) as from_fd, opened(target, os.O_WRONLY | os.O_CREAT) as to_fd:
        done = 0
        while done < size:
            count = os.copy_file_range(from_fd, to_fd, size - done, done, done)
            assert count
            done += count


@pytest.mark.parametrize("source", ["big", "etc/passwd", "new"])
def test_copy_file_range(root: Path, container: EngineContainer, source: str) -> None:
    if source == "new":
        (root / "new").write_bytes(os.urandom(3 * MIB + 5))
    size = (root / source).stat().st_size
    with counting(container) as counted:
        copy_all(root / source, root / "copy", size)
    assert (root / "copy").read_bytes() == (root / source).read_bytes()
    assert not {"READ", "WRITE"} & set(counted)
    assert counted.get("COPY_FILE_RANGE", 0) + counted.get("COPY_FILE_RANGE_64", 0) >= 1
    with opened(root / source, os.O_RDONLY) as from_fd, opened(root / "lib/large", os.O_RDWR) as to_fd:
        before = os.pread(to_fd, LARGE_SIZE, 0)
        assert os.copy_file_range(from_fd, to_fd, 4, 1, 1000) == 4
        assert os.pread(to_fd, LARGE_SIZE, 0) == before[:1000] + os.pread(from_fd, 4, 1) + before[1004:]
        assert os.copy_file_range(from_fd, to_fd, 4, size, 0) == 0
        with mmap.mmap(to_fd, LARGE_SIZE) as view:
            os.copy_file_range(from_fd, to_fd, 4, 0, 0)
            assert view[:4] == os.pread(from_fd, 4, 0)
    assert (root / "lib/large").stat().st_mtime_ns > time.time_ns() - 60_000_000_000


def test_copying_within_a_file(root: Path) -> None:
    (root / "new").write_bytes(b"0123456789" * 1000)
    with opened(root / "new", os.O_RDWR) as fd:
        assert os.copy_file_range(fd, fd, 1000, 0, 10_000) == 1000
        expect(errno.EINVAL, os.copy_file_range, fd, fd, 1000, 0, 500)
    assert (root / "new").read_bytes() == b"0123456789" * 1100


@pytest.mark.parametrize("filesystem", ["btrfs", "xfs"])
def test_copies_share_extents_where_the_store_can(tmp_path: Path, filesystem: str) -> None:
    size = 24 * MIB
    source = tmp_path / "source"
    source.mkdir()
    (source / "big").write_bytes(os.urandom(size))
    options = {"btrfs": [], "xfs": ["-m", "reflink=1"]}[filesystem]
    with loop_mounted(tmp_path / "image", tmp_path / "disk", 320 * MIB, filesystem, options) as disk:
        store = EngineStore(disk / "vz", "direct")
        store.create_template("t", str(source))
        container = store.create(101, template="t")
        with container.mounted(passthrough_above=0) as root:
            os.sync()
            used = used_bytes(disk)
            copy_all(root / "big", root / "copy", size)  # of the template's
            copy_all(root / "copy", root / "again", size)  # of the container's own
            with opened(root / "big", os.O_RDWR) as fd:  # copied up
                os.pwrite(fd, b"changed", 0)
            run("cp", "--reflink=auto", root / "copy", root / "third")
            os.sync()
            assert used_bytes(disk) - used < size // 4
            assert shared_extents(container.path / "private/copy")
            contents = [(root / name).read_bytes() for name in ("copy", "again", "third", "big")]
            assert contents[0] == contents[1] == contents[2] == (source / "big").read_bytes()
            assert contents[3] == b"changed" + contents[0][7:]
        assert container.check() == []
        assert store.template("t").verify() == []


def used_bytes(disk: Path) -> int:
    info = os.statvfs(disk)
    return (info.f_blocks - info.f_bfree) * info.f_frsize


def shared_extents(path: Path) -> bool:
    return "shared" in run("filefrag", "-v", path)


# ------------------------------------------------------------------------------------------------------- O_TMPFILE


@pytest.mark.parametrize("folder", ["tmp", "etc", "usr/share/doc/one"])
def test_files_without_a_name(root: Path, container: EngineContainer, folder: str) -> None:
    with opened(root / folder, O_TMPFILE | os.O_RDWR, 0o640) as fd:
        info = os.fstat(fd)
        assert (info.st_nlink, info.st_size, stat.S_IMODE(info.st_mode)) == (0, 0, 0o640)
        os.write(fd, b"data")
        assert sorted(os.listdir(root / folder)) == sorted(os.listdir(root.parent.parent / "template/small" / folder))
        link_descriptor(fd, root / folder / "named")
        assert os.fstat(fd).st_nlink == 1
        assert (root / folder / "named").stat().st_ino == info.st_ino
        os.write(fd, b" and more")
        expect(errno.EEXIST, link_descriptor, fd, root / folder / "named")
        link_descriptor(fd, root / "second")
    assert (root / folder / "named").read_bytes() == (root / "second").read_bytes() == b"data and more"
    assert (root / "second").stat().st_nlink == 2


def test_a_file_that_must_stay_without_a_name(root: Path, container: EngineContainer) -> None:
    with opened(root / "tmp", O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600) as fd:
        os.write(fd, b"data")
        expect(errno.ENOENT, link_descriptor, fd, root / "named")
        assert os.pread(fd, 10, 0) == b"data"
    wait_for(lambda: orphans(container) == [])


def test_a_user_makes_a_file_without_a_name(root: Path) -> None:
    def work() -> None:
        with opened(Path("tmp"), O_TMPFILE | os.O_RDWR, 0o600) as fd:
            os.write(fd, b"mine")
            assert os.fstat(fd).st_uid == 1000
            calls_linkat(fd, "tmp/mine")
        expect(errno.EACCES, os.open, "etc", O_TMPFILE | os.O_RDWR, 0o600)

    as_user(root, work)
    info = (root / "tmp/mine").stat()
    assert (info.st_uid, info.st_gid, info.st_size) == (1000, 1000, 4)


def calls_linkat(fd: int, path: str) -> None:
    """As a user does it, whom AT_EMPTY_PATH is not permitted."""
    if libc.linkat(-100, f"/proc/self/fd/{fd}".encode(), -100, path.encode(), 0x400):  # AT_SYMLINK_FOLLOW
        raise OSError(ctypes.get_errno(), "linkat")


def test_a_crash_leaves_nothing_of_files_without_a_name(container: EngineContainer) -> None:
    root = container.mount()
    holder = read_holder(container.path)
    assert holder is not None
    with opened(root / "tmp", O_TMPFILE | os.O_RDWR, 0o600) as fd:
        os.write(fd, b"data")
        assert len(orphans(container)) == 1
        os.kill(holder.pid, 9)
        wait_for(lambda: not alive(holder.pid))
    calls.umount2(os.fsencode(root), calls.MNT_DETACH)
    with container.mounted():
        assert orphans(container) == []
    assert container.check() == []


def orphans(container: EngineContainer) -> list[str]:
    folder = container.path / "cow/orphans"
    return os.listdir(folder) if folder.exists() else []


# ------------------------------------------------------------------------------------------------------- other calls


def rename2(old: Path, new: Path, flags: int) -> None:
    calls.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags)


def test_renaming_with_flags(root: Path) -> None:
    expect(errno.EEXIST, rename2, root / "etc/passwd", root / "etc/shadow", calls.RENAME_NOREPLACE)
    rename2(root / "etc/passwd", root / "etc/new", calls.RENAME_NOREPLACE)
    rename2(root / "etc/new", root / "bin", calls.RENAME_EXCHANGE)
    assert (root / "bin").read_bytes().startswith(b"root:")
    assert (root / "etc/new/tool").read_bytes().startswith(b"#!")
    expect(errno.ENOENT, rename2, root / "bin", root / "nothing", calls.RENAME_EXCHANGE)
    expect(errno.EINVAL, rename2, root / "bin", root / "y", calls.RENAME_NOREPLACE | calls.RENAME_EXCHANGE)
    rename2(root / "bin", root / "y", calls.RENAME_WHITEOUT)
    assert (stat.S_ISCHR((root / "bin").stat().st_mode), (root / "bin").stat().st_rdev) == (True, 0)
    assert (root / "y").read_bytes().startswith(b"root:")


def test_flushing_comes_here(root: Path, container: EngineContainer) -> None:
    """All but syncfs(2), which the kernel keeps to itself (fuse_sync_fs in fs/fuse/inode.c asks virtiofs only)."""
    (root / "new").write_bytes(b"data")
    with opened(root, os.O_RDONLY) as fd:
        calls.syncfs(fd)
    with counting(container) as counted, opened(root / "new", os.O_RDWR) as fd, opened(root, os.O_RDONLY) as folder:
        os.fsync(fd)
        os.fdatasync(fd)
        os.fsync(folder)
    assert (counted.get("FSYNC"), counted.get("FSYNCDIR")) == (2, 1)


def birth(path: Path) -> float:
    return float(run("stat", "--format=%.9W", path))


def test_birth_times(root: Path) -> None:
    before = time.time()
    (root / "new").write_bytes(b"")
    (root / "folder").mkdir()
    for name in ("new", "folder"):
        assert before - 1 <= birth(root / name) <= time.time() + 1
    for name in ("etc/passwd", "usr/share", "etc/relative", "dev/fifo"):
        assert birth(root / name) == 0, "unknown: the template was made before the container"
    with open(root / "etc/shadow", "ab") as file:
        file.write(b"copied up")
    assert birth(root / "etc/shadow") >= before - 1
    os.utime(root / "new", (0, 0))
    assert birth(root / "new") >= before - 1


FS_APPEND, FS_IMMUTABLE, FS_NODUMP = 0x20, 0x10, 0x40


def get_flags(path: Path) -> int:
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
        value = bytearray(8)
        fcntl.ioctl(fd, calls.FS_IOC_GETFLAGS, value)
        return int.from_bytes(value[:4], "little")


@pytest.mark.parametrize("name", ["etc/passwd", "new", "etc/conf.d", "folder"])
def test_file_flags_with_the_usual_tools(root: Path, container: EngineContainer, name: str) -> None:
    path = root / name
    if name == "folder":
        path.mkdir()
    elif name != "etc/conf.d":
        with open(path, "ab") as file:
            file.write(b"data")
    run("lsattr", "-d", path)
    before = get_flags(path)
    run("chattr", "+d", path)
    assert get_flags(path) == before | FS_NODUMP
    assert run("lsattr", "-d", path).split()[0].count("d") == 1
    run("chattr", "-d", path)
    assert get_flags(path) == before
    assert not get_flags(container.store.template(SMALL).path / "etc/passwd") & FS_NODUMP


def test_immutable_files(root: Path) -> None:
    """Refused, or kept to: never accepted and then ignored."""
    path = root / "new"
    path.write_bytes(b"data")
    done = subprocess.run(["chattr", "+i", path], capture_output=True, check=False)
    if done.returncode == 0:
        assert get_flags(path) & FS_IMMUTABLE
        try:
            expect(errno.EPERM, os.open, path, os.O_WRONLY)
            expect(errno.EPERM, os.unlink, path)
        finally:
            run("chattr", "-i", path)
    path.unlink()


def test_a_user_may_not_change_the_flags_of_others(root: Path) -> None:
    def work() -> None:
        before = get_flags(Path("etc/passwd"))
        done = subprocess.run(["chattr", "+d", "etc/passwd"], capture_output=True, check=False)
        assert done.returncode
        assert get_flags(Path("etc/passwd")) == before

    as_user(root, work)


# --------------------------------------------------------------------------------------- access lists, capabilities


def test_access_lists_decide(root: Path) -> None:
    assert os.getxattr(root / "etc/with-acl", "system.posix_acl_access") == ACL

    def user_1234() -> None:
        with open("etc/with-acl", "ab") as file:
            file.write(b"by the list\n")

    as_user(root, user_1234, uid=1234)
    as_user(root, expect, errno.EACCES, os.open, "etc/with-acl", os.O_WRONLY)
    assert (root / "etc/with-acl").read_bytes() == b"acl\nby the list\n"
    (root / "usr/acl/new").write_bytes(b"")
    assert "user:1234:rwx" in run("getfacl", "--absolute-names", "--numeric", root / "usr/acl/new")
    (root / "new").write_bytes(b"private")
    os.chmod(root / "new", 0o600)
    run("setfacl", "-m", "u:1234:r", root / "new")
    as_user(root, os.open, "new", os.O_RDONLY, uid=1234)
    as_user(root, expect, errno.EACCES, os.open, "new", os.O_RDONLY)


@pytest.mark.parametrize("place", ["template", "own"])
def test_capabilities_count_when_executed(clean_path: Path, place: str) -> None:
    source = plant(clean_path / "source")
    (source / "usr/bin").mkdir(exist_ok=True)
    if place == "template":
        run("cp", "/usr/sbin/capsh", source / "capsh")
        run("setcap", "cap_net_raw=ep", source / "capsh")
    store = EngineStore(clean_path / "vz", "direct")
    store.create_template(SMALL, str(source))
    container = store.create(101, template=SMALL)
    with container.mounted(passthrough_above=0) as root:
        if place == "own":
            run("cp", "/usr/sbin/capsh", root / "capsh")
            run("setcap", "cap_net_raw=ep", root / "capsh")

        def work() -> None:
            assert "cap_net_raw=ep" in run("./capsh", "--print").splitlines()[0]

        as_user(root, work)
        with open(root / "capsh", "ab") as file:
            file.write(b"\0")
        assert run("getcap", root / "capsh") == "", "a write takes capabilities away"
        as_user(root, expect_no_capability)


def expect_no_capability() -> None:
    assert "cap_net_raw" not in run("./capsh", "--print").splitlines()[0]


# ------------------------------------------------------------------------------------------------------ set-id bits

SET_ID = stat.S_ISUID | stat.S_ISGID


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def by_write(path: Path) -> None:
    with opened(path, os.O_WRONLY) as fd:
        assert stat.S_IMODE(os.fstat(fd).st_mode) & SET_ID, "opening takes nothing away"
        os.write(fd, b"x")


def by_truncate(path: Path) -> None:
    os.truncate(path, 1)


def by_open_truncate(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


def by_fallocate(path: Path) -> None:
    with opened(path, os.O_WRONLY) as fd:
        fallocate(fd, 0, 0, 100_000)


def by_copy(path: Path) -> None:
    with opened(path, os.O_WRONLY) as fd, opened(path.parent / "passwd", os.O_RDONLY) as source:
        assert os.copy_file_range(source, fd, 10, 0, 0) == 10


WAYS = [by_write, by_truncate, by_open_truncate, by_fallocate, by_copy]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["bin/su", "bin/wall", "new"])
def test_a_users_change_takes_set_id_bits_away(root: Path, name: str, way: Callable[[Path], None]) -> None:
    folder = root / "bin"
    (folder / "passwd").write_bytes(b"something to copy\n")
    path = root / name if name != "new" else folder / name
    if name == "new":
        path.write_bytes(b"data" * 100)
        path.chmod(0o6755)
    bits = mode_of(path) & SET_ID
    assert bits
    path.chmod(mode_of(path) | 0o022)
    path.chmod(mode_of(path) | bits)
    way(path)
    assert mode_of(path) & SET_ID == bits, "root keeps them"
    as_user(root, way, path.relative_to(root))
    assert not mode_of(path) & SET_ID
    with opened(path, os.O_RDONLY) as fd:
        assert not os.fstat(fd).st_mode & SET_ID


def test_set_id_bits_that_come_while_a_user_has_it_open(root: Path) -> None:
    """Writes through a file that is passed through already aren't seen: the bits must not outlive the next open."""
    (root / "new").write_bytes(b"data")
    (root / "new").chmod(0o666)

    def work() -> None:
        with opened(Path("new"), os.O_RDONLY), opened(Path("new"), os.O_WRONLY) as fd:
            os.write(fd, b"x")

    (root / "new").chmod(0o4666)
    reader = os.open(root / "new", os.O_RDONLY)
    as_user(root, work)
    os.close(reader)
    assert not mode_of(root / "new") & SET_ID


# ----------------------------------------------------------------------------------------------- counted requests


def test_a_folded_directory_is_listed_by_one_request_and_an_empty_one(root: Path, container: EngineContainer) -> None:
    os.listdir(root / "usr")  # the first one learns that opening is not needed
    (root / "etc").stat()
    with counting(container) as counted:
        assert len(os.listdir(root / "etc")) > 5
    assert counted.get("READDIRPLUS", 0) + counted.get("READDIR", 0) == 2
    assert not {"OPENDIR", "RELEASEDIR"} & set(counted)
    with counting(container) as counted:
        for entry in os.scandir(root / "odd"):
            entry.stat(follow_symlinks=False)
    assert counted["READDIRPLUS"] == 2
    assert counted["LOOKUP"] == 1, "of the directory; the listing brought all else"
    assert counted.get("GETATTR", 0) <= 1


def test_a_large_listing_is_whole(root: Path) -> None:
    names = [f"file-{number:04}" for number in range(FILES)]
    assert sorted(os.listdir(root / "many")) == names
    (root / "many/new").write_bytes(b"")
    assert sorted(os.listdir(root / "many")) == [*names, "new"]


def test_repeated_opens_cost_open_and_release_only(root: Path, container: EngineContainer) -> None:
    path = root / "etc/passwd"
    path.read_bytes()
    with counting(container) as counted:
        for _ in range(50):
            with opened(path, os.O_RDONLY) as fd:
                os.read(fd, 100)
    assert counted == {"OPEN": 50, "RELEASE": 50}


def test_data_never_comes_here(root: Path, container: EngineContainer) -> None:
    new = root / "new"
    with counting(container) as counted:
        new.write_bytes(os.urandom(2 * MIB))
        with opened(new, os.O_RDWR) as fd, mmap.mmap(fd, 2 * MIB) as view:
            view[5] = 1
            view.flush()
            os.pwrite(fd, b"x" * 100_000, 50_000)
            assert view[50_000] == ord("x")
        with open(new, "ab") as file:
            file.write(b"more")
        for name in ("big", "lib/large", "etc/passwd"):
            (root / name).read_bytes()
            with opened(root / name, os.O_RDONLY) as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
                assert len(view[:]) == os.fstat(fd).st_size
        with open(root / "lib/large", "r+b") as file:  # copied up
            file.write(b"changed")
        subprocess.run(["cp", root / "big", root / "copy"], check=True)
        subprocess.run(
            ["dd", f"if={root}/big", f"of={root}/direct", "bs=64k", "iflag=direct", "oflag=direct"],
            check=True,
            capture_output=True,
        )
    assert not {"READ", "WRITE", "FLUSH"} & set(counted), counted
    assert (root / "direct").read_bytes() == (root / "big").read_bytes()


def cached_bytes(path: Path) -> int:
    return int(run("fincore", "--bytes", "--noheadings", "--output", "RES", path))


def forget_pages(path: Path) -> None:
    with opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def test_containers_share_the_page_cache(container: EngineContainer) -> None:
    other = container.store.create(102, template=SMALL)
    backing = container.store.template(SMALL).path / "big"
    with container.mounted(passthrough_above=0) as root, other.mounted(passthrough_above=0) as second:
        forget_pages(backing)
        assert cached_bytes(backing) == 0
        (root / "big").read_bytes()
        size = backing.stat().st_size
        assert cached_bytes(backing) == size
        (second / "big").read_bytes()
        with opened(second / "big", os.O_RDONLY) as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
            assert view[size - 1] >= 0
            assert own_pages(second / "big") == 0
        assert own_pages(root / "big") == own_pages(second / "big") == 0


def own_pages(path: Path) -> int:
    """Bytes that the mount itself caches of the file: cachestat(2) looks at its inode, not at the backing file's."""
    span = (ctypes.c_uint64 * 2)(0, 0)
    found = (ctypes.c_uint64 * 5)()
    with opened(path, os.O_RDONLY) as fd:
        if libc.syscall(451, fd, ctypes.byref(span), ctypes.byref(found), 0):
            raise OSError(ctypes.get_errno(), "cachestat")
    return int(found[0]) * PAGE


def test_backing_files_are_bounded_and_released(root: Path, container: EngineContainer) -> None:
    (root / "folder").mkdir()
    for number in range(300):
        (root / f"folder/{number}").write_bytes(b"x")
    fds = [os.open(root / f"folder/{number}", os.O_RDONLY) for number in range(300)]
    counted = container.stats()
    assert counted.backing_open == 300
    assert counted.backing_registered <= 300 + REGISTERED
    for number in range(150):  # gone, but open
        (root / f"folder/{number}").unlink()
    for fd in fds:
        assert os.pread(fd, 1, 0) == b"x"
        os.close(fd)
    wait_for(lambda: container.stats().backing_open == 0)
    before = settled(container).backing_registered
    for number in range(150, 300):
        (root / f"folder/{number}").unlink()
    after = settled(container).backing_registered
    assert after <= before - 150, "who is unlinked and closed needs none"


# --------------------------------------------------------------------------------------------- parallel directories


def test_directory_operations_at_once(root: Path, container: EngineContainer) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(40):
                path = root / "many" / f"{number}-{turn}"
                path.write_bytes(b"%d" % turn)
                path.rename(root / "many" / f"{number}-{turn}-renamed")
                os.listdir(root / "many")
                (root / "many" / f"{number}-{turn}-renamed").stat()
                if turn % 2:
                    (root / "many" / f"{number}-{turn}-renamed").unlink()
                (root / "many" / f"file-{number * 40 + turn:04}").unlink()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    names = {f"{number}-{turn}-renamed" for number in range(6) for turn in range(0, 40, 2)}
    names |= {f"file-{number:04}" for number in range(240, FILES)}
    assert set(os.listdir(root / "many")) == names


def test_one_name_made_by_many_at_once(root: Path) -> None:
    for turn in range(20):
        made: list[int] = []

        def work(path: Path = root / f"tmp/{turn}", made: list[int] = made) -> None:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                made.append(1)

        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1


# ------------------------------------------------------------------------------------------- the template is safe


def test_access_times_of_the_template_stay(root: Path, container: EngineContainer) -> None:
    template = container.store.template(SMALL).path
    names = ("etc/passwd", "lib/large", "bin/tool", "big")
    for name in names:  # so old that relatime would move them
        os.utime(template / name, ns=(1_000_000_000, (template / name).stat().st_mtime_ns))
    before = {name: (template / name).stat().st_atime_ns for name in names}
    for name in names:
        (root / name).read_bytes()
        with opened(root / name, os.O_RDONLY) as fd, mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
            assert len(view[:])
    subprocess.run([root / "bin/tool"], check=True, capture_output=True)
    assert {name: (template / name).stat().st_atime_ns for name in names} == before


def test_no_way_to_write_a_template_file_through_its_reader(root: Path, container: EngineContainer) -> None:
    for name in ("etc/passwd", "usr/share/pair-a"):
        data = (root / name).read_bytes()
        with opened(root / name, os.O_RDONLY) as fd:
            for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
                expect(errno.ETXTBSY, os.open, f"/proc/self/fd/{fd}", flags)
            expect(errno.EACCES, mmap.mmap, fd, len(data), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            view = mmap.mmap(fd, len(data), mmap.MAP_SHARED, mmap.PROT_READ)
            assert libc.mprotect(ctypes.c_void_p(_address(fd)), PAGE, 3) == -1 and ctypes.get_errno() == errno.EACCES
            expect(errno.EBADF, os.write, fd, b"x")
            expect(errno.EINVAL, os.ftruncate, fd, 0)
            expect(errno.EBADF, fallocate, fd, 0, 0, 100)
            private = mmap.mmap(fd, len(data), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
            private[0:3] = b"own"
            assert os.pread(fd, len(data), 0) == view[:] == data
            private.close()
            view.close()
        assert (container.store.template(SMALL).path / name).read_bytes() == data


@pytest.mark.parametrize("name", ["etc/passwd", "usr/share/pair-a"])
@pytest.mark.parametrize("way", ["open", "truncate", "other name"])
def test_a_refused_reopen_keeps_nobody_from_writing_by_name(root: Path, name: str, way: str) -> None:
    path = root / ("usr/share/pair-b" if way == "other name" and "pair" in name else name)
    data = path.read_bytes()
    with opened(root / name, os.O_RDONLY) as fd:
        path.stat()
        for _ in range(2):
            expect(errno.ETXTBSY, os.open, f"/proc/self/fd/{fd}", os.O_RDWR)
        if way == "truncate":
            os.truncate(path, 3)
            assert path.read_bytes() == data[:3]
        else:
            with opened(path, os.O_WRONLY) as writer:
                os.pwrite(writer, b"NEW", 0)
            assert path.read_bytes() == b"NEW" + data[3:]
        expect(errno.ETXTBSY, os.open, f"/proc/self/fd/{fd}", os.O_RDWR)
        assert os.pread(fd, 1000, 0) == data


def _address(fd: int) -> int:
    """Where this process has mapped the file."""
    info = os.fstat(fd)
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        if len(fields) > 4 and int(fields[4]) == info.st_ino:
            return int(fields[0].split("-")[0], 16)
    raise AssertionError("not mapped")


def test_a_reopen_for_writing_works_when_nobody_else_reads(root: Path) -> None:
    with opened(root / "etc/passwd", os.O_PATH) as fd, opened(Path(f"/proc/self/fd/{fd}"), os.O_RDWR) as writer:
        os.pwrite(writer, b"NEW", 0)
    assert (root / "etc/passwd").read_bytes().startswith(b"NEWt:")


def test_a_file_of_its_own_is_reopened_for_writing(root: Path) -> None:
    (root / "new").write_bytes(b"data")
    with opened(root / "new", os.O_RDONLY) as fd, opened(Path(f"/proc/self/fd/{fd}"), os.O_RDWR) as writer:
        os.pwrite(writer, b"NEW", 0)
        assert os.pread(fd, 10, 0) == b"NEWa"


# ---------------------------------------------------------------------------------------------- choosing the engine


def test_auto_takes_the_direct_engine_here(container: EngineContainer) -> None:
    with container.mounted(engine="auto"):
        status = container.status()
        assert (status.engine, status.passthrough) == ("direct", True)
        assert status.flags is not None
        assert {"PASSTHROUGH", "ALLOW_IDMAP", "HANDLE_KILLPRIV_V2", "POSIX_ACL", "PARALLEL_DIROPS"} <= set(status.flags)


WITHOUT_PERMISSION = """
import os, sys
from vzfs import Store, VzfsError
container = Store(sys.argv[1]).container(101)
try:
    root = container.mount(engine=sys.argv[2], timeout=60)
    status = container.status()
    print(status.engine, status.passthrough, (root / "etc/passwd").read_text(), os.listdir(root / "etc"))
    container.umount(timeout=60)
except VzfsError as error:
    print(type(error).__name__, error.message, error.remedy)
"""
"""Run as root of a user namespace, who may mount FUSE but not register backing files: that is for the node's root."""


def without_permission(container: EngineContainer, engine: str) -> str:
    namespace = ("unshare", "--user", "--mount", "--map-root-user", "--propagation", "private")
    program = (sys.executable, "-c", WITHOUT_PERMISSION, container.store.root, engine)
    return run(*namespace, *program, env=environment())


def test_nothing_is_passed_through_where_that_is_not_permitted(container: EngineContainer) -> None:
    said = without_permission(container, "auto")
    assert said.startswith("direct False root:x:0:0::/:/bin/sh")
    assert "'conf.d'" in said
    assert "FUSE passthrough needs CAP_SYS_ADMIN on the node" in (container.path / "vzfs.log").read_text()


def older(container: EngineContainer, withheld: InitFlag) -> EngineContainer:
    """The same container as on a kernel that doesn't offer some flags."""
    return EngineStore(container.store.root, "auto", withheld).container(container.ct)


def test_auto_takes_the_direct_engine_without_passthrough(container: EngineContainer) -> None:
    with older(container, NEWER).mounted():
        status = container.status()
        assert (status.engine, status.passthrough) == ("direct", False)
        assert status.flags is not None and not {"PASSTHROUGH", "HAS_RESEND", "AUTO_INVAL_DATA"} & set(status.flags)
    assert "this kernel has no FUSE passthrough" in (container.path / "vzfs.log").read_text()


def test_auto_takes_pyfuse3_where_the_kernel_is_too_old(container: EngineContainer) -> None:
    with older(container, NEWER | InitFlag.INIT_EXT).mounted():
        assert container.status().engine == "pyfuse3"
    assert "engine pyfuse3, because this kernel is too old for it" in (container.path / "vzfs.log").read_text()


def test_direct_says_why_it_can_not(container: EngineContainer) -> None:
    with pytest.raises(UnsupportedError, match="too old") as caught:
        older(container, NEWER | InitFlag.INIT_EXT).mount(engine="direct")
    assert "--engine pyfuse3" in caught.value.remedy
    with container.mounted(engine="direct"):  # nothing is left of the attempt
        assert container.status().engine == "direct"


def test_reading_moves_no_access_time(container: EngineContainer) -> None:
    """As the mount says (``noatime``): of the container's own files too, also when the kernel reads them by itself."""
    with container.mounted() as root:
        for name in ("lib/large", "etc/passwd", "own"):
            if name == "own":
                (root / name).write_bytes(b"own")
            else:
                os.close(os.open(root / name, os.O_WRONLY))
            os.utime(root / name, (1, time.time()))
            with opened(root / name, os.O_RDONLY) as fd, mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
                assert os.read(fd, 3) == view[:3]
            assert os.stat(root / name).st_atime == 1, name
            assert os.stat(container.path / "private" / name).st_atime == 1, name
        (root / "own").rename(root / "lib/moved")
        assert (root / "usr/share/doc/one/copyright").read_bytes()
        (root / "usr/share/doc/one/new").touch()
        links = [path for path in (container.path / "private/usr/share/doc/one").iterdir() if path.is_symlink()]
        assert links
        assert all(path.lstat().st_nlink > 1 for path in links), "not from the farm"
