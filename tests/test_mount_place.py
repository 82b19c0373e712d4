"""Where a container is mounted: default places, places given by hand, who reaches them; the cgroup of the server."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import PATIENCE_S
from tests.realuse_helpers import (
    Rig,
    environment,
    expect,
    in_child,
    mounts_below,
    one_engine,
    rig_fixture,  # noqa: F401
    run,
    vzfs,
    wait_for,
)
from vzfs import DamagedError, ExistsError, UsageError
from vzfs.fuse.table import mount_table

# ------------------------------------------------------------------------------------------------------ default places


@one_engine
def test_containers_of_one_last_name_have_places_of_their_own(rig: Rig) -> None:
    first = rig.container(rig.place / "a/ct")
    assert first.mountpoint == rig.root / "root/ct"  # alone, as ever
    second = rig.container(rig.place / "b/ct")
    third = rig.container(rig.place / "c/ct")
    inside = rig.container(101)
    outside = rig.container(rig.place / "d/101")
    everyone = [first, second, third, inside, outside]
    places = [container.mount() for container in everyone]
    assert len(set(places)) == 5
    assert places[0] == rig.root / "root/ct"
    assert places[3] == rig.root / "root/101"
    assert all(place.parent == rig.root / "root" for place in places)
    for container in everyone:
        container.umount()


@one_engine
def test_a_place_that_another_container_has_is_told(rig: Rig) -> None:
    first = rig.container(rig.place / "a/ct")
    run("cp", "-a", rig.place / "a", rig.place / "b")  # a copy has the same conf
    copy = rig.watch(rig.store.container(str(rig.place / "b/ct")))
    where = first.mount()
    with pytest.raises(UsageError, match=f"{where}: vzfs#ct is mounted there"):
        copy.mount()
    assert copy.mount(rig.place / "mnt") == rig.place / "mnt"
    copy.umount()
    first.umount()


# ------------------------------------------------------------------------------------------------- places given by hand


@one_engine
def test_a_typo_makes_no_directories(rig: Rig) -> None:
    rig.container()
    typo = rig.place / "mtn/ct"
    done = vzfs("mount", "101", str(typo), root=rig.root, code=2)
    assert "there is no such directory" in done.stderr
    assert "--mkdir" in done.stderr
    assert not typo.parent.exists()
    assert mounts_below(rig.place) == []
    assert vzfs("mount", "101", str(typo), "--mkdir", root=rig.root).stdout == f"{typo}\n"
    vzfs("umount", "101", root=rig.root)
    with pytest.raises(UsageError, match="no such directory"):
        rig.store.container(101).mount(rig.place / "other", mkdir=False)
    for empty in (["mount", "101", ""], ["create", "102", "--template", "small", "--mountpoint", ""]):
        assert "an empty path" in vzfs(*empty, root=rig.root, code=2).stderr
    assert not (rig.root / "private/102").exists()


@one_engine
def test_what_was_made_for_a_mount_that_fails_goes_again(rig: Rig) -> None:
    container = rig.container()
    (container.path / "cow").rmdir()
    with pytest.raises(DamagedError):
        container.mount(rig.place / "x/y/z", mkdir=True)
    assert not (rig.place / "x").exists()


# ----------------------------------------------------------------------------------------------------- user namespaces

SHIFTED = 100_000


def as_root_of_a_user_namespace(uid: int, work: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python ``work`` as root of a user namespace in which root is ``uid``, in a mount namespace of its own."""
    process = subprocess.Popen(
        ["/usr/bin/python3", "-I", "-S", "-c", UNSHARE + work, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    assert process.stdout
    assert process.stdout.readline() == "unshared\n"
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{process.pid}/{name}").write_text(f"0 {uid} 65536")
    output, errors = process.communicate("mapped\n", timeout=PATIENCE_S)
    return subprocess.CompletedProcess((), process.returncode, output, errors)


UNSHARE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10000000 | 0x20000): raise OSError(ctypes.get_errno(), "unshare")
print("unshared", flush=True)
sys.stdin.readline()
os.setgroups([])
os.setresgid(0, 0, 0)
os.setresuid(0, 0, 0)
"""
ENTER = """
import os, sys
os.chroot(sys.argv[1])
os.chdir("/")
print(open("etc/motd").read(), end="")
"""


@pytest.fixture
def reachable(rig: Rig) -> Iterator[Rig]:
    """A rig whose folder anybody may pass, as /vz is."""
    folders = [rig.place, *rig.place.parents]
    before = {folder: stat.S_IMODE(folder.stat().st_mode) for folder in folders}
    for folder in folders:
        folder.chmod(before[folder] | 0o011)
    yield rig
    for folder, mode in before.items():
        folder.chmod(mode)


@one_engine
def test_a_runtime_with_a_user_namespace_reaches_its_root_and_nobody_else(reachable: Rig) -> None:
    rig = reachable
    rig.template()
    made = vzfs("create", "101", "--template", "small", "--userns-uid", str(SHIFTED), root=rig.root)
    assert "made" in made.stdout
    container = rig.watch(rig.store.container(101))
    plain, other = rig.container(102), rig.watch(rig.store.create(103, template="small", userns_uid=300_000))
    root = container.mount()
    assert root == rig.root / "userns/101/root"
    assert (root / "usr/bin/tool").stat().st_mode & stat.S_ISUID

    entered = as_root_of_a_user_namespace(SHIFTED, ENTER, root)
    assert (entered.returncode, entered.stdout, entered.stderr) == (0, "from the template\n", "")
    for closed in (plain.mount(), other.mount()):
        assert "PermissionError" in as_root_of_a_user_namespace(SHIFTED, ENTER, closed).stderr

    tools = [place / "usr/bin/tool" for place in (root, plain.mountpoint, other.mountpoint)]

    def as_user_of_the_node(uid: int) -> None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        for tool in tools:
            expect(13, os.stat, tool)
            expect(13, os.execv, tool, [str(tool)])
        expect(13, os.listdir, rig.root / "userns/101")

    for uid in (1000, 65534, SHIFTED + 1):
        in_child(as_user_of_the_node, uid)

    def as_the_mapped_user() -> None:
        """It passes, and can't put anything else in the way of the mount."""
        os.setgroups([])
        os.setgid(SHIFTED)
        os.setuid(SHIFTED)
        assert (root / "etc/motd").read_text() == "from the template\n"
        expect(13, os.listdir, root.parent)
        expect(13, os.rename, root, root.parent / "moved")
        expect(13, os.mkdir, root.parent / "new")

    in_child(as_the_mapped_user)
    for one in (container, plain, other):
        one.umount()
    container.destroy()
    assert not (rig.root / "userns/101").exists()


@one_engine
def test_a_forged_userns_uid_is_refused(rig: Rig) -> None:
    container = rig.container()
    for text in ("0", "-1", "4294967295", "root"):
        (container.path / "conf").write_text(f'OSTEMPLATE="small"\nUSERNS_UID="{text}"\n')
        with pytest.raises(DamagedError, match="USERNS_UID"):
            container.mount()
    for uid in (0, -1, 1 << 32):
        with pytest.raises(UsageError, match="no user"):
            rig.store.create(102, template="small", userns_uid=uid)


# -------------------------------------------------------------------------------------------------------------- cgroups


@contextlib.contextmanager
def cgroup(name: str) -> Iterator[Path]:
    """A cgroup of version 2 of its own; skips where there is none that can be written."""
    top = next((entry.mountpoint for entry in mount_table() if entry.fstype == "cgroup2"), None)
    if top is None:
        pytest.skip("no cgroup2 is mounted")
    folder = Path(top) / f"{os.getpid()}-{name}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"cgroup2 can't be written: {error}")
    try:
        yield folder
    finally:
        wait_for(lambda: not (folder / "cgroup.procs").read_text())
        folder.rmdir()


def cgroup_of(pid: int) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line.removeprefix("0::") for line in lines if line.startswith("0::"))


