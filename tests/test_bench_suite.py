"""The benchmark suite runs, refuses what it can't do and leaves nothing behind; what it finds is no matter of tests."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from benchmarks import caches, plan, scale
from benchmarks.catalogue import WORKLOADS
from benchmarks.cli import EXIT_PROBLEMS, EXIT_SLOWER, cli
from benchmarks.compare import changes
from benchmarks.conditions import condition
from benchmarks.results import Evidence, Figure, Machine, Run, Sample, SystemInfo
from benchmarks.runner import latency
from benchmarks.systems import SYSTEMS, is_mounted
from benchmarks.template import count, make_shape
from benchmarks.workload import QUICK, Cache, Condition, Group, Outcome, Step
from vzfs.errors import UnsupportedError, UsageError

TOP = Path(__file__).parents[1]
OURS = "ext4,overlayfs,fuse-overlayfs,vzfs-pyfuse3"
ROUNDS = 2
"""Enough to see that systems take turns."""


def start(scratch: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start ``vzfs-bench run --quick`` in ``scratch``, on a generated template."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "run", "--quick", "--scratch", str(scratch), *arguments],
        cwd=TOP,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``vzfs-bench``."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=TOP, capture_output=True, text=True, timeout=300
    )


def processes_below(folder: Path) -> list[str]:
    """Commands of the processes that name ``folder`` in their arguments: servers and clients of a run."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
            if f"{folder}/" in command:
                found.append(command)
    return found


def assert_nothing_left(scratch: Path) -> None:
    """Neither mounts nor processes nor files."""
    assert processes_below(scratch) == []
    assert os.listdir(scratch) == []
    assert f" {scratch}/" not in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


# ---- a whole run -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_quick_run_of_each_group_gives_results(scratch: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    chosen = "walk,small-files,sequential-read,first-write-small,chmod-large,memory,scale-10k"
    arguments = ("--systems", OURS, "--workloads", chosen, "--rounds", str(ROUNDS), "--output", str(output))
    process = start(scratch, *arguments)
    told, complaints = process.communicate(timeout=600)
    assert process.returncode == 0, told + complaints
    assert_nothing_left(scratch)
    run = Run.load(output)
    assert run.quick
    assert run.rounds == ROUNDS
    assert run.machine.kernel == os.uname().release
    assert {system.name for system in run.systems} == set(OURS.split(","))
    assert not [problem for problem in run.problems if problem.kind != "skipped"]
    assert {sample.workload for sample in run.samples} == set(chosen.split(","))
    assert {sample.condition for sample in run.samples} == {"idle", "busy"}
    walks = [sample for sample in run.samples if sample.workload == "walk" and sample.step == "first"]
    assert len(walks) == 4 * 2 * ROUNDS
    assert {sample.operations for sample in walks} == {run.entries}
    assert len({sample.proof for sample in walks}) == 1
    for sample in walks:
        assert (sample.evidence.spinner > 0) == (sample.condition == "busy")
        assert bool(sample.evidence.server_cpus) == (sample.system not in ("ext4", "overlayfs"))
    for system in OURS.split(","):  # in one round at least: other programs come and go
        grown = [sample.evidence.dentries_grown for sample in walks if sample.system == system]
        assert max(grown) >= caches.SHARE * run.entries
    # Interleaved: the systems take turns within a round.
    order = [sample.system for sample in walks if sample.condition == "idle"]
    assert order == OURS.split(",") * ROUNDS
    assert "medians" in complaints.lower()
    assert bench("report", str(output), "--output", str(tmp_path / "report")).returncode == 0
    assert (tmp_path / "report/report.html").stat().st_size > 10_000
    unchanged = bench("compare", str(output), str(output), "--all")
    assert unchanged.returncode == 0
    assert "0 slower, 0 faster" in unchanged.stdout


