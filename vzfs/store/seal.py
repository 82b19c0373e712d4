"""Which template an index is of, and whether the file still is what was sealed.

Rule: nothing is served from an index whose checksum and structure weren't examined. That takes a moment, so it is done
once for each index file: ``checked`` beside it, in a folder that only root may enter, notes the file's device, inode,
change time and size, and the template's digest. Nobody can set a change time, so what was written to since, or copied
from elsewhere, is examined anew. The note is a cache: without it everything works, only slower.

A template's *digest* says what is in it, the same on every node: SHA-256 over ``content_lines``. Inode numbers, access
and change times, sizes of directories and dates of making are not in there, for those are other ones in each copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass

from vzfs.store.escape import printable
from vzfs.store.index import Index
from vzfs.store.index_check import find_fault
from vzfs.store.layout import TemplatePaths
from vzfs.store.noted import read_note, write_note

_FIRST_LINE = "vzfs-template 1"
_TICK_NS = 20_000_000
"""Two changes of a file within the kernel's clock tick (10 ms at most) may have the same change time."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """An index that was examined, and the digest of its template, ``sha256:`` and 64 hexadecimal digits."""

    index: Index
    digest: str


def open_sealed(paths: TemplatePaths) -> Sealed:
    """Map the index of a template and make sure that it can be served from. Raises ``DamagedError``, ``OSError``."""
    index = Index(paths.index)
    digest = read_note(paths.checked, index.identity)
    return Sealed(index, digest or _examine(paths, index))


def find_damage(index: Index) -> str:
    """What is wrong with the index, or nothing; reads all of it."""
    return find_fault(index) or ("" if index.intact() else "its checksum differs")


def _examine(paths: TemplatePaths, index: Index) -> str:
    """The digest of the template; notes it. Raises ``DamagedError``."""
    if not index.intact():
        raise index.damaged("its checksum differs")
    if fault := find_fault(index):
        raise index.damaged(fault)
    digest = content_digest(index)
    age_ns = time.time_ns() - index.identity[2]
    if 0 <= age_ns < _TICK_NS:
        time.sleep((_TICK_NS - age_ns) / 1e9)
        if not index.intact():
            raise index.damaged("its checksum differs")
    with contextlib.suppress(OSError):  # read-only, full, not permitted: then the next one examines it again
        write_note(paths.checked, index.identity, digest)
    return digest


# ----------------------------------------------------------------------------------------------------------- the digest


def content_digest(index: Index) -> str:
    """The digest of the template that a sound index is of."""
    digest = hashlib.sha256()
    for line in content_lines(index):
        digest.update(line.encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def content_lines(index: Index) -> Iterator[str]:
    """What the digest is made over, each line ended by a newline; see docs/format.md, which must not change."""
    yield _FIRST_LINE
    paths = [""] * index.count
    for number in index.walk():
        if number:
            paths[number] = f"{paths[index.parent[number]]}/{printable(index.name(number))}"
        yield _content_line(index, number, paths)


def _content_line(index: Index, number: int, paths: list[str]) -> str:
    attributes = index.attributes(number)
    kind = stat.S_IFMT(attributes.mode)
    fields = [
        paths[number] or "/",
        f"{attributes.mode:06o}",
        f"uid={attributes.uid}",
        f"gid={attributes.gid}",
        f"mtime={attributes.mtime_ns // 10**9}.{attributes.mtime_ns % 10**9:09d}",
    ]
    if kind == stat.S_IFREG:
        fields += [f"size={attributes.size}", f"sha256={index.digest(number).hex()}"]
    elif kind == stat.S_IFLNK:
        fields.append(f"target={printable(index.target(number))}")
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        fields.append(f"rdev={os.major(attributes.rdev)}:{os.minor(attributes.rdev)}")
    leader: int = index.leader[number]
    if leader != number:
        fields.append(f"link={printable(b'/' + index.path(leader))}")
    xattrs = sorted((os.fsencode(key), value) for key, value in index.xattrs(number).items())
    fields += [f"xattr:{printable(key)}={value.hex()}" for key, value in xattrs]
    return " ".join(fields)
