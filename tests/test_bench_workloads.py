"""Benchmark workloads do the same work on every system and prove it; a wrong answer of a file system shows.

The suite's own running of them (rounds, caches, results) is tested in test_bench_suite.py. Here every step runs once on
ext4's plain copy, kernel overlayfs and vzfs, with sizes that take no time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import random
import shutil
import signal
import stat
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import profile
from benchmarks.scale import WORKLOADS as SCALE
from benchmarks.workload import Cache, Condition, Facts, Outcome, Place, Sizes, Skip, Workload
from benchmarks.workloads import WORKLOADS, density
from benchmarks.workloads.clients import ClientError, measure, program, shares, started
from vzfs import Store
from vzfs.errors import UnsupportedError

TINY = Sizes(
    quick=True,
    small_files=240,
    large_bytes=3 << 20,
    lookups=60,
    huge_entries=150,
    copy_ups=10,
    new_file_bytes=4 << 20,
    containers=2,
)
PROGRAMS = (
    "sh",
    "rm",
    "tar",
    "diff",
    "perl",
    "dpkg",
    "dpkg-deb",
    "dpkg-split",
    "dpkg-query",
    "ldconfig",
    "start-stop-daemon",
)
"""What the smallest root needs in which dpkg installs a package."""
SYSTEMS = ("ext4", "overlayfs", "vzfs")


# ------------------------------------------------------------------------------------------------------ the template


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A template with what ``Facts`` promises, what each workload furnishes, and a few of this machine's programs."""
    top = tmp_path_factory.mktemp("bench-template") / "tree"
    rng = random.Random(0)
    for number in range(TINY.small_files):
        _put(top / _small(number), rng.randbytes(rng.randrange(100, 8_000)))
    for number in range(TINY.huge_entries):
        _put(top / f"bench/huge/f{number:06d}", b"sixteen bytes...")
    _put(top / "bench/large", rng.randbytes(TINY.large_bytes))
    _put(top / _deep(), b"deep")
    for workload in WORKLOADS:
        workload().furnish(top, TINY)
    for name in PROGRAMS:
        _copy_program(name, top)
    for name in ("status", "available", "info/format", "updates/.keep", "triggers/.keep"):
        _put(top / "var/lib/dpkg" / name, b"1\n" if name == "info/format" else b"")
    (top / "var/lib/dpkg/updates/.keep").unlink()
    (top / "tmp").mkdir()
    (top / "dev").mkdir()
    os.mknod(top / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    return top


def _small(number: int) -> str:
    return f"bench/small/d{number // 40:03d}/f{number:05d}"


def _deep() -> str:
    return "/".join(["bench/deep", *(f"d{level}" for level in range(22)), "file"])


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _copy_program(name: str, top: Path) -> None:
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert found, f"{name} is needed"
    listed = subprocess.run(["ldd", found], capture_output=True, text=True, check=False).stdout
    libraries = [word for line in listed.splitlines() for word in line.split() if word.startswith("/")]
    for file in (found, *libraries, *(["/bin/sh"] if name == "sh" else [])):
        target = top / file.removeprefix("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


@pytest.fixture(scope="module")
def facts(tree: Path) -> Facts:
    small = tuple(_small(number) for number in range(TINY.small_files))
    everything = [tree, *tree.rglob("*")]
    return Facts(
        entries=len(everything),
        files=sum(path.is_file() for path in everything),
        small=small,
        small_bytes=sum((tree / path).stat().st_size for path in small),
        large="bench/large",
        huge="bench/huge",
        deep=_deep(),
        programs=True,
    )


# ------------------------------------------------------------------------------------------------------- the systems


@dataclass(frozen=True, slots=True)
class Rig:
    """Mounts systems; everything is gone when ``stack`` is closed."""

    tree: Path
    facts: Facts
    folder: Path
    store: Store
    stack: contextlib.ExitStack

    def place(self, system: str, clients: int = 1) -> Place:
        """A fresh mount of ``system``."""
        folder = self.folder / f"{system}-{len(list(self.folder.iterdir()))}"
        scratch = folder / "scratch"
        scratch.mkdir(parents=True)
        root, stored, servers, kept = self._mount(system, folder)
        return Place(
            system=system,
            root=root,
            stored=stored,
            scratch=scratch,
            servers=servers,
            facts=self.facts,
            sizes=TINY,
            clients=clients,
            condition=Condition.IDLE,
            rng=random.Random(7),
            another=lambda: self.place(system),
            kept=kept,
        )

    def _mount(self, system: str, folder: Path) -> tuple[Path, Path, tuple[int, ...], tuple[Path, ...]]:
        root, upper = folder / "root", folder / "upper"
        if system == "ext4":
            subprocess.run(["cp", "-a", str(self.tree), str(root)], check=True)
            return root, root, (), ()
        if system == "overlayfs":
            for path in (root, upper, folder / "work"):
                path.mkdir()
            options = f"lowerdir={self.tree},upperdir={upper},workdir={folder / 'work'}"
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(root)], check=True)
            self.stack.callback(subprocess.run, ["umount", str(root)], check=True)
            return root, self.tree, (), (upper, folder / "work")
        template = (self.store.templates() or [self.store.create_template("bench", str(self.tree))])[0]
        container = self.store.create(len(self.store.containers()) + 1, template=template.name)
        self.stack.callback(container.destroy)
        mounted = self.stack.enter_context(container.mounted(root, engine="pyfuse3", mkdir=True))
        pid = container.status().pid
        assert pid
        return mounted, template.path, (pid,), (container.path,)


