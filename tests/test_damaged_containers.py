"""A container directory in which anything lies where vzfs has its own files: no command waits, fails for the others, or
touches what lies elsewhere, each says what is wrong with which container, and ``destroy`` removes it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.conftest import SMALL, end_below, make_source
from tests.engines import EngineStore
from vzfs.cli.app import cli
from vzfs.errors import BusyError, DamagedError, NotFoundError
from vzfs.store.conf import Conf
from vzfs.store.layout import Layout
from vzfs.store.lock import Holder, Lock, read_holder

BAD, GOOD = "6", "7"
QUICK_S = 2.0
MOUNT_S = 8.0
"""A mount starts a process, on a machine that may be busy; a FIFO as log once made it wait for 10 s."""
DOCUMENTED = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
FILES = ("conf", "lock", "vzfs.log")
OBJECTS = (*FILES, "private", "cow", "layers", "dump")
SPARSE_SIZE = 10 << 30


@dataclass(frozen=True, slots=True)
class Room:
    """A store with a template, and a folder that is nobody's business."""

    store: EngineStore
    outside: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    top = tmp_path_factory.mktemp("damaged")
    store = EngineStore(top / "vz")
    store.create_template(SMALL, str(make_source(top / "source")))
    outside = top / "outside"
    outside.mkdir()
    (outside / "file").write_text("theirs\n")
    (outside / "folder").mkdir()
    (outside / "folder/file").write_text("theirs\n")
    for name in ("stage", "orphans", "links"):  # as in cow
        (outside / "folder" / name).mkdir(mode=0o755)
        (outside / "folder" / name / "file").write_text("theirs\n")
    try:
        yield Room(store, outside)
    finally:
        end_below(top)


@pytest.fixture
def room(built: Room) -> Iterator[Room]:
    """With the two containers, one of which a test damages."""
    built.store.create(6, template=SMALL, name="bad")
    built.store.create(7, template=SMALL, name="good")
    try:
        yield built
    finally:
        for ct in (6, 7):
            with contextlib.suppress(NotFoundError):
                container = built.store.container(ct)
                with contextlib.suppress(Exception):
                    container.umount()
                container.destroy()


def _socket(path: Path, outside: Path) -> None:
    here = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


def _sparse(path: Path, outside: Path) -> None:
    path.touch()
    os.truncate(path, SPARSE_SIZE)


def _unreadable(path: Path, outside: Path) -> None:
    path.write_text("")
    path.chmod(0)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "fifo": lambda path, outside: os.mkfifo(path),
    "socket": _socket,
    "zero": lambda path, outside: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5)),
    "null": lambda path, outside: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    "block-device": lambda path, outside: os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(7, 200)),
    "directory": lambda path, outside: path.mkdir(),
    "dangling": lambda path, outside: path.symlink_to(outside / "nothing"),
    "link-to-file": lambda path, outside: path.symlink_to(outside / "file"),
    "link-to-folder": lambda path, outside: path.symlink_to(outside / "folder"),
    "loop": lambda path, outside: path.symlink_to(path.name),
    "empty": lambda path, outside: path.touch(),
    "sparse": _sparse,
    "unreadable": _unreadable,
}
REGULAR = {"empty", "sparse", "unreadable"}


def is_wrong(name: str, damage: str) -> bool:
    """Whether that is something else than what ``name`` has to be."""
    if name in FILES:
        return damage not in REGULAR or name == "conf"
    return damage != "directory"


def harm(container: Path, name: str, damage: str, outside: Path) -> None:
    """Put something else where ``name`` is."""
    path = container / name
    if path.is_dir():
        os.rename(path, container / f".was-{name}")
    elif os.path.lexists(path):
        path.unlink()
    DAMAGES[damage](path, outside)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail instead of waiting for longer."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int
    output: str
    errors: str

    @property
    def text(self) -> str:
        return self.output + self.errors


def run(room: Room, *words: str, seconds: float = QUICK_S) -> Outcome:
    """A command, run in this process, that ends in time and with a code of the manual's."""
    with at_most(seconds):
        result = CliRunner().invoke(cli, ["--root", str(room.store.root), *words])
    outcome = Outcome(result.exit_code, result.stdout, result.stderr)
    assert outcome.code in DOCUMENTED, (words, outcome)
    assert "Traceback" not in outcome.text
    return outcome


def seen(top: Path) -> list[tuple[str, int, int, int, bytes]]:
    """All there is in a folder, so that a touch would show."""
    found = []
    for path in sorted([top, *top.rglob("*")]):
        info = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        found.append((str(path), info.st_mode, info.st_mtime_ns, info.st_ctime_ns, content))
    return found


