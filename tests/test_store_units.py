"""The parts of the store one by one: magic links, conf, lock, index, layout, containers and templates on disk."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import SMALL, make_source
from vzfs import BusyError, DamagedError, ExistsError, NotFoundError, SourceError, Store, UsageError
from vzfs.store import magic
from vzfs.store.conf import Conf
from vzfs.store.container import create_container, destroy_container, existing_container
from vzfs.store.index import HEADER_SIZE, INO_START, LIFETIME_S, PROBES, Index, Meta, unpack_xattrs
from vzfs.store.index_write import EntryData, link_groups, pack_xattrs, write_index
from vzfs.store.layout import LINK_BUCKET, OWN_FOLDER_MODE, ROOT_VARIABLE, Layout, check_template_name, farm_entry
from vzfs.store.lock import Holder, Lock, read_holder
from vzfs.store.magic import MagicLink
from vzfs.store.opened import OpenTemplate
from vzfs.store.shape import container_paths
from vzfs.store.template import create_template, verify_template
from vzfs.store.users import template_users

quick = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# --------------------------------------------------------------------------------------------------------- magic links

parts = st.sampled_from([b"/", b"//", b"vz", b"template", b"vz/template/", b"small", b"..", b".", b"", b"a\xff", b"\n"])
link_texts = st.one_of(
    st.binary(min_size=1, max_size=40).filter(lambda text: b"\0" not in text),
    st.lists(parts, max_size=10).map(b"".join),
    st.tuples(st.integers(0, 5), st.lists(parts, max_size=5)).map(
        lambda drawn: b"/" * drawn[0] + b"vz/template/" + b"".join(drawn[1])
    ),
)
template_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", fullmatch=True)
file_names = st.binary(min_size=1, max_size=12).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)


@quick
@given(text=link_texts)
@example(text=b"//vz/template/small/etc")
@example(text=b"///vz/template/small/etc")
def test_a_containers_own_link_is_never_magic(text: bytes) -> None:
    stored = magic.escape(text)
    assert magic.unescape(stored) == text
    assert magic.parse(stored) is None
    assert not magic.is_magic(stored)
    assert len(stored) - len(text) in (0, 1)


@quick
@given(name=template_names, path=st.lists(file_names, max_size=5).map(b"/".join))
def test_a_magic_link_is_read_as_it_was_written(name: str, path: bytes) -> None:
    link = MagicLink(name, path)
    assert magic.is_magic(link.text())
    assert magic.parse(link.text()) == link


@pytest.mark.parametrize(
    "text",
    [
        b"/vz/template/small/etc",
        b"///vz/template/small/etc",
        b"//vz/template/",
        b"//vz/template//etc",
        b"//vz/template/.vzfs/small",
        b"//vz/template/-x/etc",
        b"//vz/template/sm all/etc",
        b"//vz/template/sm\xc3\xa4ll/etc",
        b"//vz/template/" + b"x" * 65,
        b"//vz/template/small/../etc",
        b"//vz/template/small/etc/..",
        b"//vz/template/small/./etc",
        b"//vz/template/small/etc/",
        b"//vz/template/small//etc",
        b"//vz/templates/small/etc",
        b"",
    ],
)
def test_what_is_no_well_formed_magic_link(text: bytes) -> None:
    assert magic.parse(text) is None


# ---------------------------------------------------------------------------------------------------------------- conf

keys = st.from_regex(r"[A-Z_][A-Z0-9_]{0,10}", fullmatch=True).filter(
    lambda key: key not in ("PATH", "IFS", "PWD", "_", "LC_ALL", "OLDPWD", "PPID", "OPTIND", "PS4", "PS1", "ENV")
)
values = st.text(st.characters(codec="utf-8", exclude_characters="\n\0"), max_size=30)


@quick
@given(settings_=st.dictionaries(keys, values, max_size=5))
def test_conf_gives_back_what_was_set(tmp_path: Path, settings_: dict[str, str]) -> None:
    path = tmp_path / "conf"
    conf = Conf(path)
    for key, value in settings_.items():
        conf.set(key, value)
    conf.save()
    assert Conf.load(path).as_dict() == settings_
    assert Conf.load(path).text() == conf.text()
    assert os.listdir(tmp_path) == ["conf"]


@settings(quick, max_examples=60)
@given(key=keys, value=values)
@example(key="A", value='$(touch x) `id` "quoted" \\ $HOME \'')
def test_a_shell_reads_the_same(tmp_path: Path, key: str, value: str) -> None:
    conf = Conf(tmp_path / "conf")
    conf.set(key, value)
    conf.save()
    script = f'. "$1"; printf %s "${key}"'
    done = subprocess.run(["sh", "-c", script, "sh", conf.path], capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout == value.encode()


@quick
@given(lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r\0"), max_size=30), max_size=8))
def test_unknown_lines_stay_as_they_are(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "conf"
    path.write_bytes("".join(line + "\n" for line in [*lines, 'OSTEMPLATE="old"']).encode())
    conf = Conf.load(path)
    conf.set("OSTEMPLATE", "new")
    conf.save()
    assert path.read_bytes() == "".join(line + "\n" for line in [*lines, 'OSTEMPLATE="new"']).encode()


def test_conf_of_other_tools(tmp_path: Path) -> None:
    path = tmp_path / "conf"
    path.write_bytes(
        b"# Copyright\n\nPHYSPAGES=\"0:524288\"\nONBOOT=yes\nexport NAME='web server'\n"
        b'  DISK = no\nVE_ROOT="/vz/root/$VEID"\nX="a\\"b\\$c"\nNAME="second"\nbytes="\xff"\n'
    )
    conf = Conf.load(path)
    assert conf.get("PHYSPAGES") == "0:524288"
    assert conf.get("ONBOOT") == "yes"
    assert conf.get("NAME") == "second"
    assert conf.get("VE_ROOT") == "/vz/root/$VEID"
    assert conf.get("X") == 'a"b$c'
    assert conf.get("DISK", "none") == "none"
    before = path.read_bytes()
    conf.save()
    assert path.read_bytes() == before


@pytest.mark.parametrize(("key", "value"), [("A", "two\nlines"), ("A", "nul\0"), ("1A", ""), ("", ""), ("A B", "")])
def test_conf_refuses_what_no_line_holds(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(UsageError):
        Conf(tmp_path / "conf").set(key, value)


def test_conf_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DamagedError):
        Conf.load(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- lock

HOLD = """
import os, sys, time
from pathlib import Path
from vzfs.store.lock import Holder, Lock
lock = Lock.acquire(Path(sys.argv[1]), Holder(os.getpid(), "serves", time.time(), "/somewhere/else", "portable"))
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


