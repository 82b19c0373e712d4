"""ID-mapped mounts of a container's root, and a user-namespaced process on one: how a container without root runs.

The mapping is 0 -> 100000 for 65536 users: what belongs to root in the store belongs to user 100000 of the node, who is
root of the user namespace. The store never holds a mapped number.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import SMALL, make_source, posix_acl
from tests.engines import EngineContainer, EngineStore
from tests.realuse_helpers import expect, in_child, unmount_below, wait_for
from vzfs import linux as calls
from vzfs.errors import BusyError

BASE, COUNT = 100_000, 65_536
_CLONE_NEWUSER = 0x10000000
_NR_OPEN_TREE, _NR_MOVE_MOUNT, _NR_MOUNT_SETATTR = 428, 429, 442  # the same everywhere
_AT_FDCWD, _AT_EMPTY_PATH, _MOVE_MOUNT_F_EMPTY_PATH = -100, 0x1000, 4
_OPEN_TREE_CLONE, _MOUNT_ATTR_IDMAP = 1, 0x100000
NOBODY = 0xFFFFFFFF
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


@pytest.fixture(scope="module")
def namespace() -> Iterator[int]:
    """A user namespace, by its descriptor."""
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        libc.unshare(_CLONE_NEWUSER)
        os.write(told, b"x")
        signal.pause()
        os._exit(0)
    os.read(ready, 1)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text(f"0 {BASE} {COUNT}\n")
    fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    yield fd
    for one in (fd, ready, told):
        os.close(one)


def mount_mapped(source: Path, target: Path, namespace: int) -> None:
    """Mount ``source`` a second time, at ``target``, with its owners mapped."""
    target.mkdir()
    tree = check(libc.syscall(_NR_OPEN_TREE, _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE))
    try:
        wanted = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, namespace)
        check(libc.syscall(_NR_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, wanted, len(wanted)))
        check(
            libc.syscall(
                _NR_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
            )
        )
    finally:
        os.close(tree)


@pytest.fixture
def container(clean_path: Path) -> EngineContainer:
    store = EngineStore(clean_path / "vz", "direct")
    source = make_source(clean_path / "source")
    (source / "home").mkdir()
    os.chown(source / "home", 1000, 1000)
    (source / "home/file").write_bytes(b"the user's\n")
    os.chown(source / "home/file", 1000, 1000)
    (source / "home/file").chmod(0o644)
    (source / "home").chmod(0o755)
    (source / "bin/su").chmod(0o4777)
    (source / "var/mail").chmod(0o2775)
    store.create_template(SMALL, str(source))
    return store.create(101, template=SMALL)


@pytest.fixture
def plain(container: EngineContainer, clean_path: Path) -> Iterator[Path]:
    """The container's root, mounted without a mapping; all its files must stay within what the namespace has."""
    with container.mounted() as root:
        try:
            yield root
        finally:
            unmount_below(clean_path / "mapped")
    assert container.check() == []
    assert container.store.template(SMALL).verify() == []
    for folder, folders, files in os.walk(container.path / "private"):
        for name in folders + files:
            info = os.lstat(os.path.join(folder, name))
            assert info.st_uid < COUNT and info.st_gid < COUNT, name


@pytest.fixture
def mapped(plain: Path, clean_path: Path, namespace: int) -> Path:
    """The same root with its owners mapped."""
    mount_mapped(plain, clean_path / "mapped", namespace)
    return clean_path / "mapped"


def inside(root: Path, namespace: int, work: Callable[..., object], *arguments: object, uid: int = 0) -> None:
    """Call ``work`` as user ``uid`` of the namespace, in ``root``."""

    def enter() -> None:
        os.chdir(root)
        os.umask(0o022)
        check(libc.setns(namespace, _CLONE_NEWUSER))
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(0, 0, 0)
        os.setresuid(uid, uid, uid)  # from root's number, so capabilities go
        work(*arguments)

    in_child(enter)


def owner(path: Path | str) -> tuple[int, int]:
    info = os.lstat(path)
    return info.st_uid, info.st_gid


# ------------------------------------------------------------------------------------------------------- what is shown


def test_owners_are_mapped(plain: Path, mapped: Path, namespace: int) -> None:
    wanted = {"etc/passwd": (0, 0), "usr/share/pair-a": (1000, 1000), "etc/shadow": (0, 42), "var/mail": (0, 8)}
    for name, (uid, gid) in wanted.items():
        assert owner(plain / name) == (uid, gid)
        assert owner(mapped / name) == (BASE + uid, BASE + gid)

    def work() -> None:
        assert {name: owner(name) for name in wanted} == wanted

    inside(mapped, namespace, work)


def test_both_mounts_are_one_file_system(plain: Path, mapped: Path) -> None:
    (plain / "new").write_bytes(b"data")
    assert (mapped / "new").read_bytes() == b"data"
    assert (plain / "new").stat().st_ino == (mapped / "new").stat().st_ino
    (mapped / "new").unlink()
    assert not (plain / "new").exists()


