"""The way to a root for a runtime whose root user isn't the node's.

``<store>/root`` is closed to everybody but root, because a container's root has set-id programs in it, which a user of
the node must not run. A runtime that enters a user namespace before it enters the root needs to pass, as the user whom
its root is mapped to. For it there is ``<store>/userns/<CT_ID>/root``: anybody may pass ``userns``, but the folder of
each container only root and that one user.

Rule: the folder stays root's, so that this user can neither rename nor replace the mount point.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

from vzfs.errors import UnsupportedError, UsageError

PASSABLE = 0o711
_ACL_XATTR = "system.posix_acl_access"
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20  # <linux/posix_acl.h>
_NOBODY = 0xFFFFFFFF


def let_pass(folder: Path, uid: int) -> None:
    """Make ``folder``, and its parent, so that only root and ``uid`` can pass it. Raises ``UnsupportedError``."""
    for path, mode in ((folder.parent, PASSABLE), (folder, 0o700)):
        path.mkdir(mode=mode, exist_ok=True)
        info = os.lstat(path)
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != 0:
            raise UsageError(f"{path} is no folder of root's", remedy="move it away")
    folder.parent.chmod(PASSABLE)  # whatever the umask
    entries = (
        (_USER_OBJ, 7, _NOBODY),
        (_USER, 1, uid),
        (_GROUP_OBJ, 0, _NOBODY),
        (_MASK, 1, _NOBODY),
        (_OTHER, 0, _NOBODY),
    )
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(folder, _ACL_XATTR, acl)
    except OSError as error:
        raise UnsupportedError(
            f"{folder} can't be opened to user {uid} alone: {error.strerror}",
            remedy="the store's file system needs ACLs; or choose a place with --mountpoint",
        ) from error
