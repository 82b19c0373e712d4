"""Fixtures that several test files share: a store of its own per test, a small source tree with everything in it.

Rule: whatever a test leaves mounted below its folder is unmounted, and whatever serves a container there is ended,
before the folder goes; nothing else on the machine is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import EngineStore
from tests.realuse_helpers import alive, wait_for
from vzfs import linux as calls
from vzfs.fuse.table import mount_table
from vzfs.store.lock import read_holder

SMALL = "small"
"""Name of the template that ``small_store`` has."""
LARGE_SIZE = 300_000
SPARSE_SIZE = 1 << 20
OLD_NS = 1_500_000_000_123_456_789
"""The modification time of the source's first entry; the others follow in steps of a second and a nanosecond."""
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # VFS_CAP_REVISION_2, effective, cap_net_raw


def posix_acl(*entries: tuple[int, int, int]) -> bytes:
    """The value of a ``system.posix_acl_*`` attribute from ``(tag, permissions, id)`` (<linux/posix_acl_xattr.h>)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


_NONE = 0xFFFFFFFF
ACL = posix_acl((0x01, 6, _NONE), (0x02, 7, 1234), (0x04, 4, _NONE), (0x10, 7, _NONE), (0x20, 4, _NONE))


ALONE = {"test_direct.py", "test_handles.py", "test_stats.py"}
"""Files with tests that drop the machine's caches, or count requests that a dropped cache would add to."""


def make_source(top: Path) -> Path:
    """Make at ``top`` a small tree with one of everything that a template can hold; about 70 entries. Gives ``top``."""
    top.mkdir(mode=0o755, parents=True)
    with _no_umask():
        _make_files(top)
        _make_links(top)
        _make_special(top)
        _make_odd_names(top)
    _set_owners_and_xattrs(top)
    _set_times(top)
    return top


@contextlib.contextmanager
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


def _put(path: Path, content: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)


