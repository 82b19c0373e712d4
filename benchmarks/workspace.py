"""Where measurements happen: a scratch folder with a store, templates of any shape, mounts that are always taken away.

Rule: nothing outside the scratch folder is changed, and it is gone at the end, however the measurement ends.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import Any

import vzfs
from vzfs import Container, Store, Template
from vzfs.fuse.mount import mount_table

TOP_DIRECTORIES = 20
"""Entries of a generated template's root: as many as a Debian root has."""
FILES_PER_DIRECTORY = 40
QUICK_LEAST = 12
CONTENT = b"x" * 200
TIME = 1_600_000_000

Tree = dict[str, int]
"""Directories of a template to generate: path to number of files in it."""


def plain_tree(entries: int) -> Tree:
    """A tree of ``entries`` entries, the root included, in directories of files two levels deep."""
    tree: Tree = {f"top{number:02d}": 0 for number in range(TOP_DIRECTORIES)}
    left = entries - 1 - len(tree)
    number = 0
    while left > 1:
        files = min(FILES_PER_DIRECTORY, left - 1)
        tree[f"top{number % TOP_DIRECTORIES:02d}/d{number:05d}"] = files
        left -= files + 1
        number += 1
    tree["top00"] += left
    return tree


def file_name(number: int) -> str:
    """Name of a generated directory's file ``number``."""
    return f"f{number:06d}"


def write_archive(path: Path, tree: Tree) -> None:
    """Write ``tree`` as a tar archive, from which a template is made faster than from a directory."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        made = set()
        for directory, files in tree.items():
            parts = directory.split("/")
            for depth in range(1, len(parts) + 1):
                ancestor = "/".join(parts[:depth])
                if ancestor not in made:
                    made.add(ancestor)
                    archive.addfile(_member(ancestor, tarfile.DIRTYPE, 0o755))
            for number in range(files):
                archive.addfile(_member(f"{directory}/{file_name(number)}", tarfile.REGTYPE, 0o644), BytesIO(CONTENT))


def _member(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.mtime = kind, mode, TIME
    member.size = len(CONTENT) if kind == tarfile.REGTYPE else 0
    return member


@dataclass(frozen=True, slots=True)
class Bench:
    """What a measurement gets: ``rounds`` to do, ``quick`` to do as little as shows that it works."""

    folder: Path
    store: Store
    rounds: int
    quick: bool = False

    def scaled(self, count: int) -> int:
        """``count`` entries, or a twentieth of it when quick."""
        return max(QUICK_LEAST, count // 20) if self.quick else count

    def template(self, name: str, tree: Tree) -> Template:
        """The template ``name`` of shape ``tree``, made at its first use."""
        if name in (template.name for template in self.store.templates()):
            return self.store.template(name)
        self.say(f"making template {name}")
        archive = self.folder / f"{name}.tar"
        try:
            write_archive(archive, tree)
            return self.store.create_template(name, str(archive))
        finally:
            archive.unlink(missing_ok=True)

    def plain_template(self, entries: int) -> Template:
        """A template of ``entries`` entries (see ``plain_tree``)."""
        return self.template(f"plain-{entries}", plain_tree(max(entries, TOP_DIRECTORIES + 1)))

    @contextlib.contextmanager
    def container(self, template: Template) -> Iterator[Container]:
        """A container that is destroyed afterwards."""
        used = [int(container.alias) for container in self.store.containers()]
        container = self.store.create(max(used, default=100) + 1, template=template.name)
        try:
            yield container
        finally:
            unmount_below(self.folder / "store" / "root" / container.alias)
            container.destroy()

    def say(self, text: str) -> None:
        """Tell people what is going on, on standard error."""
        print(f"  … {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def bench(scratch: str, *, rounds: int, quick: bool) -> Iterator[Bench]:
    """A fresh store in a new folder below ``scratch``; SIGTERM and SIGHUP end the measurement, but not the cleaning."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    folder = Path(tempfile.mkdtemp(prefix="vzfs-bench-", dir=scratch))
    _set_up_python(folder)
    try:
        yield Bench(folder, Store(folder / "store"), rounds, quick)
    finally:
        unmount_below(folder)
        shutil.rmtree(folder)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _set_up_python(folder: Path) -> None:
    """Let processes that are started use this checkout and compiled modules, as an installed vzfs does."""
    os.environ["PYTHONPATH"] = str(Path(vzfs.__file__).parents[1])
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "pycache")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def unmount_below(folder: Path) -> None:
    """Unmount everything at or below ``folder`` and wait until its servers have let go of it."""
    inside = str(folder) + "/"
    places = [entry.mountpoint for entry in mount_table() if (entry.mountpoint + "/").startswith(inside)]
    for place in sorted(places, reverse=True):
        if subprocess.run(["umount", place], stderr=subprocess.DEVNULL, check=False).returncode != 0:
            subprocess.run(["umount", "--lazy", place], check=False)
    end = time.monotonic() + 10
    while time.monotonic() < end and any(_serves(pid, str(folder)) for pid in os.listdir("/proc") if pid.isdecimal()):
        time.sleep(0.02)


def _serves(pid: str, folder: str) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return False
    return "vzfs.fuse.serve" in command and f'"{folder}/' in command


def forget_names(path: Path) -> None:
    """Make the kernel forget the unused names and inodes of the mount that holds ``path``.

    Remounting does so (``shrink_dcache_sb`` in fs/super.c), for this file system only.
    """
    while not os.path.ismount(path):
        path = path.parent
    subprocess.run(["mount", "-i", "-o", "remount", str(path)], check=True)


def drop_names_everywhere() -> None:
    """Make the kernel forget unused names and inodes of all file systems; file contents stay cached."""
    Path("/proc/sys/vm/drop_caches").write_text("2")


def machine(scratch: Path) -> dict[str, Any]:
    """What a reader needs to know to judge figures: the machine, the versions, the load."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    file_system = subprocess.run(
        ["findmnt", "-n", "-o", "FSTYPE", "--target", str(scratch)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "memory_mib": memory_kib // 1024,
        "file_system": file_system,
        "python": platform.python_version(),
        "pyfuse3": version("pyfuse3"),
        "trio": version("trio"),
        "load": round(os.getloadavg()[0], 2),
    }
