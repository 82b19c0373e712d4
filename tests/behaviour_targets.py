"""Where the behaviour suite runs: targets that prepare one directory, seeds planted, per behaviour.

Rule: only this module knows file systems; tests/behaviours knows none. A target says which optional features its file
system has; a behaviour that needs one asserts the documented refusal where it is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol

from tests.behaviours import BEHAVIOURS, FEATURES, Behaviour, plant
from tests.engines import ENGINES, NEWER, EngineStore
from vzfs import Container

# What libfuse 3.14 and pyfuse3 do not pass on, or the kernel does not ask of them.
# SEEK_HOLE then finds one hole, at the end; the others are refused.
_LACKING = {
    "pyfuse3": {"fallocate", "getflags", "seek-hole", "setgid-without-execute", "tmpfile"},
    "direct": set[str](),
}
# What files of the template lack: a folded directory moves as one link.
_TEMPLATE = {"directory-ctime"}
# What those that are passed through lack: readers keep the template's data.
_PASSED = {*_TEMPLATE, "coherent-mappings", "coherent-readers"}


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


class OverlayTarget:
    """Kernel overlayfs with the seeds in its lower directory: what another copy-on-write file system does."""

    name = "overlay"
    features = FEATURES - {"coherent-mappings"}

    def __init__(self, tmp_path: Path) -> None:
        self._root = tmp_path / "overlay"
        self._mounted = False

    def prepare(self, behaviours: Iterable[Behaviour]) -> Mapping[str, Path]:
        lower, upper, work, top = (self._root / name for name in ("lower", "upper", "work", "top"))
        planted = plant_all(lower, behaviours)
        for folder in (upper, work, top):
            folder.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={work},index=on"  # or hard links break
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", top], check=True)
        self._mounted = True
        return {name: top / name for name in planted}

    def close(self) -> None:
        if self._mounted:
            subprocess.run(["umount", self._root / "top"], check=True)
        shutil.rmtree(self._root, ignore_errors=True)


class _MountTarget:
    """A container mounted for the whole session, on a store of its own."""

    kind: str
    _options: ClassVar[Mapping[str, int]] = {}
    _withheld = 0

    def __init__(self, engine: str, tmp_path: Path) -> None:
        self.name = name_of(engine, self.kind)
        self.features = FEATURES - _LACKING[engine]
        self._engine = engine
        self._root = tmp_path / "store"
        self._container: Container | None = None

    def _mount(self, template_tree: Path) -> Path:
        store = EngineStore(self._root, self._engine, self._withheld)
        store.create_template("behaviours", str(template_tree))
        self._container = store.create(101, template="behaviours")
        return self._container.mount(**self._options)

    def close(self) -> None:
        if self._container is not None:
            self._container.umount()
        shutil.rmtree(self._root.parent, ignore_errors=True)


def name_of(engine: str, kind: str) -> str:
    """What a mount target is called: the first engine's have the short names."""
    return kind if engine == "pyfuse3" else f"{engine}-{kind}"


class MountFresh(_MountTarget):
    """Seeds planted through the mount: all files are the container's own."""

    kind = "fresh"

    def prepare(self, behaviours: Iterable[Behaviour]) -> Mapping[str, Path]:
        empty = self._root.parent / "empty"
        empty.mkdir(parents=True, mode=0o755)
        return plant_all(self._mount(empty) / "behaviours", behaviours)


class MountTemplate(_MountTarget):
    """Seeds planted in a tree that became the template: all files belong to the template."""

    kind = "template"

    def __init__(self, engine: str, tmp_path: Path) -> None:
        super().__init__(engine, tmp_path)
        self.features -= _TEMPLATE

    def prepare(self, behaviours: Iterable[Behaviour]) -> Mapping[str, Path]:
        source = self._root.parent / "source"
        planted = plant_all(source, behaviours)
        top = self._mount(source)
        shutil.rmtree(source)
        return {name: top / name for name in planted}


class MountPassed(MountTemplate):
    """The same with every file of the template passed through, as large ones are."""

    kind = "passed"
    _options: ClassVar[Mapping[str, int]] = {"passthrough_above": 0}

    def __init__(self, engine: str, tmp_path: Path) -> None:
        super().__init__(engine, tmp_path)
        self.features -= _PASSED


class MountServed(MountTemplate):
    """The same with nothing passed through, as on the kernel of Debian 12."""

    kind = "served"
    _withheld = int(NEWER)


Factory = Callable[[Path], Target]

# Every target there is, by name; all run unless VZFS_BEHAVIOUR_TARGETS says otherwise.
FACTORIES: dict[str, Factory] = {PlainTarget.name: PlainTarget, OverlayTarget.name: OverlayTarget} | {
    name_of(engine, target.kind): partial(target, engine)
    for engine in ENGINES
    for target in (MountFresh, MountTemplate)
}
if "direct" in ENGINES:
    for special in (MountPassed, MountServed):
        FACTORIES[name_of("direct", special.kind)] = partial(special, "direct")

# The groups of behaviours that say something of a target which differs from another in what happens to open files only.
_OF_OPEN_FILES = frozenset(
    {"data", "exec", "links", "locks", "openfiles", "permissions", "rename", "setid", "times", "unlinked", "xattrs"}
)
GROUPS = {name_of("direct", special.kind): _OF_OPEN_FILES for special in (MountPassed, MountServed)}
GROUPS[OverlayTarget.name] = frozenset({"setid", "openfiles"})


def chosen_targets() -> list[str]:
    """Names from VZFS_BEHAVIOUR_TARGETS (a comma list), or all; ValueError for unknown ones."""
    text = os.environ.get("VZFS_BEHAVIOUR_TARGETS", "")
    names = text.split(",") if text else list(FACTORIES)
    unknown = sorted(set(names) - set(FACTORIES))
    if unknown:
        raise ValueError(f"VZFS_BEHAVIOUR_TARGETS: no target {unknown}; there are {sorted(FACTORIES)}")
    return names
