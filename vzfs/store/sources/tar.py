"""Tar archives as a stream of bytes in, members out: ustar, GNU and PAX, with no file touched here.

Rule: an archive is understood completely or refused by ``SourceError`` that names the member; the input is only ever
read forwards. Python's ``tarfile`` is not used, because it takes a damaged header in the middle for the end of the
archive, misses an archive cut between two members, reads extension headers of any declared size into memory, follows
chains of them by recursion and turns PAX times into floats.

Formats: POSIX.1-2017 pax(1); GNU tar manual, "Basic Tar Format" and "Storing Sparse Files".
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vzfs.errors import SourceError
from vzfs.store.sources.budget import Budget
from vzfs.store.sources.errors import refused, shown

_BLOCK = 512
_END = bytes(_BLOCK)
_CHUNK = 1 << 20
_RUN = 32 << 10
"""Zeros in a row that become a hole: fewer would tear files into more pieces than the space is worth."""
_BLOCKS = 4096
"""Bytes from which a file's last zeros become one."""
_ZEROS = bytes(_RUN)

MAX_EXTENSION = 1 << 20
"""Bytes of one extension header (PAX records, GNU long name). Linux allows a path of 4 KiB, an xattr of 64 KiB."""

MAX_SEGMENTS = 1 << 20
"""Stretches of data in one sparse file."""

_MAX_SIZE = (1 << 63) - 1  # off_t
_MAX_SECONDS = (1 << 63) // 1_000_000_000  # what st_mtime_ns can express in 64 bits
_MAX_ID = 0xFFFFFFFE  # the next one means "leave it" to chown(2)
_DECIMAL = re.compile(rb"[0-9]{1,20}")
_OCTAL = re.compile(rb"[0-7]*")
_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")


class Kind(enum.Enum):
    """What a member is."""

    FILE = "file"
    LINK = "hard link"
    SYMLINK = "symlink"
    CHAR = "character device"
    BLOCK = "block device"
    DIRECTORY = "directory"
    FIFO = "fifo"


_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": Kind.LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHAR,
    b"4": Kind.BLOCK,
    b"5": Kind.DIRECTORY,
    b"D": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}
_WITH_DATA = (b"0", b"\0", b"7", b"S", b"D")  # POSIX: the size field of the others tells nothing about data


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an archive.

    ``size`` is the file's size in bytes; ``segments`` are the ``(offset, length)`` of its stored data, ascending, all
    of it for an ordinary file. ``extensions`` are all PAX records, values as bytes. Times are ns since the epoch;
    ``atime_ns`` is the mtime where the archive doesn't tell.
    """

    name: bytes
    kind: Kind
    link: bytes
    mode: int
    uid: int
    gid: int
    user: bytes
    group: bytes
    mtime_ns: int
    atime_ns: int
    device: tuple[int, int]
    size: int
    segments: tuple[tuple[int, int], ...]
    extensions: Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True)
class _Header:
    """The fields of one header block, numbers parsed, nothing judged."""

    kind: bytes
    name: bytes
    link: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    user: bytes
    group: bytes
    device: tuple[int, int]
    raw: bytes


@dataclass(slots=True)
class _Extensions:
    """What the extension headers before a member say."""

    name: bytes | None = None
    link: bytes | None = None
    records: tuple[tuple[bytes, bytes], ...] = ()


class ByteStream:
    """Reads exact numbers of bytes from an iterator of pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = b""
        self._at = 0

    def some(self, limit: int) -> bytes:
        """At most ``limit`` (> 0) bytes; empty only at the end."""
        while self._at == len(self._piece):
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._piece, self._at = piece, 0
        data = self._piece[self._at : self._at + limit]
        self._at += len(data)
        return data

    def read(self, size: int) -> bytes:
        """``size`` bytes, fewer only when the stream ends before."""
        data = self.some(size) if size else b""
        if len(data) == size:
            return data
        parts = [data]
        missing = size - len(data)
        while missing and (data := self.some(missing)):
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)


