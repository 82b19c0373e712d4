"""What one more container costs: memory, page cache, descriptors, time and disk."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks import caches
from benchmarks.workload import Cache, Condition, Group, Outcome, Place, Skip, Step, Workload
from benchmarks.workloads.clients import ENVIRONMENT, measure, program
from benchmarks.workloads.lookup import FIND
from benchmarks.workloads.read import sequential

IDLE = (Condition.IDLE,)


class PageCache(Workload):
    """How much the page cache grows when a second container reads what a first one has read."""

    name = "page-cache"
    title = "Page cache added by reading the same 512 MiB"
    group = Group.DENSITY
    conditions = IDLE
    steps = (
        Step("first-container", "by the first container", Cache.ALL, unit="MiB"),
        Step("second-container", "by the second container", Cache.ANY, unit="MiB"),
    )

    def run(self, place: Place, step: Step) -> Outcome:
        reader = place
        if step.name == "second-container":
            reader = place.another()
            caches.drop("3")  # a plain copy's contents are in memory because it was just written
            measure(place, sequential(place), whole=True)
        before = cached_kib()
        read = measure(reader, sequential(place), whole=True)
        grown = max(0.0, (cached_kib() - before) / 1024)
        bytes_ = read.bytes if step.cache is Cache.ALL else 0
        return Outcome(read.seconds, 1, read.proof, bytes=bytes_, value=grown)


class Memory(Workload):
    """Resident memory of the serving processes (proportional share, PSS) and their descriptors."""

    name = "memory"
    title = "Serving processes of a mount"
    group = Group.DENSITY
    conditions = IDLE
    steps = (
        Step("idle", "resident memory (PSS), idle", Cache.ANY, unit="MiB"),
        Step("walked", "resident memory (PSS) after a walk of all entries", Cache.DENTRIES, unit="MiB"),
        Step("descriptors", "descriptors open after it", Cache.ANY, unit="descriptors"),
    )

    def run(self, place: Place, step: Step) -> Outcome:
        if not place.servers:
            raise Skip("the kernel serves it, there is no process")
        begin = time.monotonic()
        proof, names = "", 0
        if step.name == "walked":
            names = place.facts.entries
            proof = measure(place, program([FIND, ".", "-printf", r"%y %s\n"], output="sizes")).proof
        value = float(descriptors(place.servers)) if step.name == "descriptors" else pss_mib(place.servers)
        return Outcome(time.monotonic() - begin, 1, proof, names=names, value=value)


class ManyContainers(Workload):
    """Many containers mounted at once."""

    name = "many-containers"
    title = "50 containers mounted at once"
    group = Group.DENSITY
    conditions = IDLE
    writes = True
    steps = (
        Step("mount", "create and mount, each", Cache.ANY),
        Step("disk", "disk space, each", Cache.ANY, unit="KiB"),
        Step("memory", "resident memory (PSS) of its processes, each", Cache.ANY, unit="MiB"),
        Step("walk", "a walk of a directory of 100 files, each", Cache.ANY),
    )

    def __init__(self) -> None:
        self.containers: list[Place] = []

    def prepare(self, place: Place) -> None:
        self.containers = []
        if not place.kept:
            raise Skip("each container is a whole copy of the template, or can't be written to")

    def run(self, place: Place, step: Step) -> Outcome:
        begin = time.monotonic()
        if step.name == "mount":
            self.containers = [place.another() for _ in range(place.sizes.containers)]
            seconds = time.monotonic() - begin
            listings = {tuple(sorted(os.listdir(container.root))) for container in self.containers}
            return Outcome(seconds, len(self.containers), f"{len(listings)} kinds of roots")
        count = len(self.containers)
        if step.name == "walk":
            folder = place.facts.small[0].rpartition("/")[0]
            walk = program([FIND, folder, "-printf", r"%y %s\n"], output="sizes")
            each = [measure(container, walk) for container in self.containers]
            return Outcome(sum(one.seconds for one in each), count, "; ".join(sorted({one.proof for one in each})))
        if step.name == "disk":
            value = sum(disk_kib(folder) for container in self.containers for folder in container.kept) / count
            return Outcome(time.monotonic() - begin, 1, "", value=value)
        servers = [server for container in self.containers for server in container.servers]
        if not servers:
            raise Skip("the kernel serves it, there is no process")
        return Outcome(time.monotonic() - begin, 1, "", value=pss_mib(servers) / count)


def cached_kib() -> int:
    """Size of the page cache, in KiB."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("Cached", "Buffers"))


def pss_mib(servers: Iterable[int]) -> float:
    """Proportional share of resident memory of processes, in MiB, added up."""
    total = 0
    for server in servers:
        lines = Path(f"/proc/{server}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def descriptors(servers: Iterable[int]) -> int:
    """How many descriptors processes have open."""
    return sum(len(os.listdir(f"/proc/{server}/fd")) for server in servers)


def disk_kib(folder: Path) -> float:
    """Disk space of ``folder`` and all in it, in KiB, as du(1) counts it."""
    done = subprocess.run(["du", "-sk", str(folder)], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[0])
