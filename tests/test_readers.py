"""What open readers of a template file see when it is copied up, under each rule that a tree offers its engine."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vzfs import Store
from vzfs.tree.node import Node
from vzfs.tree.tree import Changes, Tree

OLD, NEW = b"template's data", b"container's data"
OpenTree = Callable[[int | None], Tree]
SERVED, PASSED = None, 0
"""Everything comes to the engine; every template file is read by the kernel itself, however small."""


@pytest.fixture
def open_tree(tmp_path: Path) -> OpenTree:
    source = tmp_path / "source"
    (source / "d").mkdir(parents=True)
    (source / "d/f").write_bytes(OLD)
    (source / "d/g").write_bytes(OLD)
    os.link(source / "d/g", source / "d/h")
    store = Store(tmp_path / "store")
    store.create_template("t", str(source))
    container = store.create(101, template="t")
    return lambda above: Tree(store.layout, container.path, passthrough_above=above)


def passed(tree: Tree, number: int) -> Node:
    """Open the node by passthrough."""
    with tree.lock:
        node = tree.keep(number)
        node.passed += 1
        return node


def closed(tree: Tree, node: Node) -> None:
    with tree.lock:
        node.passed -= 1
        tree.let_go(node)


def data(tree: Tree, number: int) -> bytes:
    fd, _ = tree.data_of(number, os.O_RDONLY)
    try:
        return os.pread(fd, 100, 0)
    finally:
        os.close(fd)


def number_of(tree: Tree, name: bytes) -> int:
    directory = tree.lookup(1, b"d")
    assert directory is not None
    entry = tree.lookup(directory.number, name)
    assert entry is not None
    return entry.number


@pytest.mark.parametrize("name", [b"f", b"g"])
def test_shared_readers_see_the_copy(open_tree: OpenTree, name: bytes) -> None:
    tree = open_tree(SERVED)
    number = number_of(tree, name)
    reader = tree.open(number, os.O_RDONLY)
    writer = tree.open(number, os.O_WRONLY)
    os.pwrite(writer.fd, NEW, 0)
    assert os.pread(reader.fd, 100, 0) == NEW
    assert number_of(tree, name) == number
    tree.close()


@pytest.mark.parametrize("name", [b"f", b"g"])
def test_kept_readers_keep_the_template(open_tree: OpenTree, name: bytes) -> None:
    tree = open_tree(PASSED)
    number = number_of(tree, name)
    before = tree.getattr(number)
    reader = passed(tree, number)
    with pytest.raises(OSError) as refusal:
        tree.open(number, os.O_WRONLY)
    assert refusal.value.errno == errno.ESTALE

    copy = number_of(tree, name)
    assert copy != number
    assert tree.getattr(copy).ino == before.ino
    writer = tree.open(copy, os.O_WRONLY)
    os.pwrite(writer.fd, NEW, 0)
    assert data(tree, number) == OLD
    assert tree.getattr(number) == before
    late = tree.open(copy, os.O_RDONLY)
    assert os.pread(late.fd, 100, 0) == NEW

    closed(tree, reader)
    tree.forget(number, 1)
    assert number_of(tree, name) == copy
    tree.close()

    tree = open_tree(PASSED)
    assert number_of(tree, name) == copy
    assert tree.getattr(copy).ino == before.ino
    assert tree.getattr(copy).size == len(NEW)
    tree.close()

    tree = open_tree(SERVED)
    assert number_of(tree, name) == number
    tree.close()


def test_truncation_past_kept_readers_asks_to_look_again(open_tree: OpenTree) -> None:
    tree = open_tree(PASSED)
    number = number_of(tree, b"f")
    reader = passed(tree, number)
    assert reader.is_open
    with pytest.raises(OSError) as refusal:
        tree.setattr(number, Changes(size=3))
    assert refusal.value.errno == errno.ESTALE
    copy = number_of(tree, b"f")
    assert tree.setattr(copy, Changes(size=3)).size == 3
    assert data(tree, number) == OLD
    tree.close()


def test_without_readers_nothing_is_split(open_tree: OpenTree) -> None:
    tree = open_tree(PASSED)
    number = number_of(tree, b"f")
    writer = tree.open(number, os.O_WRONLY)
    os.pwrite(writer.fd, NEW, 0)
    assert number_of(tree, b"f") == number
    tree.close()
