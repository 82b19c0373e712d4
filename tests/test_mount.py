"""The life of a mount: begun once only, ended by umount, signals and death, refused with clear words, logged."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.engines import PATIENCE_S
from tests.realuse_helpers import (
    Rig,
    alive,
    area,
    clean,
    differences,
    environment,
    expect,
    in_child,
    manifest,
    mounts_below,
    one_engine,
    own_mounts,
    rig_fixture,  # noqa: F401
    run,
    vzfs,
    wait_for,
)
from vzfs import (
    BusyError,
    Container,
    DamagedError,
    NotFoundError,
    NotMountedError,
    UnsupportedError,
    UsageError,
    VzfsError,
)


def pid_of(container: Container) -> int:
    pid = container.status().pid
    assert pid
    return pid


def log_of(container: Container) -> str:
    return (container.path / "vzfs.log").read_text()


# ----------------------------------------------------------------------------------------------------------- beginning


def test_the_root_is_usable_when_mount_returns(rig: Rig) -> None:
    container = rig.container()
    for number in range(10):
        root = container.mount()
        assert root == rig.root / "root/101"
        assert (root / "etc/motd").read_text() == ("from the template\n" if not number else f"{number - 1}\n")
        (root / "etc/motd").write_text(f"{number}\n")
        status = container.status()
        assert (status.mounted, status.mountpoint, status.engine, status.read_only) == (
            True,
            str(root),
            rig.engine,
            False,
        )
        assert status.since is not None
        assert abs(status.since - time.time()) < 60
        container.umount()
        status = container.status()
        assert (status.mounted, status.mountpoint, status.pid) == (False, None, None)
        assert mounts_below(rig.place) == []
    clean(container)


def test_a_mounted_container_is_refused_by_whatever_path(rig: Rig) -> None:
    container, root = rig.mounted()
    (rig.place / "other").mkdir()
    (rig.place / "link").symlink_to(container.path)
    (rig.place / "storelink").symlink_to(rig.root)
    bind = rig.place / "bind"
    bind.mkdir()
    run("mount", "--bind", container.path, bind)
    paths = [
        container.path,
        container.path / ".." / "101",
        rig.place / "link",
        rig.place / "storelink/private/101",
        bind,
        f"{rig.root}//private/./101/",
    ]
    for path in paths:
        again = rig.store.container(f"{path}")
        with pytest.raises(BusyError, match=str(pid_of(container))):
            again.mount(rig.place / "other")
        with pytest.raises(BusyError):
            again.destroy()
        assert again.status().mounted
    vzfs("mount", "101", root=rig.root, code=5)
    vzfs("mount", str(bind), str(rig.place / "other"), root=rig.root, code=5)
    assert mounts_below(rig.place) == [str(bind), str(root)]
    assert (root / "etc/motd").read_text() == "from the template\n"
    # Ended by another name than it was begun by.
    rig.store.container(str(rig.place / "link")).umount()
    assert not container.status().mounted
    assert os.listdir(rig.place / "other") == []


@one_engine
def test_a_moved_container_is_the_same_container(rig: Rig) -> None:
    container = rig.container()
    with container.mounted() as root:
        (root / "etc/motd").write_text("moved\n")
    container.path.rename(rig.place / "elsewhere")
    moved = rig.store.container(str(rig.place / "elsewhere"))
    with moved.mounted(rig.place / "mnt") as root:
        assert (root / "etc/motd").read_text() == "moved\n"
        assert (root / "usr/bin/tool").read_text() == "#!/bin/sh\necho tool\n"
        assert [user.ct for user in rig.store.template("small").users()] == [str(moved.path)]


def test_twenty_containers_at_once(rig: Rig) -> None:
    containers = [rig.container(101 + number) for number in range(20)]
    roots = [container.mount() for container in containers]
    for number, root in enumerate(roots):
        (root / "etc/motd").write_text(f"of {number}\n")
        (root / f"usr/lib/deep/only-{number}").touch()
    for number, root in enumerate(roots):
        assert (root / "etc/motd").read_text() == f"of {number}\n"
        assert [name for name in os.listdir(root / "usr/lib/deep") if name.startswith("only")] == [f"only-{number}"]
    assert len({container.status().pid for container in containers}) == 20
    vzfs("umount", "--all", root=rig.root)
    assert mounts_below(rig.place) == []
    assert not any(container.status().mounted for container in containers)


def test_mounted_twice_at_the_same_instant_one_wins(rig: Rig) -> None:
    container = rig.container()
    outcomes: list[str] = []

    def try_it(where: Path) -> None:
        try:
            outcomes.append(str(container.mount(where)))
        except VzfsError as error:
            outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=try_it, args=(rig.place / f"m{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("BusyError") == 5
    assert mounts_below(rig.place) == [one for one in outcomes if one != "BusyError"]


def test_mount_points(rig: Rig) -> None:
    container = rig.container()
    where = rig.place / "has space, comma#hash\\back\u00a0é\rtab\t"
    assert container.mount(where) == where  # made when missing
    assert (where / "etc/motd").exists()
    assert container.status().mountpoint == str(where)
    container.umount()
    assert mounts_below(rig.place) == []

    (rig.place / "link").symlink_to(where)
    assert container.mount(rig.place / "link") == where
    container.umount()

    (rig.place / "full/x").mkdir(parents=True)
    (rig.place / "file").touch()
    for place in ("full", "file", "file/below"):
        with pytest.raises(UsageError, match=f"can't mount at {rig.place / place}: "):
            container.mount(rig.place / place)
        assert not container.status().mounted
    vzfs("mount", "101", str(rig.place / "full"), root=rig.root, code=2)
    assert container.mount() == rig.root / "root/101"


@one_engine
def test_folders_made_for_a_mount_point_are_nobody_elses(rig: Rig) -> None:
    container = rig.container()
    with container.mounted(rig.place / "a/b/c"):
        for folder in ("a", "a/b"):
            assert stat.S_IMODE(os.stat(rig.place / folder).st_mode) & 0o022 == 0


@one_engine
def test_the_conf_says_where_and_keeps_what_vzfs_does_not_know(rig: Rig) -> None:
    container = rig.container()
    conf = container.path / "conf"
    text = (
        '# by hand\nONBOOT="yes"\n\nexport CPUS=2 # two\nIP_ADDRESS="10.0.0.1 \\"x\\""\nnot a setting at all\n'
        f'VE_ROOT="{rig.place}/ve/$VEID/root"\n'
    )
    conf.write_text(conf.read_text() + text)
    before = conf.read_bytes()
    root = container.mount()
    assert root == rig.place / "ve/101/root"
    assert (root / "etc/motd").exists()
    container.umount()
    assert conf.read_bytes() == before
    settings = container.conf
    settings.set("OSTEMPLATE", "small")
    settings.set("VE_ROOT", str(rig.place / "braces" / "${VEID}"))
    settings.save()
    assert text.splitlines()[:-1] == [line for line in conf.read_text().splitlines() if line in text.splitlines()]
    assert container.mount() == rig.place / "braces/101"


def test_a_container_directory_with_an_odd_name(rig: Rig) -> None:
    """A comma would begin another mount option."""
    container, root = rig.mounted(rig.place / "srv/odd, ro\\,nosuid#1 é", mountpoint=rig.place / "odd")
    (root / "etc/motd").write_text("writable\n")
    assert not os.statvfs(root).f_flag & (os.ST_RDONLY | os.ST_NOSUID)
    assert container.status().mountpoint == str(root)
    container.umount()


def test_a_process_with_many_descriptors_mounts(rig: Rig) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(1100):  # select(2) ends at 1023
                stack.callback(os.close, os.open("/dev/null", os.O_RDONLY))
            container = rig.container()
            root = container.mount()
            assert (root / "etc/motd").read_text() == "from the template\n"
            container.umount()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_server_holds_nothing_of_its_starter(rig: Rig) -> None:
    container = rig.container()
    here = rig.place / "here"
    here.mkdir()
    run("mount", "-t", "tmpfs", "none", here)
    command = [sys.executable, "-m", "vzfs", "--root", rig.root, "mount", "101", "--engine", rig.engine]
    with open(here / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        done = subprocess.run(command, env=environment(), cwd=here, close_fds=False, capture_output=True)
        assert done.returncode == 0, done.stderr
    run("umount", here)  # neither its working directory nor a descriptor
    pid = pid_of(container)
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"


# -------------------------------------------------------------------------------------------------------------- ending


def test_killed_and_mounted_again_at_the_same_place(rig: Rig) -> None:
    container, root = rig.mounted()
    (root / "etc/motd").write_text("before the end\n")
    (root / "usr/lib/deep/new").write_text("new\n")
    pid = pid_of(container)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid))  # until then a request may be taken by the dying process, and lost: ECONNABORTED
    expect(errno.ENOTCONN, os.listdir, root)
    status = container.status()
    assert (status.mounted, status.pid) == (False, None)
    assert json.loads(vzfs("status", "101", "--json", root=rig.root).stdout)["mounted"] is False
    assert container.mount() == root
    assert (root / "etc/motd").read_text() == "before the end\n"
    assert (root / "usr/lib/deep/new").read_text() == "new\n"
    assert mounts_below(rig.place) == [str(root)], "the dead mount is still below"
    container.umount()
    clean(container)


def test_a_dead_mount_is_unmounted_by_umount(rig: Rig) -> None:
    container, root = rig.mounted()
    pid = pid_of(container)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid))
    container.umount()
    assert mounts_below(rig.place) == []
    assert os.listdir(root) == []
    with pytest.raises(NotMountedError, match="101"):
        container.umount()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signals_unmount(rig: Rig, number: signal.Signals) -> None:
    container, root = rig.mounted()
    (root / "etc/motd").write_text("kept\n")
    pid = pid_of(container)
    os.kill(pid, number)
    wait_for(lambda: not alive(pid))
    assert mounts_below(rig.place) == []
    assert not container.status().mounted
    assert (area(container) / "etc/motd").read_text() == "kept\n"
    assert "unmounted" in log_of(container).splitlines()[-1]
    clean(container)


def test_a_signal_with_open_files_takes_them_away(rig: Rig) -> None:
    container, root = rig.mounted()
    fd = os.open(root / "etc/open", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"written\n")
    os.unlink(root / "etc/passwd")
    pid = pid_of(container)
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not alive(pid))
    expect(errno.ENOTCONN, os.ftruncate, fd, 1)
    with contextlib.suppress(OSError):  # as the kernel likes
        os.close(fd)
    assert mounts_below(rig.place) == []
    with container.mounted() as root:
        assert (root / "etc/open").read_text() == "written\n"
        assert not (root / "etc/passwd").exists()
    clean(container)


def test_umount_names_who_is_in_the_way(rig: Rig) -> None:
    container, root = rig.mounted()
    reader = subprocess.Popen(["sleep", "60"], cwd=root / "etc")
    try:
        with pytest.raises(BusyError, match=rf"\b{reader.pid}\b"):
            container.umount()
        assert str(reader.pid) in vzfs("umount", "101", root=rig.root, code=5).stderr
        assert (root / "etc/motd").exists()
    finally:
        reader.kill()
        reader.wait()
    with open(root / "etc/motd"), pytest.raises(BusyError, match=rf"\b{os.getpid()}\b"):
        container.umount()
    run("mount", "-t", "tmpfs", "none", root / "empty")
    with pytest.raises(BusyError, match=str(root / "empty")):
        container.umount()
    run("umount", root / "empty")
    container.umount()


def test_lazy_umount_ends_with_the_last_open_file(rig: Rig) -> None:
    container, root = rig.mounted()
    pid = pid_of(container)
    with open(root / "etc/motd", "r+") as file:
        container.umount(lazy=True)
        assert mounts_below(rig.place) == []
        assert os.listdir(root) == []
        file.write("FROM")
        file.flush()
        assert os.pread(file.fileno(), 8, 0) == b"FROM the"
        assert alive(pid)
        with pytest.raises(BusyError):
            container.mount()
    wait_for(lambda: not alive(pid))
    with container.mounted() as root:
        assert (root / "etc/motd").read_text() == "FROM the template\n"


def test_a_mount_point_that_another_container_took_over(rig: Rig) -> None:
    """The lazily unmounted container ends, or is ended, without harm to the one that is mounted there now."""
    first, second = rig.container(101), rig.container(102)
    where = first.mount(rig.place / "shared")
    pid = pid_of(first)
    with open(where / "etc/motd"):
        first.umount(lazy=True)
        assert second.mount(where) == where
        (where / "etc/motd").write_text("of the second\n")
        with pytest.raises(BusyError):
            first.umount()
        assert (where / "etc/motd").read_text() == "of the second\n"
    wait_for(lambda: not alive(pid))
    assert (where / "etc/motd").read_text() == "of the second\n"
    second.umount()

    assert second.mount(first.mountpoint) == first.mountpoint
    with pytest.raises(NotMountedError):
        first.umount()
    assert (first.mountpoint / "etc/motd").read_text() == "of the second\n"
    second.umount()


def test_umount_names_what_still_holds_the_mount(rig: Rig) -> None:
    """A bind mount or another mount namespace would keep the file system alive: refused, nothing is touched."""
    container, root = rig.mounted()
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; exec sleep 60"],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(BusyError, match=rf"\b{holder.pid}\b"):
            container.umount(timeout=0.3)
        assert mounts_below(rig.place) == [str(root)]
        assert container.status().state == "mounted"
    finally:
        holder.kill()
        holder.communicate()
    container.umount()

    assert container.mount() == root
    other = rig.place / "bound"
    other.mkdir()
    run("mount", "--bind", root / "etc", other)
    with pytest.raises(BusyError, match=str(other)):
        container.umount(timeout=0.3)
    assert mounts_below(rig.place) == [str(other), str(root)]
    run("umount", other)
    container.umount()


def test_unlinked_open_files_are_gone_after_the_end(rig: Rig) -> None:
    container, root = rig.mounted()
    with open(root / "etc/new", "w+b") as file:
        file.write(b"x" * 100_000)
        os.unlink(root / "etc/new")
        file.seek(0)
        assert len(file.read()) == 100_000
    container.umount()
    assert not (area(container) / "etc/new").exists()
    clean(container)


def test_foreground_until_unmounted(rig: Rig) -> None:
    container = rig.container()
    process = subprocess.Popen(
        [sys.executable, "-m", "vzfs", "--root", rig.root, "mount", "101", "--foreground", "--engine", rig.engine],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: container.status().mounted)
        assert container.status().pid == process.pid
        assert (rig.root / "root/101/etc/motd").exists()
        container.umount()
        _, log = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "serving" in log
    assert "unmounted" in log
    assert not (container.path / "vzfs.log").exists()


# ---------------------------------------------------------------------------------------------------- the mounted root


def test_read_only_everywhere_and_nothing_is_written(rig: Rig) -> None:
    container = rig.container()
    with container.mounted() as root:
        (root / "etc/motd").write_text("mine\n")
        (root / "etc/own").write_text("own\n")
        os.chmod(root / "etc/passwd", 0o600)
        os.link(root / "usr/bin/same", root / "usr/bin/fourth")
    before = manifest(area(container)) | {f"cow/{k}": v for k, v in manifest(container.path / "cow").items()}
    root = container.mount(read_only=True)
    assert container.status().read_only
    assert os.statvfs(root).f_flag & os.ST_RDONLY
    assert (root / "etc/motd").read_text() == "mine\n"
    assert (root / "usr/bin/fourth").stat().st_nlink == 4
    assert stat.S_IMODE((root / "etc/passwd").stat().st_mode) == 0o600
    seen = manifest(root)
    for name in ("etc/motd", "etc/own", "etc/passwd", "usr/lib/deep/007", "usr/lib/deep/er/big"):
        path = root / name
        expect(errno.EROFS, os.open, path, os.O_WRONLY)
        expect(errno.EROFS, os.open, path, os.O_RDWR | os.O_TRUNC)
        expect(errno.EROFS, os.truncate, path, 0)
        expect(errno.EROFS, os.chmod, path, 0o777)
        expect(errno.EROFS, os.chown, path, 1, 1)
        expect(errno.EROFS, os.utime, path)
        expect(errno.EROFS, os.unlink, path)
        expect(errno.EROFS, os.link, path, root / "etc/new")
        expect(errno.EROFS, os.rename, path, root / "etc/new")
        expect(errno.EROFS, os.setxattr, path, "user.x", b"y")
    expect(errno.EROFS, os.open, root / "etc/new", os.O_CREAT | os.O_WRONLY)
    expect(errno.EROFS, os.mkdir, root / "usr/lib/deep/new")
    expect(errno.EROFS, os.symlink, "x", root / "new")
    expect(errno.EROFS, os.mknod, root / "tmp/new", stat.S_IFIFO | 0o600)
    expect(errno.EROFS, os.rmdir, root / "empty")
    expect(errno.EROFS, os.removexattr, root / "usr/lib/deep/er/big", "user.note")
    assert differences(seen, manifest(root)) == []
    container.umount()
    after = manifest(area(container)) | {f"cow/{k}": v for k, v in manifest(container.path / "cow").items()}
    assert differences(before, after) == []
    clean(container)


@one_engine
def test_a_store_that_cannot_be_written_is_refused(rig: Rig) -> None:
    """The lock could not say who holds it, so not even a read-only mount."""
    rig.container()
    frozen = rig.place / "frozen"
    frozen.mkdir()
    run("mount", "--bind", rig.root, frozen)
    run("mount", "-o", "remount,ro,bind", frozen)
    inside = rig.store.container(str(frozen / "private/101"))
    for read_only in (False, True):
        with pytest.raises(UnsupportedError, match=rf"{frozen}.* read-only"):
            inside.mount(rig.place / "mnt", read_only=read_only, log=str(rig.place / "log"))
    with pytest.raises(UnsupportedError, match="read-only"):
        inside.destroy()
    done = vzfs("mount", str(inside.path), "--ro", root=frozen, code=7)
    assert "Traceback" not in done.stderr
    assert inside.path.exists()
    assert mounts_below(rig.place) == [str(frozen)]


@one_engine
def test_ordinary_users_are_told_so(rig: Rig) -> None:
    container = rig.container()

    def as_nobody() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        for action in (
            container.mount,
            container.umount,
            container.destroy,
            lambda: rig.store.create(102, template="small"),
            lambda: rig.store.create_template("x", "/etc"),
        ):
            with pytest.raises(UnsupportedError, match="root"):
                action()

    in_child(as_nobody)
    assert not container.status().mounted


def test_a_store_is_closed_to_the_nodes_users(rig: Rig) -> None:
    """Setuid programs of a template or a container must not be reachable by a user of the node."""
    _container, root = rig.mounted()
    (root / "etc/open").write_text("x")
    os.chmod(root / "etc/open", 0o777)
    run("chmod", "a+rx", rig.root)
    places = [
        rig.root / "template/small/usr/bin/tool",
        rig.root / "private/101/private/etc/open",
        rig.root / "private/101/conf",
        rig.root / "root/101/usr/bin/tool",
    ]
    assert all(place.exists() for place in places)

    def as_nobody() -> None:
        os.chdir(rig.root)  # reachable, but for the store's own folders
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        for place in places:
            expect(errno.EACCES, os.stat, place.relative_to(rig.root))

    in_child(as_nobody)


# ------------------------------------------------------------------------------------------------------------- damage


@one_engine
def test_a_missing_or_damaged_template_is_named_to_the_caller(rig: Rig) -> None:
    container = rig.container()
    index = rig.root / "template/.vzfs/small/index"
    whole = index.read_bytes()

    def refused(kind: type[VzfsError], code: int) -> None:
        with pytest.raises(kind, match="small"):
            container.mount()
        done = vzfs("mount", "101", root=rig.root, code=code)
        assert "small" in done.stderr
        assert "Traceback" not in done.stderr
        assert mounts_below(rig.place) == []
        assert not container.status().mounted

    index.write_bytes(whole[: len(whole) // 2])
    refused(DamagedError, 9)
    index.write_bytes(b"")
    refused(DamagedError, 9)
    index.write_bytes(b"X" + whole[1:])
    refused(DamagedError, 9)
    index.unlink()
    refused(NotFoundError, 3)
    index.write_bytes(whole)
    assert container.mount()
    container.umount()
    shutil.move(rig.root / "template/small", rig.place / "away")
    refused(NotFoundError, 3)


@pytest.mark.parametrize("damage", ["no OSTEMPLATE", "forged OSTEMPLATE", "no cow", "private is a link", "no lock"])
def test_a_damaged_container(rig: Rig, damage: str) -> None:
    container = rig.container()
    path = container.path
    if damage == "no OSTEMPLATE":
        (path / "conf").write_text('NAME="x"\n')
    elif damage == "forged OSTEMPLATE":
        (path / "conf").write_text('OSTEMPLATE="../../etc"\n')
    elif damage == "no cow":
        (path / "cow").rmdir()
    elif damage == "private is a link":
        (path / "private").rename(rig.place / "away")
        (path / "private").symlink_to(rig.place / "away")
    elif damage == "no lock":
        (path / "lock").unlink()
    if damage == "no lock":  # easily made anew
        with container.mounted() as root:
            (root / "etc/motd").write_text("mine\n")
        return
    with pytest.raises(DamagedError) as caught:
        container.mount()
    assert str(path) in str(caught.value)
    assert mounts_below(rig.place) == []


def test_logs(rig: Rig) -> None:
    container, root = rig.mounted()
    container.umount()
    lines = log_of(container).splitlines()
    assert all(f" {container.path}: INFO " in line for line in lines)
    assert f"serving {container.path} at {root}, engine {rig.engine}" in lines[0]
    assert f"unmounted {root}" in lines[-1]
    assert stat.S_IMODE((container.path / "vzfs.log").stat().st_mode) & 0o022 == 0
    with container.mounted(log=str(rig.place / "my.log")):
        pass
    assert len((rig.place / "my.log").read_text().splitlines()) == len(lines)
    assert len(log_of(container).splitlines()) == len(lines)
    with pytest.raises(UsageError, match=r"no/such/folder"):
        container.mount(log=str(rig.place / "no/such/folder/log"))
    assert not container.status().mounted


def test_logging_to_the_journal(rig: Rig) -> None:
    """In a mount namespace of its own, where no journal of the machine and no other test is at /dev/log."""
    container = rig.container()
    dev = rig.place / "dev"
    dev.mkdir()

    def with_and_without_journal() -> None:
        own_mounts()
        for name in ("fuse", "null", "urandom"):
            os.mknod(dev / name, 0o666 | stat.S_IFCHR, os.stat(f"/dev/{name}").st_rdev)
        run("mount", "--rbind", dev, "/dev")
        with pytest.raises(UnsupportedError, match=r"/dev/log"):
            container.mount(log="journal")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            journal.bind("/dev/log")
            journal.settimeout(PATIENCE_S)
            with container.mounted(log="journal"):
                pass
            assert b"serving" in journal.recv(65536)

    in_child(with_and_without_journal)
    assert not (container.path / "vzfs.log").exists()


FAILING = """
import sys
from vzfs import Store
from vzfs.tree.orphans import Orphans
from vzfs.tree.tree import Tree
from vzfs.tree.xattrs import ExtendedAttributes

