"""A container's ``conf``: lines of ``KEY="value"`` in the syntax of ve.conf, which a shell could source.

Rule: whatever vzfs doesn't know, comments and order included, is written back as it was read.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from vzfs.errors import UsageError
from vzfs.store.ownfile import damaged, read_own

OSTEMPLATE = "OSTEMPLATE"
TEMPLATES = "TEMPLATES"
OSTEMPLATE_DIGEST = "OSTEMPLATE_DIGEST"
TEMPLATE_DIGESTS = "TEMPLATE_DIGESTS"
VE_ROOT = "VE_ROOT"
NAME = "NAME"
USERNS_UID = "USERNS_UID"
"""The user whom the root of the container's user namespace is mapped to; may pass to its mount point."""

NEW_MODE = 0o644
SIZE_MAX = 1 << 20
"""Bytes of a conf: a thousand times what one has."""
TEMPLATES_MAX = 1000
"""Templates of a container; one has one, or a few."""

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*?)\s*")
_UNQUOTE = re.compile(r'\\([\\"$`])')


class Conf:
    """The settings of one container; ``get`` and ``set`` work on memory, ``save`` writes them."""

    def __init__(self, path: Path, text: str = "") -> None:
        self.path = path
        self._lines = text.removesuffix("\n").split("\n") if text else []  # splitlines() knows a dozen other ends

    @staticmethod
    def load(path: Path) -> Conf:
        """Read the file at ``path``; raises ``DamagedError`` when it can't be one, ``FileNotFoundError``."""
        conf = Conf(path, read_own(path, SIZE_MAX).decode("utf-8", "surrogateescape"))
        conf.templates()  # so that all commands say what is wrong with it, and none is kept busy
        return conf

    def get(self, key: str, default: str = "") -> str:
        """Value of ``key``, the last line that sets it winning."""
        return self.as_dict().get(key, default)

    def templates(self) -> list[str]:
        """Names of the templates that the container may use, each once, that of its root first (``""``: not said).

        Raises ``DamagedError`` for more than ``TEMPLATES_MAX``: each one is looked for.
        """
        names = list(dict.fromkeys([self.get(OSTEMPLATE), *self.get(TEMPLATES).split()]))
        if len(names) > TEMPLATES_MAX:
            raise damaged(self.path, f"names {len(names)} templates, more than the {TEMPLATES_MAX} that it can")
        return names

    def digests(self) -> dict[str, str]:
        """The digests that the templates must have, by name, as far as they are said."""
        pairs = (word.partition("=") for word in self.get(TEMPLATE_DIGESTS).split())
        found = {name: digest for name, _, digest in pairs}
        if self.get(OSTEMPLATE_DIGEST):
            found[self.get(OSTEMPLATE)] = self.get(OSTEMPLATE_DIGEST)
        return found

    def set_digests(self, digests: dict[str, str]) -> None:
        """Say which digests the templates must have."""
        own = self.get(OSTEMPLATE)
        if own in digests:
            self.set(OSTEMPLATE_DIGEST, digests[own])
        others = " ".join(f"{name}={digest}" for name, digest in digests.items() if name != own)
        if others:
            self.set(TEMPLATE_DIGESTS, others)

    def as_dict(self) -> dict[str, str]:
        """All settings."""
        pairs = (self._parse(line) for line in self._lines)
        return dict(pair for pair in pairs if pair)

    def set(self, key: str, value: str) -> None:
        """Set ``key``, in its place if it is there. Raises ``UsageError`` for what a line can't hold."""
        if not _KEY.fullmatch(key) or "\n" in value or "\0" in value:
            raise UsageError(f"{key}={value!r} can't be a line of {self.path}", remedy="a value is one line of text")
        escaped = re.sub(r'([\\"$`])', r"\\\1", value)
        line = f'{key}="{escaped}"'
        places = [number for number, old in enumerate(self._lines) if (self._parse(old) or ("",))[0] == key]
        for number in places:
            self._lines[number] = line
        if not places:
            self._lines.append(line)

    def text(self) -> str:
        """The file's content."""
        return "".join(line + "\n" for line in self._lines)

    def save(self) -> None:
        """Write the file anew, in one step."""
        staged = self.path.with_name(f".{self.path.name}-{secrets.token_hex(4)}")
        try:
            with open(staged, "xb") as file:
                self._keep_owner(file.fileno())
                file.write(self.text().encode("utf-8", "surrogateescape"))
                file.flush()
                os.fsync(file.fileno())
            os.rename(staged, self.path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise

    def _keep_owner(self, fd: int) -> None:
        """The new file is whose the old one is, and its mode."""
        try:
            before = os.lstat(self.path)
        except FileNotFoundError:
            os.fchmod(fd, NEW_MODE)
            return
        os.fchown(fd, before.st_uid, before.st_gid)
        os.fchmod(fd, stat.S_IMODE(before.st_mode) & 0o777)

    @staticmethod
    def _parse(line: str) -> tuple[str, str] | None:
        match = _LINE.fullmatch(line)
        if not match:
            return None
        value = match[2]
        if len(value) >= 2 and value[0] == value[-1] == "'":
            return match[1], value[1:-1]
        if len(value) >= 2 and value[0] == value[-1] == '"':
            value = value[1:-1]
        return match[1], _UNQUOTE.sub(r"\1", value)
