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
