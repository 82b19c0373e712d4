"""Whether a look-up costs more in larger directories or larger templates."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figure, Report
from benchmarks.workspace import TOP_DIRECTORIES, Bench, file_name, forget_names, plain_tree
from vzfs import Container
from vzfs.store.layout import PRIVATE_AREA
from vzfs.tree.node import ROOT_NUMBER
from vzfs.tree.tree import Tree

TARGET_GROWTH = 1.25
"""How much more it may cost in the largest than in the smallest: as much as two runs of the same differ."""
DIRECTORIES = (10, 1_000, 100_000)
TEMPLATES = (1_000, 20_000, 200_000)
BATCH = 10
"""Look-ups after each dropping of names: as many as the smallest directory has files."""
BATCHES = 40


@dataclass(frozen=True, slots=True)
class Case:
    """A directory with ``files`` files: a path below the root of a container, and where it or its template lies."""

    kind: str
    what: str
    container: Container
    path: str
    files: int
    stored: Path


def measure(bench: Bench) -> Report:
    """Look up random names in all directories in turns, through a mount and in the tree of nodes alone."""
    rng = random.Random(1)
    with ExitStack() as stack:
        cases = list(_cases(bench, stack))
        alone = {id(case): [_in_tree(bench, case, rng) for _ in range(bench.rounds)] for case in cases}
        stored: dict[int, list[float]] = {id(case): [] for case in cases}
        containers = {case.container.path: case.container for case in cases}
        roots = {path: stack.enter_context(container.mounted()) for path, container in containers.items()}
        mounted: dict[int, list[float]] = {id(case): [] for case in cases}
        warm = []
        for _ in range(bench.rounds):
            for case in cases:
                mounted[id(case)].append(_lstat(roots[case.container.path] / case.path, case, rng, forget=True))
                stored[id(case)].append(_lstat(case.stored, case, rng, forget=False))
            warm.append(_lstat(roots[cases[0].container.path] / cases[0].path, cases[0], rng, forget=False))
    figures = []
    for case in cases:
        figures.append(Figure(f"{case.kind}, {case.what}: mount", "µs", tuple(mounted[id(case)])))
        figures.append(Figure(f"{case.kind}, {case.what}: tree alone", "µs", tuple(alone[id(case)])))
        figures.append(Figure(f"{case.kind}, {case.what}: as stored", "µs", tuple(stored[id(case)])))
    for kind in dict.fromkeys(case.kind for case in cases):
        first, *_, last = [case for case in cases if case.kind == kind]
        for name, values, target in (
            ("mount", mounted, TARGET_GROWTH),
            ("tree alone", alone, None),
            ("as stored", stored, None),
        ):
            growth = tuple(large / small for small, large in zip(values[id(first)], values[id(last)], strict=True))
            figures.append(Figure(f"{kind}, largest to smallest: {name}", "times", growth, target))
    figures.append(Figure("control: names known to the kernel", "µs", tuple(warm)))
    return Report(
        "lookup_cost",
        "lstat of random names in an open directory; the kernel's names are dropped after every "
        f"{BATCH}. *Folded*: a directory of the template as it is; *unfolded*: one with a file made in it; *private*: "
        "made by the container. *Tree alone*: the same look-ups as calls of `Tree.lookup`, without kernel, engine and "
        "process switches. *As stored*: lstat of as many names in the directory of the template or the private area "
        "itself, names known; it grows because inodes are spread over more memory than a processor's caches hold. Each "
        f"value is the mean over {BATCH * BATCHES} look-ups.",
        figures,
    )


def _cases(bench: Bench, stack: ExitStack) -> Iterator[Case]:
    def container(template_entries: int, directories: dict[str, int]) -> Container:
        fill = plain_tree(max(TOP_DIRECTORIES + 1, template_entries - sum(directories.values()) - len(directories)))
        template = bench.template(f"lookup-{template_entries}", fill | directories)
        return stack.enter_context(bench.container(template))

    sized = {f"size-{files}": bench.scaled(files) if files > BATCH else files for files in DIRECTORIES}
    large = container(bench.scaled(TEMPLATES[-1]), sized)
    for path, count in sized.items():
        yield Case("folded", f"directory of {count:,}", large, path, count, _template_folder(large) / path)
    for entries in TEMPLATES[:-1]:
        small = container(bench.scaled(entries), {"size-10": 10})
        what = f"template of {bench.scaled(entries):,}"
        yield Case("folded in template", what, small, "size-10", 10, _template_folder(small) / "size-10")
    what = f"template of {bench.scaled(TEMPLATES[-1]):,}"
    yield Case("folded in template", what, large, "size-10", 10, _template_folder(large) / "size-10")

    unfolded = stack.enter_context(bench.container(bench.store.template(f"lookup-{bench.scaled(TEMPLATES[-1])}")))
    with unfolded.mounted() as root:
        for path in sized:
            os.close(os.open(root / path / "new", os.O_WRONLY | os.O_CREAT, 0o644))
    for path, count in sized.items():
        yield Case("unfolded", f"directory of {count:,}", unfolded, path, count, unfolded.path / PRIVATE_AREA / path)

    private = stack.enter_context(bench.container(bench.store.template(f"lookup-{bench.scaled(TEMPLATES[-1])}")))
    for path, count in sized.items():
        folder = private.path / PRIVATE_AREA / f"own-{path}"
        folder.mkdir()
        for number in range(count):
            os.close(os.open(folder / file_name(number), os.O_WRONLY | os.O_CREAT, 0o644))
        yield Case("private", f"directory of {count:,}", private, folder.name, count, folder)


def _template_folder(container: Container) -> Path:
    return container.store.template(container.status().template).path


def _lstat(path: Path, case: Case, rng: random.Random, *, forget: bool) -> float:
    """Mean time of an lstat in the directory at ``path``, µs; ``forget`` drops the names of its mount before."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    spent = 0
    try:
        for _ in range(BATCHES):
            names = _names(case, rng)
            if forget:
                forget_names(path)
            start = time.perf_counter_ns()
            for name in names:
                os.lstat(name, dir_fd=folder)
            spent += time.perf_counter_ns() - start
    finally:
        os.close(folder)
    return spent / 1e3 / BATCH / BATCHES


def _names(case: Case, rng: random.Random) -> list[str]:
    return [file_name(number) for number in rng.sample(range(case.files), BATCH)]


def _in_tree(bench: Bench, case: Case, rng: random.Random) -> float:
    """Mean time of a look-up in the tree of nodes, each forgotten again, µs."""
    tree = Tree(bench.store.layout, case.container.path)
    try:
        folder = ROOT_NUMBER
        for part in case.path.split("/"):
            entry = tree.lookup(folder, part.encode())
            if entry is None:
                raise RuntimeError(f"no {case.path} in {case.container.path}")
            folder = entry.number
        spent = 0
        for _ in range(BATCHES):
            names = [name.encode() for name in _names(case, rng)]
            start = time.perf_counter_ns()
            found = [tree.lookup(folder, name) for name in names]
            spent += time.perf_counter_ns() - start
            for one in found:
                if one is None:
                    raise RuntimeError(f"a name is missing in {case.path}")
                tree.forget(one.number, 1)
        return spent / 1e3 / BATCH / BATCHES
    finally:
        tree.close()
