"""What the whole-system tests share: stores that clean up and are looked through, loop devices, manifests, chroots.

Rule: knows vzfs by its Python interface, its program and its files on disk only. Whatever a test leaves mounted is
unmounted, and every serving process's log must be free of failures that the test did not announce.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.engines import DEFAULT, ENGINES, PATIENCE_S, EngineStore
from vzfs import Container, Statistics

CHECKOUT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("VZFS_TEST_CACHE", "/var/tmp/vzfs-test-cache"))
"""Where debootstrap'ed trees are kept between sessions."""
SUITE = "bookworm"
FAILURE = re.compile(r"Traceback|\bERROR\b|\bCRITICAL\b|failed")


# ------------------------------------------------------------------------------------------------- processes, waiting


def environment(**more: str) -> dict[str, str]:
    """This environment with the checkout's vzfs first."""
    return {**os.environ, "PYTHONPATH": str(CHECKOUT), **more}


def vzfs(*args: str, root: Path, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """``vzfs --root ROOT ARGS`` in a process of its own, which must end with ``code``."""
    command = [sys.executable, "-m", "vzfs", "--root", str(root), *args]
    done = subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=5 * PATIENCE_S, **options)
    assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run(*command: str | os.PathLike[str], **options: Any) -> str:
    """Run a program that must succeed; its standard output."""
    options = {"text": True, "capture_output": True, "timeout": 5 * PATIENCE_S, **options}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Wait until ``condition`` holds; it must, within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not after {seconds} s"
        time.sleep(0.01)


def settled(container: Container) -> Statistics:
    """A snapshot after which nothing more comes by itself: a RELEASE follows later than its close."""
    now = container.stats()
    while True:
        time.sleep(0.05)
        now, before = container.stats(), now
        if asked(now) == asked(before):
            return now


def asked(counted: Statistics) -> dict[str, int]:
    """The requests but for those that come when the kernel likes."""
    return {name: count for name, count in counted.requests.items() if "FORGET" not in name}


def expect(code: int, call: Callable[..., object], *arguments: object, **options: object) -> None:
    """``call`` must fail with the errno ``code``."""
    try:
        call(*arguments, **options)
    except OSError as error:
        assert error.errno == code, f"{error!r}, not {errno.errorcode[code]}"
    else:
        raise AssertionError(f"{call} succeeded, not {errno.errorcode[code]}")


def alive(pid: int) -> bool:
    """Whether any thread of the process runs, or still gives back what it held (a zombie does neither).

    /proc/PID/stat tells of the first thread only, which may be a zombie while others hold descriptors and locks.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)  # readable when the last thread has closed everything (pidfd_open(2))
        return not poll.poll(0)
    finally:
        os.close(pidfd)


def in_child(work: Callable[..., object], *arguments: object) -> None:
    """Call ``work`` in a forked process, where it may chroot, chdir or change its user; what it raises fails here."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work(*arguments)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            sys.stderr.flush()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child failed, see its standard error"


def together(*works: Callable[[], object]) -> None:
    """Call each of ``works`` in a forked process of its own, all at once; each must succeed."""
    pids = []
    for work in works:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert not any(codes), f"exit codes {codes}, see standard error"


# -------------------------------------------------------------------------------------------------------------- mounts


def mounts_below(place: Path) -> list[str]:
    """Mount points at or below ``place``, innermost first."""
    lines = Path("/proc/self/mountinfo").read_bytes().split(b"\n")[:-1]
    points = [re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), line.split(b" ")[4]) for line in lines]
    return [point for point in map(os.fsdecode, reversed(points)) if Path(point).is_relative_to(place)]


def own_mounts() -> None:
    """Give this process, which must be a forked one, a mount namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x20000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNS; os.unshare came with Python 3.12
    run("mount", "--make-rprivate", "/")


def unmount_below(place: Path) -> None:
    """Unmount whatever was left mounted at or below ``place``."""
    for point in mounts_below(place):
        subprocess.run(["umount", "--lazy", point], check=False, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def loop_mounted(
    image: Path, where: Path, size: int, filesystem: str = "ext4", options: Sequence[str] = ()
) -> Iterator[Path]:
    """A new file system of ``size`` bytes in the file ``image``, mounted at ``where`` through a loop device."""
    with open(image, "xb") as file:
        file.truncate(size)
    run(f"mkfs.{filesystem}", "-q", *options, image)
    where.mkdir(parents=True)
    run("mount", "-o", "loop", image, where)
    try:
        yield where
    finally:
        unmount_below(where)
        image.unlink()


@contextlib.contextmanager
def bound(root: Path, *, proc: bool = True, ptys: bool = True) -> Iterator[None]:
    """Mount what programs in a container expect: its own ``/proc`` and the node's ``/dev/pts``."""
    mounted: list[Path] = []
    try:
        if proc:
            run("mount", "-t", "proc", "proc", root / "proc")
            mounted.append(root / "proc")
        if ptys:
            run("mount", "--bind", "/dev/pts", root / "dev/pts")
            mounted.append(root / "dev/pts")
        yield
    finally:
        for point in reversed(mounted):
            wait_for(lambda point=point: subprocess.run(["umount", point], stderr=subprocess.DEVNULL).returncode == 0)  # type: ignore[misc]


