"""What the tree offers an engine that talks to the kernel itself: ready-made answers, listings without open
directories, files open without a descriptor, files without a name, and going on where a dead process stopped.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vzfs import Container, Store
from vzfs import linux as calls
from vzfs.store.index import LIFETIME_S, Attributes
from vzfs.store.xattrs import ORIGIN_XATTR, SPLIT_XATTR
from vzfs.tree.listing import END, REAL_OFFSETS
from vzfs.tree.node import ROOT_NUMBER, Entry
from vzfs.tree.tree import ROOT, Caller, Changes, Tree

USER = Caller(1000, 1001, 0o022)
OLD, NEW = b"template's data", b"container's data"
MANY = 300
"""Files in one directory of the template: several answers of the usual size."""


@pytest.fixture
def container(tmp_path: Path) -> Container:
    source = tmp_path / "source"
    for folder in ("many", "d/e/g", "empty", "other"):
        (source / folder).mkdir(parents=True)
    for number in range(MANY):
        (source / f"many/{number:04d}{'x' * (number % 60)}").write_bytes(b"%d" % number)
    for name in ("f", "one", "d/f", "d/e/f", "d/e/g/f"):
        (source / name).write_bytes(OLD)
    os.link(source / "one", source / "d/two")
    os.link(source / "one", source / "other/three")
    os.symlink("f", source / "d/link")
    os.mkfifo(source / "d/fifo")
    os.setxattr(source / "d/e/f", "user.key", b"value")
    store = Store(tmp_path / "store")
    store.create_template("t", str(source))
    return store.create(101, template="t")


Opening = Callable[..., Tree]


@pytest.fixture
def opening(container: Container) -> Iterator[Opening]:
    """Opens the container's tree; those that are left open are closed."""
    trees: list[Tree] = []

    def opening(*, resume: bool = False, changed: Callable[[int], None] | None = None) -> Tree:
        layout = container.store.layout
        trees.append(Tree(layout, container.path, passthrough_above=0, resume=resume, changed=changed))
        return trees[-1]

    yield opening
    for tree in trees:
        if tree not in _died:
            tree.close()
    _died.clear()


_died: list[Tree] = []


def hold(tree: Tree, number: int) -> None:
    """Open the node as an engine with passthrough does: by a count of its own."""
    with tree.lock:
        tree.keep(number).passed += 1


def unhold(tree: Tree, number: int) -> None:
    """Close it again; with the last one the engine has no use for it any more."""
    with tree.lock:
        node = tree.keep(number)
        node.passed -= 1
        if not node.passed:
            tree.let_go(node)


def die(tree: Tree) -> None:
    """End a tree as a kill does: nothing is cleared away."""
    _died.append(tree)
    tree._templates.close()
    tree._area.close()


@pytest.fixture
def tree(opening: Opening) -> Tree:
    return opening()


def find(tree: Tree, path: str) -> Entry:
    """Look a path up as the kernel does, from an index where it can tell."""
    number = ROOT_NUMBER
    entry = Entry(number, 0, tree.getattr(number))
    for name in filter(None, path.split("/")):
        found = tree.lookup(number, name.encode())
        assert found is not None, path
        entry, number = found, found.number
    return entry


def number_of(tree: Tree, path: str) -> int:
    return find(tree, path).number


def write(tree: Tree, number: int, content: bytes = NEW) -> None:
    tree.own_file(number)
    fd, own = tree.data_of(number, os.O_WRONLY)
    assert own
    os.pwrite(fd, content, 0)
    os.close(fd)


def read(tree: Tree, number: int) -> bytes:
    fd, _ = tree.data_of(number, os.O_RDONLY)
    try:
        return os.pread(fd, 1000, 0)
    finally:
        os.close(fd)


def orphans(container: Container) -> list[str]:
    return sorted(os.listdir(container.path / "cow/orphans"))


# -------------------------------------------------------------------------------------------------- ready-made answers

ATTR = struct.Struct("<QQQqqqIIIIIIIIII")


def attributes_of(data: bytes) -> Attributes:
    """A ``fuse_attr`` as the tree tells it."""
    ino, size, blocks, *times, mode, nlink, uid, gid, rdev, blksize, _ = ATTR.unpack(data)
    in_ns = (times[n] * 10**9 + times[n + 3] for n in range(3))
    return Attributes(ino, mode, nlink, uid, gid, rdev, size, blocks, blksize, *in_ns)


def records(data: memoryview) -> list[tuple[bytes, int, bytes]]:
    """Name, offset after it and ``fuse_entry_out`` of each record of a listing, which has to be whole ones."""
    found, at = [], 0
    while at < len(data):
        _, after, length, _ = struct.unpack_from("<QQII", data, at + 128)
        found.append((bytes(data[at + 152 : at + 152 + length]), after, bytes(data[at : at + 128])))
        at += (152 + length + 7) // 8 * 8
    assert at == len(data)
    return found


