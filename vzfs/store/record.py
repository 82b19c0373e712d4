"""Changed attributes of a template file, kept in extended attributes of a magic link of the container's own.

Format of ``trusted.vzfs.attr``: words ``key=value`` separated by one space; keys ``mode`` (permission bits, octal),
``uid``, ``gid``, ``atime``, ``mtime`` (seconds with nine decimals) and ``xattrs=own``. What is absent is the
template's. The change time is the link's own. With ``xattrs=own`` the ``trusted.vzfs.x.<name>`` are all the extended
attributes the file has.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, replace

from vzfs.store.index import Attributes
from vzfs.store.xattrs import ATTR_XATTR, XATTR_PREFIX

_NS = 10**9
_ID_MAX = 2**32 - 2  # the last one means "none" to chown(2)
_SECONDS_MAX = 2**62  # what fits into a struct timespec with room for arithmetic


@dataclass(frozen=True, slots=True)
class Record:
    """The attributes that differ from the template's; ``None`` where they don't. Times in nanoseconds."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    own_xattrs: bool = False

    def encode(self) -> bytes:
        """The stored form."""
        words = []
        if self.mode is not None:
            words.append(f"mode={self.mode:04o}")
        if self.uid is not None:
            words.append(f"uid={self.uid}")
        if self.gid is not None:
            words.append(f"gid={self.gid}")
        if self.atime_ns is not None:
            words.append(f"atime={_seconds(self.atime_ns)}")
        if self.mtime_ns is not None:
            words.append(f"mtime={_seconds(self.mtime_ns)}")
        if self.own_xattrs:
            words.append("xattrs=own")
        return " ".join(words).encode()

    @staticmethod
    def decode(data: bytes) -> Record:
        """Read the stored form; raises ``ValueError`` when it isn't one."""
        record = Record()
        for word in data.decode("ascii").split():
            key, _, value = word.partition("=")
            if key == "mode":
                record = replace(record, mode=_number(value, 8, 0o7777))
            elif key == "uid":
                record = replace(record, uid=_number(value, 10, _ID_MAX))
            elif key == "gid":
                record = replace(record, gid=_number(value, 10, _ID_MAX))
            elif key == "atime":
                record = replace(record, atime_ns=_nanoseconds(value))
            elif key == "mtime":
                record = replace(record, mtime_ns=_nanoseconds(value))
            elif word == "xattrs=own":
                record = replace(record, own_xattrs=True)
            else:
                raise ValueError(f"unknown word {word!r}")
        return record

    def apply(self, base: Attributes, nlink: int, ctime_ns: int) -> Attributes:
        """The template's attributes ``base`` with this record's, and the given link count and change time."""
        return base._replace(
            mode=base.mode if self.mode is None else stat.S_IFMT(base.mode) | self.mode,
            uid=base.uid if self.uid is None else self.uid,
            gid=base.gid if self.gid is None else self.gid,
            atime_ns=base.atime_ns if self.atime_ns is None else self.atime_ns,
            mtime_ns=base.mtime_ns if self.mtime_ns is None else self.mtime_ns,
            nlink=nlink,
            ctime_ns=ctime_ns,
        )


def _number(text: str, base: int, most: int) -> int:
    number = int(text, base)
    if not 0 <= number <= most:
        raise ValueError(f"{text!r} is out of range")
    return number


def _seconds(time_ns: int) -> str:
    return f"{time_ns // _NS}.{time_ns % _NS:09d}"  # floor and positive remainder, also before 1970


def _nanoseconds(text: str) -> int:
    seconds, _, fraction = text.partition(".")
    if len(fraction) != 9 or not -_SECONDS_MAX <= int(seconds) <= _SECONDS_MAX:
        raise ValueError(f"malformed time {text!r}")
    return int(seconds) * _NS + _number(fraction, 10, _NS - 1)


def read_record(path: bytes) -> Record | None:
    """The record that the link at ``path`` carries, or ``None``. Raises ``OSError``: ``EIO`` for a malformed one."""
    try:
        return Record.decode(os.getxattr(path, ATTR_XATTR, follow_symlinks=False))
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        raise
    except ValueError as error:
        raise OSError(errno.EIO, f"malformed {ATTR_XATTR}: {error}", path) from error


def read_own_xattrs(path: bytes) -> dict[str, bytes]:
    """The container's own extended attributes that the link at ``path`` carries."""
    return {
        name.removeprefix(XATTR_PREFIX): os.getxattr(path, name, follow_symlinks=False)
        for name in os.listxattr(path, follow_symlinks=False)
        if name.startswith(XATTR_PREFIX)
    }
