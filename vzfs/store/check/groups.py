"""Link groups: each record is one, stands for names that exist, and counts them right."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable

import xattr  # type: ignore[import-untyped]

from vzfs import linux
from vzfs.store import magic
from vzfs.store.check.finding import Mend, Report
from vzfs.store.check.ground import Ground
from vzfs.store.escape import printable
from vzfs.store.identify import read_xattr
from vzfs.store.layout import COW, LINKS, STAGE
from vzfs.store.opened import OpenTemplate, parse_group_key
from vzfs.store.record import Record
from vzfs.store.survey import Spot, Survey
from vzfs.store.xattrs import ATTR_XATTR, NLINK_XATTR, RESERVED_PREFIX, SPLIT_XATTR


def check_records(ground: Ground, report: Report, survey: Survey) -> None:
    """Every record in ``cow/links`` is right."""
    for key in sorted(survey.groups):
        path = os.fsencode(COW) + b"/" + LINKS + b"/" + key
        lose = ground.in_cow(LINKS, key, ground.lost.take)
        group = parse_group_key(key)
        if group is None:
            report(path, "malformed", "is no name of a link group's record", lose)
            continue
        name, leader = group
        template = survey.templates.get(name)
        if template is None:
            if ground.is_absent(name, report):
                report(path, "dangling", f"record for the template {name}, which is not in the store", lose)
        elif not leader < template.index.count or template.group_key(leader) != key or _is_directory(template, leader):
            report(path, "dangling", "record for an entry that the template doesn't have", lose)
        else:
            _Record(ground, report, survey, template, leader).check(path)


def check_unrecorded(ground: Ground, report: Report, survey: Survey) -> None:
    """A link group of the template without a record has the names that the template has."""
    for template, leader in sorted(_disturbed(survey), key=lambda group: group[0].base + group[1]):
        key = template.group_key(leader)
        names, expected = survey.names_of(template, leader), template.index.attributes(leader).nlink
        if key in survey.groups or names in (0, expected):
            continue
        detail = f"the template's /{printable(template.index.path(leader))} has {names} names, but no record says so"
        path = os.fsencode(COW) + b"/" + LINKS + b"/" + key
        report(path, "link-count", detail, _record_names(ground, template, leader, names))


def _record_names(ground: Ground, template: OpenTemplate, leader: int, names: int) -> Mend:
    def mend() -> str:
        make_record(ground, template, leader, [], names)
        return "recorded"

    return mend


def _disturbed(survey: Survey) -> set[tuple[OpenTemplate, int]]:
    """Link groups with a name that is elsewhere or nowhere: only these can have another number of names."""
    found = set()
    gone = [survey.templates.of(number) for number in {*survey.moved, *survey.missing}]
    while gone:
        template, entry = gone.pop()
        index = template.index
        if index.is_directory(entry):
            if not survey.is_there(template, entry):
                gone.extend((template, child) for child in index.children(entry))
        elif index.next_link[entry] != entry:
            found.add((template, index.leader[entry]))
    return found


def _is_directory(template: OpenTemplate, entry: int) -> bool:
    return template.index.is_directory(entry)


class _Record:
    """One record for an entry that the template has."""

    def __init__(self, ground: Ground, report: Report, survey: Survey, template: OpenTemplate, leader: int) -> None:
        self._ground = ground
        self._report = report
        self._survey = survey
        self._template = template
        self._leader = leader
        self._key = template.group_key(leader)

    def check(self, path: bytes) -> None:
        """Look at its form, its attributes, its names and their number."""
        fd = self._ground.open_cow(LINKS)
        try:
            fault = self._fault(fd)
            attributes = read_xattr(linux.entry_path(fd, self._key), ATTR_XATTR)
            noted = read_xattr(linux.entry_path(fd, self._key), NLINK_XATTR)
            split = read_xattr(linux.entry_path(fd, self._key), SPLIT_XATTR)
            own = stat.S_ISREG(os.lstat(self._key, dir_fd=fd).st_mode)
        finally:
            os.close(fd)
        lose = self._ground.in_cow(LINKS, self._key, self._ground.lost.take)
        if fault:
            self._report(path, "malformed", fault, lose)
            return
        names = self._survey.names_of(self._template, self._leader)
        if not names:
            shown = printable(self._template.index.path(self._leader))
            self._report(path, "orphan-group", f"changes to the template's /{shown}, which has no name left", lose)
            return
        if attributes is not None and not is_record(attributes):
            detail = f"{ATTR_XATTR} can't be {printable(attributes)}"
            self._report(path, "bad-record", detail, self._ground.in_cow(LINKS, self._key, _forget_attributes))
        if split is not None and (split != b"1" or not own):
            detail = f"{SPLIT_XATTR} can't be {printable(split)}"
            self._report(path, "bad-record", detail, self._ground.in_cow(LINKS, self._key, _forget_split))
        if noted != b"%d" % names:
            detail = f"has {names} names, {NLINK_XATTR} says {printable(noted or b'nothing')}"
            self._report(path, "link-count", detail, self._ground.in_cow(LINKS, self._key, _note_count(names)))

    def _fault(self, links_fd: int) -> str:
        """Why it can't be a record for its entry, or nothing."""
        mode = os.lstat(self._key, dir_fd=links_fd).st_mode
        if stat.S_ISLNK(mode):
            text = os.readlink(self._key, dir_fd=links_fd)
            if magic.is_magic(text):
                return "" if self._means_group(text) else f"is a magic link elsewhere: {printable(text)}"
        if stat.S_IFMT(mode) != stat.S_IFMT(self._template.index.mode(self._leader)):
            return "is of another type than the template's entry"
        return ""

    def _means_group(self, text: bytes) -> bool:
        link = magic.parse(text)
        if link is None or link.template != self._template.name:
            return False
        entry = self._template.index.find_path(link.path)
        return entry is not None and self._template.group_key(entry) == self._key


