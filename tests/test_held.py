"""Random work on files that are held open across their first change, done to a plain directory and a mount alike.

Descriptors are opened before, read, written, mapped and locked while others copy the file up, rename, link and remove
it.
Whatever a call gives or fails with must be the same on both sides, after each step and at the end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.engines import ENGINES, NEWER, EngineStore

NAMES = ("a", "b", "d/c", "d/linked", "linked", "d/e/deep", "big", "new", "d/new")
STEPS = 400
_F_OFD_SETLK = 37  # <linux/fcntl.h>
_FLOCK = struct.Struct("=hhqqi4x")


def plant(top: Path) -> None:
    (top / "d/e").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "d/c", "linked", "d/e/deep")):
        (top / name).write_bytes(b"%d line\n" % number * (1 << number))
        (top / name).chmod(0o640)
    os.link(top / "linked", top / "d/linked")
    (top / "big").write_bytes(bytes(range(256)) * 200)


@dataclass
class Side:
    """One of the two trees, with what is held open in it by a number that both sides share."""

    top: Path
    held: dict[int, int] = field(default_factory=dict)
    maps: dict[int, mmap.mmap] = field(default_factory=dict)

    def close(self) -> None:
        for view in self.maps.values():
            view.close()
        for fd in self.held.values():
            os.close(fd)
        self.maps.clear()
        self.held.clear()


Step = Callable[[Side], object]


def told(info: os.stat_result) -> tuple[int, ...]:
    return (info.st_mode, info.st_size, info.st_nlink, info.st_uid, info.st_gid)


def outcome(side: Side, step: Step) -> object:
    try:
        return step(side)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")


def steps_of(seed: int) -> Iterator[tuple[str, Step, Callable[[object], None]]]:
    """Endless steps: a name, what it does to a side, and what to note of its outcome."""
    chance = random.Random(seed)
    numbers = iter(range(10**9))
    held: list[int] = []
    mapped: list[int] = []

    def nothing(_: object) -> None:
        """Nothing to note."""

    def name() -> str:
        return chance.choice(NAMES)

    def data() -> bytes:
        return b"%08x" % chance.getrandbits(32)

    while True:
        path, other, payload, at = name(), name(), data(), chance.randrange(40)
        kinds = ["open"] * 5 + ["append", "replace", "rename", "unlink", "link", "chmod", "look", "truncate", "xattr"]
        kinds += (
            ["read", "pwrite", "lock", "lock", "map", "fstat", "fchmod", "close", "reopen", "fsync"] if held else []
        )
        kinds += ["peek", "peek", "store"] if mapped else []
        kind = chance.choice(kinds)
        one = chance.choice(held) if held else -1
        view = chance.choice(mapped) if mapped else -1
        mode = chance.choice((0o600, 0o644, 0o4755, 0o2711))
        if kind in ("open", "reopen"):
            number = next(numbers)
            flags = chance.choice(
                [os.O_RDONLY] * 5 + [os.O_RDWR] * 2 + [os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_TRUNC]
            )
            if chance.random() < 0.15:
                flags |= os.O_CREAT

            again = one if kind == "reopen" else -1

            def opening(side: Side, n: int = number, flags: int = flags, path: str = path, again: int = again) -> bool:
                where = side.top / path if again < 0 else Path(f"/proc/self/fd/{side.held[again]}")
                side.held[n] = os.open(where, flags, 0o644)
                return True

            yield (
                f"{kind} {number}: {path} {flags:o} {again}",
                opening,
                lambda result, number=number: held.append(number) if result is True else None,
            )
        elif kind == "close":

            def closing(side: Side, one: int = one) -> None:
                os.close(side.held.pop(one))

            held.remove(one)
            yield kind, closing, nothing
        elif kind == "map":
            number = next(numbers)

            def mapping(side: Side, number: int = number, one: int = one) -> bool:
                writable = fcntl.fcntl(side.held[one], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
                size = os.fstat(side.held[one]).st_size
                if not size:
                    return False
                access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
                side.maps[number] = mmap.mmap(side.held[one], size, mmap.MAP_SHARED, access)
                return True

            yield kind, mapping, lambda result, number=number: mapped.append(number) if result is True else None
        elif kind in ("peek", "store"):

            def touching(side: Side, view: int = view, payload: bytes = payload, kind: str = kind) -> object:
                shown = side.maps[view]
                if min(len(shown), shown.size()) < 8:  # cut short since: to touch it would be SIGBUS
                    return "cut"
                if kind == "store":
                    try:
                        shown[:8] = payload
                    except TypeError:
                        return "read-only"
                return shown[: min(len(shown), shown.size(), 4096)]

            yield kind, touching, nothing
        else:
            yield f"{kind} {path} {other} {one}", _simple(kind, path, other, payload, at, one, mode), nothing


def _simple(kind: str, path: str, other: str, payload: bytes, at: int, one: int, mode: int) -> Step:
    def step(side: Side) -> object:
        where, there = side.top / path, side.top / other
        fd = side.held.get(one, -1)
        match kind:
            case "append":
                with open(where, "ab", buffering=0) as file:
                    return file.write(payload)
            case "replace":
                (side.top / "temporary").write_bytes(payload)
                return os.rename(side.top / "temporary", where)
            case "rename":
                return os.rename(where, there)
            case "unlink":
                return os.unlink(where)
            case "link":
                return os.link(where, there)
            case "chmod":
                return os.chmod(where, mode)
            case "truncate":
                return os.truncate(where, at)
            case "xattr":
                os.setxattr(where, "user.held", payload)
                return os.getxattr(there, "user.held")
            case "look":
                return told(os.stat(where)), where.read_bytes(), os.path.samefile(where, there)
            case "read":
                return os.pread(fd, 4096, at)
            case "pwrite":
                return os.pwrite(fd, payload, at)
            case "fstat":
                return told(os.fstat(fd)), os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
            case "fchmod":
                os.fchmod(fd, mode)
                return told(os.fstat(fd))
            case "fsync":
                return os.fsync(fd)
            case "lock":
                return _lock(fd, at)
        raise AssertionError(kind)

    return step


def _lock(fd: int, at: int) -> object:
    """Take or give up one of three kinds of lock; the answer tells what others hold."""
    how = (fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN)[at % 3]
    if at % 2:
        return fcntl.flock(fd, how | fcntl.LOCK_NB)
    kind = {fcntl.LOCK_SH: fcntl.F_RDLCK, fcntl.LOCK_EX: fcntl.F_WRLCK, fcntl.LOCK_UN: fcntl.F_UNLCK}[how]
    fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    return None


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 60))])
@pytest.mark.parametrize(
    ("engine", "withheld"),
    [
        *(pytest.param(engine, 0, id=engine) for engine in ENGINES),
        pytest.param("direct", int(NEWER), id="older kernel"),
    ],
)
def test_what_is_held_behaves_as_on_a_plain_directory(clean_path: Path, engine: str, withheld: int, seed: int) -> None:
    plant(clean_path / "source")
    shutil.copytree(clean_path / "source", clean_path / "plain", copy_function=_copy_once({}))
    store = EngineStore(clean_path / "vz", engine, withheld)
    store.create_template("t", str(clean_path / "source"))
    container = store.create(101, template="t")
    done = []
    with container.mounted() as root, contextlib.ExitStack() as ending:
        plain, mounted = Side(clean_path / "plain"), Side(root)
        ending.callback(plain.close)
        ending.callback(mounted.close)
        for kind, step, note in steps_of(seed):
            expected, got = outcome(plain, step), outcome(mounted, step)
            done.append((kind, expected))
            assert got == expected, f"step {len(done)}, {kind}: {got!r}, not {expected!r}; before: {done[-12:-1]}"
            note(expected)
            if len(done) == STEPS:
                break
        for name in NAMES:
            look = _simple("look", name, "a", b"", 0, -1, 0)
            assert outcome(mounted, look) == outcome(plain, look), name
        assert len({kind.split()[0] for kind, _ in done}) > 10
    assert container.check() == []
    assert "Traceback" not in (container.path / "vzfs.log").read_text()


def _copy_once(seen: dict[int, str]) -> Callable[[str, str], str]:
    """Copies files, hard links among them as such."""

    def copy(source: str, target: str) -> str:
        info = os.stat(source)
        if info.st_nlink > 1 and info.st_ino in seen:
            os.link(seen[info.st_ino], target)
        else:
            shutil.copy2(source, target)
            seen[info.st_ino] = target
        return target

    return copy
