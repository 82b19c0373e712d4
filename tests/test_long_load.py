"""Long load: data stays right while it is written in every way at once, and nothing in the server grows with time.

Lengths are for a run of a minute or so; ``VZFS_TEST_LONG=1`` runs the full ones: 100,000 files, a million requests.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.behaviours.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from tests.engines import PATIENCE_S
from tests.realuse_helpers import (
    Rig,
    area,
    clean,
    expect,
    loop_mounted,
    rig_fixture,  # noqa: F401
    small_tree,
    together,
    wait_for,
)
from tests.stateful_model import drop_kernel_cache
from vzfs import Container

LONG = os.environ.get("VZFS_TEST_LONG") == "1"
PAGE = mmap.PAGESIZE
KIB, MIB = 1 << 10, 1 << 20


# ---------------------------------------------------------------------------------------- one file, in all ways at once


CHANGES = 100_000 if LONG else 2500
"""Of each of the processes that change a file of their own."""
LARGEST = 600 * KIB


class Exerciser:
    """Random changes of one file, as fsx makes them: by write, mapping, truncation, holes; a model says what is right.

    Whatever was written one way is read another way: through two descriptors and a mapping, all open at once.
    """

    def __init__(self, path: Path, seed: int, *, holes: bool) -> None:
        self.path = path
        self.chance = random.Random(seed)
        self.model = bytearray(path.read_bytes())
        self.fds = [os.open(path, os.O_RDWR), os.open(path, os.O_RDWR | os.O_APPEND)]
        self.view: mmap.mmap | None = None
        self.done: list[str] = []
        self.changes = [self.write, self.write, self.append, self.store, self.store, self.cut, self.grow, self.sync]
        self.changes += [self.reopen, self.move, self.copy] + ([self.punch, self.reserve] if holes else [])
        self.looks = [self.read, self.load, self.read_anew, self.size]

    def run(self, count: int) -> None:
        """Make ``count`` changes, looking after each; then compare all of it by every way."""
        for _ in range(count):
            for step in (self.chance.choice(self.changes), self.chance.choice(self.looks)):
                self.done.append(step.__name__)
                step()
        for look in self.looks:
            look(0, len(self.model))
        self.unmap()
        for fd in self.fds:
            os.close(fd)

    def span(self) -> tuple[int, int]:
        """A part of the file."""
        start = self.chance.randrange(len(self.model) + 1)
        return start, self.chance.choice([0, 1, 100, PAGE, 3 * PAGE + 5, 70_000, LARGEST])

    def judge(self, got: bytes | memoryview, start: int, length: int) -> None:
        wanted = self.model[start : start + length]
        if got != wanted:
            at = next((n for n, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), len(wanted))
            raise AssertionError(
                f"{self.path.name}: wrong at {start + at} of {len(self.model)} after {self.done[-12:]}"
            )

    def fresh(self, length: int) -> bytes:
        return self.chance.randbytes(min(length, LARGEST))

    def put(self, start: int, data: bytes) -> None:
        if data:
            self.model.extend(bytes(max(0, start - len(self.model))))
            self.model[start : start + len(data)] = data

    def map(self) -> mmap.mmap | None:
        """All of the file, mapped anew if its size is another one."""
        if self.view is not None and len(self.view) != len(self.model):
            self.unmap()
        if self.view is None and self.model:
            self.view = mmap.mmap(self.fds[0], len(self.model))
        return self.view

    def unmap(self) -> None:
        if self.view is not None:
            self.view.close()
            self.view = None

    # ------------------------------------------------------------------------------------------------------- changes

    def write(self) -> None:
        start, length = self.span()
        start += self.chance.choice([0, 0, 0, 5000])  # leaves a hole
        data = self.fresh(min(length, max(0, LARGEST - start)))
        assert os.pwrite(self.fds[0], data, start) == len(data)
        self.put(start, data)

    def append(self) -> None:
        data = self.fresh(min(self.span()[1], LARGEST - len(self.model)) if len(self.model) < LARGEST else 0)
        assert os.write(self.fds[1], data) == len(data)
        self.put(len(self.model), data)

    def store(self) -> None:
        """Write through the mapping."""
        start, length = self.span()
        data = self.fresh(length)[: len(self.model) - start]
        if (view := self.map()) is not None:
            view[start : start + len(data)] = data
            self.put(start, data)

    def cut(self) -> None:
        if not self.chance.randrange(3):
            self.resize(self.span()[0])

    def grow(self) -> None:
        self.resize(min(LARGEST, len(self.model) + self.chance.choice([1, PAGE, 50_000])))

    def resize(self, size: int) -> None:
        self.unmap()
        if self.chance.randrange(2):
            os.ftruncate(self.fds[0], size)
        else:
            os.truncate(self.path, size)
        self.model[size:] = b""
        self.model.extend(bytes(size - len(self.model)))

    def sync(self) -> None:
        if self.view is not None and self.chance.randrange(2):
            self.view.flush()
        elif not self.chance.randrange(8):
            os.fsync(self.fds[0])

    def reopen(self) -> None:
        """Close a descriptor, or all and the mapping, so that the file is closed and opened anew."""
        if self.chance.randrange(2):
            self.unmap()
            os.close(self.fds[1])
        os.close(self.fds[0])
        if self.view is None:
            self.fds[1] = os.open(self.path, os.O_RDWR | os.O_APPEND)
        self.fds[0] = os.open(self.path, os.O_RDWR)

    def move(self) -> None:
        other = self.path.with_suffix(self.chance.choice([".a", ".b", ".c"]))
        os.rename(self.path, other)
        self.path = other

    def copy(self) -> None:
        """Copy a part of the file to another place in it."""
        start, length = self.span()
        length = min(length, len(self.model) - start)
        target = self.chance.randrange(len(self.model) + 1)
        if target < start + length and start < target + length:
            return  # they overlap: refused
        data = bytes(self.model[start : start + length])
        done = 0
        while done < len(data):
            done += os.copy_file_range(self.fds[0], self.fds[0], len(data) - done, start + done, target + done)
        self.put(target, data)

    def punch(self) -> None:
        start, length = self.span()
        if length:
            fallocate(self.fds[0], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, length)
            length = min(length, len(self.model) - start)
            self.model[start : start + length] = bytes(length)

    def reserve(self) -> None:
        start, length = self.span()
        length = min(length, LARGEST - start)
        if length > 0:
            fallocate(self.fds[0], 0, start, length)
            self.model.extend(bytes(max(0, start + length - len(self.model))))

    # --------------------------------------------------------------------------------------------------------- looks

    def read(self, start: int | None = None, length: int = 0) -> None:
        if start is None:
            start, length = self.span()
        self.judge(os.pread(self.chance.choice(self.fds), length, start), start, length)

    def load(self, start: int | None = None, length: int = 0) -> None:
        """Read through the mapping."""
        if start is None:
            start, length = self.span()
        if (view := self.map()) is not None:
            self.judge(view[start : start + length], start, length)

    def read_anew(self, start: int | None = None, length: int = 0) -> None:
        if start is None:
            start, length = self.span()
        with open(self.path, "rb", buffering=0) as file:
            self.judge(os.pread(file.fileno(), length, start), start, length)

    def size(self, _start: int = 0, _length: int = 0) -> None:
        assert os.fstat(self.fds[0]).st_size == len(self.model), self.done[-12:]
        assert self.path.stat().st_size == len(self.model), self.done[-12:]


def test_one_file_by_write_mapping_and_truncation_at_once(rig: Rig) -> None:
    """Four processes, each with its own file: the template's, one of a link group, the container's own."""
    source = small_tree(rig.place / "source-small")
    for number in range(3):
        (source / f"var/file{number}").write_bytes(random.Random(number).randbytes(300_000))
    os.link(source / "var/file2", source / "var/again2")
    rig.template("small", source)
    container, root = rig.mounted()
    (root / "tmp/own").write_bytes(b"own" * 10_000)

    def work(name: str, seed: int) -> Callable[[], None]:
        def steps() -> None:
            one = Exerciser(root / name, seed, holes=rig.engine != "pyfuse3")
            one.run(CHANGES)
            one.path.rename(root / f"{name}.end")
            (root / f"{name}.model").write_bytes(one.model)

        return steps

    names = ["var/file0", "var/file1", "var/file2", "tmp/own"]
    together(*[work(name, 10 + number) for number, name in enumerate(names)])
    for name in names:
        assert (root / f"{name}.end").read_bytes() == (root / f"{name}.model").read_bytes()
    assert (root / "var/again2").read_bytes() == (root / "var/file2.end").read_bytes()
    container.umount()
    clean(container)
    assert rig.store.template("small").verify() == []
    for name in ("var/file0", "var/file1", "tmp/own"):  # file2 stands for what a link group has
        assert (area(container) / f"{name}.end").read_bytes() == (area(container) / f"{name}.model").read_bytes()
    with container.mounted() as root:
        for name in names:
            assert (root / f"{name}.end").read_bytes() == (root / f"{name}.model").read_bytes()


# ---------------------------------------------------------------------------------------------------------- old readers


ROUNDS = 100 if LONG else 5


def new_content(old: bytes, action: str) -> bytes | None:
    """What is in a file after an action; ``None``: it is gone."""
    return {
        "write": b"WRITTEN!" + old[8:],
        "append": old + b"appended",
        "truncate": old[:100],
        "empty": b"",
        "store": b"STORED!!" + old[8:],
        "replace": b"another file",
        "unlink": None,
    }.get(action, old)


def act(path: Path, action: str) -> None:
    """Change the file as a program would that knows of no reader."""
    if action == "write":
        with open(path, "r+b", buffering=0) as file:
            file.write(b"WRITTEN!")
    elif action == "append":
        with open(path, "ab") as file:
            file.write(b"appended")
    elif action == "truncate":
        os.truncate(path, 100)
    elif action == "empty":
        os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    elif action == "store":
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            view[:8] = b"STORED!!"
    elif action == "replace":
        path.with_suffix(".new").write_bytes(b"another file")
        path.with_suffix(".new").rename(path)
    elif action == "unlink":
        path.unlink()
    elif action == "rename":
        path.rename(path.with_suffix(".moved"))
    elif action == "chmod":
        path.chmod(0o600)
    elif action == "link":
        os.link(path, path.with_suffix(".linked"))


ACTIONS = ["write", "append", "truncate", "empty", "store", "replace", "unlink", "rename", "chmod", "link"]
SAME_INODE = {"write", "append", "truncate", "empty", "store"}
"""Those that change the data of the file that readers have open."""


def old_content(number: int) -> bytes:
    """What the template has in file ``number``."""
    return f"file {number} of the template\n".encode() * 700


class Reader:
    """Holds template files open, by descriptor and mapping, and says of each whether it sees the template's data."""

    def __init__(self, folder: Path, *, keeps: bool) -> None:
        self.keeps = keeps
        self.files: list[tuple[int, mmap.mmap]] = []
        for number in range(len(ACTIONS)):
            fd = os.open(folder / f"f{number}", os.O_RDONLY)
            self.files.append((fd, mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)))

    def look(self, number: int, *, finished: bool) -> None:
        """The file shows what it showed first, or, where readers share, what it is changed to."""
        fd, view = self.files[number]
        old = old_content(number)
        allowed = [old]
        if not self.keeps and ACTIONS[number] in SAME_INODE:
            new = new_content(old, ACTIONS[number])
            assert new is not None
            allowed = [new] if finished else [old, new]
        seen = os.pread(fd, len(old) + 100, 0)
        assert seen in allowed, f"{ACTIONS[number]}: a reader sees {seen[:40]!r} ({len(seen)} bytes)"
        if self.keeps:
            assert view[:] == old, f"{ACTIONS[number]}: a mapping changed"
            assert os.fstat(fd).st_size >= 0

    def close(self) -> None:
        for fd, view in self.files:
            view.close()
            os.close(fd)


