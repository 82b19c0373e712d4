"""Template sources that are meant well: what a directory or an archive holds arrives below the target, exactly.

Trees are real, archives are made by GNU tar, and both sides are compared attribute by attribute.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import pathlib
import resource
import socket
import stat
import struct
import subprocess
import tarfile
import time
from collections.abc import Iterator

import pytest

from vzfs import linux as calls
from vzfs.errors import FullError, SourceError, UnsupportedError, UsageError
from vzfs.store.acl import is_minimal
from vzfs.store.sources import SourceOptions, acl, populate

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # VFS_CAP_REVISION_2, effective, cap_net_raw
NANO = 1_600_000_000_123_456_789
EXAMPLE_TEXT = b"user::rw-,user:1234:rwx,group::r--,group:77:r-x,mask::rwx,other::r--"
EXAMPLE_ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in (
        (0x01, 6, 0xFFFFFFFF),
        (0x02, 7, 1234),
        (0x04, 4, 0xFFFFFFFF),
        (0x08, 5, 77),
        (0x10, 7, 0xFFFFFFFF),
        (0x20, 4, 0xFFFFFFFF),
    )
)


# ---------------------------------------------------------------------------------------------------- comparing trees


def snapshot(root: str | os.PathLike[str], *, content: bool = True) -> dict[bytes, dict[str, object]]:
    """Everything there is to know of every entry below ``root``, by relative path; hard links by their first path."""
    top = os.fsencode(root)
    first: dict[tuple[int, int], bytes] = {}
    found: dict[bytes, dict[str, object]] = {}
    left = [b"."]
    while left:
        path = left.pop()
        full = os.path.join(top, path)
        info = os.lstat(full)
        facts: dict[str, object] = {
            "mode": oct(info.st_mode),
            "owner": (info.st_uid, info.st_gid),
            "mtime": info.st_mtime_ns,
            "atime": info.st_atime_ns,
            "rdev": info.st_rdev,
            "xattrs": {
                n: os.getxattr(full, n, follow_symlinks=False) for n in os.listxattr(full, follow_symlinks=False)
            },
        }
        if stat.S_ISDIR(info.st_mode):
            fd = os.open(full, os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME)
            left += [os.path.join(path, os.fsencode(name)) for name in sorted(os.listdir(fd), reverse=True)]
            os.close(fd)
        else:
            facts["links"] = info.st_nlink
            first.setdefault((info.st_dev, info.st_ino), path)
        if stat.S_ISLNK(info.st_mode):
            facts["text"] = os.readlink(full)
        if stat.S_ISREG(info.st_mode):
            facts["size"] = info.st_size
            if (content and info.st_nlink == 1) or first[info.st_dev, info.st_ino] == path:
                facts["content"] = digest(full)
        found[path] = facts | {"inode": (info.st_dev, info.st_ino)}
    for facts in found.values():
        facts["first"] = first.get(facts.pop("inode"))  # type: ignore[arg-type]
    return found


def digest(path: bytes) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
    try:
        total = hashlib.blake2b()
        for offset, length in calls.data_segments(fd, os.fstat(fd).st_size):
            data = os.pread(fd, length, offset)
            for at in range(0, length, 4096):
                if any(block := data[at : at + 4096]):
                    total.update(b"%d:" % (offset + at) + block)
        return total.hexdigest()
    finally:
        os.close(fd)


def assert_same(
    got: dict[bytes, dict[str, object]], want: dict[bytes, dict[str, object]], *, without: tuple[str, ...] = ()
) -> None:
    assert sorted(got) == sorted(want)
    for path, facts in want.items():
        for fact, value in facts.items():
            if fact not in without:
                assert (path, fact, got[path].get(fact)) == (path, fact, value)


# ------------------------------------------------------------------------------------------------------ a tree to keep


def sparse(path: pathlib.Path, size: int, *stretches: tuple[int, bytes]) -> None:
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, data in stretches:
            file.seek(offset)
            file.write(data)


def make_tree(root: pathlib.Path) -> None:
    """One of everything that a Linux root can hold."""
    for name in ("bin", "dev", "deep/er/still", "acl", "names", "open", "group", "holes"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "empty").touch()
    (root / "bin/su").write_bytes(b"\x7fELF" + bytes(range(256)) * 50)
    os.chown(root / "bin/su", 0, 42)
    os.chmod(root / "bin/su", 0o6755)
    (root / "bin/ping").write_bytes(b"ping")
    os.setxattr(root / "bin/ping", "security.capability", CAPABILITY)
    os.link(root / "bin/ping", root / "deep/er/pong")
    os.link(root / "bin/ping", root / "bin/also ping")
    (root / "owned").write_bytes(b"x" * 100_000)
    os.chown(root / "owned", 3_000_000_000, 4_294_967_294)
    os.chmod(root / "owned", 0)
    os.setxattr(root / "owned", "user.binary", bytes(range(256)))
    os.setxattr(root / "owned", "user.empty", b"")
    os.setxattr(root / "owned", b"user.a=b%3Dc%25\xff\xc3\xa4", b"k=v\n12 x=y\n\xff\xfe")
    os.setxattr(root / "owned", "trusted.note", b"\0")
    os.setxattr(root / "owned", "security.custom", b"label\0")
    os.setxattr(root / "owned", "trusted.vzfs.origin", b"must not enter")
    os.setxattr(root / "owned", "trusted.overlay.opaque", b"y")
    os.symlink("bin/su", root / "relative")
    os.symlink(b"/" + b"l\xff\n" * 900, root / "long link")
    os.link(root / "relative", root / "deep/relative too", follow_symlinks=False)
    os.lchown(root / "relative", 7, 8)
    os.setxattr(root / "relative", "trusted.on.link", b"yes", follow_symlinks=False)
    os.symlink("//vz/template/other/etc/passwd", root / "forged")
    os.mknod(root / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chmod(root / "dev/null", 0o666)
    os.mknod(root / "dev/disk", stat.S_IFBLK | 0o660, os.makedev(4095, 1_048_575))
    os.setxattr(root / "dev/disk", "trusted.node", b"\1\2")
    os.mkfifo(root / "dev/fifo", 0o640)
    os.setxattr(root / "acl", "system.posix_acl_default", EXAMPLE_ACL)
    (root / "acl/plain").write_bytes(b"")
    os.removexattr(root / "acl/plain", "system.posix_acl_access")
    (root / "acl/file").write_bytes(b"")
    os.setxattr(root / "acl/file", "system.posix_acl_access", EXAMPLE_ACL)
    for name in (b"n" * 255, b"\xff\xfe", b"new\nline", b"-dash", b" space ", b"\xc3\xa4", b"..."):
        pathlib.Path(os.fsdecode(os.fsencode(root) + b"/names/" + name)).write_bytes(name)
    os.chmod(root / "open", 0o1777)
    os.chown(root / "group", 0, 50)
    os.chmod(root / "group", 0o2550)
    (root / "group/inside").mkdir(mode=0o700)
    os.chmod(root / "group/inside", 0o700)
    (root / "deep/er/still" / ("d" * 120) / ("e" * 120)).mkdir(parents=True)
    sparse(root / "holes/middle", 4 << 20, (0, b"a" * 5000), (2 << 20, b"b" * 4096), ((4 << 20) - 10, b"c" * 10))
    sparse(root / "holes/only", 3 << 30)
    sparse(root / "holes/tail", (1 << 20) + 777, (4096, b"d" * 4096))
    sparse(root / "holes/many", 2 << 20, *((n * 16384, b"%d" % n) for n in range(0, 128, 2)))
    future = time.time_ns() + 10**15  # reading a link's text would else set its access time, even in these tests
    for number, path in enumerate(sorted(snapshot(root, content=False))):
        name = os.fsencode(root) + b"/" + path
        atime = future if os.path.islink(name) else NANO
        os.utime(name, ns=(atime + number, NANO - number * 1_000_000_001), follow_symlinks=False)
    os.utime(root / "bin/su", ns=(1, -1_500_000_001))  # before 1970
    os.utime(root / "bin", ns=(4_102_444_800_000_000_001, 4_102_444_800_999_999_999))  # 2100
    os.setxattr(root, "user.root", b"yes")
    os.chown(root, 5, 6)
    os.chmod(root, 0o751)
    os.utime(root, ns=(NANO + 7, NANO + 9))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("source") / "tree"
    root.mkdir()
    make_tree(root)
    return root


def expected(tree: pathlib.Path) -> dict[bytes, dict[str, object]]:
    want = snapshot(tree)
    for name in ("trusted.vzfs.origin", "trusted.overlay.opaque"):
        del want[b"./owned"]["xattrs"][name]  # type: ignore[attr-defined]
    return want


@pytest.fixture
def target(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "store" / "target"
    path.mkdir(parents=True)
    path.chmod(0o700)
    return path


def tar(*arguments: str | pathlib.Path) -> None:
    subprocess.run(["tar", *map(str, arguments)], check=True, capture_output=True)


PAX = ("--format=pax", "--xattrs", "--acls", "--sparse", "--atime-preserve=system")


@pytest.fixture(scope="module")
def archive(tree: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("archive") / "tree.bin"
    tar("-cf", path, *PAX, "-C", tree, ".")
    return path


# ----------------------------------------------------------------------------------------------------------- directory


def test_directory_arrives_exactly(tree: pathlib.Path, target: pathlib.Path) -> None:
    want = expected(tree)
    populate(str(tree), target)
    assert_same(snapshot(target), want)


def test_hard_links_between_special_files(tmp_path: pathlib.Path, target: pathlib.Path) -> None:
    """GNU tar doesn't see these, so the shared tree has none."""
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    os.mknod(source / "node", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mkfifo(source / "a/fifo")
    os.link(source / "node", source / "a/node")
    os.link(source / "a/fifo", source / "fifo")
    want = snapshot(source)
    populate(str(source), target)
    assert_same(snapshot(target), want)


def test_reading_a_directory_leaves_no_access_times(tree: pathlib.Path, target: pathlib.Path) -> None:
    for path in ("bin/su", "bin", "deep/er"):
        os.utime(tree / path, ns=(1, os.lstat(tree / path).st_mtime_ns))  # older than mtime: relatime would update it
    before = {path: os.lstat(tree / path).st_atime_ns for path in ("bin/su", "bin", "deep/er")}
    populate(str(tree), target)
    assert {path: os.lstat(tree / path).st_atime_ns for path in before} == before


def test_holes_of_a_directorys_files_stay_holes(tree: pathlib.Path, target: pathlib.Path) -> None:
    populate(str(tree), target)
    for name in ("middle", "only", "tail", "many"):
        assert segments(target / "holes" / name) == segments(tree / "holes" / name)


def segments(path: pathlib.Path) -> list[tuple[int, int]]:
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
    try:
        return list(calls.data_segments(fd, os.fstat(fd).st_size))
    finally:
        os.close(fd)


def test_target_as_descriptor(tree: pathlib.Path, target: pathlib.Path) -> None:
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        populate(str(tree / "bin"), fd)
    finally:
        os.close(fd)
    assert sorted(os.listdir(target)) == ["also ping", "ping", "su"]


def test_acls_of_the_stores_directory_are_not_inherited(tree: pathlib.Path, target: pathlib.Path) -> None:
    os.setxattr(target, "system.posix_acl_default", EXAMPLE_ACL)
    populate(str(tree), target)
    assert_same(snapshot(target), expected(tree))


def test_sockets_are_left_out_with_a_warning(
    tmp_path: pathlib.Path, target: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with socket.socket(socket.AF_UNIX) as listening, caplog.at_level(logging.WARNING):
        listening.bind(str(source / "sock"))
        (source / "file").touch()
        populate(str(source), target)
    assert os.listdir(target) == ["file"]
    assert "'sock' is a socket" in caplog.text


def test_device_in_a_directory_refused_where_forbidden(tree: pathlib.Path, target: pathlib.Path) -> None:
    with pytest.raises(SourceError, match=r"'dev/(null|disk)': a device"):
        populate(str(tree), target, SourceOptions(allow_devices=False))


@contextlib.contextmanager
def mounted(*arguments: str | pathlib.Path) -> Iterator[None]:
    subprocess.run(["mount", *map(str, arguments)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(arguments[-1])], check=True)


@pytest.mark.parametrize("how", ["tmpfs", "bind"])
def test_mount_points_are_copied_empty(tmp_path: pathlib.Path, target: pathlib.Path, how: str) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    (source / "a/point").mkdir(parents=True)
    (source / "a/point/hidden").touch()
    other.mkdir()
    arguments = ("--bind", other) if how == "bind" else ("-t", "tmpfs", "none")
    with mounted(*arguments, source / "a/point"):
        (source / "a/point/elsewhere").touch()
        os.chmod(source / "a/point", 0o1711)
        populate(str(source), target)
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*")) == ["a", "a/point"]
    assert stat.S_IMODE(os.lstat(target / "a/point").st_mode) == 0o1711


@pytest.mark.parametrize("place", [".", "..", "../.."])
def test_source_that_contains_the_store_refused(target: pathlib.Path, place: str) -> None:
    with pytest.raises(UsageError, match="contains the store"):
        populate(str(target / place), target)
    assert os.listdir(target) == []


def test_source_inside_the_target_refused(target: pathlib.Path) -> None:
    (target / "inside").mkdir()
    with pytest.raises(UsageError, match="the template's own"):
        populate(str(target / "inside"), target)


def test_source_that_contains_the_store_through_a_bind_mount_refused(
    tmp_path: pathlib.Path, target: pathlib.Path
) -> None:
    view = tmp_path / "view"
    view.mkdir()
    with mounted("--bind", target.parent, view), pytest.raises(UsageError, match="contains the store"):
        populate(str(view), target)


@pytest.mark.parametrize("change", ["grows", "shrinks", "is rewritten"])
def test_file_that_changes_meanwhile_refused(
    tmp_path: pathlib.Path, target: pathlib.Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    victim = source / "sub/log"
    victim.write_bytes(b"x" * 200_000)
    real = calls.copy_data

    def meanwhile(src_fd: int, dst_fd: int, size: int) -> bool:
        with open(victim, "r+b") as file:
            if change == "shrinks":
                file.truncate(10)
            else:
                file.seek(0, os.SEEK_END if change == "grows" else os.SEEK_SET)
                file.write(b"more")
        os.utime(victim)
        return real(src_fd, dst_fd, size)

    monkeypatch.setattr(calls, "copy_data", meanwhile)
    with pytest.raises(SourceError, match=r"'sub/log': it changed while it was copied"):
        populate(str(source), target)


def test_deep_tree_needs_few_descriptors(tmp_path: pathlib.Path, target: pathlib.Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    subprocess.run(["mkdir", "-p", source / "/".join(["d"] * 1500)], check=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        populate(str(source), target)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.path.isdir(target / "/".join(["d"] * 1500))
    remove(source, target)


def remove(*trees: pathlib.Path) -> None:
    """Remove trees that are too deep for pytest to clean up."""
    for tree in trees:
        parent = os.open(tree.parent, os.O_RDONLY)
        calls.remove_tree(parent, os.fsencode(tree.name))
        os.close(parent)


def test_path_too_long_for_a_system_call_refused(tmp_path: pathlib.Path, target: pathlib.Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    fd = os.open(source, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("n" * 250, dir_fd=fd)
        fd, old = os.open("n" * 250, os.O_RDONLY, dir_fd=fd), fd
        os.close(old)
    os.close(fd)
    with pytest.raises(SourceError, match="too long"):
        populate(str(source), target)
    remove(source, target)


@pytest.mark.parametrize("source", ["/nonexistent", "", "nul\0byte"])
def test_missing_source(target: pathlib.Path, source: str) -> None:
    with pytest.raises(SourceError):
        populate(source, target)


def test_root_is_needed(tree: pathlib.Path, target: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UnsupportedError, match="needs root"):
        populate(str(tree), target)


def test_debootstraps_options_refused_elsewhere(tree: pathlib.Path, target: pathlib.Path) -> None:
    with pytest.raises(UsageError, match="debootstrap:SUITE only"):
        populate(str(tree), target, SourceOptions(mirror="http://deb.debian.org/debian"))


def test_progress_counts(tree: pathlib.Path, archive: pathlib.Path, target: pathlib.Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    populate(str(tree), target, SourceOptions(), lambda *what: seen.append(what))
    entries = len(snapshot(tree, content=False)) - 1
    assert seen[-1] == ("copying", entries, entries)
    other = target.parent / "other"
    other.mkdir()
    populate(str(archive), other, SourceOptions(), lambda *what: seen.append(what))
    assert seen[-1] == ("unpacking", archive.stat().st_size, archive.stat().st_size)


# ------------------------------------------------------------------------------------------------------------ archives


def test_pax_archive_arrives_exactly(tree: pathlib.Path, archive: pathlib.Path, target: pathlib.Path) -> None:
    want = expected(tree)
    populate(str(archive), target)
    assert_same(snapshot(target), want)
    for name in ("middle", "only", "tail", "many"):
        assert segments(target / "holes" / name) == segments(tree / "holes" / name)


COMPRESSORS = {"gzip": "gzip -1", "xz": "xz -0", "zstd": "zstd -1", "bzip2": "bzip2 -1", "plain": "cat"}


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_compression_is_told_by_content(
    tree: pathlib.Path, archive: pathlib.Path, target: pathlib.Path, compressor: str
) -> None:
    packed = target.parent / "archive.txt"
    with open(archive, "rb") as source, open(packed, "wb") as result:
        subprocess.run(COMPRESSORS[compressor].split(), stdin=source, stdout=result, check=True)
    want = expected(tree)
    populate(str(packed), target)
    assert_same(snapshot(target), want)


@pytest.mark.parametrize("compressor", ["gzip", "xz", "zstd", "bzip2"])
def test_streams_laid_end_to_end(archive: pathlib.Path, target: pathlib.Path, compressor: str) -> None:
    data = archive.read_bytes()
    command = COMPRESSORS[compressor].split()
    cut = len(data) // 3
    packed = target.parent / "packed"
    packed.write_bytes(
        b"".join(
            subprocess.run(command, input=part, capture_output=True, check=True).stdout
            for part in (data[:cut], data[cut:])
        )
    )
    populate(str(packed), target)
    assert (target / "bin/su").stat().st_size == 12804


@pytest.mark.parametrize("compressor", ["plain", "zstd"])
def test_standard_input_is_a_stream(
    tree: pathlib.Path, archive: pathlib.Path, target: pathlib.Path, compressor: str
) -> None:
    want = expected(tree)
    with (
        open(archive, "rb") as file,
        subprocess.Popen(COMPRESSORS[compressor].split(), stdin=file, stdout=subprocess.PIPE) as feed,
    ):
        assert feed.stdout is not None
        saved = os.dup(0)
        try:
            os.dup2(feed.stdout.fileno(), 0)
            populate("-", target)
        finally:
            os.dup2(saved, 0)
            os.close(saved)
    assert feed.returncode == 0  # the whole stream was read: no SIGPIPE for the writer
    assert_same(snapshot(target), want)


@pytest.mark.parametrize(
    "how",
    [
        ("--format=gnu",),
        ("--format=oldgnu",),
        ("--format=pax", "--sparse-version=0.0"),
        ("--format=pax", "--sparse-version=0.1"),
    ],
    ids=" ".join,
)
def test_every_sparse_format(tree: pathlib.Path, target: pathlib.Path, how: tuple[str, ...]) -> None:
    path = target.parent / "a.tar"
    tar("-cf", path, *how, "--sparse", "-C", tree, "holes")
    populate(str(path), target)
    for name in ("middle", "only", "tail", "many"):
        assert segments(target / "holes" / name) == segments(tree / "holes" / name)
        assert digest(os.fsencode(target / "holes" / name)) == digest(os.fsencode(tree / "holes" / name))
        assert (target / "holes" / name).stat().st_size == (tree / "holes" / name).stat().st_size


@pytest.mark.parametrize("form", ["gnu", "oldgnu"])
def test_gnu_archive_keeps_what_it_can_hold(tree: pathlib.Path, target: pathlib.Path, form: str) -> None:
    want = expected(tree)
    path = target.parent / "a.tar"
    tar("-cf", path, f"--format={form}", "--sparse", "-C", tree, ".")
    populate(str(path), target)
    for facts in want.values():
        facts["mtime"] = facts["mtime"] // 1_000_000_000 * 1_000_000_000  # type: ignore[operator]
    assert_same(snapshot(target), want, without=("atime", "xattrs"))


@pytest.mark.parametrize("form", ["ustar", "v7"])
def test_plain_old_formats(tmp_path: pathlib.Path, target: pathlib.Path, form: str) -> None:
    source = tmp_path / "source"
    (source / "etc").mkdir(parents=True)
    (source / "etc/passwd").write_bytes(b"root\n")
    os.link(source / "etc/passwd", source / "etc/passwd-")
    os.symlink("etc", source / "link")
    if form == "ustar":
        (source / ("p" * 90) / ("q" * 90)).mkdir(parents=True)
    for path in source.rglob("*"):
        os.utime(path, (NANO // 10**9, NANO // 10**9), follow_symlinks=False)
    os.utime(source, (NANO // 10**9, NANO // 10**9))
    tar("-cf", tmp_path / "a", f"--format={form}", "-C", source, ".")
    populate(str(tmp_path / "a"), target)
    assert_same(snapshot(target), snapshot(source), without=("atime",))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_archive_by_another_writer(tmp_path: pathlib.Path, target: pathlib.Path, form: int) -> None:
    source = tmp_path / "source"
    (source / "usr/bin").mkdir(parents=True)
    (source / "usr/bin/tool").write_bytes(b"t" * 10_000)
    os.link(source / "usr/bin/tool", source / "usr/bin/other")
    os.symlink("usr/bin", source / "bin")
    with tarfile.open(tmp_path / "a", "w", format=form) as made:
        made.add(source, ".")
    populate(str(tmp_path / "a"), target)
    assert_same(snapshot(target), snapshot(source), without=("atime", "mtime"))


def test_root_without_a_member_can_be_entered_by_all(tree: pathlib.Path, target: pathlib.Path) -> None:
    path = target.parent / "a.tar"
    tar("-cf", path, "-C", tree, "bin/su")
    populate(str(path), target)
    assert stat.S_IMODE(os.stat(target).st_mode) == 0o755
    assert stat.S_IMODE(os.stat(target / "bin").st_mode) == 0o755  # implied by its file


def test_selinux_label_is_kept_in_the_kernels_form(tmp_path: pathlib.Path, target: pathlib.Path) -> None:
    member = tarfile.TarInfo("f")
    member.pax_headers = {"RHT.security.selinux": "system_u:object_r:bin_t:s0"}
    with tarfile.open(tmp_path / "a", "w", format=tarfile.PAX_FORMAT) as made:
        made.addfile(member)
    populate(str(tmp_path / "a"), target)
    assert os.getxattr(target / "f", "security.selinux") == b"system_u:object_r:bin_t:s0\0"


def test_global_pax_headers_count_until_overruled(tmp_path: pathlib.Path, target: pathlib.Path) -> None:
    with tarfile.open(
        tmp_path / "a",
        "w",
        format=tarfile.PAX_FORMAT,
        pax_headers={"mtime": "1.000000001", "uid": "17", "SCHILY.xattr.user.g": "global", "comment": "x"},
    ) as made:
        made.addfile(tarfile.TarInfo("a"))
        own = tarfile.TarInfo("b")
        own.pax_headers = {"mtime": "-2.9999999991", "SCHILY.xattr.user.g": "own", "uid": ""}
        own.uid = 9
        made.addfile(own)
    populate(str(tmp_path / "a"), target)
    a, b = os.lstat(target / "a"), os.lstat(target / "b")
    assert (a.st_mtime_ns, a.st_uid, os.getxattr(target / "a", "user.g")) == (1_000_000_001, 17, b"global")
    assert (b.st_mtime_ns, b.st_uid, os.getxattr(target / "b", "user.g")) == (-3_000_000_000, 9, b"own")


def test_names_in_acl_text_mean_the_archives_owners(tmp_path: pathlib.Path, target: pathlib.Path) -> None:
    owner = tarfile.TarInfo("a")
    owner.uid, owner.uname, owner.gid, owner.gname = 4242, "lisa", 4343, "artists"
    member = tarfile.TarInfo("b")
    member.mode = 0o664
    member.pax_headers = {
        "SCHILY.acl.access": "user::rw-\nuser:lisa:rwx\t#effective:rw-\n"
        "group::r--\ngroup:artists:r-x\nmask::rw-\nother::r--",
    }
    star = tarfile.TarInfo("c")
    star.mode = 0o664
    star.pax_headers = {"SCHILY.acl.access": "user::rw-,user:nobody-here:r--:999,group::r--,mask::rw-,other::r--"}
    unknown = tarfile.TarInfo("d")
    unknown.pax_headers = {"SCHILY.acl.access": "user::rw-,user:nobody-here:r--,group::r--,mask::rw-,other::r--"}
    with tarfile.open(tmp_path / "a", "w", format=tarfile.PAX_FORMAT) as made:
        for each in (owner, member, star, unknown):
            made.addfile(each)
    with pytest.raises(SourceError, match=r"'d': ACL entry for b'nobody-here'") as raised:
        populate(str(tmp_path / "a"), target)
    assert "--numeric-owner" in raised.value.remedy
    command = ["getfacl", "-nc", "--absolute-names", target / "b", target / "c"]
    shown = subprocess.run(command, capture_output=True, check=True)
    assert b"user:4242:rwx\t#effective:rw-\ngroup::r--\ngroup:4343:r-x" in shown.stdout
    assert b"user:999:r--" in shown.stdout


def test_data_after_the_end_is_ignored_aloud(
    archive: pathlib.Path, target: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = target.parent / "a"
    path.write_bytes(archive.read_bytes() + b"left over\0")
    populate(str(path), target)
    assert "9 bytes after the end" in caplog.text


def test_later_members_replace_earlier_ones(tmp_path: pathlib.Path, target: pathlib.Path) -> None:
    """What appending to an archive (``tar -r``) leaves: the last one counts, attributes of directories included."""
    source = tmp_path / "source"
    (source / "dir").mkdir(parents=True)
    (source / "dir/file").write_bytes(b"old")
    path = tmp_path / "a"
    tar("-cf", path, "--format=pax", "-C", source, ".")
    (source / "dir/file").write_bytes(b"new content")
    os.chmod(source / "dir", 0o750)
    os.chown(source / "dir", 3, 4)
    tar("-rf", path, "--format=pax", "-C", source, ".")
    want = snapshot(source)
    populate(str(path), target)
    assert_same(snapshot(target), want, without=("atime",))


# ----------------------------------------------------------------------------------------------------------- full disks


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """An ext4 file system of 8 MiB."""
    base = tmp_path_factory.mktemp("small")
    image, point = base / "image", base / "point"
    point.mkdir()
    sparse(image, 8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True)
    with mounted("-o", "loop", image, point):
        yield point


def remade(small: pathlib.Path) -> pathlib.Path:
    fd = os.open(small, os.O_RDONLY)
    calls.remove_tree(fd, b"target")
    os.close(fd)
    (small / "target").mkdir(mode=0o700)
    return small / "target"


@pytest.mark.parametrize("kind", ["directory", "archive", "bomb", "inodes"])
def test_full_disk(tmp_path: pathlib.Path, small: pathlib.Path, kind: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if kind == "inodes":
        for number in range(3000):
            (source / str(number)).touch()
    else:
        (source / "big").write_bytes(b"\0" * (32 << 20) if kind == "bomb" else os.urandom(16 << 20))
    if kind != "directory":
        tar("-czf" if kind == "bomb" else "-cf", tmp_path / "a", "-C", source, ".")
        source = tmp_path / "a"
    with pytest.raises(FullError, match=r"'(\./)?(big|\d+)'"):
        populate(str(source), remade(small))


def test_attribute_too_large_for_the_file_system_is_no_full_disk(tmp_path: pathlib.Path, small: pathlib.Path) -> None:
    member = tarfile.TarInfo("f")
    member.pax_headers = {"SCHILY.xattr.user.large": "x" * 30_000}
    with tarfile.open(tmp_path / "a", "w", format=tarfile.PAX_FORMAT) as made:
        made.addfile(member)
    with pytest.raises(
        SourceError, match=r"'f': extended attribute 'user.large' of 30000 bytes does not fit"
    ) as raised:
        populate(str(tmp_path / "a"), remade(small))
    assert "ea_inode" in raised.value.remedy


def test_reading_error_names_the_entry(
    tmp_path: pathlib.Path, target: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "bad\nsector").write_bytes(b"x")

    def fails(src_fd: int, dst_fd: int, size: int) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(calls, "copy_data", fails)
    with pytest.raises(SourceError, match=r"'bad\\nsector': Input/output error"):
        populate(str(source), target)


# ------------------------------------------------------------------------------------------------------------ ACL text


def nobody(name: bytes) -> None:
    return None


@pytest.mark.parametrize(
    "text",
    [
        EXAMPLE_TEXT,
        EXAMPLE_TEXT.replace(b",", b"\n") + b"\n",
        b"o::r--,m::rwx,g:77:r-x,u:1234:rwx,g::r--,u::rw-",
        b"user::rw-,user:lisa:rwx:1234,group::r--,group:x:r-x:77,mask:rwx,other:r--",
    ],
)
def test_acl_text(text: bytes) -> None:
    assert acl.parse(text, nobody, nobody) == EXAMPLE_ACL


def test_acl_text_that_says_nothing() -> None:
    assert acl.parse(b"\n \n", nobody, nobody) == b""
    assert is_minimal(acl.parse(b"u::rw-,g::r--,o::r--", nobody, nobody))
    assert not is_minimal(EXAMPLE_ACL)


@pytest.mark.parametrize(
    "text", [b"user", b"user:x", b"u:::", b"who::r--", b"mask:5:r--", b"u::rwz", b"u:5:r:6:7", b"u:lisa:r"]
)
def test_malformed_acl_text(text: bytes) -> None:
    if text == b"u:::":
        assert acl.parse(text, nobody, nobody) == struct.pack("<IHHI", 2, 1, 0, 0xFFFFFFFF)
        return
    with pytest.raises(ValueError):
        acl.parse(text, nobody, nobody)
