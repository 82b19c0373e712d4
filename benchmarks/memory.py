"""How much memory a mount takes when its container has been looked through, and whether it gives any back."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.figures import Figure, Report
from benchmarks.workspace import Bench, drop_names_everywhere
from vzfs import Container

TARGET_MIB = 100.0
ENTRIES = 30_000
FILES_PER_FOLDER = 100


def measure(bench: Bench) -> Report:
    """Take a fresh mount through the stages, as many times as there are rounds."""
    entries = bench.scaled(ENTRIES)
    template = bench.plain_template(entries)
    stages: dict[str, list[tuple[float, float]]] = {}
    for _ in range(bench.rounds):
        with bench.container(template) as container, container.mounted() as root:

            def note(stage: str, container: Container = container) -> None:
                stages.setdefault(stage, []).append(resident(container))

            note("fresh mount")
            _expect(walk(root), entries - 1)
            note(f"walked {entries:,} entries")
            _expect(walk(root), entries - 1)
            note("walked again")
            drop_names_everywhere()
            note("names dropped")
            make_files(root / "top01" / "made", entries)
            note(f"{entries:,} files made")
            drop_names_everywhere()
            _expect(walk(root), 2 * entries + entries // FILES_PER_FOLDER)
            note("walked all, template and own")
            drop_names_everywhere()
            note("names dropped again")
    figures = []
    for stage, values in stages.items():
        rss, pss = zip(*values, strict=True)
        figures.append(Figure(f"RSS, {stage}", "MiB", rss, TARGET_MIB))
        figures.append(Figure(f"PSS, {stage}", "MiB", pss))
    return Report(
        "memory",
        "The serving process's resident memory (RSS) and its proportional share (PSS: shared pages divided by their "
        "users), from /proc/PID/smaps_rollup. A walk is lstat of every entry. Files are made through the mount, "
        f"{FILES_PER_FOLDER} in a directory. Names are dropped by /proc/sys/vm/drop_caches = 2, upon which the kernel "
        "sends FORGET.",
        figures,
    )


def resident(container: Container) -> tuple[float, float]:
    """RSS and PSS of the process that serves ``container``, MiB."""
    pid = container.status().pid
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    fields = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines)}
    rss, pss = fields["Rss"] / 1024, fields["Pss"] / 1024
    return rss, pss


def walk(root: Path) -> int:
    """lstat everything below ``root``; gives how many entries there are."""
    count = 0
    folders = [os.fspath(root)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)
                count += 1
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return count


def make_files(folder: Path, files: int) -> None:
    """Make ``files`` files in subdirectories of the new directory ``folder``."""
    for first in range(0, files, FILES_PER_FOLDER):
        inner = folder / f"{first}"
        inner.mkdir(parents=True)
        for number in range(first, min(first + FILES_PER_FOLDER, files)):
            os.close(os.open(inner / f"{number}", os.O_WRONLY | os.O_CREAT, 0o644))


def _expect(found: int, wanted: int) -> None:
    if found < wanted:
        raise RuntimeError(f"the walk found {found} entries, not {wanted}")