def test_readers_of_template_files_while_others_change_them(rig: Rig) -> None:
    """Three readers hold files open that three others write, cut, replace, rename and unlink meanwhile.

    Of small files, which are never split, ``test_held`` tells more.
    """
    source = small_tree(rig.place / "source-small")
    for folder in range(ROUNDS):
        (source / f"var/r{folder}").mkdir()
        for number in range(len(ACTIONS)):
            (source / f"var/r{folder}/f{number}").write_bytes(old_content(number))
    rig.template("small", source)
    container, root = rig.mounted(passthrough_above=0)  # on the direct engine readers keep what they opened then
    for folder in range(ROUNDS):
        readers_and_changers(root / f"var/r{folder}", folder, keeps=rig.engine == "direct")
    container.umount()
    clean(container)
    with container.mounted() as root:
        for folder in range(ROUNDS):
            after_changes(root / f"var/r{folder}")
    assert rig.store.template("small").verify() == []


READERS, CHANGERS = 3, 3


def readers_and_changers(folder: Path, seed: int, *, keeps: bool) -> None:
    """One folder's files, read by some processes while others change them."""
    progress = mmap.mmap(-1, PAGE)  # shared: how many readers have opened all, how many changers are done

    def read(number: int) -> None:
        reader = Reader(folder, keeps=keeps)
        progress[number] = 1
        chance = random.Random(seed + number)
        while not all(progress[READERS : READERS + CHANGERS]):
            reader.look(chance.randrange(len(ACTIONS)), finished=False)
        for file in range(len(ACTIONS)):
            reader.look(file, finished=True)
        reader.close()

    def change(number: int) -> None:
        wait_for(lambda: all(progress[:READERS]))
        mine = list(range(number, len(ACTIONS), CHANGERS))
        random.Random(seed).shuffle(mine)
        for file in mine:
            act(folder / f"f{file}", ACTIONS[file])
            judge_new_reader(folder, file)
        progress[READERS + number] = 1

    def limited(work: Callable[[int], None], number: int) -> Callable[[], None]:
        def steps() -> None:
            signal.alarm(int(5 * PATIENCE_S))  # others wait for it in vain if it fails
            work(number)

        return steps

    together(*[limited(read, n) for n in range(READERS)], *[limited(change, n) for n in range(CHANGERS)])
    after_changes(folder)