IN_CGROUP = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
from vzfs.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("name", "options", "place"),
    [
        ("session.scope", [], "/vzfs"),
        ("session.scope", ["--cgroup", "keep"], ""),
        ("vzfs.service", [], ""),
    ],
    ids=["leaves", "keeps", "service"],
)
def test_the_server_leaves_its_callers_cgroup(rig: Rig, name: str, options: list[str], place: str) -> None:
    container = rig.container()
    with cgroup(name) as folder:
        command = [sys.executable, "-c", IN_CGROUP, folder, "--root", rig.root, "mount", "101", "--engine", rig.engine]
        subprocess.run([*command, *options], env=environment(), check=True, capture_output=True)
        pid = container.status().pid
        assert pid
        place = place or f"/{folder.name}"
        assert cgroup_of(pid) == place
        container.umount()
    if not options:
        assert f"cgroup: {place}" in (container.path / "vzfs.log").read_text()


# ---------------------------------------------------------------------------------------------------------------- NAMEs


@one_engine
def test_names(rig: Rig) -> None:
    rig.template()
    outside = rig.watch(rig.store.create(rig.place / "srv/db", template="small", name="db"))
    assert rig.store.container("db").path == outside.path
    assert vzfs("mount", "db", root=rig.root).stdout == f"{outside.mountpoint}\n"
    vzfs("umount", "db", root=rig.root)
    with pytest.raises(ExistsError, match="NAME 'db' already"):
        rig.store.create(101, template="small", name="db")
    for ct in (101, 102):
        container = rig.container(ct)
        (container.path / "conf").write_text('OSTEMPLATE="small"\nNAME="web"\n')
    done = vzfs("destroy", "web", "--yes", root=rig.root, code=2)
    assert str(rig.root / "private/101") in done.stderr
    assert str(rig.root / "private/102") in done.stderr
    assert (rig.root / "private/101").exists()
    done = vzfs("check", "--all", root=rig.root, code=1)
    for ct, twin in (("101", "102"), ("102", "101")):
        assert f"{ct}: conf: name: NAME 'web' is also that of {rig.root}/private/{twin}" in done.stdout


