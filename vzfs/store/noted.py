"""What was found out about an index, noted beside it in a line; see ``vzfs.store.seal``.

Rule: cheap to ask, so that a command may do it before it decides whether there is anything to examine.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_WORD = "vzfs-checked 1"
_SIZE_MAX = 512

Identity = tuple[int, int, int, int]
"""A file by its device, inode, change time in ns and size: nobody can set a change time, so no other has the same."""


def identity_of(info: os.stat_result) -> Identity:
    """That of the file that ``info`` tells of."""
    return info.st_dev, info.st_ino, info.st_ctime_ns, info.st_size


def read_note(path: Path, identity: Identity) -> str:
    """The digest that was noted at ``path`` for the very index that has this identity, or nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        text = os.read(fd, _SIZE_MAX).decode("ascii", "replace")
    except OSError:
        return ""
    finally:
        os.close(fd)
    digest = text.removeprefix(_mark(identity)).removesuffix("\n")
    return digest if DIGEST.fullmatch(digest) else ""


def write_note(path: Path, identity: Identity, digest: str) -> None:
    """Note the digest of the template whose index has this identity. Raises ``OSError``."""
    staged = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"{_mark(identity)}{digest}\n".encode())
        os.rename(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _mark(identity: Identity) -> str:
    device, inode, ctime_ns, size = identity
    return f"{_WORD} {device} {inode} {ctime_ns} {size} "