def judge_new_reader(folder: Path, number: int) -> None:
    """Who opens the file after its change sees it."""
    action = ACTIONS[number]
    wanted = new_content(old_content(number), action)
    path = folder / f"f{number}"
    if action == "rename":
        expect(errno.ENOENT, os.open, path, os.O_RDONLY)
        path = path.with_suffix(".moved")
    if wanted is None:
        expect(errno.ENOENT, os.open, path, os.O_RDONLY)
    else:
        assert path.read_bytes() == wanted, action
        assert path.stat().st_size == len(wanted), action


def after_changes(folder: Path) -> None:
    for number in range(len(ACTIONS)):
        judge_new_reader(folder, number)
    assert stat.S_IMODE((folder / f"f{ACTIONS.index('chmod')}").stat().st_mode) == 0o600
    linked = folder / f"f{ACTIONS.index('link')}.linked"
    assert linked.read_bytes() == old_content(ACTIONS.index("link"))


# ------------------------------------------------------------------------------------------------------- nothing grows


FILES = 1200
"""Opened in each round; more than an engine keeps backing files registered for."""
OPEN_ROUNDS = 42 if LONG else 6
"""Each opens FILES files of the template and as many of the container's own."""
REQUESTS = 1_000_000 if LONG else 40_000
GROWTH = MIB
"""Bytes of memory that may come and go; a tenth of it was measured. Thirty bytes kept of each request are more."""


