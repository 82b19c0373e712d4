"""What a container costs before it is used: time and disk space of ``create``, for templates of different sizes."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from benchmarks.figures import Figure, Report
from benchmarks.workspace import Bench

TARGET_MS = 10.0
TARGET_KIB = 64.0
ENTRIES = (1_000, 20_000, 200_000)
CREATIONS_PER_ROUND = 5


def measure(bench: Bench) -> Report:
    """Create containers from templates of each size in turns."""
    templates = {entries: bench.plain_template(bench.scaled(entries)) for entries in ENTRIES}
    times: dict[int, list[float]] = {entries: [] for entries in ENTRIES}
    sizes: dict[int, list[float]] = {entries: [] for entries in ENTRIES}
    inodes: dict[int, list[float]] = {entries: [] for entries in ENTRIES}
    for _ in range(bench.rounds):
        for entries, template in templates.items():
            taken = []
            for number in range(1, CREATIONS_PER_ROUND + 1):
                start = time.perf_counter()
                container = bench.store.create(number, template=template.name)
                taken.append((time.perf_counter() - start) * 1e3)
                kib, own = usage(container.path)
                container.destroy()
            times[entries].append(sorted(taken)[len(taken) // 2])
            sizes[entries].append(kib)
            inodes[entries].append(own)
    figures = []
    for entries in ENTRIES:
        size = f"template of {bench.scaled(entries):,} entries"
        figures.append(Figure(f"create, {size}", "ms", tuple(times[entries]), TARGET_MS))
        figures.append(Figure(f"disk, {size}", "KiB", tuple(sizes[entries]), TARGET_KIB))
        figures.append(Figure(f"inodes of its own, {size}", "inodes", tuple(inodes[entries])))
    return Report(
        "container_creation",
        f"`Store.create` inside a running process, {CREATIONS_PER_ROUND} times a round (the round's value is their "
        "median). Disk: the blocks of everything in the container's directory, as du(1) counts them. Inodes: those "
        "that it does not share with the template's link farm.",
        figures,
    )


def usage(folder: Path) -> tuple[float, float]:
    """Disk space in KiB of ``folder`` and all in it, and how many inodes it does not share."""
    blocks = inodes = 0
    for directory, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(directory, name))]
        for path in (directory, *(os.path.join(directory, name) for name in files + links)):
            info = os.lstat(path)
            shared = info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode)
            blocks += 0 if shared else info.st_blocks
            inodes += 0 if shared else 1
    return blocks / 2, float(inodes)