def children(tree: Tree, number: int) -> list[tuple[bytes, Entry]]:
    """What a directory holds, and the kernel knows then."""
    found = []
    for name, entry, _ in tree.list_real(number, 0, 4096):
        if name not in (b".", b".."):
            assert entry is not None
            tree.remember(entry.number)
            found.append((name, entry))
    return found


def check_ready(tree: Tree, number: int, path: str = "/") -> int:
    """Compare every ready-made answer below a directory with what the tree's methods say; gives how many there were."""
    count = 0
    listing = tree.ready_listing(number, 0, 1 << 30)
    listed = children(tree, number)
    if listing is not None:
        assert [(name, struct.unpack("<Q", out[:8])[0]) for name, _, out in records(listing)[2:]] == [
            (name, entry.number) for name, entry in listed
        ]
        for (_, _, out), (_, entry) in zip(records(listing)[2:], listed, strict=True):
            assert attributes_of(out[40:]) == entry.attributes
            count += 1
    assert tree.ready_lookup(number, b"no such name") in (None, b"")
    for name, entry in listed:
        ready_entry = tree.ready_lookup(number, name)
        if ready_entry is not None:
            assert struct.unpack("<QQ", ready_entry[:16]) == (entry.number, entry.generation)
            assert attributes_of(ready_entry[40:]) == entry.attributes
            count += 1
        ready = tree.ready_attributes(entry.number)
        if ready is not None:
            assert attributes_of(ready) == entry.attributes == tree.getattr(entry.number)
            count += 1
        if tree.ready_xattr(entry.number):
            assert tree.listxattr(entry.number) == []
            count += 1
        if stat.S_ISDIR(entry.attributes.mode):
            count += check_ready(tree, entry.number, f"{path}{name.decode()}/")
    return count


def test_ready_answers_are_what_the_methods_say(tree: Tree) -> None:
    number_of(tree, "d/e/g")
    assert check_ready(tree, ROOT_NUMBER) > 4 * MANY


def test_folded_directories_are_answered_from_the_index(tree: Tree) -> None:
    d = number_of(tree, "d")
    out = tree.ready_lookup(d, b"e")
    assert out is not None
    e = struct.unpack("<Q", out[:8])[0]
    for number in (d, e):
        assert tree.ready_attributes(number) is not None
        assert tree.ready_listing(number, 0, 4096) is not None
    assert tree.ready_lookup(e, b"nothing") == b""
    assert tree.ready_xattr(d)
    out = tree.ready_lookup(e, b"f")
    assert out is not None
    assert not tree.ready_xattr(struct.unpack("<Q", out[:8])[0])
    assert tree.node_count == 3  # the root, under both its numbers, and what lies in it


def test_names_too_long_are_left_to_the_tree(tree: Tree) -> None:
    d = number_of(tree, "d")
    assert tree.ready_lookup(d, b"x" * 255) == b""
    assert tree.ready_lookup(d, b"x" * 256) is None


def test_ready_lookups_count_for_registered_nodes(tree: Tree, container: Container) -> None:
    """What was found by a ready-made answer while it was open is kept when it loses its name."""
    d, number = number_of(tree, "d"), number_of(tree, "d/f")
    hold(tree, number)
    assert tree.ready_lookup(d, b"f") is not None
    unhold(tree, number)
    write(tree, number)
    tree.unlink(d, b"f")
    assert read(tree, number) == NEW
    assert orphans(container) == [], "nobody has it open: it needs no name"
    tree.forget(number, 2)
    assert orphans(container) == []


@pytest.mark.parametrize("size", [500, 1000, 4096, 100_000])
def test_a_ready_listing_in_pieces(tree: Tree, size: int) -> None:
    number = number_of(tree, "many")
    whole = tree.ready_listing(number, 0, 1 << 30)
    assert whole is not None
    pieces: list[tuple[bytes, int, bytes]] = []
    while True:
        part = tree.ready_listing(number, pieces[-1][1] if pieces else 0, size)
        assert part is not None
        assert len(part) <= size
        if not part:
            break
        pieces += records(part)
    assert pieces == records(whole)
    assert [after for _, after, _ in pieces] == list(range(1, MANY + 3))
    for offset in (MANY + 2, MANY + 3, 1 << 31, REAL_OFFSETS, END):
        assert bytes(tree.ready_listing(number, offset, size) or b"") == b""
        assert tree.ready_listing(number, offset, size) is not None


