"""The template: a Debian root, or any tree, plus what the workloads read and change, made the same every time.

``bench/small`` (many small files), ``bench/large`` (one large file), ``bench/huge`` (one large directory),
``bench/deep`` (a long path), and whatever the workloads furnish. The scale group has generated templates instead.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.workload import Facts, Shape, Sizes, Workload
from vzfs.errors import SourceError

SUITE = "bookworm"
SEED = 12
SMALL_BYTES = (100, 8_000)
SMALL_PER_DIRECTORY = 100
HUGE_CONTENT = b"sixteen bytes..\n"
DEPTH = 24
CHUNK = 1 << 20
TIME = 1_600_000_000
"""Modification time of what is generated, so that a change is seen in it."""
PROGRAMS = ("bin/sh", "usr/bin/perl", "usr/bin/dpkg")
BLOCK = 4096
DEBIAN_BYTES = 600 << 20
"""What a debootstrapped tree with its packages takes at most, for estimating."""

Say = Callable[[str], None]


def make_template(
    tree: Path, sizes: Sizes, base: str | None, mirror: str, workloads: Iterable[type[Workload]], say: Say
) -> Facts:
    """Make the template in the new folder ``tree``.

    ``base``: a tree to copy, empty for none, None for debootstrap from ``mirror``. Raises ``SourceError``.
    """
    if base:
        say(f"copying {base}")
        _run("cp", "--archive", "--one-file-system", "--no-target-directory", base, str(tree))
    elif base is None:
        say(f"debootstrap {SUITE}")
        packages = "--include=python3-minimal"
        _run("debootstrap", "--variant=minbase", packages, SUITE, str(tree), *([mirror] if mirror else []))
        shutil.rmtree(tree / "var/cache/apt/archives", ignore_errors=True)
    else:
        tree.mkdir(mode=0o755)
    say("making files")
    rng = random.Random(SEED)
    (tree / "bench").mkdir()
    small, small_bytes = _small(tree, sizes, rng)
    _large(tree / "bench/large", sizes, rng)
    _huge(tree / "bench/huge", sizes)
    deep = "bench/deep/" + "/".join(f"level{depth:02d}" for depth in range(DEPTH)) + "/file"
    (tree / deep).parent.mkdir(parents=True)
    (tree / deep).write_bytes(HUGE_CONTENT)
    for workload in workloads:
        workload().furnish(tree, sizes)
    for path in (tree / "bench").iterdir():
        os.utime(path, (TIME, TIME))
    entries, files = count(tree)
    programs = all(os.path.lexists(tree / program) for program in PROGRAMS)
    return Facts(entries, files, small, small_bytes, "bench/large", "bench/huge", deep, programs)


def make_shape(tree: Path, shape: Shape, sizes: Sizes) -> Facts:
    """Make a generated template in the new folder ``tree``: empty files in directories."""
    for directory, files in shape.directories(sizes).items():
        folder = tree / directory
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for number in range(files):
                os.close(os.open(file_name(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=fd))
        finally:
            os.close(fd)
    entries, files = count(tree)
    return Facts(entries, files, (), 0, "", "", "", programs=False)


def file_name(number: int) -> str:
    """Name of a generated directory's file ``number``."""
    return f"f{number:06d}"


def count(tree: Path) -> tuple[int, int]:
    """Entries, the root included, and what of them is no directory."""
    entries, files = 1, 0
    for _, folders, others in os.walk(tree):
        entries += len(folders) + len(others)
        files += len(others)
    return entries, files


def tree_bytes(tree: Path) -> int:
    """Disk space of a tree in bytes, by its blocks."""
    total = 0
    for folder, folders, others in os.walk(tree):
        total += sum(os.lstat(os.path.join(folder, name)).st_blocks * 512 for name in (*folders, *others))
    return total


def template_bytes(sizes: Sizes, base: str | None) -> int:
    """About how much disk space a template takes."""
    own = sizes.large_bytes + (sizes.small_files + sizes.huge_entries + sizes.lookups) * 2 * BLOCK
    if base is None:
        return own + DEBIAN_BYTES
    return own + (tree_bytes(Path(base)) if base else 0)


def _small(tree: Path, sizes: Sizes, rng: random.Random) -> tuple[tuple[str, ...], int]:
    paths, total = [], 0
    for number in range(sizes.small_files):
        path = f"bench/small/d{number // SMALL_PER_DIRECTORY:03d}/f{number:05d}"
        if number % SMALL_PER_DIRECTORY == 0:
            (tree / path).parent.mkdir(parents=True)
        content = rng.randbytes(rng.randint(*SMALL_BYTES))
        _write(tree / path, content)
        paths.append(path)
        total += len(content)
    return tuple(paths), total


def _large(path: Path, sizes: Sizes, rng: random.Random) -> None:
    with path.open("wb") as file:
        for start in range(0, sizes.large_bytes, CHUNK):
            file.write(rng.randbytes(min(CHUNK, sizes.large_bytes - start)))


def _huge(folder: Path, sizes: Sizes) -> None:
    folder.mkdir()
    for number in range(sizes.huge_entries):
        _write(folder / file_name(number), HUGE_CONTENT)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.utime(path, (TIME, TIME))


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except FileNotFoundError as error:
        raise SourceError(f"{command[0]} is not installed", remedy=f"apt-get install {command[0]}") from error
    if done.returncode != 0:
        last = "\n".join(done.stdout.splitlines()[-5:])
        raise SourceError(f"{command[0]} failed: {last}", remedy="give a tree that is there already: --tree DIR")
