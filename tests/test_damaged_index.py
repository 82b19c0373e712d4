"""An index in which any byte is another one: refused by name, never served, never a loop, whatever looks at it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.conftest import SMALL, end_below, make_source
from tests.engines import ENGINES, EngineStore
from vzfs import DamagedError, Store, VzfsError
from vzfs.cli.app import cli
from vzfs.store.index import COLUMNS, HEADER_SIZE, Index, padded
from vzfs.store.index_check import find_fault
from vzfs.store.seal import content_digest, open_sealed

FLIPS = 1000
MEMORY_MAX = 200 << 20


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    top = tmp_path_factory.mktemp("index")
    store = EngineStore(top / "vz")
    store.create_template(SMALL, str(make_source(top / "source")))
    store.create_template("other", str(make_source(top / "source-2")))
    store.create(6, template=SMALL)
    store.create(7, template="other")
    try:
        yield store
    finally:
        end_below(top)


@pytest.fixture
def store(built: Store) -> Iterator[Store]:
    """With an index that a test may damage."""
    path = built.layout.template(SMALL).index
    whole = path.read_bytes()
    try:
        yield built
    finally:
        path.write_bytes(whole)


def run(store: Store, *words: str) -> Result:
    result = CliRunner().invoke(cli, ["--root", str(store.root), *words])
    assert "Traceback" not in result.output
    return result


def write_at(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def reseal(data: bytearray) -> bytes:
    """With the checksums that a hostile writer gives it."""
    data[96:128] = hashlib.sha256(data[HEADER_SIZE:]).digest()
    data[128:132] = bytes(4)
    data[128:132] = struct.pack("<I", zlib.crc32(data[:HEADER_SIZE]))
    return bytes(data)


FLIP = r"""
import random, re, sys
from pathlib import Path
from vzfs.errors import DamagedError
from vzfs.store.layout import Layout
from vzfs.store.opened import OpenTemplate

layout, flips = Layout.at(sys.argv[1]), int(sys.argv[3])
path = layout.template(sys.argv[2]).index
drawn = random.Random(1)
whole = path.read_bytes()
with open(path, "r+b", buffering=0) as file:
    for number in range(flips):
        at = drawn.randrange(len(whole))
        file.seek(at)
        file.write(bytes([whole[at] ^ drawn.randrange(1, 256)]))
        try:
            OpenTemplate(layout, sys.argv[2])
        except DamagedError as error:
            assert str(path) in error.message, error
        else:
            raise AssertionError(f"byte {at} was another one, and it was opened")
        file.seek(at)
        file.write(whole[at : at + 1])