def holder(doing: str = "tests") -> Holder:
    return Holder(os.getpid(), doing, time.time())


@contextlib.contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process holds the lock of ``folder``; it lets go when its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def test_a_second_process_is_told_who_holds_it(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as other:
        with pytest.raises(BusyError) as caught:
            Lock.acquire(tmp_path, holder())
        assert f"process {other.pid} serves it at /somewhere/else" in caught.value.message
        found = read_holder(tmp_path)
        assert found is not None
        assert (found.pid, found.doing, found.mountpoint, found.engine) == (
            other.pid,
            "serves",
            "/somewhere/else",
            "portable",
        )
    assert read_holder(tmp_path) is None
    Lock.acquire(tmp_path, holder()).release()


def test_other_paths_to_the_same_directory(tmp_path: Path) -> None:
    (tmp_path / "ct").mkdir()
    (tmp_path / "alias").symlink_to("ct")
    (tmp_path / "bound").mkdir()
    subprocess.run(["mount", "--bind", tmp_path / "ct", tmp_path / "bound"], check=True)
    try:
        with held_elsewhere(tmp_path / "ct"):
            for path in (tmp_path / "alias", tmp_path / "bound", tmp_path / "ct/../alias"):
                with pytest.raises(BusyError):
                    Lock.acquire(path, holder())
    finally:
        subprocess.run(["umount", tmp_path / "bound"], check=True)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as other:
        other.kill()
        other.wait()
        assert b"serves" in (tmp_path / "lock").read_bytes()
        assert read_holder(tmp_path) is None
        lock = Lock.acquire(tmp_path, holder("checks"))
        found = read_holder(tmp_path)
        assert found is not None
        assert (found.pid, found.doing) == (os.getpid(), "checks")
        lock.release()
    assert (tmp_path / "lock").read_bytes() == b""


def test_within_one_process_as_well(tmp_path: Path) -> None:
    lock = Lock.acquire(tmp_path, holder())
    with pytest.raises(BusyError):
        Lock.acquire(tmp_path, holder())
    lock.describe(Holder(os.getpid(), "serves", 1.5, "/mnt", "portable", read_only=True))
    assert read_holder(tmp_path) == Holder(os.getpid(), "serves", 1.5, "/mnt", "portable", read_only=True)
    lock.release()


def test_asking_who_holds_it_keeps_nobody_out(tmp_path: Path) -> None:
    Lock.acquire(tmp_path, holder()).release()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            read_holder(tmp_path)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(200):
            Lock.acquire(tmp_path, holder()).release()
    finally:
        stop.set()
        thread.join()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    (tmp_path / "lock").symlink_to("precious")
    with pytest.raises(DamagedError, match="symbolic"):
        Lock.acquire(tmp_path, holder())
    assert (tmp_path / "precious").read_text() == "data"


def test_a_lock_with_any_text_still_locks(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path):
        for text in (b"", b"nonsense", b"[1]", b'{"pid": 1}', b"\xff"):
            (tmp_path / "lock").write_bytes(text)
            with pytest.raises(BusyError, match="in use"):
                Lock.acquire(tmp_path, holder())


# --------------------------------------------------------------------------------------------------------------- index


def fake_stat(mode: int, **more: Any) -> Any:
    """What an index is written from, without a file."""
    fields: dict[str, Any] = dict.fromkeys(
        ("st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blocks", "st_blksize"), 0
    )
    fields |= {"st_atime_ns": 0, "st_mtime_ns": 0, "st_ctime_ns": 0, "st_mode": mode, "st_nlink": 1}
    return SimpleNamespace(**(fields | more))


ids = st.integers(0, 2**32 - 1)
times = st.integers(-(2**40), 2**62)


@st.composite
def entry_lists(draw: st.DrawFn) -> list[EntryData]:
    """Entries of a small tree, numbered breadth first, children sorted, with hard link groups."""
    entries = [EntryData(0, b"", fake_stat(stat.S_IFDIR | 0o755))]
    groups = draw(st.integers(1, 3))
    for number, entry in enumerate(entries):
        if not stat.S_ISDIR(entry.info.st_mode) or len(entries) > 40:
            continue
        for name in sorted(draw(st.sets(file_names, max_size=6))):
            kind = draw(st.sampled_from([stat.S_IFREG, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR]))
            inode = draw(st.integers(1, groups)) if kind == stat.S_IFREG else 1000 + len(entries)
            info = fake_stat(
                kind | draw(st.integers(0, 0o7777)),
                st_ino=inode,
                st_nlink=2 if kind == stat.S_IFREG else 1,
                st_uid=draw(ids),
                st_gid=draw(ids),
                st_rdev=draw(ids) if kind == stat.S_IFCHR else 0,
                st_size=draw(st.integers(0, 2**62)),
                st_blocks=draw(st.integers(0, 2**50)),
                st_blksize=4096,
                st_atime_ns=draw(times),
                st_mtime_ns=draw(times),
                st_ctime_ns=draw(times),
            )
            blob = draw(st.binary(max_size=20)) if kind == stat.S_IFLNK else b"d" * 32 * (kind == stat.S_IFREG)
            xattrs = draw(st.dictionaries(st.sampled_from(["user.a", "security.b", "user.é"]), st.binary(max_size=9)))
            entries.append(EntryData(number, name, info, blob, xattrs))
    link_groups(entries)
    return entries


def written(path: Path, entries: list[EntryData], ino_base: int = INO_START) -> Index:
    with open(path, "wb") as file:
        write_index(file, entries, Meta("small", "a source", ino_base, 123, 456))
    return Index(path)


@settings(quick, max_examples=100)
@given(entries=entry_lists())
def test_an_index_gives_back_what_was_written(tmp_path: Path, entries: list[EntryData]) -> None:
    index = written(tmp_path / "index", entries)
    assert index.intact()
    assert index.count == len(entries)
    assert index.meta == Meta("small", "a source", INO_START, 123, 456)
    assert sorted(index.walk()) == list(range(len(entries)))
    for number, entry in enumerate(entries):
        assert index.name(number) == entry.name
        assert index.parent[number] == entry.parent
        assert index.xattrs(number) == entry.xattrs
        assert index.has_xattrs(number) == bool(entry.xattrs)
        check_attributes(index, number, entry)
        if stat.S_ISLNK(entry.info.st_mode):
            assert index.target(number) == entry.blob
        if number:
            assert index.find(entry.parent, entry.name) == number
            assert index.find_path(index.path(number)) == number
            assert number in index.children(entry.parent)
        assert index.find(number, b"no such name in any") == 0
        assert index.find(number, entry.name + b"\0") == 0
    assert index.find_path(b"") == 0
    assert index.find_path(b"no/such") is None


def check_attributes(index: Index, number: int, entry: EntryData) -> None:
    attributes, info = index.attributes(number), entry.info
    members = index.members(number)
    assert members == [n for n in range(index.count) if index.leader[n] == index.leader[number]]
    assert number in members
    assert attributes.ino == INO_START + members[0]
    assert attributes.mode == index.mode(number) == info.st_mode
    assert index.is_directory(number) == stat.S_ISDIR(info.st_mode)
    for name in ("uid", "gid", "rdev", "size", "blocks", "blksize", "atime_ns", "mtime_ns", "ctime_ns"):
        assert getattr(attributes, name) == getattr(info, f"st_{name}"), name
    if stat.S_ISDIR(info.st_mode):
        assert attributes.nlink == 2 + sum(index.is_directory(child) for child in index.children(number))
    else:
        assert attributes.nlink == len(members)


class Direntplus(NamedTuple):
    """One record of a READDIRPLUS answer."""

    nodeid: int
    lifetimes: tuple[int, int, int, int]
    attr: tuple[int, ...]
    ino: int
    off: int
    type: int
    name: bytes


def parse_direntplus(data: bytes) -> list[Direntplus]:
    """Read ``struct fuse_direntplus`` as <linux/fuse.h> has it, independently of the writer."""
    records = []
    while data:
        nodeid, generation, entry_valid, attr_valid, entry_nsec, attr_nsec = struct.unpack_from("=QQQQII", data)
        assert generation == 0
        attr = struct.unpack_from("=QQQqqqIIIIIIIIII", data, 40)
        ino, off, namelen, kind = struct.unpack_from("=QQII", data, 128)
        lifetimes = (entry_valid, attr_valid, entry_nsec, attr_nsec)
        records.append(Direntplus(nodeid, lifetimes, attr, ino, off, kind, data[152 : 152 + namelen]))
        end = (152 + namelen + 7) // 8 * 8
        assert set(data[152 + namelen : end]) <= {0}
        data = data[end:]
    return records


@settings(quick, max_examples=60)
@given(entries=entry_lists())
def test_listings_are_what_the_kernel_reads(tmp_path: Path, entries: list[EntryData]) -> None:
    index = written(tmp_path / "index", entries)
    for number, entry in enumerate(entries):
        if not stat.S_ISDIR(entry.info.st_mode):
            continue
        records = parse_direntplus(bytes(index.listing(number)))
        assert [record.name for record in records] == [b".", b"..", *map(index.name, index.children(number))]
        assert [record.off for record in records] == list(range(1, len(records) + 1))
        assert [record.nodeid for record in records[:2]] == [0, 0]
        for record, shown in zip(records, [number, entry.parent, *index.children(number)], strict=True):
            attributes = index.attributes(shown)
            assert record.ino == attributes.ino
            assert record.type == stat.S_IFMT(attributes.mode) >> 12
            assert record.lifetimes == (LIFETIME_S, LIFETIME_S, 0, 0)
            assert record.attr[:3] == (attributes.ino, attributes.size, attributes.blocks)
            seconds = tuple(ns // 10**9 for ns in (attributes.atime_ns, attributes.mtime_ns, attributes.ctime_ns))
            parts_ = tuple(ns % 10**9 for ns in (attributes.atime_ns, attributes.mtime_ns, attributes.ctime_ns))
            assert record.attr[3:9] == seconds + parts_
            rest = (attributes.mode, attributes.nlink, attributes.uid, attributes.gid, attributes.rdev)
            assert record.attr[9:] == (*rest, attributes.blksize, 0)
        for record, child in zip(records[2:], index.children(number), strict=True):
            assert record.nodeid == index.attributes(child).ino
            assert index.entry_out(child) == struct.pack("=QQQQII", record.nodeid, 0, LIFETIME_S, LIFETIME_S, 0, 0) + (
                index.attributes_out(child)
            )


def test_names_that_collide_are_found_by_bisection(tmp_path: Path) -> None:
    count, slots = 300, 1024
    colliding = (b"%d" % number for number in range(10**6) if zlib.crc32(b"%d" % number, 0) % slots == 7)
    names = sorted(next(colliding) for _ in range(count))
    absent = [next(colliding) for _ in range(50)]
    entries = [EntryData(0, b"", fake_stat(stat.S_IFDIR))]
    entries += [EntryData(0, name, fake_stat(stat.S_IFREG)) for name in names]
    link_groups(entries)
    index = written(tmp_path / "index", entries)
    assert count > PROBES
    for number, name in enumerate(names, 1):
        assert index.find(0, name) == number
    for name in [*absent, b"", b"\xff" * 255]:
        assert index.find(0, name) == 0
        assert index.find(5, name) == 0


def test_the_index_of_a_real_tree(small_store: Store) -> None:
    template = OpenTemplate(small_store.layout, SMALL)
    index = template.index
    tree = os.fsencode(small_store.layout.template(SMALL).tree)
    found = {b""}
    for folder, directories, files in os.walk(tree):
        for name in directories + files:
            path = os.path.join(folder, name)
            relative = path[len(tree) + 1 :]
            found.add(relative)
            number = index.find_path(relative)
            assert number
            info, attributes = os.lstat(path), index.attributes(number)
            assert (info.st_mode, info.st_uid, info.st_gid) == (attributes.mode, attributes.uid, attributes.gid)
            assert (info.st_nlink, info.st_mtime_ns) == (attributes.nlink, attributes.mtime_ns)
            if stat.S_ISREG(info.st_mode):
                with open(template.open_file(number), "rb") as ours, open(path, "rb") as theirs:
                    assert ours.read() == theirs.read()
    assert {index.path(number) for number in range(index.count)} == found
    template.close()


@pytest.fixture
def index_file(tmp_path: Path) -> Path:
    entries = [EntryData(0, b"", fake_stat(stat.S_IFDIR)), EntryData(0, b"a", fake_stat(stat.S_IFREG), b"d" * 32)]
    link_groups(entries)
    written(tmp_path / "index", entries)
    return tmp_path / "index"


def test_a_damaged_header_is_noticed(index_file: Path) -> None:
    whole = index_file.read_bytes()
    for position in range(HEADER_SIZE):
        index_file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises(DamagedError, match="can't be used"):
            Index(index_file)


def test_a_cut_file_is_noticed(index_file: Path) -> None:
    whole = index_file.read_bytes()
    for size in (0, 1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 1, len(whole) // 2, len(whole) - 1):
        index_file.write_bytes(whole[:size])
        with pytest.raises(DamagedError, match="can't be used"):
            Index(index_file)
    index_file.write_bytes(whole + b"\0")
    with pytest.raises(DamagedError, match="can't be used"):
        Index(index_file)


def test_a_damaged_body_is_not_intact(index_file: Path) -> None:
    whole = index_file.read_bytes()
    for position in range(HEADER_SIZE, len(whole), 7):
        index_file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with contextlib.suppress(DamagedError):  # noticed even earlier
            assert not Index(index_file).intact(), position


@quick
@given(xattrs=st.dictionaries(st.binary(min_size=1, max_size=20).map(os.fsdecode), st.binary(max_size=300), max_size=5))
def test_xattrs_are_packed_and_unpacked(xattrs: dict[str, bytes]) -> None:
    assert unpack_xattrs(pack_xattrs(xattrs)) == xattrs


# -------------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("name", ["a", "debian-12", "x" * 64, "A.b_c+d-e", "0"])
def test_names_for_templates(name: str) -> None:
    assert check_template_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "a/b", "a b", "x" * 65, "é", "a\n", "a\0", "+a", "_a"]
)
def test_no_names_for_templates(name: str) -> None:
    with pytest.raises(UsageError, match="can't name a template"):
        check_template_name(name)
    with pytest.raises(UsageError):
        Layout.at("/nowhere").template(name)


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    assert Layout.at(None).root == Path("/vz")
    monkeypatch.setenv(ROOT_VARIABLE, "/srv/ve")
    assert Layout.at(None).root == Path("/srv/ve")
    monkeypatch.chdir(tmp_path)
    assert Layout.at("here").root == tmp_path / "here"


def test_the_stores_folders_are_roots_own(tmp_path: Path) -> None:
    layout = Layout.at(tmp_path / "deep/vz")
    before = os.umask(0)
    try:
        layout.make()
        layout.make()
    finally:
        os.umask(before)
    for folder in (layout.templates, layout.templates_meta, layout.containers, layout.mounts):
        assert stat.S_IMODE(folder.stat().st_mode) == OWN_FOLDER_MODE


def test_the_farm_is_in_buckets() -> None:
    assert farm_entry(0) == b"0/0"
    assert farm_entry(LINK_BUCKET - 1) == b"0/%d" % (LINK_BUCKET - 1)
    assert farm_entry(LINK_BUCKET) == b"1/%d" % LINK_BUCKET


# ---------------------------------------------------------------------------------------------------------- containers


def test_a_new_container_on_disk(small_store: Store) -> None:
    path = create_container(small_store.layout, 101, SMALL)
    assert path == small_store.root / "private/101"
    assert sorted(os.listdir(path)) == ["conf", "cow", "dump", "lock", "private"]
    for folder in (path, path / "cow", path / "dump"):
        assert stat.S_IMODE(folder.stat().st_mode) == OWN_FOLDER_MODE
    template, area = small_store.template(SMALL).path, path / "private"
    assert area.stat().st_mode == template.stat().st_mode
    assert area.stat().st_mtime_ns == template.stat().st_mtime_ns
    assert sorted(os.listdir(area)) == sorted(os.listdir(template))
    for name in os.listdir(area):
        assert os.readlink(area / name) == f"//vz/template/{SMALL}/{name}"
        assert (area / name).lstat().st_nlink > 1, "not from the link farm"
    assert existing_container(small_store.layout, 101) == path
    assert existing_container(small_store.layout, str(path)) == path


def test_listing_containers(small_store: Store) -> None:
    layout = small_store.layout
    for number in (20, 3, 100):
        create_container(layout, number, SMALL)
    (layout.containers / "stray").mkdir()
    (layout.containers / ".new-7-00000000").mkdir()
    assert [path.name for path in container_paths(layout)] == ["3", "20", "100"]
    assert container_paths(Layout.at(small_store.root / "elsewhere")) == []


def test_containers_by_name_and_path(small_store: Store, tmp_path: Path) -> None:
    layout = small_store.layout
    first = create_container(layout, 1, SMALL, name="web")
    elsewhere = create_container(layout, tmp_path / "srv/ve/db", SMALL, name="db", mountpoint=tmp_path / "mnt")
    assert existing_container(layout, "web") == first
    assert existing_container(layout, elsewhere) == elsewhere
    assert Conf.load(elsewhere / "conf").as_dict() == {
        "OSTEMPLATE": SMALL,
        "TEMPLATES": SMALL,
        "OSTEMPLATE_DIGEST": small_store.template(SMALL).info().digest,
        "NAME": "db",
        "VE_ROOT": str(tmp_path / "mnt"),
    }
    assert template_users(layout, SMALL) == [first, elsewhere]
    with pytest.raises(ExistsError, match="NAME 'web'"):
        create_container(layout, 2, SMALL, name="web")
    with pytest.raises(NotFoundError, match="NAME 'mail'"):
        existing_container(layout, "mail")
    with pytest.raises(NotFoundError, match="no container at"):
        existing_container(layout, 2)


@pytest.mark.parametrize("ct", ["", "0", "00", "-1", "x", ".", "..", "1 ", "99999999999"])
def test_no_numbers_for_containers(small_store: Store, ct: str) -> None:
    with pytest.raises(UsageError):
        create_container(small_store.layout, ct, SMALL)
    assert os.listdir(small_store.layout.containers) == []


@pytest.mark.parametrize("name", ["", "101", "a/b", "a b", ".a", "-a", "x" * 65, "a\n"])
def test_no_names_for_containers(small_store: Store, name: str) -> None:
    with pytest.raises(UsageError, match="NAME"):
        create_container(small_store.layout, 1, SMALL, name=name)


def test_a_container_that_cant_be_made_leaves_nothing(small_store: Store, tmp_path: Path) -> None:
    layout = small_store.layout
    with pytest.raises(NotFoundError, match="vzfs template create gone"):
        create_container(layout, 1, "gone")
    create_container(layout, 1, SMALL)
    with pytest.raises(ExistsError, match="exists already"):
        create_container(layout, 1, SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExistsError):
        create_container(layout, tmp_path / "file", SMALL)
    assert os.listdir(layout.containers) == ["1"]


def together(count: int, work: Callable[[], object]) -> list[object]:
    """Do it in several threads at once; gives each one's result or exception."""
    barrier = threading.Barrier(count)
    results: list[object] = []

    def run() -> None:
        barrier.wait()
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_creators_of_one_container(small_store: Store) -> None:
    for number in range(1, 11):
        results = together(3, lambda number=number: create_container(small_store.layout, number, SMALL))
        assert sorted(type(result).__name__ for result in results) == ["ExistsError", "ExistsError", "PosixPath"]
        assert small_store.container(number).check() == []
    assert len(os.listdir(small_store.layout.containers)) == 10


def test_destroying_a_container(small_store: Store, tmp_path: Path) -> None:
    layout = small_store.layout
    elsewhere = create_container(layout, tmp_path / "ve/7", SMALL)
    (elsewhere / "private/deep/er").mkdir(parents=True)
    os.symlink(tmp_path, elsewhere / "private/out")
    lock = Lock.acquire(elsewhere, holder("serves"))
    with pytest.raises(BusyError, match="serves"):
        destroy_container(layout, elsewhere)
    lock.release()
    destroy_container(layout, elsewhere)
    assert os.listdir(tmp_path / "ve") == []
    assert template_users(layout, SMALL) == []
    assert small_store.template(SMALL).verify() == []


# ----------------------------------------------------------------------------------------------------------- templates


def test_a_sealed_template_is_what_its_index_says(small_store: Store) -> None:
    seen: list[tuple[str, int, int | None]] = []
    assert verify_template(small_store.layout, SMALL, lambda *step: seen.append(step)) == []
    info = small_store.template(SMALL).info()
    assert seen[-1] == ("verifying", info.entries, info.entries)
    assert info.size == sum(
        path.lstat().st_size // path.lstat().st_nlink if path.lstat().st_nlink == 1 else 0
        for path in small_store.template(SMALL).path.rglob("*")
        if stat.S_ISREG(path.lstat().st_mode)
    ) + len(b"#!/bin/sh\necho tool\n") + len(b"pair\n")
    assert len(list(small_store.template(SMALL).dump())) == info.entries + 1


def _tamper_content(tree: Path) -> None:
    path = tree / "etc/passwd"
    info = path.stat()
    path.write_bytes(b"R" + path.read_bytes()[1:])
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def _tamper_link(tree: Path) -> None:
    path = tree / "etc/relative"
    info = path.lstat()
    target = os.readlink(path)
    path.unlink()
    path.symlink_to("X" + target[1:])
    os.chown(path, info.st_uid, info.st_gid, follow_symlinks=False)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)
    restore_times(path.parent)


