"""A container's private area read as what it means: which template entry each name is, and which entries moved or went.

Rules:
- Only reads, relative to directory descriptors, following no symbolic link, one descriptor at a time however deep the
  tree.
- Cost and memory follow what was unfolded, not the template: a folded directory is one link.
- What vanishes meanwhile (the container may be mounted) is skipped.

A template entry has at most one place in a container (names of a hard link group aside). Its *default place* is below
the real directory that came from its parent entry, under its own name. Entries are told by number,
``template.base + entry``, which no two templates share.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vzfs import linux
from vzfs.errors import DamagedError, VzfsError
from vzfs.store.identify import Form, Thing, identify
from vzfs.store.layout import COW, LINKS, PRIVATE_AREA
from vzfs.store.opened import OpenTemplate

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME
_GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR, errno.ELOOP)
"""Errors of a directory that another process removed or replaced while it was being read."""


class Templates:
    """The templates that a container's links name, each opened once; ``failures`` says why one could not be.

    ``load`` opens one, as ``Granted.open`` does.
    """

    def __init__(self, load: Callable[[str], OpenTemplate]) -> None:
        self._load = load
        self._open: dict[str, OpenTemplate | None] = {}
        self.failures: dict[str, VzfsError] = {}

    def get(self, name: str) -> OpenTemplate | None:
        """The template ``name``, ``None`` when it is missing, damaged or not allowed."""
        if name not in self._open:
            self._open[name] = None
            try:
                self._open[name] = self._load(name)
            except VzfsError as error:
                self.failures[name] = error
        return self._open[name]

    def of(self, number: int) -> tuple[OpenTemplate, int]:
        """The opened template that has the entry ``number``, and the entry."""
        for template in self._open.values():
            if template is not None and template.base <= number < template.end:
                return template, number - template.base
        raise KeyError(number)

    def close(self) -> None:
        """Close them all."""
        for template in self._open.values():
            if template is not None:
                template.close()
        self._open.clear()


# ------------------------------------------------------------------------------------------------------- directories


class Folder:
    """A real directory of the private area: its name and the one it lies in, up to the root.

    ``template`` and ``entry`` say which template directory it is, if any.
    """

    __slots__ = ("entry", "ino", "name", "parent", "template")

    def __init__(
        self, parent: Folder | None, name: bytes, ino: int, template: OpenTemplate | None = None, entry: int = 0
    ) -> None:
        self.parent = parent
        self.name = name
        self.ino = ino
        self.template = template
        self.entry = entry

    def parts(self) -> list[bytes]:
        """The names from below the root to this one."""
        names = []
        folder: Folder | None = self
        while folder is not None and folder.parent is not None:
            names.append(folder.name)
            folder = folder.parent
        names.reverse()
        return names

    def path(self, name: bytes) -> bytes:
        """The path of ``name`` in this directory, with a leading slash."""
        return b"/" + b"/".join([*self.parts(), name])

    def open(self, root_fd: int) -> int:
        """A descriptor of it, in steps that fit a path. Raises ``OSError``."""
        names = self.parts()
        fd = linux.openat2(root_fd, b".", _DIRECTORY)
        while names:
            step, length = 0, 0
            while step < len(names) and length + len(names[step]) + 1 < linux.PATH_MAX:
                length += len(names[step]) + 1
                step += 1
            try:
                opened = linux.openat2(fd, b"/".join(names[:step]), _DIRECTORY)
            finally:
                os.close(fd)
            fd = opened
            names = names[step:]
        return fd

    def is_default_place(self, thing: Thing, name: bytes) -> bool:
        """Whether ``name`` in this directory is where the template has what ``thing`` is."""
        if thing.template is None or thing.template is not self.template:
            return False
        index = thing.template.index
        return bool(thing.entry) and index.parent[thing.entry] == self.entry and index.name(thing.entry) == name


class Cursor:
    """Goes down into directories and up again with one open descriptor."""

    def __init__(self, root_fd: int, root: Folder) -> None:
        self._root_fd = root_fd
        self._fd = linux.openat2(root_fd, b".", _DIRECTORY)
        self.folder = root

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    @property
    def fd(self) -> int:
        """Descriptor of the current directory. Raises ``FileNotFoundError`` when that has vanished."""
        if self._fd < 0:
            raise FileNotFoundError(errno.ENOENT, "the directory was removed")
        return self._fd

    def names(self) -> list[bytes]:
        """What the current directory holds, sorted; nothing when it vanished."""
        if self._fd < 0:
            return []
        return sorted(map(os.fsencode, os.listdir(self._fd)))

    def enter(self, folder: Folder) -> bool:
        """Go down into ``folder``, whose parent is the current one; ``False`` when it isn't there any more."""
        try:
            fd = os.open(folder.name, _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise
        self._move(fd, folder)
        return True

    def leave(self) -> None:
        """Go up again, by ``..`` if that is still where the current directory lies."""
        parent = self.folder.parent
        assert parent is not None
        try:
            fd = os.open(b"..", _DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
            if os.fstat(fd).st_ino != parent.ino:
                os.close(fd)
                fd = parent.open(self._root_fd)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            fd = -1
        self._move(fd, parent)

    def _move(self, fd: int, folder: Folder) -> None:
        self.close()
        self._fd = fd
        self.folder = folder


# ------------------------------------------------------------------------------------------------------------- survey


@dataclass(frozen=True, slots=True)
class Spot:
    """A name in a real directory."""

    folder: Folder
    name: bytes

    def path(self) -> bytes:
        """Its path below the private area, with a leading slash."""
        return self.folder.path(self.name)

    def is_at(self, folder: Folder, name: bytes) -> bool:
        """Whether it is ``name`` in ``folder``."""
        return self.name == name and self.folder.ino == folder.ino


Visit = Callable[[Folder, int, bytes, Thing], None]
"""Called for each name as ``visit(folder, dir_fd, name, thing)``."""


class Survey:
    """What ``read`` found out about a private area; ``os_template`` is that of its root, ``None`` if unknown.

    ``moved``: the first place, away from its default one, of each entry that has such; ``extra``: its further ones.
    ``missing``: entries that are not at their default place although the directory of that is there, a real one.
    ``real``: the real directory that each unfolded template directory became.
    ``group_names``: how many magic links in real directories mean each link group, by the number of its leader.
    """

    def __init__(self, container: Path, templates: Templates, os_template: OpenTemplate | None) -> None:
        self.templates = templates
        self.os_template = os_template
        self.groups = _record_names(container)
        self.moved: dict[int, Spot] = {}
        self.extra: dict[int, list[Spot]] = {}
        self.missing: set[int] = set()
        self.real: dict[int, Folder] = {}
        self.group_names: Counter[int] = Counter()

    def read(self, root_fd: int, visit: Visit | None = None) -> None:
        """Walk the private area ``root_fd``."""
        root = root_folder(root_fd, self.os_template)
        if self.os_template is not None:
            self.real[self.os_template.base] = root
        cursor = Cursor(root_fd, root)
        try:
            pending = [self._read_folder(cursor, visit)]
            while pending:
                if pending[-1]:
                    if cursor.enter(pending[-1].pop()):
                        pending.append(self._read_folder(cursor, visit))
                else:
                    pending.pop()
                    if pending:
                        cursor.leave()
        finally:
            cursor.close()

    def _read_folder(self, cursor: Cursor, visit: Visit | None) -> list[Folder]:
        """Take the current directory in; gives its subdirectories, last one first."""
        folder = cursor.folder
        here: set[int] = set()
        below = []
        for name in cursor.names():
            with _vanishing():
                thing = identify(self.templates.get, cursor.fd, name)
                child = self._place(folder, name, thing, here)
                if child is not None:
                    below.append(child)
                if visit is not None:
                    visit(folder, cursor.fd, name, thing)
        if folder.template is not None:
            base = folder.template.base
            children = folder.template.index.children(folder.entry)
            self.missing.update(base + entry for entry in children if base + entry not in here)
        below.reverse()
        return below

    def _place(self, folder: Folder, name: bytes, thing: Thing, here: set[int]) -> Folder | None:
        """Note where a thing lies; gives the directory that it is, if it is one."""
        child = Folder(folder, name, thing.info.st_ino) if thing.form is Form.DIRECTORY else None
        number = thing.number
        if number < 0:
            return child
        assert thing.template is not None
        if thing.in_group(self.groups):
            self.group_names[number - thing.entry + thing.template.index.leader[thing.entry]] += 1
        spot = Spot(folder, name)
        if child is not None:
            if number in self.real:  # a second one: the first one is the template's directory
                self.extra.setdefault(number, []).append(spot)
                return child
            child.template, child.entry = thing.template, thing.entry
            self.real[number] = child
        if folder.is_default_place(thing, name):
            here.add(number)
        elif number in self.moved:
            self.extra.setdefault(number, []).append(spot)
        else:
            self.moved[number] = spot
        return child

    def holds(self, template: OpenTemplate, entry: int) -> bool:
        """Whether the entry is at its default place, in a real directory or in a folded one, wherever that lies."""
        number = template.base + entry
        if number in self.missing or not entry:
            return not entry and template is self.os_template
        parent: int = template.index.parent[entry]
        return template.base + parent in self.real or self.is_there(template, parent)

    def is_there(self, template: OpenTemplate, entry: int) -> bool:
        """Whether the entry is anywhere in the container."""
        while template.base + entry not in self.moved:
            if template.base + entry in self.missing or not entry:
                return not entry and template is self.os_template
            parent: int = template.index.parent[entry]
            if template.base + parent in self.real:
                return True
            entry = parent
        return True

    def names_of(self, template: OpenTemplate, leader: int) -> int:
        """How many names a link group has in the container."""
        folded = sum(self.in_folded(template, entry) for entry in template.index.members(leader))
        return self.group_names[template.base + leader] + folded

    def in_folded(self, template: OpenTemplate, entry: int) -> bool:
        """Whether the entry is there as a part of a folded directory."""
        parent: int = template.index.parent[entry]
        return template.base + parent not in self.real and self.is_there(template, parent)


def root_folder(root_fd: int, os_template: OpenTemplate | None) -> Folder:
    """The root of the private area ``root_fd``."""
    return Folder(None, b"", os.stat(root_fd).st_ino, os_template)


def open_private_area(container: Path) -> int:
    """A descriptor of the container's private area. Raises ``DamagedError`` when it has none."""
    try:
        return os.open(container / PRIVATE_AREA, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(
            f"container {container} has no folder {PRIVATE_AREA}",
            remedy="bring it back from a backup, or destroy the container and make it anew",
        ) from error


def open_links(container: Path) -> int:
    """A descriptor of the container's ``cow/links``, -1 where there is no such folder."""
    top = os.open(container, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return linux.openat2(top, COW.encode() + b"/" + LINKS, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # ELOOP: something is a symbolic link
            return -1
        raise
    finally:
        os.close(top)


def _record_names(container: Path) -> set[bytes]:
    fd = open_links(container)
    if fd < 0:
        return set()
    try:
        return set(map(os.fsencode, os.listdir(fd)))
    finally:
        os.close(fd)


@contextlib.contextmanager
def _vanishing() -> Iterator[None]:
    """Skip what is gone by now."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*_GONE, errno.EINVAL):  # EINVAL: what was a symbolic link is none any more
            raise
