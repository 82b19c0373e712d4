"""Which container directories there are, and what is wrong with one at first sight.

Rule: looks at names and types only, opens nothing, follows no symbolic link: it costs microseconds, so that listing all
containers can say which are damaged, and nothing that lies there can keep it waiting.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from vzfs.store.layout import CONF, COW, DUMP, LAYERS, LOCK, LOG, PRIVATE_AREA, Layout
from vzfs.store.ownfile import kind_of

WORK_PREFIXES = (".new-", ".old-")
"""Beginnings of the names of containers that are being made or removed."""
_FILES = (CONF, LOCK, LOG)
_FOLDERS = (PRIVATE_AREA, COW, DUMP, LAYERS)
_NEEDED = (CONF, PRIVATE_AREA)


def container_paths(layout: Layout) -> list[Path]:
    """The containers in the store's own folder, damaged ones too, numbers first and in their order."""
    try:
        names = os.listdir(layout.containers)
    except FileNotFoundError:
        return []
    found = [layout.containers / name for name in names if not name.startswith(WORK_PREFIXES)]
    return sorted(
        (path for path in found if is_container(layout, path)),
        key=lambda path: (not path.name.isdecimal(), int(path.name) if path.name.isdecimal() else 0, path.name),
    )


def is_container(layout: Layout, path: Path) -> bool:
    """Whether a container lies at ``path``, sound or damaged.

    In the store's own folder whatever has a part of one is one, so that it can be seen and destroyed; elsewhere it
    takes ``conf`` and ``private``, because other programs keep folders with one of these names.
    """
    folder = f"{path}/"
    if path.parent == layout.containers:
        return any(_is_there(folder + name) for name in (CONF, PRIVATE_AREA, LOCK))
    return _is_there(folder + CONF) and _is_there(folder + PRIVATE_AREA)


def _is_there(path: str) -> bool:
    """Whether anything has that name. Raises ``PermissionError``: who may not know shall not be told that it isn't."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    return True


def faults(container: Path) -> list[str]:
    """What of the container's own is missing or isn't what it should be, in words that follow its name."""
    found = []
    folder = f"{container}/"
    for name in (*_FILES, *_FOLDERS):
        try:
            mode = os.lstat(folder + name).st_mode
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                found.append(f"its {name} can't be looked at: {error.strerror}")
            elif name in _NEEDED:
                found.append(f"its {name} is missing")
            continue
        if name in _FILES and not stat.S_ISREG(mode):
            found.append(f"its {name} is {kind_of(mode)}, not a file")
        elif name in _FOLDERS and not stat.S_ISDIR(mode):
            found.append(f"its {name} is {kind_of(mode)}, not a directory")
    return found