def _tamper_hard_link(tree: Path) -> None:
    subprocess.run(["cp", "-a", tree / "usr/share/pair-b", tree / "usr/share/copy"], check=True)
    (tree / "usr/share/copy").rename(tree / "usr/share/pair-b")
    restore_times(tree / "usr/share")


def _tamper_device(tree: Path) -> None:
    info = (tree / "dev/null").lstat()
    (tree / "dev/null").unlink()
    before = os.umask(0)
    os.mknod(tree / "dev/null", info.st_mode, os.makedev(1, 5))
    os.umask(before)
    os.utime(tree / "dev/null", ns=(info.st_atime_ns, info.st_mtime_ns))
    restore_times(tree / "dev")


def _tamper_type(tree: Path) -> None:
    (tree / "etc/empty").unlink()
    (tree / "etc/empty").mkdir()
    restore_times(tree / "etc")


def _remove(tree: Path) -> None:
    (tree / "etc/empty").unlink()
    restore_times(tree / "etc")


def _add(tree: Path) -> None:
    (tree / "etc/zz new").write_text("")
    restore_times(tree / "etc")


_times: dict[str, tuple[int, int]] = {}


def restore_times(folder: Path) -> None:
    """Give a directory the times it had before the tampering, so that these alone give nothing away."""
    os.utime(folder, ns=_times[str(folder)])


