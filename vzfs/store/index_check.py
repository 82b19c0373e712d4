"""Whether what an index says can be meant: that its parts agree with each other and with the format.

Rule: an index that passes can be served whatever made it. All that a reader follows (parents, children, link rings,
offsets, the hash table) leads where it must, and every attribute is one that a file can have; the reader then needs no
checks of its own. The format leaves a writer no choice but for the order in which link groups' members are found, so
most of it is compared with the one thing that it may be, in one pass over the file.
"""

from __future__ import annotations

import stat
import struct
from collections import Counter

from vzfs.store.index import (
    ATTR_AT,
    DIRENT_AT,
    LIFETIME_S,
    NAME_AT,
    NS,
    XATTR,
    Index,
    padded,
)
from vzfs.store.index_write import hash_slots
from vzfs.store.magic import TARGET_MAX
from vzfs.store.xattrs import RESERVED_PREFIX

_RECORD = struct.Struct("<QQQQIIQQQqqqIIIIIIIIIIQQII")  # fuse_direntplus without the name
_DIGEST_SIZE = 32
_NAME_MAX = 255
_TYPES = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK})
_KIND_MAX = 0o17
_NO_ID = 0xFFFFFFFF
_SIZE_END = 1 << 63
_RESERVED = RESERVED_PREFIX.encode()
_DOTS = (b"", b".", b"..")


class _Fault(Exception):
    """Why the index can't be used."""


def find_fault(index: Index) -> str:
    """What is wrong with the index, or nothing. Takes time and memory for ``count`` entries, not more."""
    try:
        _Check(index).run()
    except _Fault as fault:
        return str(fault)
    except (struct.error, IndexError, ValueError):  # an offset leads out of the file
        return "its records don't fit together"
    return ""


