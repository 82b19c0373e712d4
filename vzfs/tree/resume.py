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
from pathlib import Path
from typing import TYPE_CHECKING

from vzfs.store import magic, sys
from vzfs.store.conf import OSTEMPLATE, Conf
from vzfs.store.layout import CONF, NLINK_XATTR, Layout
from vzfs.store.opened import parse_group_key
from vzfs.store.survey import Folder, Survey, Templates, root_folder
from vzfs.tree.area import PrivateArea, list_names
from vzfs.tree.durable import Durable
from vzfs.tree.node import ROOT_NUMBER, private_number

if TYPE_CHECKING:
    from vzfs.tree.nodes import Nodes

Places = dict[int, tuple[int, bytes]]
"""By node number: number of the directory that holds it, and name there."""


def scan(nodes: Nodes) -> Places:
    """The places of everything in real directories that its number doesn't tell. Raises ``OSError``."""
    places: Places = {}
    root_fd = nodes.area.root_fd
    pending = [(ROOT_NUMBER, root_folder(root_fd, nodes.root.template))]
    while pending:
        number, folder = pending.pop()
        with contextlib.closing(_Reader(nodes, places, number, folder)) as reader:
            pending.extend(reader.read())
    return places


def count_doubted(layout: Layout, container: Path, area: PrivateArea, durable: Durable) -> None:
    """Count the names of the link group that the predecessor was just counting, if it was, and note the number."""
    if not durable.doubt:
        return
    templates = Templates(layout)
    try:
        survey = Survey(container, templates, templates.get(Conf.load(container / CONF).get(OSTEMPLATE)))
        survey.read(area.root_fd)
        for key in list_names(area.links_fd):
            group = parse_group_key(key)
            template = templates.get(group[0]) if group else None
            if group is None or template is None or template.base + group[1] != durable.doubt:
                continue
            names = survey.names_of(template, group[1])
            if names:
                os.setxattr(sys.entry_path(area.links_fd, key), NLINK_XATTR, b"%d" % names, follow_symlinks=False)
            else:
                os.rename(key, b"%d" % durable.doubt, src_dir_fd=area.links_fd, dst_dir_fd=area.orphans_fd)
    finally:
        templates.close()
    durable.doubt = 0


class _Reader:
    """Reads one real directory."""

    def __init__(self, nodes: Nodes, places: Places, number: int, folder: Folder) -> None:
        self._nodes = nodes
        self._places = places
        self._number = number
        self._folder = folder
        self._fd = folder.open(nodes.area.root_fd)

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
        link = magic.parse(text)
        if link is None:
            return  # damaged, which a look-up will tell
        try:
            template = self._nodes.template(link.template)
        except OSError:
            return
        entry = template.index.find_path(link.path)
        if not entry or self._is_default_place(template.base + entry, name):
            return
        self._places.setdefault(self._nodes.number_of(template, entry), (self._number, name))

    def _is_default_place(self, number: int, name: bytes) -> bool:
        template = self._folder.template
        if template is None:
            return False
        entry = template.index.find(self._folder.entry, name)
        return bool(entry) and template.base + entry == number

    def _own(self, name: bytes, backing: int, *, directory: bool) -> tuple[int, Folder]:
        """Number of an object of the container's own, and what it would be as a directory."""
        folder = Folder(self._folder, name, backing)
        origin, split = self._nodes.read_origin(sys.entry_path(self._fd, name))
        if origin is None or origin[0].index.is_directory(origin[1]) != directory:
            return private_number(backing), folder
        folder.template, folder.entry = origin
        return private_number(backing) if split else self._nodes.number_of(*origin), folder
