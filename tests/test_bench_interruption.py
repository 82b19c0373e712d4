"""A signal ends the suite's worker wherever it comes, and finds nothing half done; see benchmarks/supervise.py.

Here the signal comes from the very place that is interrupted, so that it comes there each time. Whole runs are
interrupted in test_bench_suite.py.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import pytest

from benchmarks.plan import Plan
from benchmarks.runner import Runner
from benchmarks.supervise import FOLDER_VARIABLE, SIGNALS, raise_again, uninterrupted, worker_folder
from benchmarks.systems import Ground, Mount, System, made
from benchmarks.workload import QUICK, Cache, Condition, Group, Outcome, Place, Shape, Step, Workload
from benchmarks.workloads.clients import started


def gone() -> OSError:
    """What a mount says whose server has ended. A new one each time: it keeps what it came up after."""
    return OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), "root")


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals that reached a handler which does nothing but note them."""
    numbers: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        numbers.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The worker's."""
    scratch = made(tmp_path / "scratch")
    monkeypatch.setenv(FOLDER_VARIABLE, str(scratch))
    return scratch


# ---- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_end_of_the_block(number: signal.Signals, handled: list[int]) -> None:
    handler = signal.getsignal(number)
    with uninterrupted():
        signal.raise_signal(number)
        assert handled == []
    assert handled == [number]
    assert signal.getsignal(number) is handler
    signal.raise_signal(number)
    assert handled == [number] * 2


def test_a_signal_has_waited_also_when_the_block_raises(handled: list[int]) -> None:
    def fail() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            raise gone()

    with pytest.raises(OSError, match="not connected"):
        fail()
    assert handled == [signal.SIGTERM]


def test_signals_that_waited_come_where_they_may_and_so_do_others(handled: list[int]) -> None:
    with uninterrupted() as interruptible:
        signal.raise_signal(signal.SIGTERM)
        with interruptible():
            assert handled == [signal.SIGTERM]
            signal.raise_signal(signal.SIGINT)
            assert handled == [signal.SIGTERM, signal.SIGINT]
        signal.raise_signal(signal.SIGHUP)
        assert handled == [signal.SIGTERM, signal.SIGINT]
    assert handled == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def test_a_signal_waits_for_all_blocks_that_it_is_in(handled: list[int]) -> None:
    with uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
        assert handled == []
    assert handled == [signal.SIGTERM]


# ---- in the worker ---------------------------------------------------------------------------------------------------


def interrupt(work: Callable[[], object]) -> None:
    """Do ``work``, in which SIGTERM comes, in the worker, and see that both are left because of it."""
    codes: list[object] = []

    def watched() -> None:
        try:
            work()
        except SystemExit as end:
            codes.append(end.code)
            raise

    with pytest.raises(SystemExit) as caught, worker_folder():
        watched()
    assert [*codes, caught.value.code] == [128 + signal.SIGTERM] * 2


def test_without_a_signal_nothing_is_raised(folder: Path) -> None:
    with worker_folder():
        raise_again()
    assert not folder.exists()


def test_the_first_signal_counts_and_others_do_not_disturb_the_cleaning(folder: Path) -> None:
    cleaned = []

    def work() -> None:
        with uninterrupted() as interruptible:
            try:
                with interruptible():
                    signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)
                cleaned.append("within")
        pytest.fail("it goes on")

    def work_and_clean() -> None:
        try:
            work()
        finally:
            signal.raise_signal(signal.SIGHUP)
            cleaned.append("after")

    interrupt(work_and_clean)
    assert cleaned == ["within", "after"]
    assert not folder.exists()


def test_an_interruption_whose_place_an_error_took_is_raised_again(folder: Path) -> None:
    def work() -> None:
        try:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                raise gone()
        except OSError:
            raise_again()
        pytest.fail("it goes on")

    interrupt(work)


