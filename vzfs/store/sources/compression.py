"""Decompression by content: gzip, xz, zstd, bzip2 or nothing, from an iterator of pieces to an iterator of pieces.

Rule: a damaged or cut-off stream is an error, never a shorter result; no piece of input, however hostile, expands to
more than ``_PIECE`` (zstd: ``_ZSTD_INPUT`` x 32,768) bytes of memory at a time.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from vzfs.errors import SourceError, UnsupportedError

if TYPE_CHECKING:
    import zstandard

_PIECE = 1 << 20
_ZSTD_INPUT = 1 << 10  # 4 bytes of zstd can mean a block of 128 KiB (RFC 8878, RLE_Block): at most 32 MiB at a time
_XZ_MEMORY = 512 << 20  # xz -9 needs 65 MiB; more than this only a hostile archive asks for
_MAGIC = 16


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def feed(self, data: bytes) -> Iterator[bytes]: ...


class _Gzip:
    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data and not self._inner.eof:
            yield self._inner.decompress(data, _PIECE)
            data = self._inner.unconsumed_tail


class _Blockwise:
    """bz2 and lzma, whose decompressors keep what they couldn't yet give out."""

    def __init__(self, inner: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._inner = inner

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield self._inner.decompress(data, _PIECE)
        while not self._inner.eof and not self._inner.needs_input:
            yield self._inner.decompress(b"", _PIECE)


class _Zstd:
    def __init__(self, inner: zstandard.ZstdDecompressionObj) -> None:
        self._inner = inner
        self._rest = b""

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data + self._rest

    def feed(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), _ZSTD_INPUT):
            yield self._inner.decompress(data[start : start + _ZSTD_INPUT])
            if self._inner.eof:
                self._rest = data[start + _ZSTD_INPUT :]
                return


def _new_bzip2() -> _Decoder:
    return _Blockwise(bz2.BZ2Decompressor())


def _new_xz() -> _Decoder:
    return _Blockwise(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY))


def _zstd_format() -> tuple[Callable[[], _Decoder], type[Exception]]:
    try:
        import zstandard
    except ImportError as error:
        raise UnsupportedError(
            "the archive is compressed with zstd, and the Python package zstandard is missing",
            remedy="install it, or recompress the archive with xz",
        ) from error
    return (lambda: _Zstd(zstandard.ZstdDecompressor().decompressobj())), zstandard.ZstdError


def decompressed(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The data that ``pieces`` is a compressed form of, or itself when it isn't compressed.

    Raises ``SourceError`` for damaged or cut-off data, ``UnsupportedError`` for zstd without its package.
    """
    start = b""
    for piece in pieces:
        start += piece
        if len(start) >= _MAGIC:
            break
    whole = _after(start, pieces)
    if start.startswith(b"\x1f\x8b\x08"):
        return _streams(whole, _Gzip, zlib.error, "gzip")
    if start.startswith(b"\xfd7zXZ\0"):
        return _streams(whole, _new_xz, lzma.LZMAError, "xz")
    if start.startswith(b"\x28\xb5\x2f\xfd") or (0x50 <= (start or b"\0")[0] <= 0x5F and start[1:4] == b"\x2a\x4d\x18"):
        new, failure = _zstd_format()
        return _streams(whole, new, failure, "zstd")
    if start[:3] == b"BZh" and start[4:10] == b"1AY&SY":
        return _streams(whole, _new_bzip2, OSError, "bzip2")
    return whole


def _after(start: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield start
    yield from rest


def _streams(
    pieces: Iterator[bytes], new: Callable[[], _Decoder], failure: type[Exception], form: str
) -> Iterator[bytes]:
    """Decompress one or more streams laid end to end, as ``cat a.gz b.gz`` and parallel compressors make them."""
    decoder = new()
    for piece in pieces:
        while piece:
            if decoder.eof:
                piece = piece.lstrip(b"\0")  # tapes and xz pad with zeros
                if not piece:
                    break
                decoder = new()
            yield from _guarded(decoder, piece, failure, form)
            piece = decoder.unused_data if decoder.eof else b""
    if not decoder.eof:
        raise SourceError(f"the archive's {form} data is cut off", remedy="fetch or make the archive again")


def _guarded(decoder: _Decoder, piece: bytes, failure: type[Exception], form: str) -> Iterator[bytes]:
    output = decoder.feed(piece)
    while True:
        try:
            data = next(output, None)
        except (failure, EOFError, MemoryError) as error:
            raise SourceError(
                f"the archive's {form} data is damaged: {error}", remedy="fetch or make the archive again"
            ) from error
        if data is None:
            return
        yield data