class TarReader:
    """Iterate for the members; between two of them, ``copy_data`` writes the current one's data to a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._stream = ByteStream(pieces)
        self._globals: dict[bytes, bytes] = {}
        self._name = b""  # of the current member, for messages
        self._unread = 0  # bytes of the current member's data
        self._padding = 0

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            yield member

    def copy_data(self, member: Member, fd: int, budget: Budget) -> None:
        """Write the current member's data to the empty file ``fd``, holes and long runs of zeros as holes.

        Raises ``OSError``, ``SourceError``, ``FullError`` when it is more than the budget has left.
        """
        written = 0
        for offset, length in member.segments:
            end = offset + length
            while offset < end:
                data = self._some_data(min(end - offset, _CHUNK))
                budget.spend(len(data), member.name)
                written = _write_sparse(fd, data, offset) or written
                offset += len(data)
        if written != member.size:
            os.ftruncate(fd, member.size)

    def drain(self) -> int:
        """Read to the end of the input, which verifies its checksum; count the bytes there that aren't zero."""
        beyond = 0
        while data := self._stream.some(_CHUNK):
            if data != bytes(len(data)):  # a comparison is much faster than counting
                beyond += len(data) - data.count(0)
        return beyond

    # Bytes of the current member

    def _exactly(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) != size:
            raise self._cut_off()
        return data

    def _cut_off(self) -> SourceError:
        where = f"within or right after {shown(self._name)}" if self._name else "in its first header"
        return SourceError(f"the archive is cut off {where}", remedy="fetch or make the archive again")

    def _data(self, size: int) -> bytes:
        if size > self._unread:
            raise refused(self._name, "its data ends before the map of its holes does")
        self._unread -= size
        return self._exactly(size)

    def _some_data(self, limit: int) -> bytes:
        data = self._stream.some(limit)
        if not data:
            raise self._cut_off()
        self._unread -= len(data)
        return data

    def _skip(self) -> None:
        left = self._unread + self._padding
        while left:
            data = self._stream.some(min(left, _CHUNK))
            if not data:
                raise self._cut_off()
            left -= len(data)
        self._unread = self._padding = 0

    # Headers

    def _next(self) -> Member | None:
        self._skip()
        extensions = _Extensions()
        while True:
            block = self._stream.read(_BLOCK)
            if block == _END:
                return None
            if len(block) < _BLOCK:
                if not block and not self._name:
                    raise SourceError("the archive is empty")
                raise self._cut_off()
            header = self._header(block)
            if header.kind == b"L":
                extensions.name = self._text(header)
            elif header.kind == b"K":
                extensions.link = self._text(header)
            elif header.kind in (b"x", b"X"):
                extensions.records = tuple(self._records(header))
            elif header.kind == b"g":
                self._globals.update(self._records(header))
            elif header.kind == b"V":
                self._begin_data(header.size)  # a volume's label
                self._skip()
            else:
                return self._member(header, extensions)

    def _header(self, block: bytes) -> _Header:
        try:
            _verify(block)
            return _fields(block)
        except ValueError:
            if not self._name:
                raise SourceError("this is not a tar archive, or its first header is damaged") from None
            raise SourceError(f"the archive is damaged: no header follows {shown(self._name)}") from None

    def _begin_data(self, size: int) -> None:
        if not 0 <= size <= _MAX_SIZE:
            raise refused(self._name, f"a size of {size} bytes is impossible")
        self._unread = size
        self._padding = -size % _BLOCK

    def _extension(self, header: _Header) -> bytes:
        if not self._name:
            self._name = header.name
        if not 0 <= header.size <= MAX_EXTENSION:
            raise refused(header.name, f"an extension header of {header.size} bytes (at most {MAX_EXTENSION})")
        data = self._exactly(header.size)
        self._exactly(-header.size % _BLOCK)
        return data

    def _text(self, header: _Header) -> bytes:
        return self._extension(header).split(b"\0", 1)[0]

    def _records(self, header: _Header) -> list[tuple[bytes, bytes]]:
        data = self._extension(header)
        records = []
        at = 0
        while at < len(data):
            length, space, _ = data[at : at + 8].partition(b" ")
            if not space or not _DECIMAL.fullmatch(length):
                raise refused(header.name, "malformed PAX records")
            start, end = at + len(length) + 1, at + int(length)
            keyword, equals, value = data[start : end - 1].partition(b"=")
            if end <= start or end > len(data) or data[end - 1] != 0x0A or not keyword or not equals:
                raise refused(header.name, "malformed PAX records")
            records.append((keyword, value))
            at = end
        return records

    # Members

    def _member(self, header: _Header, extensions: _Extensions) -> Member:
        records = self._globals | dict(extensions.records)
        name = records.get(b"GNU.sparse.name") or records.get(b"path") or extensions.name or header.name
        self._name = name or b"(no name)"
        kind = _KINDS.get(header.kind)
        if kind is None:
            raise refused(self._name, f"a member of the unknown type {shown(header.kind)}")
        if header.kind == b"\0" and name.endswith(b"/"):
            kind = Kind.DIRECTORY  # how tar wrote directories in 1979
        stored = self._decimal(records, b"size", header.size)
        self._begin_data(stored if header.kind in _WITH_DATA else 0)
        size, segments = self._layout(header, records, extensions) if kind is Kind.FILE else (0, ())
        mtime_ns = self._time(records, b"mtime", header.mtime * 1_000_000_000)
        return Member(
            name=name,
            kind=kind,
            link=records.get(b"linkpath") or extensions.link or header.link,
            mode=header.mode & 0o7777,
            uid=self._id(records, b"uid", header.uid),
            gid=self._id(records, b"gid", header.gid),
            user=records.get(b"uname") or header.user,
            group=records.get(b"gname") or header.group,
            mtime_ns=mtime_ns,
            atime_ns=self._time(records, b"atime", mtime_ns),
            device=header.device,
            size=size,
            segments=segments,
            extensions=records,
        )

    def _decimal(self, records: Mapping[bytes, bytes], keyword: bytes, otherwise: int) -> int:
        text = records.get(keyword)
        if not text:  # an empty value takes a global one back
            return otherwise
        if not _DECIMAL.fullmatch(text):
            raise refused(self._name, f"PAX record {keyword.decode()} is not a number")
        return int(text)

    def _id(self, records: Mapping[bytes, bytes], keyword: bytes, otherwise: int) -> int:
        number = self._decimal(records, keyword, otherwise)
        if not 0 <= number <= _MAX_ID:
            raise refused(self._name, f"{keyword.decode()} {number} is impossible")
        return number

    def _time(self, records: Mapping[bytes, bytes], keyword: bytes, otherwise: int) -> int:
        text = records.get(keyword)
        time_ns = otherwise
        if text:
            parts = _TIME.fullmatch(text)
            if parts is None:
                raise refused(self._name, f"PAX record {keyword.decode()} is not a time")
            time_ns = _nanoseconds(parts[1] == b"-", parts[2], parts[3] or b"")
        if abs(time_ns) >= _MAX_SECONDS * 1_000_000_000:
            raise refused(self._name, f"{keyword.decode()} is out of range")
        return time_ns

    # Sparse files

    def _layout(
        self, header: _Header, records: Mapping[bytes, bytes], extensions: _Extensions
    ) -> tuple[int, tuple[tuple[int, int], ...]]:
        """The file's size and its stretches of data; checked against what is stored."""
        if header.kind == b"S":
            size, numbers = self._old_gnu_map(header)
        elif b"GNU.sparse.map" in records:  # version 0.1
            size, numbers = self._sparse_size(records), self._numbers(records[b"GNU.sparse.map"].split(b","))
        elif records.get(b"GNU.sparse.major") == b"1" and records.get(b"GNU.sparse.minor") == b"0":
            size, numbers = self._sparse_size(records), self._stored_map()
        elif b"GNU.sparse.size" in records:  # version 0.0: a pair of records for each stretch
            keywords = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
            size = self._sparse_size(records)
            numbers = self._numbers([value for keyword, value in extensions.records if keyword in keywords])
        else:
            return self._unread, ((0, self._unread),) if self._unread else ()
        return size, self._checked_map(size, numbers)

    def _sparse_size(self, records: Mapping[bytes, bytes]) -> int:
        return self._decimal(records, b"GNU.sparse.realsize", self._decimal(records, b"GNU.sparse.size", -1))

    def _numbers(self, texts: list[bytes]) -> list[int]:
        if len(texts) > 2 * MAX_SEGMENTS or not all(_DECIMAL.fullmatch(text) for text in texts):
            raise refused(self._name, "malformed map of its holes")
        return [int(text) for text in texts]

    def _old_gnu_map(self, header: _Header) -> tuple[int, list[int]]:
        """Four pairs in the header, 21 in each block that follows while a flag says so."""
        raw = header.raw
        try:
            size = _number(raw[483:495])
            numbers = _pairs(raw, 386, 4)
            more = raw[482]
            while more:
                block = self._exactly(_BLOCK)
                numbers += _pairs(block, 0, 21)
                more = block[504]
                if len(numbers) > 2 * MAX_SEGMENTS:
                    raise ValueError("too long")
        except ValueError:
            raise refused(self._name, "malformed map of its holes") from None
        return size, numbers

    def _stored_map(self) -> list[int]:
        """Version 1.0: decimal numbers, one a line, in the data's first blocks; the number of pairs comes first."""
        lines: list[bytes] = []
        rest = b""
        wanted = 1
        while len(lines) < wanted:
            *whole, rest = (rest + self._data(_BLOCK)).split(b"\n")
            lines += whole
            if lines:
                wanted = 1 + 2 * self._numbers(lines[:1])[0]
                if wanted > 2 * MAX_SEGMENTS:
                    raise refused(self._name, "a map of too many holes")
            if len(lines) < wanted and len(rest) > 20:
                raise refused(self._name, "malformed map of its holes")
        return self._numbers(lines[1:wanted])

    def _checked_map(self, size: int, numbers: list[int]) -> tuple[tuple[int, int], ...]:
        if not 0 <= size <= _MAX_SIZE:
            raise refused(self._name, f"a size of {size} bytes is impossible")
        segments = tuple(zip(numbers[::2], numbers[1::2], strict=False))
        end = stored = 0
        for offset, length in segments:
            if offset < end or length < 0 or offset + length > size:
                raise refused(self._name, "the map of its holes contradicts itself")
            end = offset + length
            stored += length
        if stored != self._unread or len(numbers) % 2:
            raise refused(self._name, "the map of its holes doesn't agree with its stored size")
        return tuple(segment for segment in segments if segment[1])


