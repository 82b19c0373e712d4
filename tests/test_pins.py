"""Removed files that nobody has open: they have no name any more, and stay what they were until they are forgotten."""

from __future__ import annotations

import errno
import gc
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.realuse_helpers import loop_mounted
from vzfs import Container, Store
from vzfs.tree.become.speed import SLOW_COPY
from vzfs.tree.durable import DURABLE_WORDS, PINS, Durable
from vzfs.tree.node import ROOT_NUMBER
from vzfs.tree.tree import ROOT, Changes, Tree

DATA = b"container's data"


@pytest.fixture
def container(tmp_path: Path) -> Container:
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(b"template's data")
    store = Store(tmp_path / "store")
    store.create_template("t", str(source))
    return store.create(101, template="t")


@pytest.fixture
def slots() -> list[int]:
    return [0] * DURABLE_WORDS


@pytest.fixture
def tree(container: Container, slots: list[int]) -> Iterator[Tree]:
    tree = Tree(container.store.layout, container.path, passthrough_above=0, durable=slots)
    yield tree
    tree.close()


def make(tree: Tree, name: bytes, data: bytes = DATA) -> int:
    handle, entry = tree.create(ROOT_NUMBER, name, 0o644, os.O_WRONLY | os.O_EXCL, ROOT)
    os.write(handle.fd, data)
    tree.release(handle.number)
    return entry.number


