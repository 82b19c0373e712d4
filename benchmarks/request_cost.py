"""What a request costs: walking, lstat and open+read+close of many small files, beside ext4 itself."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from benchmarks.figures import Figure, Report
from benchmarks.workspace import CONTENT, Bench, forget_names

ENTRIES = 6_000


def measure(bench: Bench) -> Report:
    """The same work on the mount and on the template's own files, in turns."""
    template = bench.plain_template(bench.scaled(ENTRIES))
    top = os.fspath(template.path)
    names = sorted(
        os.path.relpath(os.path.join(folder, name), top) for folder, _, files in os.walk(top) for name in files
    )
    times: dict[str, list[float]] = {}

    def note(name: str, spent: float, count: int) -> None:
        times.setdefault(name, []).append(spent * 1e6 / count)

    with bench.container(template) as container, container.mounted() as root:
        for _ in range(bench.rounds):
            forget_names(root)
            note("find, names dropped", find(root), bench.scaled(ENTRIES))
            note("find again", find(root), bench.scaled(ENTRIES))
            note("find, ext4", find(template.path), bench.scaled(ENTRIES))
            forget_names(root)
            note("lstat, names dropped", lstat(root, names), len(names))
            note("lstat, ext4", lstat(template.path, names), len(names))
            note("open+read+close", read(root, names), len(names))
            note("open+read+close again", read(root, names), len(names))
            note("open+read+close, ext4", read(template.path, names), len(names))
    return Report(
        "request_cost",
        f"Per entry, on a template of {bench.scaled(ENTRIES):,} entries that the container did not change, one client. "
        "The walk is `find -printf %s`; lstat goes in path order; files of 200 bytes are read with one read(2). The "
        "first reading follows right after lstat, so that the kernel knows names but no contents. ext4: the same on "
        "the template's own folder, its names and contents known to the kernel.",
        [Figure(name, "µs", tuple(values)) for name, values in times.items()],
    )


def find(folder: Path) -> float:
    """Seconds that a walk takes."""
    start = time.perf_counter()
    subprocess.run(["find", str(folder), "-printf", "%s "], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def lstat(folder: Path, names: list[str]) -> float:
    """Seconds that lstat of all takes."""
    paths = [os.path.join(folder, name) for name in names]
    start = time.perf_counter()
    for path in paths:
        os.lstat(path)
    return time.perf_counter() - start


def read(folder: Path, names: list[str]) -> float:
    """Seconds that opening, reading and closing all takes."""
    paths = [os.path.join(folder, name) for name in names]
    total = 0
    start = time.perf_counter()
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        total += len(os.read(file, 4096))
        os.close(file)
    spent = time.perf_counter() - start
    if total != len(CONTENT) * len(names):
        raise RuntimeError(f"{total} bytes read from {len(names)} files")
    return spent