def _write_sparse(fd: int, data: bytes, offset: int) -> int:
    """Write ``data`` at ``offset`` of a file that has nothing there, runs of zeros left out; gives where the last byte
    that was written ends, 0 for none."""
    view = memoryview(data)
    start = written = 0
    for at in range(0, len(data), _RUN):
        run = view[at : at + _RUN]
        if len(run) >= _BLOCKS and run == _ZEROS[: len(run)]:
            written = _write_all(fd, view[start:at], offset + start) or written
            start = at + len(run)
    return _write_all(fd, view[start:], offset + start) or written


def _write_all(fd: int, view: memoryview, offset: int) -> int:
    if not view:
        return 0
    while view:
        done = os.pwrite(fd, view, offset)
        view = view[done:]
        offset += done
    return offset


def _verify(block: bytes) -> None:
    """Compare a header's checksum: the sum of its bytes with the checksum itself taken for spaces."""
    stored = _number(block[148:156])
    total = sum(block) - sum(block[148:156]) + 8 * 32
    if stored != total:
        # Old Suns took bytes with the highest bit for negative numbers.
        high = sum(1 for byte in block[:148] + block[156:] if byte & 0x80)
        if stored != total - 256 * high:
            raise ValueError("checksum")


def _number(field: bytes) -> int:
    """A number as octal text, or in GNU's base 256, which is marked by the first bit and can be negative."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ~(1 << (8 * len(field) - 1))
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    text = field.split(b"\0", 1)[0].strip(b" ")
    if not _OCTAL.fullmatch(text):
        raise ValueError("not an octal number")
    return int(text or b"0", 8)


def _string(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _pairs(raw: bytes, at: int, count: int) -> list[int]:
    """Offsets and lengths of old GNU's sparse map; unused pairs are all zero."""
    numbers: list[int] = []
    for start in range(at, at + 24 * count, 24):
        pair = (_number(raw[start : start + 12]), _number(raw[start + 12 : start + 24]))
        if any(pair):
            numbers += pair
    return numbers


def _fields(block: bytes) -> _Header:
    name = _string(block[0:100])
    if block[257:263] == b"ustar\0":
        # star puts times behind a shorter prefix and marks that at the end; GNU ("ustar ") has no prefix at all
        prefix = _string(block[345:476] if block[508:512] == b"tar\0" else block[345:500])
        name = prefix + b"/" + name if prefix else name
    device = block[156:157] in (b"3", b"4")
    return _Header(
        kind=block[156:157],
        name=name,
        link=_string(block[157:257]),
        mode=_number(block[100:108]),
        uid=_number(block[108:116]),
        gid=_number(block[116:124]),
        size=_number(block[124:136]),
        mtime=_number(block[136:148]),
        user=_string(block[265:297]),
        group=_string(block[297:329]),
        device=(_number(block[329:337]), _number(block[337:345])) if device else (0, 0),
        raw=block,
    )


def _nanoseconds(negative: bool, seconds: bytes, fraction: bytes) -> int:
    """Decimal seconds as ns, digits below them cut towards minus infinity as GNU tar does."""
    time_ns = int(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    if not negative:
        return time_ns
    return -time_ns - (1 if fraction[9:].strip(b"0") else 0)
