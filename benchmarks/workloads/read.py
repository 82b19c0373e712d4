"""Reading files."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from typing import ClassVar

from benchmarks.workload import Cache, Group, Outcome, Place, Skip, Step, Workload
from benchmarks.workloads.client import BLOCK, Order
from benchmarks.workloads.clients import ENVIRONMENT, measure, shares

CLIENTS = (1, 2, 4)
LARGE = "bench/large"
RANDOM_READS = 20_000


def sequential(place: Place, client: int = 0) -> Order:
    """An order to read the client's part of the large file, in whole blocks."""
    part = -(-place.sizes.large_bytes // place.clients // BLOCK) * BLOCK
    return {"loop": "sequential_read", "path": place.facts.large, "offset": client * part, "size": part}


class SmallFiles(Workload):
    """open, read and close of small files."""

    name = "small-files"
    title = "open + read + close of 5,000 small files"
    group = Group.READ
    steps = (
        Step("first", "names dropped, contents cached below", Cache.DENTRIES),
        Step("again", "again", Cache.WARM),
        Step("disk", "everything dropped", Cache.ALL),
    )
    clients = CLIENTS

    def __init__(self) -> None:
        self.paths: Sequence[str] = ()

    def prepare(self, place: Place) -> None:
        self.paths = place.rng.sample(place.facts.small, min(place.sizes.lookups, len(place.facts.small)))
        # Where they are stored, so that the first step's contents come from memory, but not by way of the mount.
        for path in self.paths:
            (place.stored / path).read_bytes()

    def run(self, place: Place, step: Step) -> Outcome:
        return measure(place, shares(place, "read_files", self.paths), names=len(self.paths))


class _Large(Workload):
    """Something with the large file."""

    group = Group.READ
    steps: ClassVar[tuple[Step, ...]] = (
        Step("first", "first, file cached below", Cache.BACKING, files=(LARGE,), throughput=True),
        Step("again", "again", Cache.WARM, throughput=True),
    )
    loop: ClassVar[str]

    def run(self, place: Place, step: Step) -> Outcome:
        return measure(place, [self.order(place, client) for client in range(place.clients)], whole=True)

    def order(self, place: Place, client: int) -> Order:
        """What client number ``client`` does."""
        return {"loop": self.loop, "path": place.facts.large}


class SequentialRead(_Large):
    """The large file from start to end."""

    name = "sequential-read"
    title = "Sequential read of 512 MiB"
    loop = "sequential_read"
    steps = (*_Large.steps, Step("disk", "from disk", Cache.ALL, throughput=True))
    clients = (1, 4)

    def order(self, place: Place, client: int) -> Order:
        return sequential(place, client)


class MmapTouch(_Large):
    """A byte of every page of the large file, mapped."""

    name = "mmap-touch"
    title = "mmap of 512 MiB, one byte of each page"
    loop = "mmap_touch"


class RandomRead(_Large):
    """Pages of the large file in random order."""

    name = "random-read"
    title = "Random reads of 4 KiB (pread)"
    loop = "random_read"
    clients = CLIENTS

    def __init__(self) -> None:
        self.seed = 0.0

    def prepare(self, place: Place) -> None:
        self.seed = place.rng.random()

    def run(self, place: Place, step: Step) -> Outcome:
        count = place.sizes.scaled(RANDOM_READS, 500) // place.clients
        orders = [
            {"loop": self.loop, "path": place.facts.large, "seed": self.seed + client, "count": count}
            for client in range(place.clients)
        ]
        return measure(place, orders)


class FioRandomRead(Workload):
    """The same by fio, whose figures readers know."""

    name = "fio-random-read"
    title = "Random reads of 4 KiB (fio, psync)"
    group = Group.READ
    steps = (Step("first", "first, file cached below", Cache.BACKING, files=(LARGE,), throughput=True),)

    def prepare(self, place: Place) -> None:
        if shutil.which("fio") is None:
            raise Skip("fio is not installed: apt-get install fio")

    def run(self, place: Place, step: Step) -> Outcome:
        reads = place.sizes.scaled(RANDOM_READS, 500) // place.clients
        command = [
            "fio",
            "--name=random-read",
            f"--filename={place.root / place.facts.large}",
            "--rw=randread",
            "--bs=4k",
            "--ioengine=psync",
            "--readonly",
            "--invalidate=0",  # fio's fadvise would drop the cache of one system and not another's
            "--norandommap",
            "--randseed=1",
            "--allow_file_create=0",
            "--fadvise_hint=0",
            f"--number_ios={reads}",
            f"--size={place.sizes.large_bytes}",
            f"--numjobs={place.clients}",
            "--group_reporting",
            "--thread",
            "--output-format=json",
        ]
        done = subprocess.run(
            command, cwd=place.scratch, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=300
        )
        read = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]
        latency = read["clat_ns"]
        return Outcome(
            seconds=read["total_ios"] / read["iops"],
            operations=read["total_ios"],
            proof=f"{read['total_ios']} reads of {read['io_bytes']} bytes",
            bytes=read["io_bytes"],
            extra=tuple(
                (f"{name} ns", float(latency["percentile"][key]))
                for name, key in (("p50", "50.000000"), ("p99", "99.000000"), ("p99.9", "99.900000"))
            ),
        )
