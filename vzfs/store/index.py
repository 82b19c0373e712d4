"""The template index: what sealing a template writes and every mount maps.

Rule: written once, never changed; a reader only maps it, so that all containers on a template share its pages.

The file, little-endian throughout, offsets in bytes from its start:

    header            ``_HEADER``, 256 bytes; ``checksum`` is the SHA-256 of all that follows the header, and
                      ``header_crc`` the CRC-32 of the header with that field zero
    columns           one array per property, ``_COLUMNS`` in that order, each with one element per entry
    slots             u32[slot_count]: hash table of names, see below
    meta              JSON object: ``name``, ``source``
    listing           the root's own record, then for each directory the records of its listing
    blobs             link texts, digests, extended attributes

Entries are numbered from 0, the template's root, breadth first; a directory's children are consecutive numbers in the
order of their names' bytes. Columns:

    parent            number of the directory that holds the entry (the root is its own)
    leader            lowest number of the entry's hard link group, itself if it has one name only
    next_link         the next member of that group in ascending order, the last one pointing back to the leader
    first_child       number of a directory's first child; child_count of them follow each other
    child_count
    record            offset of the entry's listing record
    blob, blob_len    directory: its whole listing; symbolic link: its text; regular file: SHA-256 of its content
    xattr, xattr_len  extended attributes: ``u16 name length, u32 value length, name, value`` one after the other

A listing is the ready-made body of a READDIRPLUS answer: for ``.``, ``..`` and each child a ``fuse_direntplus`` (FUSE
protocol 7.9 and later) whose node number is the entry's inode number (0, meaning no look-up, for the two dots), with
lifetimes of ``LIFETIME_S`` seconds and ``off`` counting records from 1. A record's attributes are the entry's
attributes.

The hash table finds the child ``name`` of ``parent``: from slot ``crc32(name, parent) % slot_count`` on, slots hold
entry numbers, 0 meaning empty. After ``PROBES`` slots the search goes on by bisection among the children, so neither
names chosen to collide nor a full neighbourhood make it fail or slow.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from vzfs.errors import DamagedError

MAGIC = b"VZFSIDX\n"
VERSION = 1
INO_START = 1 << 31
"""Inode numbers of template entries begin here: above any a small file system has, and within 32 bits so that programs
without large-file support can still stat them."""
LIFETIME_S = (1 << 31) - 1
"""Seconds that the kernel may cache names and attributes: the mount is the only writer, so nothing goes stale."""
PROBES = 64

_HEADER = struct.Struct("<8sIIIIQQQQQQQQQ32sI")
HEADER_SIZE = 256
_COLUMNS = (
    ("parent", "I"),
    ("leader", "I"),
    ("next_link", "I"),
    ("first_child", "I"),
    ("child_count", "I"),
    ("blob_len", "I"),
    ("xattr_len", "I"),
    ("record", "Q"),
    ("blob", "Q"),
    ("xattr", "Q"),
)
_ENTRY_OUT = struct.Struct("<QQQQII")  # fuse_entry_out without its attributes
_ATTR = struct.Struct("<QQQqqqIIIIIIIIII")  # fuse_attr
_DIRENT = struct.Struct("<QQII")  # fuse_dirent without its name
_NAME_VALID_AT = 16  # seconds for which the name is certain
_ATTR_AT = _ENTRY_OUT.size
_DIRENT_AT = _ATTR_AT + _ATTR.size
_NAME_AT = _DIRENT_AT + _DIRENT.size
_DOT_SIZE = _NAME_AT + 8  # a record of ``.`` or ``..``
_MODE_AT = _ATTR_AT + 60
_XATTR = struct.Struct("<HI")
_NS = 1_000_000_000


class Attributes(NamedTuple):
    """What stat(2) tells of an inode; times in nanoseconds since 1970, ``size`` in bytes, ``blocks`` in 512 bytes."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    blksize: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int

    @staticmethod
    def of(info: os.stat_result, ino: int, nlink: int) -> Attributes:
        """The attributes in ``info`` with other inode and link numbers."""
        return Attributes(
            ino,
            info.st_mode,
            nlink,
            info.st_uid,
            info.st_gid,
            info.st_rdev,
            info.st_size,
            info.st_blocks,
            info.st_blksize,
            info.st_atime_ns,
            info.st_mtime_ns,
            info.st_ctime_ns,
        )


