"""What the first change in a template directory costs: unfolding it, with and without the link farm."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.figures import Figure, Report
from benchmarks.workspace import Bench
from vzfs import Template

TARGET_MS = 200.0
TARGET_FILES = 5_000
FILES = (100, 1_000, 5_000)
SYNC_POLICIES = ("data", "none")
LONG = "/".join(f"a-directory-with-a-rather-long-name-{depth}" for depth in range(4))
"""Above this, link texts are longer than what an inode holds (59 bytes on ext4), so that a fresh link takes a block."""


def measure(bench: Bench) -> Report:
    """Create one file in a folded directory, which each case and round has for itself."""
    tree = {f"{LONG}/{files}-{turn}": bench.scaled(files) for files in FILES for turn in range(bench.rounds)}
    farm = bench.template("with-farm", tree)
    bare = bench.template("without-farm", tree)
    shutil.rmtree(farm_of(bare))
    cases = [(template, files, sync) for files in FILES for template in (farm, bare) for sync in SYNC_POLICIES]
    times: dict[tuple[str, int, str], list[float]] = {
        (template.name, files, sync): [] for template, files, sync in cases
    }
    with ExitStack() as stack:
        roots = {}
        for template in (farm, bare):
            for sync in SYNC_POLICIES:
                container = stack.enter_context(bench.container(template))
                roots[template.name, sync] = stack.enter_context(container.mounted(sync=sync))
        for turn in range(bench.rounds):
            for template, files, sync in cases:
                folder = roots[template.name, sync] / LONG / f"{files}-{turn}"
                times[template.name, files, sync].append(first_write(folder))
                listed = len(os.listdir(folder))
                if listed != bench.scaled(files) + 1:
                    raise RuntimeError(f"{folder} has {listed} entries after the first write")
    figures = [
        Figure(
            f"directory of {bench.scaled(files):,} entries, {template.name.replace('-', ' ')}, sync {sync}",
            "ms",
            tuple(times[template.name, files, sync]),
            TARGET_MS if files == TARGET_FILES and template is farm and sync == "data" else None,
        )
        for template, files, sync in cases
    ]
    return Report(
        "first_write",
        f"open(O_CREAT) of a new file in an unchanged template directory, whose path is {len(LONG)} bytes long. `sync "
        "data` is the default: the new directory is flushed to the disk before it is used.",
        figures,
    )


def farm_of(template: Template) -> Path:
    """Where a template's prepared links are."""
    return template.store.layout.template(template.name).links


def first_write(folder: Path) -> float:
    """Milliseconds to create a file in ``folder``."""
    start = time.perf_counter()
    os.close(os.open(folder / "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    return (time.perf_counter() - start) * 1e3
