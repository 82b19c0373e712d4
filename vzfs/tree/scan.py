"""Where the node numbers lie that a process gave the kernel before it died.

The kernel goes on using those numbers with a successor. Most tell by themselves where they lie: a template's entry is
at its default place or in a folded directory, orphans have their number as name. The rest, what moved and what is the
container's own, is found by reading the private area once.

Rule: what this reads is the disk alone. Costs a few microseconds for each name in a real directory, nothing for folded
ones; gives numbers and places, which are looked up again when they are asked for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TypeAlias

from vzfs import linux
from vzfs.store import magic
from vzfs.store.identify import Form, follow
from vzfs.store.opened import OpenTemplate
from vzfs.store.survey import Folder, root_folder
from vzfs.tree.area import PrivateArea
from vzfs.tree.node import ROOT_NUMBER, private_number
from vzfs.tree.templates import TemplatesInUse

Places: TypeAlias = dict[int, tuple[int, bytes]]
"""By node number: number of the directory that holds it, and name there."""


Origin: TypeAlias = tuple[tuple[OpenTemplate, int] | None, bool]
ReadOrigin: TypeAlias = Callable[[bytes], Origin]


def scan(area: PrivateArea, templates: TemplatesInUse, read_origin: ReadOrigin) -> Places:
    """The places of everything in real directories that its number doesn't tell. Raises ``OSError``."""
    places: Places = {}
    pending = [(ROOT_NUMBER, root_folder(area.root_fd, templates.root))]
    while pending:
        number, folder = pending.pop()
        with contextlib.closing(_Reader(area, templates, read_origin, places, number, folder)) as reader:
            pending.extend(reader.read())
    return places


class _Reader:
    """Reads one real directory."""

    def __init__(
        self,
        area: PrivateArea,
        templates: TemplatesInUse,
        read_origin: ReadOrigin,
        places: Places,
        number: int,
        folder: Folder,
    ) -> None:
        self._templates = templates
        self._read_origin = read_origin
        self._places = places
        self._number = number
        self._folder = folder
        self._fd = folder.open(area.root_fd)

    def close(self) -> None:
        """Close the directory."""
        os.close(self._fd)

    def read(self) -> list[tuple[int, Folder]]:
        """Note what lies here; gives the real directories among it."""
        below = []
        with os.scandir(self._fd) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                if entry.is_symlink():
                    text = os.readlink(name, dir_fd=self._fd)
                    if magic.is_magic(text):
                        self._note_link(name, text)
                        continue
                directory = entry.is_dir(follow_symlinks=False)
                number, folder = self._own(name, entry.inode(), directory=directory)
                self._places.setdefault(number, (self._number, name))
                if directory:
                    below.append((number, folder))
        return below

    def _note_link(self, name: bytes, text: bytes) -> None:
        meant = follow(self._templates.get_or_none, text)
        if isinstance(meant, Form):
            return  # damaged, which a look-up will tell
        template, entry = meant
        if self._is_default_place(template.base + entry, name):
            return
        self._places.setdefault(self._templates.number_of(template, entry), (self._number, name))

    def _is_default_place(self, number: int, name: bytes) -> bool:
        template = self._folder.template
        if template is None:
            return False
        entry = template.index.find(self._folder.entry, name)
        return bool(entry) and template.base + entry == number

    def _own(self, name: bytes, backing: int, *, directory: bool) -> tuple[int, Folder]:
        """Number of an object of the container's own, and what it would be as a directory."""
        folder = Folder(self._folder, name, backing)
        origin, split = self._read_origin(linux.entry_path(self._fd, name))
        if origin is None or origin[0].index.is_directory(origin[1]) != directory:
            return private_number(backing), folder
        folder.template, folder.entry = origin
        return private_number(backing) if split else self._templates.number_of(*origin), folder
