"""File handles (name_to_handle_at(2)): they outlive the kernel's memory and the mount, and never mean another file."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from tests.engines import EngineContainer, EngineStore
from tests.realuse_helpers import expect, loop_mounted

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_ROOM = 128


def handle_of(path: Path) -> bytes:
    """What name_to_handle_at(2) gives: ``struct file_handle``."""
    handle = ctypes.create_string_buffer(_ROOM.to_bytes(4, "little") + bytes(4 + _ROOM))
    mount_id = ctypes.c_int()
    if _libc.name_to_handle_at(_AT_FDCWD, os.fsencode(path), handle, ctypes.byref(mount_id), 0) < 0:
        raise OSError(ctypes.get_errno(), "name_to_handle_at", path)
    return handle.raw


def open_handle(root: Path, handle: bytes, flags: int = os.O_RDONLY) -> int:
    """A descriptor of what the handle means on the file system at ``root``."""
    mount = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = _libc.open_by_handle_at(mount, ctypes.create_string_buffer(handle), flags)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "open_by_handle_at")
        return int(fd)
    finally:
        os.close(mount)


def inode_of(root: Path, handle: bytes) -> int:
    fd = open_handle(root, handle)
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def forget_everything() -> None:
    """Let the kernel forget names and inodes that nobody uses."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("2")


@pytest.fixture
def container(clean_path: Path) -> EngineContainer:
    source = clean_path / "source"
    (source / "deep/er/est").mkdir(parents=True)
    (source / "deep/er/est/file").write_bytes(b"template's")
    (source / "other/moving").mkdir(parents=True)
    (source / "other/moving/file").write_bytes(b"moving")
    (source / "changed").write_bytes(b"old")
    store = EngineStore(clean_path / "vz", "direct")
    store.create_template("t", str(source))
    return store.create(101, template="t")


def test_a_handle_outlives_the_kernels_memory_and_the_mount(container: EngineContainer) -> None:
    root = container.mount()
    (root / "own/below/it").mkdir(parents=True)
    (root / "own/below/it/file").write_bytes(b"own")
    (root / "changed").write_bytes(b"new")
    (root / "other/moving").rename(root / "own/moved")
    paths = [
        "deep/er/est/file",
        "deep/er/est",
        "deep",
        "changed",
        "own/below/it/file",
        "own/below/it",
        "own/moved",
        "own/moved/file",
        ".",
    ]
    handles = {path: handle_of(root / path) for path in paths}
    numbers = {path: (root / path).stat().st_ino for path in paths}
    forget_everything()
    assert {path: inode_of(root, handle) for path, handle in handles.items()} == numbers
    container.umount()
    root = container.mount()
    assert {path: inode_of(root, handle) for path, handle in handles.items()} == numbers
    fd = open_handle(root, handles["own/below/it/file"], os.O_RDWR)
    assert os.pread(fd, 10, 0) == b"own"
    os.pwrite(fd, b"OWN", 0)
    os.close(fd)
    assert (root / "own/below/it/file").read_bytes() == b"OWN"
    container.umount()


def test_a_handle_of_a_removed_file_means_no_other(tmp_path: Path) -> None:
    """On an ext4 with a journal, which gives the number of a removed file to the next one."""
    with loop_mounted(tmp_path / "image", tmp_path / "disk", 64 << 20) as disk:
        (tmp_path / "source").mkdir()
        store = EngineStore(disk / "vz", "direct")
        store.create_template("t", str(tmp_path / "source"))
        container = store.create(101, template="t")
        for remounted in (False, True):
            root = container.mount()
            old = {}
            for number in range(20):
                (root / f"old{number}").write_bytes(b"old")
                info = (root / f"old{number}").stat()
                old[info.st_ino] = handle_of(root / f"old{number}")
            for number in range(20):
                (root / f"old{number}").unlink()
            forget_everything()
            if remounted:
                container.umount()
                root = container.mount()
            new = []
            for number in range(40):
                (root / f"new{remounted}{number}").write_bytes(b"new")
                new.append((root / f"new{remounted}{number}").stat().st_ino)
            forget_everything()
            assert set(new) & set(old), "no number was used again, so this shows nothing"
            for handle in old.values():
                expect(errno.ESTALE, open_handle, root, handle)
            container.umount()


def test_garbage_is_stale(container: EngineContainer) -> None:
    with container.mounted() as root:
        good = handle_of(root / "changed")
        for at in range(8, 8 + 12):
            bad = bytearray(good)
            bad[at] ^= 0x55
            try:
                fd = open_handle(root, bytes(bad))
            except OSError as error:
                assert error.errno in (errno.ESTALE, errno.EINVAL), error
            else:
                os.close(fd)
        assert (root / "changed").read_bytes() == b"old"