TAMPERING: dict[str, tuple[Callable[[Path], object], set[tuple[str, str]]]] = {
    "content": (_tamper_content, {("/etc/passwd", "content")}),
    "mode": (lambda tree: (tree / "bin/su").chmod(0o755), {("/bin/su", "mode")}),
    "owner": (lambda tree: os.chown(tree / "etc/shadow", 0, 0), {("/etc/shadow", "owner")}),
    "times": (lambda tree: os.utime(tree / "tmp", (1, 1)), {("/tmp", "times")}),
    "size": (
        lambda tree: os.truncate(tree / "lib/large", 5),
        {("/lib/large", "size"), ("/lib/large", "times"), ("/lib/large", "content")},
    ),
    "xattr": (lambda tree: os.setxattr(tree / "etc/passwd", "user.note", b"else"), {("/etc/passwd", "xattrs")}),
    "xattr added": (lambda tree: os.setxattr(tree / "bin", "user.x", b""), {("/bin", "xattrs")}),
    "xattr of a link": (
        lambda tree: os.removexattr(tree / "etc/dangling", "trusted.link", follow_symlinks=False),
        {("/etc/dangling", "xattrs")},
    ),
    "acl": (
        lambda tree: os.removexattr(tree / "usr/acl", "system.posix_acl_default"),
        {("/usr/acl", "xattrs")},
    ),
    "capability": (
        lambda tree: os.removexattr(tree / "bin/ping", "security.capability"),
        {("/bin/ping", "xattrs")},
    ),
    "missing": (_remove, {("/etc/empty", "missing")}),
    "extra": (_add, {("/etc/zz new", "extra")}),
    "link target": (_tamper_link, {("/etc/relative", "target")}),
    "hard link": (_tamper_hard_link, {("/usr/share/pair-b", "links")}),
    "device": (_tamper_device, {("/dev/null", "device")}),
}