@pytest.fixture
def rig(tree: Path, facts: Facts, tmp_path: Path) -> Iterator[Rig]:
    """For one test."""
    (tmp_path / "mounts").mkdir()
    with contextlib.ExitStack() as stack:
        yield Rig(tree, facts, tmp_path / "mounts", Store(tmp_path / "store"), stack)


def outcomes(workload: Workload, place: Place) -> dict[str, Outcome]:
    """What each step gives; steps that are left out on this system are missing."""
    found = {}
    with contextlib.suppress(Skip):
        workload.prepare(place)
        for step in workload.steps:
            with contextlib.suppress(Skip):
                found[step.name] = workload.run(place, step)
    return found


def test_a_quick_run_mounts_few_containers(rig: Rig) -> None:
    growth = next(workload for workload in SCALE if workload.name == "scale-100k")()
    place = rig.place("overlayfs")
    growth.prepare(place)
    step = next(step for step in growth.steps if step.name == "mount-10")
    with pytest.raises(Skip, match=f"no more than {TINY.containers} containers"):
        growth.run(place, step)


# ----------------------------------------------------------------------------------------------------- all workloads

NEEDS_A_PROCESS = {"memory": {"idle", "walked", "descriptors"}, "many-containers": {"memory"}}
NEEDS_COPY_ON_WRITE = {"many-containers"}
NOT_IN_THE_TREE = {"start": {"python3-first", "python3"}}


def expected_steps(workload: type[Workload], system: str) -> set[str]:
    """The steps that ``workload`` must do on ``system``."""
    if workload.name == "fio-random-read" and shutil.which("fio") is None:
        return set()
    if system == "ext4" and workload.name in NEEDS_COPY_ON_WRITE:
        return set()
    without = NOT_IN_THE_TREE.get(workload.name, set())
    if system != "vzfs":
        without = without | NEEDS_A_PROCESS.get(workload.name, set())
    return {step.name for step in workload.steps} - without


@pytest.mark.parametrize("kind", WORKLOADS, ids=lambda kind: kind.name)
def test_all_systems_give_the_same_proof(kind: type[Workload], rig: Rig) -> None:
    found = {system: outcomes(kind(), rig.place(system)) for system in SYSTEMS}
    for system, steps in found.items():
        assert set(steps) == expected_steps(kind, system)
        for name, outcome in steps.items():
            assert outcome.seconds > 0
            assert outcome.operations > 0
            assert sum(outcome.latencies_ns) / 1e9 <= outcome.seconds * 1.000_001
            (step,) = (step for step in kind.steps if step.name == name)
            assert (outcome.value is not None) == bool(step.unit)
    for name, outcome in found["vzfs"].items():
        proofs = {system: steps[name].proof for system, steps in found.items() if name in steps}
        assert set(proofs.values()) == {outcome.proof}, f"{name}: {proofs}"


