"""Changing things: what a container writes for the first time, and its own files."""

from __future__ import annotations

import random
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from benchmarks.workload import Cache, Condition, Group, Outcome, Place, Sizes, Step, Workload
from benchmarks.workloads.clients import latencies, measure, program, started

LARGE = "bench/large"
MIB = 1 << 20
IDLE = (Condition.IDLE,)


class FirstWriteSmall(Workload):
    """The first bytes of small template files; fsync before close makes all systems equally durable."""

    name = "first-write-small"
    title = "First write to 500 small template files"
    group = Group.WRITE
    writes = True
    steps = (
        Step("durable", "files of few directories, fsync", Cache.FRESH),
        Step("spread", "half as many files of many directories, fsync", Cache.FRESH),
        Step("plain", "half as many files of few directories, each system's own durability", Cache.FRESH),
    )

    def __init__(self) -> None:
        self.paths: dict[str, list[str]] = {}

    def prepare(self, place: Place) -> None:
        folders: dict[str, list[str]] = defaultdict(list)
        for path in place.facts.small:
            folders[path.rpartition("/")[0]].append(path)
        order = place.rng.sample(sorted(folders), len(folders))
        count = min(place.sizes.copy_ups, len(place.facts.small) // 4)
        near = [path for folder in order for path in folders[folder]]
        self.paths = {
            "durable": near[:count],
            "plain": near[count : count + count // 2],
            "spread": place.rng.sample(near[2 * count :], count // 2),
        }

    def run(self, place: Place, step: Step) -> Outcome:
        order = {"loop": "first_write", "paths": self.paths[step.name], "fsync": step.name != "plain"}
        return measure(place, order)


class CopyUpBySize(Workload):
    """First writes to template files of different sizes."""

    name = "copy-up"
    title = "First write to a template file, by size (fsync)"
    group = Group.WRITE
    writes = True
    conditions = IDLE
    sizes = (("4k", 4 << 10, 20), ("64k", 64 << 10, 20), ("1m", MIB, 10), ("16m", 16 * MIB, 3))
    steps = tuple(Step(name, f"{bytes_ // 1024:,} KiB", Cache.FRESH) for name, bytes_, _ in sizes)

    def furnish(self, tree: Path, sizes: Sizes) -> None:
        content = random.Random(2)
        for name, size, count in self._scaled(sizes):
            folder = tree / f"bench/{self.name}/{name}"
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"file{number}").write_bytes(content.randbytes(size))

    def run(self, place: Place, step: Step) -> Outcome:
        (count,) = (count for name, _, count in self._scaled(place.sizes) if name == step.name)
        paths = [f"bench/{self.name}/{step.name}/file{number}" for number in range(count)]
        return measure(place, {"loop": "first_write", "paths": paths, "fsync": True})

    def _scaled(self, sizes: Sizes) -> list[tuple[str, int, int]]:
        if sizes.quick:
            return [(name, min(size, MIB), 2) for name, size, _ in self.sizes]
        return list(self.sizes)


class FirstWriteLarge(Workload):
    """The first byte of the large file, beside cp(1) of it on the disk's own file system."""

    name = "first-write-large"
    title = "First write to a 512 MiB template file (fsync)"
    group = Group.WRITE
    writes = True
    conditions = IDLE
    steps = (
        Step("cp", "for comparison: cp and sync of the stored file, beside the mount", Cache.BACKING, files=(LARGE,)),
        Step("write", "write through the mount", Cache.BACKING, files=(LARGE,)),
    )

    def run(self, place: Place, step: Step) -> Outcome:
        if step.name == "write":
            done = measure(place, {"loop": "first_write", "paths": [place.facts.large], "fsync": True})
            return replace(done, bytes=place.sizes.large_bytes)
        copy = place.scratch / "copy"
        commands = ["/bin/cp", str(place.stored / place.facts.large), str(copy)], ["/bin/sync", str(copy)]
        done = measure(place, program(*commands), whole=True)
        size = copy.stat().st_size
        copy.unlink()
        return replace(done, bytes=size, proof=f"{size} bytes copied")


class ChmodLarge(Workload):
    """chmod of the large file: it must not be copied for that."""

    name = "chmod-large"
    title = "chmod of a 512 MiB template file"
    group = Group.WRITE
    writes = True
    steps = (
        Step("beside", "for comparison: create a file beside it, the first change in its directory", Cache.FRESH),
        Step("first", "chmod, first change of the file", Cache.ANY),
        Step("again", "again", Cache.ANY),
    )

    def run(self, place: Place, step: Step) -> Outcome:
        if step.name == "beside":
            return measure(place, {"loop": "create", "paths": ["bench/new"]})
        mode = 0o600 if step.name == "first" else 0o640
        return measure(place, {"loop": "chmod", "paths": [place.facts.large], "mode": mode})


class Files(Workload):
    """Empty files in directories of the container."""

    name = "files"
    title = "Create, rename and unlink 5,000 files"
    group = Group.WRITE
    writes = True
    steps = (
        Step("create", "create", Cache.FRESH),
        Step("rename", "rename", Cache.ANY),
        Step("unlink", "unlink", Cache.ANY),
    )
    folders = 10

    def __init__(self) -> None:
        self.first: Sequence[str] = ()
        self.second: Sequence[str] = ()

    def prepare(self, place: Place) -> None:
        for folder in range(self.folders):
            (place.root / f"bench/new{folder}").mkdir()
        numbers = range(place.sizes.lookups)
        self.first = [f"bench/new{number % self.folders}/file{number}" for number in numbers]
        self.second = [f"bench/new{number % self.folders}/renamed{number}" for number in numbers]

    def run(self, place: Place, step: Step) -> Outcome:
        if step.name == "rename":
            return measure(place, {"loop": "rename", "paths": self.first, "targets": self.second})
        return measure(place, {"loop": step.name, "paths": self.first if step.name == "create" else self.second})


class Tar(Workload):
    """tar(1) extracting an archive that lies outside of the mount, and rm -rf of what came out."""

    name = "tar"
    title = "tar extraction of 5,000 files, rm -rf of them"
    group = Group.WRITE
    writes = True
    steps = (
        Step("extract", "tar -x", Cache.FRESH),
        Step("remove", "rm -rf", Cache.ANY),
    )
    per_folder = 50
    archive = "bench/tar/archive.tar"

    def furnish(self, tree: Path, sizes: Sizes) -> None:
        path = tree / self.archive
        path.parent.mkdir(parents=True)
        rng = random.Random(3)
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
            for number in range(sizes.lookups):
                content = rng.randbytes(rng.randrange(100, 8_000))
                folder, file = divmod(number, self.per_folder)
                member = tarfile.TarInfo(f"made/folder{folder:03d}/file{file:02d}")
                member.size, member.mtime = len(content), 1_600_000_000
                archive.addfile(member, BytesIO(content))

    def prepare(self, place: Place) -> None:
        (place.stored / self.archive).read_bytes()

    def run(self, place: Place, step: Step) -> Outcome:
        made = place.root / "bench/new/made"
        if step.name == "remove":
            done = measure(place, program(["/bin/rm", "-rf", "bench/new"]), whole=True)
            return replace(done, operations=place.sizes.lookups, proof=f"exists: {made.parent.exists()}")
        made.parent.mkdir()
        archive = str(place.stored / self.archive)
        done = measure(place, program(["/bin/tar", "-C", "bench/new", "-xf", archive]), whole=True)
        files = [path for path in sorted(made.rglob("*")) if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        return replace(done, operations=len(files), bytes=size, proof=f"{len(files)} files of {size} bytes")


class RemoveTemplate(Workload):
    """rm -rf of a directory that came with the template."""

    name = "remove-template"
    title = "rm -rf of a template directory of 2,000 files"
    group = Group.WRITE
    writes = True
    steps = (Step("remove", "rm -rf", Cache.FRESH),)
    folder = "bench/remove-template"
    folders, files = 20, 100

    def furnish(self, tree: Path, sizes: Sizes) -> None:
        rng = random.Random(4)
        for number in range(sizes.scaled(self.folders, 2)):
            folder = tree / f"{self.folder}/folder{number:02d}"
            folder.mkdir(parents=True)
            for file in range(self.files):
                (folder / f"file{file:02d}").write_bytes(rng.randbytes(rng.randrange(100, 2_000)))

    def run(self, place: Place, step: Step) -> Outcome:
        done = measure(place, program(["/bin/rm", "-rf", self.folder]), whole=True)
        exists = (place.root / self.folder).exists()
        entries = place.sizes.scaled(self.folders, 2) * (self.files + 1) + 1
        return replace(done, operations=entries, proof=f"exists: {exists}")


class SequentialWrite(Workload):
    """A large new file."""

    name = "sequential-write"
    title = "Sequential write into a new file"
    group = Group.WRITE
    writes = True
    steps = (
        Step("write", "1 GiB, as far as the page cache", Cache.FRESH, throughput=True),
        Step("durable", "256 MiB, fsync included", Cache.ANY, throughput=True),
    )

    def run(self, place: Place, step: Step) -> Outcome:
        durable = step.name == "durable"
        size = place.sizes.new_file_bytes // (4 if durable else 1)
        path = place.root / "bench" / f"new-{step.name}"
        order = {"loop": "sequential_write", "path": str(path), "size": size, "fsync": durable}
        done = measure(place, order, whole=True)
        path.unlink()  # before it is written to the disk in the background of the next step
        return done


class FsyncRate(Workload):
    """Appending a page and making it durable."""

    name = "fsync"
    title = "Append 4 KiB and fsync"
    group = Group.WRITE
    writes = True
    steps = (Step("append", "into a new file", Cache.FRESH),)
    appends = 200

    def run(self, place: Place, step: Step) -> Outcome:
        count = place.sizes.scaled(self.appends, 20)
        return measure(place, {"loop": "append_sync", "path": "bench/new-log", "count": count})


class LookupsDuringCopy(Workload):
    """What others wait while a large file is copied up: one lstat of a new name every 0.2 ms."""

    name = "look-ups-during-copy"
    title = "Look-ups of another process during the first write to a 512 MiB template file"
    group = Group.WRITE
    writes = True
    conditions = IDLE
    steps = (Step("p99", "99th percentile", Cache.BACKING, unit="µs", files=(LARGE,)),)
    pause = 0.000_2
    least = 100

    def run(self, place: Place, step: Step) -> Outcome:
        paths = place.rng.sample(place.facts.small, len(place.facts.small))
        root = str(place.root)
        copy = {"loop": "first_write", "root": root, "paths": [place.facts.large], "fsync": True}
        looking = {"loop": "paced_lstat", "root": root, "paths": paths, "pause": self.pause, "least": self.least}
        with started([copy, looking]) as (writer, reader):
            reader.go()
            writer.go()
            written = writer.answer()
            reader.go()
            looked = reader.answer()
        waited = latencies(looked)[1::2]
        p99 = sorted(waited)[min(len(waited) - 1, len(waited) * 99 // 100)] / 1e3
        return Outcome(
            seconds=(looked["end"] - looked["start"]) / 1e9,
            operations=len(waited),
            proof=f"{written['proof']}; {looked['proof']}",
            latencies_ns=waited,
            value=p99,
            extra=(("longest µs", max(waited) / 1e3), ("copy ms", (written["end"] - written["start"]) / 1e6)),
        )
