"""Full disks and unusual ones: ENOSPC changes nothing, and what needs hard links or reflinks works without them.

Every store here lies on a small file system of its own, in a file, mounted through a loop device.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines import DEFAULT, ENGINES, each_engine
from tests.realuse_helpers import (
    Rig,
    area,
    clean,
    differences,
    expect,
    look_at,
    loop_mounted,
    manifest,
    mounts_below,
    rig_fixture,  # noqa: F401
    run,
    small_tree,
    unmount_below,
    vzfs,
    wait_for,
)
from vzfs import Container, FullError

MIB = 1 << 20


@contextlib.contextmanager
def rig_on(engine: str, place: Path, size: int, filesystem: str = "ext4", *options: str) -> Iterator[Rig]:
    """A store on a new small file system."""
    with loop_mounted(place / "image", place / "disk", size, filesystem, options) as disk:
        rig = Rig(disk, engine)
        try:
            yield rig
            rig.finish()
        finally:
            unmount_below(disk / "vz")


@pytest.fixture(params=ENGINES)
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    """A store on 64 MiB of ext4, with the template ``small`` and, as a witness, container 102."""
    with rig_on(request.param, tmp_path, 64 * MIB, "ext4", "-b", "4096", "-m", "0") as rig:
        rig.template("small", small_tree(tmp_path / "source"))
        rig.container(102)
        before = manifest(area(rig.store.container(102)))
        yield rig
        run("rm", "-rf", rig.place / "filler")
        os.sync()
        links = frozenset({"nlink"})  # magic links are shared
        assert differences(before, manifest(area(rig.store.container(102))), but=links) == []
        with rig.store.container(102).mounted() as root:
            expected = manifest(tmp_path / "source")
            assert differences(expected, manifest(root), but=frozenset({"ino"})) == []
        assert rig.store.template("small").verify() == []


class Filler:
    """Fills a disk to the last block, or leaves some bytes, until it is told to make room again."""

    def __init__(self, rig: Rig) -> None:
        self._place = rig.place / "filler"
        self._place.mkdir()

    def fill(self, leave: int = 0) -> None:
        """Take all space but ``leave`` bytes, or a little less."""
        os.sync()  # what is written late has its blocks now
        with open(self._place / "data", "ab", buffering=0) as file:
            while os.statvfs(self._place).f_bavail * 4096 > leave + MIB:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, MIB)
            with contextlib.suppress(OSError):
                while not leave or os.statvfs(self._place).f_bavail * 4096 > leave:
                    file.write(b"x" * 4096)
                    os.fsync(file.fileno())

    def take_inodes(self) -> None:
        """Take every inode."""
        with contextlib.suppress(OSError):
            for number in range(1_000_000):
                (self._place / f"{number}").touch()

    def free(self) -> None:
        """Give everything back."""
        run("rm", "-rf", self._place)
        self._place.mkdir()
        os.sync()


def space(rig: Rig) -> tuple[int, int]:
    """Free bytes and inodes, once everything deleted is really gone."""
    os.sync()
    info = os.statvfs(rig.place)
    return info.f_bfree * info.f_frsize, info.f_ffree


def staged(container: Container) -> list[str]:
    return os.listdir(container.path / "cow/stage")


one_engine = pytest.mark.parametrize("full", [DEFAULT], indirect=True)


# -------------------------------------------------------------------------------------------------------------- copy-up


def test_a_copy_that_does_not_fit_changes_nothing(full: Rig) -> None:
    container, root = full.mounted()
    big = root / "usr/lib/deep/er/big"
    (big.parent / "neighbour").touch()  # unfolds the way to it
    filler = Filler(full)
    filler.fill(leave=300_000)
    before, free = look_at(os.fsencode(big)), space(full)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND):
        expect(errno.ENOSPC, os.open, big, flags)
    expect(errno.ENOSPC, os.truncate, big, 900_000)
    assert look_at(os.fsencode(big)) == before
    assert staged(container) == []
    assert space(full) == free
    assert (area(container) / "usr/lib/deep/er/big").is_symlink()
    os.truncate(big, 1000)  # fits
    assert big.read_bytes() == (bytes(range(256)) * 4)[:1000]
    assert os.getxattr(big, "user.note") == b"template"
    filler.free()
    with open(big, "ab") as file:
        file.write(b"more")
    container.umount()
    clean(container)


def test_copies_race_for_the_last_space(full: Rig, tmp_path: Path) -> None:
    """Of several copies at once, those that fit are whole and the others did not happen."""
    source = tmp_path / "other"
    source.mkdir()
    for number in range(12):
        (source / f"f{number}").write_bytes(bytes([number]) * 900_000)
    full.template("files", source)
    container, root = full.mounted(101, "files")
    (root / "unfolds").touch()
    filler = Filler(full)
    filler.fill(leave=5 * MIB)
    outcomes = []
    for number in range(12):
        try:
            with open(root / f"f{number}", "r+b") as file:
                file.write(b"W")
            outcomes.append(b"W" + bytes([number]) * 899_999)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            outcomes.append(bytes([number]) * 900_000)
    assert {content[:1] == b"W" for content in outcomes} == {True, False}
    for number, content in enumerate(outcomes):
        assert (root / f"f{number}").read_bytes() == content
    assert staged(container) == []
    container.umount()
    clean(container)
    with container.mounted() as root:
        for number, content in enumerate(outcomes):
            assert (root / f"f{number}").read_bytes() == content


# ------------------------------------------------------------------------------------------------------------ unfolding


def changes_in_folded(root: Path) -> list[Callable[[], object]]:
    """Changes that need ``usr/lib/deep``, 302 entries, to be unfolded."""
    folder = root / "usr/lib/deep"
    return [
        (folder / "new").touch,
        (folder / "new").mkdir,
        lambda: os.unlink(folder / "001"),
        lambda: os.rename(folder / "001", folder / "new"),
        lambda: os.chmod(folder / "001", 0o600),
        lambda: os.chmod(folder, 0o700),
        lambda: os.symlink("x", folder / "new"),
        lambda: os.link(folder / "001", folder / "new"),
        lambda: (folder / "001").write_text("x"),
    ]


def refused_and_unchanged(root: Path, container: Container) -> None:
    before = manifest(root)
    for change in changes_in_folded(root):
        expect(errno.ENOSPC, change)
        assert staged(container) == []
    assert differences(before, manifest(root)) == []
    assert len(os.listdir(root / "usr/lib/deep")) == 302


def test_unfolding_on_a_full_disk(full: Rig) -> None:
    container, root = full.mounted()
    (root / "usr/lib/here").touch()
    filler = Filler(full)
    filler.fill()
    refused_and_unchanged(root, container)
    assert (area(container) / "usr/lib/deep").is_symlink()
    filler.free()
    for change in changes_in_folded(root)[:1]:
        change()
    assert len(os.listdir(root / "usr/lib/deep")) == 303
    container.umount()
    clean(container)


def test_unfolding_without_inodes(tmp_path: Path) -> None:
    with rig_on(DEFAULT, tmp_path, 64 * MIB, "ext4", "-b", "4096", "-m", "0", "-N", "1400") as rig:
        container, root = rig.mounted()
        filler = Filler(rig)
        filler.take_inodes()
        refused_and_unchanged(root, container)
        expect(errno.ENOSPC, (root / "tmp/new").touch)
        with pytest.raises(FullError):
            rig.store.create(103, template="small")
        assert sorted(os.listdir(rig.root / "private")) == ["101"]
        filler.free()
        (root / "usr/lib/deep/new").touch()
        container.umount()
        clean(container)


# -------------------------------------------------------------------------------------------------------------- writing


def test_a_writer_is_told_and_keeps_what_was_acknowledged(full: Rig) -> None:
    container, root = full.mounted()
    (root / "tmp/new").touch()
    Filler(full).fill(leave=3 * MIB)
    acknowledged = 0
    with open(root / "tmp/new", "wb", buffering=0) as file:

        def write_on() -> None:
            nonlocal acknowledged
            for number in range(1000):
                acknowledged += file.write(bytes([number % 251]) * 30_000)

        expect(errno.ENOSPC, write_on)
        os.fsync(file.fileno())
        expect(errno.ENOSPC, os.pwrite, file.fileno(), b"x" * 200_000, 100 * MIB)
    assert 2 * MIB < acknowledged < 4 * MIB
    expected = b"".join(bytes([number % 251]) * 30_000 for number in range(acknowledged // 30_000 + 1))[:acknowledged]
    assert (root / "tmp/new").read_bytes()[:acknowledged] == expected
    container.umount()
    clean(container)
    with container.mounted() as root:
        assert (root / "tmp/new").read_bytes()[:acknowledged] == expected
        os.unlink(root / "tmp/new")  # a full disk can be emptied
        wait_for(lambda: os.statvfs(root).f_bavail * 4096 > 2 * MIB + 65536)
        (root / "tmp/again").write_bytes(b"x" * 2 * MIB)


def overwrite(path: Path) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.write(b"W")


def attributes(root: Path) -> dict[str, os.stat_result]:
    """What stat tells of every file below ``root``, but for times of access and change."""
    paths = [Path(top) / name for top, folders, files in os.walk(root) for name in folders + files]
    return {str(path): os.stat_result((*path.lstat()[:7], 0, path.lstat().st_mtime, 0)) for path in paths}


def test_nothing_is_ever_half_done(full: Rig) -> None:
    """Every kind of change on a disk without a free block: done, or ENOSPC with everything as it was."""
    container, root = full.mounted()
    for folder in ("etc", "usr/bin", "tmp", "usr/lib/deep"):
        (root / folder / "unfolds").touch()
    (root / "etc/own").write_text("own")
    os.link(root / "usr/lib/deep/299", root / "usr/lib/deep/group")
    Filler(full).fill()
    folder = root / "usr/lib/deep"
    names = iter(f"{number:03}" for number in range(250))
    changes: list[Callable[[], object]] = []
    for number in range(5):
        long = "n" * 240 + str(number)
        one, two, three, four, five, six = (folder / next(names) for _ in range(6))
        changes += [
            lambda path=one: os.chmod(path, 0o751),
            lambda path=one: os.chown(path, 7, 8),
            lambda path=two: os.utime(path, ns=(1, 2)),
            lambda path=two: os.setxattr(path, "user.x", b"v" * 2000),
            lambda path=three, to=folder / long: os.link(path, to),
            lambda path=four, to=folder / f"r{long}": os.rename(path, to),
            lambda path=five: os.truncate(path, 10),
            lambda path=six: overwrite(path),
            lambda to=folder / f"d{long}": os.mkdir(to),
            lambda to=folder / f"s{long}": os.symlink("t" * 1000, to),
            lambda to=folder / f"f{long}": os.mkfifo(to),
            lambda path=folder / "group", to=folder / f"g{long}": os.link(path, to),
            lambda to=root / f"etc/moved{number}": os.rename(root / "etc/own", to),
            lambda to=root / f"etc/moved{number}": os.rename(to, root / "etc/own"),
            lambda: os.chmod(root / "usr/bin/same", 0o600),
            lambda: os.rename(root / "usr/lib/deep/er", root / "usr/lib/deep/re"),
            lambda: os.rename(root / "usr/lib/deep/re", root / "usr/lib/deep/er"),
        ]
    done = refused = 0
    before = attributes(root)
    for change in changes:
        try:
            change()
            done += 1
        except OSError as error:
            assert error.errno in (errno.ENOSPC, errno.ENOENT), f"{error!r}"
            refused += error.errno == errno.ENOSPC
            assert attributes(root) == before
        before = attributes(root)
        assert staged(container) == []
    assert done
    assert refused
    seen = manifest(root)
    container.umount()
    clean(container)
    container.mount()
    assert differences(seen, manifest(root)) == []
    for path in ("usr/lib/deep/100", "etc/own", "tmp/unfolds"):
        os.unlink(root / path)
    container.umount()
    clean(container)


# ---------------------------------------------------------------------------------------------- templates, containers


@one_engine
def test_a_template_that_does_not_fit_leaves_nothing(full: Rig, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.mkdir()
    for number in range(20):
        (source / f"f{number}").write_bytes(os.urandom(MIB))
    with tarfile.open(tmp_path / "large.tar", "w") as archive:
        archive.add(source, ".")
    Filler(full).fill(leave=10 * MIB)
    before = space(full)
    for origin in (source, tmp_path / "large.tar"):
        with pytest.raises(FullError, match=r"full|no space"):
            full.store.create_template("large", str(origin))
        assert space(full) == before
    vzfs("template", "create", "large", "--from", str(source), root=full.root, code=10)
    assert space(full) == before
    assert [one.name for one in full.store.templates()] == ["small"]
    assert sorted(os.listdir(full.root / "template/.vzfs")) == ["small"]


@one_engine
def test_a_container_that_does_not_fit_leaves_nothing(full: Rig) -> None:
    filler = Filler(full)
    filler.fill()
    before = space(full)
    with pytest.raises(FullError, match="103"):
        full.store.create(103, template="small")
    vzfs("create", "103", "--template", "small", root=full.root, code=10)
    assert space(full) == before
    assert sorted(os.listdir(full.root / "private")) == ["102"]
    filler.free()
    with full.store.create(103, template="small").mounted() as root:
        assert (root / "etc/motd").read_text() == "from the template\n"


def test_a_full_disk_can_be_mounted_and_emptied(full: Rig) -> None:
    container, root = full.mounted()
    (root / "tmp/large").write_bytes(b"x" * MIB)
    container.umount()
    filler = Filler(full)
    filler.fill()
    with container.mounted() as root:
        assert container.status().mounted
        before = os.statvfs(root).f_bfree
        os.unlink(root / "tmp/large")
        wait_for(lambda: os.statvfs(root).f_bfree > before)  # when the kernel has forgotten the file
        (root / "tmp/small").write_text("works")
    first_time = full.store.container(102)
    filler.fill()
    try:
        with first_time.mounted() as root:
            assert (root / "etc/motd").exists()
    except FullError as error:
        assert "102" in str(error)  # its cow folders have no room
    assert mounts_below(full.root) == []
    filler.free()


# ----------------------------------------------------------------------------------------------------- unusual stores


def link_on(folder: int) -> None:
    """Give ``0`` in ``folder`` 65,000 more names."""
    for number in range(1, 65_001):
        os.link("0", f"{number}", src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)


def test_the_link_farm_at_its_limit(tmp_path: Path) -> None:
    """ext4 allows 65,000 links; the ones beyond are symlinks of the container's own."""
    with rig_on(DEFAULT, tmp_path, 64 * MIB, "ext4", "-b", "4096", "-m", "0") as rig:
        rig.template()
        first = rig.container(101)
        crowd = rig.place / "crowd"
        crowd.mkdir()
        used_up = ["etc", "usr", "bin"]
        for name in used_up:
            (crowd / name).mkdir()
            fd = os.open(crowd / name, os.O_PATH)
            os.link(area(first) / name, "0", dst_dir_fd=fd, follow_symlinks=False)
            expect(errno.EMLINK, link_on, fd)
            os.close(fd)
        container, root = rig.mounted(102)
        for name in used_up:
            assert (area(container) / name).lstat().st_nlink == 1
            assert os.readlink(area(container) / name) == f"//vz/template/small/{name}"
        assert (area(container) / "var").lstat().st_nlink > 1
        (root / "etc/new").write_text("new")
        os.rename(root / "bin", root / "bin2")
        os.chmod(root / "usr/bin/tool", 0o700)
        container.umount()
        clean(container)
        assert {(one.kind, one.path) for one in container.diff() if one.type != "dir"} == {
            ("renamed", "/bin2"),
            ("added", "/etc/new"),
            ("changed", "/usr/bin/tool"),
        }


