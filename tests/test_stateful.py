"""Random operations on vzfs and on a plain copy of the template, side by side: they must agree after each step.

Run by hypothesis, twice: on a mount, and many more steps on a ``Tree`` without a mount.
``VZFS_HYPOTHESIS_PROFILE=long`` searches at random for long; without it the same examples run every time.

Differences that are meant and so not compared: the change time (copying a child up or unfolding it moves that of the
directory), a directory's size, blocks, access times but those just set.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.conftest import SMALL
from tests.engines import each_engine
from tests.stateful_model import FileSystem, Pair, PosixFs, TreeFs, copy_tree, drop_kernel_cache
from vzfs import Container, Store
from vzfs.linux import RENAME_EXCHANGE, RENAME_NOREPLACE

LONG = os.environ.get("VZFS_HYPOTHESIS_PROFILE") == "long"
NEW_NAMES = [b"new", b"other", b"\xff\xfe", b"n" * 255]
DEEPEST = 6
MODES = [0o644, 0o600, 0o755, 0o4755, 0o2750, 0o1777, 0o000, 0o6711]
TEXTS = [
    b"target",
    b"../etc/passwd",
    b"/",
    b"//vz/template/small/bin/tool",
    b"///vz/template/small/etc",
    b"//vz/template/small",
    b"//vz/template/none/x",
    b"//vz/templates/x",
    b"t" * 300,
]
XATTRS = [b"user.note", b"user.new", b"trusted.note", b"trusted.link", b"security.other"]
TIMES = [0, 1, -1, 1_000_000_000, 1_234_567_890_123_456_789, -987_654_321_012_345_678, 4_000_000_000_999_999_999]
MAX_DESCRIPTORS = 6

numbers = st.integers(0, 999)
"""Which of the things there are: taken modulo their number."""
names = st.one_of(st.sampled_from(NEW_NAMES), numbers)
"""A new name, or which of the names in the directory."""
data = st.binary(max_size=20) | st.sampled_from([b"x" * 5000, b"\0" * 4096, b"y" * 140_000])
offsets = st.sampled_from([0, 1, 5, 4095, 4096, 300_000, 1 << 20])
sizes = st.sampled_from([0, 1, 6, 4096, 100_000, 300_003, 1 << 20])


class Ours(Protocol):
    """vzfs as one variant of the test reaches it."""

    fs: FileSystem

    def remount(self) -> None: ...
    def forget(self, each: int, first: int) -> None: ...
    def check(self) -> None: ...
    def close(self) -> None: ...


class OnTree:
    """A tree without a mount."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self.fs = self._open(eager=False)

    def _open(self, *, eager: bool) -> TreeFs:
        return TreeFs(self._container.store.layout, self._container.path, eager=eager)

    def remount(self) -> None:
        eager = self.fs.eager
        self.fs.shut()
        self.check()
        self.fs = self._open(eager=eager)

    def forget(self, each: int, first: int) -> None:
        self.fs.forget_some(each, first)

    def check(self) -> None:
        assert self._container.check() == []

    def close(self) -> None:
        self.fs.shut()
        self.check()


class OnMount:
    """A mount."""

    def __init__(self, container: Container, engine: str) -> None:
        self._container = container
        self._engine = engine
        self._where = container.mount(sync="none", engine=engine)
        self.fs = PosixFs(self._where)

    def remount(self) -> None:
        self._container.umount()
        self.check()
        self._container.mount(sync="none", engine=self._engine)

    def forget(self, each: int, first: int) -> None:
        drop_kernel_cache(self._where)  # the kernel decides what it forgets

    def check(self) -> None:
        assert self._container.check() == []

    def close(self) -> None:
        self._container.umount()
        self.check()


