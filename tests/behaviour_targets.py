"""Where the behaviour suite runs: targets that prepare one directory, seeds planted, per behaviour.

Rule: only this module knows file systems; tests/behaviours knows none. A target says which optional features its file
system has; a behaviour that needs one asserts the documented refusal where it is missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tests.behaviours import BEHAVIOURS, FEATURES, Behaviour, plant

if TYPE_CHECKING:
    from vzfs import Container

# What libfuse 3.14 and pyfuse3 do not pass on. SEEK_HOLE then finds one hole, at the end; the others are refused.
PORTABLE = FEATURES - {"fallocate", "getflags", "seek-hole", "tmpfile"}


class Target(Protocol):
    """A file system to judge. One instance serves a whole test session."""

    name: str
    features: frozenset[str]

    def prepare(self, behaviours: Iterable[Behaviour]) -> Mapping[str, Path]:
        """Plant each behaviour's seeds; its directory by the behaviour's name. Called once."""

    def close(self) -> None:
        """Unmount and remove everything. Called once, also when ``prepare`` failed half-way."""


def plant_all(root: Path, behaviours: Iterable[Behaviour] = ()) -> dict[str, Path]:
    """Plant the seeds of ``behaviours``, or of all, at ``root/<behaviour name>/``; the directories by name."""
    root.mkdir(mode=0o755, parents=True, exist_ok=True)
    places = {}
    for behaviour in list(behaviours) or BEHAVIOURS.values():
        places[behaviour.name] = root / behaviour.name
        plant(behaviour.seeds, places[behaviour.name])
    return places


class PlainTarget:
    """A plain directory: the oracle, when it lies on ext4."""

    name = "plain"
    features = FEATURES

    def __init__(self, tmp_path: Path) -> None:
        self._root = tmp_path / "plain"

    def prepare(self, behaviours: Iterable[Behaviour]) -> Mapping[str, Path]:
        return plant_all(self._root, behaviours)

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


class _MountTarget:
    """A container mounted for the whole session, on a store of its own."""

    def __init__(self, tmp_path: Path) -> None:
        self._root = tmp_path / "store"
        self._container: Container | None = None

    def _mount(self, template_tree: Path) -> Path:
        from vzfs import Store  # here, so that the other targets run without it

        store = Store(self._root)
        store.create_template("behaviours", str(template_tree))
        self._container = store.create(101, template="behaviours")
        return self._container.mount()

    def close(self) -> None:
        if self._container is not None:
            self._container.umount()
        shutil.rmtree(self._root.parent, ignore_errors=True)


class MountFresh(_MountTarget):
    """Seeds planted through the mount: all files are the container's own."""

    name = "fresh"
    features = PORTABLE

    def prepare(self, behaviours: Iterable[Behaviour]) -> Mapping[str, Path]:
        empty = self._root.parent / "empty"
        empty.mkdir(parents=True, mode=0o755)
        return plant_all(self._mount(empty) / "behaviours", behaviours)


class MountTemplate(_MountTarget):
    """Seeds planted in a tree that became the template: all files belong to the template."""

    name = "template"
    features = PORTABLE - {"directory-ctime"}  # a folded directory moves as one link

    def prepare(self, behaviours: Iterable[Behaviour]) -> Mapping[str, Path]:
        source = self._root.parent / "source"
        planted = plant_all(source, behaviours)
        top = self._mount(source)
        shutil.rmtree(source)
        return {name: top / name for name in planted}


Factory = Callable[[Path], Target]

# Every target there is, by name, and the ones that run unless VZFS_BEHAVIOUR_TARGETS says otherwise.
# The mount targets join TARGETS when the mount exists: TARGETS = list(FACTORIES).
FACTORIES: dict[str, Factory] = {one.name: one for one in (PlainTarget, MountFresh, MountTemplate)}
TARGETS = list(FACTORIES)


def chosen_targets() -> list[str]:
    """Names from VZFS_BEHAVIOUR_TARGETS (a comma list, or ``all``), or ``TARGETS``; ValueError for unknown ones."""
    text = os.environ.get("VZFS_BEHAVIOUR_TARGETS", "")
    if not text:
        return TARGETS
    names = list(FACTORIES) if text == "all" else text.split(",")
    unknown = sorted(set(names) - set(FACTORIES))
    if unknown:
        raise ValueError(f"VZFS_BEHAVIOUR_TARGETS: no target {unknown}; there are {sorted(FACTORIES)} and all")
    return names
