"""Writing a template's index; see ``vzfs.store.index`` for what it is.

Rule: the same entries and the same inode numbers give the same file, to the byte, but for its dates.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from vzfs.store.index import (
    ATTR,
    COLUMNS,
    DIRENT,
    ENTRY_OUT,
    HEADER,
    HEADER_SIZE,
    LIFETIME_S,
    MAGIC,
    NS,
    PROBES,
    SLOTS_MIN,
    VERSION,
    XATTR,
    Meta,
    padded,
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


def pack_xattrs(xattrs: dict[str, bytes]) -> bytes:
    """The stored form of extended attributes, ordered by name."""
    parts = []
    for name, value in sorted(xattrs.items()):
        raw = os.fsencode(name)
        parts.append(XATTR.pack(len(raw), len(value)) + raw + value)
    return b"".join(parts)


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
                ENTRY_OUT.pack(node, 0, LIFETIME_S, LIFETIME_S, 0, 0),
                ATTR.pack(
                    ino,
                    info.st_size,
                    info.st_blocks,
                    info.st_atime_ns // NS,
                    info.st_mtime_ns // NS,
                    info.st_ctime_ns // NS,
                    info.st_atime_ns % NS,
                    info.st_mtime_ns % NS,
                    info.st_ctime_ns % NS,
                    info.st_mode,
                    2 + entry.subdirectories if stat.S_ISDIR(info.st_mode) else entry.links,
                    info.st_uid,
                    info.st_gid,
                    info.st_rdev & 0xFFFFFFFF,
                    info.st_blksize,
                    0,
                ),
                DIRENT.pack(ino, position, len(name), stat.S_IFMT(info.st_mode) >> 12),
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


def hash_slots(names: Sequence[bytes], parents: Sequence[int]) -> list[int]:
    """The hash table of entries with these names in these directories."""
    count = max(SLOTS_MIN, 1 << (2 * len(names) - 1).bit_length())
    slots = [0] * count
    for number in range(1, len(names)):
        at = zlib.crc32(names[number], parents[number])
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
    slots = hash_slots([entry.name for entry in entries], [entry.parent for entry in entries])
    meta_bytes = json.dumps({"name": meta.name, "source": meta.source}).encode()
    meta_bytes += b" " * (-len(meta_bytes) % 8)
    columns_size = sum(padded(len(entries) * struct.calcsize(code)) for _, code in COLUMNS)
    slots_at = HEADER_SIZE + columns_size
    meta_at = slots_at + 4 * len(slots)
    listing_at = meta_at + len(meta_bytes)
    blobs_at = listing_at + len(listing_bytes)

    columns: dict[str, list[int]] = {name: [] for name, _ in COLUMNS}
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

    for name, code in COLUMNS:
        data = struct.pack(f"<{len(entries)}{code}", *columns[name])
        put(data + b"\0" * (-len(data) % 8))
    put(struct.pack(f"<{len(slots)}I", *slots))
    put(meta_bytes)
    put(listing_bytes)
    put(b"".join(blobs))

    def header(crc: int) -> bytes:
        return HEADER.pack(
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