def test_a_container_on_another_file_system(rig: Rig, tmp_path: Path) -> None:
    with loop_mounted(tmp_path / "image", tmp_path / "other", 64 * MIB, "ext4", ("-b", "4096", "-m", "0")) as other:
        container = rig.container(other / "ve/101")
        free = os.statvfs(other).f_bfree
        assert all(path.lstat().st_nlink == 1 for path in area(container).iterdir() if path.is_symlink())
        root = container.mount(tmp_path / "mnt")
        source = manifest(rig.place / "source-small")
        assert differences(source, manifest(root), but=frozenset({"ino"})) == []
        with open(root / "usr/lib/deep/er/big", "r+b") as file:
            file.write(b"W")
        os.link(root / "usr/lib/deep/001", root / "usr/lib/deep/linked")
        with open(root / "usr/bin/same", "a") as file:
            file.write("written\n")
        os.chmod(root / "usr/lib/deep/002", 0o600)
        os.rename(root / "usr/lib/deep", root / "var/moved")
        assert (root / "var/moved/er/big").read_bytes()[:2] == b"W\x01"
        assert (root / "var/moved/same").read_text() == "one inode\nwritten\n"
        seen = manifest(root)
        container.umount()
        clean(container)
        container.mount(tmp_path / "mnt")
        assert differences(seen, manifest(root)) == []
        Filler(Rig(other)).fill()
        with open(root / "etc/passwd", "rb") as file:
            assert file.read().startswith(b"root")
        with pytest.raises(OSError, match="No space"):
            (root / "var/moved/er/large").write_bytes(b"x" * MIB)
        container.umount()
        clean(container)
        container.destroy()
        assert os.listdir(other / "ve") == []
        assert free > 0
    assert rig.store.template("small").verify() == []