@pytest.mark.parametrize("where", ["block", "interruptible part"])
def test_a_waiting_signal_takes_the_place_of_an_error(where: str, folder: Path) -> None:
    def work() -> None:
        with uninterrupted() as interruptible:
            signal.raise_signal(signal.SIGTERM)
            if where == "block":
                raise gone()
            with interruptible():
                pytest.fail("it goes on")

    interrupt(work)


class Interrupted(subprocess.Popen[str]):
    """A process at whose start, before anybody knows of it, the signal comes."""

    all: ClassVar[list[Interrupted]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.all.append(self)
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Interrupted]:
    """All that were started, each with a signal."""
    monkeypatch.setattr(Interrupted, "all", [])
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    return Interrupted.all


def test_a_client_is_ended_when_the_signal_comes_at_its_start(folder: Path, processes: list[Interrupted]) -> None:
    def work() -> None:
        with started([{"loop": "lstat", "root": "/", "paths": []}] * 2):
            pytest.fail("it goes on")

    interrupt(work)
    assert [process.returncode for process in processes] == [-signal.SIGKILL]


# ---- in each moment of a run -----------------------------------------------------------------------------------------


class Moments:
    """What happens in a run; in the moment called ``when`` the signal comes."""

    def __init__(self, when: str) -> None:
        self.when = when
        self.happened: list[str] = []

    def now(self, moment: str) -> None:
        """It happens."""
        self.happened.append(moment)
        if moment == self.when:
            signal.raise_signal(signal.SIGTERM)


class Recorded(System):
    """Mounts nothing, but tells of it. ``error`` comes up at the end of unmounting, and with a signal before turns."""

    name = title = command = "recorded"

    def __init__(self, moments: Moments, error: Callable[[], OSError] | None = None) -> None:
        self.moments = moments
        self.mounted: list[Path] = []
        self._error = error

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return "1"

    def set_up(self, ground: Ground) -> None:
        self._before_turns("setting up")

    def try_out(self, ground: Ground) -> None:
        self._before_turns("trying out")
        self.moments.now("tried out")

    def mount(self, ground: Ground, place: Path) -> Mount:
        root = made(place / "root")
        self.mounted.append(root)
        self.moments.now("mounting" if len(self.mounted) == 1 else "mounting again")
        return Mount(root, ground.tree)

    def unmount(self, mount: Mount) -> None:
        self.moments.now("unmounting")
        self.mounted.remove(mount.root)
        if self._error:
            raise self._error()

    def restore(self, ground: Ground) -> None:
        self.moments.now("restoring")

    def _before_turns(self, moment: str) -> None:
        try:
            self.moments.now(moment)
        finally:
            if self._error and moment == self.moments.when:
                raise self._error()


