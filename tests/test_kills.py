"""The server is killed again and again while programs do what must not be done twice or to another file.

Each program knows what it did, and looks after every step whether that is what there is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.behaviours.libc import RENAME_EXCHANGE, renameat2
from tests.test_successor import Client, kept, plant_files

Work = Callable[[random.Random, int], None]
Ending = contextlib.ExitStack
FEW, MANY = 40, 500


def exchanges(place: Path) -> Work:
    """Two files change their names with each other: done twice, it would look as if never done."""
    place.mkdir()
    names = [place / "a", place / "b"]
    content = [b"first", b"second"]
    for name, data in zip(names, content, strict=True):
        name.write_bytes(data)

    def work(chance: random.Random, _: int) -> None:
        renameat2(*chance.sample(names, 2), RENAME_EXCHANGE)
        content.reverse()
        assert [name.read_bytes() for name in names] == content, "an exchange was done twice, or not at all"

    return work


def read_and_written_files(ending: Ending, place: Path, template: Path, *, served: bool) -> Work:
    """Template files that are read and written at the same time; where they are ``served``, by somebody who had them
    open before, so that all their data goes through the server."""
    held: deque[tuple[int, int, bytes]] = deque()
    ending.callback(lambda: [os.close(fd) for *fds, _ in held for fd in fds])
    number = iter(range(10**9))
    place.mkdir()

    def work(chance: random.Random, _: int) -> None:
        path = template / f"d{(n := next(number)) % 10}/e{n % 3}/f{n}"
        if n < 300:
            early = os.open(path, os.O_RDONLY) if served else -1
            writer = os.open(path, os.O_RDWR)
            reader = early if served else os.open(path, os.O_RDONLY)
        else:
            path = place / f"own{n}"
            writer = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
            reader = os.open(path, os.O_RDONLY)
        data = b"%032x" % chance.getrandbits(128)
        os.pwrite(writer, data, 0)
        held.append((reader, writer, data))
        for reader, writer, data in held:
            assert os.pread(reader, 32, 0) == data, "a descriptor means another file"
            assert os.pread(writer, 32, 0) == data, "a descriptor means another file"
        if len(held) > 12:
            reader, writer, data = held.popleft()
            os.fsync(writer)
            os.close(reader)
            os.close(writer)

    return work


def unlinked_files(ending: Ending, place: Path) -> Work:
    """Removed files that are held by ``O_PATH`` alone, or open, while their numbers could be given to others."""
    held: deque[tuple[int, int, tuple[int, int, int]]] = deque()
    ending.callback(lambda: [os.close(fd) for *fds, _ in held for fd in fds if fd >= 0])
    place.mkdir()

    def work(chance: random.Random, turn: int) -> None:
        path = place / f"f{turn}"
        data = b"x" * chance.randrange(5000)
        path.write_bytes(data)
        known = os.open(path, os.O_PATH)
        opened = os.open(path, os.O_RDWR) if turn % 3 == 0 else -1
        info = os.fstat(known)
        os.unlink(path)
        held.append((known, opened, (info.st_ino, info.st_mode, info.st_size)))
        for known, opened, told in held:
            now = os.fstat(known)
            assert (now.st_ino, now.st_mode, now.st_size) == told
            assert now.st_nlink == 0
            if opened >= 0:
                assert os.pread(opened, 1, 0) == (b"x" if told[2] else b"")
        if len(held) > 30:
            known, opened, _ = held.popleft()
            os.close(known)
            if opened >= 0:
                os.close(opened)

    return work


def link_counts(place: Path, template: Path) -> Work:
    """Names of a template's hard links come and go; the count is always theirs."""
    first, second = template / "d0/e0/f0", template / "d1/second-name"
    place.mkdir()
    names: list[Path] = []

    def work(chance: random.Random, turn: int) -> None:
        if len(names) < 4 or chance.random() < 0.5:
            names.append(place / f"n{turn}")
            os.link(chance.choice([first, second]), names[-1])
        else:
            os.unlink(names.pop(chance.randrange(len(names))))
        assert os.stat(first).st_nlink == os.stat(second).st_nlink == 2 + len(names)

    return work


