"""The systems that are compared: what each needs, how it is mounted over the template, how it goes away.

To add one, write a small class and put it into ``SYSTEMS``. Rules: every mount is fresh, with nothing changed; options
are those that a careful user would take for a container root (ownership kept, caching on), no tricks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Ground:
    """What the suite made for all systems, on one disk file system.

    ``tree``: the template as plain files, never changed: the lower directory of everything that has one. ``folder``: a
    folder for what a system keeps during the whole run.
    """

    tree: Path
    folder: Path
    template: str


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted system: see ``Place`` for the fields. ``handle`` is the system's own."""

    root: Path
    stored: Path
    upper: Path | None = None
    servers: tuple[int, ...] = ()
    handle: object = field(default=None, compare=False)


class System(ABC):
    """One system."""

    name: ClassVar[str]
    """As on the command line."""
    title: ClassVar[str]
    command: ClassVar[str]
    """How it is mounted, as a user would type it."""
    writable: ClassVar[bool] = True
    """Whether it can be written to without changing the template."""
    peer: ClassVar[bool] = True
    """Whether it is what a user could pick instead of vzfs."""

    @abstractmethod
    def missing(self) -> str | None:
        """Why it can't be measured here, with the remedy; None when it can."""

    @abstractmethod
    def version(self) -> str:
        """Its version."""

    def set_up(self, ground: Ground) -> None:  # noqa: B027
        """Once before the first mount on ``ground``: copy or import the template."""

    @abstractmethod
    def mount(self, ground: Ground, place: Path) -> Mount:
        """Mount one more container; ``place`` is a new empty folder for everything it needs."""

    @abstractmethod
    def unmount(self, mount: Mount) -> None:
        """Unmount it and wait until its servers have ended. The folder is removed by the caller."""

    def restore(self, ground: Ground) -> None:  # noqa: B027
        """After a workload that writes: undo its changes where they did not go into ``place``."""