class Lost:
    """The signal comes when this is forgotten, where exceptions are lost."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments

    def __del__(self) -> None:
        self._moments.now("forgetting")


def work_of(moments: Moments) -> type[Workload]:
    """A workload that writes and mounts a second time."""

    class Work(Workload):
        name = "work"
        title = "work"
        group = Group.LOOKUP
        steps = (Step("step", "step", Cache.ANY),)
        writes = True
        shape = Shape("tiny", "three files", lambda sizes: {"folder": 3})

        def prepare(self, place: Place) -> None:
            moments.now("preparing")

        def run(self, place: Place, step: Step) -> Outcome:
            moments.now("running")
            place.another()
            Lost(moments)
            return Outcome(1.0, 1, f"{len(os.listdir(place.stored / 'folder'))} files")

    return Work


def runner_of(folder: Path, *systems: Recorded, condition: Condition = Condition.IDLE) -> Runner:
    """Two rounds of a workload on ``systems``, which share their moments."""
    plan = Plan(
        systems=systems,
        missing={},
        workloads=(work_of(systems[0].moments),),
        conditions=(condition,),
        rounds=2,
        sizes=QUICK,
        base="",
        mirror="",
        scratch=folder,
        output=folder / "results.json",
        profile=False,
    )
    return Runner(plan, folder, lambda text: None, lambda what, where: None)


ONE_TURN = ("mounting", "preparing", "running", "mounting again", "forgetting", "unmounting", "unmounting", "restoring")
HAPPENS: dict[str, tuple[str, ...]] = {
    "mounting": ("mounting", "unmounting", "restoring"),
    "preparing": ("mounting", "preparing", "unmounting", "restoring"),
    "running": ("mounting", "preparing", "running", "unmounting", "restoring"),
    "mounting again": tuple(moment for moment in ONE_TURN if moment != "forgetting"),
    "forgetting": ONE_TURN,
    "unmounting": ONE_TURN,
    "restoring": ONE_TURN,
}
"""By the moment in which the signal comes: what happens in the turns, in all."""
BEFORE_TURNS = ["setting up", "trying out", "tried out"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [None, gone], ids=["clean", "with-an-error"])
@pytest.mark.parametrize("when", HAPPENS)
def test_an_interrupted_turn_is_undone_and_the_last(
    when: str, error: Callable[[], OSError] | None, folder: Path
) -> None:
    system = Recorded(Moments(when), error)
    runner = runner_of(folder, system)
    interrupt(runner.run)
    assert system.moments.happened == [*BEFORE_TURNS, *HAPPENS[when]]
    assert system.mounted == []
    assert runner.findings.problems == []
    assert not folder.exists()


@pytest.mark.parametrize("error", [None, gone], ids=["clean", "with-an-error"])
@pytest.mark.parametrize(
    ("when", "happens"),
    [("setting up", BEFORE_TURNS[:1]), ("trying out", BEFORE_TURNS), ("tried out", BEFORE_TURNS)],
)
def test_a_system_that_is_interrupted_before_the_turns_is_not_missing(
    when: str, happens: list[str], error: Callable[[], OSError] | None, folder: Path
) -> None:
    system = Recorded(Moments(when), error)
    runner = runner_of(folder, system)
    interrupt(runner.run)
    assert system.moments.happened == happens[: 2 if error and when == "trying out" else 3]
    assert runner.findings.missing == {}
    assert not folder.exists()


def test_an_error_of_unmounting_without_an_interruption_is_a_result(folder: Path) -> None:
    system = Recorded(Moments("never"), gone)
    runner = runner_of(folder, system)
    runner.run()
    assert [(problem.kind, problem.text) for problem in runner.findings.problems] == [("failed", f"OSError: {gone()}")]
    assert system.moments.happened == [*BEFORE_TURNS, *ONE_TURN]


def test_spinning_processes_are_ended_when_the_signal_comes_at_their_start(
    folder: Path, processes: list[Interrupted]
) -> None:
    system = Recorded(Moments("never"))
    runner = runner_of(folder, system, condition=Condition.BUSY)
    interrupt(runner.run)
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * (len(os.sched_getaffinity(0)) - 1)
    assert system.moments.happened == BEFORE_TURNS
    assert runner.findings.problems == []


class Forgetful(Recorded):
    """Shows the template itself and does not unmount it."""

    name = "forgetful"

    def mount(self, ground: Ground, place: Path) -> Mount:
        mount = super().mount(ground, place)
        subprocess.run(["mount", "--bind", str(ground.tree), str(mount.root)], check=True)
        return mount

    def unmount(self, mount: Mount) -> None:
        self.moments.now("unmounting")


def test_what_is_still_mounted_is_not_removed(folder: Path) -> None:
    moments = Moments("never")
    forgetful, other = Forgetful(moments), Recorded(moments)
    runner = runner_of(folder, forgetful, other)
    try:
        runner.run()
    finally:
        for root in forgetful.mounted:
            subprocess.run(["umount", str(root)], check=True)
    (problem,) = runner.findings.problems
    assert problem.system == "forgetful"
    assert problem.text.startswith("OSError: still mounted: ")
    assert [sample.proof for sample in runner.findings.samples] == ["3 files"] * 3
