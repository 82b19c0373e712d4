"""POSIX ACLs as bytes of ``system.posix_acl_*``: <linux/posix_acl_xattr.h>, version 2; and what they say of a mode.

An access ACL and the permission bits are two sides of one thing (acl(5)): the owner's and others' entries are bits of
the mode, and so is the mask, or the group's entry where there is no mask.
"""

from __future__ import annotations

import errno
import struct

VERSION = struct.pack("<I", 2)
ENTRY = struct.Struct("<HHI")
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
UNDEFINED_ID = 0xFFFFFFFF


def is_minimal(binary: bytes) -> bool:
    """Whether an ACL says nothing that the permission bits don't: user, group and other, without names or a mask."""
    return len(binary) <= len(VERSION) + 3 * ENTRY.size


def permissions(binary: bytes) -> int:
    """The nine permission bits that go with an access ACL. Raises ``OSError`` ``EINVAL`` for what is none."""
    bits = {tag: permission for tag, permission, _ in _entries(binary)}
    if not {USER_OBJ, GROUP_OBJ, OTHER} <= bits.keys():
        raise OSError(errno.EINVAL, "an ACL without owner, group and others")
    return bits[USER_OBJ] << 6 | bits.get(MASK, bits[GROUP_OBJ]) << 3 | bits[OTHER]


def with_permissions(binary: bytes, mode: int) -> bytes:
    """The access ACL after chmod(2) to ``mode``. Raises ``OSError`` ``EINVAL`` for what is none."""
    entries = _entries(binary)
    group = MASK if any(tag == MASK for tag, _, _ in entries) else GROUP_OBJ
    new = {USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, OTHER: mode & 7}
    return VERSION + b"".join(ENTRY.pack(tag, new.get(tag, bits), who) for tag, bits, who in entries)


def _entries(binary: bytes) -> list[tuple[int, int, int]]:
    if not binary.startswith(VERSION) or (len(binary) - len(VERSION)) % ENTRY.size:
        raise OSError(errno.EINVAL, "not a POSIX ACL")
    return [(tag, bits & 7, who) for tag, bits, who in ENTRY.iter_unpack(binary[len(VERSION) :])]
