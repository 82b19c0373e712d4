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
import re
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vzfs.store.escape import printable
from vzfs.store.index import Index
from vzfs.store.index_check import find_fault
from vzfs.store.layout import TemplatePaths

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FIRST_LINE = "vzfs-template 1"
_NOTE = "vzfs-checked 1"
_NOTE_MAX = 512
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
    digest = _noted(paths.checked, index)
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
        _note(paths.checked, index, digest)
    return digest


def _mark(index: Index) -> str:
    device, inode, ctime_ns, size = index.identity
    return f"{_NOTE} {device} {inode} {ctime_ns} {size} "


def _noted(path: Path, index: Index) -> str:
    """The digest that was noted for this very file, or nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        text = os.read(fd, _NOTE_MAX).decode("ascii", "replace")
    except OSError:
        return ""
    finally:
        os.close(fd)
    digest = text.removeprefix(_mark(index)).removesuffix("\n")
    return digest if DIGEST.fullmatch(digest) else ""


def _note(path: Path, index: Index, digest: str) -> None:
    staged = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"{_mark(index)}{digest}\n".encode())
        os.rename(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


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