def read(tree: Tree, number: int) -> bytes:
    fd, _ = tree.data_of(number, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def orphans(container: Container) -> list[str]:
    return os.listdir(container.path / "cow/orphans")


def descriptors() -> int:
    gc.collect()  # what earlier tests left
    return len(os.listdir("/proc/self/fd"))


def expect(code: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError) as failure:
        call(*arguments)
    assert failure.value.errno == code


def test_it_has_no_name_and_stays_usable_until_it_is_forgotten(
    tree: Tree, container: Container, slots: list[int]
) -> None:
    before = descriptors()
    number = make(tree, b"own")
    tree.unlink(ROOT_NUMBER, b"own")
    assert orphans(container) == []
    assert [number for number, _ in Durable(slots).pinned()] == [number]
    told = tree.getattr(number)
    assert (told.nlink, told.size, stat.S_ISREG(told.mode)) == (0, len(DATA), True)
    assert read(tree, number) == DATA
    fd, _ = tree.data_of(number, os.O_WRONLY)
    os.write(fd, b"C")
    os.close(fd)
    tree.setattr(number, Changes(mode=0o600, uid=5, gid=6, size=9, mtime_ns=7))
    told = tree.getattr(number)
    assert (stat.S_IMODE(told.mode), told.uid, told.gid, told.size, told.mtime_ns) == (0o600, 5, 6, 9, 7)
    assert read(tree, number) == b"C" + DATA[1:9]
    tree.setxattr(number, b"user.a", b"1")
    assert (tree.getxattr(number, b"user.a"), tree.listxattr(number)) == (b"1", [b"user.a"])
    tree.removexattr(number, b"user.a")
    expect(errno.ENODATA, tree.getxattr, number, b"user.a")
    expect(errno.ENOENT, tree.link, number, ROOT_NUMBER, b"again")
    tree.forget(number, 1)
    assert not list(Durable(slots).pinned())
    assert descriptors() == before
    expect(errno.ESTALE, tree.getattr, number)


@pytest.mark.parametrize("kind", ["symlink", "fifo"])
def test_what_is_no_file_stays_too(tree: Tree, container: Container, kind: str) -> None:
    if kind == "symlink":
        number = tree.symlink(ROOT_NUMBER, b"own", b"//vz/template/x", ROOT).number
    else:
        number = tree.mknod(ROOT_NUMBER, b"own", stat.S_IFIFO | 0o640, 0, ROOT).number
    was = tree.getattr(number)
    tree.unlink(ROOT_NUMBER, b"own")
    assert orphans(container) == []
    told = tree.getattr(number)
    assert told._replace(ctime_ns=0) == was._replace(nlink=0, ctime_ns=0)
    if kind == "symlink":
        assert tree.readlink(number) == b"//vz/template/x"
    tree.setattr(number, Changes(uid=5, gid=6))


def test_its_number_is_no_other_files_meanwhile(tree: Tree) -> None:
    numbers = set()
    for _ in range(50):
        numbers.add(make(tree, b"own"))
        tree.unlink(ROOT_NUMBER, b"own")
    assert len(numbers) == 50


def test_a_rename_over_it_does_the_same(tree: Tree, container: Container) -> None:
    number = make(tree, b"own")
    make(tree, b"other", b"other")
    tree.rename(ROOT_NUMBER, b"other", ROOT_NUMBER, b"own")
    assert orphans(container) == []
    assert read(tree, number) == DATA
    tree.forget(number, 1)
    expect(errno.ESTALE, tree.getattr, number)


def test_a_copied_up_file_does_the_same(tree: Tree, container: Container) -> None:
    entry = tree.lookup(ROOT_NUMBER, b"f")
    assert entry
    tree.own_file(entry.number)
    tree.unlink(ROOT_NUMBER, b"f")
    assert orphans(container) == []
    assert read(tree, entry.number) == b"template's data"


def test_what_is_open_or_large_gets_a_name(tree: Tree, container: Container) -> None:
    handle, entry = tree.create(ROOT_NUMBER, b"open", 0o644, os.O_WRONLY | os.O_EXCL, ROOT)
    tree.unlink(ROOT_NUMBER, b"open")
    assert orphans(container) == [str(entry.number)]
    tree.release(handle.number)
    tree.forget(entry.number, 1)
    large = make(tree, b"large", b"x" * (SLOW_COPY + 4096))
    assert tree.unlink(ROOT_NUMBER, b"large") == large
    assert orphans(container) == [str(large)]
    tree.free(large)
    assert orphans(container) == []


def test_what_is_too_many_gets_a_name(tree: Tree, container: Container, slots: list[int]) -> None:
    before = descriptors()
    numbers = []
    for count in range(PINS + 3):
        numbers.append(make(tree, b"%d" % count))
        tree.unlink(ROOT_NUMBER, b"%d" % count)
    assert len(list(Durable(slots).pinned())) == PINS
    assert sorted(orphans(container)) == sorted(map(str, numbers[PINS:]))
    for number in numbers:
        tree.forget(number, 1)
    assert not list(Durable(slots).pinned())
    assert orphans(container) == []
    assert descriptors() == before


def test_without_descriptors_it_gets_a_name(tree: Tree, container: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    number = make(tree, b"own")
    real = os.open

    def full(path: bytes, flags: int, *arguments: int, dir_fd: int | None = None) -> int:
        if flags & os.O_PATH:
            raise OSError(errno.EMFILE, "too many open files")
        return real(path, flags, *arguments, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        tree.unlink(ROOT_NUMBER, b"own")
    assert orphans(container) == [str(number)]
    assert read(tree, number) == DATA


def test_a_failed_unlink_keeps_nothing(tree: Tree, slots: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    number = make(tree, b"own")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "a bad disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        expect(errno.EIO, tree.unlink, ROOT_NUMBER, b"own")
    assert (any(Durable(slots).pinned()), descriptors()) == (False, before)
    assert tree.getattr(number).nlink == 1
    tree.unlink(ROOT_NUMBER, b"own")


def test_a_successor_gives_no_new_file_the_same_number(tmp_path: Path, slots: list[int]) -> None:
    """On ext4 with a journal, which gives the number of a removed file to the next one."""
    with loop_mounted(tmp_path / "image", tmp_path / "there", 64 << 20) as there:
        (tmp_path / "source").mkdir()
        store = Store(there / "store")
        store.create_template("t", str(tmp_path / "source"))
        container = store.create(101, template="t")
        dead = Tree(store.layout, container.path, passthrough_above=0, durable=slots)
        kept = [make(dead, b"own%d" % count) for count in range(20)]
        for count in range(20):
            dead.unlink(ROOT_NUMBER, b"own%d" % count)
        shared = list(slots)
        dead.close()  # as its death does, this closes its descriptors; only what it shared is left
        tree = Tree(store.layout, container.path, passthrough_above=0, resume=True, durable=shared)
        for number in kept:
            assert tree.getattr(number).nlink == 0
            assert stat.S_ISREG(tree.getattr(number).mode)
            with pytest.raises(OSError, match="the node is gone"):  # what was in it went with the descriptor
                tree.data_of(number, os.O_RDONLY)
        for count in range(30):
            entry = tree.mknod(ROOT_NUMBER, b"new%d" % count, stat.S_IFREG | 0o600, 0, ROOT)
            assert entry.number not in kept, "to the kernel that would be the end of the removed one"
        folder = tree.mkdir(ROOT_NUMBER, b"folder", 0o755, ROOT)
        nameless, _ = tree.tmpfile(ROOT_NUMBER, 0o600, os.O_RDWR, ROOT)
        assert not {folder.number, nameless.node.number} & set(kept)
        tree.release(nameless.number)
        standing = {int(name) for name in orphans(container)} & set(kept)
        assert standing, "the file system gave none of the numbers again, so this shows nothing"
        for number in kept:
            tree.forget(number, 1)
        assert not {int(name) for name in orphans(container)} & set(kept)
        assert not list(Durable(shared).pinned())
        tree.close()
