"""What a requesting thread may do, where the protocol doesn't say.

Once ID-mapped mounts are allowed, the kernel names the caller's user only in requests that make something.

Rule: asked only where it matters and is rare, since it reads /proc; whoever can't be seen may do nothing special.
"""

from __future__ import annotations

import os

CAP_FSETID = 4
CAP_SYS_ADMIN = 21


def has_capability(client: int, capability: int) -> bool:
    """Whether thread ``client`` has the capability in this process's user namespace, so over the store as well."""
    try:
        if os.readlink(f"/proc/{client}/ns/user") != os.readlink("/proc/self/ns/user"):
            return False
        with open(f"/proc/{client}/status", "rb") as status:
            for line in status:
                if line.startswith(b"CapEff:"):
                    return bool(int(line.split()[1], 16) >> capability & 1)
    except OSError:
        pass
    return False


def user_of(client: int) -> int:
    """The effective user of thread ``client``; -1 as 32 bits when it has ended or can't be seen."""
    try:
        return os.stat(f"/proc/{client}").st_uid
    except OSError:
        return 0xFFFFFFFF


def in_group(client: int, gid: int) -> bool:
    """Whether thread ``client`` is in the group, as this process numbers groups."""
    try:
        with open(f"/proc/{client}/status", "rb") as status:
            for line in status:
                if line.startswith(b"Gid:") and int(line.split()[4]) == gid:
                    return True
                if line.startswith(b"Groups:"):
                    return gid in map(int, line.split()[1:])
    except OSError:
        pass
    return False