def test_names_and_steps_are_as_the_command_line_needs_them() -> None:
    names = [workload.name for workload in WORKLOADS]
    assert len(set(names)) == len(names)
    for workload in WORKLOADS:
        steps = [step.name for step in workload.steps]
        assert len(set(steps)) == len(steps)
        assert workload.title
        for word in (workload.name, *steps):
            assert word == word.lower()
            assert " " not in word
        for step in workload.steps:
            assert bool(step.files) == (step.cache is Cache.BACKING)


@pytest.mark.parametrize("kind", [w for w in WORKLOADS if len(w.clients) > 1], ids=lambda kind: kind.name)
def test_several_clients_share_the_work(kind: type[Workload], rig: Rig) -> None:
    most = max(kind.clients)
    alone, together = (outcomes(kind(), rig.place("overlayfs", clients)) for clients in (1, most))
    for step in kind.steps:
        assert together[step.name].operations == alone[step.name].operations
        assert len(together[step.name].latencies_ns) == len(alone[step.name].latencies_ns)
        assert together[step.name].bytes == alone[step.name].bytes


@pytest.mark.parametrize("kind", [w for w in WORKLOADS if not w.writes], ids=lambda kind: kind.name)
def test_reading_workloads_change_nothing(kind: type[Workload], rig: Rig) -> None:
    place = rig.place("overlayfs")
    outcomes(kind(), place)
    assert list(place.kept[0].iterdir()) == []


# ---------------------------------------------------------------------------------------------------- wrong answers


def workload(name: str) -> Workload:
    (found,) = (kind for kind in WORKLOADS if kind.name == name)
    return found()


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    ("name", "step", "spoil"),
    [
        ("walk", "first", lambda root: (root / "bench/new").mkdir()),
        ("walk", "first", lambda root: _grow(root / _small(3))),
        ("lstat-order", "first", lambda root: [_grow(root / _small(n)) for n in range(TINY.small_files)]),
        ("negative", "first", lambda root: [_put(root / f"{_small(n)}.missing", b"") for n in range(TINY.small_files)]),
        ("huge-directory", "list", lambda root: (root / "bench/huge/new").touch()),
        ("small-files", "first", lambda root: [_flip(root / _small(n), 50) for n in range(TINY.small_files)]),
        ("sequential-read", "first", lambda root: _flip(root / "bench/large", 256 << 10)),
        ("mmap-touch", "first", lambda root: _flip(root / "bench/large", 40960)),
        ("random-read", "first", lambda root: [_flip(root / "bench/large", n) for n in range(0, 3 << 20, 4096)]),
        ("git-status", "first", lambda root: _grow(root / "bench/git-status/part000/source07.c")),
    ],
)
def test_a_wrong_answer_changes_the_proof(name: str, step: str, spoil: Callable[[Path], object], rig: Rig) -> None:
    right = outcomes(workload(name), rig.place("ext4"))[step].proof
    place = rig.place("ext4")
    spoil(place.root)
    assert outcomes(workload(name), place)[step].proof != right


def test_an_error_of_the_file_system_is_named(rig: Rig) -> None:
    place = rig.place("ext4")
    with pytest.raises(ClientError, match=r"^lstat: FileNotFoundError: .*'bench/nowhere'"):
        measure(place, {"loop": "lstat", "paths": ["bench/nowhere"]})
    with pytest.raises(ClientError, match=r"^random_read: FileNotFoundError: .*nowhere"):
        measure(place, {"loop": "random_read", "path": "nowhere", "seed": 1, "count": 1})


def test_a_program_that_fails_is_an_error(rig: Rig) -> None:
    with pytest.raises(ClientError, match=r"^spawn: OSError: /bin/ls bench/nowhere: status 2: .*No such file"):
        measure(rig.place("ext4"), program(["/bin/ls", "bench/nowhere"]))


def test_clients_are_gone_after_a_failure(rig: Rig) -> None:
    order = {"loop": "lstat", "root": str(rig.place("ext4").root), "paths": []}
    processes = []

    def fail() -> None:
        with started([order, order]) as clients:
            processes.extend(client.process for client in clients)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


# --------------------------------------------------------------------------------------------- what is measured, how


def test_names_are_dealt_out_to_clients_once_each(rig: Rig) -> None:
    place = replace(rig.place("ext4"), clients=4)
    orders = shares(place, "lstat", [str(number) for number in range(10)])
    assert [len(order["paths"]) for order in orders] == [3, 3, 2, 2]
    assert sorted(path for order in orders for path in order["paths"]) == [str(number) for number in range(10)]


