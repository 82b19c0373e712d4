"""What a container added, changed, renamed and removed, compared with its template.

Rule: the private area is only read, twice, and cost follows what the container unfolded. A magic link at its default
place is unchanged without a look at the template's files; a changed file's content is compared by size, then digest.

What counts as one change, in the order of a depth-first listing sorted by the bytes of names; at one name what is no
longer there (and all that it held) comes before what is:

    removed   each entry that is nowhere any more, a directory before all that it held
    renamed   an entry of the template that lies elsewhere than its directory does; a directory is one line, what it
              holds is then compared under its new name; ``what`` says if the entry was changed as well
    changed   the same place, something different: ``what`` says what, in the order of ``WHAT``
    added     all else; ``what`` is ``("links",)`` for a further hard link to an entry of the template

A file that the container removed and made anew, as package managers and editors do, counts as changed. Access times
and change times are not compared, and the times of a directory are as ext4 has them: new when a name came or went.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vzfs import linux
from vzfs.store import magic
from vzfs.store.granted import Granted
from vzfs.store.identify import Form, Thing, identify
from vzfs.store.index import Attributes, Index
from vzfs.store.layout import Layout
from vzfs.store.opened import OpenTemplate
from vzfs.store.ownlink import read_own_link
from vzfs.store.record import read_own_xattrs, read_record
from vzfs.store.survey import Cursor, Folder, Survey, Templates, open_links, open_private_area, root_folder
from vzfs.store.textdiff import CONTENT_MAX, unified_diff
from vzfs.store.xattrs import RESERVED_PREFIX

WHAT = ("type", "content", "mode", "owner", "times", "xattrs", "links", "target", "device")
"""What may differ, in the order of ``Change.what``."""

TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. Paths are absolute inside the container, as ``os.fsdecode`` gives them.

    ``type`` is what it is now (of a removed one: was); ``old_path`` is a renamed entry's place in the template;
    ``content`` is a unified diff from the template's text to the container's, if one was asked for and both are text.
    """

    kind: str
    path: str
    type: str
    what: tuple[str, ...] = ()
    old_path: str | None = None
    content: str | None = None


def diff_container(layout: Layout, path: Path, *, content: bool = False) -> Iterator[Change]:
    """How the container at ``path``, mounted or not, differs from its template; with ``content`` also in which lines.

    Lines are compared of regular files up to ``CONTENT_MAX`` bytes in UTF-8 without NUL. What a program changes while
    this runs is reported as it was or as it is. Raises ``DamagedError``, ``NotFoundError`` (its template).
    """
    granted = Granted(layout, path)
    granted.open(granted.os_template).close()  # says now, not at the first change, what is wrong with it
    root_fd = open_private_area(path)
    return _changes(granted, path, root_fd, content=content)


def _changes(granted: Granted, path: Path, root_fd: int, *, content: bool) -> Iterator[Change]:
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, root_fd)
        templates = Templates(granted.open)
        stack.callback(templates.close)
        template = templates.get(granted.os_template)
        assert template is not None
        survey = Survey(path, templates, template)
        survey.read(root_fd)
        links_fd = open_links(path)
        if links_fd >= 0:
            stack.callback(os.close, links_fd)
        differ = _Differ(template, survey, links_fd, content=content)
        stack.callback(differ.close)
        yield from differ.run(root_fd)


# ------------------------------------------------------------------------------------------------------------- things


@dataclass(frozen=True, slots=True)
class _View:
    """An inode as the container sees it. ``data`` is the template entry whose content it still has, if it has one's."""

    attributes: Attributes
    xattrs: Callable[[], dict[str, bytes]]
    target: Callable[[], bytes]
    open: Callable[[], int]
    data: tuple[OpenTemplate, int] | None = None

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.attributes.mode)

    @property
    def type(self) -> str:
        return TYPES[self.kind]


def _view_entry(template: OpenTemplate, entry: int) -> _View:
    """A template entry as it is."""
    index = template.index
    return _View(
        index.attributes(entry),
        lambda: index.xattrs(entry),
        lambda: index.target(entry),
        lambda: template.open_file(entry),
        (template, entry),
    )


def _view_linked(template: OpenTemplate, entry: int, dir_fd: int, name: bytes) -> _View:
    """A template entry with the attributes that the magic link ``name`` carries."""
    view = _view_entry(template, entry)
    path = linux.entry_path(dir_fd, name)
    try:
        record = read_record(path)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        record = None  # damaged: vzfs check says so
    if record is None:
        return view
    xattrs = read_own_xattrs(path) if record.own_xattrs else template.index.xattrs(entry)
    attributes = record.apply(view.attributes, view.attributes.nlink, view.attributes.ctime_ns)
    return _View(attributes, lambda: xattrs, view.target, view.open, view.data)


