"""The serving process killed at every step of every change: everything is then as it was before or as it is after.

A case is what is prepared, what a program then does, and which named steps (``vzfs.store.faults``) that must pass. The
plain directory says what the states before and after each thing done are. For K = 1, 2, … the K-th step kills the
server, until it survives the whole case; each time ``check`` repairs all that it finds, and what the container shows
then is one of two states, whole.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.engines import DEFAULT, ENGINES
from tests.stateful_model import FileSystem, PosixFs, Row, TreeFs, copy_tree, snapshot
from vzfs import Container, Store
from vzfs.linux import RENAME_EXCHANGE
from vzfs.store import opened
from vzfs.store.faults import VARIABLE, FaultPoints
from vzfs.store.lock import LOCK, read_holder
from vzfs.tree import groups, link, make, orphans, remove, rename
from vzfs.tree.become import directory, file, record, stage

PATIENCE_S = 120.0
MOST_STEPS = 60

Act = Callable[[FileSystem], object]


def call(name: str, *arguments: object) -> Act:
    """The operation ``name`` of a file system with these arguments."""
    return lambda fs: getattr(fs, name)(*arguments)


def put(path: bytes, content: bytes, flags: int = 0, offset: int = 0) -> Act:
    """Write into a file as a program does."""

    def act(fs: FileSystem) -> None:
        fd = fs.open(path, os.O_WRONLY | flags, 0o644)
        try:
            if content:
                fs.pwrite(fd, content, offset)
        finally:
            fs.close(fd)

    return act


def keep_open(path: bytes, flags: int = os.O_RDWR) -> Act:
    """Open a file and leave it open."""
    return lambda fs: fs.open(path, flags)


@dataclass(frozen=True)
class Case:
    """``prepare`` happens before the dangerous mount; ``acts`` on it, as user and group ``uid``."""

    acts: list[Act]
    steps: set[str]
    prepare: list[Act] = field(default_factory=list)
    uid: int = 0


UNFOLD = {"unfold:made", "unfold:planted", "unfold:staged", "unfold:swapped"}
COPY = {"copy-up:made", "copy-up:copied", "copy-up:staged", "copy-up:renamed"}
RECORD = {"record:made", "record:staged", "record:renamed"}
RENAME = {"rename:before", "rename:done"}
GROUP = {"link-group:staged", "link-group:renamed"}
COUNT = {"link-group:counted"}
UNLINK = {"unlink:before", "unlink:done"}
PASSWD, PASSWD_COPY, LARGE = b"etc/passwd", b"tmp/passwd", b"lib/large"
PAIR_A, PAIR_B = b"usr/share/pair-a", b"usr/share/pair-b"
EMPTY_FOLDED, EMPTY_REAL = b"var/nest/ed/empty", b"tmp/real"
MAKE_OPEN = [call("chmod", b"var/mail", 0o2777), call("chmod", b"usr/acl", 0o777)]

WITH_STEPS = (directory, file, groups, link, make, opened, orphans, record, remove, rename, stage)

CASES = {
    "copy-up": Case([put(PASSWD, b"new")], UNFOLD | COPY),
    "copy-up-deep": Case([put(b"lib/deep/er/est/file", b"new")], UNFOLD | COPY),
    "copy-up-large": Case([put(LARGE, b"new", 0, 200_000)], COPY),
    "copy-up-sparse": Case([put(b"var/log/sparse", b"new", 0, 500_000)], COPY),
    "copy-up-truncating": Case([put(LARGE, b"", os.O_TRUNC), put(LARGE, b"new")], COPY),
    "copy-up-emptying": Case([put(LARGE, b"", os.O_TRUNC)], COPY),
    "copy-up-cutting": Case([call("truncate", LARGE, 5)], COPY),
    "copy-up-link": Case([call("chown", b"etc/relative", 1000, 8)], COPY - {"copy-up:made"}),
    "copy-up-device": Case([call("chmod", b"dev/null", 0o600)], COPY - {"copy-up:made"}),
    "record-acl": Case([call("chmod", b"etc/with-acl", 0o600)], RECORD),
    "record": Case([call("chmod", b"etc/shadow", 0o600)], RECORD),
    "record-owner": Case([call("chown", b"bin/su", 1000, 1000)], RECORD),
    "record-times": Case([call("utime", PASSWD, 5, 6)], RECORD),
    "record-xattr": Case([call("setxattr", PASSWD, b"user.new", b"1")], RECORD),
    "record-again": Case([call("chmod", PASSWD, 0o600)], set(), [call("chmod", PASSWD, 0o640)]),
    "record-to-copy": Case([put(PASSWD, b"new")], COPY, [call("chmod", PASSWD, 0o640)]),
    "record-xattr-to-copy": Case([put(PASSWD, b"new")], COPY, [call("setxattr", PASSWD, b"user.new", b"1")]),
    "unfold-for-mode": Case([call("chmod", b"var/nest/ed", 0o700)], UNFOLD),
    "unfold-for-name": Case([call("mkdir", b"lib/deep/er/est/new", 0o750)], UNFOLD),
    "group-copy": Case([put(PAIR_A, b"new")], (COPY - {"copy-up:renamed"}) | GROUP),
    "group-record": Case([call("chmod", b"bin/tool", 0o700)], (RECORD - {"record:renamed"}) | GROUP),
    "group-record-to-copy": Case(
        [put(b"lib/deep/tool-again", b"new")],
        (COPY - {"copy-up:renamed"}) | GROUP,
        [call("chmod", b"bin/tool", 0o700)],
    ),
    "group-link": Case([call("chown", b"usr/symlink", 7, 7)], GROUP),
    "group-fifo": Case([call("chmod", b"dev/fifo", 0o600)], GROUP),
    "link-template": Case([call("link", PASSWD, PASSWD_COPY)], GROUP | COUNT),
    "link-record": Case([call("link", PASSWD, PASSWD_COPY)], GROUP | COUNT, [call("chmod", PASSWD, 0o640)]),
    "link-group": Case([call("link", PAIR_A, b"tmp/third")], GROUP | COUNT),
    "link-own": Case([call("link", PASSWD, PASSWD_COPY)], set(), [put(PASSWD, b"new")]),
    "unlink-template": Case([call("unlink", PASSWD)], UNLINK),
    "unlink-own": Case([call("unlink", PASSWD)], UNLINK, [put(PASSWD, b"new")]),
    "unlink-group": Case([call("unlink", PAIR_A)], UNLINK | COUNT),
    "unlink-group-all": Case([call("unlink", PAIR_A), call("unlink", PAIR_B)], UNLINK | COUNT | {"link-group:ended"}),
    "unlink-group-copy": Case([call("unlink", PAIR_A)], UNLINK | COUNT, [put(PAIR_A, b"new")]),
    "orphan": Case([keep_open(PASSWD), call("unlink", PASSWD)], COPY | {"orphan:moved"}),
    "orphan-link": Case(
        [keep_open(PASSWD), call("unlink", PASSWD)],
        UNLINK,
        [put(PASSWD, b"new"), call("link", PASSWD, PASSWD_COPY)],
    ),
    "orphan-group": Case([keep_open(PAIR_A), call("unlink", PAIR_A), call("unlink", PAIR_B)], {"link-group:ended"}),
    "orphan-replaced": Case([keep_open(PASSWD), call("rename", b"etc/shadow", PASSWD)], {"orphan:linked", *RENAME}),
    "rename": Case([call("rename", PASSWD, PASSWD_COPY)], RENAME),
    "rename-over": Case([call("rename", PASSWD, b"etc/conf.d/a.conf")], RENAME),
    "rename-own-over": Case([call("rename", b"etc/new", PASSWD)], RENAME, [put(b"etc/new", b"new", os.O_CREAT)]),
    "rename-over-group": Case([call("rename", PASSWD, PAIR_A)], RENAME | COUNT),
    "rename-group-over": Case([call("rename", PAIR_A, PASSWD)], RENAME),
    "rename-folded": Case([call("rename", b"lib/deep", b"tmp/deep")], RENAME),
    "rename-folded-over-folded": Case([call("rename", b"usr/share/doc", b"var/empty")], RENAME),
    "rename-real-over-folded": Case(
        [call("rename", b"usr/share/doc", b"var/empty")],
        RENAME | {"unfold:swapped"},
        [put(b"usr/share/doc/new", b"new", os.O_CREAT)],
    ),
    "rename-folded-over-real": Case(
        [call("rename", b"usr/share/doc", EMPTY_REAL)], RENAME | UNFOLD, [call("mkdir", EMPTY_REAL, 0o750)]
    ),
    "exchange": Case([call("rename", PASSWD, LARGE, RENAME_EXCHANGE)], RENAME),
    "exchange-folded": Case([call("rename", b"lib/deep", PASSWD, RENAME_EXCHANGE)], RENAME),
    "exchange-real-folded": Case(
        [call("rename", b"lib/deep", b"tmp/real", RENAME_EXCHANGE)], RENAME, [call("mkdir", EMPTY_REAL, 0o750)]
    ),
    "rmdir-folded": Case([call("rmdir", EMPTY_FOLDED)], {"rmdir:before", "rmdir:done"}),
    "rmdir-real": Case([call("rmdir", EMPTY_REAL)], {"rmdir:before", "rmdir:done"}, [call("mkdir", EMPTY_REAL, 0o750)]),
    "user-create": Case(
        [put(b"tmp/new", b"", os.O_CREAT), put(b"tmp/new", b"new")], {"make:made", "make:named"}, uid=1000
    ),
    "user-create-empty": Case([put(b"tmp/new", b"", os.O_CREAT)], {"make:made", "make:named"}, uid=1000),
    "user-mkdir": Case([call("mkdir", b"tmp/new", 0o750)], {"make:made", "make:named"}, uid=1000),
    "user-fifo": Case([call("mknod", b"tmp/new", stat.S_IFIFO | 0o640)], {"make:made", "make:named"}, uid=1000),
    "user-symlink": Case(
        [call("symlink", b"//vz/template/small/bin", b"tmp/new")], {"make:made", "make:named"}, uid=1000
    ),
    "user-setgid-file": Case(
        [put(b"var/mail/new", b"", os.O_CREAT), put(b"var/mail/new", b"new")],
        {"make:made", "make:named"},
        MAKE_OPEN,
        1000,
    ),
    "user-setgid-mkdir": Case([call("mkdir", b"var/mail/new", 0o750)], {"make:made", "make:named"}, MAKE_OPEN, 1000),
    "user-acl-file": Case(
        [put(b"usr/acl/new", b"", os.O_CREAT), put(b"usr/acl/new", b"new")],
        {"make:made", "make:named"},
        MAKE_OPEN,
        1000,
    ),
    "user-acl-mkdir": Case([call("mkdir", b"usr/acl/new", 0o777)], {"make:made", "make:named"}, MAKE_OPEN, 1000),
}
MOUNTED = [
    "copy-up",
    "copy-up-truncating",
    "record-owner",
    "record-to-copy",
    "unfold-for-name",
    "group-copy",
    "link-template",
    "unlink-group-all",
    "orphan",
    "orphan-replaced",
    "rename-over-group",
    "rename-folded",
    "rename-real-over-folded",
    "rename-folded-over-real",
    "exchange-real-folded",
    "user-create",
    "user-acl-mkdir",
]
"""Cases that are tried on a mount, too; each crash there takes most of a second."""
ENGINES_DIFFER = ["copy-up", "copy-up-truncating", "orphan", "orphan-replaced", "unlink-group-all", "user-create"]
"""Those of them where another engine asks the tree otherwise: it opens and creates by other calls."""


# ------------------------------------------------------------------------------------------------------------ a program


@dataclass
class Program:
    """A process that does the acts, telling after each and then waiting for a go-ahead; then it ends."""

    pid: int
    told: int
    answer: int

    @staticmethod
    def start(reach: Callable[[], FileSystem], acts: list[Act], uid: int) -> Program:
        told, tell = os.pipe()
        wait, answer = os.pipe()
        pid = os.fork()
        if pid:
            os.close(tell)
            os.close(wait)
            return Program(pid, told, answer)
        code = 1
        try:
            os.close(told)
            os.close(answer)
            signal.alarm(int(PATIENCE_S))
            os.umask(0)
            fs = reach()
            if uid:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            code = Program._work(fs, acts, tell, wait)
        finally:
            os._exit(code)

    @staticmethod
    def _work(fs: FileSystem, acts: list[Act], tell: int, wait: int) -> int:
        for act in acts:
            try:
                act(fs)
            except OSError as error:
                os.write(tell, f"{errno.errorcode.get(error.errno or 0)}: {error}".encode())
                return 2
            os.write(tell, b".")
            if not os.read(wait, 1):
                return 3
        return 0

    def run(self, after_each: Callable[[], object] = lambda: None) -> tuple[int, str]:
        """How many acts succeeded, and why the next one did not."""
        done = 0
        text = ""
        try:
            while True:
                ready = select.select([self.told], [], [], PATIENCE_S)[0]
                assert ready, "the program hangs"
                said = os.read(self.told, 4096)
                if said != b".":
                    text = said.decode()
                    break
                done += 1
                after_each()
                os.write(self.answer, b".")
        finally:
            os.close(self.told)
            os.close(self.answer)
            os.waitpid(self.pid, 0)
        return done, text


def directory(path: Path) -> Callable[[], FileSystem]:
    """A file system as a program inside it sees it, whoever may enter the folders above."""

    def reach() -> FileSystem:
        os.chdir(path)
        return PosixFs(Path("."))

    return reach


# --------------------------------------------------------------------------------------------------------------- states


State = dict[bytes, tuple[object, ...]]


def state(fs: FileSystem, start_ns: int) -> State:
    """What is compared of the whole tree: all times since ``start_ns`` are one, inode numbers tell who shares one."""
    found = snapshot(fs)
    first: dict[int, bytes] = {}
    for path in sorted(found):
        first.setdefault(found[path].info.ino, path)
    return {path: _facts(one, first[one.info.ino], start_ns) for path, one in found.items()}


def _facts(one: Row, same_as: bytes, start_ns: int) -> tuple[object, ...]:
    mtime = "now" if one.info.mtime_ns >= start_ns else one.info.mtime_ns
    return (*one.info.comparable, mtime, one.target, tuple(sorted(one.xattrs.items())), one.content, same_as)


def differences(wanted: State, got: State) -> list[str]:
    """Where two states differ, shortly."""
    lines = [f"missing: {path!r}" for path in wanted.keys() - got.keys()]
    lines += [f"surplus: {path!r}" for path in got.keys() - wanted.keys()]
    for path in wanted.keys() & got.keys():
        for first, second in zip(wanted[path], got[path], strict=True):
            if first != second:
                lines.append(f"{path!r}: wanted {str(first)[:80]}, got {str(second)[:80]}")
    return sorted(lines)


class Bench:
    """One case on its own store: the wanted states from a plain directory, and containers prepared for a crash."""

    def __init__(self, store: Store, scratch: Path, case: Case) -> None:
        self._store = store
        self._case = case
        self._numbers = iter(range(1, 1000))
        self.start_ns = time.time_ns() - 100_000_000
        plain = copy_tree(store.template(SMALL).path, scratch / "plain")
        for act in case.prepare:
            act(PosixFs(plain))
        self.states = [state(PosixFs(plain), self.start_ns)]
        program = Program.start(directory(plain), case.acts, case.uid)
        done, why = program.run(lambda: self.states.append(state(PosixFs(plain), self.start_ns)))
        assert (done, why) == (len(case.acts), ""), "the plain directory refuses the case"

    def prepared(self) -> Container:
        """A container in the state before."""
        container = self._store.create(next(self._numbers), template=SMALL)
        with _tree(container) as fs:
            for act in self._case.prepare:
                act(fs)
        return container

    def judge(self, container: Container, done: int, what: str) -> None:
        """See that the container is sound and in the state after ``done`` acts, or after one more."""
        self.mend(container, what)
        with _tree(container) as fs:
            self.compare(state(fs, self.start_ns), done, what)

    def mend(self, container: Container, what: str) -> None:
        """Let ``check`` repair all that it finds."""
        problems = container.check(repair=True)
        assert all(problem.repaired for problem in problems), f"{what}: {problems}"
        assert container.check() == [], what

    def compare(self, got: State, done: int, what: str) -> None:
        """See that this is the state after ``done`` acts, or after one more."""
        allowed = self.states[done : done + 2]
        if got not in allowed:
            text = "\n  or ".join("; ".join(differences(one, got)) for one in allowed)
            raise AssertionError(f"{what}: neither the state before nor the one after:\n     {text}")


class _tree:  # noqa: N801
    """A container's tree for a ``with`` block."""

    def __init__(self, container: Container) -> None:
        self._fs = TreeFs(container.store.layout, container.path)

    def __enter__(self) -> TreeFs:
        before = os.umask(0)
        self._before = before
        return self._fs

    def __exit__(self, *failure: object) -> None:
        os.umask(self._before)
        self._fs.shut()


