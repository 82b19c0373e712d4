"""What ``diff`` tells of a container: single changes by name, and random ones against what is really there."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.conftest import SMALL, make_source
from tests.random_changes import Step, make_changes, remove_tree, steps, write
from tests.stateful_model import PosixFs, Row, TreeFs, snapshot
from vzfs import Container, DamagedError, NotFoundError, Store
from vzfs.linux import RENAME_EXCHANGE
from vzfs.store.diff import TYPES, WHAT, Change, diff_container
from vzfs.store.textdiff import CONTENT_MAX, unified_diff


@pytest.fixture
def container(small_store: Store) -> Container:
    return small_store.create(101, template=SMALL)


@pytest.fixture
def fs(container: Container) -> Iterator[TreeFs]:
    fs = TreeFs(container.store.layout, container.path)
    before = os.umask(0)
    try:
        yield fs
    finally:
        os.umask(before)
        fs.shut()


def told(container: Container) -> list[tuple[str, str, tuple[str, ...]]]:
    """Kind, path (old path first, if there is one) and what, without directories that only have other times."""
    return [
        (change.kind, f"{change.old_path} {change.path}" if change.old_path else change.path, change.what)
        for change in container.diff()
        if (change.kind, change.type, change.what) != ("changed", "dir", ("times",))
    ]


# --------------------------------------------------------------------------------------------------- single changes


def test_a_new_container_has_no_differences(container: Container) -> None:
    assert list(container.diff()) == []


def test_unfolding_and_reading_are_no_differences(container: Container, fs: TreeFs) -> None:
    fs.mkdir(b"lib/deep/er/est/new", 0o755)
    fs.rmdir(b"lib/deep/er/est/new")
    snapshot(fs)
    assert [(change.kind, change.path, change.what) for change in container.diff()] == [
        ("changed", "/lib/deep/er/est", ("times",))
    ]


def test_content(container: Container, fs: TreeFs) -> None:
    write(fs, b"etc/passwd", b"ROOT")
    write(fs, b"lib/large", b"x")
    fs.truncate(b"etc/shadow", 0)
    assert told(container) == [
        ("changed", "/etc/passwd", ("content", "times")),
        ("changed", "/etc/shadow", ("content", "times")),
        ("changed", "/lib/large", ("content", "times")),
    ]


def test_a_file_opened_for_writing_and_not_written_is_no_difference(container: Container, fs: TreeFs) -> None:
    fs.close(fs.open(b"etc/passwd", os.O_RDWR))
    assert stat.S_ISREG((container.path / "private/etc/passwd").lstat().st_mode)
    assert list(container.diff()) == []


def test_attributes_without_data(container: Container, fs: TreeFs) -> None:
    fs.chmod(b"bin/su", 0o755)
    fs.chown(b"etc/passwd", 5, 6)
    fs.utime(b"etc/empty", 1, 2)
    fs.setxattr(b"etc/shadow", b"user.a", b"b")
    fs.removexattr(b"etc/passwd", b"user.note")
    assert (container.path / "private/bin/su").is_symlink()
    assert told(container) == [
        ("changed", "/bin/su", ("mode",)),
        ("changed", "/etc/empty", ("times",)),
        ("changed", "/etc/passwd", ("owner", "xattrs")),
        ("changed", "/etc/shadow", ("xattrs",)),
    ]


def test_attributes_of_directories_links_and_devices(container: Container, fs: TreeFs) -> None:
    fs.chmod(b"tmp", 0o777)
    fs.chown(b"", 3, 4)
    fs.chown(b"etc/dangling", 1, 1)
    fs.chmod(b"dev/null", 0o600)
    assert told(container) == [
        ("changed", "/", ("owner",)),
        ("changed", "/dev/null", ("mode",)),
        ("changed", "/etc/dangling", ("owner",)),
        ("changed", "/tmp", ("mode",)),
    ]


def test_the_old_value_again_is_no_difference(container: Container, fs: TreeFs) -> None:
    mode = fs.lstat(b"bin/su").mode
    fs.chmod(b"bin/su", 0o700)
    fs.chmod(b"bin/su", stat.S_IMODE(mode))
    assert told(container) == []


def test_access_times_are_no_difference(container: Container, fs: TreeFs) -> None:
    fs.utime(b"bin/su", 5, fs.lstat(b"bin/su").mtime_ns)
    assert told(container) == []


def test_new_things_of_every_type(container: Container, fs: TreeFs) -> None:
    fs.mkdir(b"srv", 0o755)
    write(fs, b"srv/file", b"1")
    fs.symlink(b"//vz/template/small/etc/passwd", b"srv/link")
    fs.mknod(b"srv/fifo", stat.S_IFIFO | 0o600)
    fs.mknod(b"srv/char", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    fs.mknod(b"srv/block", stat.S_IFBLK | 0o600, os.makedev(7, 1))
    fs.mknod(b"srv/socket", stat.S_IFSOCK | 0o600)
    added = [(change.path, change.type) for change in container.diff() if change.kind == "added"]
    types = ("block", "char", "fifo", "file", "link", "socket")
    assert added == [("/srv", "dir"), *((f"/srv/{name}", "symlink" if name == "link" else name) for name in types)]


def test_removed_directories_name_all_they_held(container: Container, fs: TreeFs) -> None:
    remove_tree(fs, b"usr/share/doc")
    remove_tree(fs, b"var/nest")
    assert told(container) == [
        ("removed", "/usr/share/doc", ()),
        ("removed", "/usr/share/doc/one", ()),
        ("removed", "/usr/share/doc/one/changelog", ()),
        ("removed", "/usr/share/doc/one/copyright", ()),
        ("removed", "/usr/share/doc/two", ()),
        ("removed", "/usr/share/doc/two/changelog", ()),
        ("removed", "/usr/share/doc/two/copyright", ()),
        ("removed", "/var/nest", ()),
        ("removed", "/var/nest/ed", ()),
        ("removed", "/var/nest/ed/empty", ()),
    ]
    assert {change.type for change in container.diff() if change.path.endswith("copyright")} == {"file"}


def test_renamed_file_with_its_change(container: Container, fs: TreeFs) -> None:
    fs.rename(b"etc/passwd", b"passwd")
    fs.rename(b"etc/shadow", b"bin/shadow")
    write(fs, b"bin/shadow", b"x")
    assert told(container) == [
        ("renamed", "/etc/shadow /bin/shadow", ("content", "times")),
        ("renamed", "/etc/passwd /passwd", ()),
    ]


def test_renamed_folded_directory_is_one_line(container: Container, fs: TreeFs) -> None:
    fs.rename(b"usr", b"var/us")
    assert told(container) == [("renamed", "/usr /var/us", ())]


def test_what_is_in_a_renamed_directory_is_compared_relative_to_it(container: Container, fs: TreeFs) -> None:
    fs.rename(b"etc", b"ETC")
    write(fs, b"ETC/passwd", b"x")
    fs.unlink(b"ETC/conf.d/a.conf")
    fs.mkdir(b"ETC/new", 0o755)
    assert told(container) == [
        ("renamed", "/etc /ETC", ("times",)),
        ("removed", "/ETC/conf.d/a.conf", ()),
        ("added", "/ETC/new", ()),
        ("changed", "/ETC/passwd", ("content", "times")),
    ]


def test_what_was_moved_out_of_a_removed_directory_is_renamed(container: Container, fs: TreeFs) -> None:
    fs.rename(b"lib/deep", b"deep")
    fs.rename(b"lib/large", b"large")
    remove_tree(fs, b"lib")
    assert told(container) == [
        ("renamed", "/lib/deep /deep", ()),
        ("renamed", "/lib/large /large", ()),
        ("removed", "/lib", ()),
    ]


def test_exchanged_and_replaced(container: Container, fs: TreeFs) -> None:
    fs.rename(b"bin", b"lib", RENAME_EXCHANGE)
    fs.rename(b"etc/passwd", b"etc/shadow")
    assert told(container) == [
        ("renamed", "/lib /bin", ()),
        ("removed", "/etc/shadow", ()),
        ("renamed", "/etc/passwd /etc/shadow", ()),
        ("renamed", "/bin /lib", ()),
    ]


def test_a_file_made_anew_is_changed(container: Container, fs: TreeFs) -> None:
    fd = fs.open(b"etc/new", os.O_WRONLY | os.O_CREAT, 0o644)
    fs.pwrite(fd, b"other", 0)
    fs.close(fd)
    fs.rename(b"etc/new", b"etc/passwd")
    assert told(container) == [("changed", "/etc/passwd", ("content", "times", "xattrs"))]


def test_a_file_made_anew_the_same_is_no_difference(container: Container, fs: TreeFs) -> None:
    old = fs.lstat(b"lib/deep/er/other")
    write(fs, b"lib/deep/er/other.new", b"other\n")
    fs.rename(b"lib/deep/er/other.new", b"lib/deep/er/other")
    fs.utime(b"lib/deep/er/other", 0, old.mtime_ns)
    assert told(container) == []


def test_a_directory_made_anew_is_compared_by_names(container: Container, fs: TreeFs) -> None:
    remove_tree(fs, b"etc/conf.d")
    fs.mkdir(b"etc/conf.d", 0o755)
    write(fs, b"etc/conf.d/b.conf", b"b=2\n")
    write(fs, b"etc/conf.d/c.conf", b"")
    assert told(container) == [
        ("changed", "/etc/conf.d", ("times", "xattrs")),
        ("removed", "/etc/conf.d/a.conf", ()),
        ("changed", "/etc/conf.d/b.conf", ("times",)),
        ("added", "/etc/conf.d/c.conf", ()),
    ]


def test_another_type(container: Container, fs: TreeFs) -> None:
    remove_tree(fs, b"etc/conf.d")
    fs.symlink(b"elsewhere", b"etc/conf.d")
    fs.unlink(b"etc/passwd")
    fs.mkdir(b"etc/passwd", 0o755)
    write(fs, b"etc/passwd/in", b"")
    fs.unlink(b"etc/dangling")
    fs.symlink(b"/there", b"etc/dangling")
    fs.unlink(b"dev/null")
    fs.mknod(b"dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    assert told(container) == [
        ("changed", "/dev/null", ("times", "device")),
        ("changed", "/etc/conf.d", ("type",)),
        ("removed", "/etc/conf.d/a.conf", ()),
        ("removed", "/etc/conf.d/b.conf", ()),
        ("changed", "/etc/dangling", ("times", "xattrs", "target")),
        ("changed", "/etc/passwd", ("type",)),
        ("added", "/etc/passwd/in", ()),
    ]


def test_a_changed_link_group_is_told_at_every_name_it_has(container: Container, fs: TreeFs) -> None:
    fs.rename(b"lib", b"var/lib")  # one name moves with a folded directory, another stays in one
    fs.rename(b"bin/tool", b"bin/renamed-tool")
    fs.chmod(b"usr/share/tool-thrice", 0o700)
    assert told(container) == [
        ("renamed", "/bin/tool /bin/renamed-tool", ("mode",)),
        ("changed", "/usr/share/tool-thrice", ("mode",)),
        ("renamed", "/lib /var/lib", ()),
        ("changed", "/var/lib/deep/tool-again", ("mode",)),
    ]
    write(fs, b"var/lib/deep/tool-again", b"!")
    fs.unlink(b"usr/share/tool-thrice")
    assert told(container) == [
        ("renamed", "/bin/tool /bin/renamed-tool", ("content", "mode", "times")),
        ("removed", "/usr/share/tool-thrice", ()),
        ("renamed", "/lib /var/lib", ()),
        ("changed", "/var/lib/deep/tool-again", ("content", "mode", "times")),
    ]


def test_further_hard_links_are_added(container: Container, fs: TreeFs) -> None:
    fs.link(b"etc/passwd", b"second")
    fs.link(b"usr/share/pair-a", b"third")
    write(fs, b"etc/shadow", b"own")
    fs.link(b"etc/shadow", b"fourth")
    assert told(container) == [
        ("changed", "/etc/shadow", ("content", "times")),
        ("added", "/fourth", ("links",)),
        ("added", "/second", ("links",)),
        ("added", "/third", ("links",)),
    ]


def test_a_broken_hard_link(container: Container, fs: TreeFs) -> None:
    old = fs.lstat(b"usr/share/pair-b")
    fs.unlink(b"usr/share/pair-b")
    write(fs, b"usr/share/pair-b", b"pair\n")
    fs.chown(b"usr/share/pair-b", old.uid, old.gid)
    fs.setxattr(b"usr/share/pair-b", b"user.pair", b"shared")
    fs.utime(b"usr/share/pair-b", 0, old.mtime_ns)
    assert told(container) == [("changed", "/usr/share/pair-b", ("links",))]


def test_order_is_that_of_a_listing_by_bytes(container: Container, fs: TreeFs) -> None:
    for name in (b"a", b"a.b", b"a/b", b"\xff", b"B"):
        fs.mkdir(name, 0o755)
    added = [os.fsencode(change.path) for change in container.diff() if change.kind == "added"]
    assert added == [b"/B", b"/a", b"/a/b", b"/a.b", b"/\xff"]


def test_a_deep_tree_beyond_any_path(container: Container) -> None:
    area = os.open(container.path / "private", os.O_RDONLY)
    deep = area
    for _ in range(1500):
        os.mkdir(b"d" * 20, dir_fd=deep)
        below = os.open(b"d" * 20, os.O_RDONLY | os.O_DIRECTORY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(os.open(b"bottom", os.O_WRONLY | os.O_CREAT, dir_fd=deep))
    os.close(deep)
    changes = [change for change in container.diff() if change.kind == "added"]
    assert len(changes) == 1501
    assert changes[-1].path == "/" + "/".join(["d" * 20] * 1500) + "/bottom"
    assert container.check() == []
    container.destroy()


# ---------------------------------------------------------------------------------------------------------- content


def text_of(container: Container, path: str) -> str | None:
    return {change.path: change.content for change in container.diff(content=True)}[path]


def test_content_of_text(container: Container, fs: TreeFs) -> None:
    write(fs, b"etc/passwd", b"ROOT")
    write(fs, b"etc/hello", b"one\ntwo")
    fs.rename(b"usr/share/doc/one/copyright", b"copyright")
    write(fs, b"copyright", b"FREE")
    assert text_of(container, "/etc/passwd") == (
        "--- template/etc/passwd\n+++ container/etc/passwd\n@@ -1 +1 @@\n"
        "-root:x:0:0::/:/bin/sh\n+ROOT:x:0:0::/:/bin/sh\n"
    )
    assert text_of(container, "/etc/hello") == (
        "--- /dev/null\n+++ container/etc/hello\n@@ -0,0 +1,2 @@\n+one\n+two\n\\ No newline at end of file\n"
    )
    assert text_of(container, "/copyright") == (
        "--- template/usr/share/doc/one/copyright\n+++ container/copyright\n@@ -1 +1 @@\n-free\n+FREE\n"
    )
    assert text_of(container, "/etc") is None


def test_no_content_of_what_is_no_text(container: Container, fs: TreeFs) -> None:
    write(fs, b"etc/nul", b"a\0b")
    write(fs, b"etc/latin", b"\xe9\n")
    write(fs, b"lib/large", b"now it is a text? no, the rest isn't")
    fd = fs.open(b"etc/long", os.O_WRONLY | os.O_CREAT)
    fs.pwrite(fd, b"a\n" * (CONTENT_MAX // 2 + 1), 0)
    fs.close(fd)
    fs.symlink(b"text", b"etc/sym")
    assert {change.content for change in container.diff(content=True) if change.type != "dir"} == {None}


def test_content_of_link_groups_at_every_name(container: Container, fs: TreeFs) -> None:
    write(fs, b"usr/share/pair-a", b"PAIR")
    lines = "@@ -1 +1 @@\n-pair\n+PAIR\n"
    for name in ("pair-a", "pair-b"):
        assert text_of(container, f"/usr/share/{name}") == (
            f"--- template/usr/share/{name}\n+++ container/usr/share/{name}\n{lines}"
        )


def test_unified_diff_is_what_patch_applies(tmp_path: Path) -> None:
    old = [b"line %d\n" % (number % 300) for number in range(400)]
    new = [*old[:20], b"in\n", *old[30:200], *old[201:399], b"last, without newline"]
    text = unified_diff(b"".join(old), b"".join(new), b"/file", b"/file")
    assert text is not None
    (tmp_path / "file").write_bytes(b"".join(old))
    subprocess.run(["patch", "-s", "-p1"], input=text.encode(), cwd=tmp_path, check=True)
    assert (tmp_path / "file").read_bytes() == b"".join(new)
    assert len(text.splitlines()) < 50


def test_hostile_text_is_compared_in_bounded_time() -> None:
    old, new = b"x\n" * (CONTENT_MAX // 2), b"y\nx\n" * (CONTENT_MAX // 4)
    text = unified_diff(old, new, b"/f", b"/f")
    assert text is not None
    assert text.count("\n+") + text.count("\n-") >= CONTENT_MAX // 4


def test_names_in_headers_are_escaped() -> None:
    text = unified_diff(b"", b"x\n", None, b"/a\nb\xff\x1b[0m")
    assert text is not None
    assert text.splitlines()[:2] == ["--- /dev/null", "+++ container/a\\nb\\xff\\x1b[0m"]


# ----------------------------------------------------------------------------------------------- damage and other cases


def test_mounted_or_not_makes_no_difference(container: Container) -> None:
    with container.mounted() as root:
        (root / "etc/passwd").write_text("changed\n")
        (root / "bin").rename(root / "BIN")
        (root / "BIN/su").chmod(0o755)
        mounted = list(container.diff(content=True))
    assert mounted == list(container.diff(content=True))
    assert {(change.kind, change.path) for change in mounted} >= {("renamed", "/BIN"), ("changed", "/BIN/su")}


def test_diff_reads_only(container: Container, fs: TreeFs) -> None:
    write(fs, b"etc/passwd", b"x")
    fs.rename(b"lib", b"LIB")
    fs.shut()

    def stamps() -> list[tuple[str, int, int]]:
        found = []
        for folder, directories, files in os.walk(container.path / "private"):
            for name in directories + files:
                info = os.lstat(os.path.join(folder, name))
                found.append((os.path.join(folder, name), info.st_atime_ns, info.st_ctime_ns))
        return found

    stamps()
    os.utime(container.path / "private/etc/passwd", ns=(1, 2))
    os.utime(container.path / "private/etc", ns=(1, 2))
    before = stamps()
    os.utime(container.path / "private/etc", ns=(1, 2))
    list(container.diff(content=True))
    after = stamps()
    assert [(path, atime) for path, atime, _ in before if path.endswith("passwd")] == [
        (path, atime) for path, atime, _ in after if path.endswith("passwd")
    ]


def test_without_template(container: Container) -> None:
    conf = container.conf
    conf.set("OSTEMPLATE", "gone")
    conf.save()
    with pytest.raises(NotFoundError, match="gone"):
        container.diff()
    conf.set("OSTEMPLATE", "")
    conf.save()
    with pytest.raises(DamagedError, match="names no template"):
        container.diff()


def test_without_private_area(container: Container) -> None:
    shutil.rmtree(container.path / "private")
    with pytest.raises(DamagedError, match="no folder private"):
        diff_container(container.store.layout, container.path)


def test_damaged_names_are_told_as_what_is_stored(container: Container, fs: TreeFs) -> None:
    fs.shut()
    area = container.path / "private"
    os.symlink("//vz/template/small/no/such", area / "dangling")
    os.symlink("//vz/template/../etc", area / "malformed")
    os.symlink("//vz/template/other/etc", area / "foreign")
    os.symlink("//vz/template/small/usr/share", area / "twice")
    changes = [(change.kind, change.path, change.type) for change in container.diff() if change.path != "/"]
    assert changes[:3] == [
        ("added", "/dangling", "symlink"),
        ("added", "/foreign", "symlink"),
        ("added", "/malformed", "symlink"),
    ]
    assert changes[3] == ("added", "/twice", "dir")
    assert all(kind == "added" and path.startswith("/twice/") for kind, path, _ in changes[4:])
    assert len(changes) > 8


def test_files_of_another_template(container: Container, fs: TreeFs, tmp_path: Path) -> None:
    fs.shut()
    (tmp_path / "app").mkdir()
    (tmp_path / "app/run").write_text("run\n")
    container.store.create_template("app", str(tmp_path / "app"))
    conf = container.conf
    conf.set("TEMPLATES", f"{SMALL} app")
    conf.save()
    os.symlink("//vz/template/app/run", container.path / "private/run")
    (container.path / "private/tmp").unlink()
    os.symlink("//vz/template/app/run", container.path / "private/tmp")
    assert told(container) == [("added", "/run", ("links",)), ("changed", "/tmp", ("type",))]


def test_an_abandoned_diff_closes_everything(container: Container, fs: TreeFs) -> None:
    fs.mkdir(b"etc/new", 0o755)
    before = len(os.listdir("/proc/self/fd"))
    changes = container.diff()
    next(changes)
    changes.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------------------------------------------- random changes


def differences(old: Row, new: Row) -> tuple[str, ...]:
    """The words of ``Change.what`` for two rows, ``links`` aside."""
    if stat.S_IFMT(old.info.mode) != stat.S_IFMT(new.info.mode):
        return ("type",)
    same = {
        "content": old.content == new.content,
        "mode": old.info.mode == new.info.mode,
        "owner": (old.info.uid, old.info.gid) == (new.info.uid, new.info.gid),
        "times": old.info.mtime_ns == new.info.mtime_ns,
        "xattrs": old.xattrs == new.xattrs,
        "target": old.target == new.target,
        "device": old.info.rdev == new.info.rdev,
    }
    return tuple(word for word in WHAT if not same.get(word, True))


class Reading:
    """What the changes say about each path of two snapshots."""

    def __init__(self, changes: list[Change]) -> None:
        self.added = {path(change.path) for change in changes if change.kind == "added"}
        self.what = {path(c.path): c.what for c in changes if c.kind in ("changed", "renamed")}
        self.removed: list[tuple[bytes, Change]] = []
        self._renamed: dict[bytes, bytes] = {}
        for change in changes:  # their order matters: what was at a path goes before something else is renamed to it
            if change.kind == "renamed":
                self._renamed[path(change.path)] = path(change.old_path or "")
            elif change.kind == "removed":
                self.removed.append((self.old_place(path(change.path)), change))

    def old_place(self, new: bytes) -> bytes:
        """Where the template has what is at ``new``."""
        above, below = new, b""
        while above not in self._renamed:
            folder, _, name = above.rpartition(b"/")
            below = name + b"/" + below if below else name
            if not folder:
                return below
            above = folder
        return self._renamed[above] + b"/" + below if below else self._renamed[above]


def path(text: str) -> bytes:
    return os.fsencode(text).removeprefix(b"/")


def judge(changes: list[Change], old: dict[bytes, Row], new: dict[bytes, Row]) -> None:
    """Both snapshots and the changes must agree on every path and every difference."""
    reading = Reading(changes)
    came_from = {at: reading.old_place(at) for at in new if at not in reading.added}
    assert set(reading.what) <= set(came_from)
    assert reading.added <= new.keys()
    covered = list(came_from.values())
    gone = [at for at, _ in reading.removed]
    assert sorted([*gone, *covered]) == sorted(old), "each entry of the template is somewhere, or removed once"
    for at, was in came_from.items():
        what = tuple(word for word in reading.what.get(at, ()) if word != "links")
        assert what == differences(old[was], new[at]), (at, was)
    for change in changes:
        if change.kind != "removed":
            assert change.type == TYPES[stat.S_IFMT(new[path(change.path)].info.mode)]
    for at, change in reading.removed:
        assert change.type == TYPES[stat.S_IFMT(old[at].info.mode)]
    order = [os.fsencode(change.path).split(b"/") for change in changes if change.path != "/"]
    assert [parts[1] for parts in order] == sorted(parts[1] for parts in order)
    kept = [path(change.path).split(b"/") for change in changes if change.kind != "removed"]
    assert kept == sorted(kept), "in the order of a listing, each path once"
    assert len(kept) == len({tuple(parts) for parts in kept})


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    top = tmp_path_factory.mktemp("diff")
    store = Store(top / "vz")
    store.create_template(SMALL, str(make_source(top / "source")))
    return store


_numbers = itertools.count(1)


@settings(max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(wanted=steps)
def test_random_changes_are_told_exactly(shared_store: Store, wanted: list[Step]) -> None:
    container = shared_store.create(next(_numbers), template=SMALL)
    fs = TreeFs(shared_store.layout, container.path)
    before = os.umask(0)
    try:
        make_changes(fs, wanted)
        judge(list(container.diff()), snapshot(PosixFs(shared_store.template(SMALL).path)), snapshot(fs))
    finally:
        os.umask(before)
        fs.shut()
    assert container.check() == []
    container.destroy()
