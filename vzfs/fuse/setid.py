"""Set-user-ID and set-group-ID bits: what a write, a truncation or a new owner leaves of them.

Rule: as on ext4. The kernel leaves it to the file system (HANDLE_KILLPRIV_V2), and tells of each write that takes them.
"""

from __future__ import annotations

import os
import stat

from vzfs import linux
from vzfs.fuse.client import CAP_FSETID, has_capability, in_group

SET_ID = stat.S_ISUID | stat.S_ISGID


def guard_set_id(fd: int, client: int) -> None:
    """Take set-id bits away where the protocol doesn't say whether the client may keep them."""
    if os.fstat(fd).st_mode & SET_ID and not has_capability(client, CAP_FSETID):
        drop_set_id(fd, client)


def drop_set_id(fd: int, client: int) -> None:
    """Take from an open file the set-id bits that a write by ``client``, who may not keep them, takes."""
    info = os.fstat(fd)
    mode = left_of(info.st_mode, info.st_gid, client)
    if mode != info.st_mode:
        os.fchmod(fd, stat.S_IMODE(mode))


def left_of(mode: int, gid: int, client: int) -> int:
    """What is left of a regular file's ``mode`` when ``client`` writes to it or gives it away.

    Setgid without group execute, once a mark for mandatory locking, stays with who is in the group
    (setattr_should_drop_sgid in fs/attr.c).
    """
    left = linux.without_set_id(mode)
    if left & stat.S_ISGID and not (in_group(client, gid) or has_capability(client, CAP_FSETID)):
        left &= ~stat.S_ISGID
    return left