def attributes(place: Path) -> Work:
    """What may exist only once is made and taken away."""
    place.mkdir()
    (place / "f").write_bytes(b"")

    def work(chance: random.Random, turn: int) -> None:
        value = b"%d" % turn
        os.setxattr(place / "f", "user.new", value, os.XATTR_CREATE)
        assert os.getxattr(place / "f", "user.new") == value
        os.removexattr(place / "f", "user.new")
        fd = os.open(place / "f", os.O_RDWR | os.O_TRUNC)
        os.write(fd, value)
        os.close(fd)
        os.truncate(place / "f", 1)
        assert (place / "f").read_bytes() == value[:1]
        os.chmod(place / "f", 0o600 + turn % 8)
        assert os.stat(place / "f").st_mode & 0o777 == 0o600 + turn % 8
        with contextlib.suppress(FileNotFoundError):
            os.stat(place / f"none{turn}")

    return work


@pytest.mark.parametrize("kills", [FEW, pytest.param(MANY, marks=pytest.mark.long)])
@pytest.mark.parametrize("passthrough_above", [0, 1 << 16])
def test_nothing_is_done_twice_or_to_another_file(tmp_path: Path, kills: int, passthrough_above: int) -> None:
    with kept(tmp_path, plant_files, passthrough_above) as mount, contextlib.ExitStack() as ending:
        root = mount.root
        stop = threading.Event()
        works = [
            exchanges(root / "exchanges"),
            read_and_written_files(ending, root / "served", root, served=passthrough_above > 0),
            unlinked_files(ending, root / "unlinked"),
            link_counts(root / "links", root),
            attributes(root / "attributes"),
        ]
        clients = [Client(work, seed, stop) for seed, work in enumerate(works)]
        for client in clients:
            thread = threading.Thread(target=client.run)
            ending.callback(thread.join, 60)
            thread.start()
        ending.callback(stop.set)
        chance = random.Random(kills)
        for turn in range(kills):
            time.sleep(chance.random() / 10)
            mount.kill()
            broken = [error for client in clients for error in client.errors]
            for error in broken:
                traceback.print_exception(error)
            assert not broken, f"after {turn + 1} kills: {broken[0]!r}"
        ending.close()
        for client in clients:
            assert not client.errors, client.errors[0]
            assert client.rounds > kills, "it hardly ran"
        assert not [name for name in os.listdir(root) if name.startswith("none")]


def test_a_dead_servers_handle_is_no_other_file(tmp_path: Path) -> None:
    """Each user's descriptor is of that user's file, whatever was opened in which order by whichever server."""
    with kept(tmp_path, plant_files) as mount:
        root = mount.root
        first = os.open(root / "d1/e1/f1", os.O_RDONLY)
        alice = os.open(root / "d1/e1/f1", os.O_RDWR)
        mount.kill()
        second = os.open(root / "d2/e2/f2", os.O_RDONLY)
        bob = os.open(root / "d2/e2/f2", os.O_RDWR)
        os.pwrite(alice, b"alice", 0)
        os.pwrite(bob, b"bob's", 0)
        assert (root / "d1/e1/f1").read_bytes().startswith(b"alice")
        assert (root / "d2/e2/f2").read_bytes().startswith(b"bob's")
        assert os.pread(first, 5, 0) == b"alice"
        for fd in (first, alice, second, bob):
            os.close(fd)


def test_the_lock_is_never_free_between_two_servers(tmp_path: Path) -> None:
    from vzfs.errors import BusyError
    from vzfs.store.lock import Holder, Lock

    with kept(tmp_path, plant_files) as mount:
        stop = threading.Event()
        got: list[str] = []

        def try_it() -> None:
            while not stop.is_set():
                try:
                    lock = Lock.acquire(mount.container.path, Holder(os.getpid(), "destroys", time.time()))
                except BusyError:
                    continue
                got.append("the lock was free")
                lock.release()

        thread = threading.Thread(target=try_it)
        thread.start()
        try:
            for _ in range(8):
                mount.kill()
        finally:
            stop.set()
            thread.join()
        assert got == []


def test_errno_of_a_removed_file_is_estale(tmp_path: Path) -> None:
    """What was in a file that only an ``O_PATH`` descriptor kept went with the server; it is told so, not as EIO."""
    with kept(tmp_path, plant_files) as mount:
        (mount.root / "f").write_bytes(b"gone")
        held = os.open(mount.root / "f", os.O_PATH)
        os.unlink(mount.root / "f")
        mount.kill()
        assert os.fstat(held).st_size == 4
        with pytest.raises(OSError) as caught:
            os.open(f"/proc/self/fd/{held}", os.O_RDONLY)
        assert caught.value.errno == errno.ESTALE
        os.close(held)