@pytest.mark.slow
def test_a_tree_is_used_and_not_changed(scratch: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/motd").write_text("hello\n")
    before = {path: path.lstat() for path in (tree, *tree.rglob("*"))}
    output = tmp_path / "results.json"
    arguments = ("--tree", str(tree), "--systems", "ext4,overlayfs", "--conditions", "idle", "--output", str(output))
    process = start(scratch, "--workloads", "walk,files", *arguments)
    told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert {path: path.lstat().st_mtime_ns for path in (tree, *tree.rglob("*"))} == {
        path: info.st_mtime_ns for path, info in before.items()
    }
    with_it = Run.load(output)
    assert with_it.template.startswith("tree, ")
    assert_nothing_left(scratch)


@pytest.mark.slow
def test_a_program_that_fails_to_mount_is_named_as_missing_and_the_others_are_measured(
    scratch: Path, tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "bindfs").write_text("#!/bin/sh\necho sorry >&2\nexit 1\n")
    (programs / "bindfs").chmod(0o755)
    output = tmp_path / "results.json"
    process = start(
        scratch,
        *("--systems", "ext4,bindfs", "--workloads", "walk", "--conditions", "idle", "--output", str(output)),
        PATH=f"{programs}:{os.environ['PATH']}",
    )
    told, complaints = process.communicate(timeout=300)
    assert process.returncode == EXIT_PROBLEMS, told + complaints
    run = Run.load(output)
    assert {sample.system for sample in run.samples} == {"ext4"}
    assert any(problem.kind == "failed" and "sorry" in problem.text for problem in run.problems)
    assert_nothing_left(scratch)


def test_a_system_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which

    def which(name: str) -> str | None:
        return None if name == "mergerfs" else real(name)

    monkeypatch.setattr(shutil, "which", which)
    systems, missing = plan.choose_systems(["ext4", "mergerfs"])
    assert [system.name for system in systems] == ["ext4"]
    assert missing == {"mergerfs": "mergerfs is not installed; apt-get install mergerfs"}


# ---- the end of a run, however it comes ------------------------------------------------------------------------------


LONG_RUN = ("--workloads", "scale-10k", "--rounds", "50")
"""Begins soon and does not end before it is interrupted."""


def children_of(pid: int) -> list[int]:
    """Child processes, by /proc."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(what: Callable[[], bool]) -> None:
    """Wait until ``what`` is so."""
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def slowed(programs: Path, name: str, first: str) -> Path:
    """Put a program ``name`` into the new folder ``programs`` that takes half a second longer when its first argument
    begins with ``first``; gives the file that says that it is running so.
    """
    real = shutil.which(name)
    assert real is not None
    running = programs / "running"
    programs.mkdir()
    script = f'#!/bin/sh\ncase "$1" in {first}*) touch {running}; sleep 0.5;; esac\nexec {real} "$@"\n'
    (programs / name).write_text(script)
    (programs / name).chmod(0o755)
    return running


def serves(process: subprocess.Popen[str], system: str) -> bool:
    """Whether a worker of ``process`` sees a mount of ``system``."""
    with contextlib.suppress(OSError):
        mounts = [Path(f"/proc/{worker}/mountinfo").read_text() for worker in children_of(process.pid)]
        return any(f" fuse.{system} " in text for text in mounts)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "a server starts"),
        (signal.SIGINT, "a server starts"),
        (signal.SIGINT, "vzfs is tried out"),
        (signal.SIGTERM, "a system is mounted"),
        (signal.SIGHUP, "a system is unmounted"),
    ],
)
def test_an_interrupted_run_leaves_nothing_but_what_it_has_measured(
    number: signal.Signals, moment: str, scratch: Path, tmp_path: Path
) -> None:
    output, programs = tmp_path / "results.json", tmp_path / "programs"
    name, first = ("umount", str(scratch)) if moment == "a system is unmounted" else ("fuse-overlayfs", "-f")
    running = slowed(programs, name, first)
    process = start(
        scratch,
        *("--systems", "ext4,fuse-overlayfs,vzfs-pyfuse3", "--output", str(output), *LONG_RUN),
        PATH=f"{programs}:{os.environ['PATH']}",
    )
    match moment:
        case "vzfs is tried out":
            wait_for(lambda: any("vzfs.fuse.serve" in command for command in processes_below(scratch)))
        case "a system is mounted":
            wait_for(lambda: serves(process, "fuse-overlayfs"))
        case _:
            wait_for(running.exists)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert_nothing_left(scratch)
    run = Run.load(output)
    assert [problem.text for problem in run.problems if problem.kind != "skipped"] == ["the run was interrupted"]
    if moment != "vzfs is tried out":
        assert run.samples


@pytest.mark.slow
def test_a_killed_worker_leaves_nothing(scratch: Path, tmp_path: Path) -> None:
    process = start(scratch, "--systems", "fuse-overlayfs,vzfs-pyfuse3", "--output", str(tmp_path / "x"), *LONG_RUN)
    wait_for(lambda: any("fuse-overlayfs" in command for command in processes_below(scratch)))
    (worker,) = children_of(process.pid)
    os.kill(worker, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert_nothing_left(scratch)


@pytest.mark.slow
def test_a_killed_supervisor_lets_the_worker_clean_up(scratch: Path, tmp_path: Path) -> None:
    process = start(scratch, "--systems", "fuse-overlayfs,vzfs-pyfuse3", "--output", str(tmp_path / "x"), *LONG_RUN)
    wait_for(lambda: any("fuse-overlayfs" in command for command in processes_below(scratch)))
    process.kill()
    process.communicate(timeout=120)
    wait_for(lambda: not processes_below(scratch) and not os.listdir(scratch))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--systems", "nonsense"], 2, "there is no system nonsense"),
        (["--workloads", "walk,nonsense"], 2, "there is no workload nonsense"),
        (["--conditions", "nonsense"], 2, "there is no condition nonsense"),
        (["--rounds", "0"], 2, "too few"),
        (["--tree", "/nowhere"], 2, "/nowhere is no directory"),
        (["--scratch", "/nowhere"], 2, "/nowhere is no directory"),
        (["--output", "/nowhere/results.json"], 2, "/nowhere is no directory"),
        (["--output", "/"], 2, "is a directory"),
        (["--conditions", "busy", "--workloads", "memory"], 2, "nothing is left to measure"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], code: int, words: str, scratch: Path) -> None:
    if "--scratch" not in arguments:
        arguments = ["--scratch", str(scratch), *arguments]
    done = bench("run", "--quick", *arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert os.listdir(scratch) == []


def test_four_rounds_are_too_few_for_figures() -> None:
    with pytest.raises(click.UsageError, match="--rounds 4 is too few, 5 are the least"):
        cli.main(["run", "--rounds", "4"], standalone_mode=False)


def test_without_root_nothing_is_begun(scratch: Path) -> None:
    scratch.chmod(0o777)
    nobody = ["setpriv", "--reuid", "65534", "--clear-groups"]
    # Nothing but reading: the checkout may lie where an ordinary user may not look.
    nobody += [f"--{which}=-all,+dac_read_search" for which in ("inh-caps", "ambient-caps", "bounding-set")]
    script = "import sys; sys.path.insert(0, sys.argv.pop(1)); from benchmarks.cli import main; main()"
    program = [sys.executable, "-c", script, str(TOP), "run", "--quick", "--scratch", str(scratch)]
    done = subprocess.run(
        [*nobody, *program], cwd="/", env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert "needs root" in done.stderr
    assert os.listdir(scratch) == []


def test_too_little_disk_is_refused(scratch: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(scratch)], check=True)
    try:
        done = bench("run", "--quick", "--scratch", str(scratch), "--output", "/tmp/never.json")
        assert done.returncode == 10
        assert "MiB are needed" in done.stderr
        assert os.listdir(scratch) == []
    finally:
        subprocess.run(["umount", str(scratch)], check=True)
    assert not is_mounted(scratch)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.cli.EXTRA", ("scipy", "no_such_library"))
    with pytest.raises(UnsupportedError, match="not installed: no_such_library"):
        cli.main(["compare", "old", "new"], standalone_mode=False)


def test_names_and_codes_are_distinct() -> None:
    names = [workload.name for workload in WORKLOADS]
    assert len(set(names)) == len(names)
    assert not set(names) & {str(group) for group in Group}
    assert len({system.name for system in SYSTEMS}) == len(SYSTEMS)
    assert len({1, 2, 7, 10, EXIT_PROBLEMS, EXIT_SLOWER}) == 6
    for workload in WORKLOADS:
        steps = [step.name for step in workload.steps]
        assert len(set(steps)) == len(steps) > 0


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [100, 1_000, 20_000])
def test_a_generated_tree_has_the_wanted_number_of_entries(entries: int) -> None:
    tree = scale.plain_tree(entries)
    assert 1 + len(tree) + sum(tree.values()) == entries


def test_a_shape_is_made_as_it_says(tmp_path: Path) -> None:
    facts = make_shape(tmp_path, scale.plain_shape(20_000), QUICK)
    assert facts.entries == 1_000 == count(tmp_path)[0]
    assert (tmp_path / "top00/d00000/f000039").is_file()


@pytest.mark.alone
def test_dropping_and_reading_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(8 << 20))
    grown = []
    for _ in range(5):
        caches.drop("3")
        assert caches.resident([file]) < 0.1
        before = caches.level()
        caches.read_whole(file)
        assert caches.resident([file]) == 1.0
        grown.append(caches.level().cached_kib - before.cached_kib)
    assert statistics.median(grown) > 4 << 10  # other programs use the page cache meanwhile


@pytest.mark.parametrize(
    ("cache", "dentries", "cached_kib", "resident", "verified"),
    [
        (Cache.DENTRIES, 1_000, 0, -1, True),
        (Cache.DENTRIES, 800, 0, -1, False),
        (Cache.ALL, 1_000, 100 << 10, -1, True),
        (Cache.ALL, 1_000, 50 << 10, -1, False),
        (Cache.ALL, 10, 100 << 10, -1, False),
        (Cache.BACKING, 0, 0, 1.0, True),
        (Cache.BACKING, 0, 0, 0.5, False),
        (Cache.WARM, 200, 1_000, -1, True),
        (Cache.WARM, 1_000, 0, -1, False),
        (Cache.WARM, 0, 100 << 10, -1, False),
        (Cache.FRESH, 0, 0, -1, True),
        (Cache.ANY, 10_000, 0, -1, True),
    ],
)
def test_a_cache_state_is_verified_by_what_grew(
    cache: Cache, dentries: int, cached_kib: int, resident: float, verified: bool
) -> None:
    outcome = Outcome(1.0, 1_000, "proof", bytes=100 << 20, names=1_000)
    before, after = caches.Level(5_000, 7_000), caches.Level(5_000 + dentries, 7_000 + cached_kib)
    text = caches.check(Step("step", "title", cache), outcome, 1, before, after, resident)
    assert (text == "") == verified


def test_the_busy_condition_keeps_the_other_cpus_busy_and_ends() -> None:
    with condition(Condition.BUSY) as spinners:
        assert len(spinners.pids) == len(os.sched_getaffinity(0)) - 1
        first = min(os.sched_getaffinity(0))
        assert all(first not in os.sched_getaffinity(pid) for pid in spinners.pids)
        before = spinners.cpu_seconds()
        time.sleep(0.5)
        assert spinners.cpu_seconds() > before
    assert not any(os.path.exists(f"/proc/{pid}") for pid in spinners.pids)
    with condition(Condition.IDLE) as spinners:
        assert spinners.pids == ()


def test_percentiles_are_by_nearest_rank() -> None:
    found = latency(Outcome(1.0, 1000, "", latencies_ns=list(range(1000, 0, -1))))
    assert found is not None
    assert (found.count, found.p50, found.p99, found.p999, found.largest) == (1000, 500, 990, 999, 1000)
    single = latency(Outcome(1.0, 1, "", latencies_ns=[7]))
    assert single is not None
    assert (single.p50, single.p999) == (7, 7)
    assert latency(Outcome(1.0, 1, "")) is None


# ---- results and their comparison ------------------------------------------------------------------------------------


def made_run(figures: dict[str, list[float]], **changed: object) -> Run:
    """A run of one workload with these figures by system."""
    evidence = Evidence(1, 2, 3, 4, -1.0, -1.0, (0,), 0.5, verified=True)
    samples = [
        Sample("walk", "first", system, "idle", 1, turn, value, value, 1, 0, "proof", None, evidence, {"extra": 1.0})
        for system, values in figures.items()
        for turn, value in enumerate(values, start=1)
    ]
    run = Run(
        machine=Machine("cpu", 2, 1024, "x86_64", "kvm", "ext4", "/dev/vda", "6.18"),
        versions={"Python": "3.11.2"},
        started="2026-01-01T00:00:00+00:00",
        ended="2026-01-01T01:00:00+00:00",
        load_before=0.1,
        load_after=0.2,
        commit="abc",
        template="template",
        entries=10,
        quick=False,
        rounds=5,
        conditions={"idle": "nothing else runs"},
        systems=tuple(SystemInfo(name, name, "1", "mount", writable=True) for name in figures),
        figures=(Figure("walk", "first", "lookup", "Walk", "first", "names dropped", "text", "", throughput=False),),
        samples=tuple(samples),
    )
    return dataclasses.replace(run, **changed)  # type: ignore[arg-type]


OLD = {"ext4": [1.0, 1.1, 1.2, 1.3, 1.4], "ours": [2.0, 2.1, 2.2, 2.3, 2.4], "noisy": [1.0, 2.0, 3.0, 4.0, 5.0]}
NEW = {"ext4": [1.01, 1.11, 1.21, 1.31, 1.41], "ours": [3.0, 3.1, 3.2, 3.3, 3.4], "noisy": [1.5, 2.5, 3.5, 4.5, 5.5]}


def test_results_survive_their_file(tmp_path: Path) -> None:
    run = made_run(OLD)
    path = tmp_path / "results.json"
    path.write_text(run.as_json())
    assert Run.load(path) == run


def test_fields_of_a_later_program_are_left_out(tmp_path: Path) -> None:
    data = json.loads(made_run(OLD).as_json())
    data["later"] = 1
    data["samples"][0]["later"] = data["samples"][0]["evidence"]["later"] = 1
    assert Run.from_json(json.dumps(data)) == made_run(OLD)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is no result"),
        ('{"format": "other"}', "is no result"),
        ('{"format": "vzfs-bench", "version": 99}', "has version 99"),
        ('{"format": "vzfs-bench", "version": 1}', "is incomplete"),
    ],
)
def test_what_is_no_result_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        Run.load(path)
    assert bench("compare", str(path), str(path)).returncode == 2
    with pytest.raises(UsageError, match="can't be read"):
        Run.load(tmp_path / "missing")


def test_only_changes_beyond_the_noise_count() -> None:
    found = {row.system: row for row in changes(made_run(OLD), made_run(NEW), (), 0.05)}
    assert {name: row.verdict for name, row in found.items()} == {"ext4": "same", "ours": "slower", "noisy": "same"}
    assert found["ours"].control == pytest.approx(1.21 / 1.2)
    back = {row.system: row.verdict for row in changes(made_run(NEW), made_run(OLD), (), 0.05)}
    assert back == {"ext4": "same", "ours": "faster", "noisy": "same"}
    assert [row.verdict for row in changes(made_run(OLD), made_run(NEW), ("ours",), 0.9)] == ["same"]


def test_runs_that_have_nothing_in_common_are_not_compared() -> None:
    with pytest.raises(UsageError, match="--quick"):
        changes(made_run(OLD), made_run(NEW, quick=True), (), 0.05)
    with pytest.raises(UsageError, match="no figure in common"):
        changes(made_run(OLD), made_run({"other": [1.0, 2.0]}), (), 0.05)
    with pytest.raises(UsageError, match="neither run has the system nonsense"):
        changes(made_run(OLD), made_run(NEW), ("nonsense",), 0.05)


def test_comparing_says_so_and_by_its_exit_code(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(made_run(OLD).as_json())
    new.write_text(made_run(NEW).as_json())
    worse = bench("compare", str(old), str(new))
    assert worse.returncode == EXIT_SLOWER
    assert "1 slower, 0 faster, 2 without" in worse.stdout
    better = bench("compare", str(new), str(old))
    assert better.returncode == 0
    assert "0 slower, 1 faster" in better.stdout
