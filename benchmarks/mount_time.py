"""How long a container's root takes to become usable, and where the time goes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.figures import Figure, Report
from benchmarks.workspace import Bench

TARGET_MS = 500.0
ENTRIES = 20_000
SHOWN_PACKAGES = 6
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \| +(\S+)")


def measure(bench: Bench) -> Report:
    """Mount and unmount by command and by API in turns, and start the interpreters that this takes alone."""
    template = bench.plain_template(bench.scaled(ENTRIES))
    python = [sys.executable]
    parts = {
        "python alone": [*python, "-c", "pass"],
        "vzfs --version": [*python, "-m", "vzfs", "--version"],
        "imports of the serving process": [*python, "-c", "import vzfs.fuse.serve"],
    }
    times: dict[str, list[float]] = {name: [] for name in ("command", "api", "umount", *parts)}
    with bench.container(template) as container:
        command = [*python, "-m", "vzfs", "--root", str(bench.store.root)]
        subprocess.run([*command, "status"], stdout=subprocess.DEVNULL, check=True)
        container.mount()  # once, so that all modules are compiled
        container.umount()
        for _ in range(bench.rounds):
            start = time.perf_counter()
            done = subprocess.run([*command, "mount", container.ct], stdout=subprocess.PIPE, check=True, text=True)
            _use(Path(done.stdout.strip()))
            times["command"].append(time.perf_counter() - start)
            start = time.perf_counter()
            container.umount()
            times["umount"].append(time.perf_counter() - start)
            start = time.perf_counter()
            _use(container.mount())
            times["api"].append(time.perf_counter() - start)
            container.umount()
            for name, part in parts.items():
                start = time.perf_counter()
                subprocess.run(part, stdout=subprocess.DEVNULL, check=True)
                times[name].append(time.perf_counter() - start)
    figures = [
        Figure("vzfs mount, until the root is listed", "ms", _ms(times["command"]), TARGET_MS),
        Figure("Container.mount, until the root is listed", "ms", _ms(times["api"]), TARGET_MS),
        Figure("Container.umount, until the serving process has ended", "ms", _ms(times["umount"])),
        *(Figure(f"{name}, a process", "ms", _ms(times[name])) for name in parts),
        *_imports(bench.rounds),
    ]
    return Report(
        "mount_time",
        "Starting from the command (a new interpreter) and from a running process, on a template of "
        f"{bench.scaled(ENTRIES):,} entries; Python's modules are compiled and in the page cache. Below: what the "
        "parts take alone, and the packages that take longest to import in the serving process (as `python -X "
        "importtime` says, which makes all slower).",
        figures,
    )


def _use(root: Path) -> None:
    if not os.listdir(root):
        raise RuntimeError(f"{root} is empty")


def _ms(seconds: list[float]) -> tuple[float, ...]:
    return tuple(value * 1e3 for value in seconds)


def _imports(rounds: int) -> list[Figure]:
    """Time spent in each package's own modules when the serving process starts."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", "import vzfs.fuse.serve"],
            capture_output=True,
            check=True,
            text=True,
        )
        spent: Counter[str] = Counter()
        for microseconds, module in _IMPORT.findall(done.stderr):
            spent[module.partition(".")[0]] += int(microseconds)
        for package, microseconds in spent.items():
            found.setdefault(package, []).append(microseconds / 1e3)
    longest = sorted(found, key=lambda package: -sum(found[package]))[:SHOWN_PACKAGES]
    return [Figure(f"importing {package}", "ms", tuple(found[package])) for package in longest]
