"""Template sources that are meant ill: hostile and damaged archives are refused by name, or unpacked harmlessly inside.

Archives are put together byte by byte, for no ordinary writer makes them. After each, a sentinel beside the target must
be what it was, and no error but ``SourceError`` and ``FullError`` may have been raised.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import pathlib
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vzfs.errors import FullError, SourceError
from vzfs.store.sources import SourceOptions, populate
from vzfs.store.sources.tar import MAX_EXTENSION

END = bytes(1024)


# ----------------------------------------------------------------------------------------------------- making archives


def octal(number: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, number)


def base256(number: int, width: int) -> bytes:
    raw = bytearray(number.to_bytes(width, "big", signed=True))
    raw[0] |= 0x80
    return bytes(raw)


def header(
    name: bytes,
    kind: bytes = b"0",
    *,
    size: int | bytes = 0,
    link: bytes = b"",
    mode: int = 0o644,
    device: tuple[int, int] = (0, 0),
    magic: bytes = b"ustar\x0000",
    uid: bytes = b"0000000\0",
    mtime: bytes = b"00000000000\0",
    tail: bytes = b"",
) -> bytes:
    block = bytearray(512)
    raw_size = size if isinstance(size, bytes) else octal(size, 12) if 0 <= size < 8**11 else base256(size, 12)
    for at, data in (
        (0, name[:100]),
        (100, octal(mode, 8)),
        (108, uid),
        (116, octal(0, 8)),
        (124, raw_size),
        (136, mtime),
        (148, b" " * 8),
        (156, kind),
        (157, link[:100]),
        (257, magic),
        (329, octal(device[0], 8)),
        (337, octal(device[1], 8)),
        (386 if kind == b"S" else 345, tail),
    ):
        block[at : at + len(data)] = data
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def signed(name: bytes) -> bytes:
    """A header whose checksum was made with signed characters, as old Suns did."""
    block = bytearray(header(name))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) - 256 * sum(byte > 127 for byte in block))
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: bytes, data: bytes = b"", kind: bytes = b"0", **fields: object) -> bytes:
    return header(name, kind, **({"size": len(data)} | fields)) + padded(data)  # type: ignore[arg-type]


def record(keyword: bytes, value: bytes) -> bytes:
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    return member(b"PaxHeaders/x", b"".join(record(*each) for each in records), kind)


def symlink(name: bytes, text: bytes) -> bytes:
    return member(name, kind=b"2", link=text)


def link(name: bytes, target: bytes) -> bytes:
    return member(name, kind=b"1", link=target)


def folder(name: bytes, mode: int = 0o755) -> bytes:
    return member(name, kind=b"5", mode=mode)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    return member(b"././@LongLink", name + b"\0", kind)


def sparse_1_0(lines: bytes, data: bytes, realsize: bytes) -> bytes:
    records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", realsize)]
    return pax(*records) + member(b"holes", padded(lines) + data)


def sparse_0_1(numbers: bytes, data: bytes, size: bytes) -> bytes:
    return pax((b"GNU.sparse.map", numbers), (b"GNU.sparse.size", size)) + member(b"holes", data)


def old_gnu_sparse(pairs: list[tuple[int, int]], data: bytes, realsize: int, *, more: bytes = b"") -> bytes:
    tail = b"".join(octal(a, 12) + octal(b, 12) for a, b in pairs).ljust(96, b"\0")
    tail += b"\1" if more else b"\0"
    tail += octal(realsize, 12)
    head = header(b"holes", b"S", size=len(data), magic=b"ustar  \0", tail=tail)
    return head + more + padded(data)


# ----------------------------------------------------------------------------------------------------- the watched room


class Room:
    """A target with a sentinel directory beside it, and the means to see whether that was touched."""

    def __init__(self, base: pathlib.Path) -> None:
        self.base = base
        self.target = base / "store" / "target"
        self.target.mkdir(parents=True, mode=0o700)
        self.sentinel = base / "store" / "sentinel"
        self.sentinel.mkdir()
        (self.sentinel / "file").write_bytes(b"precious")
        os.chmod(self.sentinel / "file", 0o604)
        os.symlink("file", self.sentinel / "link")
        self.archive = base / "archive"
        self._before = self._look()

    def _look(self) -> list[object]:
        found: list[object] = [sorted(set(os.listdir(self.base)) - {"archive"})]
        for here, folders, files in os.walk(self.target.parent):
            if here == str(self.target.parent):
                folders.remove("target")
            for name in (".", *folders, *files):
                path = os.path.join(here, name)
                info = os.lstat(path)
                data = pathlib.Path(path).read_bytes() if stat.S_ISREG(info.st_mode) else b""
                xattrs = os.listxattr(path, follow_symlinks=False)
                facts = (info.st_mode, info.st_uid, info.st_gid, info.st_nlink, info.st_size, info.st_mtime_ns)
                found.append((path, facts, data, xattrs))
        return found

    def unpack(self, archive: bytes, options: SourceOptions | None = None) -> SourceError | FullError | None:
        """Unpack; give the error if there is one; any other kind of error passes through and fails the test."""
        self.archive.write_bytes(archive)
        try:
            populate(str(self.archive), self.target, options)
        except (SourceError, FullError) as error:
            return error
        finally:
            assert self._look() == self._before
        return None


@pytest.fixture
def room(tmp_path: pathlib.Path) -> Room:
    return Room(tmp_path)


# ------------------------------------------------------------------------------------------------------------- refused

REFUSED: dict[str, tuple[bytes, str]] = {
    "absolute": (member(b"/etc/passwd", b"x"), "'/etc/passwd': an absolute name"),
    "absolute by prefix": (header(b"passwd", tail=b"/etc"), "'/etc/passwd': an absolute name"),
    "absolute by pax": (pax((b"path", b"/tmp/x")) + member(b"ok"), "'/tmp/x': an absolute name"),
    "absolute by gnu name": (long_name(b"/tmp/x") + member(b"ok"), "'/tmp/x': an absolute name"),
    "absolute by sparse name": (
        pax((b"GNU.sparse.name", b"/tmp/x"), (b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"1"))
        + member(b"a", b"x"),
        "'/tmp/x': an absolute name",
    ),
    "dotdot": (member(b"../sentinel/file", b"x"), "'../sentinel/file': '..' in the name"),
    "dotdot inside": (folder(b"a") + member(b"a/../../sentinel/new", b"x"), "'..' in the name"),
    "dotdot directory": (folder(b"a/.."), "'a/..': '..' in the name"),
    "empty name": (member(b"", b"x"), "an empty name"),
    "nul in pax path": (pax((b"path", b"a\0b")) + member(b"a"), "NUL"),
    "long component": (long_name(b"n" * 256) + member(b"n"), "more than 255 bytes"),
    "long path": (long_name(b"/".join([b"n" * 250] * 20)) + member(b"n"), "too long"),
    "root as file": (member(b"./", b"x"), "must be a directory"),
    "root as symlink": (symlink(b".", b"/"), "must be a directory"),
    "root as device": (member(b"./.", kind=b"3"), "must be a directory"),
    "root as hard link": (member(b"a") + link(b".", b"a"), "must be a directory"),
    "through symlink": (symlink(b"s", b"../sentinel") + member(b"s/file", b"x"), "'s/file': a symbolic link stands"),
    "through absolute symlink": (symlink(b"s", b"/") + member(b"s/vzfs-was-here", b"x"), "'s/vzfs-was-here': a symb"),
    "through symlink inside": (folder(b"d") + symlink(b"s", b"d") + member(b"s/f", b"x"), "'s/f': a symbolic link"),
    "directory through symlink": (symlink(b"s", b"../sentinel") + folder(b"s/new"), "'s/new': a symbolic link"),
    "symlink through symlink": (symlink(b"s", b"..") + symlink(b"s/new", b"x"), "'s/new': a symbolic link"),
    "deep through symlink": (symlink(b"s", b"..") + member(b"s/a/b/c", b"x"), "'s/a/b/c': a symbolic link"),
    "device through symlink": (symlink(b"s", b"..") + member(b"s/n", kind=b"3"), "'s/n': a symbolic link"),
    "through hard-linked symlink": (
        symlink(b"s", b"../sentinel") + link(b"t", b"s") + member(b"t/file", b"x"),
        "'t/file': a symbolic link",
    ),
    "through file": (member(b"f", b"x") + member(b"f/g", b"x"), "'f/g': a part of its path is not a directory"),
    "link outside": (link(b"l", b"../sentinel/file"), "'l': '..' in the name"),
    "link absolute": (link(b"l", b"/etc/passwd"), "'l': an absolute name"),
    "link through symlink": (symlink(b"s", b"../sentinel") + link(b"l", b"s/file"), "'l': a symbolic link stands"),
    "link absent": (link(b"l", b"nothing"), "'l': a hard link to a member that isn't there"),
    "link absent directory": (link(b"l", b"no/thing"), "'l': a hard link to a member that isn't there"),
    "link to later": (link(b"l", b"later") + member(b"later"), "'l': a hard link to a member that isn't there"),
    "link to itself": (link(b"l", b"l"), "'l': a hard link to a member that isn't there"),
    "link to directory": (folder(b"d") + link(b"l", b"d"), "'l': a hard link to a directory"),
    "link to root": (link(b"l", b"./"), "'l': a hard link to the root"),
    "link empty": (link(b"l", b""), "'l': an empty name"),
    "link replaces own directory": (
        member(b"d/f") + link(b"d", b"d/f"),
        "'d': it would replace a directory that is not",
    ),
    "file replaces full directory": (
        member(b"d/f") + member(b"d", b"x"),
        "'d': it would replace a directory that is not",
    ),
    "symlink replaces full directory": (member(b"d/f") + symlink(b"d", b".."), "'d': it would replace a directory"),
    "symlink without text": (symlink(b"s", b""), "'s': a symbolic link with an impossible text"),
    "symlink text with nul": (pax((b"linkpath", b"a\0b")) + symlink(b"s", b"x"), "'s': a symbolic link with an imp"),
    "symlink text too long": (long_name(b"t" * 4096, b"K") + symlink(b"s", b"x"), "'s': its name or link text is too"),
    "device number": (member(b"n", kind=b"3", device=(4096, 0)), "'n': device number 4096:0 is impossible"),
    "unknown type": (member(b"f", kind=b"Z"), "'f': a member of the unknown type"),
    "multi-volume": (member(b"f", kind=b"M"), "'f': a member of the unknown type"),
    "negative size": (header(b"f", size=-512), "'f': a size of -512 bytes is impossible"),
    "huge size": (header(b"f", size=1 << 70), "bytes is impossible"),
    "size not a number": (member(b"a") + header(b"f", size=b"12x45678901\0"), "no header follows 'a'"),
    "negative octal": (member(b"a") + header(b"f", size=b"-0000000100\0"), "no header follows 'a'"),
    "pax size not a number": (pax((b"size", b"-5")) + member(b"f"), "'f': PAX record size is not a number"),
    "pax size lies": (pax((b"size", b"5000000")) + member(b"f", b"12345"), "cut off within or right after 'f'"),
    "lying size": (header(b"f", size=10_000_000) + b"x" * 3000, "cut off within or right after 'f'"),
    "lying huge size": (header(b"f", size=(1 << 63) - 1) + b"x" * 3000, "cut off within or right after 'f'"),
    "uid": (header(b"f", uid=base256(-2, 8)), "'f': uid -2 is impossible"),
    "uid that means none": (pax((b"uid", b"4294967295")) + member(b"f"), "'f': uid 4294967295 is impossible"),
    "mtime text": (pax((b"mtime", b"1e9")) + member(b"f"), "'f': PAX record mtime is not a time"),
    "mtime nan": (pax((b"mtime", b"nan")) + member(b"f"), "'f': PAX record mtime is not a time"),
    "mtime range": (pax((b"mtime", b"9" * 20)) + member(b"f"), "'f': mtime is out of range"),
    "mtime range in header": (header(b"f", mtime=base256(1 << 80, 12)), "'f': mtime is out of range"),
    "xattr of unknown kind": (pax((b"SCHILY.xattr.system.evil", b"x")) + member(b"f"), "'f': an extended attribute of"),
    "xattr without kind": (
        pax((b"SCHILY.xattr.evil", b"x")) + member(b"f"),
        "'f': an extended attribute of the unknown",
    ),
    "xattr without name": (pax((b"SCHILY.xattr.user.", b"x")) + member(b"f"), "'f': an extended attribute of the unkn"),
    "xattr with nul": (pax((b"SCHILY.xattr.user.a\0b", b"x")) + member(b"f"), "'f': an extended attribute of the unk"),
    "xattr name too long": (pax((b"SCHILY.xattr.user." + b"x" * 300, b"")) + member(b"f"), "'f': extended attribute"),
    "xattr too large": (
        pax((b"SCHILY.xattr.user.x", b"x" * 70_000)) + member(b"f"),
        "'f': extended attribute .* not fit",
    ),
    "user xattr of symlink": (pax((b"SCHILY.xattr.user.x", b"x")) + symlink(b"s", b"x"), "'s': extended attribute"),
    "broken capability": (pax((b"SCHILY.xattr.security.capability", b"x")) + member(b"f"), "'f': extended attribute"),
    "broken acl": (pax((b"SCHILY.xattr.system.posix_acl_access", b"\2\0\0\0x")) + member(b"f"), "'f': extended attrib"),
    "default acl of file": (pax((b"SCHILY.acl.default", b"u::rw-,g::r--,o::r--")) + member(b"f"), "'f': extended attr"),
    "acl text": (pax((b"SCHILY.acl.access", b"\xff\xff")) + member(b"f"), "'f': malformed ACL"),
    "acl id": (pax((b"SCHILY.acl.access", b"u:4294967295:r")) + member(b"f"), "'f': ACL entry for"),
    "pax record cut": (member(b"x", b"30 path=abc\n", b"x") + member(b"f"), "'x': malformed PAX records"),
    "pax record length zero": (member(b"x", b"0 path=abc\n", b"x") + member(b"f"), "'x': malformed PAX records"),
    "pax record without length": (member(b"x", b"path=abc\n", b"x") + member(b"f"), "'x': malformed PAX records"),
    "pax record length too short": (member(b"x", b"2 path=abc\n", b"x") + member(b"f"), "'x': malformed PAX records"),
    "pax record without newline": (member(b"x", b"12 path=abcd", b"x") + member(b"f"), "'x': malformed PAX records"),
    "pax record without equals": (member(b"x", b"7 path\n", b"x") + member(b"f"), "'x': malformed PAX records"),
    "pax header too large": (header(b"x", b"x", size=MAX_EXTENSION + 1) + b"x" * 4096, "'x': an extension header of"),
    "gnu name too large": (header(b"x", b"L", size=8 << 30) + b"x" * 4096, "'x': an extension header of"),
    "gnu name negative": (header(b"x", b"L", size=-1) + b"x" * 4096, "'x': an extension header of"),
    "extension without member": (member(b"a") + pax((b"path", b"b")), "no header follows|cut off"),
    "sparse map beyond": (sparse_0_1(b"0,5,100,5", b"x" * 10, b"50"), "'holes': the map of its holes contradicts"),
    "sparse map overlaps": (sparse_0_1(b"0,5,3,5", b"x" * 10, b"50"), "'holes': the map of its holes contradicts"),
    "sparse map backwards": (sparse_0_1(b"20,5,0,5", b"x" * 10, b"50"), "'holes': the map of its holes contradicts"),
    "sparse map too little": (sparse_0_1(b"0,5", b"x" * 10, b"50"), "'holes': the map of its holes doesn't agree"),
    "sparse map too much": (sparse_0_1(b"0,5,10,20", b"x" * 10, b"50"), "'holes': the map of its holes doesn't agree"),
    "sparse map odd": (sparse_0_1(b"0,10,20", b"x" * 10, b"50"), "'holes': the map of its holes doesn't agree"),
    "sparse map negative": (sparse_0_1(b"0,-5", b"", b"50"), "'holes': malformed map"),
    "sparse map text": (sparse_0_1(b"a,b", b"", b"50"), "'holes': malformed map"),
    "sparse size missing": (pax((b"GNU.sparse.map", b"0,1")) + member(b"holes", b"x"), "'holes': a size of -1 bytes"),
    "sparse size huge": (sparse_0_1(b"0,1", b"x", b"9" * 20), "'holes': a size of 9+ bytes is impossible"),
    "sparse size beyond file system": (sparse_0_1(b"0,1", b"x", b"9223372036854775807"), "'holes': its size is more"),
    "sparse stored map cut": (
        sparse_1_0(b"5\n0\n", b"", b"50"),
        "'holes': (its data ends before the map|malformed map)",
    ),
    "sparse stored map endless": (sparse_1_0(b"9" * 512, b"", b"50"), "'holes': malformed map"),
    "sparse stored map count": (sparse_1_0(b"99999999\n", b"", b"50"), "'holes': a map of too many holes"),
    "sparse stored map text": (sparse_1_0(b"x\n", b"", b"50"), "'holes': malformed map"),
    "sparse stored map absent": (
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"5"))
        + member(b"holes"),
        "'holes': its data ends before the map",
    ),
    "old sparse overlaps": (old_gnu_sparse([(0, 512), (100, 512)], b"x" * 1024, 5000), "'holes': the map of its holes"),
    "old sparse negative size": (
        header(b"holes", b"S", magic=b"ustar  \0", tail=bytes(97) + base256(-1, 12)),
        "'holes': the map|impossible",
    ),
    "old sparse cut": (old_gnu_sparse([(0, 1)], b"", 5, more=b"\1" * 300), "cut off|'holes': malformed map"),
    "cut before end": (member(b"a", b"x"), "cut off within or right after 'a'"),
    "cut in header": (member(b"a", b"x") + member(b"b")[:300], "cut off within or right after 'a'"),
    "cut in padding": (member(b"a", b"x")[:-3], "cut off within or right after 'a'"),
    "damaged header": (member(b"a") + b"x" * 512 + END, "no header follows 'a'"),
    "control characters": (member(b"/\x1b]0;evil\x07\n"), r"'/\\x1b]0;evil\\x07\\n': an absolute name"),
    "no archive": (b"#!/bin/sh\n" * 100, "not a tar archive"),
    "short no archive": (b"hello", "cut off"),
    "empty": (b"", "the archive is empty"),
}
UNENDED = ("cut", "empty", "no archive", "short", "extension without")


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_archive_is_refused_by_name(room: Room, case: str) -> None:
    archive, message = REFUSED[case]
    error = room.unpack(archive if case.startswith(UNENDED) else archive + END)
    assert isinstance(error, SourceError)
    with pytest.raises(SourceError, match=message):
        raise error


@pytest.mark.parametrize("kind", [b"3", b"4"])
def test_device_is_refused_where_forbidden(room: Room, kind: bytes) -> None:
    archive = member(b"node", kind=kind, device=(1, 3)) + END
    error = room.unpack(archive, SourceOptions(allow_devices=False))
    assert isinstance(error, SourceError)
    assert "'node': a device" in str(error)
    assert os.listdir(room.target) == []
    assert room.unpack(archive) is None
    assert os.lstat(room.target / "node").st_rdev == os.makedev(1, 3)


# ------------------------------------------------------------------------------------------- unpacked harmlessly inside


def is_file(text: bytes) -> Callable[[pathlib.Path], bool]:
    return lambda path: not path.is_symlink() and path.is_file() and path.read_bytes() == text


def is_symlink(text: str) -> Callable[[pathlib.Path], bool]:
    return lambda path: path.is_symlink() and os.readlink(path) == text


def is_directory(mode: int) -> Callable[[pathlib.Path], bool]:
    return lambda path: not path.is_symlink() and path.is_dir() and stat.S_IMODE(path.stat().st_mode) == mode


HARMLESS: dict[str, tuple[bytes, dict[str, Callable[[pathlib.Path], bool]]]] = {
    "file twice": (member(b"f", b"one") + member(b"f", b"two"), {"f": is_file(b"two")}),
    "file then symlink": (member(b"f", b"1") + symlink(b"f", b"../sentinel"), {"f": is_symlink("../sentinel")}),
    "symlink then file": (symlink(b"f", b"../sentinel/file") + member(b"f", b"two"), {"f": is_file(b"two")}),
    "symlink then directory": (
        symlink(b"d", b"../sentinel") + folder(b"d", 0o711) + member(b"d/file", b"in"),
        {"d": is_directory(0o711), "d/file": is_file(b"in")},
    ),
    "directory then symlink": (folder(b"d") + symlink(b"d", b"../sentinel"), {"d": is_symlink("../sentinel")}),
    "directory then file": (folder(b"d", 0o777) + member(b"d", b"f"), {"d": is_file(b"f")}),
    "directory, file, directory": (
        folder(b"d", 0o777) + member(b"d", b"f") + folder(b"d", 0o700),
        {"d": is_directory(0o700)},
    ),
    "replaced while it is the current parent": (
        member(b"p/d/f") + folder(b"p/e") + member(b"p/e", b"x") + folder(b"p/e") + member(b"p/e/g", b"y"),
        {"p/d/f": is_file(b""), "p/e/g": is_file(b"y")},
    ),
    "directory twice": (folder(b"d", 0o777) + member(b"d/f", b"x") + folder(b"d", 0o750), {"d": is_directory(0o750)}),
    "directory after its files": (member(b"d/f", b"x") + folder(b"d", 0o700), {"d": is_directory(0o700)}),
    "directory without search": (folder(b"d", 0) + member(b"d/f", b"x"), {"d": is_directory(0), "d/f": is_file(b"x")}),
    "root": (folder(b"./", 0o711), {".": is_directory(0o711)}),
    "root twice": (folder(b"./", 0o711) + folder(b".", 0o755), {".": is_directory(0o755)}),
    "slashes and dots": (member(b".//a/././/b", b"x"), {"a/b": is_file(b"x")}),
    "old directory": (header(b"d/", b"\0", mode=0o711), {"d": is_directory(0o711)}),
    "link twice": (member(b"f", b"x") + link(b"l", b"f") + link(b"l", b"f"), {"l": is_file(b"x")}),
    "link to itself": (member(b"f", b"x") + link(b"f", b"./f"), {"f": is_file(b"x")}),
    "link replaces symlink": (
        symlink(b"l", b"../sentinel/file") + member(b"f", b"x") + link(b"l", b"f"),
        {"l": is_file(b"x")},
    ),
    "rewriting one name leaves the other": (
        member(b"f", b"old") + link(b"l", b"f") + member(b"f", b"new"),
        {"f": is_file(b"new"), "l": is_file(b"old")},
    ),
    "link to symlink is one": (symlink(b"s", b"../sentinel") + link(b"l", b"s"), {"l": is_symlink("../sentinel")}),
    "link with a size": (member(b"f", b"x") + member(b"l", kind=b"1", link=b"f", size=5), {"l": is_file(b"x")}),
    "forged magic link": (symlink(b"m", b"//vz/template/x/y"), {"m": is_symlink("//vz/template/x/y")}),
    "reserved name": (member(b".vzfs/index", b"x"), {".vzfs/index": is_file(b"x")}),
    "volume label": (member(b"label", kind=b"V") + member(b"f", b"x"), {"f": is_file(b"x")}),
    "long chain of extensions": (
        long_name(b"a") * 3000 + pax((b"comment", b"x")) * 3000 + member(b"f", b"x"),
        {"a": is_file(b"x")},
    ),
    "signed checksum": (signed("ä".encode() * 20), {"ä" * 20: is_file(b"")}),
    "sparse": (sparse_0_1(b"5,3,10,2,20,0", b"abcde", b"20"), {"holes": is_file(b"\0" * 5 + b"abc\0\0de" + b"\0" * 8)}),
    "stored map": (sparse_1_0(b"2\n5\n3\n20\n0\n", b"abc", b"20"), {"holes": is_file(b"\0" * 5 + b"abc" + b"\0" * 12)}),
    "old sparse": (
        old_gnu_sparse([(0, 512), (5000, 0)], b"x" * 512, 5000),
        {"holes": is_file(b"x" * 512 + bytes(5000 - 512))},
    ),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_odd_archive_is_unpacked_inside(room: Room, case: str) -> None:
    archive, expected = HARMLESS[case]
    assert room.unpack(archive + END) is None
    for path, holds in expected.items():
        assert holds(room.target / path), path


def test_reserved_attributes_never_enter(room: Room) -> None:
    names = (b"trusted.vzfs.origin", b"trusted.vzfs.x.user.a", b"trusted.overlay.opaque", b"user.kept")
    archive = pax(*((b"SCHILY.xattr." + name, b"y") for name in names))
    for made in (archive + member(b"f"), archive + folder(b"d"), archive + folder(b".")):
        assert room.unpack(made + END) is None
    assert [os.listxattr(room.target / name) for name in ("f", "d", ".")] == [["user.kept"]] * 3


def test_sparse_map_of_many_stretches_in_the_old_format(room: Room) -> None:
    pairs = [(n * 1024, 512) for n in range(20)]
    more = b"".join(octal(a, 12) + octal(b, 12) for a, b in pairs[4:]).ljust(512, b"\0")
    archive = old_gnu_sparse(pairs[:4], b"d" * 512 * 20, 20 * 1024, more=more)
    assert room.unpack(archive + END) is None
    assert (room.target / "holes").read_bytes() == (b"d" * 512 + bytes(512)) * 20


# ---------------------------------------------------------------------------------------------------------- compression

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
    "bzip2": bz2.compress,
}
BODY = member(b"noise", os.urandom(100_000)) + END


@pytest.mark.parametrize("how", PACK)
@pytest.mark.parametrize("left", [0.3, 0.9, 0.99999])
def test_cut_off_compressed_archive(room: Room, how: str, left: float) -> None:
    packed = PACK[how](BODY)
    error = room.unpack(packed[: int(len(packed) * left)])
    assert isinstance(error, SourceError)
    assert "cut off" in str(error)


@pytest.mark.parametrize("how", PACK)
@pytest.mark.parametrize("where", [0.01, 0.5, 0.9999])
def test_damaged_compressed_archive(room: Room, how: str, where: float) -> None:
    packed = bytearray(PACK[how](BODY))
    at = int(len(packed) * where)
    for near in range(at, min(at + 4, len(packed))):
        packed[near] ^= 0x55
    error = room.unpack(bytes(packed))
    assert isinstance(error, SourceError)
    assert "damaged" in str(error) or "cut off" in str(error)


@pytest.mark.parametrize("how", ["gzip", "xz", "zstd"])
def test_zeros_between_streams_are_padding(room: Room, how: str) -> None:
    half = len(BODY) // 2
    assert room.unpack(PACK[how](BODY[:half]) + bytes(512) + PACK[how](BODY[half:]) + bytes(512)) is None
    assert (room.target / "noise").stat().st_size == 100_000


def test_zstd_skippable_frames(room: Room) -> None:
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    assert room.unpack(skippable + PACK["zstd"](BODY)) is None
    assert (room.target / "noise").stat().st_size == 100_000


def test_archive_of_no_format_that_begins_like_bzip2(room: Room) -> None:
    assert room.unpack(member(b"BZh9 is a name", b"x") + END) is None
    assert (room.target / "BZh9 is a name").read_bytes() == b"x"


@pytest.mark.parametrize("how", PACK)
def test_bomb_needs_little_memory(tmp_path: pathlib.Path, how: str) -> None:
    """256 MiB of zeros, in a process that may have no more than 128 MiB of address space more."""
    room = Room(tmp_path)
    packed = tmp_path / "bomb"
    tool = {"gzip": "gzip -1", "xz": "xz -0", "zstd": "zstd -1", "bzip2": "bzip2 -1"}[how]
    subprocess.run(f"head -c 256M /dev/zero | {tool} > {packed}", shell=True, check=True)
    code = (
        "import resource, sys, zstandard, lzma, bz2\n"
        "from vzfs.store.sources import populate\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20),) * 2)\n"
        "populate(*sys.argv[1:])\n"
    )
    subprocess.run([sys.executable, "-c", code, packed, room.target], check=True)
    assert os.listdir(room.target) == []


# -------------------------------------------------------------------------------------------anything at all, at random

PARTS = [b"a", b"b", b"c", b"d", b"a", b"b", b".", b"sentinel", b"file", b"\xff", b"n" * 255]
INSIDE = st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map(b"/".join)
OUTSIDE = st.one_of(
    st.lists(st.sampled_from([b"a", b"..", b"", b"sentinel", b"file", b"n" * 256]), min_size=1, max_size=4).map(
        b"/".join
    ),
    st.sampled_from([b"/", b"./", b"//etc", b"/tmp", b"", b"../sentinel/file", b"a\0b"]),
)
LINKS = st.one_of(
    INSIDE, INSIDE, st.sampled_from([b"..", b"../sentinel", b"../sentinel/file", b"/", b"/tmp", b"a", b"b"])
)


def rarely(draw: st.DrawFn) -> bool:
    return draw(st.integers(0, 24)) == 24


KINDS = st.sampled_from(
    [b"0", b"0", b"1", b"1", b"2", b"2", b"3", b"5", b"5", b"6", b"7", b"S", b"D", b"V", b"\0", b"Z"]
)
RECORDS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                b"path",
                b"linkpath",
                b"size",
                b"uid",
                b"gid",
                b"mtime",
                b"atime",
                b"GNU.sparse.map",
                b"GNU.sparse.size",
                b"GNU.sparse.major",
                b"GNU.sparse.minor",
                b"GNU.sparse.realsize",
                b"GNU.sparse.name",
                b"GNU.sparse.offset",
                b"GNU.sparse.numbytes",
                b"SCHILY.xattr.user.a",
                b"SCHILY.xattr.security.capability",
                b"SCHILY.acl.access",
                b"SCHILY.xattr.system.posix_acl_default",
                b"SCHILY.acl.default",
                b"RHT.security.selinux",
                b"hdrcharset",
            ]
        ),
        st.one_of(
            OUTSIDE,
            st.binary(max_size=30),
            st.integers(-5, 1 << 64).map(lambda n: b"%d" % n),
            st.sampled_from([b"0", b"1"]),
        ),
    ),
    max_size=4,
)


@st.composite
def members(draw: st.DrawFn) -> bytes:
    """Mostly what may be unpacked, so that one thing comes to lie on another; now and then something impossible."""
    kind = draw(st.sampled_from([b"Z", b"V", b"S", b"M"])) if rarely(draw) else draw(KINDS)
    name = draw(OUTSIDE if rarely(draw) else INSIDE)
    text = draw(OUTSIDE if rarely(draw) else LINKS if kind == b"2" else INSIDE)
    data = draw(st.binary(max_size=600)) if kind in (b"0", b"7", b"\0") else b""
    before = b""
    if rarely(draw):
        before = pax(*draw(RECORDS), kind=draw(st.sampled_from([b"x", b"x", b"x", b"g"])))
    if len(name) > 100 or draw(st.booleans()):
        before += long_name(name)
    if len(text) > 100 or draw(st.booleans()):
        before += long_name(text, b"K")
    size = draw(st.integers(-(1 << 70), 1 << 70)) if rarely(draw) else len(data)
    tail = draw(st.binary(max_size=110)) if kind == b"S" else b""
    return before + header(name, kind, size=size, link=text, device=(1, 3), tail=tail) + padded(data)


@contextlib.contextmanager
def temporary_room() -> Iterator[Room]:
    with tempfile.TemporaryDirectory() as base:
        yield Room(pathlib.Path(base))


ROOMY = settings(
    deadline=None,
    max_examples=500,
    derandomize=True,  # as in the other tests: the same examples every time
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@ROOMY
@given(st.lists(members(), max_size=12))
def test_no_sequence_of_members_reaches_outside(archive: list[bytes]) -> None:
    with temporary_room() as room:
        room.unpack(b"".join(archive) + END)


@settings(ROOMY, max_examples=100)
@given(st.lists(members(), min_size=10, max_size=30))
def test_no_pile_of_archives_reaches_outside(archives: list[bytes]) -> None:
    """One member at a time into the same place: what is refused ends nothing, so hostile things stay and add up."""
    with temporary_room() as room:
        for archive in archives:
            room.unpack(archive + END)


VALID = (
    folder(b"./", 0o755)
    + pax(
        (b"SCHILY.xattr.user.a", b"\xff"),
        (b"mtime", b"1.5"),
        (b"SCHILY.acl.access", b"u::rw-,u:5:r--,g::r--,m::r--,o::r--"),
    )
    + member(b"a", b"x" * 700)
    + folder(b"d")
    + symlink(b"d/s", b"../../sentinel")
    + link(b"d/l", b"a")
    + sparse_1_0(b"2\n5\n3\n20\n0\n", b"abc", b"20")
    + old_gnu_sparse([(0, 512), (5000, 0)], b"x" * 512, 5000)
    + long_name(b"d/" + b"n" * 200)
    + member(b"n", b"y")
)


def checksummed(archive: bytearray) -> bytes:
    """Make every block that still looks like a header pass for one, so that damage gets beyond the checksum."""
    for at in range(0, len(archive) - 511, 512):
        if archive[at + 257 : at + 262] == b"ustar":
            archive[at + 148 : at + 156] = b" " * 8
            archive[at + 148 : at + 156] = b"%06o\0 " % sum(archive[at : at + 512])
    return bytes(archive)


@ROOMY
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=8),
    st.booleans(),
    st.sampled_from([None, *PACK]),
    st.one_of(st.none(), st.integers(0, len(VALID) + 1024)),
)
def test_no_damage_reaches_outside(
    damage: list[tuple[int, int]], pass_checksum: bool, how: str | None, cut: int | None
) -> None:
    data = bytearray(VALID + END)
    if pass_checksum:
        for at, value in damage:
            data[at] = value
        data = bytearray(checksummed(data))
    packed = bytearray(PACK[how](bytes(data)) if how else data)
    if not pass_checksum:
        for at, value in damage:
            packed[at % len(packed)] = value
    with temporary_room() as room:
        room.unpack(bytes(packed[:cut]))


def test_the_archive_that_is_damaged_above_is_valid(room: Room) -> None:
    assert room.unpack(VALID + END) is None
    assert sorted(os.listdir(room.target)) == ["a", "d", "holes"]
