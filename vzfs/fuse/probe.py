"""Whether the server of a mounted root answers.

Rule: nothing here waits longer than it was told to, whatever the server does.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from enum import Enum

from vzfs import linux
from vzfs.fuse.apart import apart

PATIENCE_S = 1.0
"""How long a root may take to answer before it counts as not answering: a healthy one takes under a millisecond."""


class Answer(Enum):
    """What asking gave; ``ELSEWHERE``: that file system isn't there."""

    ALIVE = b"alive"
    DEAD = b"dead"
    SILENT = b"silent"
    ELSEWHERE = b"elsewhere"


def ask(roots: Sequence[tuple[str, str]], patience_s: float = PATIENCE_S) -> list[Answer]:
    """Ask each of ``roots``, a path and the device that should be there, all at once."""
    given = apart([_question(path, device) for path, device in roots], patience_s)
    return [Answer.SILENT if one is None else Answer(one) for one in given]


def _question(path: str, device: str) -> Callable[[], bytes]:
    def asked() -> bytes:
        try:
            if linux.device_of(path) != device:
                return Answer.ELSEWHERE.value
            os.statvfs(path)  # stat would be answered from the kernel's cache
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                return Answer.DEAD.value
            return Answer.ELSEWHERE.value if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES) else b"alive"
        return Answer.ALIVE.value

    return asked
