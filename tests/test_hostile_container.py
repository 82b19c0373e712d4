"""A hostile container: what it makes inside must stay inside, whatever it is called, linked to or raced with.

The attacker is root in the container. Sentinels outside of it, at the very paths that its links name, must neither be
read nor changed; the serving process must live on, and its log must not show a request that failed unexpectedly.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.behaviours.libc import FALLOC_FL_PUNCH_HOLE
from tests.engines import PATIENCE_S
from tests.realuse_helpers import (
    Rig,
    alive,
    area,
    clean,
    differences,
    expect,
    in_child,
    manifest,
    rig_fixture,  # noqa: F401
    run,
    small_tree,
    together,
    wait_for,
)
from vzfs import Container
from vzfs import linux as calls
from vzfs.fuse.log import BURST


def serving(container: Container) -> bool:
    pid = container.status().pid
    return bool(pid) and alive(int(pid or 0))


@contextlib.contextmanager
def untouched(*places: Path) -> Iterator[None]:
    """What is in ``places`` must be the same afterwards, access times of files included."""
    before = [(manifest(place), access_times(place)) for place in places]
    times = [access_times(place) for place in places]
    yield
    for place, (then, _), was in zip(places, before, times, strict=True):
        assert access_times(place) == was, f"something in {place} was read"
        assert differences(then, manifest(place)) == []


def access_times(place: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_atime_ns for path in place.rglob("*") if stat.S_ISREG(path.lstat().st_mode)}


def sentinels(place: Path) -> Path:
    """A folder outside with files whose every reading shows in their access time (relatime: it is older than mtime)."""
    folder = place / "outside"
    (folder / "sub").mkdir(parents=True)
    for name in ("secret", "sub/secret", "passwd"):
        (folder / name).write_text("nobody inside may see or change this\n")
        os.utime(folder / name, ns=(1, 10**18))
    return folder


# --------------------------------------------------------------------------------------------------------- link texts


def magic_texts(rig: Rig, template: str) -> list[str]:
    """Texts that are magic links, nearly so, or mean something on the node."""
    outside = rig.place / "outside"
    return [
        f"//vz/template/{template}/etc/motd",
        f"//vz/template/{template}",
        f"//vz/template/{template}/",
        f"//vz/template/{template}/../../../{outside}/secret",
        f"//vz/template/{template}/etc/../../../../../../../..{outside}/secret",
        "//vz/template/../private/102/conf",
        "//vz/template/other/etc/motd",
        "//vz/template/.vzfs/small/index",
        "//vz/template/",
        "//vz/template",
        "//vz/templates/x",
        "//vz//template/small/etc/motd",
        f"///vz/template/{template}/etc/motd",
        f"////vz/template/{template}/etc/motd",
        f"{'/' * 40}vz/template/{template}/etc/motd",
        f"/vz/template/{template}/etc/motd",
        f"//{rig.root}/template/{template}/etc/motd",
        f"{outside}/secret",
        "//proc/self/root/etc/passwd",
        "/proc/self/fd/3/etc/passwd",
        "a" * 4095,
        "//vz/template/" + "a" * 4081,
        "\n\x01\x7f",
        " ",
    ]


def test_links_of_any_text_read_back_and_mean_nothing_more(rig: Rig) -> None:
    rig.template()
    rig.template("other", rig.place / "source-small")
    outside = sentinels(rig.place)
    container, root = rig.mounted(101)
    texts = magic_texts(rig, "small")
    with untouched(outside):
        for folder in ("", "etc", "usr/lib/deep", "new"):
            (root / folder).mkdir(exist_ok=True)
            for number, text in enumerate(texts):
                path = root / folder / f"link{number}"
                os.symlink(text, path)
                assert os.readlink(path) == text
                assert path.lstat().st_size == len(text)
                assert stat.S_ISLNK(path.lstat().st_mode)
        os.rename(root / "etc/link0", root / "etc/renamed")
        os.link(root / "etc/renamed", root / "etc/linked", follow_symlinks=False)
        assert os.readlink(root / "etc/linked") == texts[0]

        def inside() -> None:
            os.chroot(root)
            os.chdir("/")
            for number, text in enumerate(texts):
                expected = errno.ENAMETOOLONG if text.startswith("aaa") else errno.ENOENT
                if text.startswith(("//proc", "/proc")):
                    continue
                for name in (f"/new/link{number}", f"/usr/lib/deep/link{number}"):
                    expect(expected, os.open, name, os.O_RDONLY)
                    expect(expected, os.chmod, name, 0o777)
                    expect(expected, os.listdir, name)
            os.makedirs("/vz/template/small/etc")
            with open("/vz/template/small/etc/motd", "w") as file:
                file.write("the container's own\n")
            with open("/usr/lib/deep/link0") as file:
                assert file.read() == "the container's own\n"
            os.chmod("/usr/lib/deep/link0", 0o600)

        in_child(inside)
        assert (root / "etc/motd").read_text() == "from the template\n"
    container.umount()
    clean(container)
    with container.mounted() as root:
        for folder in ("", "usr/lib/deep", "new"):
            for number, text in enumerate(texts):
                assert os.readlink(root / folder / f"link{number}") == text
        assert os.readlink(root / "etc/linked") == texts[0]
    assert rig.store.template("small").verify() == []
    assert rig.store.template("other").verify() == []


NAMES = [
    b"...",
    b"..\n",
    b". ",
    b".vzfs",
    b"conf",
    b"lock",
    b"private",
    b"cow",
    b"stage",
    b"small:5",
    b"1",
    b"//"[:1].replace(b"/", b"\\"),
    b"%s",
    b"new\nline",
    b"\xff\xfe invalid",
    b"\xc3",
    b"\xed\xa0\x80",
    b"-rf",
    b"*",
    b"a" * 255,
    b"\xe6\x9d\xb1" * 85,
    b"\x01\x1b[31m",
    b".new-101-00000000",
    b".nfs1234",
    b"trusted.vzfs.attr",
]


def test_names_of_any_bytes(rig: Rig) -> None:
    container, mounted = rig.mounted()
    top = os.fsencode(mounted)
    for folder in (b"", b"/usr/lib/deep", b"/own"):
        with contextlib.suppress(FileExistsError):
            os.mkdir(top + folder)
        for name in NAMES:
            path = top + folder + b"/" + name
            with open(path, "xb") as file:
                file.write(name)
            os.mkdir(path + b"." if len(name) < 255 else path[:-1])
        assert set(NAMES) <= set(os.listdir(top + folder))
        expect(errno.ENAMETOOLONG, os.mkdir, top + folder + b"/" + b"a" * 256)
        expect(errno.ENAMETOOLONG, os.stat, top + folder + b"/" + b"a" * 256)
    before = manifest(mounted)
    container.umount()
    clean(container)
    list(container.diff())
    container.mount()
    assert differences(before, manifest(mounted)) == []
    for name in NAMES:
        path = top + b"/own/" + name
        os.rename(path, top + b"/usr/lib/" + name)
        with open(top + b"/usr/lib/" + name, "rb") as file:
            assert file.read() == name
        os.unlink(top + b"/usr/lib/" + name)
    run("rm", "-rf", mounted / "own", mounted / "usr")
    assert sorted(path.name for path in container.path.iterdir()) == [
        "conf",
        "cow",
        "dump",
        "lock",
        "private",
        "vzfs.log",
    ]


# ------------------------------------------------------------------------------------------------ extended attributes


RESERVED = ["trusted.vzfs.origin", "trusted.vzfs.attr", "trusted.vzfs.nlink", "trusted.vzfs.x.user.a", "trusted.vzfs."]


def test_the_stores_own_attributes_are_neither_seen_nor_set(rig: Rig) -> None:
    container, root = rig.mounted()
    (root / "etc/motd").write_text("copied up: has an origin on disk\n")
    os.chmod(root / "etc/passwd", 0o640)  # a record with attr
    os.setxattr(root / "usr/lib/deep/001", "user.a", b"1")  # a record with x.user.a
    os.link(root / "usr/lib/deep/002", root / "usr/lib/deep/2nd")  # a link group with nlink
    os.rename(root / "usr/bin", root / "moved")  # a directory that came from a template
    on_disk = {
        name
        for top, folders, files in os.walk(container.path)
        for path in [top, *(os.path.join(top, one) for one in folders + files)]
        for name in os.listxattr(path, follow_symlinks=False)
    }
    assert {"trusted.vzfs.origin", "trusted.vzfs.attr", "trusted.vzfs.nlink", "trusted.vzfs.x.user.a"} <= on_disk
    places = ["", "etc", "etc/motd", "etc/passwd", "etc/link", "usr/lib/deep/001", "usr/lib/deep/2nd", "moved", "empty"]
    for place in places:
        path = root / place
        for name in RESERVED:
            expect(errno.EPERM, os.setxattr, path, name, b"small/3", follow_symlinks=False)
            expect(errno.EPERM, os.removexattr, path, name, follow_symlinks=False)
            expect(errno.ENODATA, os.getxattr, path, name, follow_symlinks=False)
        assert not [name for name in os.listxattr(path, follow_symlinks=False) if "vzfs" in name]
        assert "vzfs" not in run("getfattr", "-h", "-d", "-m", "-", path)
    failed = subprocess.run(
        ["setfattr", "-n", "trusted.vzfs.origin", "-v", "small/1", root / "etc/motd"], capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert "not permitted" in failed.stderr
    run("getfattr", "-n", "user.a", root / "usr/lib/deep/001")
    os.setxattr(root / "etc/motd", "trusted.vzf", b"near")
    os.setxattr(root / "etc/motd", "trusted.other", b"fine")
    assert os.getxattr(root / "etc/motd", "trusted.other") == b"fine"
    container.umount()
    clean(container)


# -------------------------------------------------------------------------------------------------------------- races


def test_no_race_leads_outside(rig: Rig) -> None:
    """A directory and a link to outside change places all the time while others work through the name.

    The host's own path walks stop at the mount: what is tried here is to make the server step through the link. The
    links' targets are paths of the node, absolute and relative to the private area.
    """
    outside = sentinels(rig.place)
    container, root = rig.mounted()
    depth = len(area(container).resolve().parts)
    targets = [str(outside), "../" * depth + str(outside).lstrip("/"), "/etc"]
    for number, target in enumerate(targets):
        (root / f"race{number}").mkdir()
        (root / f"race{number}/sub").mkdir()
        os.symlink(target, root / f"link{number}")
    deadline = time.monotonic() + PATIENCE_S
    progress = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the processes: byte 0 is set when enough flips were made,
    # the others count the workers that have done enough

    def flip() -> None:
        fd = os.open(root, os.O_RDONLY)
        flips = 0
        while time.monotonic() < deadline and not all(progress[1:4]):
            for number in range(len(targets)):
                calls.renameat2(fd, b"race%d" % number, fd, b"link%d" % number, calls.RENAME_EXCHANGE)
                flips += 1
            progress[0] = flips > 2000

    def work(seed: int) -> Callable[[], None]:
        def steps() -> None:
            os.chroot(root)
            os.chdir("/")
            chance = random.Random(seed)
            done = 0
            while time.monotonic() < deadline and not (done > 300 and progress[0]):
                place = f"/race{chance.randrange(len(targets))}"
                name = chance.choice(["secret", "sub/secret", "passwd", "new"])
                with contextlib.suppress(OSError):
                    chance.choice(ATTACKS)(f"{place}/{name}")
                    done += 1
            progress[seed] = 1
            assert done > 300

        return steps

    with untouched(outside):
        etc = os.stat("/etc/passwd")
        together(flip, work(1), work(2), work(3))
        assert os.stat("/etc/passwd").st_mode == etc.st_mode
        assert not os.path.lexists("/etc/new")
        assert sorted(os.listdir(outside)) == ["passwd", "secret", "sub"]
    assert serving(container)
    container.umount()
    clean(container)


def _read(path: str) -> None:
    with open(path) as file:
        assert "nobody" not in file.read()


def _write(path: str) -> None:
    with open(path, "w") as file:
        file.write("overwritten by the container\n")


ATTACKS: list[Callable[[str], object]] = [
    _read,
    _write,
    lambda path: os.chmod(path, 0o777),
    lambda path: os.chown(path, 12345, 12345),
    lambda path: os.truncate(path, 1),
    lambda path: os.setxattr(path, "user.evil", b"1"),
    os.utime,
    lambda path: os.link(path, path + ".l"),
    lambda path: os.rename(path, path + ".m"),
    lambda path: os.mkdir(path + ".d"),
    lambda path: os.symlink("x", path + ".s"),
    lambda path: os.mknod(path + ".n", 0o666 | stat.S_IFCHR, os.makedev(1, 3)),
    os.unlink,
]


# -------------------------------------------------------------------------------- a private area filled by an attacker


def forge(container: Container, outside: Path) -> dict[str, str]:
    """What an administrator may have unpacked into the private area without looking; the names by what they are."""
    place = area(container) / "tmp"
    if place.is_symlink():
        place.unlink()
        place.mkdir()
    links = {
        "dotdot": f"//vz/template/small/../../../{outside}/secret",
        "dotdot-in-the-middle": f"//vz/template/small/etc/../../../../../../../../../../{outside}/secret",
        "template-dotdot": "//vz/template/../private/101/conf",
        "absent": "//vz/template/absent/etc/motd",
        "absent-entry": "//vz/template/small/etc/none",
        "through-a-link": "//vz/template/small/bin/tool",
        "through-a-file": "//vz/template/small/etc/motd/x",
        "empty": "//vz/template/",
        "root": "//vz/template/small",
        "double": "//vz/template/small//etc",
        "slash-at-the-end": "//vz/template/small/etc/",
        "meta": "//vz/template/.vzfs/small/index",
        "long": "//vz/template/" + "x" * 4000,
        "name-too-long": "//vz/template/small/" + "x" * 300,
        "bytes": "//vz/template/small/\udcff\n",
    }
    for name, text in links.items():
        os.symlink(text, place / name)
    return links


def test_forged_magic_links_give_errors_and_reach_nothing(rig: Rig) -> None:
    rig.log_may_have += ["magic link", "there is no template 'absent'"]
    container = rig.container()
    outside = sentinels(rig.place)
    links = forge(container, outside)
    with untouched(outside):
        root = container.mount()
        for name in links:
            path = root / "tmp" / name
            assert (os.lstat(path).st_mode, os.lstat(path).st_size) == (stat.S_IFREG, 0), "shown, to be removed"
            for action in (
                os.readlink,
                os.listdir,
                lambda path: os.open(path, os.O_RDONLY),
                lambda path: os.open(path, os.O_RDWR | os.O_TRUNC),
                lambda path: os.chmod(path, 0o777),
                lambda path: os.setxattr(path, "user.x", b"1"),
                lambda path: os.link(path, path.with_name("made")),
            ):
                try:
                    action(path)
                except OSError as error:
                    assert error.errno in (errno.EIO, errno.EINVAL, errno.ENOTDIR), f"{name}: {error!r}"
                else:
                    raise AssertionError(f"{name} can be used")
        os.listdir(root / "tmp")
        (root / "tmp/fine").write_text("works beside them\n")
        run("ls", "-la", root / "etc")
        assert serving(container)
        container.umount()
    kinds = {problem.path.rpartition("/")[2] for problem in container.check()}
    assert {name for name in links if name != "bytes"} <= kinds
    assert not (set(os.listdir(outside)) - {"secret", "sub", "passwd"})


def test_directory_links_to_outside_are_links_of_the_container(rig: Rig) -> None:
    container = rig.container()
    outside = sentinels(rig.place)
    (area(container) / "etc").unlink()
    (area(container) / "etc").symlink_to(outside)
    (area(container) / "up").symlink_to("../../../../outside")
    with untouched(outside):
        root = container.mount()
        assert os.readlink(root / "etc") == str(outside)

        def inside() -> None:
            os.chroot(root)
            os.chdir("/")
            for name in ("etc", "up"):
                expect(errno.ENOENT, os.open, f"/{name}/secret", os.O_RDONLY)
                expect(errno.ENOENT, os.mkdir, f"/{name}/new")
                expect(errno.ENOENT, os.unlink, f"/{name}/secret")

        in_child(inside)
        os.unlink(root / "up")
        container.umount()
        container.check(repair=True)
        list(container.diff())
        container.destroy()


GARBAGE = [b"", b"\0", b"x" * 1000, b"mode=9999 uid=-1", b"mode=0644 uid=99999999999999", b"mtime=1", b"small/-1"]
GARBAGE += [
    b"small/999999999",
    b"../../etc/1",
    b"absent/1",
    b"small/0",
    b"\xff\xfe",
    b"mode=0",
    b"xattrs=own xattrs=own",
]
GARBAGE += [b"99999999999999999999", b"-5", b"uid=4294967296", b"atime=99999999999999999999.000000000", b"mode=7777777"]


def test_running_into_damage_forever_does_not_fill_the_log(rig: Rig) -> None:
    rig.log_may_have += ["magic link", "there is no template 'absent'"]
    container = rig.container()
    os.symlink("//vz/template/absent/x", container.path / "private/bad")
    root = container.mount()
    for _ in range(20 * BURST):
        with pytest.raises(OSError):
            os.open(root / "bad", os.O_RDONLY)
    container.umount()
    lines = (container.path / "vzfs.log").read_text().splitlines()
    assert BURST <= len(lines) <= 2 * BURST
    assert "complaints before this are left out" in lines[-1]
    assert "unmounted" in lines[-1], "what vzfs does is told at any rate"


def test_forged_attributes_of_the_store_give_errors_at_most(rig: Rig) -> None:
    """Every kind of stored object with every kind of garbage in each of the store's attributes."""
    rig.log_may_have += ["malformed", "a damaged magic link", r"link group with"]
    source = small_tree(rig.place / "source")
    for number in range(len(GARBAGE)):
        for name in ("copied", "chmodded", "group"):
            (source / f"var/{name}{number}").write_text(f"{name}\n")
        os.link(source / f"var/group{number}", source / f"var/again{number}")
        (source / f"var/dir{number}").mkdir()
        (source / f"var/dir{number}/file").touch()
    rig.template("small", source)
    container, root = rig.mounted()
    for number in range(len(GARBAGE)):
        with open(root / f"var/copied{number}", "a") as file:
            file.write("own\n")
        with open(root / f"var/group{number}", "a") as file:
            file.write("own\n" * (number % 2))
        os.chmod(root / f"var/group{number}", 0o600)
        os.chmod(root / f"var/chmodded{number}", 0o640)
        (root / f"var/dir{number}/new").touch()
        (root / f"var/own{number}").write_text("own\n")
        os.symlink("x", root / f"var/link{number}")
    container.umount()
    clean(container)
    outside = sentinels(rig.place)
    groups = sorted((container.path / "cow/links").iterdir())
    assert len(groups) == len(GARBAGE)
    seen = [f"{name}{number}" for name in KINDS for number in range(len(GARBAGE))]
    with untouched(outside):
        for attribute in ("trusted.vzfs.attr", "trusted.vzfs.origin", "trusted.vzfs.nlink", "trusted.vzfs.x.trusted.e"):
            copy = rig.place / "copy"
            run("cp", "-a", container.path, copy)
            for number, value in enumerate(GARBAGE):
                kinds = [copy / "private/var" / f"{name}{number}" for name in KINDS]
                for path in [*kinds, copy / "cow/links" / groups[number].name]:
                    os.setxattr(path, attribute, value, follow_symlinks=False)
            forged = rig.watch(rig.store.container(str(copy)))
            root = forged.mount(rig.place / "mnt")
            os.listdir(root / "var")
            for name in seen:
                poke(root / "var" / name)
            (root / "var/works").write_text("beside them\n")
            assert serving(forged)
            forged.umount()
            list(forged.diff())
            forged.check()
            forged.check(repair=True)
            assert forged.check() == []
            with forged.mounted(rig.place / "mnt") as root:
                manifest(root)
            assert rig.failures(forged) == []
            forged.destroy()


