"""The names of a private area: each means something, and no template entry is at two places."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import xattr  # type: ignore[import-untyped]

from vzfs import linux
from vzfs.store import magic
from vzfs.store.check.finding import Mend, Report
from vzfs.store.check.ground import Ground
from vzfs.store.check.groups import is_record, make_record
from vzfs.store.escape import printable
from vzfs.store.identify import Form, Thing, identify, read_xattr
from vzfs.store.layout import PRIVATE_AREA
from vzfs.store.opened import OpenTemplate
from vzfs.store.survey import Folder, Spot, Survey
from vzfs.store.xattrs import ATTR_XATTR, FOLDS_XATTR, ORIGIN_XATTR, SPLIT_XATTR


class NameChecker:
    """Looks at each name by itself while the private area is surveyed; ``groups`` are the names of all records."""

    def __init__(self, ground: Ground, report: Report, groups: set[bytes]) -> None:
        self._ground = ground
        self._report = report
        self._groups = groups
        self._marked: Folder | None = None

    def visit(self, folder: Folder, dir_fd: int, name: bytes, thing: Thing) -> None:
        """Look at ``name`` in ``folder``."""
        spot = Spot(folder, name)
        if thing.form in (Form.MALFORMED, Form.DANGLING):
            detail = f"{thing.form.value}: {printable(thing.text)}"
            self._tell(spot, thing.form.name.lower(), detail, self._ground.at(spot, self._ground.lost.take))
        elif thing.form is Form.FOREIGN:
            self._check_foreign(spot, thing)
        elif thing.form is Form.LINK:
            self._check_link(spot, dir_fd, thing)
        else:
            self._check_origin(spot, thing)
            self._check_split(spot, dir_fd, thing)

    def _tell(self, spot: Spot, kind: str, detail: str, mend: Mend | None) -> None:
        self._report(area_path(spot), kind, detail, mend)

    def _check_foreign(self, spot: Spot, thing: Thing) -> None:
        link = magic.parse(thing.text)
        assert link is not None
        if self._ground.is_absent(link.template, self._report):
            detail = f"magic link into a template that is not in the store: {printable(thing.text)}"
            self._tell(spot, "dangling", detail, self._ground.at(spot, self._ground.lost.take))

    def _check_link(self, spot: Spot, dir_fd: int, thing: Thing) -> None:
        if thing.is_folded():
            self._check_mark(spot.folder, dir_fd)
        if thing.info.st_nlink > 1 or thing.in_group(self._groups):
            return  # shared with the link farm, or its group's record counts
        value = read_xattr(linux.entry_path(dir_fd, spot.name), ATTR_XATTR)
        if value is not None and (thing.is_folded() or not is_record(value)):
            detail = f"{ATTR_XATTR} can't be {printable(value)}"
            self._tell(spot, "bad-record", detail, self._ground.at(spot, _remove_xattr(ATTR_XATTR)))

    def _check_mark(self, folder: Folder, dir_fd: int) -> None:
        """A directory that holds folded ones is told by the template's link count or by ``FOLDS_XATTR``."""
        if folder is self._marked or (folder.parent is None and folder.template is None):
            return  # told already, or a root that nobody knows the template of
        self._marked = folder
        if folder.template is not None and folder.template.index.attributes(folder.entry).nlink > 2:
            return
        if read_xattr(linux.fd_path(dir_fd) + b"/.", FOLDS_XATTR) is None:
            mend = self._ground.at(Spot(folder, b"."), _mark)
            self._report(folder_path(folder), "folds", f"holds folded directories, but has no {FOLDS_XATTR}", mend)

    def _check_split(self, spot: Spot, dir_fd: int, thing: Thing) -> None:
        """The mark of a copy whose readers kept the template's data belongs on copied-up regular files."""
        value = read_xattr(linux.entry_path(dir_fd, spot.name), SPLIT_XATTR)
        if value is None or (value == b"1" and thing.template is not None and stat.S_ISREG(thing.info.st_mode)):
            return
        detail = f"{SPLIT_XATTR} can't be {printable(value)}"
        if value == b"1":
            detail = f"{SPLIT_XATTR}, but not copied up from a regular file"
        self._tell(spot, "bad-record", detail, self._ground.at(spot, _remove_xattr(SPLIT_XATTR)))

    def _check_origin(self, spot: Spot, thing: Thing) -> None:
        template, origin = thing.template, thing.origin
        if origin is None:
            return
        forget = self._ground.at(spot, _remove_xattr(ORIGIN_XATTR))
        if template is None:
            name = origin.partition(b"/")[0].decode("ascii", "replace")
            if name not in self._ground.templates.failures or self._ground.is_absent(name, self._report):
                self._tell(spot, "bad-record", f"{ORIGIN_XATTR} can't be {printable(origin)}", forget)
        elif thing.form is Form.OWN and (
            template.index.next_link[thing.entry] != thing.entry or template.group_key(thing.entry) in self._groups
        ):
            detail = f"{ORIGIN_XATTR} {printable(origin)} is a link group's, which has its own place"
            self._tell(spot, "duplicate-origin", detail, forget)


