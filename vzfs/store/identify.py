"""What a name of a private area is: a magic link and what it means, a real directory, or anything of the container's.

Rule: the one place that follows a magic link's text and an origin's; mounting, ``diff`` and ``check`` all ask here.
"""

from __future__ import annotations

import enum
import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from vzfs import linux
from vzfs.store import magic
from vzfs.store.opened import OpenTemplate
from vzfs.store.xattrs import ORIGIN_XATTR

_ENTRY_DIGITS = 10
"""Decimal digits of the largest entry number, 2**32 - 1."""
GetTemplate = Callable[[str], OpenTemplate | None]
"""From a name to the template; ``None`` when it is missing, damaged or not allowed."""


class Form(enum.Enum):
    """What a name of the private area is."""

    LINK = "magic link"
    FOREIGN = "magic link into a template that can't be opened"
    DANGLING = "magic link to nothing"
    MALFORMED = "malformed magic link"
    DIRECTORY = "directory"
    OWN = "anything else"


@dataclass(frozen=True, slots=True)
class Thing:
    """One name of the private area. ``template`` and ``entry`` tell what it stands for or was copied from, if anything.

    ``text`` is a magic link's; ``origin`` is the stored origin of what is no magic link, also one that means nothing.
    """

    form: Form
    info: os.stat_result
    template: OpenTemplate | None = None
    entry: int = 0
    text: bytes = b""
    origin: bytes | None = None

    @property
    def number(self) -> int:
        """The number of the entry, or -1."""
        return -1 if self.template is None else self.template.base + self.entry

    @property
    def bad_origin(self) -> bool:
        """Whether the stored origin means nothing."""
        return self.origin is not None and self.template is None

    def is_folded(self) -> bool:
        """Whether this is a magic link to a directory."""
        return self.form is Form.LINK and self.template is not None and self.template.index.is_directory(self.entry)

    def in_group(self, groups: set[bytes]) -> bool:
        """Whether it is a name of a hard link group: of the template, or with a record in ``groups``."""
        template = self.template
        if template is None or self.form is not Form.LINK or template.index.is_directory(self.entry):
            return False
        return template.index.next_link[self.entry] != self.entry or template.group_key(self.entry) in groups


def identify(get: GetTemplate, dir_fd: int, name: bytes) -> Thing:
    """What ``name`` in ``dir_fd`` is. Raises ``FileNotFoundError`` and other ``OSError``."""
    info = os.lstat(name, dir_fd=dir_fd)
    if stat.S_ISLNK(info.st_mode):
        text = os.readlink(name, dir_fd=dir_fd)
        if magic.is_magic(text):
            return _identify_link(get, info, text)
    form = Form.DIRECTORY if stat.S_ISDIR(info.st_mode) else Form.OWN
    origin = read_xattr(linux.entry_path(dir_fd, name), ORIGIN_XATTR)
    if origin is None:
        return Thing(form, info)
    template, entry = _find_origin(get, origin)
    if template is None or template.index.is_directory(entry) != (form is Form.DIRECTORY):
        return Thing(form, info, origin=origin)
    return Thing(form, info, template, entry, origin=origin)


def _identify_link(get: GetTemplate, info: os.stat_result, text: bytes) -> Thing:
    meant = follow(get, text)
    if isinstance(meant, Form):
        return Thing(meant, info, text=text)
    return Thing(Form.LINK, info, *meant, text)


def follow(get: GetTemplate, text: bytes) -> tuple[OpenTemplate, int] | Form:
    """The template and entry that a magic link's text means, or what is wrong with it; never the template's root."""
    link = magic.parse(text)
    if link is None or not link.path:
        return Form.MALFORMED
    template = get(link.template)
    if template is None:
        return Form.FOREIGN
    entry = template.index.find_path(link.path)
    return Form.DANGLING if entry is None else (template, entry)


def _find_origin(get: GetTemplate, data: bytes) -> tuple[OpenTemplate | None, int]:
    origin = parse_origin(data)
    template = get(origin[0]) if origin else None
    if origin is None or template is None or origin[1] >= template.index.count:
        return None, 0
    return template, origin[1]


def parse_origin(data: bytes) -> tuple[str, int] | None:
    """Template name and entry number that a ``trusted.vzfs.origin`` says; the template's root is never one."""
    name, _, entry_text = data.decode("ascii", "replace").partition("/")
    if not magic.valid_template_name(name) or not entry_text.isdecimal() or len(entry_text) > _ENTRY_DIGITS:
        return None
    entry = int(entry_text)
    return (name, entry) if entry else None


def read_xattr(path: bytes, name: str) -> bytes | None:
    """Value of an extended attribute of what is at ``path``, not followed; ``None`` when there is none."""
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise
