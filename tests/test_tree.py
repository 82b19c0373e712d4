"""The tree without a mount: identity, memory, concurrency, refusals, and what is left when a system call fails."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import LARGE_SIZE, SMALL
from tests.stateful_model import FileSystem, PosixFs, TreeFs, read_all, snapshot
from vzfs import Container, Store
from vzfs import linux as calls
from vzfs.store.xattrs import ATTR_XATTR, NLINK_XATTR, ORIGIN_XATTR
from vzfs.tree.node import ROOT_NUMBER
from vzfs.tree.tree import Caller, Changes, Tree

PATIENCE_S = 30.0
USER = Caller(1000, 1000)


@pytest.fixture
def container(small_store: Store) -> Container:
    """A container of the small template."""
    return small_store.create(101, template=SMALL)


@contextlib.contextmanager
def opened(container: Container, *, eager: bool = False) -> Iterator[TreeFs]:
    """Its file system, without a mount."""
    fs = TreeFs(container.store.layout, container.path, eager=eager)
    try:
        yield fs
    finally:
        fs.shut()


@pytest.fixture
def fs(container: Container) -> Iterator[TreeFs]:
    """The container's file system."""
    with opened(container) as one:
        yield one


def write(fs: FileSystem, path: bytes, content: bytes, flags: int = 0) -> None:
    """Write ``content`` at the beginning of a file."""
    fd = fs.open(path, os.O_WRONLY | flags)
    try:
        fs.pwrite(fd, content, 0)
    finally:
        fs.close(fd)


def area(container: Container, path: str = "") -> Path:
    """A place in the private area."""
    return container.path / "private" / path


def staged(container: Container) -> list[str]:
    """What lies on the stage."""
    return os.listdir(container.path / "cow/stage")


# ------------------------------------------------------------------------------------------------------------- identity


def test_inode_numbers_stay_through_copy_up_and_remount(container: Container) -> None:
    with opened(container) as fs:
        before = {path: row.info.ino for path, row in snapshot(fs).items()}
        for path, row in snapshot(fs).items():
            if stat.S_ISREG(row.info.mode):
                write(fs, path, b"changed")
            elif not stat.S_ISLNK(row.info.mode):
                fs.chmod(path, 0o700)
            else:
                fs.chown(path, 5, 5)
        assert {path: row.info.ino for path, row in snapshot(fs).items()} == before
    with opened(container) as fs:
        assert {path: row.info.ino for path, row in snapshot(fs).items()} == before


def test_two_containers_give_template_files_the_same_numbers(small_store: Store) -> None:
    found = []
    for number in (101, 102):
        with opened(small_store.create(number, template=SMALL)) as fs:
            found.append({path: row.info.ino for path, row in snapshot(fs).items()})
    assert found[0] == found[1]


def test_own_files_keep_their_numbers_over_a_remount(container: Container) -> None:
    with opened(container) as fs:
        write(fs, b"tmp/new", b"1", os.O_CREAT)
        fs.link(b"tmp/new", b"tmp/link")
        numbers = fs.lstat(b"tmp/new").ino, fs.lstat(b"tmp/link").ino
    assert numbers[0] == numbers[1]
    with opened(container) as fs:
        assert (fs.lstat(b"tmp/new").ino, fs.lstat(b"tmp/link").ino) == numbers


def test_copying_up_inside_the_private_area_gives_only_one_the_number(container: Container) -> None:
    """An administrator copies a file with all its attributes: both can't be the template's inode."""
    with opened(container) as fs:
        write(fs, b"etc/passwd", b"own")
        number = fs.lstat(b"etc/passwd").ino
    shutil.copyfile(area(container, "etc/passwd"), area(container, "etc/twin"))
    origin = os.getxattr(area(container, "etc/passwd"), ORIGIN_XATTR)
    os.setxattr(area(container, "etc/twin"), ORIGIN_XATTR, origin)
    with opened(container) as fs:
        numbers = [fs.lstat(b"etc/passwd").ino, fs.lstat(b"etc/twin").ino]
        assert number in numbers
        assert len(set(numbers)) == 2


def test_numbers_and_generations_are_unique_among_the_known(container: Container) -> None:
    """The backing file system gives numbers out again at once; who still holds the old one must not meet the new."""
    with opened(container) as fs:
        tree = fs.tree
        known = set()
        parent = tree.lookup(ROOT_NUMBER, b"tmp")
        assert parent is not None
        for make in (tree.mkdir, lambda *a: tree.mknod(*a[:2], stat.S_IFREG | 0o600, 0, a[3])):
            for _ in range(30):
                entry = make(parent.number, b"again", 0o700, Caller(0, 0))
                assert (entry.number, entry.generation) not in known
                known.add((entry.number, entry.generation))
                directory = stat.S_ISDIR(entry.attributes.mode)
                (tree.rmdir if directory else tree.unlink)(parent.number, b"again")
                assert tree.getattr(entry.number).nlink == 0


# --------------------------------------------------------------------------------------------------------------- memory


def test_forgetting_everything_leaves_nothing(container: Container) -> None:
    with opened(container) as fs:
        baseline = fs.tree.node_count
        snapshot(fs)
        fs.forget_all()
        assert fs.tree.node_count == baseline
        for path, row in snapshot(fs).items():
            if stat.S_ISREG(row.info.mode):
                write(fs, path, b"x")
            elif path and stat.S_ISDIR(row.info.mode):
                fs.chmod(path, 0o711)
        fs.mkdir(b"tmp/made", 0o755)
        write(fs, b"tmp/made/file", b"x", os.O_CREAT)
        fs.rename(b"tmp/made", b"var/made")
        fs.unlink(b"var/made/file")
        fs.rmdir(b"var/made")
        fd = fs.open(b"etc/shadow", os.O_RDWR)
        fs.unlink(b"etc/shadow")
        snapshot(fs)
        fs.close(fd)
        fs.forget_all()
        assert fs.tree.node_count == baseline


def test_names_that_move_and_go_leave_nothing(container: Container) -> None:
    with opened(container, eager=True) as fs:
        baseline = fs.tree.node_count
        for _ in range(20):
            write(fs, b"tmp/a", b"x", os.O_CREAT)
            fs.link(b"tmp/a", b"tmp/b")
            fs.rename(b"tmp/b", b"etc/b")
            fs.symlink(b"text", b"tmp/s")
            fs.rename(b"tmp/s", b"tmp/a")
            fs.unlink(b"tmp/a")
            fs.unlink(b"etc/b")
        assert fs.tree.node_count == baseline


def test_walking_a_large_template_needs_no_memory(store: Store, clean_path: Path) -> None:
    source = clean_path / "large"
    for folder in range(30):
        (source / f"dir{folder}").mkdir(parents=True)
        for number in range(1000):
            os.symlink("text", source / f"dir{folder}/{number}")
    store.create_template("large", str(source))
    most, seen = 0, 0
    with opened(store.create(101, template="large")) as fs:
        for name in fs.listdir(b""):
            for child in fs.listdir(name):
                fs.lstat(name + b"/" + child)
                seen += 1
            most = max(most, fs.tree.node_count)
    assert seen == 30_000
    assert most <= 40, "the kernel knows 30,000 entries, the tree only what differs from the template"


# -------------------------------------------------------------------------------------------- groups, moved directories


def test_hard_links_stay_hard_links_when_their_folded_directory_moves(container: Container) -> None:
    with opened(container) as fs:
        number = fs.lstat(b"bin/tool").ino
        fs.rename(b"usr/share", b"tmp/moved")
        write(fs, b"tmp/moved/tool-thrice", b"CHANGED")
        fs.chmod(b"lib/deep/tool-again", 0o700)
    for _ in range(2):
        with opened(container) as fs:
            for path in (b"bin/tool", b"lib/deep/tool-again", b"tmp/moved/tool-thrice"):
                info = fs.lstat(path)
                assert (info.ino, info.nlink, stat.S_IMODE(info.mode)) == (number, 3, 0o700)
                assert read_all(fs, path).startswith(b"CHANGED")
            assert fs.lstat(b"tmp/moved/pair-a").ino == fs.lstat(b"tmp/moved/pair-b").ino
    assert container.check() == []


def test_folded_directory_moves_as_one_link_and_keeps_its_numbers(container: Container) -> None:
    with opened(container, eager=True) as fs:
        number, child = fs.lstat(b"lib/deep").ino, fs.lstat(b"lib/deep/er/other").ino
        fs.rename(b"lib/deep", b"tmp/deep")
        assert area(container, "tmp/deep").is_symlink()
        fs.rename(b"tmp/deep", b"var/empty/deep")
    with opened(container, eager=True) as fs:
        assert (fs.lstat(b"var/empty/deep").ino, fs.lstat(b"var/empty/deep/er/other").ino) == (number, child)
        write(fs, b"var/empty/deep/er/other", b"OTHER")
        assert fs.lstat(b"var/empty/deep/er/other").ino == child
        fs.rename(b"var/empty/deep", b"lib/deep")
    with opened(container, eager=True) as fs:
        assert (fs.lstat(b"lib/deep").ino, fs.lstat(b"lib/deep/er/other").ino) == (number, child)
        assert read_all(fs, b"lib/deep/er/other") == b"OTHER\n"
    assert container.check() == []


def test_descriptors_work_through_renames_of_every_parent(fs: TreeFs) -> None:
    fd = fs.open(b"lib/deep/er/est/file", os.O_RDWR)
    fs.rename(b"lib/deep/er/est", b"tmp/est")
    fs.rename(b"tmp/est", b"var/est")
    fs.rename(b"var", b"tmp/var")
    fs.pwrite(fd, b"DEEP", 0)
    assert fs.fstat(fd).nlink == 1
    assert read_all(fs, b"tmp/var/est/file") == b"DEEP\n"
    fs.unlink(b"tmp/var/est/file")
    assert (fs.pread(fd, 9, 0), fs.fstat(fd).nlink) == (b"DEEP\n", 0)


# ---------------------------------------------------------------------------------------------------------- concurrency


def together(count: int, work: Callable[[int], object]) -> None:
    """Do ``work`` in ``count`` threads at once; whatever one raises is raised here, and none may hang."""
    start = threading.Barrier(count)
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            start.wait(PATIENCE_S)
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