# -------------------------------------------------------------------------------------------------------- what is made


def make_everything() -> None:
    os.mkdir("tmp/folder")
    Path("tmp/folder/file").write_bytes(b"data")
    os.symlink("file", "tmp/folder/symlink")
    os.mkfifo("tmp/folder/fifo")
    os.mknod("tmp/folder/socket", stat.S_IFSOCK | 0o600)
    os.link("tmp/folder/file", "tmp/folder/link")
    fd = os.open("tmp/folder", os.O_TMPFILE | os.O_RDWR, 0o600)
    assert os.fstat(fd).st_uid == os.geteuid()
    check(libc.linkat(_AT_FDCWD, f"/proc/self/fd/{fd}".encode(), _AT_FDCWD, b"tmp/folder/tmpfile", 0x400))
    os.close(fd)
    for name in os.listdir("tmp/folder"):
        assert owner(f"tmp/folder/{name}") == (os.geteuid(), os.getegid()), name


@pytest.mark.parametrize("uid", [0, 1000])
def test_what_is_made_belongs_to_its_maker(
    plain: Path, mapped: Path, container: EngineContainer, namespace: int, uid: int
) -> None:
    inside(mapped, namespace, make_everything, uid=uid)
    names = sorted(os.listdir(plain / "tmp/folder"))
    assert names == ["fifo", "file", "link", "socket", "symlink", "tmpfile"]
    for name in names:
        assert owner(plain / "tmp/folder" / name) == (uid, uid)
        assert owner(mapped / "tmp/folder" / name) == (BASE + uid, BASE + uid)
        assert owner(container.path / "private/tmp/folder" / name) == (uid, uid), "as it lies in the store"


