"""How cost grows: with the template, with the number of containers, with the directory.

Rule: templates are generated, of empty files, in directories of 40 as plain trees have them; what is measured is one
operation in the middle of ever more of the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

from benchmarks.template import file_name
from benchmarks.workload import Cache, Condition, Group, Outcome, Place, Shape, Sizes, Skip, Step, Workload
from benchmarks.workloads.clients import measure
from benchmarks.workloads.density import pss_mib

TOP_DIRECTORIES = 20
"""Entries of a generated template's root: as many as a Debian root has."""
FILES_PER_DIRECTORY = 40
LEAST_ENTRIES = 500
LOOKUPS = 1_000
LEAST_LOOKUPS = 100
SMALL_DIRECTORY = 10
LOOKUP_DIRECTORIES = (10, 1_000, 100_000)
WRITE_DIRECTORIES = (100, 1_000, 5_000)
LONG = "/".join(f"a-directory-with-a-rather-long-name-{depth}" for depth in range(4))
"""Below this, vzfs's link texts are longer than what an inode of ext4 holds (59 bytes): its worse case."""


def plain_tree(entries: int) -> dict[str, int]:
    """A tree of ``entries`` entries, the root included, in directories of files two levels deep."""
    tree = {f"top{number:02d}": 0 for number in range(TOP_DIRECTORIES)}
    left = entries - 1 - len(tree)
    number = 0
    while left > 1:
        files = min(FILES_PER_DIRECTORY, left - 1)
        tree[f"top{number % TOP_DIRECTORIES:02d}/d{number:05d}"] = files
        left -= files + 1
        number += 1
    tree["top00"] += left
    return tree


def plain_shape(entries: int) -> Shape:
    """Templates of so many entries."""

    def directories(sizes: Sizes) -> Mapping[str, int]:
        return plain_tree(sizes.scaled(entries, LEAST_ENTRIES))

    return Shape(f"plain-{entries}", f"{entries:,} entries", directories)


def lstat(place: Place, names: Sequence[str]) -> Outcome:
    """lstat of ``names`` by one client."""
    return measure(place, {"loop": "lstat", "paths": list(names)}, names=len(names))


class Growth(Workload):
    """One size of template: look-ups in the newest of ever more containers, and what each of them costs."""

    group = Group.SCALE
    conditions = (Condition.IDLE,)
    entries: ClassVar[int]

    def __init__(self) -> None:
        self.places: list[Place] = []

    def prepare(self, place: Place) -> None:
        """The first container."""
        self.places = [place]

    def run(self, place: Place, step: Step) -> Outcome:
        """Steps are named WHAT-CONTAINERS."""
        what, _, count = step.name.partition("-")
        if not place.kept and int(count) > 1:
            raise Skip("has no containers: each would be the template itself or a whole copy")
        if int(count) > place.sizes.containers:
            raise Skip(f"a quick run mounts no more than {place.sizes.containers} containers")
        if what == "mount":
            return self._mount(place, int(count))
        if what == "lookup":
            return lstat(self.places[-1], self._names(place))
        servers = [pid for one in self.places for pid in one.servers]
        if not servers:
            raise Skip("the kernel serves it, there is no process")
        return Outcome(0.0, 1, "", value=pss_mib(servers) / len(self.places))

    def _mount(self, place: Place, count: int) -> Outcome:
        start = time.perf_counter()
        added = [place.another() for _ in range(count - len(self.places))]
        taken = time.perf_counter() - start
        self.places += added
        return Outcome(taken, len(added), f"{len(os.listdir(added[-1].root))} entries in the root")

    def _names(self, place: Place) -> list[str]:
        tree = plain_tree(place.sizes.scaled(self.entries, LEAST_ENTRIES))
        names = [f"{folder}/{file_name(number)}" for folder, files in tree.items() for number in range(files)]
        return place.rng.sample(names, min(place.sizes.scaled(LOOKUPS, LEAST_LOOKUPS), len(names)))