FIEMAP = 0xC020660B
FIEMAP_EXTENT_LAST = 1
FIEMAP_EXTENT_SHARED = 0x2000


def shared_bytes(path: Path) -> int:
    """How many bytes of the file have blocks that another file has as well (ioctl_fiemap, flushed before)."""
    shared = start = 0
    with open(path, "rb") as file:
        while True:
            head = struct.pack("=QQIIII", start, 2**63, 1, 0, 64, 0)
            answer = bytearray(head + bytes(56 * 64))
            fcntl.ioctl(file.fileno(), FIEMAP, answer)
            count = struct.unpack_from("=I", answer, 20)[0]
            for number in range(count):
                logical, _, length, _, _, flags = struct.unpack_from("=QQQQQI", answer, 32 + 56 * number)
                shared += length if flags & FIEMAP_EXTENT_SHARED else 0
                start = logical + length
                if flags & FIEMAP_EXTENT_LAST:
                    return shared
            if not count:
                return shared


@each_engine
@pytest.mark.parametrize("filesystem", ["btrfs", "xfs"])
def test_copies_share_their_blocks_where_the_file_system_can(engine: str, tmp_path: Path, filesystem: str) -> None:
    with rig_on(engine, tmp_path, 400 * MIB, filesystem) as rig:
        source = small_tree(tmp_path / "source")
        content = os.urandom(MIB) * 64
        (source / "usr/large").write_bytes(content)
        os.chmod(source / "usr/large", 0o640)
        rig.template("small", source)
        container, root = rig.mounted()
        os.sync()
        before = os.statvfs(rig.place).f_bfree * os.statvfs(rig.place).f_frsize
        with open(root / "usr/large", "r+b") as file:
            file.seek(5 * MIB)
            file.write(b"changed")
        os.sync()
        after = os.statvfs(rig.place).f_bfree * os.statvfs(rig.place).f_frsize
        assert before - after < 4 * MIB, "the copy took space of its own"
        assert shared_bytes(area(container) / "usr/large") > 60 * MIB
        assert (root / "usr/large").read_bytes() == content[: 5 * MIB] + b"changed" + content[5 * MIB + 7 :]
        assert stat.S_IMODE((root / "usr/large").stat().st_mode) == 0o640
        assert (rig.root / "template/small/usr/large").read_bytes() == content
        (root / "usr/lib/deep/new").touch()
        os.rename(root / "usr/lib", root / "usr/moved")
        os.unlink(root / "usr/moved/deep/007")
        os.chmod(root / "usr/moved/deep/008", 0o600)
        with open(root / "usr/bin/same", "a") as file:
            file.write("written\n")
        assert (root / "usr/moved/same").read_text() == "one inode\nwritten\n"
        seen = manifest(root)
        container.umount()
        clean(container)
        container.mount()
        assert differences(seen, manifest(root)) == []
        assert rig.store.template("small").verify() == []