class Server:
    """What the serving process of a container holds."""

    def __init__(self, container: Container) -> None:
        self.pid = container.status().pid or 0
        assert self.pid

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Bytes of its own: what it shares with others, as a template's index, is left out."""
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * KIB
        raise AssertionError("no such line")

    @contextlib.contextmanager
    def does_not_grow(self, memory: int, descriptors: int) -> Iterator[None]:
        """What is done meanwhile costs at most so many bytes, and so many descriptors once it is over."""
        before, open_before = self.memory(), self.descriptors()
        yield
        wait_for(lambda: self.descriptors() <= open_before + descriptors)  # RELEASE has no answer to wait for
        grown = self.memory() - before
        assert grown <= memory, f"{grown:,} bytes more"


def files_in_use() -> int:
    """Open files of the whole machine, registered backing files among them (proc_sys_fs(5))."""
    return int(Path("/proc/sys/fs/file-nr").read_text().split()[0])


@pytest.mark.alone  # it counts the open files of the whole machine
def test_files_opened_over_time_leave_nothing(rig: Rig) -> None:
    source = small_tree(rig.place / "source-small")
    for number in range(FILES):
        (source / f"var/f{number}").write_bytes(b"content of %d\n" % number)
    rig.template("small", source)
    container, root = rig.mounted()
    (root / "new").mkdir()

    def open_all(label: int) -> None:
        for number in range(FILES):
            assert (root / f"var/f{number}").read_bytes() == b"content of %d\n" % number
            path = root / f"new/f{number}"
            path.write_bytes(b"%d %d\n" % (label, number))
            assert path.read_bytes() == b"%d %d\n" % (label, number)
        for number in range(FILES):
            os.unlink(root / f"new/f{number}")
        drop_kernel_cache(root)

    for label in range(2):  # what is kept for use is there then
        open_all(label)
    opened = 2 * FILES * (OPEN_ROUNDS - 2)
    in_use = files_in_use()
    with Server(container).does_not_grow(memory=GROWTH, descriptors=64):
        for label in range(2, OPEN_ROUNDS):
            open_all(label)
    assert files_in_use() - in_use < opened // 2, "files stay open in the kernel"  # others work on this machine, too
    container.umount()
    clean(container)