class SideBySide(RuleBasedStateMachine):
    """Rules that do one thing on both sides."""

    def __init__(self, store: Store, scratch: Path, number: int, reach: Callable[[Container], Ours]) -> None:
        super().__init__()
        self._store = store
        self._container = store.create(number, template=SMALL)
        self._plain_path = copy_tree(store.template(SMALL).path, scratch / str(number))
        self._ours = reach(self._container)
        self._pair = Pair(PosixFs(self._plain_path), self._ours.fs)
        self._touched: set[bytes] = set()
        self._look = "touched"
        self._steps = 0

    @initialize(look=st.sampled_from(["touched", "all", "rarely"]), eager=st.booleans())
    def begin(self, look: str, eager: bool) -> None:
        """How often to look: looking makes nodes known, so some bugs need it and others hide from it."""
        self._look = look
        if isinstance(self._ours.fs, TreeFs):
            self._ours.fs.eager = eager

    def teardown(self) -> None:
        failed = True
        try:
            self._pair.compare_all()
            self._pair.close_descriptors()
            self._remount()
            self._pair.compare_all()
            failed = False
        finally:
            self._pair.close()
            try:
                self._ours.close()
            finally:
                if not failed:
                    self._container.destroy()
                remove(self._plain_path)

    @invariant()
    def agree(self) -> None:
        self._steps += 1
        touched, self._touched = self._touched, set()
        if self._look == "all" or self._steps % 10 == 0:
            self._pair.compare_all()
        elif self._look == "touched":
            for path in sorted(touched):
                self._pair.compare(path)

    # ------------------------------------------------------------------------------------------------- choosing paths

    def _paths(self, wanted: Callable[[int], bool]) -> list[bytes]:
        top = self._pair.plain.root
        found = []
        for folder, directories, files in os.walk(top):
            directories.sort()
            for name in sorted(directories + files):
                path = os.path.join(folder, name)
                if wanted(os.lstat(path).st_mode):
                    found.append(path[len(top) + 1 :])
        return found

    def _one(self, number: int, wanted: Callable[[int], bool] = lambda mode: True) -> bytes:
        found = self._paths(wanted)
        return found[number % len(found)] if found else b"gone"

    def _place(self, folder: int, name: bytes | int) -> bytes:
        """A place for something new, or of something that is there."""
        folders = [b"", *(path for path in self._paths(stat.S_ISDIR) if path.count(b"/") < DEEPEST)]
        where = folders[folder % len(folders)]
        if isinstance(name, int):
            there = sorted(os.listdir(self._pair.plain.at(where)))
            name = there[name % len(there)] if there else b"new"
        return where + b"/" + name if where else name

    def _do(self, name: str, *arguments: object, touch: tuple[bytes, ...]) -> None:
        self._touch(*touch)
        self._pair.do(name, *arguments)

    def _touch(self, *paths: bytes) -> None:
        for path in paths:
            self._touched |= {path, path.rpartition(b"/")[0]}

    # ------------------------------------------------------------------------------------------------------ new things

    @rule(
        folder=numbers,
        name=names,
        content=data,
        mode=st.sampled_from(MODES),
        flags=st.sampled_from([0, os.O_EXCL, os.O_TRUNC]),
    )
    def create(self, folder: int, name: bytes | int, content: bytes, mode: int, flags: int) -> None:
        path = self._place(folder, name)
        self._touch(path)
        if self._is(path, lambda mode: not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))):
            return  # opening a FIFO or a device is the kernel's affair
        if self._pair.keep_open(path, os.O_RDWR | os.O_CREAT | flags, mode):
            self._pair.do_open(-1, "pwrite", content, 0)
            if self._pair.descriptor_count > MAX_DESCRIPTORS:
                self._pair.close_descriptor(0)

    def _is(self, path: bytes, wanted: Callable[[int], bool]) -> bool:
        try:
            return wanted(self._pair.plain.lstat(path).mode)
        except OSError:
            return False

    @rule(folder=numbers, name=names, mode=st.sampled_from(MODES))
    def mkdir(self, folder: int, name: bytes | int, mode: int) -> None:
        path = self._place(folder, name)
        self._do("mkdir", path, mode, touch=(path,))

    @rule(folder=numbers, name=names, kind=st.sampled_from([stat.S_IFIFO, stat.S_IFREG, stat.S_IFSOCK, stat.S_IFCHR]))
    def mknod(self, folder: int, name: bytes | int, kind: int) -> None:
        path = self._place(folder, name)
        self._do("mknod", path, kind | 0o640, os.makedev(1, 5) if kind == stat.S_IFCHR else 0, touch=(path,))

    @rule(folder=numbers, name=names, text=st.sampled_from(TEXTS))
    def symlink(self, folder: int, name: bytes | int, text: bytes) -> None:
        path = self._place(folder, name)
        self._do("symlink", text, path, touch=(path,))

    @rule(old=numbers, folder=numbers, name=names)
    def link(self, old: int, folder: int, name: bytes | int) -> None:
        source, path = self._one(old), self._place(folder, name)
        self._do("link", source, path, touch=(source, path))

    # ----------------------------------------------------------------------------------------------- removing, moving

    @rule(which=numbers)
    def unlink(self, which: int) -> None:
        path = self._one(which)
        self._do("unlink", path, touch=(path,))

    @rule(which=numbers)
    def unlink_something(self, which: int) -> None:
        path = self._one(which, lambda mode: not stat.S_ISDIR(mode))
        self._do("unlink", path, touch=(path,))

    @rule(which=numbers)
    def rmdir(self, which: int) -> None:
        path = self._one(which, stat.S_ISDIR)
        self._do("rmdir", path, touch=(path,))

    @rule(which=numbers)
    def rmdir_something(self, which: int) -> None:
        path = self._one(which)
        self._do("rmdir", path, touch=(path,))

    @rule(which=numbers)
    def empty_directory(self, which: int) -> None:
        """Remove what is in a directory, but for directories that aren't empty."""
        folder = self._one(which, stat.S_ISDIR)
        for name in sorted(os.listdir(self._pair.plain.at(folder)) if self._is(folder, stat.S_ISDIR) else ()):
            path = folder + b"/" + name
            self._do("rmdir" if self._is(path, stat.S_ISDIR) else "unlink", path, touch=(path,))

    @rule(old=numbers, folder=numbers, name=names, flags=st.sampled_from([0, 0, 0, RENAME_NOREPLACE]))
    def rename(self, old: int, folder: int, name: bytes | int, flags: int) -> None:
        source, path = self._one(old), self._place(folder, name)
        self._do("rename", source, path, flags, touch=(source, path))

    @rule(old=numbers, new=numbers, flags=st.sampled_from([0, 0, RENAME_EXCHANGE]))
    def rename_directory(self, old: int, new: int, flags: int) -> None:
        source, path = self._one(old, stat.S_ISDIR), self._one(new, stat.S_ISDIR)
        self._do("rename", source, path, flags, touch=(source, path))

    @rule(old=numbers, folder=numbers, name=st.sampled_from(NEW_NAMES))
    def move_directory(self, old: int, folder: int, name: bytes) -> None:
        source, path = self._one(old, stat.S_ISDIR), self._place(folder, name)
        self._do("rename", source, path, touch=(source, path))

    @rule(old=numbers, new=numbers)
    def exchange(self, old: int, new: int) -> None:
        source, path = self._one(old), self._one(new)
        self._do("rename", source, path, RENAME_EXCHANGE, touch=(source, path))

    # ---------------------------------------------------------------------------------------------- content, attributes

    @rule(
        which=numbers,
        flags=st.sampled_from([os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND]),
    )
    def open_and_keep(self, which: int, flags: int) -> None:
        path = self._one(which, stat.S_ISREG)
        self._touch(path)
        if self._pair.keep_open(path, flags) and self._pair.descriptor_count > MAX_DESCRIPTORS:
            self._pair.close_descriptor(0)

    @precondition(lambda self: self._pair.descriptor_count)
    @rule(which=numbers, offset=offsets)
    def read_descriptor(self, which: int, offset: int) -> None:
        which %= self._pair.descriptor_count
        self._pair.do_open(which, "pread", 10_000, offset)
        self._pair.do_open(which, "fstat")

    @precondition(lambda self: self._pair.descriptor_count)
    @rule(which=numbers, content=data, offset=offsets)
    def write_descriptor(self, which: int, content: bytes, offset: int) -> None:
        which %= self._pair.descriptor_count
        self._pair.do_open(which, "pwrite", content, offset)
        self._pair.do_open(which, "fstat")

    @precondition(lambda self: self._pair.descriptor_count)
    @rule(which=numbers, size=sizes)
    def truncate_descriptor(self, which: int, size: int) -> None:
        which %= self._pair.descriptor_count
        self._pair.do_open(which, "ftruncate", size)
        self._pair.do_open(which, "fstat")

    @precondition(lambda self: self._pair.descriptor_count)
    @rule(which=numbers, mode=st.sampled_from(MODES))
    def chmod_descriptor(self, which: int, mode: int) -> None:
        which %= self._pair.descriptor_count
        self._pair.do_open(which, "fchmod", mode)
        self._pair.do_open(which, "fstat")
        self._pair.do_open(which, "fsync")

    @precondition(lambda self: self._pair.descriptor_count)
    @rule(which=numbers)
    def close_descriptor(self, which: int) -> None:
        self._pair.close_descriptor(which % self._pair.descriptor_count)

    @rule(which=numbers, content=data, offset=offsets, append=st.booleans())
    def write(self, which: int, content: bytes, offset: int, append: bool) -> None:
        path = self._one(which, stat.S_ISREG)
        self._touch(path)
        if self._pair.keep_open(path, os.O_WRONLY | (os.O_APPEND if append else 0)):
            self._pair.do_open(-1, "append" if append else "pwrite", content, *(() if append else (offset,)))
            self._pair.close_descriptor(-1)

    @rule(which=numbers, size=sizes)
    def truncate(self, which: int, size: int) -> None:
        path = self._one(which, lambda mode: not stat.S_ISLNK(mode))
        self._do("truncate", path, size, touch=(path,))

    @rule(which=numbers, act=st.sampled_from(["unlink", "rename", "link", "write", "chmod", "keep"]), name=names)
    def change_link_group(self, which: int, act: str, name: bytes | int) -> None:
        """Something that concerns all names of a hard link group, by one of them."""
        paths = [
            path for path in self._paths(lambda mode: not stat.S_ISDIR(mode)) if self._pair.plain.lstat(path).nlink > 1
        ]
        if not paths:
            return
        path, other = paths[which % len(paths)], self._place(which, name)
        self._touch(*paths)
        if act in ("rename", "link"):
            self._do(act, path, other, touch=(path, other))
        elif act == "unlink":
            self._do("unlink", path, touch=(path,))
        elif act == "chmod" and not self._is(path, stat.S_ISLNK):
            self._do("chmod", path, 0o640, touch=(path,))
        elif self._is(path, stat.S_ISREG) and self._pair.keep_open(path, os.O_RDWR):
            self._pair.do_open(-1, "pwrite", b"group", 0)
            if act == "write" or self._pair.descriptor_count > MAX_DESCRIPTORS:
                self._pair.close_descriptor(-1)

    @rule(which=numbers, mode=st.sampled_from(MODES))
    def chmod(self, which: int, mode: int) -> None:
        path = self._one(which, lambda mode: not stat.S_ISLNK(mode))
        self._do("chmod", path, mode, touch=(path,))

    @rule(which=numbers, uid=st.sampled_from([-1, 0, 1000]), gid=st.sampled_from([-1, 0, 8, 70_000]))
    def chown(self, which: int, uid: int, gid: int) -> None:
        path = self._one(which)
        self._do("chown", path, uid, gid, touch=(path,))

    @rule(which=numbers, atime_ns=st.sampled_from(TIMES), mtime_ns=st.sampled_from(TIMES))
    def utime(self, which: int, atime_ns: int, mtime_ns: int) -> None:
        path = self._one(which)
        self._touch(path)
        self._pair.utime(path, atime_ns, mtime_ns)

    @rule(
        which=numbers,
        name=st.sampled_from(XATTRS),
        value=st.binary(max_size=30),
        flags=st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]),
    )
    def setxattr(self, which: int, name: bytes, value: bytes, flags: int) -> None:
        path = self._one(which)
        self._do("setxattr", path, name, value, flags, touch=(path,))

    @rule(which=numbers, name=st.sampled_from(XATTRS), there=st.booleans())
    def removexattr(self, which: int, name: bytes, there: bool) -> None:
        path = self._one(which)
        has = [one for one in sorted(self._pair.plain.xattrs(path)) if not one.startswith(b"system.")] if there else []
        self._do("removexattr", path, has[0] if has else name, touch=(path,))

    # ----------------------------------------------------------------------------------------------------- only looking

    @rule(which=numbers)
    def look(self, which: int) -> None:
        self._pair.compare(self._one(which))

    @rule(which=numbers)
    def listdir(self, which: int) -> None:
        self._pair.do("listdir", self._one(which, stat.S_ISDIR))

    @rule(
        which=numbers,
        name=st.sampled_from([*NEW_NAMES, b"n" * 256]),
        call=st.sampled_from(["lstat", "listdir", "readlink"]),
    )
    def look_wrong(self, which: int, name: bytes, call: str) -> None:
        path = self._one(which)
        if not self._is(path, stat.S_ISLNK):
            self._pair.do(call, path + b"/" + name)
        self._pair.do(call, path if call != "listdir" or not self._is(path, stat.S_ISLNK) else name)

    @rule(which=numbers, call=st.sampled_from(["mkdir", "symlink", "link", "rename"]))
    def name_too_long(self, which: int, call: str) -> None:
        folder = self._one(which, stat.S_ISDIR)
        path = folder + b"/" + b"n" * 256
        arguments = {"mkdir": (path, 0o755), "symlink": (b"x", path)}.get(call, (self._one(which), path))
        self._do(call, *arguments, touch=(folder,))

    @rule(each=st.sampled_from([1, 1, 2, 3]), first=st.integers(0, 2))
    def forget(self, each: int, first: int) -> None:
        self._ours.forget(each, first)

    @rule()
    def remount(self) -> None:
        self._pair.close_descriptors()
        self._remount()
        self._pair.compare_all()

    def _remount(self) -> None:
        self._ours.remount()
        self._pair.ours = self._ours.fs


