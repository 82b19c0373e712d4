"""How the data of a copy reaches the disk before the name under which it is seen.

A copy takes its file's place by a rename, which must never be on the disk without the data. Flushing the copy
(fdatasync(2)) ensures that on every file system, and waits for its journal each time. Where a journal inside the file
system keeps all changes of metadata in the order in which they were made, it is enough that the data is written
before the rename: once it is, the file's size and blocks are in the journal before the rename, and the journal flushes
the disk's own cache before each of its commits.

That is so on ext4: blocks and size are journaled when data is sent to the disk, and a page counts as written only
after its extent does (``ext4_end_io_end`` in fs/ext4/page-io.c). A journal on another device flushes only that one.
Measured on a virtual disk: 0.1 ms for a file of 4 KiB instead of 0.5.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from vzfs import linux

_JOURNAL_INODE = 8
"""Of a journal inside the file system (``EXT4_JOURNAL_INO``), by which the kernel names it in /proc/fs/jbd2."""


def flusher(fd: int) -> Callable[[int], None]:
    """What flushes, on the file system of ``fd``, the data of an open new file that is about to be renamed."""
    return linux.write_out if has_own_journal(os.fstat(fd).st_dev) else os.fdatasync


def has_own_journal(device: int) -> bool:
    """Whether the file system on ``device`` is one with a journal of jbd2 inside, as ext4 usually is."""
    try:
        name = os.path.basename(os.readlink(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))
    except OSError:  # no block device: btrfs, tmpfs, …
        return False
    return os.path.isdir(f"/proc/fs/jbd2/{name}-{_JOURNAL_INODE}")