def template_state(store: Store) -> tuple[State, bytes]:
    """The template as it lies on the disk, files and index."""
    template = store.template(SMALL)
    return state(PosixFs(template.path), 1 << 62), store.layout.template(SMALL).index.read_bytes()


def steps_of(bench: Bench, case: Case, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that the case passes when nothing dies, by name."""
    passed: list[str] = []
    container = bench.prepared()
    with monkeypatch.context() as patch:
        for module in WITH_STEPS:
            patch.setattr(module, "step", passed.append)
        with _tree(container) as fs:
            fs.caller = fs.caller._replace(uid=case.uid, gid=case.uid)
            for act in case.acts:
                act(fs)
    bench.judge(container, len(case.acts), "without a crash")
    return passed


# ------------------------------------------------------------------------------------------------------ without a mount


@pytest.fixture
def scratch(clean_path: Path) -> Path:
    (clean_path / "scratch").mkdir()
    return clean_path / "scratch"


def arm(setting: str) -> None:
    """Arm the fault points of this process."""
    step = FaultPoints(setting).step
    for module in WITH_STEPS:
        module.step = step  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CASES)
def test_tree_killed_at_every_step(
    name: str, small_store: Store, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    template = template_state(small_store)
    bench = Bench(small_store, scratch, case)
    passed = steps_of(bench, case, monkeypatch)
    assert case.steps <= set(passed), f"never passed: {case.steps - set(passed)}"
    for number in range(1, len(passed) + 2):
        container = bench.prepared()
        what = f"step {number} {passed[number - 1] if number <= len(passed) else '(none)'}"

        def reach(container: Container = container, number: int = number) -> FileSystem:
            arm(f"*:{number}")
            fs = TreeFs(container.store.layout, container.path)
            fs.caller = fs.caller._replace(uid=case.uid, gid=case.uid)
            return fs

        done, why = Program.start(reach, case.acts, 0).run()
        assert why == "", what
        assert (done == len(case.acts)) == (number > len(passed)) or "release" in what, what
        bench.judge(container, done, what)
        container.destroy()
    assert template_state(small_store) == template
    assert small_store.template(SMALL).verify() == []


# ----------------------------------------------------------------------------------------------------------- on a mount


def mount_to_die(container: Container, engine: str, number: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Mount so that the server dies at its step ``number``."""
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, f"*:{number}")
        return container.mount(sync="none", engine=engine)