def assert_good_is_usable(room: Room) -> None:
    assert run(room, "status", GOOD, "--json").code == 0
    assert run(room, "status", "good").code == 0
    assert run(room, "diff", GOOD).code == 0
    assert run(room, "check", GOOD).code == 0


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", OBJECTS)
def test_no_command_waits_or_fails_for_the_others(room: Room, name: str, damage: str) -> None:
    container = room.store.container(6).path
    harm(container, name, damage, room.outside)
    before = seen(room.outside)

    listed = run(room, "list")
    row = next(line for line in listed.output.splitlines() if line.startswith(BAD))
    assert listed.code == 0
    assert f"{GOOD}   good" in listed.output
    if is_wrong(name, damage):
        assert f"damaged: its {name} " in row
    else:
        assert row.endswith("stopped  -")
    by_ct = {one["ct"]: one for one in json.loads(run(room, "list", "--json").output)}
    assert (by_ct[BAD]["problem"] is not None) == is_wrong(name, damage)
    assert by_ct[GOOD]["problem"] is None
    assert ("damaged" in run(room, "status").output) == is_wrong(name, damage)
    assert run(room, "status", BAD).code == 0

    for words in (["diff", BAD], ["check", BAD], ["stats", BAD], ["umount", BAD], ["umount", "--all"]):
        outcome = run(room, *words)
        if outcome.code == 9:
            assert str(container) in outcome.errors
            assert name in outcome.errors
    repaired = run(room, "check", BAD, "--repair")
    if name in ("cow", "dump", "layers", "vzfs.log"):
        assert repaired.code == 0
        assert (container / "lost+found").exists() == is_wrong(name, damage)
        assert run(room, "check", BAD).code == 0
        shutil.rmtree(container / name, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            (container / name).unlink()
        DAMAGES[damage](container / name, room.outside)
    everything = run(room, "check", "--all")
    assert f"container {GOOD} is clean" in everything.output
    if is_wrong(name, damage):
        assert everything.code in (1, 9)
        assert name in everything.text
    assert run(room, "template", "list").code == 0
    assert run(room, "template", "show", SMALL).code == 0
    refused = run(room, "template", "remove", SMALL)
    assert refused.code == 5
    assert_good_is_usable(room)

    assert run(room, "destroy", BAD, "--yes").code == 0
    assert not os.path.lexists(container)
    assert seen(room.outside) == before
    assert sorted(os.listdir(container.parent)) == [GOOD]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", OBJECTS)
def test_mounting_it_works_or_says_what_is_wrong(room: Room, name: str, damage: str) -> None:
    container = room.store.container(6).path
    harm(container, name, damage, room.outside)
    before = seen(room.outside)
    mounted = run(room, "mount", BAD, seconds=MOUNT_S)
    if mounted.code == 0:
        assert not is_wrong(name, damage) or name in ("layers", "dump")
        assert ("etc" in os.listdir(room.store.root / "root/6")) == (name != "private")  # an empty one is possible
        assert run(room, "umount", BAD, seconds=MOUNT_S).code == 0
    else:
        assert mounted.code == 9
        assert str(container) in mounted.errors
        assert name in mounted.errors
    assert seen(room.outside) == before


@pytest.mark.parametrize("damage", ["fifo", "zero", "link-to-file", "sparse"])
def test_the_others_are_mounted_beside_it(room: Room, damage: str) -> None:
    for name in ("conf", "lock", "vzfs.log"):
        harm(room.store.container(6).path, name, damage, room.outside)
    assert run(room, "mount", "good", seconds=MOUNT_S).code == 0
    assert run(room, "create", "8", "--template", SMALL, "--name", "other").code == 0
    assert run(room, "umount", "--all", seconds=MOUNT_S).code in (0, 9)
    assert not room.store.container(7).status().mounted
    assert run(room, "destroy", "8", BAD, "--yes").code == 0


@pytest.mark.parametrize("damage", ["fifo", "directory", "link-to-file"])
def test_check_takes_away_what_is_no_log(room: Room, damage: str) -> None:
    container = room.store.container(6).path
    harm(container, "vzfs.log", damage, room.outside)
    assert run(room, "check", BAD).code == 1
    assert run(room, "check", BAD, "--repair").code == 0
    assert os.path.lexists(container / "lost+found/vzfs.log")
    assert run(room, "check", BAD).code == 0


def test_a_log_elsewhere_may_be_a_link_but_no_fifo_that_nobody_reads(room: Room) -> None:
    log = room.outside.parent / "log"
    log.symlink_to(room.outside.parent / "target.log")
    assert run(room, "mount", GOOD, "--log", str(log), seconds=MOUNT_S).code == 0
    assert run(room, "umount", GOOD, seconds=MOUNT_S).code == 0
    assert "serving" in log.read_text()
    log.unlink()
    os.mkfifo(log)
    assert run(room, "mount", GOOD, "--log", str(log), seconds=MOUNT_S).code == 2
    log.unlink()


def test_a_container_whose_lock_is_gone_bad_is_not_destroyed_while_mounted(room: Room) -> None:
    container = room.store.container(6)
    container.mount()
    harm(container.path, "lock", "fifo", room.outside)
    refused = run(room, "destroy", BAD, "--yes")
    assert refused.code == 5
    assert "mounted" in refused.errors
    os.unlink(container.path / "lock")


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 4000,
        b'{"pid": "/../1", "doing": "serves", "since": 0}\n',
        b'{"pid": 1, "doing": [], "since": 0}\n',
        b'{"pid": -1, "doing": "serves", "since": 0, "mountpoint": 7}\n',
        b"\xff\x00",
        b"null\n",
    ],
)
def test_what_a_held_lock_says_may_be_anything(room: Room, text: bytes) -> None:
    container = room.store.container(6)
    lock = Lock.acquire(container.path, Holder(os.getpid(), "checks", time.time()))
    os.ftruncate(lock.fileno(), 0)
    os.pwrite(lock.fileno(), text, 0)
    assert read_holder(container.path) == Holder(0, "holds", 0.0)
    assert run(room, "list").code == run(room, "status", BAD).code == 0
    assert run(room, "destroy", BAD, "--yes").code == 5
    lock.release()


