"""Times of a real directory that must not move when only the form of what it holds changes.

Copying a child up or unfolding it renames something in the directory, which moves its modification time although
for the container nothing happened there. Rule: the time is noted on the directory before that, and the note is taken
away when it is set back; so a note that is found means that a crash came between, and whoever meets the directory
sets it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Iterator

from vzfs import linux
from vzfs.store.xattrs import TIMES_XATTR

log = logging.getLogger(__name__)

_NOTE = struct.Struct("<q")
_NOTABLE = 1 << 63
"""Times beyond, after the year 2262, are set back as well, but not by who comes after a crash."""


@contextlib.contextmanager
def unchanged_times(folder: int) -> Iterator[None]:
    """Keep the times of the directory ``folder`` for a ``with`` block, also if the process dies in it."""
    info, path = os.fstat(folder), linux.fd_path(folder)
    if abs(info.st_mtime_ns) < _NOTABLE:
        os.setxattr(path, TIMES_XATTR, _NOTE.pack(info.st_mtime_ns))
    try:
        yield
    finally:
        try:
            _set_back(path, info.st_atime_ns, info.st_mtime_ns)
        except OSError:  # what was done meanwhile is done
            log.exception("can't set back the times of a directory; the next mount does")


def restore_times(path: bytes) -> None:
    """Finish what an interrupted ``unchanged_times`` began with the directory at ``path``."""
    try:
        note = os.getxattr(path, TIMES_XATTR, follow_symlinks=False)
    except OSError:  # ENODATA, as good as always
        return
    if len(note) == _NOTE.size:
        _set_back(path, os.lstat(path).st_atime_ns, *_NOTE.unpack(note))


def _set_back(path: bytes, atime_ns: int, mtime_ns: int) -> None:
    os.utime(path, ns=(atime_ns, mtime_ns))
    if abs(mtime_ns) < _NOTABLE:
        os.removexattr(path, TIMES_XATTR)