def broken(*arguments):
    raise RuntimeError("broken on purpose")

def nameless(*arguments):
    raise OSError("without a number")

Tree.readlink = broken
ExtendedAttributes.get = nameless
Orphans.forget = broken
Store(sys.argv[1]).container(101).serve(log=sys.argv[2], engine=sys.argv[3])
"""


def test_a_failing_handler_becomes_eio_and_the_mount_lives_on(rig: Rig) -> None:
    container = rig.container()
    log = rig.place / "log"
    process = subprocess.Popen([sys.executable, "-c", FAILING, rig.root, log, rig.engine], env=environment())
    root = rig.root / "root/101"
    try:
        wait_for(lambda: container.status().mounted)
        for _ in range(3):
            expect(errno.EIO, os.readlink, root / "etc/link")
            expect(errno.EIO, os.getxattr, root / "usr/lib/deep/er/big", "user.note")
            assert (root / "etc/motd").read_text() == "from the template\n"
            (root / "etc/new").write_text("works\n")
            os.unlink(root / "etc/new")
        assert process.poll() is None
        container.umount()
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
    text = log.read_text()
    assert "RuntimeError: broken on purpose" in text
    assert "readlink(" in text, "the request is not named"
    assert "getxattr(" in text
    assert text.count("Traceback") >= 6