# --------------------------------------------------------------------------------------------- the lock of what is gone


def holder() -> Holder:
    return Holder(os.getpid(), "checks", time.time())


def test_the_lock_of_a_removed_container_locks_nothing(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opened it before must not take it for the lock of what has been made there since."""
    import vzfs.store.lock as module

    path = room.store.container(6).path
    opened = module.open_own
    made_anew = True

    def open_and_lose(*args: object, **options: object) -> int:
        fd = opened(*args, **options)  # type: ignore[arg-type]
        monkeypatch.setattr(module, "open_own", opened)
        room.store.container(6).destroy()
        if made_anew:
            room.store.create(6, template=SMALL)
        return fd

    monkeypatch.setattr(module, "open_own", open_and_lose)
    with pytest.raises(BusyError, match="replaced"):
        Lock.acquire(path, holder())
    Lock.acquire(path, holder()).release()  # that of the new one

    monkeypatch.setattr(module, "open_own", open_and_lose)
    made_anew = False
    with pytest.raises(NotFoundError, match="removed"):
        Lock.acquire(path, holder())
    assert not path.exists()


def test_destroying_late_leaves_the_new_container_alone(room: Room) -> None:
    """Two programs destroy one container; between their steps a third one makes it anew."""
    path = room.store.container(6).path
    late = os.open(path / "lock", os.O_RDWR)
    room.store.container(6).destroy()
    room.store.create(6, template=SMALL)
    assert not os.path.samestat(os.fstat(late), os.lstat(path / "lock"))
    first = Lock.acquire(path, holder())
    with pytest.raises(BusyError):
        Lock.acquire(path, holder())
    first.release()
    os.close(late)


# ------------------------------------------------------------------------------------------------------------ conf


def test_conf_is_bounded_and_never_followed(tmp_path: Path) -> None:
    path = tmp_path / "conf"
    path.write_bytes(b'A="1"\n' + b"#" * (1 << 20))
    with pytest.raises(DamagedError, match="bytes"):
        Conf.load(path)
    path.write_bytes(b'A="1"\n' + b"#" * 1000)
    assert Conf.load(path).get("A") == "1"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(DamagedError, match="symbolic link"):
        Conf.load(tmp_path / "link")


def test_a_conf_with_more_templates_than_can_be_looked_for(room: Room) -> None:
    container = room.store.container(6).path
    conf = container / "conf"
    conf.write_text(f'OSTEMPLATE="{SMALL}"\nTEMPLATES="{" ".join(f"n{number:x}" for number in range(140_000))}"\n')
    row = next(line for line in run(room, "list").output.splitlines() if line.startswith(BAD))
    assert "damaged: its conf names 140001 templates" in row
    for words in (["diff", BAD], ["check", BAD], ["check", BAD, "--repair"], ["mount", BAD]):
        outcome = run(room, *words)
        assert outcome.code in (1, 9)
        assert "names 140001 templates, more than the 1000" in outcome.text
    assert run(room, "template", "list").code == 0
    assert run(room, "template", "remove", SMALL).code == 5, "what its private area is of counts"
    assert_good_is_usable(room)
    assert run(room, "destroy", BAD, "--yes").code == 0


def test_a_container_without_conf_is_seen_and_destroyed(room: Room) -> None:
    path = room.store.container(6).path
    (path / "conf").unlink()
    assert "damaged: its conf is missing" in run(room, "list").output
    assert path in [one.path for one in room.store.containers()]
    assert Layout.at(room.store.root).containers == path.parent
    assert run(room, "destroy", BAD, "--yes").code == 0