def test_the_dots_alone_fit(tree: Tree) -> None:
    for path in ("many", "empty"):
        number = number_of(tree, path)
        for offset, size, names in ((0, 160, [b"."]), (0, 321, [b".", b".."]), (1, 160, [b".."]), (1, 100, [])):
            part = tree.ready_listing(number, offset, size)
            assert part is not None
            assert [name for name, _, _ in records(part)] == names


@pytest.mark.parametrize("change", ["write", "chmod", "unlink", "link"])
def test_a_changed_link_group_is_not_answered_from_the_index(tree: Tree, change: str) -> None:
    """Its names lie in folded directories all the same."""
    d, other = number_of(tree, "d"), number_of(tree, "other")
    group = number_of(tree, "one")
    assert tree.ready_lookup(d, b"two") is not None
    assert tree.ready_attributes(group) is not None
    if change == "write":
        write(tree, group)
    elif change == "chmod":
        tree.setattr(group, Changes(mode=0o600))
    elif change == "unlink":
        tree.unlink(ROOT_NUMBER, b"one")
    else:
        tree.link(group, ROOT_NUMBER, b"four")
    for directory, name in ((d, b"two"), (other, b"three")):
        assert tree.ready_lookup(directory, name) is None
        assert tree.ready_listing(directory, 0, 4096) is None
        assert tree.ready_lookup(directory, b"nothing") == b""
    assert tree.ready_attributes(group) is None
    assert not tree.ready_xattr(group)
    check_ready(tree, ROOT_NUMBER)
    assert tree.ready_listing(number_of(tree, "d/e"), 0, 4096) is not None


def test_a_changed_link_group_is_known_after_a_remount(opening: Opening) -> None:
    tree = opening()
    write(tree, number_of(tree, "one"))
    tree.close()
    _died.append(tree)
    tree = opening()
    d = number_of(tree, "d")
    assert tree.ready_lookup(d, b"two") is None
    assert tree.ready_listing(d, 0, 4096) is None
    assert tree.ready_attributes(find(tree, "one").number) is None


def test_directories_that_are_real_or_gone_are_not_answered(tree: Tree) -> None:
    d, e, g = number_of(tree, "d"), number_of(tree, "d/e"), number_of(tree, "d/e/g")
    assert tree.ready_listing(g, 0, 4096) is not None
    tree.mkdir(e, b"new", 0o755, ROOT)
    for number in (d, e):
        assert tree.ready_lookup(number, b"f") is None
        assert tree.ready_attributes(number) is None
        assert tree.ready_listing(number, 0, 4096) is None
        assert not tree.ready_xattr(number)
    assert tree.ready_lookup(g, b"f") is not None  # still folded below
    empty = number_of(tree, "empty")
    assert tree.ready_listing(empty, 0, 4096) is not None
    tree.rmdir(ROOT_NUMBER, b"empty")
    assert tree.ready_listing(empty, 0, 4096) is None
    tree.forget(empty, 1)
    assert tree.ready_listing(empty, 0, 4096) is None
    assert tree.ready_attributes(empty) is None


def test_a_moved_folded_directory_is_answered_but_for_its_parent(tree: Tree) -> None:
    e, g = number_of(tree, "d/e"), number_of(tree, "d/e/g")
    tree.rename(number_of(tree, "d"), b"e", ROOT_NUMBER, b"moved")
    assert tree.ready_lookup(e, b"f") is not None
    assert tree.ready_listing(e, 0, 4096) is None  # its ".." is another one
    assert [entry.number for name, entry, _ in tree.list_real(e, 0, 4096) if name == b".." and entry] == [ROOT_NUMBER]
    assert tree.ready_listing(g, 0, 4096) is not None
    check_ready(tree, ROOT_NUMBER)


def test_an_open_template_file_is_answered_also_in_a_real_directory(tree: Tree) -> None:
    number = number_of(tree, "f")
    assert tree.ready_attributes(number) is not None
    tree.forget(number, 1)
    assert tree.ready_attributes(number) is None
    hold(tree, number)
    assert tree.ready_attributes(number) is not None
    write_refused(tree, number)
    assert tree.ready_attributes(number) is None
    unhold(tree, number)


def write_refused(tree: Tree, number: int) -> int:
    """Copy up what somebody reads: the copy has a node of its own, whose number is given."""
    tree.own_file(number)
    with pytest.raises(OSError) as refusal:
        tree.data_of(number, os.O_WRONLY)
    assert refusal.value.errno == errno.ESTALE
    ino = tree.getattr(number).ino
    for parent, name in ((ROOT_NUMBER, b"f"), (ROOT_NUMBER, b"one")):
        entry = tree.lookup(parent, name)
        if entry is not None and entry.attributes.ino == ino:
            return entry.number
    raise AssertionError("the copy is nowhere")