def test_a_pause_between_operations_is_counted_and_one_before_the_first_is_not(rig: Rig) -> None:
    place = rig.place("ext4")
    with started(
        [{"loop": "paced_lstat", "root": str(place.root), "paths": ["bench"] * 3, "pause": 0.02, "least": 3}]
    ) as [client]:
        client.go()
        answer = client.answer()
    assert answer["operations"] == 6
    assert (answer["end"] - answer["start"]) / 1e9 >= 0.06
    pauses = [end - start for start, end in zip([answer["start"], *answer["stamps"][1::2]], answer["stamps"][::2])]  # noqa: B905
    assert min(pauses) >= 20_000_000


@pytest.mark.alone
def test_page_cache_is_counted_and_shared_where_the_kernel_shares_it(rig: Rig) -> None:
    content = os.urandom(32 << 20)
    grown = []
    for turn in range(5):
        before = density.cached_kib()
        (rig.folder / f"content{turn}").write_bytes(content)
        grown.append((density.cached_kib() - before) / 1024)
    assert statistics.median(grown) == pytest.approx(32, abs=8)  # other programs use the page cache meanwhile


def test_memory_and_descriptors_of_a_process() -> None:
    gc.collect()  # what earlier tests left open
    before = density.descriptors([os.getpid()])
    with open("/dev/null", "rb"):
        assert density.descriptors([os.getpid()]) == before + 1
    small = density.pss_mib([os.getpid()])
    with mmap.mmap(-1, 16 << 20) as ballast:  # of its own, not what malloc has left from earlier tests
        for page in range(0, len(ballast), mmap.PAGESIZE):
            ballast[page] = 1
        assert density.pss_mib([os.getpid()]) - small == pytest.approx(16, abs=4)


# ---------------------------------------------------------------------------------------------------------- profiles


def profiled(rig: Rig, folder: Path, turn: int) -> dict[str, str]:
    """What the profiler writes into ``folder`` beside twenty walks of a vzfs mount."""
    profiler = profile.Profiler(folder)
    place = rig.place("vzfs")
    cell = SimpleNamespace(workload=SimpleNamespace(name="walk"), condition=Condition.IDLE, clients=1)
    with profiler.probe(cell, SimpleNamespace(name="vzfs"), turn, place):  # type: ignore[arg-type]
        walk = workload("walk")
        for _ in range(20):
            walk.run(place, walk.steps[0])
            subprocess.run(["mount", "-i", "-o", "remount", str(place.root)], check=True)  # forgets all names
    return profiler.files


def test_a_profile_has_the_requests_and_where_the_server_was(rig: Rig, tmp_path: Path) -> None:
    files = profiled(rig, tmp_path, turn=1)
    assert sorted(files) == ["walk, vzfs, idle, 1 client: flame graph", "walk, vzfs, idle, 1 client: requests"]
    counts = json.loads((tmp_path / files["walk, vzfs, idle, 1 client: requests"]).read_text())
    assert counts["source"] == "the server"
    assert counts["requests"]["READDIRPLUS"] > 20
    picture = (tmp_path / files["walk, vzfs, idle, 1 client: flame graph"]).read_text()
    assert "<svg" in picture
    assert "portable.py" in picture


def test_later_rounds_are_left_in_peace(rig: Rig, tmp_path: Path) -> None:
    assert profiled(rig, tmp_path, turn=2) == {}


def test_the_kernel_counts_the_requests_that_the_server_does(rig: Rig) -> None:
    place = rig.place("vzfs")
    traced: dict[str, Any] = {}
    with profile.requests(place.root, place.servers[0]) as served, profile._traced(place.root, traced):
        for path in place.facts.small:
            os.lstat(place.root / path)
    assert traced["source"] == "the kernel's tracepoint"
    assert traced["lost"] == 0
    assert served["source"] == "the server"
    assert served["requests"]["LOOKUP"] > len(place.facts.small)
    assert traced["requests"]["LOOKUP"] == served["requests"]["LOOKUP"]


def test_without_py_spy_profiling_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="py-spy"):
        profile.Profiler(tmp_path)