def remove(path: Path) -> None:
    """Remove a scratch tree."""
    import shutil

    shutil.rmtree(path)


def run(
    store: Store, scratch: Path, reach: Callable[[Container], Ours], examples: int, steps: int, long_examples: int
) -> None:
    """Run the machine; ``examples`` of ``steps`` each, or ``long_examples`` at random."""
    count = itertools.count(1)
    chosen = settings(
        max_examples=long_examples if LONG else examples,
        stateful_step_count=steps,
        derandomize=not LONG,
        database=None,
        deadline=None,
        print_blob=LONG,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: SideBySide(store, scratch, next(count), reach), settings=chosen)


@pytest.fixture
def scratch(clean_path: Path) -> Path:
    (clean_path / "plain").mkdir()
    return clean_path / "plain"


@pytest.fixture(autouse=True)
def _no_umask() -> object:
    before = os.umask(0)
    yield
    os.umask(before)


def test_tree_agrees_with_a_plain_directory(small_store: Store, scratch: Path) -> None:
    run(small_store, scratch, OnTree, examples=60, steps=50, long_examples=3000)


@each_engine
def test_mount_agrees_with_a_plain_directory(small_store: Store, scratch: Path, engine: str) -> None:
    run(small_store, scratch, lambda container: OnMount(container, engine), examples=12, steps=50, long_examples=400)