def test_device_nodes_are_not_for_a_namespace(mapped: Path, namespace: int) -> None:
    inside(mapped, namespace, expect, errno.EPERM, os.mknod, "tmp/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))


def test_a_setgid_directory_hands_its_group_down(plain: Path, mapped: Path, namespace: int) -> None:
    def work() -> None:
        Path("var/mail/new").write_bytes(b"")
        os.mkdir("var/mail/folder")

    inside(mapped, namespace, work)
    assert owner(plain / "var/mail/new") == owner(plain / "var/mail/folder") == (0, 8)
    assert (plain / "var/mail/folder").stat().st_mode & stat.S_ISGID


def test_who_is_not_mapped_makes_nothing(plain: Path, mapped: Path) -> None:
    """The node's own root, who has all rights here but no number in the mapping."""
    for make in (
        lambda: os.mkdir(mapped / "tmp/new"),
        lambda: os.close(os.open(mapped / "tmp/new", os.O_CREAT | os.O_WRONLY)),
        lambda: os.symlink("x", mapped / "tmp/new"),
        lambda: os.mkfifo(mapped / "tmp/new"),
        lambda: os.close(os.open(mapped / "tmp", os.O_TMPFILE | os.O_RDWR)),
    ):
        expect(errno.EOVERFLOW, make)
    assert os.listdir(plain / "tmp") == []


# ----------------------------------------------------------------------------------------------------- what is changed


@pytest.mark.parametrize("name", ["etc/passwd", "etc/conf.d", "etc/relative", "tmp/new"])
def test_chown(plain: Path, mapped: Path, namespace: int, name: str) -> None:
    def work() -> None:
        if name == "tmp/new":
            Path(name).write_bytes(b"")
        os.chown(name, 1000, 2000, follow_symlinks=False)
        assert owner(name) == (1000, 2000)
        os.chown(name, -1, 3000, follow_symlinks=False)
        assert owner(name) == (1000, 3000)
        expect(errno.EINVAL, os.chown, name, COUNT + 5, 0, follow_symlinks=False)

    inside(mapped, namespace, work)
    assert owner(plain / name) == (1000, 3000)
    assert owner(mapped / name) == (BASE + 1000, BASE + 3000)
    os.chown(mapped / name, BASE + 7, BASE + 8, follow_symlinks=False)  # by the node's root
    assert owner(plain / name) == (7, 8)
    expect(errno.EOVERFLOW, os.chown, mapped / name, 5, 5, follow_symlinks=False)


def test_the_namespaces_root_changes_files_of_the_template(plain: Path, mapped: Path, namespace: int) -> None:
    def work() -> None:
        with open("etc/shadow", "a") as file:
            file.write("user:*::\n")
        os.chmod("etc/passwd", 0o600)
        os.truncate("lib/large", 100)
        os.utime("etc/empty", (5, 5))
        os.rename("home/file", "home/moved")
        os.unlink("etc/with-acl")
        os.setxattr("etc/conf.d/a.conf", "user.new", b"value")
        expect(errno.EPERM, os.setxattr, "etc/conf.d/a.conf", "trusted.new", b"value")

    inside(mapped, namespace, work)
    assert (plain / "etc/shadow").read_text().endswith("user:*::\n")
    assert owner(plain / "etc/shadow") == (0, 42)
    assert stat.S_IMODE((plain / "etc/passwd").stat().st_mode) == 0o600
    assert (plain / "lib/large").stat().st_size == 100
    assert (plain / "etc/empty").stat().st_mtime == 5
    assert owner(plain / "home/moved") == (1000, 1000)
    assert not (plain / "etc/with-acl").exists()
    assert os.getxattr(plain / "etc/conf.d/a.conf", "user.new") == b"value"


# ---------------------------------------------------------------------------------------------------------- permission


def test_permission(mapped: Path, namespace: int) -> None:
    def user() -> None:
        assert Path("home/file").read_bytes() == b"the user's\n"
        with open("home/file", "ab") as file:
            file.write(b"more\n")
        Path("home/new").write_bytes(b"")
        expect(errno.EACCES, os.open, "etc/shadow", os.O_RDONLY)
        expect(errno.EACCES, os.open, "etc/passwd", os.O_WRONLY)
        expect(errno.EACCES, os.mkdir, "etc/new")
        expect(errno.EPERM, os.chown, "home/file", 0, 0)
        expect(errno.EPERM, os.chmod, "etc/passwd", 0o777)
        expect(errno.EACCES, os.listdir, "var/empty")

    def root() -> None:
        assert Path("etc/shadow").read_bytes() == b"root:*::\n"
        assert os.listdir("var/empty") == []
        os.mkdir("etc/new")

    inside(mapped, namespace, user, uid=1000)
    inside(mapped, namespace, root)


def test_a_user_of_the_node_is_a_stranger(mapped: Path) -> None:
    def work() -> None:
        os.chdir(mapped)
        os.setgroups([])
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
        expect(errno.EACCES, os.open, "home/file", os.O_WRONLY)
        expect(errno.EACCES, os.open, "etc/shadow", os.O_RDONLY)
        assert Path("etc/passwd").read_bytes()
        expect(errno.EOVERFLOW, os.mkdir, "tmp/new")

    in_child(work)


def test_access_lists_are_mapped(plain: Path, mapped: Path, namespace: int) -> None:
    def work() -> None:
        Path("tmp/new").write_bytes(b"data")
        os.chmod("tmp/new", 0o600)
        entries = ((0x01, 6, NOBODY), (0x02, 4, 1000), (0x04, 0, NOBODY), (0x10, 4, NOBODY), (0x20, 0, NOBODY))
        os.setxattr("tmp/new", "system.posix_acl_access", posix_acl(*entries))

    def reader() -> None:
        assert Path("tmp/new").read_bytes() == b"data"
        expect(errno.EACCES, os.open, "tmp/new", os.O_WRONLY)

    inside(mapped, namespace, work)
    inside(mapped, namespace, reader, uid=1000)
    inside(mapped, namespace, expect, errno.EACCES, os.open, "tmp/new", os.O_RDONLY, uid=1001)
    shown = subprocess.run(["getfacl", "--numeric", "tmp/new"], cwd=plain, capture_output=True, text=True, check=True)
    assert "user:1000:r--" in shown.stdout
    shown = subprocess.run(["getfacl", "--numeric", "tmp/new"], cwd=mapped, capture_output=True, text=True, check=True)
    assert f"user:{BASE + 1000}:r--" in shown.stdout


def test_set_id_bits_go_with_a_users_write(plain: Path, mapped: Path, namespace: int) -> None:
    def work() -> None:
        with open("bin/su", "ab") as file:
            file.write(b"changed")

    inside(mapped, namespace, work, uid=1000)
    assert not (plain / "bin/su").stat().st_mode & stat.S_ISUID


def test_data_is_passed_through_here_too(mapped: Path, container: EngineContainer, namespace: int) -> None:
    def work() -> None:
        Path("tmp/new").write_bytes(b"x" * 1_000_000)
        Path("tmp/new").read_bytes()
        Path("lib/large").read_bytes()

    inside(mapped, namespace, work)
    assert not {"READ", "WRITE"} & set(container.stats().requests)


def test_a_mapped_mount_outlives_the_other(container: EngineContainer, clean_path: Path, namespace: int) -> None:
    root = container.mount()
    mount_mapped(root, clean_path / "mapped", namespace)
    with pytest.raises(BusyError) as refusal:
        container.umount(timeout=1)
    assert str(clean_path / "mapped") in str(refusal.value)
    assert (clean_path / "mapped/etc/passwd").read_bytes()
    calls.umount2(os.fsencode(clean_path / "mapped"), 0)
    container.umount()
    wait_for(lambda: not container.status().mounted)