REFUSALS = {
    getattr(errno, name) for name in ("EISDIR", "EPERM", "EINVAL", "ENOTDIR", "ENOTEMPTY", "EEXIST", "EOPNOTSUPP")
}
"""What random changes may meet."""


def test_random_changes_leave_ready_answers_right(opening: Opening) -> None:
    """Everything that the index is asked for stays true, whatever is done to the tree, and with remounts between."""
    chance = random.Random(5)
    tree = opening()
    for step in range(150):
        directories = [ROOT_NUMBER]
        files: list[tuple[int, bytes, int]] = []
        for number in directories:
            if len(directories) > 60:
                break
            for name, entry in children(tree, number):
                if stat.S_ISDIR(entry.attributes.mode):
                    directories.append(entry.number)
                if name[:1] != b"0":
                    files.append((number, name, entry.number))
        parent, name, number = chance.choice(files)
        act = chance.randrange(7)
        try:
            if act == 0:
                tree.rename(parent, name, chance.choice(directories), b"r%d" % step)
            elif act == 1:
                tree.mkdir(chance.choice(directories), b"m%d" % step, 0o755, ROOT)
            elif act == 2:
                tree.setattr(number, Changes(mode=0o700))
            elif act == 3:
                tree.link(number, chance.choice(directories), b"l%d" % step)
            elif act == 4 and step % 2:
                tree.unlink(parent, name)
            elif act == 5:
                write(tree, number, b"%d" % step)
            elif act == 6:
                tree.rmdir(parent, name)
        except OSError as error:
            assert error.errno in REFUSALS
        if step % 10 == 9:
            check_ready(tree, ROOT_NUMBER)
        if step % 50 == 49:
            tree.close()
            _died.append(tree)
            tree = opening()


# ------------------------------------------------------------------------------------------------------------ listings


def listed(tree: Tree, number: int, step: int = 7) -> Iterator[tuple[bytes, int]]:
    """List a directory in pieces of ``step`` names."""
    offset = 0
    while True:
        piece = list(itertools.islice(tree.list_real(number, offset, 4096), step))
        if not piece:
            return
        for name, _, offset in piece:
            yield name, offset


def test_a_folded_directory_has_small_offsets(tree: Tree) -> None:
    number = number_of(tree, "many")
    ready = tree.ready_listing(number, 0, 1 << 30)
    assert ready is not None
    assert list(listed(tree, number)) == [(name, after) for name, after, _ in records(ready)]


def test_a_real_directory_has_large_offsets_and_every_name_once(tree: Tree) -> None:
    number = number_of(tree, "many")
    expected = sorted(name for name, _ in listed(tree, number))
    tree.mkdir(number, b"new", 0o755, ROOT)
    found = list(listed(tree, number))
    assert sorted(name for name, _ in found) == sorted([*expected, b"new"])
    assert all(after > REAL_OFFSETS for _, after in found)
    assert list(tree.list_real(number, found[-1][1], 4096)) == []
    assert {b".", b".."} <= {name for name, _ in found}
    dots = {name: entry.number for name, entry, _ in tree.list_real(number, 0, 4096) if entry and name in (b".", b"..")}
    assert dots == {b".": number, b"..": ROOT_NUMBER}