@pytest.mark.parametrize("what", TAMPERING)
def test_verify_finds_tampering(small_store: Store, what: str) -> None:
    tree = small_store.template(SMALL).path
    _times.clear()
    for folder in (tree, *(path for path in tree.rglob("*") if path.is_dir() and not path.is_symlink())):
        info = folder.lstat()
        _times[str(folder)] = (info.st_atime_ns, info.st_mtime_ns)
    tamper, expected = TAMPERING[what]
    tamper(tree)
    problems = small_store.template(SMALL).verify()
    assert {(problem.path, problem.kind) for problem in problems} == expected


def test_verify_finds_another_type(small_store: Store) -> None:
    tree = small_store.template(SMALL).path
    info = (tree / "etc").stat()
    _times[str(tree / "etc")] = (info.st_atime_ns, info.st_mtime_ns)
    _tamper_type(tree)
    assert ("/etc/empty", "mode") in {(p.path, p.kind) for p in small_store.template(SMALL).verify()}


def test_verify_finds_a_damaged_index_and_farm(small_store: Store) -> None:
    paths = small_store.layout.template(SMALL)
    (paths.links / "0/5").unlink()
    (paths.links / "0/6").unlink()
    (paths.links / "0/6").symlink_to("//vz/template/small/etc/shadow")
    data = bytearray(paths.index.read_bytes())
    data[-1] ^= 1
    paths.index.write_bytes(data)
    kinds = [(Path(problem.path).name, problem.kind) for problem in verify_template(small_store.layout, SMALL)]
    assert kinds[0] == ("index", "index")
    assert kinds[-2:] == [("5", "link farm"), ("6", "link farm")]