def _view_own(info: os.stat_result, dir_fd: int, name: bytes) -> _View:
    """An object of the private area."""
    path = linux.entry_path(dir_fd, name)

    def xattrs() -> dict[str, bytes]:
        names = os.listxattr(path, follow_symlinks=False)
        shown = (key for key in names if not key.startswith(RESERVED_PREFIX))
        return {key: os.getxattr(path, key, follow_symlinks=False) for key in shown}

    return _View(
        Attributes.of(info, info.st_ino, info.st_nlink),
        xattrs,
        lambda: read_own_link(dir_fd, name),
        lambda: os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NOATIME | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd),
    )


def differences(view: _View, index: Index, entry: int) -> tuple[str, ...]:
    """What differs between an inode and the template's entry, in the order of ``WHAT``."""
    was = index.attributes(entry)
    if view.kind != stat.S_IFMT(was.mode):
        return ("type",)
    now = view.attributes
    found = {
        "content": view.kind == stat.S_IFREG and _content_differs(view, index, entry),
        "mode": view.kind != stat.S_IFLNK and now.mode != was.mode,
        "owner": (now.uid, now.gid) != (was.uid, was.gid),
        "times": now.mtime_ns != was.mtime_ns,
        "xattrs": view.xattrs() != index.xattrs(entry),
        "target": view.kind == stat.S_IFLNK and view.target() != index.target(entry),
        "device": view.kind in (stat.S_IFCHR, stat.S_IFBLK) and now.rdev != was.rdev,
    }
    return tuple(word for word in WHAT if found.get(word))


def _content_differs(view: _View, index: Index, entry: int) -> bool:
    if view.attributes.size != index.attributes(entry).size:
        return True
    if view.data is not None:
        return view.data[0].index.digest(view.data[1]) != index.digest(entry)
    with open(view.open(), "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").digest() != index.digest(entry)


# ------------------------------------------------------------------------------------------------------------- differ