@dataclass(slots=True)
class EntryData:
    """One entry on its way into an index; ``blob`` is the link text or the content's digest."""

    parent: int
    name: bytes
    info: os.stat_result
    blob: bytes = b""
    xattrs: dict[str, bytes] = field(default_factory=dict)
    leader: int = 0
    next_link: int = 0
    links: int = 1
    first_child: int = 0
    child_count: int = 0
    subdirectories: int = 0


@dataclass(frozen=True, slots=True)
class Meta:
    """What an index says about its template as a whole; ``data_size`` in bytes, ``created_ns`` since 1970."""

    name: str
    source: str
    ino_base: int
    created_ns: int
    data_size: int


def pack_xattrs(xattrs: dict[str, bytes]) -> bytes:
    """The stored form of extended attributes, ordered by name."""
    parts = []
    for name, value in sorted(xattrs.items()):
        raw = os.fsencode(name)
        parts.append(_XATTR.pack(len(raw), len(value)) + raw + value)
    return b"".join(parts)


def unpack_xattrs(data: bytes) -> dict[str, bytes]:
    """The reverse of ``pack_xattrs``."""
    result = {}
    at = 0
    while at < len(data):
        name_len, value_len = _XATTR.unpack_from(data, at)
        at += _XATTR.size
        result[os.fsdecode(data[at : at + name_len])] = data[at + name_len : at + name_len + value_len]
        at += name_len + value_len
    return result


# ---------------------------------------------------------------------------------------------------------- writing


class _Listing:
    """Collects listing records and remembers where each entry's own one lies."""

    def __init__(self, entries: Sequence[EntryData], ino_base: int) -> None:
        self._entries = entries
        self._ino_base = ino_base
        self._parts: list[bytes] = []
        self.size = 0
        self.records = [0] * len(entries)
        self.spans = [(0, 0)] * len(entries)

    def build(self) -> bytes:
        self.records[0] = self._add(0, b"", self._ino_base, 0)
        for number, entry in enumerate(self._entries):
            if stat.S_ISDIR(entry.info.st_mode):
                self.spans[number] = self._add_directory(number, entry)
        return b"".join(self._parts)

    def _add_directory(self, number: int, entry: EntryData) -> tuple[int, int]:
        start = self.size
        self._add(number, b".", 0, 1)
        self._add(entry.parent, b"..", 0, 2)
        for position, child in enumerate(range(entry.first_child, entry.first_child + entry.child_count), 3):
            node = self._ino_base + self._entries[child].leader
            self.records[child] = self._add(child, self._entries[child].name, node, position)
        return start, self.size - start

    def _add(self, number: int, name: bytes, node: int, position: int) -> int:
        at = self.size
        entry = self._entries[number]
        info = entry.info
        ino = self._ino_base + entry.leader
        record = b"".join(
            (
                _ENTRY_OUT.pack(node, 0, LIFETIME_S, LIFETIME_S, 0, 0),
                _ATTR.pack(
                    ino,
                    info.st_size,
                    info.st_blocks,
                    info.st_atime_ns // _NS,
                    info.st_mtime_ns // _NS,
                    info.st_ctime_ns // _NS,
                    info.st_atime_ns % _NS,
                    info.st_mtime_ns % _NS,
                    info.st_ctime_ns % _NS,
                    info.st_mode,
                    2 + entry.subdirectories if stat.S_ISDIR(info.st_mode) else entry.links,
                    info.st_uid,
                    info.st_gid,
                    info.st_rdev & 0xFFFFFFFF,
                    info.st_blksize,
                    0,
                ),
                _DIRENT.pack(ino, position, len(name), stat.S_IFMT(info.st_mode) >> 12),
                name,
                b"\0" * (-len(name) % 8),
            )
        )
        self._parts.append(record)
        self.size += len(record)
        return at


