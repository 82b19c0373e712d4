"""The ioctls that the direct engine answers: file attributes as chattr(1) and lsattr(1) ask for them."""

from __future__ import annotations

from vzfs.fuse import wire

# <linux/fs.h>
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IOC32_GETFLAGS, FS_IOC32_SETFLAGS = 0x80046601, 0x40046602
FS_IOC_FSGETXATTR = 0x801C581F
_XFLAGS = {0x08: 0x20, 0x10: 0x08, 0x20: 0x10, 0x40: 0x80, 0x80: 0x40}
"""What FS_IOC_FSGETXATTR calls the ``FS_*_FL`` sync, immutable, append, nodump and noatime."""


def answer(value: int, size: int) -> bytes:
    """The answer to an ioctl whose result, of ``size`` bytes, begins with 32 bits of flags."""
    return wire.IOCTL_OUT.pack(0, 0, 0, 0) + value.to_bytes(4, "little").ljust(size, b"\0")[:size]


def xflags(flags: int) -> int:
    """``FS_*_FL`` as FS_IOC_FSGETXATTR calls them."""
    return sum(xflag for flag, xflag in _XFLAGS.items() if flags & flag)