class _Differ:
    """Walks the private area once more and tells the changes; ``Folder``s to go down into stand between them."""

    def __init__(self, template: OpenTemplate, survey: Survey, links_fd: int, *, content: bool) -> None:
        self._template = template
        self._survey = survey
        self._links_fd = links_fd
        self._content = content
        self._group_what: dict[bytes, tuple[str, ...]] = {}
        self._changed_below = self._find_changed_members()
        self._cursor: Cursor | None = None

    def close(self) -> None:
        """Close the descriptor of the directory being read."""
        if self._cursor is not None:
            self._cursor.close()

    def run(self, root_fd: int) -> Iterator[Change]:
        """All changes in order."""
        root = root_folder(root_fd, self._template)
        self._cursor = cursor = Cursor(root_fd, root)
        view = _view_own(os.stat(root_fd), cursor.fd, b".")
        what = differences(view, self._template.index, 0)
        if what:
            yield Change("changed", "/", view.type, what)
        steps = [self._folder(root, self._template, 0)]
        while steps:
            step = next(steps[-1], None)
            if step is None:
                steps.pop()
                if steps:
                    cursor.leave()
            elif isinstance(step, Change):
                yield step
            elif cursor.enter(step[0]):
                steps.append(self._folder(*step))

    @property
    def _here(self) -> Cursor:
        assert self._cursor is not None
        return self._cursor

    def _folder(self, folder: Folder, base: OpenTemplate | None, base_entry: int) -> Iterator[_Step]:
        """The changes in one real directory, compared with the template directory ``base_entry`` of ``base`` if any."""
        names = set(self._here.names())
        if base is not None:
            names.update(base.index.name(child) for child in base.index.children(base_entry))
        for name in sorted(names):
            was = base.index.find(base_entry, name) if base is not None else 0
            yield from self._name(folder, name, base, was)

    def _name(self, folder: Folder, name: bytes, base: OpenTemplate | None, was: int) -> Iterator[_Step]:
        """The changes of one name, where the template directory compared with has the entry ``was`` (0: none)."""
        thing = self._identify(name)
        if base is not None and was and not self._stays(folder, name, thing, base, was):
            if base.base + was not in self._survey.moved:
                yield from self._subtree("removed", folder.path(name), base, was)
            was = 0
        if thing is None:
            return
        try:
            if thing.is_folded():
                yield from self._folded(folder, name, thing, same=bool(was))
            else:
                yield from self._inode(folder, name, thing, base if was else None, was)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE, errno.EINVAL):
                raise  # else it has vanished from a mounted container

    def _identify(self, name: bytes) -> Thing | None:
        try:
            return identify(self._survey.templates.get, self._here.fd, name)
        except (FileNotFoundError, OSError) as error:
            if error.errno in (errno.ENOENT, errno.ESTALE, errno.EINVAL):
                return None
            raise

    def _stays(self, folder: Folder, name: bytes, thing: Thing | None, base: OpenTemplate, was: int) -> bool:
        """Whether what lies at ``name`` is to be compared with the template's entry ``was`` of that name."""
        if thing is None:
            return False
        if thing.number == base.base + was:
            return True
        if self._is_claim(folder, name, thing) or thing.is_folded() or thing.in_group(self._survey.groups):
            return False
        moved = self._survey.moved.get(base.base + was)
        return moved is None or self._survey.holds(base, was)

    def _is_claim(self, folder: Folder, name: bytes, thing: Thing) -> bool:
        """Whether this is where an entry of the container's template went."""
        if thing.template is not self._template or thing.template is None:
            return False
        spot = self._survey.moved.get(thing.number)
        return spot is not None and spot.is_at(folder, name) and not self._survey.holds(thing.template, thing.entry)

    # ---------------------------------------------------------------------------------------------- kinds of things

    def _folded(self, folder: Folder, name: bytes, thing: Thing, *, same: bool) -> Iterator[Change]:
        """A magic link to a directory: at most renamed, though link groups with names in it may have changed."""
        template, path = thing.template, folder.path(name)
        assert template is not None
        if not same and not self._is_claim(folder, name, thing):
            yield from self._subtree("added", path, template, thing.entry)
            return
        if not same:
            yield Change("renamed", os.fsdecode(path), "dir", old_path=self._old_path(thing))
        prefix = len(template.index.path(thing.entry))
        for member in self._changed_below.get(thing.number, ()):
            inside = path + template.index.path(member)[prefix:]
            yield from self._changed(inside, self._group_view(template, member), template, member)

    def _inode(self, folder: Folder, name: bytes, thing: Thing, base: OpenTemplate | None, was: int) -> Iterator[_Step]:
        """Anything but a folded directory."""
        path = folder.path(name)
        view = self._view(name, thing)
        claimed = base is None and self._is_claim(folder, name, thing)
        below = (base, was) if base is not None and base.index.is_directory(was) else (None, 0)
        if base is not None:
            yield from self._changed(path, view, base, was, relinked=self._is_relinked(view, thing, base, was))
        elif claimed:
            assert thing.template is not None
            what = differences(view, thing.template.index, thing.entry)
            text = self._text(path, view, thing.template, thing.entry) if "content" in what else None
            yield Change("renamed", os.fsdecode(path), view.type, what, self._old_path(thing), text)
            below = (thing.template, thing.entry)
        else:
            linked = view.kind != stat.S_IFDIR and thing.template is not None
            text = self._text(path, view, None, 0) if not linked else None
            yield Change("added", os.fsdecode(path), view.type, ("links",) if linked else (), content=text)
        if thing.form is Form.DIRECTORY:
            yield (Folder(folder, name, thing.info.st_ino, thing.template, thing.entry), *below)
        elif base is not None and base.index.is_directory(was):
            yield from self._children("removed", path, base, was)

    def _changed(
        self, path: bytes, view: _View, base: OpenTemplate, was: int, *, relinked: bool = False
    ) -> Iterator[Change]:
        what = differences(view, base.index, was)
        if relinked and what != ("type",):
            what = tuple(word for word in WHAT if word in (*what, "links"))
        if what:
            text = self._text(path, view, base, was) if "content" in what else None
            yield Change("changed", os.fsdecode(path), view.type, what, content=text)

    def _is_relinked(self, view: _View, thing: Thing, base: OpenTemplate, was: int) -> bool:
        """Whether a file made anew has other hard links than the template's had."""
        if thing.number == base.base + was or view.kind == stat.S_IFDIR:
            return False
        return view.attributes.nlink > 1 or base.index.attributes(was).nlink > 1

    def _view(self, name: bytes, thing: Thing) -> _View:
        fd = self._here.fd
        if thing.form is not Form.LINK:
            return _view_own(thing.info, fd, name)
        assert thing.template is not None
        if thing.in_group(self._survey.groups):
            return self._group_view(thing.template, thing.entry)
        if thing.info.st_nlink > 1:  # shared with the link farm, so it carries nothing
            return _view_entry(thing.template, thing.entry)
        return _view_linked(thing.template, thing.entry, fd, name)

    def _old_path(self, thing: Thing) -> str:
        assert thing.template is not None
        return "/" + os.fsdecode(thing.template.index.path(thing.entry))

    # ------------------------------------------------------------------------------------------------- link groups

    def _group_view(self, template: OpenTemplate, entry: int) -> _View:
        """The inode of a link group."""
        key = template.group_key(entry)
        if key not in self._survey.groups or self._links_fd < 0:
            return _view_entry(template, entry)
        try:
            info = os.lstat(key, dir_fd=self._links_fd)
            if stat.S_ISLNK(info.st_mode) and magic.is_magic(os.readlink(key, dir_fd=self._links_fd)):
                return _view_linked(template, entry, self._links_fd, key)
        except FileNotFoundError:
            return _view_entry(template, entry)
        return _view_own(info, self._links_fd, key)

    def _find_changed_members(self) -> dict[int, list[int]]:
        """For each template directory the changed link group members below it, in the order of a listing."""
        below: dict[int, list[int]] = {}
        for key in self._survey.groups:
            member = self._group_of(key)
            if member is None:
                continue
            template, leader = member
            if not differences(self._group_view(template, leader), template.index, leader):
                continue
            for entry in template.index.members(leader):
                parent = entry
                while parent:
                    parent = template.index.parent[parent]
                    below.setdefault(template.base + parent, []).append(entry)
        for number, members in below.items():
            index = self._survey.templates.of(number)[0].index
            members.sort(key=lambda entry: index.path(entry).split(b"/"))
        return below

    def _group_of(self, key: bytes) -> tuple[OpenTemplate, int] | None:
        """The template and leader that the record ``key`` is for; ``None`` for one that means nothing."""
        name, _, leader_text = key.decode("ascii", "replace").rpartition(":")
        if not magic.valid_template_name(name) or not leader_text.isdecimal():
            return None
        template = self._survey.templates.get(name)
        if template is None or not 0 < int(leader_text) < template.index.count:
            return None
        leader = int(leader_text)
        return (template, leader) if template.group_key(leader) == key else None

    # ------------------------------------------------------------------------------- what the template knows alone

    def _subtree(self, kind: str, path: bytes, template: OpenTemplate, top: int) -> Iterator[Change]:
        """A line for the template's entry and, if it is a directory, for each one below that is nowhere else."""
        yield self._line(kind, path, template, top)
        yield from self._children(kind, path, template, top)

    def _children(self, kind: str, path: bytes, template: OpenTemplate, top: int) -> Iterator[Change]:
        index = template.index
        stack = [(path, child) for child in reversed(index.children(top))] if index.is_directory(top) else []
        while stack:
            above, entry = stack.pop()
            if kind == "removed" and template.base + entry in self._survey.moved:
                continue
            here = above + b"/" + index.name(entry)
            yield self._line(kind, here, template, entry)
            if index.is_directory(entry):
                stack.extend((here, child) for child in reversed(index.children(entry)))

    @staticmethod
    def _line(kind: str, path: bytes, template: OpenTemplate, entry: int) -> Change:
        return Change(kind, os.fsdecode(path), TYPES[stat.S_IFMT(template.index.mode(entry))])

    # ----------------------------------------------------------------------------------------------------- content

    def _text(self, path: bytes, view: _View, base: OpenTemplate | None, was: int) -> str | None:
        """How the content differs from that of the template's entry ``was`` (``base`` is ``None``: from nothing)."""
        if not self._content or view.kind != stat.S_IFREG:
            return None
        old = b""
        if base is not None:
            attributes = base.index.attributes(was)
            if attributes.size > CONTENT_MAX or not stat.S_ISREG(attributes.mode):
                return None
            old = _read(lambda: base.open_file(was))
        if view.attributes.size > CONTENT_MAX:
            return None
        old_name = b"/" + base.index.path(was) if base is not None else None
        return unified_diff(old, _read(view.open), old_name, path)


_Step = Change | tuple[Folder, OpenTemplate | None, int]
"""A change, or a directory to go down into with the template directory that it is compared with."""


def _read(opener: Callable[[], int]) -> bytes:
    """What the regular file holds, at most ``CONTENT_MAX + 1`` bytes of it."""
    with open(opener(), "rb") as file:
        return file.read(CONTENT_MAX + 1)