def link_groups(entries: Sequence[EntryData]) -> None:
    """Fill in children, hard link groups and counts of ``entries``, whose parents, names and attributes are known."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, entry in enumerate(entries):
        entry.leader = entry.next_link = number
        if number:
            parent = entries[entry.parent]
            parent.first_child = parent.first_child or number
            parent.child_count += 1
            parent.subdirectories += stat.S_ISDIR(entry.info.st_mode)
        if entry.info.st_nlink > 1 and not stat.S_ISDIR(entry.info.st_mode):
            groups.setdefault((entry.info.st_dev, entry.info.st_ino), []).append(number)
    for members in groups.values():
        for position, number in enumerate(members):
            entries[number].leader = members[0]
            entries[number].next_link = members[(position + 1) % len(members)]
            entries[number].links = len(members)


def _hash_slots(entries: Sequence[EntryData]) -> list[int]:
    count = 1 << max(4, (2 * len(entries) - 1).bit_length())
    slots = [0] * count
    for number in range(1, len(entries)):
        at = zlib.crc32(entries[number].name, entries[number].parent)
        for probe in range(PROBES):
            slot = (at + probe) % count
            if not slots[slot]:
                slots[slot] = number
                break
    return slots


def write_index(file: BinaryIO, entries: Sequence[EntryData], meta: Meta) -> None:
    """Write the index of ``entries`` (numbered by position, ``link_groups`` applied) to the empty seekable ``file``."""
    listing = _Listing(entries, meta.ino_base)
    listing_bytes = listing.build()
    slots = _hash_slots(entries)
    meta_bytes = json.dumps({"name": meta.name, "source": meta.source}).encode()
    meta_bytes += b" " * (-len(meta_bytes) % 8)
    columns_size = sum(_padded(len(entries) * struct.calcsize(code)) for _, code in _COLUMNS)
    slots_at = HEADER_SIZE + columns_size
    meta_at = slots_at + 4 * len(slots)
    listing_at = meta_at + len(meta_bytes)
    blobs_at = listing_at + len(listing_bytes)

    columns: dict[str, list[int]] = {name: [] for name, _ in _COLUMNS}
    blobs: list[bytes] = []
    at = blobs_at
    for number, entry in enumerate(entries):
        start, length = listing.spans[number]
        columns["parent"].append(entry.parent)
        columns["leader"].append(entry.leader)
        columns["next_link"].append(entry.next_link)
        columns["first_child"].append(entry.first_child)
        columns["child_count"].append(entry.child_count)
        columns["record"].append(listing_at + listing.records[number])
        if stat.S_ISDIR(entry.info.st_mode):
            columns["blob"].append(listing_at + start)
            columns["blob_len"].append(length)
        else:
            columns["blob"].append(at)
            columns["blob_len"].append(len(entry.blob))
            blobs.append(entry.blob)
            at += len(entry.blob)
        packed = pack_xattrs(entry.xattrs)
        columns["xattr"].append(at)
        columns["xattr_len"].append(len(packed))
        blobs.append(packed)
        at += len(packed)

    digest = hashlib.sha256()
    file.seek(HEADER_SIZE)

    def put(data: bytes) -> None:
        digest.update(data)
        file.write(data)

    for name, code in _COLUMNS:
        data = struct.pack(f"<{len(entries)}{code}", *columns[name])
        put(data + b"\0" * (-len(data) % 8))
    put(struct.pack(f"<{len(slots)}I", *slots))
    put(meta_bytes)
    put(listing_bytes)
    put(b"".join(blobs))

    def header(crc: int) -> bytes:
        return _HEADER.pack(
            MAGIC,
            VERSION,
            0,
            len(entries),
            len(slots),
            meta.ino_base,
            meta.created_ns,
            meta.data_size,
            slots_at,
            meta_at,
            len(meta_bytes),
            listing_at,
            blobs_at,
            at,
            digest.digest(),
            crc,
        ).ljust(HEADER_SIZE, b"\0")

    file.seek(0)
    file.write(header(zlib.crc32(header(0))))
    file.flush()


def _padded(size: int) -> int:
    return size + -size % 8


# ---------------------------------------------------------------------------------------------------------- reading


class Index:
    """A mapped template index. Entry numbers given to its methods must be below ``count``.

    Raises ``DamagedError`` when the file is not a whole index of this version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = os.fspath(path)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < HEADER_SIZE:
                raise self._damaged("it is too short")
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        (
            magic,
            version,
            _,
            self.count,
            slot_count,
            ino_base,
            created_ns,
            data_size,
            slots_at,
            meta_at,
            meta_len,
            _,
            _,
            file_size,
            self._checksum,
            crc,
        ) = _HEADER.unpack_from(self._map)
        if magic != MAGIC:
            raise self._damaged("it is not a vzfs index")
        if version != VERSION:
            raise self._damaged(f"it has format version {version}, this vzfs reads {VERSION}")
        raw = self._map[: _HEADER.size - 4] + b"\0" * 4 + self._map[_HEADER.size : HEADER_SIZE]
        if zlib.crc32(raw) != crc or file_size != size or not self.count:
            raise self._damaged("its header is damaged or the file is cut short")
        view = self._view = memoryview(self._map)
        columns: dict[str, memoryview] = {}
        at = HEADER_SIZE
        for name, code in _COLUMNS:
            length = self.count * struct.calcsize(code)
            columns[name] = view[at : at + length].cast(code)  # type: ignore[call-overload]
            at += _padded(length)
        self.parent = columns["parent"]
        self.leader = columns["leader"]
        self.next_link = columns["next_link"]
        self.first_child = columns["first_child"]
        self.child_count = columns["child_count"]
        self._blob_len = columns["blob_len"]
        self._xattr_len = columns["xattr_len"]
        self._record = columns["record"]
        self._blob = columns["blob"]
        self._xattr = columns["xattr"]
        self._slots = view[slots_at : slots_at + 4 * slot_count].cast("I")
        self._mask = slot_count - 1
        self._words = view[: size & ~3].cast("I")
        self.ino_base: int = ino_base
        try:
            about = json.loads(self._map[meta_at : meta_at + meta_len])
            self.meta = Meta(about["name"], about["source"], ino_base, created_ns, data_size)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged("what it says of its template is damaged") from error

    def _damaged(self, why: str) -> DamagedError:
        return DamagedError(f"{self._file} can't be used: {why}", remedy="create the template again from its source")

    @property
    def size(self) -> int:
        """Bytes of the index file."""
        return len(self._map)

    def intact(self) -> bool:
        """Whether the whole file still has the checksum it was written with; reads all of it."""
        checksum: bytes = self._checksum
        return hashlib.sha256(self._view[HEADER_SIZE:]).digest() == checksum

    def find(self, parent: int, name: bytes) -> int:
        """Number of the entry ``name`` in directory ``parent``, or 0 when there is none."""
        slots, mask, parents = self._slots, self._mask, self.parent
        at = zlib.crc32(name, parent)
        for probe in range(at, at + PROBES):
            number: int = slots[probe & mask]
            if not number:
                return 0
            if parents[number] == parent:
                start = self._record[number] + _NAME_AT
                length = len(name)
                if self._map[start : start + length] == name and self._words[(start - 8) >> 2] == length:
                    return number
        return self._bisect(parent, name)

    def _bisect(self, parent: int, name: bytes) -> int:
        low: int = self.first_child[parent]
        end = high = low + self.child_count[parent]
        while low < high:
            middle = (low + high) // 2
            if self.name(middle) < name:
                low = middle + 1
            else:
                high = middle
        return low if low < end and self.name(low) == name else 0

    def find_path(self, path: bytes) -> int | None:
        """Number of the entry at ``path`` below the template's root (``b""`` is the root), or ``None``."""
        number = 0
        for part in path.split(b"/") if path else ():
            number = self.find(number, part)
            if not number:
                return None
        return number

    def name(self, number: int) -> bytes:
        """The entry's name; empty for the root."""
        at: int = self._record[number] + _NAME_AT
        return self._map[at : at + self._words[(at - 8) >> 2]]

    def path(self, number: int) -> bytes:
        """The entry's path below the template's root, without leading slash."""
        parts = []
        while number:
            parts.append(self.name(number))
            number = self.parent[number]
        return b"/".join(reversed(parts))

    def children(self, number: int) -> range:
        """Numbers of a directory's children in the order of their names."""
        first: int = self.first_child[number]
        return range(first, first + self.child_count[number])

    def mode(self, number: int) -> int:
        """The entry's ``st_mode``."""
        mode: int = self._words[(self._record[number] + _MODE_AT) >> 2]
        return mode

    def is_directory(self, number: int) -> bool:
        """Whether the entry is a directory."""
        return stat.S_ISDIR(self.mode(number))

    def attributes(self, number: int) -> Attributes:
        """What stat tells of the entry."""
        (
            ino,
            size,
            blocks,
            atime,
            mtime,
            ctime,
            atime_nsec,
            mtime_nsec,
            ctime_nsec,
            mode,
            nlink,
            uid,
            gid,
            rdev,
            blksize,
            _,
        ) = _ATTR.unpack_from(self._map, self._record[number] + _ATTR_AT)
        return Attributes(
            ino,
            mode,
            nlink,
            uid,
            gid,
            rdev,
            size,
            blocks,
            blksize,
            atime * _NS + atime_nsec,
            mtime * _NS + mtime_nsec,
            ctime * _NS + ctime_nsec,
        )

    def attributes_out(self, number: int) -> bytes:
        """The entry's attributes as the 88 bytes of a ``fuse_attr``."""
        at: int = self._record[number] + _ATTR_AT
        return self._map[at : at + _ATTR.size]

    def entry_out(self, number: int) -> bytes:
        """The ready-made answer to a look-up of the entry: the 128 bytes of a ``fuse_entry_out``."""
        at: int = self._record[number]
        return self._map[at : at + _DIRENT_AT]

    def listing(self, number: int) -> memoryview:
        """The ready-made body of a directory's READDIRPLUS answer."""
        at: int = self._blob[number]
        return self._view[at : at + self._blob_len[number]]

    def listing_part(self, number: int, given: int, size: int) -> memoryview:
        """As many whole records of a directory's listing as fit into ``size`` bytes, after the first ``given`` ones."""
        at, end = self._listing_span(number, given, size)
        return self._view[at:end]

    def listing_part_unsure(self, number: int, given: int, size: int, unsure: Sequence[int]) -> bytearray | memoryview:
        """The same where the names of the entries ``unsure``, in ascending order, are certain for no time."""
        at, end = self._listing_span(number, given, size)
        part = self._view[at:end]
        first: int = self.first_child[number]
        begin = bisect.bisect_left(unsure, first)
        patched = None
        for entry in unsure[begin : bisect.bisect_left(unsure, first + self.child_count[number], begin)]:
            record: int = self._record[entry]
            if at <= record < end:
                patched = patched or bytearray(part)
                patched[record - at + _NAME_VALID_AT : record - at + _NAME_VALID_AT + 8] = bytes(8)
        return patched or part

    def entry_out_unsure(self, number: int) -> bytes:
        """``entry_out`` with a name that is certain for no time."""
        ready = self.entry_out(number)
        return ready[:_NAME_VALID_AT] + bytes(8) + ready[_NAME_VALID_AT + 8 :]

    def _listing_span(self, number: int, given: int, size: int) -> tuple[int, int]:
        start: int = self._blob[number]
        end = start + self._blob_len[number]
        first: int = self.first_child[number]
        beyond = first + self.child_count[number]
        child = first + max(given - 2, 0)
        at = start + given * _DOT_SIZE
        if given >= 2:
            at = self._record[child] if child < beyond else end
        if end - at > size:
            after = bisect.bisect_right(self._record, at + size, child, beyond)
            # Up to the last record that begins within the space, for that one may end outside; or as many dots as fit.
            end = self._record[after - 1] if after > child else at + size // _DOT_SIZE * _DOT_SIZE
        return at, end

    def target(self, number: int) -> bytes:
        """Text of a symbolic link."""
        at: int = self._blob[number]
        return self._map[at : at + self._blob_len[number]]

    def digest(self, number: int) -> bytes:
        """SHA-256 of a regular file's content."""
        return self.target(number)

    def has_xattrs(self, number: int) -> bool:
        """Whether the entry has any extended attribute."""
        return bool(self._xattr_len[number])

    def xattrs(self, number: int) -> dict[str, bytes]:
        """The entry's extended attributes, POSIX ACLs and capabilities among them."""
        length: int = self._xattr_len[number]
        if not length:
            return {}
        at: int = self._xattr[number]
        return unpack_xattrs(self._map[at : at + length])

    def members(self, number: int) -> list[int]:
        """All entries of the hard link group of ``number``, in ascending order."""
        leader: int = self.leader[number]
        result = [leader]
        while self.next_link[result[-1]] != leader:
            result.append(self.next_link[result[-1]])
        return result

    def walk(self) -> Iterator[int]:
        """Numbers of all entries, parents before children, in the order of a sorted depth-first listing."""
        stack = [0]
        while stack:
            number = stack.pop()
            yield number
            if self.is_directory(number):
                stack.extend(reversed(self.children(number)))