@one_engine
def test_something_else_in_a_containers_place(rig: Rig) -> None:
    rig.template()
    (rig.root / "private/500").mkdir(parents=True)
    made = vzfs("create", "500", "--template", "small", root=rig.root, code=4)
    assert "is no container" in made.stderr
    assert "destroy" not in made.stderr
    gone = vzfs("destroy", "500", "--yes", root=rig.root, code=3)
    assert "is no container" in gone.stderr
    assert "create" not in gone.stderr


# -------------------------------------------------------------------------------------------------------------- engines

WITHOUT = """
import sys
for name in ("trio", "pyfuse3"):
    sys.modules[name] = None
"""


@one_engine
def test_without_pyfuse3_and_trio_the_direct_engine_serves(rig: Rig) -> None:
    container = rig.container()
    (rig.place / "without").mkdir()
    (rig.place / "without/sitecustomize.py").write_text(WITHOUT)
    lacking = environment()
    lacking["PYTHONPATH"] += f":{rig.place}/without"

    def mount(engine: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vzfs", "--root", rig.root, "mount", "101", "--engine", engine]
        return subprocess.run(command, env=lacking, capture_output=True, text=True)

    for engine in ("direct", "auto"):
        done = mount(engine)
        assert done.returncode == 0, done.stderr
        assert container.status().engine == "direct"
        container.umount()
    refused = mount("pyfuse3")
    assert refused.returncode == 7
    assert "the engine pyfuse3 can't run" in refused.stderr
    assert "--engine direct" in refused.stderr
    assert mounts_below(rig.place) == []