def area_path(spot: Spot) -> bytes:
    """Path of a spot relative to the container's folder."""
    return PRIVATE_AREA.encode() + spot.path()


def folder_path(folder: Folder) -> bytes:
    """Path of a real directory relative to the container's folder."""
    return b"/".join([PRIVATE_AREA.encode(), *folder.parts()])


def _remove_xattr(name: str) -> Callable[[int, bytes], str]:
    def work(dir_fd: int, entry: bytes) -> str:
        os.removexattr(linux.entry_path(dir_fd, entry), name, follow_symlinks=False)  # any bytes
        return "removed"

    return work


def _mark(dir_fd: int, name: bytes) -> str:
    xattr.setxattr(linux.entry_path(dir_fd, name), FOLDS_XATTR, b"1", symlink=True)
    return "set"


# ------------------------------------------------------------------------------------------- entries at several places


@dataclass(frozen=True, slots=True)
class _Places:
    """Where one template entry is. ``folded``: also as a part of a folded directory."""

    template: OpenTemplate
    entry: int
    links: list[Spot]
    copies: list[Spot]
    folded: bool


def check_places(ground: Ground, report: Report, survey: Survey) -> None:
    """No template entry is at two places, the names of a link group aside."""
    for number in sorted({*survey.extra, *survey.moved}):
        template, entry = survey.templates.of(number)
        if number not in survey.extra and not survey.holds(template, entry):
            continue
        places = _find_places(ground, survey, template, entry)
        if template.index.is_directory(entry):
            _check_directory(ground, report, places)
        elif template.index.next_link[entry] == entry and template.group_key(entry) not in survey.groups:
            _check_file(ground, report, places)


def _find_places(ground: Ground, survey: Survey, template: OpenTemplate, entry: int) -> _Places:
    places = _Places(template, entry, [], [], survey.holds(template, entry) and survey.in_folded(template, entry))
    seen = set()
    for spot in _spots(survey, template, entry):
        fd = spot.folder.open(ground.root_fd)
        try:
            thing = identify(survey.templates.get, fd, spot.name)
        finally:
            os.close(fd)
        inode = (spot.folder.ino, spot.name) if thing.form is Form.LINK else thing.info.st_ino
        if inode not in seen:  # names of one copied-up inode are one place
            (places.links if thing.form is Form.LINK else places.copies).append(spot)
        seen.add(inode)
    return places


def _spots(survey: Survey, template: OpenTemplate, entry: int) -> Iterator[Spot]:
    """Every place of the entry in a real directory, that which it shall keep first."""
    number = template.base + entry
    real = survey.real.get(number)
    if real is not None and real.parent is not None:
        yield Spot(real.parent, real.name)
    parent = survey.real.get(template.base + template.index.parent[entry])
    if parent is not None and survey.holds(template, entry):
        yield Spot(parent, template.index.name(entry))
    if number in survey.moved:
        yield survey.moved[number]
    yield from survey.extra.get(number, ())


def _check_directory(ground: Ground, report: Report, places: _Places) -> None:
    name = "/" + printable(places.template.index.path(places.entry))
    for spot in places.copies[1:]:
        detail = f"two directories claim to be the template's {name}"
        report(area_path(spot), "duplicate-origin", detail, ground.at(spot, _remove_xattr(ORIGIN_XATTR)))
    if places.copies and places.folded:
        detail = f"the template's {name} is inside a folded directory as well"
        report(area_path(places.copies[0]), "alias", detail, None)
    for spot in places.links[0 if places.copies or places.folded else 1 :]:
        detail = f"magic link to the template's {name}, which is elsewhere as well"
        report(area_path(spot), "alias", detail, ground.at(spot, ground.lost.take))


def _check_file(ground: Ground, report: Report, places: _Places) -> None:
    name = "/" + printable(places.template.index.path(places.entry))
    for spot in places.copies[0 if places.links or places.folded else 1 :]:
        detail = f"copied up from the template's {name}, which is elsewhere as well"
        report(area_path(spot), "duplicate-origin", detail, ground.at(spot, _remove_xattr(ORIGIN_XATTR)))
    names = len(places.links) + places.folded
    if names > 1:
        detail = f"magic link to the template's {name}, which is elsewhere as well"

        def mend() -> str:
            make_record(ground, places.template, places.entry, places.links, names)
            return "made hard links"

        report(area_path(places.links[-1]), "alias", detail, mend)