def _make_files(top: Path) -> None:
    _put(top / "bin/tool", b"#!/bin/sh\necho tool\n", 0o755)
    _put(top / "bin/su", b"setuid program\n", 0o4755)
    _put(top / "bin/wall", b"setgid program\n", 0o2755)
    _put(top / "bin/ping", b"program with a capability\n", 0o755)
    _put(top / "etc/passwd", b"root:x:0:0::/:/bin/sh\n")
    _put(top / "etc/shadow", b"root:*::\n", 0o640)
    _put(top / "etc/empty", b"")
    _put(top / "etc/conf.d/a.conf", b"a=1\n")
    _put(top / "etc/conf.d/b.conf", b"b=2\n")
    _put(top / "etc/with-acl", b"acl\n")
    _put(top / "lib/large", (bytes(range(256)) * (LARGE_SIZE // 256 + 1))[:LARGE_SIZE], 0o755)
    _put(top / "lib/deep/er/est/file", b"deep\n")
    _put(top / "lib/deep/er/other", b"other\n")
    for package in ("one", "two"):
        _put(top / f"usr/share/doc/{package}/copyright", b"free\n")
        _put(top / f"usr/share/doc/{package}/changelog", b"new\n" * 100)
    (top / "var/log").mkdir(mode=0o755, parents=True)
    with open(top / "var/log/sparse", "wb") as file:
        file.write(b"head")
        file.seek(SPARSE_SIZE - 4)
        file.write(b"tail")
    (top / "var/empty").mkdir(mode=0o700)
    (top / "var/nest/ed/empty").mkdir(mode=0o755, parents=True)
    (top / "tmp").mkdir(mode=0o1777)
    (top / "var/mail").mkdir(mode=0o2775)


def _make_links(top: Path) -> None:
    os.link(top / "bin/tool", top / "lib/deep/tool-again")
    os.link(top / "bin/tool", top / "usr/share/tool-thrice")
    _put(top / "usr/share/pair-a", b"pair\n")
    os.link(top / "usr/share/pair-a", top / "usr/share/pair-b")
    os.symlink("../usr/share/doc/one/copyright", top / "etc/relative")
    os.symlink("/nowhere/at/all", top / "etc/dangling")
    os.symlink("//vz/template/small/etc/passwd", top / "etc/looks-magic")
    os.symlink("share/pair-a", top / "usr/symlink")
    os.link(top / "usr/symlink", top / "usr/symlink-again", follow_symlinks=False)


def _make_special(top: Path) -> None:
    (top / "dev").mkdir(mode=0o755)
    os.mkfifo(top / "dev/fifo", 0o620)
    os.link(top / "dev/fifo", top / "dev/fifo-again")
    os.mknod(top / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(top / "dev/loop", stat.S_IFBLK | 0o660, os.makedev(7, 0))


def _make_odd_names(top: Path) -> None:
    odd = os.fsencode(top / "odd")
    os.mkdir(odd)
    for name in (b"\xff\xfe", b"new\nline", b" ", b"-dash", b"...", b"N" * 255, "é".encode()):
        with open(odd + b"/" + name, "wb") as file:
            file.write(name)


def _set_owners_and_xattrs(top: Path) -> None:
    os.chown(top / "var/mail", 0, 8)
    os.chown(top / "etc/shadow", 0, 42)
    os.chown(top / "usr/share/pair-a", 1000, 1000)
    os.chown(top / "etc/relative", 1000, 1000, follow_symlinks=False)
    os.setxattr(top / "etc/passwd", "user.note", b"of the template")
    os.setxattr(top / "etc/conf.d", "user.folder", b"yes")
    os.setxattr(top / "usr/share/pair-a", "user.pair", b"shared")
    os.setxattr(top / "etc/dangling", "trusted.link", b"1", follow_symlinks=False)
    os.setxattr(top / "bin/ping", "security.capability", CAPABILITY)
    os.setxattr(top / "etc/with-acl", "system.posix_acl_access", ACL)
    (top / "usr/acl").mkdir(mode=0o755)
    os.setxattr(top / "usr/acl", "system.posix_acl_default", ACL)


def _set_times(top: Path) -> None:
    """Old times, different for each entry; directories last, because making their entries changed theirs."""
    paths = sorted(
        os.path.join(folder, name) for folder, dirs, files in os.walk(os.fsencode(top)) for name in dirs + files
    )
    for number, path in enumerate([*sorted(paths, reverse=True), os.fsencode(top)]):
        when = OLD_NS + number * 1_000_000_001
        os.utime(path, ns=(when - 500, when), follow_symlinks=False)


# ------------------------------------------------------------------------------------------------------------ cleaning


def end_below(top: Path) -> None:
    """Unmount everything below ``top`` and end the processes that serve containers there."""
    prefix = str(top) + "/"
    holders = [read_holder(conf.parent) for conf in _confs(top)]
    for entry in sorted(mount_table(), key=lambda entry: len(entry.mountpoint), reverse=True):
        if entry.mountpoint.startswith(prefix):
            with contextlib.suppress(OSError):
                calls.umount2(os.fsencode(entry.mountpoint), calls.MNT_DETACH)
    for holder in holders:
        if holder is not None and holder.pid not in (0, os.getpid()):
            _end(holder.pid)


def _confs(top: Path) -> list[Path]:
    """The conf files of all containers below ``top``, not looking into mounts or private areas."""
    found = []
    for folder, dirs, files in os.walk(top):
        if "conf" in files and "lock" in files:
            found.append(Path(folder, "conf"))
            dirs.clear()
        dirs[:] = [name for name in dirs if not os.path.ismount(os.path.join(folder, name)) and name != "template"]
    return found


def _end(pid: int) -> None:
    """End the process, if it is of ours: its number may be another's since the lock was read."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if _serves(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not alive(pid), 30)


def _serves(pid: int) -> bool:
    try:
        return b"vzfs" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------------------ fixtures


def pytest_configure(config: pytest.Config) -> None:
    """Give each process that runs tests beside others a mount namespace: a test that makes one copies all mounts that
    it sees, and keeps those of others busy."""
    if hasattr(config, "workerinput") and ctypes.CDLL(None, use_errno=True).unshare(calls.CLONE_NEWNS) < 0:
        raise OSError(ctypes.get_errno(), "unshare")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out behaviours that say nothing of their target, see ``GROUPS``; mark what must run alone."""
    items[:] = [item for item in items if not _says_nothing(item)]
    for item in items:
        if Path(item.fspath).name in ALONE:
            item.add_marker(pytest.mark.alone)


def _says_nothing(item: pytest.Item) -> bool:
    call = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    from tests.behaviour_targets import GROUPS  # not before their assertions are rewritten
    from tests.behaviours import BEHAVIOURS

    groups = GROUPS.get(str(call.get("prepared")))
    return groups is not None and BEHAVIOURS[str(call["name"])].group not in groups


@pytest.fixture(autouse=True)
def settings_of_this_process() -> Iterator[None]:
    """As they were: a tree that is used in this process sets the umask, an engine how seldom garbage is collected."""
    before, threshold = os.umask(0o022), gc.get_threshold()
    os.umask(before)
    yield
    os.umask(before)
    if gc.get_threshold() != threshold:
        gc.set_threshold(*threshold)
        gc.unfreeze()
        gc.collect()


@pytest.fixture
def clean_path(tmp_path: Path) -> Iterator[Path]:
    """``tmp_path`` with nothing mounted or running below it afterwards."""
    try:
        yield tmp_path
    finally:
        end_below(tmp_path)


@pytest.fixture
def store(clean_path: Path) -> EngineStore:
    """An empty store."""
    return EngineStore(clean_path / "vz")


@pytest.fixture
def small_store(store: EngineStore, clean_path: Path) -> EngineStore:
    """A store with the template ``small``, made from ``make_source``."""
    store.create_template(SMALL, str(make_source(clean_path / "source")))
    return store