def chroot(root: Path, script: str, *, code: int = 0, timeout: float = 15 * PATIENCE_S) -> str:
    """Run a shell script in ``root`` with a clean environment; its output, standard error included."""
    proxies = {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
    done = subprocess.run(
        ["chroot", root, "/bin/sh", "-ec", script],
        env={
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C",
            "HOME": "/root",
            "DEBIAN_FRONTEND": "noninteractive",
            **proxies,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="surrogateescape",
        timeout=timeout,
    )
    assert done.returncode == code, f"{script}\nexit code {done.returncode}\n{done.stdout[-6000:]}"
    return str(done.stdout)


# ----------------------------------------------------------------------------------------------------------- manifests


class Item(NamedTuple):
    """All that can be told of one file; ``content`` is a digest, a link's text or a device number."""

    type: str
    mode: int
    owner: tuple[int, int]
    size: int
    mtime_ns: int
    nlink: int
    content: str
    xattrs: tuple[tuple[str, bytes], ...]
    ino: int


_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def look_at(path: bytes) -> Item:
    """The item at ``path``, which is not followed."""
    info = os.lstat(path)
    kind = stat.S_IFMT(info.st_mode)
    content = ""
    if kind == stat.S_IFREG:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    elif kind == stat.S_IFLNK:
        content = os.fsdecode(os.readlink(path))
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        content = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return Item(
        _TYPES[kind],
        stat.S_IMODE(info.st_mode),
        (info.st_uid, info.st_gid),
        0 if kind == stat.S_IFDIR else info.st_size,
        info.st_mtime_ns,
        info.st_nlink,
        content,
        tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names),
        info.st_ino,
    )


def manifest(top: Path, *, leave_out: frozenset[str] = frozenset()) -> dict[str, Item]:
    """Every file at and below ``top`` by its path from there, but ``leave_out`` and what is below."""
    found = {"": look_at(os.fsencode(top))}
    folders = [b""]
    while folders:
        folder = folders.pop()
        for name in os.listdir(os.fsencode(top) + b"/" + folder):
            path = folder + b"/" + name if folder else name
            if os.fsdecode(path) in leave_out:
                continue
            item = found[os.fsdecode(path)] = look_at(os.fsencode(top) + b"/" + path)
            if item.type == "dir":
                folders.append(path)
    return found


def differences(before: dict[str, Item], after: dict[str, Item], *, but: frozenset[str] = frozenset()) -> list[str]:
    """What differs between two manifests, for a message; ``but`` are names of fields of ``Item`` that may."""
    lines = [f"gone: {path}" for path in before.keys() - after.keys()]
    lines += [f"new: {path}" for path in after.keys() - before.keys()]
    for path in before.keys() & after.keys():
        old, new = before[path], after[path]
        lines += [
            f"{path}: {field} was {getattr(old, field)!r}, is {getattr(new, field)!r}"
            for field in Item._fields
            if field not in but and getattr(old, field) != getattr(new, field)
        ]
    return sorted(lines)


# --------------------------------------------------------------------------------------------------------------- trees


def small_tree(top: Path) -> Path:
    """Plant a small root directory that has one of everything."""
    for folder in ("etc", "usr/bin", "usr/lib/deep/er", "var/log", "empty", "tmp", "dev"):
        (top / folder).mkdir(parents=True)
    os.chmod(top, 0o755)
    os.chmod(top / "tmp", 0o1777)
    (top / "etc/motd").write_text("from the template\n")
    (top / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (top / "etc/link").symlink_to("motd")
    (top / "usr/bin/tool").write_text("#!/bin/sh\necho tool\n")
    os.chmod(top / "usr/bin/tool", 0o4755)
    (top / "usr/bin/same").write_text("one inode\n")
    os.link(top / "usr/bin/same", top / "usr/lib/same")
    os.link(top / "usr/bin/same", top / "usr/lib/deep/same")
    (top / "usr/lib/deep/er/big").write_bytes(bytes(range(256)) * 4096)  # 1 MiB
    os.setxattr(top / "usr/lib/deep/er/big", "user.note", b"template")
    (top / "bin").symlink_to("usr/bin")
    for number in range(300):
        (top / f"usr/lib/deep/{number:03}").write_text(f"{number}\n" * 20)
    os.mkfifo(top / "var/pipe")
    os.mknod(top / "dev/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.chmod(top / "dev/null", 0o666)
    os.mknod(top / "dev/full", 0o666 | stat.S_IFCHR, os.makedev(1, 7))
    os.chmod(top / "dev/full", 0o666)
    return top


def debian_tree() -> Path:
    """A debootstrap'ed Debian 12 root, made once and kept in ``CACHE``; not to be written to."""
    tree = CACHE / SUITE
    if tree.is_dir():
        return tree
    CACHE.mkdir(parents=True, exist_ok=True)
    os.chmod(CACHE, 0o700)  # setuid programs of another Debian inside
    making = CACHE / f".{SUITE}-{os.getpid()}"
    try:
        run("debootstrap", "--variant=minbase", SUITE, making, timeout=600)
        with contextlib.suppress(OSError):  # somebody else was faster
            making.rename(tree)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return tree


# -------------------------------------------------------------------------------------------------------------- stores


class Rig:
    """A store for one test, and what must hold at its end; ``log_may_have`` are patterns of announced log lines."""

    def __init__(self, place: Path, engine: str = DEFAULT) -> None:
        self.place = place
        self.engine = engine
        self.store = EngineStore(place / "vz", engine)
        self.log_may_have: list[str] = []
        self._containers: list[Container] = []

    @property
    def root(self) -> Path:
        """The store's root directory."""
        return self.store.root

    def template(self, name: str = "small", tree: Path | None = None) -> None:
        """Make a template, of a small tree if none is given."""
        self.store.create_template(name, str(tree or small_tree(self.place / f"source-{name}")))

    def container(self, ct: int | str | Path = 101, template: str = "small") -> Container:
        """Make a container, and the template ``small`` if that is asked for and missing."""
        if template == "small" and not (self.root / "template/small").exists():
            self.template()
        return self.watch(self.store.create(ct, template=template))

    def watch(self, container: Container) -> Container:
        """Look through the container's log at the end."""
        self._containers.append(container)
        return container

    def mounted(self, ct: int | str | Path = 101, template: str = "small", **options: Any) -> tuple[Container, Path]:
        """Make a container and mount it."""
        made = self.container(ct, template)
        return made, made.mount(**options)

    def finish(self) -> None:
        """Unmount everything, then look through the logs."""
        pids = [status.pid for status in (one.status() for one in self._containers if one.path.exists()) if status.pid]
        for point in mounts_below(self.place):
            subprocess.run(["umount", "--lazy", point], check=False, stderr=subprocess.DEVNULL)
        for pid in pids:
            with contextlib.suppress(AssertionError):
                wait_for(lambda pid=pid: not alive(pid))  # type: ignore[misc]
        left = [pid for pid in pids if alive(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"serving processes {left} had to be killed"
        bad = [f"{one.ct}: {line}" for one in self._containers for line in self.failures(one)]
        assert not bad, "failures in the log:\n" + "\n".join(bad[:40])

    def failures(self, container: Container) -> list[str]:
        """Lines of the container's log that tell of a failure which the test did not announce."""
        try:
            lines = (container.path / "vzfs.log").read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [
            line
            for line in lines
            if FAILURE.search(line) and not any(re.search(pattern, line) for pattern in self.log_may_have)
        ]


@pytest.fixture(name="rig", params=ENGINES)
def rig_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    """A store of the test's own; see ``Rig``. Modules that use it import it, whatever linters think of that."""
    one = Rig(tmp_path, request.param)
    try:
        yield one
        one.finish()
    finally:
        unmount_below(tmp_path)


one_engine = pytest.mark.parametrize("rig", [DEFAULT], indirect=True)
"""For a test of ``rig`` that no engine can make fail but through what others test: it runs once."""


def area(container: Container) -> Path:
    """The container's private area."""
    return container.path / "private"


def clean(container: Container) -> None:
    """The stopped container has no problem and nothing lies in its stage."""
    assert container.check() == []
    for folder in ("stage", "orphans"):
        place = container.path / "cow" / folder
        assert not place.is_dir() or list(place.iterdir()) == []
