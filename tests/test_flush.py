"""A copy's data is on the disk before the name under which it is seen, on whichever file system."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.realuse_helpers import loop_mounted, run, unmount_below
from vzfs import Container, Store
from vzfs import linux as calls
from vzfs.store.flush import flusher, has_own_journal
from vzfs.tree.node import ROOT_NUMBER
from vzfs.tree.tree import Tree

SIZE = 64 << 20
OLD, NEW = b"old" * 10_000, b"new" * 10_000


def device(folder: Path) -> int:
    return os.stat(folder).st_dev


@pytest.mark.parametrize(
    ("filesystem", "options", "journal"),
    [("ext4", [], True), ("ext4", ["-O", "^has_journal"], False), ("ext2", [], False)],
)
def test_a_journal_is_found(tmp_path: Path, filesystem: str, options: list[str], journal: bool) -> None:
    with loop_mounted(tmp_path / "image", tmp_path / "there", SIZE, filesystem, options) as there:
        assert has_own_journal(device(there)) is journal
        fd = os.open(there, os.O_RDONLY)
        assert flusher(fd) is (calls.write_out if journal else os.fdatasync)
        os.close(fd)


def test_a_journal_elsewhere_is_none_of_its_own(tmp_path: Path) -> None:
    """It flushes only the disk it lies on."""
    for name in ("image", "journal"):
        with open(tmp_path / name, "xb") as file:
            file.truncate(SIZE)
    loops = []
    there = tmp_path / "there"
    there.mkdir()
    try:
        for name in ("journal", "image"):
            done = subprocess.run(["losetup", "--find", "--show", tmp_path / name], capture_output=True, text=True)
            loops.append(done.stdout.strip())
        run("mkfs.ext4", "-q", "-b", "4096", "-O", "journal_dev", loops[0])
        run("mkfs.ext4", "-q", "-b", "4096", "-J", f"device={loops[0]}", loops[1])
        run("mount", loops[1], there)
        assert not has_own_journal(device(there))
    finally:
        unmount_below(there)
        for loop in loops:
            run("losetup", "--detach", loop)


def test_what_is_no_block_device_has_none(tmp_path: Path) -> None:
    run("mount", "-t", "tmpfs", "tmpfs", tmp_path)
    try:
        assert not has_own_journal(device(tmp_path))
    finally:
        unmount_below(tmp_path)


# ------------------------------------------------------------------------------------------------- the power goes off


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """On ext4 with its journal, without the kernel's own help for programs that forget to flush before a rename."""
    with loop_mounted(tmp_path / "image", tmp_path / "there", SIZE) as there:
        run("mount", "-o", "remount,noauto_da_alloc", there)
        (tmp_path / "source").mkdir()
        (tmp_path / "source/f").write_bytes(OLD)
        store = Store(there / "store")
        store.create_template("t", str(tmp_path / "source"))
        yield store


def copied_up(container: Container, *, flush: bool) -> None:
    """Copy a file up, and let the journal alone reach the disk."""
    tree = Tree(container.store.layout, container.path)
    if not flush:
        tree._copies._flush = lambda fd: None
    entry = tree.lookup(ROOT_NUMBER, b"f")
    assert entry
    tree.own_file(entry.number)
    fd = os.open(container.path / "journal", os.O_WRONLY | os.O_CREAT, 0o600)
    os.fsync(fd)  # a commit of all metadata changed so far
    os.close(fd)


def after_power_failure(container: Container, tmp_path: Path) -> bytes:
    """What is under the file's name on a copy of the disk as it is now, once its journal has been replayed."""
    image = tmp_path / "copy"
    shutil.copyfile(tmp_path / "image", image)
    where = tmp_path / "restored"
    where.mkdir()
    run("mount", "-o", "loop", image, where)
    try:
        area = where / container.path.relative_to(tmp_path / "there") / "private"
        found = area / "f"
        assert not found.is_symlink(), "the rename is not in the journal: nothing is tried"
        return found.read_bytes()
    finally:
        unmount_below(where)


def test_a_power_failure_leaves_the_copy_whole(store: Store, tmp_path: Path) -> None:
    container = store.create(101, template="t")
    copied_up(container, flush=True)
    assert after_power_failure(container, tmp_path) == OLD


def test_without_flushing_it_would_not(store: Store, tmp_path: Path) -> None:
    """That the test above can fail."""
    container = store.create(101, template="t")
    copied_up(container, flush=False)
    assert after_power_failure(container, tmp_path) != OLD
