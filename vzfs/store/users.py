"""Which containers need a template.

Rule: rather one too many than one too few, for what is removed is gone: a container whose conf can't be read is taken
for a user of the template that its private area was planted from.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from vzfs.errors import DamagedError, UsageError
from vzfs.store.conf import Conf
from vzfs.store.layout import CONF, OWN_FOLDER_MODE, PRIVATE_AREA, Layout
from vzfs.store.shape import container_paths
from vzfs.store.xattrs import ORIGIN_XATTR


def template_users(layout: Layout, template: str) -> list[Path]:
    """Containers that need ``template``, those elsewhere that were made or mounted with this store among them."""
    candidates = container_paths(layout)
    folder = layout.template(template).meta / "users"
    with contextlib.suppress(FileNotFoundError):
        for link in sorted(os.listdir(folder)):
            with contextlib.suppress(OSError):  # no link, or gone by now
                candidates.append(Path(os.readlink(folder / link)))
    return [path for path in candidates if template in _templates_of(path)]


def _templates_of(container: Path) -> list[str]:
    try:
        return Conf.load(container / CONF).templates()
    except (DamagedError, OSError):
        pass  # then what the private area says
    try:
        origin = os.getxattr(container / PRIVATE_AREA, ORIGIN_XATTR, follow_symlinks=False)
    except OSError:
        return []
    return [os.fsdecode(origin.partition(b"/")[0])]


def remember_user(layout: Layout, template: str, path: Path) -> None:
    """Note that the container at ``path``, if it lies outside the store's folder, needs ``template``."""
    if path.parent == layout.containers:
        return
    link = _user_link(layout, template, path)
    link.parent.mkdir(mode=OWN_FOLDER_MODE, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(path)


def forget_user(layout: Layout, template: str, path: Path) -> None:
    """The reverse of ``remember_user``."""
    with contextlib.suppress(OSError, UsageError):
        _user_link(layout, template, path).unlink()


def _user_link(layout: Layout, template: str, path: Path) -> Path:
    return layout.template(template).meta / "users" / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
