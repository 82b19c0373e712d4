"""Files that the kernel doesn't pass through: the direct engine serves their data itself, and nothing else differs.

Either the store lies on kernel overlayfs, on which another file system may not be stacked twice: BACKING_OPEN gives
ELOOP for everything in it. Or it is as with a kernel before Linux 6.9, which has no passthrough.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.behaviours.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate, link_descriptor
from tests.conftest import LARGE_SIZE, SMALL, make_source
from tests.engines import NEWER, EngineContainer, EngineStore
from tests.realuse_helpers import alive, expect, manifest, run, unmount_below, wait_for
from vzfs.fuse import wire
from vzfs.fuse.device import Device
from vzfs.store.lock import read_holder

MIB = 1 << 20
TURNS = 1500


@pytest.fixture(params=["on overlayfs", "older kernel"])
def container(request: pytest.FixtureRequest, clean_path: Path) -> Iterator[EngineContainer]:
    """A container of a store on overlayfs, or as an older kernel has it."""
    source = make_source(clean_path / "source")
    (source / "big").write_bytes(os.urandom(MIB) * 8)
    if request.param == "older kernel":
        store = EngineStore(clean_path / "vz", "direct", NEWER)
        store.create_template(SMALL, str(source))
        yield store.create(101, template=SMALL)
        return
    yield from _on_overlayfs(clean_path, source)


@pytest.fixture
def on_overlayfs(clean_path: Path) -> Iterator[EngineContainer]:
    source = make_source(clean_path / "source")
    (source / "big").write_bytes(os.urandom(MIB) * 8)
    yield from _on_overlayfs(clean_path, source)


def _on_overlayfs(clean_path: Path, source: Path) -> Iterator[EngineContainer]:
    folders = [clean_path / name for name in ("lower", "upper", "work", "stacked")]
    for folder in folders:
        folder.mkdir()
    lower, upper, work, stacked = folders
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    run("mount", "-t", "overlay", "overlay", "-o", options, stacked)
    try:
        store = EngineStore(stacked / "vz", "direct")
        store.create_template(SMALL, str(source))
        yield store.create(101, template=SMALL)
    finally:
        unmount_below(stacked)


@pytest.fixture
def root(container: EngineContainer) -> Iterator[Path]:
    with container.mounted() as mounted:
        assert container.status().engine == "direct"
        yield mounted
        assert container.stats().backing_registered == 0
    assert container.check() == []
    assert container.store.template(SMALL).verify() == []
    assert "Traceback" not in (container.path / "vzfs.log").read_text()


def test_data_comes_by_requests(root: Path, container: EngineContainer) -> None:
    (root / "new").write_bytes(b"x" * MIB)
    assert (root / "big").read_bytes() == (container.store.template(SMALL).path / "big").read_bytes()
    counted = container.stats().requests
    assert counted["WRITE"] >= 1
    assert counted["READ"] >= 8
    assert counted["READ"] < 8 * MIB // (64 << 10), "in large pieces"


def test_the_template_is_shown_as_it_is(root: Path, container: EngineContainer, clean_path: Path) -> None:
    shown, wanted = manifest(root), manifest(clean_path / "source")
    assert {path: item._replace(ino=0) for path, item in shown.items() if path} == {
        path: item._replace(ino=0) for path, item in wanted.items() if path
    }


def test_everyday_changes(root: Path, container: EngineContainer) -> None:
    with open(root / "etc/passwd", "ab") as file:  # copied up
        file.write(b"user:x:1000:\n")
    assert (root / "etc/passwd").read_bytes().endswith(b"/bin/sh\nuser:x:1000:\n")
    os.truncate(root / "lib/large", 1000)
    assert (root / "lib/large").stat().st_size == 1000
    with open(root / "usr/share/pair-a", "r+b") as file:
        file.write(b"PAIR")
    assert (root / "usr/share/pair-b").read_bytes() == b"PAIR\n"
    (root / "new").write_bytes(b"data")
    (root / "new").rename(root / "tmp/moved")
    os.link(root / "tmp/moved", root / "second")
    (root / "tmp/moved").unlink()
    assert (root / "second").read_bytes() == b"data"
    assert subprocess.run([root / "bin/tool"], capture_output=True, check=True).stdout == b"tool\n"
    container.umount()
    container.mount()
    assert (root / "etc/passwd").read_bytes().endswith(b"user:x:1000:\n")
    assert (root / "second").read_bytes() == b"data"


def test_readers_see_what_is_written(root: Path) -> None:
    """Nothing is passed through here, so nothing is split."""
    data = (root / "lib/large").read_bytes()
    with open(root / "lib/large", "rb", buffering=0) as reader:
        with open(root / "lib/large", "r+b", buffering=0) as writer:
            writer.write(b"NEW")
        assert reader.read(3) == b"NEW"
        with open(f"/proc/self/fd/{reader.fileno()}", "r+b", buffering=0) as again:
            again.write(b"new")
    assert (root / "lib/large").read_bytes() == b"new" + data[3:]


def test_unlinked_files_stay_usable(root: Path) -> None:
    for name in ("etc/passwd", "new"):
        with open(root / name, "a+b", buffering=0) as file:
            file.write(b"before")
            (root / name).unlink()
            file.write(b" and after")
            file.seek(0)
            assert file.read().endswith(b"before and after")
            assert os.fstat(file.fileno()).st_nlink == 0


def test_programs_run_from_here(root: Path) -> None:
    run("cp", "/bin/echo", root / "bin/echo")
    for _ in range(2):
        assert run(root / "bin/echo", "it runs") == "it runs\n"


def test_holes_copies_and_files_without_a_name(root: Path) -> None:
    with open(root / "lib/large", "r+b", buffering=0) as file, open(root / "copy", "w+b", buffering=0) as copy:
        fd = file.fileno()
        data = os.pread(fd, LARGE_SIZE, 0)
        assert os.copy_file_range(fd, copy.fileno(), LARGE_SIZE, 0, 0) == LARGE_SIZE
        assert os.pread(copy.fileno(), LARGE_SIZE, 0) == data
        fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 4096, 8192)
        assert os.pread(fd, LARGE_SIZE, 0) == data[:4096] + bytes(8192) + data[12288:]
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 4096
        assert os.lseek(fd, 4096, os.SEEK_DATA) == 12288
    try:
        fd = os.open(root / "tmp", os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        raise AssertionError("no files without a name") from error
    os.write(fd, b"data")
    link_descriptor(fd, root / "tmp/named")
    os.close(fd)
    assert (root / "tmp/named").read_bytes() == b"data"


def test_a_users_write_takes_set_id_bits_away(root: Path) -> None:
    (root / "new").write_bytes(b"x" * 100)
    (root / "new").chmod(0o6777)
    with open(root / "new", "r+b") as file:
        file.write(b"root's")
    assert (root / "new").stat().st_mode & 0o6000 == 0o6000
    done = subprocess.run(
        ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "sh", "-c", "echo user > new"],
        cwd=root,
        check=False,
    )
    assert done.returncode == 0
    assert not (root / "new").stat().st_mode & 0o6000


def test_mappings(root: Path) -> None:
    with open(root / "big", "rb") as big, mmap.mmap(big.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert hashlib.sha256(view).digest() == hashlib.sha256((root / "big").read_bytes()).digest()
    with open(root / "new", "w+b", buffering=0) as file:
        file.truncate(3 * 4096)
        with mmap.mmap(file.fileno(), 0) as view:
            view[4096:4100] = b"data"
            view.flush()
            assert os.pread(file.fileno(), 4, 4096) == b"data"
            os.pwrite(file.fileno(), b"more", 8192)
            assert view[8192:8196] == b"more"
            view[0:5] = b"later"
    assert (root / "new").read_bytes()[:5] == b"later"


class Exerciser:
    """Random changes of one file by write, mapping, truncation and holes, compared with a copy in memory."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.chance = random.Random(seed)
        self.model = bytearray(path.read_bytes())
        self.file = open(path, "r+b", buffering=0)  # noqa: SIM115

    def run(self, turns: int) -> None:
        for turn in range(turns):
            change = self.chance.choice([self.write, self.write, self.map, self.cut, self.punch, self.copy])
            change()
            assert os.fstat(self.file.fileno()).st_size == len(self.model), (turn, change.__name__)
            self.look(turn, change.__name__)
        self.file.close()
        assert self.path.read_bytes() == self.model

    def span(self) -> tuple[int, int]:
        start = self.chance.randrange(len(self.model) + 1)
        return start, self.chance.choice([1, 100, 4096, 5000, 70_000])

    def write(self) -> None:
        start, length = self.span()
        data = self.chance.randbytes(min(length, max(1, 400_000 - start)))
        assert os.pwrite(self.file.fileno(), data, start) == len(data)
        self.model[start : start + len(data)] = data

    def map(self) -> None:
        start, length = self.span()
        length = min(length, len(self.model) - start)
        if length:
            with mmap.mmap(self.file.fileno(), len(self.model)) as view:
                data = self.chance.randbytes(length)
                view[start : start + length] = data
                self.model[start : start + length] = data

    def cut(self) -> None:
        size = self.chance.randrange(400_000)
        self.file.truncate(size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def punch(self) -> None:
        start, length = self.span()
        fallocate(self.file.fileno(), FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, start, length)
        end = min(start + length, len(self.model))
        self.model[start:end] = bytes(max(0, end - start))

    def copy(self) -> None:
        start, length = self.span()
        length = min(length, len(self.model) // 2 - start)
        if length > 0:
            target = len(self.model) - length
            done = os.copy_file_range(self.file.fileno(), self.file.fileno(), length, start, target)
            assert done > 0
            self.model[target : target + done] = self.model[start : start + done]

    def look(self, turn: int, change: str) -> None:
        start, length = self.span()
        wanted = self.model[start : start + length]
        if self.chance.random() < 0.5 or not self.model:
            got = os.pread(self.file.fileno(), length, start)
        elif self.chance.random() < 0.5:
            with mmap.mmap(self.file.fileno(), len(self.model), prot=mmap.PROT_READ) as view:
                got = view[start : start + length]
        else:
            with open(self.path, "rb", buffering=0) as file:
                got = os.pread(file.fileno(), length, start)
        assert got == wanted, (turn, change, start, length, len(self.model))


@pytest.mark.parametrize("name", ["lib/large", "new"])
def test_one_file_in_all_ways(root: Path, name: str) -> None:
    if name == "new":
        (root / "new").write_bytes(b"")
    Exerciser(root / name, 1).run(TURNS)


def test_several_files_at_once(root: Path) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            (root / f"new-{number}").write_bytes(b"")
            Exerciser(root / f"new-{number}", number).run(TURNS // 5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_descriptors_are_given_back(root: Path, container: EngineContainer) -> None:
    pid = container.status().pid

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    (root / "etc/passwd").read_bytes()
    before = descriptors()
    for turn in range(200):
        with open(root / "etc/passwd", "rb") as file:
            file.read()
        (root / f"tmp/{turn}").write_bytes(b"x")
        (root / f"tmp/{turn}").unlink()
    wait_for(lambda: descriptors() <= before + 2)


def test_the_refusal_is_the_kernels(on_overlayfs: EngineContainer, tmp_path: Path) -> None:
    """What this file is about: the same file system below refuses the registration."""
    container = on_overlayfs
    with container.mounted():
        holder = read_holder(container.path)
        assert holder is not None and alive(holder.pid)
        with contextlib.ExitStack() as ending:
            devices = [fd for fd in os.listdir(f"/proc/{holder.pid}/fd") if _is_device(holder.pid, fd)]
            assert len(devices) == 1
            pidfd = os.pidfd_open(holder.pid)
            ending.callback(os.close, pidfd)
            fd = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, int(devices[0]), 0)  # pidfd_getfd
            assert fd >= 0
            ending.callback(os.close, fd)
            device = Device(fd, 4096)
            with open(container.store.template(SMALL).path / "big", "rb") as file:
                expect(errno.ELOOP, device.open_backing, file.fileno())
            with open(tmp_path / "plain", "wb") as file:
                backing = device.open_backing(file.fileno())
                assert backing > 0
                device.close_backing(backing)
            assert wire.BACKING_OPEN


def _is_device(pid: int, fd: str) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/fuse"
    return False
