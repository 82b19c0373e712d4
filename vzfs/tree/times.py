"""Times of a real directory that must not move when only the form of what it holds changes.

Copying a child up or unfolding it renames something in the directory, which moves its modification time although
for the container nothing happened there. Rule: the times are noted on the directory before that, and the note is
taken away when they are set back; so a note that is found means that a crash came between, and whoever meets the
directory sets them.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

log = logging.getLogger(__name__)

TIMES_XATTR = "trusted.vzfs.times"
"""On a directory in which something is just being replaced: access and modification time in ns since 1970."""


@contextlib.contextmanager
def unchanged_times(path: bytes) -> Iterator[None]:
    """Keep the times of the directory at ``path`` for a ``with`` block, also if the process dies in it."""
    info = os.lstat(path)
    before = b"%d %d" % (info.st_atime_ns, info.st_mtime_ns)
    os.setxattr(path, TIMES_XATTR, before, follow_symlinks=False)
    try:
        yield
    finally:
        try:
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)
            os.removexattr(path, TIMES_XATTR, follow_symlinks=False)
        except OSError:  # what was done meanwhile is done
            log.exception("can't set back the times of a directory; the next mount does")


def restore_times(path: bytes) -> None:
    """Finish what an interrupted ``unchanged_times`` began with the directory at ``path``."""
    try:
        note = os.getxattr(path, TIMES_XATTR, follow_symlinks=False)
    except OSError:  # ENODATA, as good as always
        return
    with contextlib.suppress(ValueError):  # no note of ours
        atime_ns, mtime_ns = map(int, note.split())
        os.utime(path, ns=(atime_ns, mtime_ns), follow_symlinks=False)
    os.removexattr(path, TIMES_XATTR, follow_symlinks=False)