def test_a_template_in_use_is_not_removed(small_store: Store, tmp_path: Path) -> None:
    small_store.create(7, template=SMALL)
    elsewhere = small_store.create(tmp_path / "ve/far", template=SMALL)
    template = small_store.template(SMALL)
    with pytest.raises(BusyError, match=f"7, {elsewhere.path}"):
        template.remove()
    assert template.verify() == []
    small_store.container(7).destroy()
    with pytest.raises(BusyError, match="far"):
        template.remove()
    elsewhere.destroy()
    template.remove()
    assert os.listdir(small_store.layout.templates) == [".vzfs"]
    assert os.listdir(small_store.layout.templates_meta) == []
    with pytest.raises(NotFoundError):
        template.remove()


def test_a_container_that_moved_still_needs_its_template(small_store: Store, tmp_path: Path) -> None:
    """A link to a container that is gone counts for nothing; one that was moved is known again once it is mounted."""
    container = small_store.create(tmp_path / "ve/far", template=SMALL)
    container.path.rename(tmp_path / "ve/farther")
    assert small_store.template(SMALL).users() == []
    moved = small_store.container(tmp_path / "ve/farther")
    with moved.mounted():
        pass
    assert [each.path for each in small_store.template(SMALL).users()] == [moved.path]


def test_inode_numbers_of_templates_never_meet(small_store: Store, tmp_path: Path) -> None:
    for name in ("two", "three"):
        small_store.create_template(name, str(tmp_path / "source"))
    small_store.template("two").remove()
    small_store.create_template("four", str(tmp_path / "source"))
    infos = sorted((template.info() for template in small_store.templates()), key=lambda info: info.ino_base)
    assert len(infos) == 3
    for first, second in itertools.pairwise(infos):
        assert first.ino_base + first.entries <= second.ino_base
    assert all(info.ino_base >= INO_START for info in infos)


