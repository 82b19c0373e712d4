"""docs/format.md is exact: what vzfs writes is read here as that page says, by a reader that uses nothing of vzfs.

Rule: the reader repeats the page's tables; where one of both changes, the other must.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from vzfs import Container, Store, Template
from vzfs.store.index import Index
from vzfs.store.sources import SourceOptions

# ---------------------------------------------------------------------------------------- the index, as the page has it

COLUMNS = (
    ("parent", 4),
    ("leader", 4),
    ("next_link", 4),
    ("first_child", 4),
    ("child_count", 4),
    ("blob_len", 4),
    ("xattr_len", 4),
    ("record", 8),
    ("blob", 8),
    ("xattr", 8),
)


class PageIndex:
    """An index read as docs/format.md says."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        assert data[:8] == b"VZFSIDX\n"
        self.version, zero, self.count, self.slot_count = struct.unpack("<4I", data[8:24])
        (
            self.ino_base,
            self.created_ns,
            self.data_size,
            self.slots_at,
            self.meta_at,
            self.meta_len,
            self.listing_at,
            self.blobs_at,
            self.file_size,
        ) = struct.unpack("<9Q", data[24:96])
        self.checksum = data[96:128]
        (self.header_crc,) = struct.unpack("<I", data[128:132])
        assert zero == 0
        assert data[132:256] == bytes(124)
        self.column: dict[str, list[int]] = {}
        at = 256
        for name, size in COLUMNS:
            letter = {4: "I", 8: "Q"}[size]
            self.column[name] = list(struct.unpack_from(f"<{self.count}{letter}", data, at))
            at += -(-self.count * size // 8) * 8
        assert at == self.slots_at
        self.slots = struct.unpack_from(f"<{self.slot_count}I", data, self.slots_at)
        self.meta = json.loads(data[self.meta_at : self.meta_at + self.meta_len])

    def record(self, at: int) -> dict[str, Any]:
        """The listing record at offset ``at``; ``end`` is the offset of the next one."""
        node, generation, *lifetimes = struct.unpack_from("<4Q2I", self.data, at)
        ino, size, blocks = struct.unpack_from("<3Q", self.data, at + 40)
        seconds = struct.unpack_from("<3q", self.data, at + 64)
        nanoseconds = struct.unpack_from("<3I", self.data, at + 88)
        mode, nlink, uid, gid, rdev, blksize, zero = struct.unpack_from("<7I", self.data, at + 100)
        ino_again, position, name_len, kind = struct.unpack_from("<2Q2I", self.data, at + 128)
        assert generation == zero == 0
        assert lifetimes == [2147483647, 2147483647, 0, 0]
        assert ino_again == ino
        assert kind == mode >> 12
        end = at + 152 + -(-name_len // 8) * 8
        name = self.data[at + 152 : at + 152 + name_len]
        assert self.data[at + 152 + name_len : end] == bytes(end - at - 152 - name_len)
        times = [second * 10**9 + nanosecond for second, nanosecond in zip(seconds, nanoseconds, strict=True)]
        return {
            "node": node,
            "position": position,
            "name": name,
            "end": end,
            "attributes": (ino, mode, nlink, uid, gid, rdev, size, blocks, blksize, *times),
        }

    def entry(self, number: int) -> dict[str, Any]:
        """The entry's own record."""
        return self.record(self.column["record"][number])

    def blob(self, number: int) -> bytes:
        """What ``blob`` and ``blob_len`` say."""
        at = self.column["blob"][number]
        return self.data[at : at + self.column["blob_len"][number]]

    def xattrs(self, number: int) -> dict[bytes, bytes]:
        """The entry's extended attributes."""
        at, found = self.column["xattr"][number], {}
        end = at + self.column["xattr_len"][number]
        while at < end:
            name_len, value_len = struct.unpack_from("<HI", self.data, at)
            at += 6
            found[self.data[at : at + name_len]] = self.data[at + name_len : at + name_len + value_len]
            at += name_len + value_len
        assert list(found) == sorted(found)
        return found

    def find(self, parent: int, name: bytes) -> int:
        """The child ``name`` of ``parent``, 0 for none."""
        slot = zlib.crc32(name, parent) % self.slot_count
        for _ in range(64):
            number = self.slots[slot]
            if number == 0:
                return 0
            if self.column["parent"][number] == parent and self.entry(number)["name"] == name:
                return number
            slot = (slot + 1) % self.slot_count
        first = self.column["first_child"][parent]
        low, high = first, first + self.column["child_count"][parent]
        while low < high:
            middle = (low + high) // 2
            if self.entry(middle)["name"] < name:
                low = middle + 1
            else:
                high = middle
        found = low < first + self.column["child_count"][parent] and self.entry(low)["name"] == name
        return low if found else 0


# ------------------------------------------------------------------------------------------------------------- fixtures


def make_source(top: Path) -> None:
    """A tree with every type, link groups, extended attributes, odd names and times before 1970."""
    (top / "etc").mkdir()
    (top / "etc/motd").write_bytes(b"hello\n")
    (top / "etc/empty").write_bytes(b"")
    (top / "usr/bin").mkdir(parents=True)
    (top / "usr/lib").mkdir()
    (top / "usr/bin/perl").write_bytes(b"#!" * 5000)
    os.link(top / "usr/bin/perl", top / "usr/bin/perl5")
    os.link(top / "usr/bin/perl", top / "usr/lib/perl")
    (top / "bin").symlink_to("usr/bin")
    (top / "magic").symlink_to("//vz/template/x/etc")
    os.mkfifo(top / "fifo", 0o640)
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.setxattr(top / "etc/motd", "user.colour", b"red\0blue")
    os.setxattr(top / "etc/motd", "user.a", b"")
    os.chown(top / "etc/empty", 1000, 65534)
    os.chmod(top / "usr/bin/perl", 0o4711)
    os.utime(top / "etc/empty", ns=(-1, -1_500_000_001))
    odd = os.fsencode(top) + b"/odd"
    os.mkdir(odd)
    for name in (b"\xff\xfe", b"a" * 255, b"new\nline", b"\\", b" "):
        Path(os.fsdecode(odd + b"/" + name)).write_bytes(name)
    many = top / "many"
    many.mkdir()
    for number in range(600):
        (many / f"{number}").touch()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    top = tmp_path_factory.mktemp("format")
    source = top / "source"
    source.mkdir()
    make_source(source)
    return Store(top / "store").create_template("x", str(source), SourceOptions())


@pytest.fixture(scope="module")
def page(template: Template) -> PageIndex:
    return PageIndex((template.path.parent / ".vzfs" / template.name / "index").read_bytes())


@pytest.fixture(scope="module")
def index(template: Template) -> Index:
    return Index(template.path.parent / ".vzfs" / template.name / "index")


# ---------------------------------------------------------------------------------------------------------------- index


def test_header_is_as_documented(page: PageIndex, template: Template) -> None:
    info = template.info()
    assert page.version == 1
    assert page.count == info.entries
    assert page.ino_base == info.ino_base
    assert page.ino_base >= 1 << 31
    assert page.ino_base % (1 << 16) == 0
    assert page.created_ns / 1e9 == pytest.approx(info.created)
    assert page.data_size == info.size
    assert page.file_size == len(page.data)
    assert page.slot_count >= max(16, 2 * page.count)
    assert page.slot_count & (page.slot_count - 1) == 0
    assert page.slots_at + 4 * page.slot_count == page.meta_at
    assert page.meta_at + page.meta_len == page.listing_at
    assert page.listing_at % 8 == 0
    assert page.meta["name"] == "x"
    assert page.meta["source"] == info.source


def test_checksums_are_as_documented(page: PageIndex) -> None:
    assert hashlib.sha256(page.data[256:]).digest() == page.checksum
    assert zlib.crc32(page.data[:128] + bytes(4) + page.data[132:256]) == page.header_crc


def test_entries_are_what_the_index_says(page: PageIndex, index: Index) -> None:
    for number in range(page.count):
        entry = page.entry(number)
        assert entry["attributes"] == tuple(index.attributes(number))
        assert entry["name"] == index.name(number)
        assert {os.fsdecode(name): value for name, value in page.xattrs(number).items()} == index.xattrs(number)


def test_entries_are_what_lies_in_the_template(page: PageIndex, template: Template) -> None:
    top = os.fsencode(template.path)
    paths = {0: top}
    seen = 0
    for number in range(page.count):
        path = paths[number]
        info = os.lstat(path)
        ino, mode, nlink, uid, gid, rdev, size, _, _, _, mtime, _ = page.entry(number)["attributes"]
        assert ino == page.ino_base + page.column["leader"][number]
        assert (mode, uid, gid, rdev, mtime) == (info.st_mode, info.st_uid, info.st_gid, info.st_rdev, info.st_mtime_ns)
        assert nlink == info.st_nlink
        if stat.S_ISDIR(mode):
            children = sorted(map(os.fsencode, os.listdir(path)))
            first, count = page.column["first_child"][number], page.column["child_count"][number]
            assert [page.entry(child)["name"] for child in range(first, first + count)] == children
            assert all(page.column["parent"][child] == number for child in range(first, first + count))
            paths |= {child: path + b"/" + name for child, name in enumerate(children, first)}
        elif stat.S_ISLNK(mode):
            assert page.blob(number) == os.readlink(path)
        elif stat.S_ISREG(mode):
            assert size == info.st_size
            assert page.blob(number) == hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).digest()
        else:
            assert page.blob(number) == b""
        seen += 1
    assert seen == 1 + sum(len(folders) + len(files) for _, folders, files in os.walk(top))


def test_listings_are_ready_made_answers(page: PageIndex) -> None:
    at = page.record(page.listing_at)["end"]  # the root's own record
    assert page.column["record"][0] == page.listing_at
    for number in range(page.count):
        if not stat.S_ISDIR(page.entry(number)["attributes"][1]):
            continue
        assert page.column["blob"][number] == at
        end = at + page.column["blob_len"][number]
        records = []
        while at < end:
            records.append((at, page.record(at)))
            at = records[-1][1]["end"]
        assert at == end
        assert [record["position"] for _, record in records] == list(range(1, len(records) + 1))
        (_, dot), (_, dots), *children = records
        assert (dot["name"], dots["name"]) == (b".", b"..")
        assert dot["node"] == dots["node"] == 0
        assert dot["attributes"] == page.entry(number)["attributes"]
        assert dots["attributes"] == page.entry(page.column["parent"][number])["attributes"]
        first = page.column["first_child"][number]
        assert [at for at, _ in children] == page.column["record"][first : first + len(children)]
        assert all(child["node"] == child["attributes"][0] for _, child in children)
    assert at == page.blobs_at


def test_every_name_is_found_and_no_other(page: PageIndex, index: Index) -> None:
    for number in range(1, page.count):
        parent, name = page.column["parent"][number], page.entry(number)["name"]
        assert page.find(parent, name) == number == index.find(parent, name)
        assert page.find(parent, name + b"x") == index.find(parent, name + b"x")


def test_link_groups_are_rings(page: PageIndex) -> None:
    leader = page.find(page.find(page.find(0, b"usr"), b"bin"), b"perl")
    ring = [leader]
    while page.column["next_link"][ring[-1]] != leader:
        ring.append(page.column["next_link"][ring[-1]])
    assert ring == sorted(ring)
    assert sorted(page.entry(number)["name"] for number in ring) == [b"perl", b"perl", b"perl5"]
    assert {page.column["leader"][number] for number in ring} == {leader}
    alone = page.find(page.find(0, b"etc"), b"motd")
    assert page.column["next_link"][alone] == page.column["leader"][alone] == alone


def printable(data: bytes) -> str:
    """As the page writes names and texts."""
    return "".join(chr(byte) if 0x21 <= byte <= 0x7E and byte != 0x5C else f"\\x{byte:02x}" for byte in data)


def content_line(page: PageIndex, number: int, paths: dict[int, str]) -> str:
    _, mode, _, uid, gid, rdev, size, _, _, _, mtime, _ = page.entry(number)["attributes"]
    line = f"{paths[number] or '/'} {mode:06o} uid={uid} gid={gid} mtime={mtime // 10**9}.{mtime % 10**9:09d}"
    if stat.S_ISREG(mode):
        line += f" size={size} sha256={page.blob(number).hex()}"
    elif stat.S_ISLNK(mode):
        line += f" target={printable(page.blob(number))}"
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        line += f" rdev={os.major(rdev)}:{os.minor(rdev)}"
    leader = page.column["leader"][number]
    if leader != number:
        path, above = "", leader
        while above:
            path = f"/{printable(page.entry(above)['name'])}{path}"
            above = page.column["parent"][above]
        line += f" link={path}"
    for name, value in sorted(page.xattrs(number).items()):
        line += f" xattr:{printable(name)}={value.hex()}"
    return line


def test_the_digest_is_as_documented(page: PageIndex, template: Template) -> None:
    lines = ["vzfs-template 1"]
    paths = {0: ""}
    waiting = [0]
    while waiting:
        number = waiting.pop()
        lines.append(content_line(page, number, paths))
        first, count = page.column["first_child"][number], page.column["child_count"][number]
        for child in range(first, first + count):
            paths[child] = f"{paths[number]}/{printable(page.entry(child)['name'])}"
        waiting += reversed(range(first, first + count))
    text = "".join(line + "\n" for line in lines)
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    assert template.info().digest == digest
    assert len(lines) == page.count + 1

    index = template.path.parent / ".vzfs/x/index"
    info = index.stat()
    note = f"vzfs-checked 1 {info.st_dev} {info.st_ino} {info.st_ctime_ns} {info.st_size} {digest}\n"
    assert (index.parent / "checked").read_text() == note


def test_link_farm_is_as_documented(page: PageIndex, template: Template) -> None:
    links = template.path.parent / ".vzfs" / "x" / "links"
    for number in range(1, page.count):
        path, above = page.entry(number)["name"], page.column["parent"][number]
        while above:
            path, above = page.entry(above)["name"] + b"/" + path, page.column["parent"][above]
        assert os.readlink(os.fsencode(links / str(number // 4096) / str(number))) == b"//vz/template/x/" + path


# --------------------------------------------------------------------------------------------------------- private area


@pytest.fixture(scope="module")
def changed(template: Template) -> Container:
    """A container in which one of each kind of change was made."""
    container = template.store.create(1, template="x")
    with container.mounted() as root:
        os.chmod(root / "etc/motd", 0o4755)
        os.utime(root / "etc/motd", ns=(-1_500_000_000, -500_000_000))
        os.setxattr(root / "etc/motd", "user.colour", b"green")
        (root / "usr/lib/perl").write_bytes(b"new")
        os.unlink(root / "usr/bin/perl5")
        (root / "etc/own").write_bytes(b"own")
        (root / "magic2").symlink_to("//vz/template/x/etc")
        (root / "long").symlink_to("//vz/template/" + "x" * 4081)
        (root / "etc/empty").rename(root / "odd/moved")
        os.link(root / "etc/motd", root / "odd/motd2")
        os.mkdir(root / "odd/made")
        os.rename(root / "many", root / "odd/many")
    return container


def xattr(path: Path, name: str) -> bytes | None:
    """The attribute ``name`` of ``path`` itself, ``None`` if it has none."""
    if name not in os.listxattr(path, follow_symlinks=False):
        return None
    return os.getxattr(path, name, follow_symlinks=False)


def test_store_folders_are_closed(changed: Container) -> None:
    root = changed.store.root
    closed = [root / "template", root / "template/.vzfs", root / "private", root / "root", changed.path]
    for folder in [*closed, changed.path / "cow", changed.path / "dump"]:
        info = folder.stat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o700, 0, 0), folder


def test_an_unchanged_directory_is_one_link_shared_with_the_farm(changed: Container, template: Template) -> None:
    fresh = template.store.create(2, template="x")
    link = fresh.path / "private/usr"
    assert os.readlink(link) == "//vz/template/x/usr"
    assert link.lstat().st_nlink > 1
    fresh.destroy()


def test_an_unfolded_directory_has_its_origin(changed: Container, page: PageIndex) -> None:
    area = changed.path / "private"
    etc = page.find(0, b"etc")
    assert xattr(area / "etc", "trusted.vzfs.origin") == b"x/%d" % etc
    assert sorted(os.listdir(area / "etc")) == ["motd", "own"]
    assert xattr(area / "etc/own", "trusted.vzfs.origin") is None


def test_changed_attributes_are_a_record_of_their_group(changed: Container, page: PageIndex) -> None:
    """A second name made the file a link group of its own, so its attributes moved to the record."""
    motd = page.find(page.find(0, b"etc"), b"motd")
    area = changed.path / "private"
    assert os.readlink(area / "etc/motd") == os.readlink(area / "odd/motd2") == "//vz/template/x/etc/motd"
    record = changed.path / f"cow/links/x:{motd}"
    assert os.readlink(record) == "//vz/template/x/etc/motd"
    words = (xattr(record, "trusted.vzfs.attr") or b"").decode().split(" ")
    assert sorted(words) == ["atime=-2.500000000", "mode=4755", "mtime=-1.500000000", "xattrs=own"]
    assert re.fullmatch(
        r"((mode=[0-7]{1,4}|uid=\d+|gid=\d+|[am]time=-?\d+\.\d{9}|xattrs=own)( (?!$)|$))*", " ".join(words)
    )
    assert xattr(record, "trusted.vzfs.x.user.colour") == b"green"
    assert xattr(record, "trusted.vzfs.x.user.a") == b""
    assert xattr(record, "trusted.vzfs.nlink") == b"2"


def test_a_changed_link_group_is_one_record(changed: Container, page: PageIndex) -> None:
    leader = page.find(page.find(page.find(0, b"usr"), b"bin"), b"perl")
    record = changed.path / f"cow/links/x:{leader}"
    assert record.read_bytes() == b"new"
    assert stat.S_ISREG(record.lstat().st_mode)
    assert xattr(record, "trusted.vzfs.nlink") == b"2"
    assert xattr(record, "trusted.vzfs.origin") == b"x/%d" % leader
    assert os.readlink(changed.path / "private/usr/bin/perl") == "//vz/template/x/usr/bin/perl"


def test_own_links_are_escaped(changed: Container) -> None:
    area = changed.path / "private"
    assert os.readlink(area / "magic2") == "///vz/template/x/etc"
    stored = os.readlink(os.fsencode(area / "long"))
    assert len(stored) == 4095
    assert stored == b"///vz/template/" + b"x" * 4080
    assert xattr(area / "long", "trusted.vzfs.tail") == b"x"


def test_a_moved_entry_is_the_same_link(changed: Container) -> None:
    area = changed.path / "private"
    assert os.readlink(area / "odd/moved") == "//vz/template/x/etc/empty"
    assert os.readlink(area / "odd/many") == "//vz/template/x/many"
    assert xattr(area / "odd", "trusted.vzfs.folds") == b"1"
    assert xattr(area / "odd/made", "trusted.vzfs.origin") is None


def test_conf_and_lock_are_as_documented(changed: Container) -> None:
    lines = (changed.path / "conf").read_text().splitlines()
    assert 'OSTEMPLATE="x"' in lines
    assert 'TEMPLATES="x"' in lines
    assert f'OSTEMPLATE_DIGEST="{changed.store.template("x").info().digest}"' in lines
    assert (changed.path / "lock").read_bytes() == b""
    with changed.mounted() as root:
        text = (changed.path / "lock").read_bytes()
        assert text.endswith(b"\n")
        holder = json.loads(text)
    assert set(holder) >= {"pid", "doing", "since", "mountpoint", "engine", "read_only"}
    assert (holder["doing"], holder["mountpoint"], holder["read_only"]) == ("serves", str(root), False)


def test_a_container_elsewhere_is_noted_with_its_template(template: Template, tmp_path: Path) -> None:
    path = tmp_path / "ve/104"
    container = template.store.create(path, template="x")
    key = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    assert os.readlink(template.path.parent / ".vzfs/x/users" / key) == str(path)
    container.destroy()


def test_the_page_names_every_attribute_that_is_written(changed: Container) -> None:
    page = (Path(__file__).parents[1] / "docs/format.md").read_text()
    found = set()
    for folder, folders, files in os.walk(changed.path):
        for path in (Path(folder) / name for name in [*folders, *files]):
            found |= {name for name in os.listxattr(path, follow_symlinks=False) if name.startswith("trusted.vzfs.")}
    plain = {re.sub(r"(trusted\.vzfs\.x\.).*", r"\1", name) for name in found}
    assert plain == {f"trusted.vzfs.{name}" for name in ("origin", "attr", "x.", "nlink", "folds", "tail")}
    assert all(f"`{name}" in page for name in plain)


def test_a_container_copied_to_another_store_means_the_same(changed: Container, tmp_path: Path) -> None:
    if shutil.which("rsync") is None:
        pytest.fail("rsync is missing")
    other = Store(tmp_path / "other")
    other.create_template("x", str(changed.store.template("x").path))
    assert os.spawnlp(os.P_WAIT, "rsync", "rsync", "-aHAX", f"{changed.path}/", f"{tmp_path}/copy/") == 0
    copy = other.container(tmp_path / "copy")
    with copy.mounted() as root:
        assert (root / "etc/motd").stat().st_mode == 0o104755
        assert os.getxattr(root / "etc/motd", "user.colour") == b"green"
        assert (root / "usr/bin/perl").read_bytes() == b"new"
        assert (root / "usr/bin/perl").stat().st_ino == (root / "usr/lib/perl").stat().st_ino
        assert os.readlink(root / "long") == "//vz/template/" + "x" * 4081