def growth(entries: int, containers: Sequence[int]) -> type[Growth]:
    """The workload for one size of template, with so many containers mounted one after the other."""
    steps: list[Step] = []
    for count in containers:
        so_many = f"{count} container{'s' if count > 1 else ''} mounted"
        if count > 1:
            steps.append(Step(f"mount-{count}", f"create and mount, until {so_many}, each", Cache.ANY))
        steps.append(Step(f"lookup-{count}", f"lstat of random names, {so_many}", Cache.DENTRIES))
        steps.append(Step(f"memory-{count}", f"PSS of serving processes, each, {so_many}", Cache.ANY, unit="MiB"))
    return type(
        f"Growth{entries}",
        (Growth,),
        {
            "__doc__": f"A template of {entries:,} entries.",
            "__module__": __name__,
            "name": f"scale-{entries // 1000}k",
            "title": f"Template of {entries:,} entries",
            "shape": plain_shape(entries),
            "entries": entries,
            "steps": tuple(steps),
        },
    )


def _directories(sizes: Sizes) -> Mapping[str, int]:
    shape: dict[str, int] = {}
    for files in LOOKUP_DIRECTORIES:
        size = sizes.scaled(files, SMALL_DIRECTORY)
        for turn in range(max(1, sizes.scaled(LOOKUPS, LEAST_LOOKUPS) // size)):
            shape[f"lookup-{files}/{turn:03d}"] = size
    for files in WRITE_DIRECTORIES:
        shape[f"{LONG}/write-{files}"] = sizes.scaled(files, SMALL_DIRECTORY)
    return shape


DIRECTORIES = Shape("directories", "directories of 10 to 100,000 files", _directories)


class DirectoryLookup(Workload):
    """Whether a look-up costs more in a larger directory; the directories themselves are known when it begins."""

    name = "directory-lookup"
    title = "lstat of 1,000 random names in directories of a size"
    group = Group.SCALE
    conditions = (Condition.IDLE,)
    shape = DIRECTORIES
    steps = tuple(
        Step(f"files-{files}", f"directories of {files:,} files", Cache.DENTRIES) for files in LOOKUP_DIRECTORIES
    )

    def run(self, place: Place, step: Step) -> Outcome:
        """Steps are named for the size."""
        top = step.name.replace("files", "lookup")
        folders = {folder: files for folder, files in _directories(place.sizes).items() if folder.startswith(f"{top}/")}
        names = [f"{folder}/{file_name(number)}" for folder, files in folders.items() for number in range(files)]
        chosen = place.rng.sample(names, min(len(names), place.sizes.scaled(LOOKUPS, LEAST_LOOKUPS)))
        with contextlib.ExitStack() as stack:
            for folder in folders:  # open: in use, so known
                stack.callback(os.close, os.open(place.root / folder, os.O_PATH))
            return lstat(place, chosen)


class DirectoryFirstWrite(Workload):
    """The first change in a directory that is as the template has it, whose path is long."""

    name = "directory-first-write"
    title = "First new file in a template directory"
    group = Group.SCALE
    conditions = (Condition.IDLE,)
    writes = True
    shape = DIRECTORIES
    steps = tuple(Step(f"files-{files}", f"directory of {files:,} files", Cache.FRESH) for files in WRITE_DIRECTORIES)

    def run(self, place: Place, step: Step) -> Outcome:
        """Steps are named for the size."""
        folder = f"{LONG}/{step.name.replace('files', 'write')}"
        done = measure(place, {"loop": "create", "paths": [f"{folder}/new"]}, whole=True)
        return dataclasses.replace(done, proof=f"{len(os.listdir(place.root / folder))} entries")


WORKLOADS: tuple[type[Workload], ...] = (
    growth(10_000, (1, 2)),
    growth(100_000, (1, 10, 50)),
    growth(500_000, (1, 2)),
    DirectoryLookup,
    DirectoryFirstWrite,
)
"""All of them."""
