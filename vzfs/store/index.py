"""The template index: what sealing a template writes and every mount maps.

Rule: written once, never changed; a reader only maps it, so that all containers on a template share its pages.

The file, little-endian throughout, offsets in bytes from its start:

    header            ``HEADER``, 256 bytes; ``checksum`` is the SHA-256 of all that follows the header, and
                      ``header_crc`` the CRC-32 of the header with that field zero
    columns           one array per property, ``COLUMNS`` in that order, each with one element per entry
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
from dataclasses import dataclass
from typing import NamedTuple

from vzfs.errors import DamagedError
from vzfs.store.noted import identity_of

MAGIC = b"VZFSIDX\n"
VERSION = 1
INO_START = 1 << 31
"""Inode numbers of template entries begin here: above any a small file system has, and within 32 bits so that programs
without large-file support can still stat them."""
LIFETIME_S = (1 << 31) - 1
"""Seconds that the kernel may cache names and attributes: the mount is the only writer, so nothing goes stale."""
INO_END = 1 << 52
"""All inode numbers of templates are below this."""
PROBES = 64
SLOTS_MIN = 16

HEADER = struct.Struct("<8sIIIIQQQQQQQQQ32sI")
HEADER_SIZE = 256
COLUMNS = (
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
ENTRY_OUT = struct.Struct("<QQQQII")  # fuse_entry_out without its attributes
ATTR = struct.Struct("<QQQqqqIIIIIIIIII")  # fuse_attr
DIRENT = struct.Struct("<QQII")  # fuse_dirent without its name
_NAME_VALID_AT = 16  # seconds for which the name is certain
ATTR_AT = ENTRY_OUT.size
DIRENT_AT = ATTR_AT + ATTR.size
NAME_AT = DIRENT_AT + DIRENT.size
_DOT_SIZE = NAME_AT + 8  # a record of ``.`` or ``..``
_MODE_AT = ATTR_AT + 60
XATTR = struct.Struct("<HI")
NS = 1_000_000_000


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


@dataclass(frozen=True, slots=True)
class Meta:
    """What an index says about its template as a whole; ``data_size`` in bytes, ``created_ns`` since 1970."""

    name: str
    source: str
    ino_base: int
    created_ns: int
    data_size: int


def padded(size: int) -> int:
    """``size`` bytes filled up to a multiple of 8."""
    return size + -size % 8


def unpack_xattrs(data: bytes) -> dict[str, bytes]:
    """The reverse of ``pack_xattrs``."""
    result = {}
    at = 0
    while at < len(data):
        name_len, value_len = XATTR.unpack_from(data, at)
        at += XATTR.size
        result[os.fsdecode(data[at : at + name_len])] = data[at + name_len : at + name_len + value_len]
        at += name_len + value_len
    return result


class Index:
    """A mapped template index. Entry numbers given to its methods must be below ``count``.

    Raises ``DamagedError`` when the file is not a whole index of this version. What follows the header is not looked
    at: who serves from it asks ``vzfs.store.seal`` for it, which does. Whatever it holds, every loop here ends after at
    most ``count`` steps. ``identity`` is that of the mapped file: device, inode, change time in ns, size.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = os.fspath(path)
        with open(path, "rb") as file:
            info = os.fstat(file.fileno())
            self.identity = identity_of(info)
            size = info.st_size
            if size < HEADER_SIZE:
                raise self.damaged("it is too short")
            self.data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
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
            self.listing_at,
            self.blobs_at,
            file_size,
            self._checksum,
            crc,
        ) = HEADER.unpack_from(self.data)
        if magic != MAGIC:
            raise self.damaged("it is not a vzfs index")
        if version != VERSION:
            raise self.damaged(f"it has format version {version}, this vzfs reads {VERSION}")
        raw = self.data[: HEADER.size - 4] + b"\0" * 4 + self.data[HEADER.size : HEADER_SIZE]
        if zlib.crc32(raw) != crc or file_size != size or not self.count:
            raise self.damaged("its header is damaged or the file is cut short")
        columns_end = HEADER_SIZE + sum(padded(self.count * struct.calcsize(code)) for _, code in COLUMNS)
        if (
            slots_at != columns_end
            or slot_count < SLOTS_MIN
            or slot_count & (slot_count - 1)
            or meta_at != slots_at + 4 * slot_count
            or self.listing_at != meta_at + meta_len
            or not self.listing_at <= self.blobs_at <= size
            or not INO_START <= ino_base <= INO_END - self.count
        ):
            raise self.damaged("its header contradicts itself")
        view = self._view = memoryview(self.data)
        columns: dict[str, memoryview] = {}
        at = HEADER_SIZE
        for name, code in COLUMNS:
            length = self.count * struct.calcsize(code)
            columns[name] = view[at : at + length].cast(code)  # type: ignore[call-overload]
            at += padded(length)
        self.parent = columns["parent"]
        self.leader = columns["leader"]
        self.next_link = columns["next_link"]
        self.first_child = columns["first_child"]
        self.child_count = columns["child_count"]
        self.blob_len = columns["blob_len"]
        self.xattr_len = columns["xattr_len"]
        self.record = columns["record"]
        self.blob = columns["blob"]
        self.xattr_at = columns["xattr"]
        self.slots = view[slots_at : slots_at + 4 * slot_count].cast("I")
        self._mask = slot_count - 1
        self._words = view[: size & ~3].cast("I")
        self.ino_base: int = ino_base
        try:
            about = json.loads(self.data[meta_at : meta_at + meta_len])
            self.meta = Meta(about["name"], about["source"], ino_base, created_ns, data_size)
        except (ValueError, KeyError, TypeError) as error:
            raise self.damaged("what it says of its template is damaged") from error

    def damaged(self, why: str) -> DamagedError:
        return DamagedError(f"{self._file} can't be used: {why}", remedy="create the template again from its source")

    @property
    def size(self) -> int:
        """Bytes of the index file."""
        return len(self.data)

    def intact(self) -> bool:
        """Whether the whole file still has the checksum it was written with; reads all of it."""
        checksum: bytes = self._checksum
        return hashlib.sha256(self._view[HEADER_SIZE:]).digest() == checksum

    def find(self, parent: int, name: bytes) -> int:
        """Number of the entry ``name`` in directory ``parent``, or 0 when there is none."""
        slots, mask, parents = self.slots, self._mask, self.parent
        at = zlib.crc32(name, parent)
        for probe in range(at, at + PROBES):
            number: int = slots[probe & mask]
            if not number:
                return 0
            if parents[number] == parent:
                start = self.record[number] + NAME_AT
                length = len(name)
                if self.data[start : start + length] == name and self._words[(start - 8) >> 2] == length:
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
        at: int = self.record[number] + NAME_AT
        return self.data[at : at + self._words[(at - 8) >> 2]]

    def path(self, number: int) -> bytes:
        """The entry's path below the template's root, without leading slash."""
        parts = []
        while number:
            parts.append(self.name(number))
            above: int = self.parent[number]
            if above >= number:
                raise self.damaged("its directories are in a circle")
            number = above
        return b"/".join(reversed(parts))

    def children(self, number: int) -> range:
        """Numbers of a directory's children in the order of their names."""
        first: int = self.first_child[number]
        return range(first, first + self.child_count[number])

    def mode(self, number: int) -> int:
        """The entry's ``st_mode``."""
        mode: int = self._words[(self.record[number] + _MODE_AT) >> 2]
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
        ) = ATTR.unpack_from(self.data, self.record[number] + ATTR_AT)
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
            atime * NS + atime_nsec,
            mtime * NS + mtime_nsec,
            ctime * NS + ctime_nsec,
        )

    def attributes_out(self, number: int) -> bytes:
        """The entry's attributes as the 88 bytes of a ``fuse_attr``."""
        at: int = self.record[number] + ATTR_AT
        return self.data[at : at + ATTR.size]

    def entry_out(self, number: int) -> bytes:
        """The ready-made answer to a look-up of the entry: the 128 bytes of a ``fuse_entry_out``."""
        at: int = self.record[number]
        return self.data[at : at + DIRENT_AT]

    def listing(self, number: int) -> memoryview:
        """The ready-made body of a directory's READDIRPLUS answer."""
        at: int = self.blob[number]
        return self._view[at : at + self.blob_len[number]]

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
            record: int = self.record[entry]
            if at <= record < end:
                patched = patched or bytearray(part)
                patched[record - at + _NAME_VALID_AT : record - at + _NAME_VALID_AT + 8] = bytes(8)
        return patched or part

    def entry_out_unsure(self, number: int) -> bytes:
        """``entry_out`` with a name that is certain for no time."""
        ready = self.entry_out(number)
        return ready[:_NAME_VALID_AT] + bytes(8) + ready[_NAME_VALID_AT + 8 :]

    def _listing_span(self, number: int, given: int, size: int) -> tuple[int, int]:
        start: int = self.blob[number]
        end = start + self.blob_len[number]
        first: int = self.first_child[number]
        beyond = first + self.child_count[number]
        child = first + max(given - 2, 0)
        at = start + given * _DOT_SIZE
        if given >= 2:
            at = self.record[child] if child < beyond else end
        if end - at > size:
            after = bisect.bisect_right(self.record, at + size, child, beyond)
            # Up to the last record that begins within the space, for that one may end outside; or as many dots as fit.
            end = self.record[after - 1] if after > child else at + size // _DOT_SIZE * _DOT_SIZE
        return at, end

    def target(self, number: int) -> bytes:
        """Text of a symbolic link."""
        at: int = self.blob[number]
        return self.data[at : at + self.blob_len[number]]

    def digest(self, number: int) -> bytes:
        """SHA-256 of a regular file's content."""
        return self.target(number)

    def has_xattrs(self, number: int) -> bool:
        """Whether the entry has any extended attribute."""
        return bool(self.xattr_len[number])

    def xattrs(self, number: int) -> dict[str, bytes]:
        """The entry's extended attributes, POSIX ACLs and capabilities among them."""
        length: int = self.xattr_len[number]
        if not length:
            return {}
        at: int = self.xattr_at[number]
        return unpack_xattrs(self.data[at : at + length])

    def members(self, number: int) -> list[int]:
        """All entries of the hard link group of ``number``, in ascending order."""
        leader: int = self.leader[number]
        result = [leader]
        while (after := self.next_link[result[-1]]) != leader:
            if after <= result[-1]:
                raise self.damaged("a link group is no ring")
            result.append(after)
        return result

    def walk(self) -> Iterator[int]:
        """Numbers of all entries, parents before children, in the order of a sorted depth-first listing."""
        stack = [0]
        left = self.count
        while stack:
            number = stack.pop()
            if not left:
                raise self.damaged("its directories are in a circle")
            left -= 1
            yield number
            if self.is_directory(number):
                stack.extend(reversed(self.children(number)))
