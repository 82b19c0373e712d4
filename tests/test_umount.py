"""What keeps a root alive: other mount namespaces, bind mounts, servers that are stopped, dead or still ending.

Rule: real mounts, real ``unshare``, real signals; a refused unmount has touched nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import PATIENCE_S
from tests.realuse_helpers import (
    Rig,
    alive,
    clean,
    environment,
    mounts_below,
    one_engine,
    rig_fixture,  # noqa: F401
    run,
    vzfs,
    wait_for,
)
from vzfs import BusyError, Container, NotFoundError, NotMountedError, UsageError, VzfsError
from vzfs.store.lock import read_holder


def device_of(container: Container) -> str:
    holder = read_holder(container.path)
    assert holder is not None
    assert holder.device
    return holder.device


def mounts_of(device: str, pid: int | str = "self") -> list[str]:
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[2] == device]


@contextlib.contextmanager
def elsewhere(*options: str, script: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process in a mount namespace of its own, made by ``unshare --mount`` with ``options``, after ``script``."""
    process = subprocess.Popen(
        ["unshare", "--mount", *options, "sh", "-ec", f"{script}\necho ready; exec sleep 600"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


PRIVATE = ("--propagation", "private")
USER = ("--user", "--map-root-user", *PRIVATE)


# -------------------------------------------------------------------------------------------- other mount namespaces


@pytest.mark.parametrize("options", [PRIVATE, USER], ids=["mount", "user"])
def test_a_mount_in_another_namespace_is_named_and_nothing_is_touched(rig: Rig, options: tuple[str, ...]) -> None:
    container, root = rig.mounted()
    with elsewhere(*options) as process:
        began = time.monotonic()
        done = vzfs("umount", "101", root=rig.root, code=5)
        assert time.monotonic() - began < 5
        assert str(process.pid) in done.stderr
        assert "--everywhere" in done.stderr
        assert mounts_below(rig.place) == [str(root)]
        assert (root / "etc/motd").read_text() == "from the template\n"
        assert container.status().state == "mounted"
        assert mounts_of(device_of(container), process.pid) == [str(root)]
    container.umount()
    clean(container)


@pytest.mark.parametrize("lazy", [False, True], ids=["", "lazy"])
@pytest.mark.parametrize("options", [PRIVATE, USER], ids=["mount", "user"])
def test_everywhere_enters_the_namespaces(rig: Rig, options: tuple[str, ...], lazy: bool) -> None:
    container, root = rig.mounted()
    device, pid = device_of(container), container.status().pid
    assert pid
    with elsewhere(*options) as process, elsewhere(*PRIVATE, script=f"mount --bind {root} /mnt") as second:
        vzfs("umount", "101", "--everywhere", *(["--lazy"] if lazy else []), root=rig.root)
        wait_for(lambda: not alive(pid))
        assert mounts_below(rig.place) == []
        assert mounts_of(device, second.pid) == []
        if options == PRIVATE:  # in a user namespace what came with it is locked: a dead mount stays there
            assert mounts_of(device, process.pid) == []
        assert process.poll() is None
        assert container.status().state == "stopped"
        container.mount()
        container.umount()
    clean(container)


def test_everywhere_touches_nothing_while_somebody_uses_it_there(rig: Rig) -> None:
    container, root = rig.mounted()
    with elsewhere(*PRIVATE, script=f"cd {root}/etc") as process:
        with pytest.raises(BusyError, match=rf"\b{process.pid}\b"):
            container.umount(everywhere=True)
        assert mounts_below(rig.place) == [str(root)]
        assert mounts_of(device_of(container), process.pid) == [str(root)]
        container.umount(everywhere=True, lazy=True)
        assert mounts_below(rig.place) == []
        assert container.status().state == "detached"
        with pytest.raises(BusyError, match=rf"\b{process.pid}\b"):
            container.mount()
    container.mount()
    container.umount()


@one_engine
def test_a_container_whose_root_it_is(rig: Rig) -> None:
    """As a runtime does it: the root is bound onto itself, made the namespace's root, and the rest is taken away."""
    container, root = rig.mounted()
    process = subprocess.Popen(
        [sys.executable, "-c", PIVOT, str(root)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(BusyError, match=rf"\b{process.pid}\b"):
            container.umount()
        with pytest.raises(BusyError, match=rf"\b{process.pid}\b"):
            container.umount(everywhere=True)
        assert container.status().state == "mounted"
        assert mounts_below(rig.place) == [str(root)]
        container.umount(lazy=True)
        assert container.status().state == "detached"
        assert "detached" in vzfs("list", root=rig.root).stdout
    finally:
        process.kill()
        process.communicate()
    with container.mounted():  # waits for the old server
        pass


PIVOT = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
root = os.fsencode(sys.argv[1])
def check(result):
    if result: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
check(libc.unshare(0x20000))
check(libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None))
check(libc.mount(root, root, None, 0x1000, None))
os.chdir(root)
check(libc.pivot_root(b".", b"."))
check(libc.umount2(b".", 2))
os.chdir("/")
print("ready", flush=True)
time.sleep(600)
"""


@one_engine
def test_namespaces_that_follow_this_one_are_no_obstacle(rig: Rig) -> None:
    """Services of systemd get mounts and unmounts by propagation."""
    run("mount", "--bind", rig.place, rig.place)
    run("mount", "--make-shared", rig.place)
    container, root = rig.mounted()
    device = device_of(container)
    with (
        elsewhere("--propagation", "slave") as slave,
        elsewhere("--user", "--map-root-user", "--propagation", "slave") as user,
        elsewhere("--propagation", "unchanged") as peer,
    ):
        assert [mounts_of(device, one.pid) for one in (slave, user, peer)] == [[str(root)]] * 3
        container.umount()
        assert [mounts_of(device, one.pid) for one in (slave, user, peer)] == [[]] * 3


def test_bind_mounts_here(rig: Rig) -> None:
    container, root = rig.mounted()
    for name in ("one", "two"):
        (rig.place / name).mkdir()
        run("mount", "--bind", root / "etc", rig.place / name)
    before = mounts_below(rig.place)
    with pytest.raises(BusyError, match=str(rig.place / "one")):
        container.umount()
    assert mounts_below(rig.place) == before
    with open(rig.place / "two/motd"), pytest.raises(BusyError, match=rf"\b{os.getpid()}\b"):
        container.umount(everywhere=True)
    assert mounts_below(rig.place) == before
    container.umount(everywhere=True)
    assert mounts_below(rig.place) == []
    assert container.status().state == "stopped"


@one_engine
def test_a_root_below_another_mount_is_told_so(rig: Rig) -> None:
    container, root = rig.mounted()
    run("mount", "-t", "tmpfs", "none", rig.root / "root")
    with pytest.raises(BusyError, match=f"{root} is hidden"):
        container.umount()
    run("umount", rig.root / "root")
    container.umount()


# ---------------------------------------------------------------------------- unmounted by others, detached, ending


def test_umount_of_the_mount_point_then_mount_again(rig: Rig) -> None:
    container, root = rig.mounted()
    for _ in range(5):
        run("umount", root)
        assert container.mount() == root
    run("umount", root)
    wait_for(lambda: container.status().state == "stopped")
    with pytest.raises(NotMountedError):
        container.umount()


def test_a_detached_root_is_told_so(rig: Rig) -> None:
    container, root = rig.mounted()
    with open(root / "etc/motd"):
        container.umount(lazy=True)
        status = container.status()
        assert (status.state, status.mounted, status.mountpoint) == ("detached", False, None)
        assert status.pid
        assert "detached" in vzfs("status", "101", root=rig.root).stdout
        assert json.loads(vzfs("list", "--json", root=rig.root).stdout)[0]["state"] == "detached"
        for refused in (container.mount, container.umount, container.destroy):
            with pytest.raises(BusyError, match=rf"\b{os.getpid()}\b"):
                refused()
    wait_for(lambda: container.status().state == "stopped")


# ------------------------------------------------------------------------------------------------------ dead servers


def kill(container: Container) -> None:
    pid = container.status().pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid))


def test_a_dead_mount_at_a_place_given_by_hand(rig: Rig) -> None:
    container = rig.container()
    where = rig.place / "by hand"
    where.mkdir()
    container.mount(where)
    kill(container)
    assert mounts_below(rig.place) == [str(where)]
    vzfs("umount", "101", root=rig.root)
    assert mounts_below(rig.place) == []
    vzfs("umount", "101", root=rig.root, code=6)

    container.mount(where)
    (rig.place / "bound").mkdir()
    run("mount", "--bind", where, rig.place / "bound")
    kill(container)
    container.umount()
    assert mounts_below(rig.place) == []

    container.mount(where)
    kill(container)
    vzfs("destroy", "101", "--yes", root=rig.root)
    assert mounts_below(rig.place) == []
    assert not container.path.exists()


@one_engine
def test_the_dead_mount_of_a_namesake_stays(rig: Rig) -> None:
    rig.template()
    first, second = rig.container(rig.place / "a/ct"), rig.container(rig.place / "b/ct")
    for container in (first, second):
        container.mount(container.path.parent / "mnt")
    kill(first)
    with pytest.raises(BusyError):
        second.destroy()
    second.umount()
    with pytest.raises(NotMountedError):
        second.umount()
    assert mounts_below(rig.place) == [str(rig.place / "a/mnt")]
    first.umount()
    assert mounts_below(rig.place) == []


@one_engine
def test_umount_understands_mount_points(rig: Rig) -> None:
    container, root = rig.mounted()
    other = rig.container(rig.place / "srv/102")
    elsewhere = other.mount(rig.place / "mnt")
    # What a container puts into its root doesn't make that a container.
    (root / "conf").write_text('OSTEMPLATE="small"\nVE_ROOT="/etc"\n')
    (root / "private").mkdir()
    vzfs("umount", str(root), root=rig.root)
    assert mounts_below(rig.place) == [str(elsewhere)]
    (rig.place / "link").symlink_to(elsewhere)
    vzfs("umount", str(rig.place / "link"), root=rig.root)
    assert mounts_below(rig.place) == []
    container.mount(elsewhere)
    kill(container)
    vzfs("umount", str(elsewhere), root=rig.root)
    assert mounts_below(rig.place) == []
    assert rig.store.mounted_at(elsewhere) is None
    vzfs("umount", str(elsewhere), root=rig.root, code=3)


@one_engine
def test_the_mount_point_of_another_stores_container(rig: Rig) -> None:
    _container, root = rig.mounted()
    (rig.place / "vz2").mkdir()
    with pytest.raises(NotFoundError, match="doesn't know"):
        type(rig.store)(rig.place / "vz2").mounted_at(root)
    assert mounts_below(rig.place) == [str(root)]


# --------------------------------------------------------------------------------------------------- hanging servers


def test_a_stopped_server_is_told_in_time(rig: Rig) -> None:
    first, second = rig.container(101), rig.container(102)
    for container in (first, second):
        container.mount()
    pids = [container.status().pid or 0 for container in (first, second)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert [one.state for one in rig.store.statuses()] == ["not answering"] * 2
        text = vzfs("status", "101", root=rig.root).stdout
        assert "not answering" in text
        assert "not answering" in vzfs("list", root=rig.root).stdout
        done = vzfs("umount", "101", root=rig.root, code=5)
        assert f"kill -CONT {pids[0]}" in done.stderr
        assert time.monotonic() - began < 10
        with pytest.raises(UsageError, match="mounted there"):
            rig.container(103).mount(first.mountpoint)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    wait_for(lambda: first.status().state == "mounted")
    vzfs("umount", "--all", root=rig.root)


HANGING = """
import sys, time
from vzfs import Store
from vzfs.tree.tree import Tree
from vzfs.fuse import direct, portable

def hang(*arguments):
    time.sleep(3600)

Tree.statfs = hang
Store(sys.argv[1]).container(101).serve(log=sys.argv[2], engine=sys.argv[3])
"""


def test_a_hanging_server_is_told_in_time(rig: Rig) -> None:
    """It has taken the request and doesn't answer: whoever asked can't even be killed."""
    container = rig.container()
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, rig.root, rig.place / "log", rig.engine], env=environment()
    )
    try:
        wait_for(lambda: (read := read_holder(container.path)) is not None and read.doing == "serves")
        began = time.monotonic()
        assert container.status(patience=0.3).state == "not answering"
        assert time.monotonic() - began < 5
        assert "not answering" in vzfs("status", root=rig.root, code=0).stdout
        assert time.monotonic() - began < 10
    finally:
        process.kill()
        process.wait()
    container.umount()


# ------------------------------------------------------------------------------------------------------- giving up


SLOW = """
import os, time
if os.environ.get("SLOW_MOUNT"):
    import vzfs.fuse.serve as serve
    if __import__("sys").argv[0] != "":
        from vzfs.tree.tree import Tree
        before = Tree.__init__
        def slow(self, *arguments, **options):
            time.sleep(float(os.environ["SLOW_MOUNT"]))
            before(self, *arguments, **options)
        Tree.__init__ = slow
"""


def test_giving_up_leaves_no_dead_mount(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    container = rig.container()
    (rig.place / "slow").mkdir()
    (rig.place / "slow/sitecustomize.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(rig.place / "slow"))
    monkeypatch.setenv("SLOW_MOUNT", "30")
    began = time.monotonic()
    with pytest.raises(VzfsError, match="not usable within 3 s") as caught:
        container.mount(timeout=3)
    assert "--timeout" in caught.value.remedy
    assert time.monotonic() - began < 15
    assert mounts_below(rig.place) == []
    assert container.status().state == "stopped"
    assert not container.mountpoint.exists() or os.listdir(container.mountpoint) == []
    monkeypatch.setenv("SLOW_MOUNT", "1")
    command = [sys.executable, "-m", "vzfs", "--root", str(rig.root), "mount", "101", "--engine", rig.engine]
    slow = environment()
    slow["PYTHONPATH"] += f":{rig.place}/slow"
    done = subprocess.run([*command, "--timeout", "0.5"], env=slow, capture_output=True, text=True)
    assert done.returncode == 1
    assert "within 0.5 s" in done.stderr
    assert mounts_below(rig.place) == []
    done = subprocess.run([*command, "--timeout", f"{PATIENCE_S:g}"], env=slow, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    container.umount()


@one_engine
def test_giving_up_at_any_instant(rig: Rig) -> None:
    container = rig.container()
    for timeout in (0, 0.05, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.22, 0.25, 0.3):
        with contextlib.suppress(VzfsError):
            container.mount(timeout=timeout)
            container.umount()
        assert mounts_below(rig.place) == []
        assert container.status().state == "stopped"