def is_record(value: bytes) -> bool:
    """Whether ``value`` is a readable ``trusted.vzfs.attr``."""
    try:
        Record.decode(value)
    except ValueError:
        return False
    return True


def _forget_attributes(links_fd: int, key: bytes) -> str:
    xattr.removexattr(linux.entry_path(links_fd, key), ATTR_XATTR, symlink=True)
    return "removed"


def _forget_split(links_fd: int, key: bytes) -> str:
    xattr.removexattr(linux.entry_path(links_fd, key), SPLIT_XATTR, symlink=True)
    return "removed"


def _note_count(names: int) -> Callable[[int, bytes], str]:
    def work(links_fd: int, key: bytes) -> str:
        xattr.setxattr(linux.entry_path(links_fd, key), NLINK_XATTR, b"%d" % names, symlink=True)
        return "set"

    return work


def make_record(ground: Ground, template: OpenTemplate, entry: int, links: list[Spot], names: int) -> None:
    """Make ``entry``, which has ``names`` names but no record, a link group with the attributes of one of them."""
    stage_fd = ground.open_cow(STAGE, make=True)
    links_fd = -1
    staged = b"record-" + secrets.token_hex(4).encode()
    try:
        links_fd = ground.open_cow(LINKS, make=True)
        os.symlink(template.link_text(entry), staged, dir_fd=stage_fd)
        path = linux.entry_path(stage_fd, staged)
        for name, value in _carried(ground, links).items():
            os.setxattr(path, name, value, follow_symlinks=False)  # any bytes
        xattr.setxattr(path, NLINK_XATTR, b"%d" % names, symlink=True)
        linux.renameat2(stage_fd, staged, links_fd, template.group_key(entry), linux.RENAME_NOREPLACE)
    except BaseException:
        linux.remove_tree(stage_fd, staged)
        raise
    finally:
        os.close(stage_fd)
        if links_fd >= 0:
            os.close(links_fd)


def _carried(ground: Ground, links: list[Spot]) -> dict[str, bytes]:
    """The store's attributes of the first of the links that carries any."""
    for spot in links:
        fd = spot.folder.open(ground.root_fd)
        try:
            if os.lstat(spot.name, dir_fd=fd).st_nlink > 1:
                continue
            path = linux.entry_path(fd, spot.name)
            names = [name for name in os.listxattr(path, follow_symlinks=False) if name.startswith(RESERVED_PREFIX)]
            if ATTR_XATTR in names:
                return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
        finally:
            os.close(fd)
    return {}