def test_a_path_too_long_for_a_link_is_refused(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "long"
    source.mkdir()
    fd = os.open(source, os.O_RDONLY)
    for name in ["d" * 250] * 16 + ["e" * 70]:  # as a path alone short enough, as a magic link not
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    with pytest.raises(SourceError, match="4086 bytes long"):
        store.create_template("long", str(source))
    assert_no_trace(store.layout)
    subprocess.run(["rm", "-rf", source], check=True)


def test_two_creators_of_one_template(store: Store, tmp_path: Path) -> None:
    source = str(make_source(tmp_path / "source"))
    results = together(3, lambda: create_template(store.layout, SMALL, source))
    assert sorted(type(result).__name__ for result in results) == ["ExistsError", "ExistsError", "NoneType"]
    assert verify_template(store.layout, SMALL) == []
    assert sorted(os.listdir(store.layout.templates)) == [".vzfs", SMALL]
    assert os.listdir(store.layout.templates_meta) == [SMALL]


def test_what_is_in_the_way_of_a_template(store: Store, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    store.layout.make()
    (store.layout.templates / "mine").mkdir()
    with pytest.raises(ExistsError, match="in the way"):
        store.create_template("mine", str(tmp_path / "source"))
    assert os.listdir(store.layout.templates / "mine") == []
    with pytest.raises(UsageError):
        store.create_template("../mine", str(tmp_path / "source"))


def assert_no_trace(layout: Layout) -> None:
    assert os.listdir(layout.templates) == [".vzfs"]
    assert os.listdir(layout.templates_meta) == []


# ---------------------------------------------------------------------------------------------- killed in the middle

DIE = """
import itertools, os, signal, sys
from vzfs import Store
from vzfs import linux as calls

what, name, count, source, root = sys.argv[1:]
left = itertools.count(int(count), -1)

def step(*_):
    if next(left) == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def stepping(call):
    def stepped(*arguments, **more):
        step()
        result = call(*arguments, **more)
        step()
        return result
    return stepped

module, _, function = name.rpartition(".")
setattr(os, function, stepping(getattr(os, function)))
store = Store(root)
if what == "create":
    store.create_template("small", source)
else:
    store.template("small").remove()
print("survived")
"""


def die(what: str, name: str, count: int, source: Path, root: Path) -> bool:
    """Create or remove a template in a process that is killed at the ``count``-th step of ``name``; whether it was."""
    process = subprocess.run(
        [sys.executable, "-c", DIE, what, name, str(count), source, root],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.returncode in (0, -signal.SIGKILL), process.stderr
    return process.returncode != 0


KILLS = {
    "os.rename": range(12),
    "os.mkdir": (0, 1, 3, 5, 9, 21),
    "os.link": (0, 3),
    "os.symlink": (0, 5, 21, 60, 121),
    "os.setxattr": (0, 3),
    "os.unlink": (0, 1, 20, 61, 120),
    "os.rmdir": (0, 1, 4, 11, 30, 51),
    "os.fsync": (0, 1),
    "os.lstat": (0, 30, 101),
}


def settle(store: Store, source: Path) -> None:
    """The next command that concerns templates."""
    store.create_template("next", str(source))
    store.template("next").remove()


@pytest.mark.parametrize("name", [name for name in KILLS if name != "os.unlink"])
def test_a_killed_creation_leaves_all_or_nothing(store: Store, tmp_path: Path, name: str) -> None:
    source, tiny = make_source(tmp_path / "source"), tmp_path / "tiny"
    tiny.mkdir()
    killed = 0
    for count in KILLS[name]:
        killed += die("create", name, count, source, store.root)
        settle(store, tiny)
        if store.templates():
            assert [template.name for template in store.templates()] == [SMALL]
            assert store.template(SMALL).verify() == []
            assert os.listdir(store.layout.templates_meta) == [SMALL]
            store.template(SMALL).remove()
        assert_no_trace(store.layout)
    assert killed or name in ("os.link", "os.rmdir"), "the step was never reached"


@pytest.mark.parametrize("name", ["os.rename", "os.mkdir", "os.unlink", "os.rmdir"])
def test_a_killed_removal_leaves_all_or_nothing(store: Store, tmp_path: Path, name: str) -> None:
    source, tiny = make_source(tmp_path / "source"), tmp_path / "tiny"
    tiny.mkdir()
    killed = 0
    for count in KILLS[name]:
        if not store.templates():
            store.create_template(SMALL, str(source))
        killed += die("remove", name, count, source, store.root)
        settle(store, tiny)
        if store.templates():
            assert store.template(SMALL).verify() == []
        else:
            assert_no_trace(store.layout)
    assert killed


def test_the_place_of_a_killed_creation_is_free_at_once(store: Store, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    assert die("create", "os.symlink", 30, source, store.root)
    store.create_template(SMALL, str(source))
    assert store.template(SMALL).verify() == []
    assert os.listdir(store.layout.templates_meta) == [SMALL]


def test_a_creation_that_goes_on_is_left_alone(store: Store, tmp_path: Path) -> None:
    source, tiny = make_source(tmp_path / "source"), tmp_path / "tiny"
    tiny.mkdir()
    reached, go_on = threading.Event(), threading.Event()

    def wait(phase: str, done: int, total: int | None) -> None:
        if phase == "indexing":
            reached.set()
            go_on.wait(120)

    thread = threading.Thread(target=lambda: create_template(store.layout, SMALL, str(source), progress=wait))
    thread.start()
    assert reached.wait(120)
    settle(store, tiny)
    assert len(os.listdir(store.layout.templates_meta)) == 1
    go_on.set()
    thread.join()
    assert store.template(SMALL).verify() == []


def test_an_interrupted_creation_leaves_nothing(store: Store, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    for phase in ("indexing", "preparing links"):

        def interrupt(now: str, done: int, total: int | None, phase: str = phase) -> None:
            if now == phase:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            create_template(store.layout, SMALL, str(source), progress=interrupt)
        assert_no_trace(store.layout)


def test_the_lock_file_says_it_as_json(tmp_path: Path) -> None:
    """The form of the file is read by other tools, too."""
    lock = Lock.acquire(tmp_path, Holder(os.getpid(), "serves", 12.5, "/mnt", "portable"))
    expected = {"pid": os.getpid(), "doing": "serves", "since": 12.5, "mountpoint": "/mnt", "engine": "portable"}
    assert json.loads((tmp_path / "lock").read_bytes()).items() >= expected.items()
    lock.release()