class _Check:
    def __init__(self, index: Index) -> None:
        self._index = index
        self._count = index.count
        self._parents: list[int] = index.parent.tolist()
        self._leaders: list[int] = index.leader.tolist()
        self._records: list[int] = index.record.tolist()
        self._names = [b""] * self._count
        self._modes = [0] * self._count
        self._links = [0] * self._count
        self._members = Counter(self._leaders)
        self._subdirectories: Counter[int] = Counter()

    def run(self) -> None:
        """Raise ``_Fault`` for the first thing that is wrong."""
        self._check_directories()
        self._check_groups()
        self._check_listings()
        self._check_link_counts()
        self._check_blobs()
        if self._index.slots.tolist() != hash_slots(self._names, self._parents):
            raise _Fault("its table of names is wrong")

    def _check_directories(self) -> None:
        """Children follow each other breadth first, so every entry has one parent, of a lower number."""
        parents = self._parents
        following = 1
        if parents[0]:
            raise _Fault("its root has a parent")
        firsts, counts = self._index.first_child.tolist(), self._index.child_count.tolist()
        for number, (first, children) in enumerate(zip(firsts, counts, strict=True)):
            if number >= following or first != (following if children else 0) or children > self._count - following:
                raise _Fault("its directories don't fit together")
            if any(parent != number for parent in parents[following : following + children]):
                raise _Fault("its directories don't fit together")
            following += children
        if following != self._count:
            raise _Fault("its directories don't fit together")

    def _check_groups(self) -> None:
        """The members of a link group are a ring in ascending order, which begins with the leader."""
        following = self._index.next_link.tolist()
        last: dict[int, int] = {}
        for number, leader in enumerate(self._leaders):
            if leader != number and following[last.get(leader, number)] != number:
                raise _Fault("a link group is no ring")
            last[leader] = number
        if any(leader not in last or following[end] != leader for leader, end in last.items()):
            raise _Fault("a link group is no ring")
        if any(self._leaders[leader] != leader for leader in last):
            raise _Fault("a link group has two leaders")

    def _check_listings(self) -> None:
        index = self._index
        at = self._check_record(0, index.listing_at, 0)
        firsts, counts = index.first_child, index.child_count
        for number in range(self._count):
            if not stat.S_ISDIR(self._modes[number]):
                if counts[number]:
                    raise _Fault("something that is no directory has entries")
                continue
            start = at
            at = self._check_dot(number, b".", at, 1)
            at = self._check_dot(self._parents[number], b"..", at, 2)
            before = b""
            first: int = firsts[number]
            for position, child in enumerate(range(first, first + counts[number]), 3):
                at = self._check_record(child, at, position)
                if self._names[child] <= before:
                    raise _Fault("names are in the wrong order")
                before = self._names[child]
            if index.blob[number] != start or index.blob_len[number] != at - start:
                raise _Fault("a directory's listing is elsewhere")
        if at != index.blobs_at:
            raise _Fault("its listings are too long or too short")

    def _check_record(self, number: int, at: int, position: int) -> int:
        """The record of ``number``, which must be at ``at``; gives where it ends."""
        index = self._index
        fields: tuple[int, ...] = _RECORD.unpack_from(index.data, at)
        node, generation, life, life_attr, life_ns, life_attr_ns, ino, size, blocks = fields[:9]
        mode, links, uid, gid, _, _, zero, ino_again, place, name_len, kind = fields[15:]
        end = at + NAME_AT + padded(name_len)
        if self._records[number] != at or end > index.blobs_at:
            raise _Fault("a record is elsewhere")
        if not node == ino == ino_again == index.ino_base + self._leaders[number]:
            raise _Fault("a record has another entry's number")
        fixed = (generation, life, life_attr, life_ns, life_attr_ns, zero, place)
        if fixed != (0, LIFETIME_S, LIFETIME_S, 0, 0, 0, position):
            raise _Fault("a record is malformed")
        if (
            stat.S_IFMT(mode) not in _TYPES
            or not mode >> 12 == kind <= _KIND_MAX
            or _NO_ID in (uid, gid)
            or max(size, blocks) >= _SIZE_END
            or max(fields[12:15]) >= NS
        ):
            raise _Fault("a record has impossible attributes")
        name = index.data[at + NAME_AT : at + NAME_AT + name_len]
        if number and (not name_len <= _NAME_MAX or name in _DOTS or b"/" in name or b"\0" in name):
            raise _Fault("a record has an impossible name")
        if not number and (name or not stat.S_ISDIR(mode)):
            raise _Fault("its root is no directory")
        self._note(number, name, mode, links)
        return end

    def _note(self, number: int, name: bytes, mode: int, links: int) -> None:
        self._names[number], self._modes[number], self._links[number] = name, mode, links
        if number and stat.S_ISDIR(mode):
            self._subdirectories[self._parents[number]] += 1
        leader = self._leaders[number]
        if leader != number and (stat.S_ISDIR(mode) or self._identity(number) != self._identity(leader)):
            raise _Fault("the names of a link group have different attributes")

    def _identity(self, number: int) -> tuple[int, ...]:
        """What the names of a link group have in common; times were read one after the other."""
        attributes = self._index.attributes(number)
        return attributes.mode, attributes.uid, attributes.gid, attributes.rdev, attributes.size

    def _attributes(self, number: int) -> bytes:
        record = self._records[number]
        return self._index.data[record + ATTR_AT : record + DIRENT_AT]

    def _check_dot(self, number: int, name: bytes, at: int, position: int) -> int:
        """The record of ``.`` or ``..``: the attributes of ``number``, and no node to look up."""
        index = self._index
        expected = struct.pack("<QQQQII", 0, 0, LIFETIME_S, LIFETIME_S, 0, 0) + self._attributes(number)
        ino = index.ino_base + self._leaders[number]
        expected += struct.pack("<QQII", ino, position, len(name), self._modes[number] >> 12) + name.ljust(8, b"\0")
        if index.data[at : at + len(expected)] != expected:
            raise _Fault("a listing doesn't begin with its directory and the one above")
        return at + len(expected)

    def _check_link_counts(self) -> None:
        for number, (mode, links) in enumerate(zip(self._modes, self._links, strict=True)):
            right = 2 + self._subdirectories[number] if stat.S_ISDIR(mode) else self._members[self._leaders[number]]
            if links != right:
                raise _Fault("a record has another number of links")

    def _check_blobs(self) -> None:
        """Link texts, digests and extended attributes follow each other in the order of the entries."""
        index = self._index
        at = index.blobs_at
        blobs, sizes = index.blob.tolist(), index.blob_len.tolist()
        xattrs, xattr_sizes = index.xattr_at.tolist(), index.xattr_len.tolist()
        for number, mode in enumerate(self._modes):
            if not stat.S_ISDIR(mode):
                if blobs[number] != at or not _possible(stat.S_IFMT(mode), sizes[number]):
                    raise _Fault("a link's text or a digest is elsewhere")
                if stat.S_ISLNK(mode) and b"\0" in index.target(number):
                    raise _Fault("a link has an impossible text")
                at += sizes[number]
            if xattrs[number] != at:
                raise _Fault("extended attributes are elsewhere")
            if xattr_sizes[number]:
                _check_xattrs(index.data[at : at + xattr_sizes[number]])
            at += xattr_sizes[number]
        if at != index.size:
            raise _Fault("its last part is too long or too short")


def _possible(kind: int, size: int) -> bool:
    """Whether an entry of this type may have a blob of this size."""
    if kind == stat.S_IFREG:
        return size == _DIGEST_SIZE
    return 1 <= size <= TARGET_MAX if kind == stat.S_IFLNK else size == 0


def _check_xattrs(data: bytes) -> None:
    at = 0
    names = set()
    while at < len(data):
        name_len, value_len = XATTR.unpack_from(data, at)
        at += XATTR.size
        name = data[at : at + name_len]
        at += name_len + value_len
        if not 0 < name_len <= _NAME_MAX or b"\0" in name or name in names or name.startswith(_RESERVED):
            raise _Fault("an extended attribute has an impossible name")
        names.add(name)
    if at != len(data):
        raise _Fault("extended attributes are cut off")