def test_names_that_stay_are_listed_once_while_others_come_and_go(tree: Tree) -> None:
    number = number_of(tree, "many")
    tree.mkdir(number, b"new", 0o755, ROOT)
    names = [name for name, _ in listed(tree, number) if name.startswith(b"0")]
    doomed = set(random.Random(3).sample(names, MANY // 3))
    found = []
    for count, (name, _) in enumerate(listed(tree, number, 3)):
        found.append(name)
        tree.mknod(number, b"made-%d" % count, stat.S_IFREG | 0o600, 0, ROOT)
        if doomed:
            tree.unlink(number, doomed.pop())
    assert len(found) == len(set(found))
    left = {name for name, _ in listed(tree, number)} & set(names)
    assert left <= set(found)


@pytest.mark.parametrize("given", [1, 2, 3, 100, MANY + 2])
def test_a_listing_goes_on_after_its_directory_was_unfolded(tree: Tree, given: int) -> None:
    number = number_of(tree, "many")
    whole = list(listed(tree, number))
    offset = whole[given - 1][1]
    gone = whole[-1][0]
    tree.mkdir(number, b"0-new", 0o755, ROOT)
    tree.unlink(number, gone)
    rest = [(name, after) for name, entry, after in tree.list_real(number, offset, 4096) if entry is not None]
    assert rest == [pair for pair in whole[given:] if pair[0] != gone]


def test_offsets_that_nobody_gave_list_nothing(tree: Tree) -> None:
    made = tree.mkdir(ROOT_NUMBER, b"made", 0o755, ROOT).number
    assert list(tree.list_real(made, 3, 4096)) == []
    assert list(tree.list_real(number_of(tree, "d"), REAL_OFFSETS + 5, 4096)) == []


def test_what_is_listed_only_needs_no_memory(tree: Tree) -> None:
    number = number_of(tree, "many")
    tree.mkdir(number, b"new", 0o755, ROOT)
    before = tree.node_count
    assert len(list(listed(tree, number))) == MANY + 3
    assert tree.node_count == before


def test_a_removed_directory_lists_nothing(tree: Tree) -> None:
    made = tree.mkdir(ROOT_NUMBER, b"made", 0o755, ROOT).number
    tree.rmdir(ROOT_NUMBER, b"made")
    assert list(tree.list_real(made, 0, 4096)) == []
    with pytest.raises(NotADirectoryError):
        list(tree.list_real(number_of(tree, "f"), 0, 4096))


# -------------------------------------------------------------------------------------------- open without a descriptor


def test_data_of_tells_whose_it_is(tree: Tree) -> None:
    number = number_of(tree, "d/f")
    fd, own = tree.data_of(number, os.O_RDONLY)
    assert (os.pread(fd, 100, 0), own) == (OLD, False)
    os.close(fd)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        with pytest.raises(OSError) as refusal:
            tree.data_of(number, flags)
        assert refusal.value.errno == errno.ESTALE
    for path, code in (("d", errno.EISDIR), ("d/fifo", errno.EINVAL), ("d/link", errno.EINVAL)):
        with pytest.raises(OSError) as refusal:
            tree.data_of(number_of(tree, path), os.O_RDONLY)
        assert refusal.value.errno == code
    write(tree, number)
    assert read(tree, number).startswith(NEW)


def test_a_held_reader_keeps_the_template(tree: Tree) -> None:
    number = number_of(tree, "f")
    hold(tree, number)
    copy = write_refused(tree, number)
    assert copy != number
    write(tree, copy)
    assert read(tree, number) == OLD
    assert read(tree, copy) == NEW
    unhold(tree, number)
    tree.forget(number, 1)
    again = tree.lookup(ROOT_NUMBER, b"f")
    assert again is not None
    assert again.generation, "its number is no template's, so it needs one"
    assert again == (copy, again.generation, tree.getattr(copy), LIFETIME_S)


def test_without_a_holder_nothing_is_split(tree: Tree) -> None:
    number = number_of(tree, "f")
    hold(tree, number)
    unhold(tree, number)
    write(tree, number)
    assert number_of(tree, "f") == number


def test_an_unlinked_held_file_stays_until_it_is_closed(tree: Tree, container: Container) -> None:
    number = number_of(tree, "f")
    write(tree, number)
    hold(tree, number)
    tree.unlink(ROOT_NUMBER, b"f")
    tree.free(number)
    tree.forget(number, 1)
    assert orphans(container) == [str(number)]
    assert read(tree, number) == NEW + OLD[len(NEW) :]
    unhold(tree, number)
    assert orphans(container) == []


def test_changes_of_the_data_are_told(opening: Opening) -> None:
    told: list[int] = []
    tree = opening(changed=told.append)
    number, group = number_of(tree, "f"), number_of(tree, "one")
    tree.setattr(number, Changes(mode=0o600))
    assert told == []  # the data is where it was
    write(tree, number)
    assert told == [number]
    write(tree, group)
    assert told == [number, group]
    told.clear()
    tree.unlink(ROOT_NUMBER, b"f")
    assert told == [number]
    tree.forget(number, 1)
    assert told == [number, number]


def test_no_reader_of_a_template_file_can_write_it(tree: Tree, container: Container) -> None:
    """Not even by opening its descriptor again, as a container could that gets hold of one."""
    fd, _ = tree.data_of(number_of(tree, "d/f"), os.O_RDONLY)
    before = os.fstat(fd)
    with pytest.raises(OSError) as refusal:
        os.open(calls.fd_path(fd), os.O_RDWR)
    assert refusal.value.errno == errno.EROFS
    again = os.open(calls.fd_path(fd), os.O_RDONLY)
    os.utime(container.store.layout.template("t").tree / "d/f", ns=(1, before.st_mtime_ns))
    assert os.read(again, 100) == OLD
    assert os.fstat(again).st_atime_ns == 1  # relatime would have set it
    os.close(again)
    os.close(fd)


# --------------------------------------------------------------------------------------------------- without a name


def test_a_file_without_a_name(tree: Tree, container: Container) -> None:
    parent = number_of(tree, "d")
    handle, entry = tree.tmpfile(parent, 0o666, os.O_RDWR, USER)
    attributes = entry.attributes
    assert (attributes.mode, attributes.uid, attributes.gid) == (stat.S_IFREG | 0o644, USER.uid, USER.gid)
    assert attributes.nlink == 0
    os.pwrite(handle.fd, NEW, 0)
    assert read(tree, entry.number) == NEW
    assert tree.getattr(entry.number).size == len(NEW)
    tree.release(handle.number)
    assert orphans(container) == [str(entry.number)]
    tree.forget(entry.number, 1)
    assert orphans(container) == []
    assert os.listdir(container.path / "cow/stage") == []


def test_a_file_without_a_name_gets_one(tree: Tree, container: Container) -> None:
    parent = number_of(tree, "d")
    handle, entry = tree.tmpfile(parent, 0o600, os.O_RDWR, USER)
    os.pwrite(handle.fd, NEW, 0)
    with pytest.raises(FileExistsError):
        tree.link(entry.number, parent, b"f")
    linked = tree.link(entry.number, parent, b"named")
    assert (linked.number, linked.attributes.nlink) == (entry.number, 1)
    assert tree.link(entry.number, ROOT_NUMBER, b"again").attributes.nlink == 2
    assert find(tree, "d/named") == find(tree, "again")
    assert orphans(container) == []
    tree.release(handle.number)
    tree.forget(entry.number, 5)
    found = find(tree, "d/named")
    assert (found.number, found.attributes.size) == (entry.number, len(NEW))


def test_a_setgid_directory_gives_its_group_to_a_file_without_a_name(tree: Tree) -> None:
    made = tree.mkdir(ROOT_NUMBER, b"made", 0o755, ROOT).number
    tree.setattr(made, Changes(mode=0o2755, gid=77))
    handle, entry = tree.tmpfile(made, 0o600, os.O_RDWR, USER)
    assert entry.attributes.gid == 77
    tree.release(handle.number)


def test_no_file_without_a_name_in_a_removed_directory(tree: Tree) -> None:
    made = tree.mkdir(ROOT_NUMBER, b"made", 0o755, ROOT).number
    tree.rmdir(ROOT_NUMBER, b"made")
    with pytest.raises(FileNotFoundError):
        tree.tmpfile(made, 0o600, os.O_RDWR, ROOT)


# ------------------------------------------------------------------------------------------------------ split, durable


@pytest.mark.parametrize("name", ["f", "one"])
def test_a_split_copy_keeps_its_number(opening: Opening, container: Container, name: str) -> None:
    tree = opening()
    number = number_of(tree, name)
    ino = find(tree, name).attributes.ino
    hold(tree, number)
    copy = write_refused(tree, number)
    unhold(tree, number)
    for resume in (False, True):
        die(tree)
        tree = opening(resume=resume)
        entry = find(tree, name)
        assert (entry.number, entry.attributes.ino) == (copy, ino)
        tree.rename(ROOT_NUMBER, name.encode(), ROOT_NUMBER, b"elsewhere")
        tree.rename(ROOT_NUMBER, b"elsewhere", ROOT_NUMBER, name.encode())
        assert number_of(tree, name) == copy
    tree.close()
    _died.append(tree)
    assert container.check() == []


def test_an_engine_whose_readers_share_gives_a_split_copy_its_inode_number(
    opening: Opening, container: Container
) -> None:
    tree = opening()
    number = number_of(tree, "f")
    hold(tree, number)
    assert write_refused(tree, number) != number
    die(tree)
    shared = Tree(container.store.layout, container.path)
    assert number_of(shared, "f") == number
    shared.close()


def test_check_knows_the_mark_of_a_split_copy(container: Container) -> None:
    tree = Tree(container.store.layout, container.path, passthrough_above=0)
    number = number_of(tree, "f")
    hold(tree, number)
    write_refused(tree, number)
    tree.mknod(ROOT_NUMBER, b"own", stat.S_IFREG | 0o600, 0, ROOT)
    tree.close()
    assert container.check() == []
    os.setxattr(container.path / "private/own", SPLIT_XATTR, b"1")
    os.setxattr(container.path / "private/f", SPLIT_XATTR, b"2")
    found = {(problem.path, problem.kind) for problem in container.check(repair=True)}
    assert found == {("private/own", "bad-record"), ("private/f", "bad-record")}
    assert container.check() == []
    assert ORIGIN_XATTR in os.listxattr(container.path / "private/f")


# ------------------------------------------------------------------------------------------------------------ resuming


def tell(tree: Tree, numbers: dict[str, int]) -> dict[str, tuple[Attributes, bytes | None]]:
    """What is known by each number, with content where it is a file's."""
    found: dict[str, tuple[Attributes, bytes | None]] = {}
    for name, number in numbers.items():
        attributes = tree.getattr(number)
        content = read(tree, number) if stat.S_ISREG(attributes.mode) else None
        found[name] = attributes._replace(atime_ns=0), content
    return found


def busy(tree: Tree) -> dict[str, int]:
    """Change many things; gives numbers that the kernel knows then."""
    d, e, other = number_of(tree, "d"), number_of(tree, "d/e"), number_of(tree, "other")
    numbers = {path: number_of(tree, path) for path in ("d", "d/e", "d/e/g", "d/e/g/f", "d/link", "empty", "many")}
    numbers["group"] = number_of(tree, "one")
    write(tree, numbers["group"])
    numbers["copied"] = number_of(tree, "f")
    write(tree, numbers["copied"])
    tree.rename(ROOT_NUMBER, b"f", other, b"copied")
    numbers["moved file"] = number_of(tree, "d/f")
    tree.rename(d, b"f", ROOT_NUMBER, b"moved-file")
    tree.rename(d, b"e", other, b"moved-dir")
    numbers["in moved"] = number_of(tree, "other/moved-dir/f")
    numbers["own dir"] = tree.mkdir(d, b"own", 0o755, ROOT).number
    numbers["own"] = tree.mknod(numbers["own dir"], b"own", stat.S_IFREG | 0o640, 0, USER).number
    write(tree, numbers["own"])
    tree.link(numbers["own"], e, b"second")  # which unfolds the moved directory
    numbers["symlink"] = tree.symlink(ROOT_NUMBER, b"sym", b"//vz/template/t/f", ROOT).number
    numbers["taken"] = tree.mknod(ROOT_NUMBER, b"f", stat.S_IFREG | 0o600, 0, ROOT).number
    numbers["chmod"] = number_of(tree, "many/0007" + "x" * 7)
    tree.setattr(numbers["chmod"], Changes(mode=0o604))
    numbers["unlinked"] = tree.mknod(ROOT_NUMBER, b"unlinked", stat.S_IFREG | 0o600, 0, ROOT).number
    write(tree, numbers["unlinked"])
    hold(tree, numbers["unlinked"])
    tree.unlink(ROOT_NUMBER, b"unlinked")
    return numbers


@pytest.mark.parametrize("backwards", [False, True])
def test_a_successor_understands_every_number(opening: Opening, container: Container, backwards: bool) -> None:
    tree = opening()
    numbers = busy(tree)
    before = tell(tree, numbers)
    die(tree)
    (container.path / "cow/stage/left").write_bytes(b"")
    tree = opening(resume=True)
    if backwards:
        numbers = dict(reversed(numbers.items()))
    assert tell(tree, numbers) == before
    assert os.listdir(container.path / "cow/stage") == []
    assert tree.readlink(numbers["symlink"]) == b"//vz/template/t/f"
    assert number_of(tree, "other/moved-dir/g") == numbers["d/e/g"]
    assert number_of(tree, "other/moved-dir/second") == numbers["own"]
    check_ready(tree, ROOT_NUMBER)
    for number in numbers.values():
        tree.forget(number, 100)
    assert orphans(container) == []
    tree.close()
    _died.append(tree)
    assert container.check() == []


def test_what_a_successor_does_to_known_numbers(opening: Opening, container: Container) -> None:
    tree = opening()
    numbers = busy(tree)
    die(tree)
    tree = opening(resume=True)
    write(tree, numbers["d/e/g/f"], b"changed")
    assert read(tree, number_of(tree, "other/moved-dir/g/f")).startswith(b"changed")
    tree.mkdir(numbers["d/e/g"], b"made", 0o755, ROOT)
    assert find(tree, "other/moved-dir/g/made")
    tree.unlink(numbers["own dir"], b"own")
    tree.unlink(numbers["d/e"], b"second")
    assert read(tree, numbers["own"]) == NEW  # somebody may have it open
    assert str(numbers["own"]) in orphans(container)
    tree.forget(numbers["own"], 2)
    assert str(numbers["own"]) not in orphans(container)


def test_a_successor_follows_what_moves_when_it_is_not_looked_up(opening: Opening) -> None:
    tree = opening()
    folder = tree.mkdir(ROOT_NUMBER, b"folder", 0o755, ROOT).number
    own = tree.mknod(folder, b"own", stat.S_IFREG | 0o600, 0, ROOT).number
    write(tree, own)
    die(tree)
    tree = opening(resume=True)
    hold(tree, own)
    tree.rename(folder, b"own", ROOT_NUMBER, b"moved")
    unhold(tree, own)
    list(listed(tree, ROOT_NUMBER))
    assert read(tree, own) == NEW
    assert number_of(tree, "moved") == own


def test_gone_numbers_are_dead_nodes(opening: Opening) -> None:
    tree = opening()
    d = number_of(tree, "d")
    file, folded, link = number_of(tree, "d/f"), number_of(tree, "empty"), number_of(tree, "d/link")
    made = tree.mkdir(ROOT_NUMBER, b"made", 0o700, ROOT).number
    tree.unlink(d, b"f")
    tree.unlink(d, b"link")
    tree.rmdir(ROOT_NUMBER, b"empty")
    tree.rmdir(ROOT_NUMBER, b"made")
    die(tree)
    tree = opening(resume=True)
    assert read(tree, file) == OLD
    assert tree.getattr(file).nlink == tree.getattr(folded).nlink == tree.getattr(link).nlink == 0
    assert tree.readlink(link) == b"f"
    for number in (folded, made):
        assert stat.S_ISDIR(tree.getattr(number).mode)
        assert tree.getattr(number).nlink == 0
        assert list(tree.list_real(number, 0, 4096)) == []
        assert tree.lookup(number, b"x") is None
        with pytest.raises(FileNotFoundError):
            tree.mkdir(number, b"x", 0o755, ROOT)
    assert stat.S_IMODE(tree.getattr(made).mode) == 0o700  # kept as an orphan
    tree.forget(made, 1)
    again = tree.mkdir(ROOT_NUMBER, b"again", 0o755, ROOT)
    assert tree.getattr(again.number).nlink == 2


def test_a_number_of_a_dead_node_is_not_given_to_another(opening: Opening) -> None:
    """The file system gives the inode number of a removed directory to the next one made."""
    tree = opening()
    made = tree.mkdir(ROOT_NUMBER, b"made", 0o700, ROOT).number
    tree.rmdir(ROOT_NUMBER, b"made")
    die(tree)
    tree = opening(resume=True)
    assert tree.getattr(made).nlink == 0
    again = tree.mkdir(ROOT_NUMBER, b"again", 0o755, ROOT)
    assert (again.number, again.generation) != (made, 0)


def test_a_reader_of_a_split_file_reads_on_with_the_successor(opening: Opening) -> None:
    tree = opening()
    number = number_of(tree, "f")
    hold(tree, number)
    copy = write_refused(tree, number)
    write(tree, copy)
    die(tree)
    tree = opening(resume=True)
    assert read(tree, number) == OLD
    assert read(tree, copy) == NEW
    assert tree.getattr(number).nlink == 0


def test_reading_the_private_area_once_is_quick(opening: Opening, container: Container) -> None:
    tree = opening()
    last = 0
    for number in range(4):
        folder = tree.mkdir(ROOT_NUMBER, b"folder-%d" % number, 0o755, ROOT).number
        area = container.path / f"private/folder-{number}"
        for name in range(2500):
            (area / f"{name}").touch()
        entry = tree.lookup(folder, b"2499")
        assert entry is not None
        last = entry.number
    die(tree)
    tree = opening(resume=True)
    start = time.perf_counter()
    assert tree.getattr(last).nlink == 1
    assert time.perf_counter() - start < 15  # 0.15 s for 20,000 when nothing else runs


# ------------------------------------------------------------------------------------------------- thin system calls


def test_file_flags(tree: Tree) -> None:
    nodump = 0x40
    number, d = number_of(tree, "d/f"), number_of(tree, "d")
    assert tree.file_flags(d) == 0
    assert not tree.file_flags(number) & nodump
    for one in (number, d):
        tree.set_file_flags(one, tree.file_flags(one) | nodump)
        assert tree.file_flags(one) & nodump
    assert tree.getattr(number).ino == number
    with pytest.raises(OSError) as refusal:
        tree.set_file_flags(number, 0x10)
    assert refusal.value.errno == errno.EOPNOTSUPP


def test_birth_time(tree: Tree) -> None:
    before = time.time_ns() - 10**9
    made = tree.mkdir(ROOT_NUMBER, b"made", 0o755, ROOT).number
    born = tree.birth_time(made)
    assert born is not None
    assert before < born < time.time_ns()
    assert tree.birth_time(number_of(tree, "d/f")) is None


def test_fallocate(tree: Tree) -> None:
    number = number_of(tree, "f")
    tree.own_file(number)
    fd, _ = tree.data_of(number, os.O_RDWR)
    calls.fallocate(fd, 0, 0, 1 << 16)
    assert tree.getattr(number).size == 1 << 16
    calls.fallocate(fd, 3, 0, 4096)  # punch a hole, keep the size
    assert os.pread(fd, 4096, 0) == bytes(4096)
    with pytest.raises(OSError) as refusal:
        calls.fallocate(fd, 0, 0, 0)
    assert refusal.value.errno == errno.EINVAL
    os.close(fd)
    tree.sync()


def test_what_the_tree_did_is_counted(tree: Tree) -> None:
    write(tree, number_of(tree, "d/e/f"))
    counted = tree.counters
    assert (counted.copy_ups, counted.copied_bytes, counted.unfolds) == (1, len(OLD), 2)