def test_space_of_removed_files_comes_back(rig: Rig, tmp_path: Path) -> None:
    """No registration outlives its file: files that were read and written make room for the next ones."""
    with loop_mounted(tmp_path / "image", tmp_path / "disk", 64 * MIB, "ext4", ("-m", "0")) as disk:
        container = rig.container(disk / "ve/101")
        root = container.mount(tmp_path / "mnt")
        (root / "tmp/unfolds").touch()
        data = b"x" * (20 * MIB)
        free = os.statvfs(disk).f_bavail
        for number in range(8):
            path = root / f"tmp/large{number}"
            path.write_bytes(data)
            assert path.read_bytes() == data
            if number % 2:
                os.truncate(path, 0)
            os.unlink(path)
            wait_for(lambda: os.statvfs(disk).f_bavail > free - MIB // 4096)
        container.umount()
        clean(container)


class Requests:
    """Requests that the kernel passes on each time, of all kinds, none of which leaves anything behind."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.chance = random.Random(seed)
        self.made = 0
        self.kinds = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("ask_")]
        (root / "ask").mkdir()
        (root / "ask/own").write_bytes(b"own")
        (root / "ask/big").write_bytes(bytes(10 * PAGE))

    def run(self, count: int) -> None:
        """Make at least ``count`` requests."""
        end = self.made + count
        while self.made < end:
            self.made += self.chance.choice(self.kinds)()

    def ask_statfs(self) -> int:
        os.statvfs(self.root)
        return 1

    def ask_missing(self) -> int:
        expect(errno.ENOENT, os.lstat, self.root / f"etc/missing{self.made}")
        return 1

    def ask_mode(self) -> int:
        os.chmod(self.root / "ask/own", 0o600 + self.made % 8)
        return 1

    def ask_times(self) -> int:
        os.utime(self.root / "ask/own")
        return 1

    def ask_xattrs(self) -> int:
        path = self.root / "ask/own"
        os.setxattr(path, "user.count", b"%d" % self.made)
        assert os.getxattr(path, "user.count") == b"%d" % self.made
        os.removexattr(path, "user.count")
        return 3

    def ask_open(self) -> int:
        path = self.root / f"usr/lib/deep/{self.chance.randrange(300):03}"
        assert path.read_bytes()
        return 2

    def ask_write(self) -> int:
        with open(self.root / "ask/big", "r+b", buffering=0) as file:
            file.seek(self.chance.randrange(10) * PAGE)
            file.write(b"w" * 100)
        return 2

    def ask_list(self) -> int:
        assert len(os.listdir(self.root / "usr/lib/deep")) == 302
        return 2

    def ask_make(self) -> int:
        path = self.root / f"ask/made{self.made}"
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.rename(path, f"{path}.renamed")
        os.unlink(f"{path}.renamed")
        return 5

    def ask_folder(self) -> int:
        path = self.root / f"ask/folder{self.made}"
        path.mkdir()
        os.symlink("x", path / "link")
        assert os.readlink(path / "link") == "x"
        os.unlink(path / "link")
        path.rmdir()
        return 6

    def ask_link(self) -> int:
        path = self.root / f"ask/link{self.made}"
        os.link(self.root / "ask/own", path)
        os.unlink(path)
        return 3

    def ask_size(self) -> int:
        os.truncate(self.root / "ask/big", (5 + self.chance.randrange(5)) * PAGE)
        return 1

    def ask_unlinked(self) -> int:
        """A file without a name, written and read."""
        path = self.root / f"ask/gone{self.made}"
        with open(path, "w+b", buffering=0) as file:
            os.unlink(path)
            file.write(b"still there")
            assert os.pread(file.fileno(), 20, 0) == b"still there"
        return 4


@pytest.mark.parametrize("known", [True, False], ids=["remembered", "forgotten"])
def test_memory_is_flat_over_many_requests(rig: Rig, known: bool) -> None:
    """Whether the kernel keeps what it has seen, or forgets it all the time."""
    container, root = rig.mounted()
    requests = Requests(root, 1)
    block = REQUESTS // 20

    def ask(blocks: int) -> None:
        for _ in range(blocks):
            requests.run(block)
            if not known:
                drop_kernel_cache(root)

    ask(4)
    with Server(container).does_not_grow(memory=GROWTH, descriptors=16):
        ask(16)
    assert requests.made >= REQUESTS
    container.umount()
    clean(container)