KINDS = ["copied", "chmodded", "group", "dir", "own", "link"]


def poke(path: Path) -> None:
    """Do everything to ``path`` that leaves it there; errors must be EIO, ENOENT, ESTALE or an honest refusal."""
    allowed = {errno.EIO, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENODATA, errno.EINVAL, errno.ENOTEMPTY}
    actions: list[Callable[[], object]] = [
        lambda: os.lstat(path),
        lambda: os.listxattr(path),
        lambda: os.listdir(path),
        path.read_bytes,
        lambda: os.chmod(path, 0o755),
        lambda: os.utime(path, ns=(5, 7)),
        lambda: os.setxattr(path, "user.poked", b"1"),
        lambda: os.removexattr(path, "user.poked"),
        lambda: os.close(os.open(path, os.O_WRONLY | os.O_APPEND)),
    ]
    for action in actions:
        try:
            action()
        except OSError as error:
            assert error.errno in allowed, f"{path}: {error!r}"


# ------------------------------------------------------------------------------------------------------- much and deep


def descend(names: Iterator[bytes], *, make: bool) -> int:
    """Go down ``names`` one by one from the working directory; gives the descriptor of the last."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    for name in names:
        if make:
            os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd


DEEP = 2000


def test_paths_far_beyond_path_max(rig: Rig) -> None:
    container, root = rig.mounted()

    def make() -> None:
        os.chdir(root / "usr/lib")
        fd = descend((b"level-%d" % number for number in range(DEEP)), make=True)
        with open(os.open("bottom", os.O_WRONLY | os.O_CREAT, dir_fd=fd), "w") as file:
            file.write("deep\n")
        os.rename("bottom", "renamed", src_dir_fd=fd, dst_dir_fd=fd)
        os.symlink("//vz/template/small/etc", "link", dir_fd=fd)
        os.mkdir("d", dir_fd=fd)

    in_child(make)
    container.umount()
    clean(container)
    assert sum(1 for _ in container.diff()) >= DEEP
    container.mount()

    def find_and_change() -> None:
        os.chdir(root / "usr/lib")
        fd = descend((b"level-%d" % number for number in range(DEEP)), make=False)
        assert sorted(os.listdir(fd)) == ["d", "link", "renamed"]
        with open(os.open("renamed", os.O_RDWR | os.O_APPEND, dir_fd=fd), "r+") as file:
            assert file.read() == "deep\n"
        os.chmod("renamed", 0o600, dir_fd=fd)
        os.rmdir("d", dir_fd=fd)
        # A whole directory of the template moves to the depths, and is changed there.
        os.rename(root / "usr/lib/deep", "template", dst_dir_fd=fd)
        with open(os.open("template/007", os.O_WRONLY | os.O_TRUNC, dir_fd=fd), "w") as file:
            file.write("changed\n")
        os.chmod("template/008", 0o600, dir_fd=fd)
        assert len(os.listdir(os.open("template", os.O_RDONLY, dir_fd=fd))) == 302

    in_child(find_and_change)
    container.umount()
    clean(container)
    container.mount()
    run("rm", "-rf", root / "usr/lib/level-0")
    assert sorted(os.listdir(root / "usr/lib")) == ["same"]
    container.umount()
    clean(container)

    container.mount()
    in_child(make_at, root)
    container.umount()
    container.destroy()
    assert os.listdir(rig.root / "private") == []


def make_at(root: Path) -> None:
    os.chdir(root)
    descend((b"x" * 250 for number in range(DEEP)), make=True)


def test_a_storm_of_requests(rig: Rig) -> None:
    container, root = rig.mounted()
    pid = int(container.status().pid or 0)
    os.mkdir(root / "storm")
    before = len(os.listdir(f"/proc/{pid}/fd"))

    def storm(first: int) -> Callable[[], None]:
        def steps() -> None:
            fd = os.open(root / "storm", os.O_RDONLY)
            for number in range(first, first + 1250):
                os.close(os.open(f"f{number}", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600, dir_fd=fd))
                for other in (number, first, first + (number - first) // 2):
                    os.close(os.open(f"f{other}", os.O_RDWR, dir_fd=fd))
            os.close(fd)

        return steps

    together(storm(0), storm(1250), storm(2500), storm(3750))  # 20,000 times open and close
    assert len(os.listdir(root / "storm")) == 5000
    held = [os.open(root / f"storm/f{number}", os.O_RDONLY) for number in range(500)]
    run("rm", "-rf", root / "storm")
    assert not (root / "storm").exists()
    assert os.fstat(held[499]).st_nlink == 0
    for fd in held:
        os.close(fd)
    wait_for(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before + 270)  # RELEASE has no answer to wait for
    container.umount()
    clean(container)


# --------------------------------------------------------------------------------------------------------------- fuzz


_libc = ctypes.CDLL(None, use_errno=True)
ODD_NUMBERS = [0, 1, -1, 4095, 4096, 4097, 2**31 - 1, 2**31, 2**32, 2**40 + 3, 2**62, 2**63 - 1, -(2**63), 131072]
ODD_MODES = [0, 0o7777, 0o177777, 0o644, 0o170000, 0o120000, 0o140644, 0o060600, 0o020600, 0o010600, 0o100644, 0o040755]
ODD_NAMES = [b"a", b"b", b"dir/c", b"dir", b"dir/none/x", b"usr", b"usr/lib/deep/005", b"usr/bin/same", b"usr/lib/same"]
ODD_NAMES += [b"a/b", b".", b"..", b"", b"x" * 255, b"x" * 256, b"dir/", b"etc/link", b"loop", b"dev/null", b"var/pipe"]
ODD_NAMES += [b"usr/lib/deep", b"empty", b"tmp", b"../../..", b"dev/full", b"etc/motd", b"usr/lib/deep/er/big"]
ODD_XATTRS = [b"user.a", b"user.", b"", b"user." + b"n" * 250, b"user." + b"n" * 251, b"trusted.x", b"security.x"]
ODD_XATTRS += [b"system.posix_acl_access", b"security.capability", b"system.nfs4_acl", b"none", b"trusted.vzfs.attr"]
ODD_VALUES = [b"", b"v", b"\0" * 20, b"v" * 4000, b"v" * 65536, struct.pack("<I", 2), b"\x02\0\0\x02" + b"\0" * 16]


class Fuzz:
    """Random system calls on names below the working directory, with arguments that programs don't use."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.open: list[int] = []
        self.steps = [getattr(self, name) for name in sorted(vars(Fuzz)) if name.startswith("do_")]

    def run(self, count: int) -> None:
        """Make ``count`` calls; whatever they answer is right, as long as they answer."""
        for _ in range(count):
            with contextlib.suppress(OSError, ValueError, OverflowError, MemoryError):
                self.chance.choice(self.steps)()
            if len(self.open) > 20:
                os.close(self.open.pop(self.chance.randrange(20)))

    def name(self) -> bytes:
        return self.chance.choice(ODD_NAMES)

    def number(self) -> int:
        return self.chance.choice(ODD_NUMBERS)

    def fd(self) -> int:
        return self.chance.choice(self.open) if self.open else -1

    def do_open(self) -> None:
        flags = self.chance.choice([0, 1, 2, 3])
        for flag in ("CREAT", "EXCL", "TRUNC", "APPEND", "DIRECTORY", "NOFOLLOW", "SYNC", "DSYNC", "DIRECT", "NOATIME"):
            flags |= getattr(os, f"O_{flag}") if not self.chance.randrange(4) else 0
        if not self.chance.randrange(10):
            flags |= os.O_TMPFILE
        self.open.append(os.open(self.name(), flags | os.O_NONBLOCK, self.chance.choice(ODD_MODES)))

    def do_path(self) -> None:
        self.open.append(os.open(self.name(), os.O_PATH))

    def do_read(self) -> None:
        os.pread(self.fd(), self.chance.choice([0, 1, 5000, 200_000]), self.number())

    def do_write(self) -> None:
        os.pwrite(self.fd(), b"w" * self.chance.choice([0, 1, 5000, 200_000]), self.number())

    def do_truncate(self) -> None:
        os.ftruncate(self.fd(), self.number())

    def do_truncate_name(self) -> None:
        os.truncate(self.name(), self.number())

    def do_seek(self) -> None:
        os.lseek(self.fd(), self.number(), self.chance.randrange(7))

    def do_fallocate(self) -> None:
        mode, length = self.chance.randrange(128), self.number()
        if not mode & FALLOC_FL_PUNCH_HOLE:
            length = min(length, 1 << 20)  # the disk is everybody's
        _libc.fallocate(self.fd(), mode, ctypes.c_long(self.number()), ctypes.c_long(length))

    def do_copy(self) -> None:
        os.copy_file_range(self.fd(), self.fd(), 100_000, abs(self.number()), abs(self.number()))

    def do_mknod(self) -> None:
        mode = self.chance.choice(ODD_MODES)
        null = os.makedev(1, 3) if stat.S_ISCHR(mode) else 0
        os.mknod(self.name(), mode, self.chance.choice([0, null, 2**32 - 1]))

    def do_mkdir(self) -> None:
        os.mkdir(self.name(), self.chance.choice(ODD_MODES))

    def do_remove(self) -> None:
        self.chance.choice([os.unlink, os.rmdir])(self.name())

    def do_link(self) -> None:
        os.link(self.name(), self.name(), follow_symlinks=bool(self.chance.randrange(2)))

    def do_symlink(self) -> None:
        os.symlink(self.chance.choice([b"loop", b"//vz/template/small/etc", b"x" * 4095, b"..", b"a"]), self.name())

    def do_rename(self) -> None:
        at = os.open(".", os.O_PATH)
        try:
            calls.renameat2(at, self.name(), at, self.name(), self.chance.choice([0, 0, 0, 1, 2, 3, 4, 5, 8, 255]))
        finally:
            os.close(at)

    def do_attributes(self) -> None:
        os.chmod(self.name(), self.chance.choice(ODD_MODES))
        os.chown(self.name(), self.chance.choice([0, -1, 2**32 - 2, 1]), self.chance.choice([0, -1, 2**31]))

    def do_times(self) -> None:
        os.utime(self.name(), ns=(self.number(), self.number()), follow_symlinks=False)

    def do_setxattr(self) -> None:
        value = self.chance.choice(ODD_VALUES)
        os.setxattr(self.name(), self.chance.choice(ODD_XATTRS), value, self.chance.randrange(4), follow_symlinks=False)

    def do_setxattr_too_large(self) -> None:
        _libc.setxattr(self.name(), b"user.large", b"v" * 65537, ctypes.c_size_t(65537), 0)

    def do_xattrs(self) -> None:
        os.listxattr(self.name(), follow_symlinks=False)
        os.getxattr(self.name(), self.chance.choice(ODD_XATTRS), follow_symlinks=False)
        os.removexattr(self.name(), self.chance.choice(ODD_XATTRS), follow_symlinks=False)

    def do_list(self) -> None:
        fd = os.open(self.name(), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.lseek(fd, self.number(), os.SEEK_SET)
            with os.scandir(fd) as entries:
                [entry.stat(follow_symlinks=False) for entry in entries]
        finally:
            os.close(fd)

    def do_sync(self) -> None:
        self.chance.choice([os.fsync, os.fdatasync])(self.fd())

    def do_ioctl(self) -> None:
        buffer = ctypes.create_string_buffer(64)
        _libc.ioctl(self.fd(), self.chance.choice([0x80086601, 0x40086602, 0xC020660B, 0x40049409, 0x5401]), buffer)

    def do_statvfs(self) -> None:
        os.statvfs(self.name())

    def do_socket(self) -> None:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(self.name()[:100])

    def do_stat(self) -> None:
        os.stat(self.name(), follow_symlinks=bool(self.chance.randrange(2)))
        os.readlink(self.name())


@pytest.mark.parametrize("seed", range(3))
def test_no_request_ends_the_server_or_fails_unexpectedly(rig: Rig, seed: int) -> None:
    container, root = rig.mounted()

    def fuzz(own: int) -> Callable[[], None]:
        def steps() -> None:
            os.chroot(root)
            os.chdir("/")
            os.umask(0)
            Fuzz(1000 * seed + own).run(4000)

        return steps

    together(fuzz(1), fuzz(2))
    assert serving(container)
    assert rig.failures(container) == []
    (root / "still").write_text("works\n")
    before = manifest_without_devices(root)
    container.umount()
    clean(container)
    container.mount()
    assert manifest_without_devices(root) == before
    assert rig.store.template("small").verify() == []


def manifest_without_devices(root: Path) -> dict[str, tuple[int, int, int]]:
    """Names, modes, link counts and sizes; files of 2^62 bytes are not read."""
    found = {}
    for top, folders, files in os.walk(os.fsencode(root)):
        for name in folders + files:
            info = os.lstat(os.path.join(top, name))
            size = info.st_size if stat.S_ISREG(info.st_mode) else 0
            found[os.fsdecode(os.path.join(top, name))] = (info.st_mode, info.st_nlink, size)
    return found


# ---------------------------------------------------------------------------------------------------- special programs


def test_devices_work_inside_and_stay_below_closed_folders(rig: Rig) -> None:
    container, root = rig.mounted()
    with open(root / "dev/null", "wb") as file:
        file.write(b"x")
    with open(root / "dev/full", "wb", buffering=0) as file:
        expect(errno.ENOSPC, file.write, b"x")
    os.mknod(root / "dev/zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    with open(root / "dev/zero", "rb") as file:
        assert file.read(10) == bytes(10)
    container.umount()
    for place in (rig.root / "template", rig.root / "private", rig.root / "root", container.path):
        info = place.stat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid) == (0o700, 0)