def dies(container: Container) -> bool:
    """Unmount if the server still lives; whether it had died."""
    if read_holder(container.path) is not None:
        try:
            container.umount()
        except OSError:
            assert read_holder(container.path) is None, "the server hangs"
    return (container.path / LOCK).read_bytes() != b""  # who ends in order leaves it empty


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, engine) for engine in ENGINES for name in (MOUNTED if engine == DEFAULT else ENGINES_DIFFER)],
)
def test_mount_killed_at_every_step(
    name: str, engine: str, small_store: Store, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    template = template_state(small_store)
    bench = Bench(small_store, scratch, case)
    deaths = 0
    for number in range(1, MOST_STEPS):
        container = bench.prepared()
        root = mount_to_die(container, engine, number, monkeypatch)
        done, why = Program.start(directory(root), case.acts, case.uid).run()
        if not dies(container):
            assert (done, why) == (len(case.acts), "")
            break
        deaths += 1
        assert done == len(case.acts) or why.startswith(("ENOTCONN", "ECONNABORTED")), why
        bench.mend(container, f"step {number}")
        # Over the dead mount, and over the dead process's lock.
        with container.mounted(sync="none", engine=engine) as again:
            bench.compare(state(PosixFs(again), bench.start_ns), done, f"step {number}")
        assert container.check() == []
        container.destroy()
    else:
        pytest.fail(f"dies at step {MOST_STEPS} still")
    assert deaths >= len(case.steps)
    assert template_state(small_store) == template
    assert small_store.template(SMALL).verify() == []
