"""Looking names up and listing directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.workload import Cache, Group, Outcome, Place, Sizes, Step, Workload
from benchmarks.workloads.clients import measure, program, shares

FIND = "/usr/bin/find"
CLIENTS = (1, 2, 4)


class Walk(Workload):
    """``find -printf %s`` over the whole container."""

    name = "walk"
    title = "Walk with attributes (find -printf '%y %s')"
    group = Group.LOOKUP
    steps = (
        Step("first", "names dropped", Cache.DENTRIES),
        Step("again", "again", Cache.WARM),
    )

    def run(self, place: Place, step: Step) -> Outcome:
        found = measure(place, program([FIND, ".", "-printf", r"%y %s\n"], output="sizes"), whole=True)
        # Per entry, so that templates of different sizes can be compared.
        return Outcome(found.seconds, place.facts.entries, found.proof, names=place.facts.entries)


class _Names(Workload):
    """Ask for each of ``paths``, then once more."""

    group = Group.LOOKUP
    steps = (
        Step("first", "names dropped", Cache.DENTRIES),
        Step("again", "again", Cache.WARM),
    )
    loop = "lstat"

    def __init__(self) -> None:
        self.paths: Sequence[str] = ()

    def run(self, place: Place, step: Step) -> Outcome:
        return measure(place, shares(place, self.loop, self.paths), names=len(self.paths))


class LstatRandom(_Names):
    """lstat of small files in random order."""

    name = "lstat-random"
    title = "lstat of 5,000 names in random order"
    clients = CLIENTS

    def prepare(self, place: Place) -> None:
        self.paths = place.rng.sample(place.facts.small, min(place.sizes.lookups, len(place.facts.small)))


class LstatOrder(_Names):
    """lstat of small files in the order of their paths."""

    name = "lstat-order"
    title = "lstat of 5,000 names in path order"

    def prepare(self, place: Place) -> None:
        self.paths = sorted(place.rng.sample(place.facts.small, min(place.sizes.lookups, len(place.facts.small))))


class Negative(_Names):
    """Look-ups of names that don't exist, as those of programs along a search path."""

    name = "negative"
    title = "Negative look-ups of 5,000 names"
    loop = "absent"

    def prepare(self, place: Place) -> None:
        chosen = place.rng.sample(place.facts.small, min(place.sizes.lookups, len(place.facts.small)))
        self.paths = [f"{path}.missing" for path in chosen]


class Deep(_Names):
    """lstat of files below many directories, by their whole paths."""

    name = "deep"
    title = "lstat of files 24 directories deep"
    chains, depth, files = 20, 24, 10

    def furnish(self, tree: Path, sizes: Sizes) -> None:
        for chain in range(sizes.scaled(self.chains)):
            folder = tree / self._folder(chain)
            folder.mkdir(parents=True)
            for number in range(self.files):
                (folder / f"file{number}").write_bytes(b"deep" * number)

    def prepare(self, place: Place) -> None:
        chains = range(place.sizes.scaled(self.chains))
        self.paths = [f"{self._folder(chain)}/file{number}" for number in range(self.files) for chain in chains]
        place.rng.shuffle(self.paths)

    def _folder(self, chain: int) -> str:
        top = f"bench/{self.name}/chain{chain:02d}"
        return "/".join([top, *(f"level{level:02d}" for level in range(3, self.depth))])


class Huge(Workload):
    """A directory of 20,000 entries: its listing, and look-ups in it."""

    name = "huge-directory"
    title = "Directory of 20,000 entries"
    group = Group.LOOKUP
    steps = (
        Step("list", "list, names dropped", Cache.DENTRIES),
        Step("list-again", "list again", Cache.WARM),
        Step("lstat", "lstat of 2,000 random names in it, names dropped", Cache.DENTRIES),
    )
    lookups = 2_000

    def __init__(self) -> None:
        self.paths: list[str] = []

    def prepare(self, place: Place) -> None:
        count = place.sizes.huge_entries
        chosen = place.rng.sample(range(count), min(count, place.sizes.scaled(self.lookups, 100)))
        self.paths = [f"{place.facts.huge}/f{number:06d}" for number in chosen]

    def run(self, place: Place, step: Step) -> Outcome:
        if step.name == "lstat":
            return measure(place, {"loop": "lstat", "paths": self.paths}, names=len(self.paths))
        return measure(place, {"loop": "listing", "paths": [place.facts.huge]}, whole=True)