def find(tree: Tree, path: bytes) -> int:
    """The node of ``path``, looked up."""
    number = ROOT_NUMBER
    for name in path.split(b"/"):
        entry = tree.lookup(number, name)
        assert entry is not None, path
        number = entry.number
    return number


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each template file, by its inode number, was copied."""
    counted: Counter[int] = Counter()
    real = calls.copy_data

    def copy_data(source: int, target: int, size: int) -> bool:
        counted[os.fstat(source).st_ino] += 1
        return real(source, target, size)

    monkeypatch.setattr(calls, "copy_data", copy_data)
    return counted


def test_threads_copy_each_file_once(container: Container, fs: TreeFs, copies: Counter[int]) -> None:
    paths = [
        b"etc/passwd",
        b"lib/large",
        b"lib/deep/er/est/file",
        b"usr/share/pair-a",
        b"usr/share/pair-b",
        b"bin/tool",
    ]
    template = PosixFs(container.store.template(SMALL).path)

    def work(number: int) -> None:
        for path in paths[number % len(paths) :] + paths[: number % len(paths)]:
            node = find(fs.tree, path)
            handle = fs.tree.open(node, os.O_RDWR)
            os.pwrite(handle.fd, b"%d" % number, number)
            fs.tree.release(handle.number)

    together(8, work)
    assert copies == {template.lstat(path).ino: 1 for path in paths}
    for path in paths:
        assert read_all(fs, path)[:8] == b"01234567"
    assert staged(container) == []


def test_creating_what_another_is_copying_waits_for_the_copy_alone(
    container: Container, fs: TreeFs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """O_CREAT without O_EXCL of a present name opens it, and needs what the copying one needs to finish."""
    copying = threading.Event()
    real = calls.copy_data

    def copy_data(source: int, target: int, size: int) -> bool:
        copying.set()
        time.sleep(0.2)  # the others are in ``create`` meanwhile
        return real(source, target, size)

    monkeypatch.setattr(calls, "copy_data", copy_data)
    opened: list[tuple[int, int]] = []

    def work(number: int) -> None:
        if number == 0:
            handle = fs.tree.open(find(fs.tree, b"etc/passwd"), os.O_RDWR)
        else:
            parent = find(fs.tree, b"etc")
            assert copying.wait(PATIENCE_S)
            handle, entry = fs.tree.create(parent, b"passwd", 0o600, os.O_RDWR | os.O_CREAT, Caller(0, 0))
            assert entry.number == handle.node.number
        info = os.fstat(handle.fd)
        opened.append((info.st_dev, info.st_ino))
        fs.tree.release(handle.number)

    together(4, work)
    assert len(opened) == 4
    assert len(set(opened)) == 1
    assert staged(container) == []


def test_threads_unfold_and_change_the_same_directories(container: Container, fs: TreeFs) -> None:
    def work(number: int) -> None:
        tree = fs.tree
        for folder in (b"lib/deep/er/est", b"var/nest/ed", b"usr/share/doc/one", b"usr/share/doc", b"etc/conf.d"):
            node = find(tree, folder)
            tree.mkdir(node, b"of-%d" % number, 0o755, Caller(0, 0))
            tree.setattr(find(tree, b"etc/shadow"), Changes(uid=number))
            tree.rename(node, b"of-%d" % number, find(tree, b"tmp"), b"%d" % number)
            tree.rmdir(find(tree, b"tmp"), b"%d" % number)
            listing = tree.listing(node)
            assert [listing.at(position)[0] for position in range(2)] == [b".", b".."]
            for position in range(2, len(listing)):
                listing.at(position)

    before = {path: row.info.ino for path, row in snapshot(fs).items()}
    together(8, work)
    assert {path: row.info.ino for path, row in snapshot(fs).items()} == before
    assert staged(container) == []
    fs.shut()
    assert container.check() == []


def test_threads_link_and_unlink_one_group(container: Container, fs: TreeFs) -> None:
    def work(number: int) -> None:
        tree = fs.tree
        for turn in range(10):
            entry = tree.link(find(tree, b"usr/share/pair-a"), find(tree, b"tmp"), b"%d-%d" % (number, turn))
            assert entry.attributes.nlink > 2
            if turn % 2:
                tree.unlink(find(tree, b"tmp"), b"%d-%d" % (number, turn))

    together(8, work)
    assert fs.lstat(b"usr/share/pair-b").nlink == 2 + 8 * 5
    fs.shut()
    assert container.check() == []


def test_copying_a_large_file_delays_nobody(fs: TreeFs, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the copy waits for the test, the test does all else; a lock held meanwhile would let neither go on."""
    real = calls.copy_data
    begun, go_on = threading.Event(), threading.Event()
    late: list[bool] = []

    def copy_data(source: int, target: int, size: int) -> bool:
        if size >= LARGE_SIZE:
            begun.set()
            late.append(not go_on.wait(PATIENCE_S))
        return real(source, target, size)

    monkeypatch.setattr(calls, "copy_data", copy_data)
    number = find(fs.tree, b"lib/large")
    copying = threading.Thread(target=lambda: fs.tree.release(fs.tree.open(number, os.O_RDWR).number), daemon=True)
    copying.start()
    assert begun.wait(PATIENCE_S)
    done = threading.Event()

    def others() -> None:
        assert fs.lstat(b"lib/large").size == len(read_all(fs, b"lib/large")) == LARGE_SIZE
        snapshot(fs)
        write(fs, b"etc/passwd", b"new")
        write(fs, b"lib/new", b"beside it", os.O_CREAT)
        fs.mkdir(b"lib/deep/er/new", 0o755)
        fs.rename(b"etc", b"tmp/etc")
        done.set()

    together(1, lambda _: others())
    assert done.is_set()
    assert copying.is_alive(), "the copy waits until now"
    go_on.set()
    copying.join(PATIENCE_S)
    assert not copying.is_alive()
    assert late == [False]