OpenTemplate(layout, sys.argv[2]).close()
# Not ru_maxrss, in which the process that started this one counts, too.
print(int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def test_any_byte_that_is_another_one_is_refused_by_name(store: Store) -> None:
    command = [sys.executable, "-c", FLIP, str(store.root), SMALL, str(FLIPS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) < MEMORY_MAX


@pytest.mark.parametrize("part", ["header", "columns", "names", "listings", "end"])
def test_commands_say_which_template_is_damaged(store: Store, part: str) -> None:
    path = store.layout.template(SMALL).index
    index = Index(path)
    slots_at = HEADER_SIZE + sum(padded(index.count * struct.calcsize(code)) for _, code in COLUMNS)
    places = {
        "header": 20,
        "columns": 300,
        "names": slots_at + 3,
        "listings": index.listing_at + 700,
        "end": index.size - 1,
    }
    at = places[part] % index.size
    write_at(path, at, bytes([index.data[at] ^ 0x41]))

    for words in (["mount", "6"], ["diff", "6"], ["create", "8", "--template", SMALL], ["template", "show", SMALL]):
        refused = run(store, *words)
        assert refused.exit_code == 9, (words, refused.output)
        assert str(path) in refused.stderr
    dumped = run(store, "template", "dump", SMALL)
    assert (dumped.exit_code, dumped.stdout) == (9, "")
    checked = run(store, "check", "6", "--json")
    assert checked.exit_code == 1
    (problem,) = json.loads(checked.stdout)[0]["problems"]
    assert problem["kind"] == "template"
    assert str(path) in problem["detail"]
    verified = run(store, "template", "verify", SMALL, "--json")
    assert verified.exit_code == 1
    assert json.loads(verified.stdout)[0]["kind"] == "index"

    listed = {one["name"]: one for one in json.loads(run(store, "template", "list", "--json").stdout)}
    assert str(path) in listed[SMALL]["problem"]
    assert listed["other"]["problem"] is None
    assert "damaged" in run(store, "template", "list").stdout
    assert run(store, "diff", "7").exit_code == run(store, "check", "7").exit_code == 0
    assert run(store, "status", "6").exit_code == 0
    assert run(store, "template", "remove", SMALL).exit_code == 5  # it is in use


def test_a_damaged_template_is_removed_and_others_are_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "vz")
    store.create_template("a", str(make_source(tmp_path / "source")))
    write_at(store.layout.template("a").index, 20, b"\xff")
    store.create_template("b", str(tmp_path / "source"))
    store.template("a").remove()
    assert [one.name for one in store.templates()] == ["b"]


# ----------------------------------------------------------------------------------------------- with right checksums


def exercise(index: Index) -> None:
    """All that a reader does."""
    for number in index.walk():
        name = index.name(number)
        assert not number or index.find(index.parent[number], name) == number
        assert index.find_path(index.path(number)) == number
        assert number in index.members(number)
        index.attributes(number)
        index.xattrs(number)
        index.target(number)
        index.entry_out(number)
        if index.is_directory(number):
            for given in range(4):
                index.listing_part(number, given, 1000)
        assert index.find(number, b"nothing") == 0


def test_a_hostile_index_with_right_checksums_is_refused_or_sound(store: Store, tmp_path: Path) -> None:
    """One byte or number is another one, and the checksums fit: what is served then still is a tree."""
    whole = store.layout.template(SMALL).index.read_bytes()
    drawn = random.Random(2)
    started = time.monotonic()
    refused = 0
    for _ in range(FLIPS):
        data = bytearray(whole)
        at = drawn.randrange(HEADER_SIZE, len(whole) - 8)
        if drawn.random() < 0.5:
            data[at] ^= drawn.randrange(1, 256)
        else:
            at &= ~3
            data[at : at + 4] = struct.pack("<I", drawn.choice([0, 1, 2, 70, 0xFFFFFFFF, drawn.randrange(1 << 32)]))
        (tmp_path / "index").write_bytes(reseal(data))
        try:
            index = Index(tmp_path / "index")
            if find_fault(index):
                refused += 1
                continue
        except DamagedError:
            refused += 1
            continue
        assert index.intact()
        exercise(index)
        content_digest(index)
    assert refused > FLIPS // 2
    assert time.monotonic() - started < 120


def column_at(index: Index, name: str, number: int) -> int:
    at = HEADER_SIZE
    for column, code in COLUMNS:
        if column == name:
            return at + number * struct.calcsize(code)
        at += padded(index.count * struct.calcsize(code))
    raise KeyError(name)


def _circle(index: Index) -> tuple[int, bytes]:
    return column_at(index, "parent", 3), struct.pack("<I", index.count - 1)


def _ring(index: Index) -> tuple[int, bytes]:
    leader = next(n for n in range(index.count) if index.next_link[n] > n)
    return column_at(index, "next_link", index.next_link[leader]), struct.pack("<I", index.next_link[leader])


def _node(index: Index) -> tuple[int, bytes]:
    return index.record[5], struct.pack("<Q", index.ino_base + 6)


def _size(index: Index) -> tuple[int, bytes]:
    return index.record[5] + 48, struct.pack("<Q", 1 << 63)


def _mode(index: Index) -> tuple[int, bytes]:
    return index.record[5] + 100, struct.pack("<I", 0o130644)


def _children(index: Index) -> tuple[int, bytes]:
    return column_at(index, "child_count", 0), struct.pack("<I", 0xFFFFFFFF)


def _offset(index: Index) -> tuple[int, bytes]:
    return column_at(index, "record", 2), struct.pack("<Q", index.size)


def _xattr(index: Index) -> tuple[int, bytes]:
    number = next(n for n in range(index.count) if index.has_xattrs(n))
    return index.xattr_at[number] + 2, struct.pack("<I", 0xFFFFFFF0)


@pytest.mark.parametrize("damage", [_circle, _ring, _node, _size, _mode, _children, _offset, _xattr])
def test_what_a_reader_would_follow_is_examined(
    store: Store, damage: Callable[[Index], tuple[int, bytes]], tmp_path: Path
) -> None:
    path = store.layout.template(SMALL).index
    data = bytearray(path.read_bytes())
    at, value = damage(Index(path))
    assert data[at : at + len(value)] != value
    data[at : at + len(value)] = value
    path.write_bytes(reseal(data))
    with pytest.raises(DamagedError, match="index can't be used"):
        open_sealed(store.layout.template(SMALL))
    assert run(store, "template", "verify", SMALL).exit_code == 1
    assert run(store, "mount", "6").exit_code == 9


def test_the_readers_loops_end_without_an_examination(store: Store, tmp_path: Path) -> None:
    path = store.layout.template(SMALL).index
    for damage, read in ((_circle, lambda i: i.path(3)), (_ring, lambda i: [i.members(n) for n in range(i.count)])):
        data = bytearray(path.read_bytes())
        at, value = damage(Index(path))
        data[at : at + len(value)] = value
        (tmp_path / "index").write_bytes(reseal(data))
        with pytest.raises(DamagedError):
            read(Index(tmp_path / "index"))


# ------------------------------------------------------------------------------------------------------- examined once


def test_it_is_examined_once_for_each_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import vzfs.store.seal as module

    paths = store.layout.template(SMALL)
    examined = []
    find = module.find_fault
    monkeypatch.setattr(module, "find_fault", lambda index: examined.append(index) or find(index))
    first = open_sealed(paths).digest
    assert open_sealed(paths).digest == first
    assert len(examined) <= 1
    before = len(examined)
    os.utime(paths.index)  # the change time moves
    assert open_sealed(paths).digest == first
    assert len(examined) == before + 1
    paths.checked.write_text("rubbish")
    assert open_sealed(paths).digest == first
    assert len(examined) == before + 2
    paths.checked.unlink()
    os.mkfifo(paths.checked)
    assert open_sealed(paths).digest == first
    assert len(examined) == before + 3
    assert open_sealed(paths).digest == first
    assert len(examined) == before + 3


@pytest.mark.parametrize("engine", ENGINES)
def test_the_caller_examines_before_the_servers_time_runs(store: Store, engine: str) -> None:
    paths = store.layout.template(SMALL)
    paths.checked.unlink(missing_ok=True)
    with pytest.raises(VzfsError, match="usable"):
        store.container(6).mount(engine=engine, timeout=0)
    assert paths.checked.exists()


def test_verifying_forgets_what_was_noted(store: Store) -> None:
    """A disk that rots changes no times, so the note says that all is well."""
    paths = store.layout.template(SMALL)
    open_sealed(paths)
    info = paths.index.stat()
    note = paths.checked.read_text().split(" ")
    write_at(paths.index, info.st_size - 1, b"\xff")
    note[4] = str(paths.index.stat().st_ctime_ns)
    paths.checked.write_text(" ".join(note))
    open_sealed(paths)
    assert run(store, "template", "verify", SMALL).exit_code == 1
    with pytest.raises(DamagedError, match="checksum"):
        open_sealed(paths)


def test_a_new_template_needs_no_examination_and_a_copied_store_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vzfs.store.seal as module

    store = Store(tmp_path / "vz")
    store.create_template("a", str(make_source(tmp_path / "source")))
    examined = []
    find = module.find_fault
    monkeypatch.setattr(module, "find_fault", lambda index: examined.append(index) or find(index))
    digest = store.template("a").info().digest
    assert examined == []
    assert subprocess.run(["rsync", "-aHAX", f"{tmp_path}/vz/", f"{tmp_path}/copy/"]).returncode == 0
    assert Store(tmp_path / "copy").template("a").info().digest == digest
    assert len(examined) == 1
    shutil.rmtree(tmp_path / "copy")


def test_a_store_that_cannot_be_written_is_served_all_the_same(store: Store, tmp_path: Path) -> None:
    paths = store.layout.template(SMALL)
    paths.checked.unlink(missing_ok=True)
    subprocess.run(["mount", "--bind", paths.meta, paths.meta], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", paths.meta], check=True)
        assert open_sealed(paths).digest.startswith("sha256:")
        assert not paths.checked.exists()
    finally:
        subprocess.run(["umount", paths.meta], check=True)
