"""Magic links: symbolic links of a private area that mean a template's entry.

    //vz/template/<template>/<path>

Rule: exactly two leading slashes followed by ``vz/template/`` make a link magic, whatever the store's real root is. A
container's own symbolic link that would look like one, or like an escaped one, is stored with one slash more and read
back with one less, so ``unescape(escape(text)) == text`` and ``parse(escape(text)) is None`` for every text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIX = b"//vz/template/"
_LOOKS_MAGIC = re.compile(rb"//+vz/template/")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
TARGET_MAX = 4095
"""Longest text of a symbolic link in bytes (PATH_MAX less its NUL; symlink(2))."""


@dataclass(frozen=True, slots=True)
class MagicLink:
    """A template's name and a path below it, as ``bytes`` without leading slash; ``path`` is empty for the root."""

    template: str
    path: bytes

    def text(self) -> bytes:
        """The canonical text of the link."""
        return PREFIX + self.template.encode() + (b"/" + self.path if self.path else b"")


def valid_template_name(name: str) -> bool:
    """Whether ``name`` may name a template: 1 to 64 of ``A-Z a-z 0-9 . _ + -``, beginning with a letter or digit."""
    return _NAME.fullmatch(name) is not None


def is_magic(target: bytes) -> bool:
    """Whether the stored text ``target`` claims to be a magic link, well-formed or not."""
    return target.startswith(PREFIX)


def parse(target: bytes) -> MagicLink | None:
    """The magic link that the stored text ``target`` is, or ``None`` if it isn't one or is malformed."""
    if not target.startswith(PREFIX):
        return None
    name_bytes, _, path = target[len(PREFIX) :].partition(b"/")
    name = name_bytes.decode("ascii", "replace")
    if not valid_template_name(name):
        return None
    if path and any(part in (b"", b".", b"..") for part in path.split(b"/")):
        return None
    return MagicLink(name, path)


def escape(target: bytes) -> bytes:
    """How a container's own link text ``target`` is stored."""
    return b"/" + target if _LOOKS_MAGIC.match(target) else target


def unescape(stored: bytes) -> bytes:
    """What a container sees of its own link that is stored as ``stored`` (not a magic link)."""
    return stored[1:] if _LOOKS_MAGIC.match(stored) else stored