def test_file_moved_and_removed_while_it_is_copied(
    container: Container, fs: TreeFs, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = calls.copy_data
    changes: list[Callable[[], None]] = []

    def copy_data(source: int, target: int, size: int) -> bool:
        written = real(source, target, size)
        while changes:
            changes.pop(0)()
        return written

    monkeypatch.setattr(calls, "copy_data", copy_data)
    changes[:] = [lambda: fs.rename(b"etc", b"tmp/etc"), lambda: fs.rename(b"tmp/etc/passwd", b"var/passwd")]
    write(fs, b"etc/passwd", b"ROOT")
    assert read_all(fs, b"var/passwd").startswith(b"ROOT:x")
    assert b"passwd" not in fs.listdir(b"tmp/etc")
    changes[:] = [lambda: fs.unlink(b"lib/large")]
    fd = fs.open(b"lib/large", os.O_RDWR)
    fs.pwrite(fd, b"gone", 0)
    assert (fs.pread(fd, 4, 0), fs.fstat(fd).nlink) == (b"gone", 0)
    assert b"large" not in fs.listdir(b"lib")
    fs.close(fd)
    assert staged(container) == []


# ----------------------------------------------------------------------------------------------------- hostile, damaged


@pytest.mark.parametrize("name", [b"..", b".", b"../cow", b"etc/passwd", b"/etc/passwd", b"x/y", b""])
def test_names_that_are_no_single_component_are_refused(container: Container, fs: TreeFs, name: bytes) -> None:
    tree = fs.tree
    before = snapshot(fs, content=False)
    etc, passwd = find(tree, b"etc"), find(tree, b"etc/passwd")
    for parent in (ROOT_NUMBER, etc, find(tree, b"lib/deep")):
        for change in (
            lambda parent: tree.lookup(parent, name),
            lambda parent: tree.mkdir(parent, name, 0o755, USER),
            lambda parent: tree.mknod(parent, name, stat.S_IFIFO | 0o644, 0, USER),
            lambda parent: tree.symlink(parent, name, b"text", USER),
            lambda parent: tree.create(parent, name, 0o644, os.O_RDWR, USER),
            lambda parent: tree.link(passwd, parent, name),
            lambda parent: tree.unlink(parent, name),
            lambda parent: tree.rmdir(parent, name),
            lambda parent: tree.rename(parent, name, etc, b"moved"),
            lambda parent: tree.rename(etc, b"passwd", parent, name),
        ):
            with pytest.raises(OSError) as caught:
                change(parent)
            assert caught.value.errno == errno.EINVAL
    after = snapshot(fs, content=False)
    assert {path: row.info.comparable for path, row in after.items()} == {
        path: row.info.comparable for path, row in before.items()
    }
    assert staged(container) == []


def test_symbolic_links_to_outside_are_only_text(container: Container, clean_path: Path) -> None:
    secret = clean_path / "outside"
    secret.mkdir()
    (secret / "passwd").write_bytes(b"secret")
    with opened(container) as fs:
        fs.mkdir(b"etc/mine", 0o755)
    area(container, "etc/evil").symlink_to(secret)
    area(container, "etc/mine").rmdir()
    area(container, "etc/mine").symlink_to(secret)
    with opened(container) as fs:
        for path in (b"etc/evil", b"etc/mine"):
            assert fs.readlink(path) == os.fsencode(secret)
            with pytest.raises(NotADirectoryError):
                fs.tree.lookup(find(fs.tree, path), b"passwd")
            with pytest.raises(NotADirectoryError):
                fs.tree.mkdir(find(fs.tree, path), b"new", 0o755, USER)
    assert sorted(os.listdir(secret)) == ["passwd"]


def test_directory_replaced_by_a_link_while_in_use_leads_nowhere(container: Container, clean_path: Path) -> None:
    secret = clean_path / "outside"
    (secret / "deeper").mkdir(parents=True)
    (secret / "passwd").write_bytes(b"secret")
    with opened(container) as fs:
        fs.mkdir(b"tmp/mine", 0o755)
        fs.mkdir(b"tmp/mine/deeper", 0o755)
        node, deeper = find(fs.tree, b"tmp/mine"), find(fs.tree, b"tmp/mine/deeper")
        for number in range(300):  # more than are kept open
            fs.mkdir(b"tmp/%d" % number, 0o755)
            fs.listdir(b"tmp/%d" % number)
            fs.tree.lookup(find(fs.tree, b"tmp/%d" % number), b"none")
        area(container, "tmp/mine").rename(area(container, "tmp/elsewhere"))
        area(container, "tmp/mine").symlink_to(secret)
        for number in (node, deeper):
            with contextlib.suppress(OSError):
                assert fs.tree.lookup(number, b"passwd") is None
            with contextlib.suppress(OSError):
                fs.tree.mkdir(number, b"new", 0o755, USER)
    assert sorted(path.name for path in secret.rglob("*")) == ["deeper", "passwd"]


MALFORMED = [
    "//vz/template/",
    "//vz/template/small",
    "//vz/template/small/",
    "//vz/template/small/..",
    "//vz/template/small/../small/etc",
    "//vz/template/small/etc/../etc/passwd",
    "//vz/template/small//etc",
    "//vz/template/small/./etc",
    "//vz/template/small/none",
    "//vz/template/small/etc/relative/x",
    "//vz/template/other/etc/passwd",
    "//vz/template/../../etc/passwd",
    "//vz/template/.vzfs/small/index",
]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_magic_link_is_an_error_and_the_rest_is_readable(container: Container, text: str) -> None:
    area(container, "damaged").symlink_to(text)
    with opened(container) as fs:
        assert (fs.lstat(b"damaged").mode, fs.lstat(b"damaged").size) == (stat.S_IFREG, 0)
        for call in (
            lambda path: fs.open(path, os.O_RDONLY),
            lambda path: fs.open(path, os.O_WRONLY),
            lambda path: fs.chmod(path, 0o777),
            lambda path: fs.link(path, b"second"),
        ):
            with pytest.raises(OSError) as caught:
                call(b"damaged")
            assert caught.value.errno == errno.EIO
        with pytest.raises(OSError):
            fs.readlink(b"damaged")
        names = fs.listdir(b"")
        assert {b"etc", b"damaged"} <= set(names)
        assert read_all(fs, b"etc/passwd").startswith(b"root")
        write(fs, b"etc/passwd", b"ROOT")
        fs.mkdir(b"new", 0o755)
    assert os.readlink(area(container, "damaged")) == text, "an administrator can still see what it was"
    assert [problem.path for problem in container.check()] == ["private/damaged"]
    with opened(container) as fs:
        fs.rename(b"damaged", b"moved")
        fs.unlink(b"moved")
        assert b"moved" not in fs.listdir(b"")
    assert container.check() == []


@pytest.mark.parametrize(
    "value",
    [b"", b"small", b"small/", b"small/-1", b"small/99999999", b"../../etc/1", b"none/1", b"\xff/1", b"small/1"],
)
def test_hostile_origin_makes_a_file_nobody_else(container: Container, value: bytes) -> None:
    area(container, "mine").write_bytes(b"mine")
    os.setxattr(area(container, "mine"), ORIGIN_XATTR, value)
    with opened(container) as fs:
        found = snapshot(fs)
        numbers = Counter(row.info.ino for row in found.values() if row.info.nlink == 1)
        assert found[b"mine"].content == b"mine"
        assert max(numbers.values()) == 1, "one inode number for two files"


def test_hostile_record_is_an_error_of_that_file_only(container: Container) -> None:
    with opened(container) as fs:
        fs.chmod(b"etc/passwd", 0o600)
    for value in (b"mode=99999", b"uid=x", b"\xff", b"mtime=1", b"unknown=1", b"mode=0644 uid"):
        os.setxattr(area(container, "etc/passwd"), ATTR_XATTR, value, follow_symlinks=False)
        with opened(container) as fs:
            assert (fs.lstat(b"etc/passwd").mode, fs.lstat(b"etc/passwd").size) == (stat.S_IFREG, 0)
            with pytest.raises(OSError) as caught:
                fs.open(b"etc/passwd", os.O_RDONLY)
            assert caught.value.errno == errno.EIO
            assert fs.lstat(b"etc/shadow").gid == 42
            assert {b"passwd", b"shadow"} <= set(fs.listdir(b"etc"))


def test_hostile_group_records_are_not_followed(container: Container) -> None:
    with opened(container) as fs:
        fs.chmod(b"bin/tool", 0o700)
    (record,) = (container.path / "cow/links").iterdir()
    record.unlink()
    record.symlink_to("/etc/passwd")
    with opened(container) as fs:
        with contextlib.suppress(OSError):
            assert read_all(fs, b"bin/tool") != Path("/etc/passwd").read_bytes()
        with contextlib.suppress(OSError):
            write(fs, b"lib/deep/tool-again", b"hostile")
        assert read_all(fs, b"etc/passwd").startswith(b"root:x:0:0::/:/bin/sh")
    assert not Path("/etc/passwd").read_bytes().startswith(b"hostile")


def test_group_record_without_a_count_is_an_error(container: Container) -> None:
    with opened(container) as fs:
        write(fs, b"usr/share/pair-a", b"x")
    (record,) = (container.path / "cow/links").iterdir()
    os.removexattr(record, NLINK_XATTR)
    with opened(container) as fs:
        with pytest.raises(OSError) as caught:
            fs.lstat(b"usr/share/pair-b")
        assert caught.value.errno == errno.EIO
        assert fs.lstat(b"bin/tool").nlink == 3


# ------------------------------------------------------------------------------------------------- failing system calls

FAILING = [
    "chmod",
    "chown",
    "copy_file_range",
    "fdatasync",
    "fsync",
    "ftruncate",
    "link",
    "lstat",
    "mkdir",
    "mknod",
    "open",
    "readlink",
    "removexattr",
    "rename",
    "rmdir",
    "setxattr",
    "stat",
    "symlink",
    "truncate",
    "unlink",
    "utime",
]
"""Functions of ``os`` that ask the private area's file system for something."""
READING = ["lstat", "open", "readlink", "stat"]
"""Those of them that may be the last ones, to tell what the change has made."""


class FailingOs:
    """Makes the n-th of these calls fail, in this thread and only while ``armed``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        self._code = code
        self.told = 0
        self._left = 0
        self.failed = ""
        self._thread = threading.get_ident()
        for name in FAILING:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))
        monkeypatch.setattr(calls, "renameat2", self._wrap("renameat2", calls.renameat2))

    def _wrap(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            if self._left and threading.get_ident() == self._thread:
                self._left -= 1
                if not self._left:
                    self.failed = name
                    self.told = errno.EIO if name in READING else self._code
                    raise OSError(self.told, os.strerror(self.told))
            return real(*arguments, **options)

        return call

    @contextlib.contextmanager
    def armed(self, count: int) -> Iterator[None]:
        """Let the ``count``-th call fail."""
        self.failed = ""
        self._left = count
        try:
            yield
        finally:
            self._left = 0


CHANGES: dict[str, tuple[list[Callable[[TreeFs], object]], Callable[[TreeFs], object]]] = {
    "copy-up": ([], lambda fs: write(fs, b"lib/deep/er/est/file", b"DEEP")),
    "copy-up-large": ([], lambda fs: write(fs, b"lib/large", b"LARGE")),
    "copy-up-link": ([], lambda fs: fs.chown(b"etc/relative", 5, 5)),
    "record": ([], lambda fs: fs.chmod(b"etc/shadow", 0o600)),
    "record-xattr": ([], lambda fs: fs.setxattr(b"etc/shadow", b"user.x", b"1")),
    "record-to-copy": ([lambda fs: fs.chmod(b"etc/shadow", 0o600)], lambda fs: write(fs, b"etc/shadow", b"ROOT")),
    "group-copy": ([], lambda fs: write(fs, b"usr/share/pair-b", b"PAIR")),
    "group-record": ([], lambda fs: fs.chmod(b"bin/tool", 0o700)),
    "link": ([], lambda fs: fs.link(b"etc/passwd", b"tmp/passwd")),
    "unlink-group": ([], lambda fs: fs.unlink(b"usr/share/pair-b")),
    "unlink": ([], lambda fs: fs.unlink(b"etc/passwd")),
    "mkdir": ([], lambda fs: fs.mkdir(b"lib/deep/er/est/new", 0o755)),
    "mkdir-of-a-user": ([lambda fs: setattr(fs, "caller", USER)], lambda fs: fs.mkdir(b"usr/acl/new", 0o755)),
    "create-of-a-user": ([lambda fs: setattr(fs, "caller", USER)], lambda fs: write(fs, b"tmp/new", b"", os.O_CREAT)),
    "symlink": ([], lambda fs: fs.symlink(b"//vz/template/x", b"usr/share/doc/new")),
    "rename": ([], lambda fs: fs.rename(b"etc/passwd", b"usr/share/doc/one/copyright")),
    "rename-directory": ([lambda fs: fs.mkdir(b"tmp/real", 0o755)], lambda fs: fs.rename(b"lib/deep", b"tmp/real")),
    "rmdir": ([], lambda fs: fs.rmdir(b"var/nest/ed/empty")),
}


def state(fs: FileSystem) -> dict[bytes, tuple[object, ...]]:
    """All there is, but for times."""
    return {
        path: (row.info.ino, row.info.comparable, row.target, row.xattrs, row.content)
        for path, row in snapshot(fs).items()
    }


def outcome(fs: FileSystem) -> dict[bytes, tuple[object, ...]]:
    """All there is, but for times and the numbers of new inodes."""
    return {path: facts[1:] for path, facts in state(fs).items()}


@pytest.mark.parametrize(
    ("name", "code"),
    [*((name, errno.ENOSPC) for name in CHANGES), ("record-xattr", errno.EIO), ("mkdir", errno.EIO)],
)
def test_failing_calls_change_nothing(
    name: str, code: int, small_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call of a change fails: nothing is changed, nothing is left, and the change can be done again."""
    prepare, change = CHANGES[name]
    with opened(small_store.create(999, template=SMALL)) as fs:
        for step in prepare:
            step(fs)
        change(fs)
        after = outcome(fs)
    failing = FailingOs(monkeypatch, code)
    refused = 0
    for count in itertools.count(1):
        container = small_store.create(count, template=SMALL)
        with opened(container) as fs:
            for step in prepare:
                step(fs)
            before = state(fs)
            descriptors = len(os.listdir("/proc/self/fd"))
            done = try_change(fs, change, failing, count, (before, after))
            refused += not done
            what = f"call {count}, {failing.failed}"
            # Counting a name that is gone can't fail the unlink any more: too high keeps the data, and check finds it.
            uncounted = done and (name, failing.failed) == ("unlink-group", "setxattr")
            assert uncounted or outcome(fs) == after, what
            if failing.failed not in ("unlink", "rmdir") and not (done and failing.failed in READING):
                assert staged(container) == [], what  # else clearing failed: it is there until the next mount
            fs.forget_all()
            assert len(os.listdir("/proc/self/fd")) <= descriptors + 8, f"{what}: descriptors stay open"
        problems = container.check(repair=True)
        assert [problem.kind for problem in problems] == (["link-count"] if uncounted else []), what
        with opened(container) as fs:
            assert outcome(fs) == after, what
        container.destroy()
        if not failing.failed:
            break
    assert refused > 1


def try_change(
    fs: TreeFs,
    change: Callable[[TreeFs], object],
    failing: FailingOs,
    count: int,
    states: tuple[dict[bytes, tuple[object, ...]], dict[bytes, tuple[object, ...]]],
) -> bool:
    """Make the change with its ``count``-th call failing, and again if it was refused; whether it was not."""
    before, after = states
    try:
        with failing.armed(count):
            change(fs)
    except OSError as error:
        what = f"call {count}, {failing.failed}"
        assert error.errno == failing.told, what
        if failing.failed in READING and outcome(fs) == after:
            return False
        assert state(fs) == before, f"{what}: changed in spite of the error"
        change(fs)
        return False
    return True
