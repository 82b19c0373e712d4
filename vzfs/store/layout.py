"""Where things lie below the store's root.

Rule: the one place that knows folder names; nothing else builds such a path, and nothing assumes ``/vz``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vzfs.errors import UsageError
from vzfs.store.magic import valid_template_name

DEFAULT_ROOT = "/vz"
ROOT_VARIABLE = "VZFS_ROOT"
OWN_FOLDER_MODE = 0o700
"""Mode of every folder that is the store's own: setuid files inside must not be reachable by the node's users."""

CONF = "conf"
LOCK = "lock"
PRIVATE_AREA = "private"
COW = "cow"
DUMP = "dump"
LAYERS = "layers"
LOG = "vzfs.log"
STAGE = b"stage"
LINKS = b"links"
ORPHANS = b"orphans"

LINK_BUCKET = 4096
"""Entries per folder of a link farm."""


def check_template_name(name: str) -> str:
    """Give ``name`` back if a template may be called so; raise ``UsageError`` otherwise."""
    if not valid_template_name(name):
        raise UsageError(
            f"{name!r} can't name a template",
            remedy="use 1 to 64 letters, digits, '.', '_', '+' or '-', beginning with a letter or digit",
        )
    return name


@dataclass(frozen=True, slots=True)
class TemplatePaths:
    """The places of one template."""

    tree: Path
    meta: Path

    @property
    def index(self) -> Path:
        return self.meta / "index"

    @property
    def checked(self) -> Path:
        """What ``vzfs.store.seal`` notes of the index."""
        return self.meta / "checked"

    @property
    def links(self) -> Path:
        return self.meta / "links"


@dataclass(frozen=True, slots=True)
class Layout:
    """The store's folders below ``root`` (absolute)."""

    root: Path

    @staticmethod
    def at(root: str | os.PathLike[str] | None) -> Layout:
        """The store at ``root``, else at ``$VZFS_ROOT``, else at ``/vz``. Raises ``UsageError`` for "" as ``root``."""
        if root is not None and not os.fspath(root):
            raise UsageError("an empty path is no store", remedy="give a directory, or leave it out")
        return Layout(Path(root or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT).absolute())

    @property
    def templates(self) -> Path:
        return self.root / "template"

    @property
    def templates_meta(self) -> Path:
        return self.templates / ".vzfs"

    @property
    def containers(self) -> Path:
        return self.root / "private"

    @property
    def mounts(self) -> Path:
        return self.root / "root"

    @property
    def userns(self) -> Path:
        """Where the roots are mounted that a runtime with a user namespace reaches: ``<CT_ID>/root`` below."""
        return self.root / "userns"

    @property
    def is_there(self) -> bool:
        """Whether this is a store: a directory that has one of a store's folders."""
        return self.templates.is_dir() or self.containers.is_dir()

    def template(self, name: str) -> TemplatePaths:
        """Where the template ``name`` lies; raises ``UsageError`` for a name that no template can have."""
        check_template_name(name)
        return TemplatePaths(self.templates / name, self.templates_meta / name)

    def make(self) -> None:
        """Create the store's folders where they are missing."""
        self.root.mkdir(parents=True, exist_ok=True)
        for folder in (self.templates, self.templates_meta, self.containers, self.mounts):
            folder.mkdir(mode=OWN_FOLDER_MODE, exist_ok=True)


def farm_entry(number: int) -> bytes:
    """Path of the prepared link of template entry ``number`` below a template's link farm."""
    return b"%d/%d" % (number // LINK_BUCKET, number)
