"""The container under examination, by descriptors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vzfs.errors import DamagedError, NotFoundError
from vzfs.store.check.finding import LostAndFound, Mend, Report
from vzfs.store.granted import Granted, NotGrantedError
from vzfs.store.layout import CONF, COW, OWN_FOLDER_MODE, Layout
from vzfs.store.opened import OpenTemplate, template_paths
from vzfs.store.survey import Spot, Templates, open_private_area

PATH_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _loader(layout: Layout, path: Path) -> Callable[[str], OpenTemplate]:
    """What opens templates for the container. Where its conf can't say which it may use, or names one for its root that
    isn't there, that is told, and each may be looked into to say what else is wrong."""
    try:
        granted = Granted(layout, path)
        template_paths(layout, granted.os_template)
    except (FileNotFoundError, DamagedError, NotFoundError):
        return lambda name: OpenTemplate(layout, name)
    return granted.open


class Ground:
    """An open container, whose lock the caller holds. Raises ``DamagedError`` when it has no private area."""

    def __init__(self, layout: Layout, path: Path) -> None:
        self.path = path
        self.root_fd = open_private_area(path)
        self.top_fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.templates = Templates(_loader(layout, path))
        self.lost = LostAndFound(self.top_fd)
        self._told: set[str] = set()

    def close(self) -> None:
        """Close every descriptor."""
        self.lost.close()
        self.templates.close()
        os.close(self.top_fd)
        os.close(self.root_fd)

    def tell_template(self, name: str, report: Report) -> None:
        """Note that a template can't be opened or may not be used; what lies in it is then nobody's fault."""
        self._told.add(name)
        failure = self.templates.failures[name]
        report(CONF, "template", str(failure) if isinstance(failure, NotGrantedError) else failure.message, None)

    def is_absent(self, name: str, report: Report) -> bool:
        """Whether a template that can't be opened simply isn't there, without being told already."""
        if name in self._told:
            return False
        if isinstance(self.templates.failures[name], NotFoundError):
            return True
        self.tell_template(name, report)
        return False

    def open_cow(self, name: bytes, *, make: bool = False) -> int:
        """A descriptor of the folder ``cow/<name>``. Raises ``FileNotFoundError``, ``NotADirectoryError``."""
        cow_fd = os.open(COW, PATH_FLAGS, dir_fd=self.top_fd)
        try:
            if make:
                try:
                    os.mkdir(name, OWN_FOLDER_MODE, dir_fd=cow_fd)
                except FileExistsError:
                    pass  # what it takes to make it sure
            return os.open(name, PATH_FLAGS, dir_fd=cow_fd)
        finally:
            os.close(cow_fd)

    def at_spot(self, spot: Spot, work: Callable[[int, bytes], str]) -> str:
        """Do ``work(dir_fd, name)`` with the directory of a spot open."""
        fd = spot.folder.open(self.root_fd)
        try:
            return work(fd, spot.name)
        finally:
            os.close(fd)

    def in_cow(self, folder: bytes, name: bytes, work: Callable[[int, bytes], str]) -> Mend:
        """A repair that does ``work(dir_fd, name)`` in ``cow/<folder>``."""

        def mend() -> str:
            fd = self.open_cow(folder)
            try:
                return work(fd, name)
            finally:
                os.close(fd)

        return mend

    def at(self, spot: Spot, work: Callable[[int, bytes], str]) -> Mend:
        """A repair that does ``work(dir_fd, name)`` at a spot."""
        return lambda: self.at_spot(spot, work)
