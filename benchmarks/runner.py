"""Measure: systems in turns, a fresh mount for each, caches made and checked, answers compared.

Rule: whatever a workload or a system does, the next one finds the machine as if it had not been: mounts are taken away,
folders removed, ext4's copy restored, and a failure becomes a ``Problem`` in the results. An interruption is none: it
waits while something is mounted or taken away, and then ends the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import caches
from benchmarks.conditions import Spinners, condition, last_cpu
from benchmarks.plan import Cell, Plan
from benchmarks.results import Evidence, Figure, Latency, Problem, Sample
from benchmarks.supervise import raise_again, uninterrupted
from benchmarks.systems import Ground, Mount, System
from benchmarks.template import make_shape, make_template
from benchmarks.workload import Cache, Condition, Facts, Outcome, Place, Skip, Step, Workload
from vzfs.errors import VzfsError
from vzfs.fuse.table import mount_table

TEMPLATE = "bench"
STEP_TIMEOUT_S = 300.0
"""Upon which the serving processes of a mount are killed, so that whoever waits for them gets an error."""
LONG = 300

Advance = Callable[[str, str], None]
"""Told before each run of a workload: what, on which system."""
Probe = Callable[[Cell, System, Place], contextlib.AbstractContextManager[None]]
"""Around the steps of round 0: profiles, which would distort a figure; nothing of that round is kept but they."""
PROFILE_ROUND = 0


@dataclasses.dataclass(slots=True)
class Findings:
    """What came out so far."""

    samples: list[Sample] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    """Systems that turned out not to work."""
    entries: int = 0


@contextlib.contextmanager
def no_probe(cell: Cell, system: System, place: Place) -> Iterator[None]:
    """Nothing is recorded beside the measurement."""
    yield


class Runner:
    """Does what a plan says, in ``folder``, noting what it finds in ``findings``."""

    def __init__(
        self, plan: Plan, folder: Path, say: Callable[[str], None], advance: Advance, probe: Probe = no_probe
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.findings = Findings(missing=dict(plan.missing))
        self._say = say
        self._advance = advance
        self._probe = probe
        self._numbers = itertools.count()
        self._broken: set[tuple[str, str]] = set()

    def run(self) -> None:
        """Everything. Ends early only by an error of the suite itself or a signal; ``findings`` is right even then."""
        for name, workloads in self.plan.by_shape():
            with self._ground(name, workloads) as (ground, facts):
                systems = self._set_up(ground)
                for cell in self.plan.cells():
                    if cell.workload in workloads:
                        self._cell(cell, ground, facts, systems)

    @contextlib.contextmanager
    def _ground(self, name: str, workloads: Sequence[type[Workload]]) -> Iterator[tuple[Ground, Facts]]:
        folder = self.folder / (name or TEMPLATE)
        try:
            folder.mkdir()
            tree = folder / "tree"
            if shape := workloads[0].shape:
                self._say(f"making a template of {shape.title}")
                tree.mkdir()
                facts = make_shape(tree, shape, self.plan.sizes)
            else:
                plan = self.plan
                facts = make_template(tree, plan.sizes, plan.base, plan.mirror, workloads, self._say)
                self.findings.entries = facts.entries
            changed = any(workload.writes for workload in workloads)
            (folder / "systems").mkdir()
            yield Ground(tree, folder / "systems", TEMPLATE, changed), facts
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _set_up(self, ground: Ground) -> list[System]:
        """The systems that can be used; the others are noted as missing, with the reason."""
        ready = []
        for system in self.plan.systems:
            if system.name in self.findings.missing:
                continue
            self._say(f"setting up {system.name}")
            try:
                system.set_up(ground)
                with uninterrupted():
                    system.try_out(ground)
            except (VzfsError, OSError) as error:
                raise_again()
                self.findings.missing[system.name] = str(error)
            else:
                ready.append(system)
        return ready

    def _cell(self, cell: Cell, ground: Ground, facts: Facts, systems: Sequence[System]) -> None:
        workload = cell.workload
        able = [system for system in systems if system.writable or not workload.writes]
        for system in systems:
            if system not in able:
                self._problem("skipped", cell, system, 0, "", "can't be written to without changing the template")
        if workload.needs_programs and not facts.programs:
            for system in able:
                self._problem("skipped", cell, system, 0, "", "the template has no programs (sh, perl, dpkg)")
            return
        with uninterrupted() as interruptible, condition(cell.condition) as spinners, interruptible():
            for turn in range(0 if self.plan.profile else 1, self.plan.rounds + 1):
                for system in able:
                    raise_again()
                    name = f"{workload.name}, {cell.condition}, {cell.clients} clients, round {turn}"
                    self._advance(name, system.name)
                    if (workload.name, system.name) not in self._broken:
                        self._turn(cell, ground, facts, system, turn, spinners)
        self._compare(cell)

    def _turn(self, cell: Cell, ground: Ground, facts: Facts, system: System, turn: int, spinners: Spinners) -> None:
        """One workload on one system, from mounting to removing."""
        folder = self.folder / f"turn{next(self._numbers)}"
        workload = cell.workload()
        step: Step | None = None
        try:
            with uninterrupted() as interruptible, ExitStack() as stack:
                folder.mkdir()
                stack.callback(_remove, folder)
                if workload.writes:
                    stack.callback(system.restore, ground)
                mounts: list[Mount] = []
                another = functools.partial(self._mount, stack, cell, ground, facts, system, turn, folder, mounts)
                place = another()
                with _watchdog(mounts):
                    with interruptible():
                        workload.prepare(place)
                    probe = self._probe(cell, system, place) if turn == PROFILE_ROUND else contextlib.nullcontext()
                    with probe, interruptible():
                        for step in workload.steps:
                            if step.cache is Cache.ALL and cell.clients > 1:
                                continue
                            self._step(cell, workload, step, system, turn, place, spinners)
        except Skip as skip:
            self._problem("skipped", cell, system, turn, "", str(skip))
        except Exception as error:  # noqa: BLE001  whatever a system does wrong is a result
            raise_again()
            self._broken.add((workload.name, system.name))
            text = f"{type(error).__name__}: {error}"[:LONG]
            self._problem("failed", cell, system, turn, step.name if step else "", text)

    def _mount(
        self,
        stack: ExitStack,
        cell: Cell,
        ground: Ground,
        facts: Facts,
        system: System,
        turn: int,
        folder: Path,
        mounts: list[Mount],
    ) -> Place:
        """Mount one more container of ``system``; unmounted with ``stack``."""
        own = folder / f"mount{len(mounts)}"
        scratch = own / "scratch"
        scratch.mkdir(parents=True)
        system.furnish(ground, own)
        with uninterrupted():
            mount = system.mount(ground, own)
            stack.callback(system.unmount, mount)
        mounts.append(mount)
        return Place(
            system=system.name,
            root=mount.root,
            stored=mount.stored,
            scratch=scratch,
            servers=mount.servers,
            facts=facts,
            sizes=self.plan.sizes,
            clients=cell.clients,
            condition=cell.condition,
            rng=random.Random(f"{cell.workload.name} {turn}"),
            another=functools.partial(self._mount, stack, cell, ground, facts, system, turn, folder, mounts),
            kept=mount.kept,
        )

    def _step(
        self, cell: Cell, workload: Workload, step: Step, system: System, turn: int, place: Place, spinners: Spinners
    ) -> None:
        resident = caches.make(step, place)
        load = os.getloadavg()[0]
        before, spun, start = caches.level(), spinners.cpu_seconds(), time.monotonic()
        try:
            outcome = workload.run(place, step)
        except Skip as skip:
            self._problem("skipped", cell, system, turn, step.name, str(skip))
            return
        elapsed, after = time.monotonic() - start, caches.level()
        if turn == PROFILE_ROUND:
            return
        text = caches.check(step, outcome, place.clients, before, after, resident)
        busy = cell.condition is Condition.BUSY
        evidence = Evidence(
            dentries=before.dentries,
            dentries_grown=after.dentries - before.dentries,
            cached_kib=before.cached_kib,
            cached_grown_kib=after.cached_kib - before.cached_kib,
            resident=resident,
            spinner=min(1.0, (spinners.cpu_seconds() - spun) / elapsed) if busy else -1.0,
            server_cpus=tuple(last_cpu(pid) for pid in place.servers),
            load=load,
            verified=not text,
            text=text,
        )
        self.findings.samples.append(
            Sample(
                workload=workload.name,
                step=step.name,
                system=system.name,
                condition=str(cell.condition),
                clients=cell.clients,
                round=turn,
                figure=outcome.seconds / outcome.operations if outcome.value is None else outcome.value,
                seconds=outcome.seconds,
                operations=outcome.operations,
                bytes=outcome.bytes,
                proof=outcome.proof,
                latency=latency(outcome),
                evidence=evidence,
                extra=dict(outcome.extra),
            )
        )

    def _compare(self, cell: Cell) -> None:
        """Note which systems gave other answers than the first one (ext4, if it is there) did in the same round."""
        first: dict[tuple[str, int], Sample] = {}
        for sample in self.findings.samples:
            if (sample.workload, sample.clients, sample.condition) != (
                cell.workload.name,
                cell.clients,
                str(cell.condition),
            ):
                continue
            other = first.setdefault((sample.step, sample.round), sample)
            if sample.proof != other.proof:
                text = f"{sample.proof[:LONG]} instead of {other.system}'s {other.proof[:LONG]}"
                system = next(one for one in self.plan.systems if one.name == sample.system)
                self._problem("differs", cell, system, sample.round, sample.step, text)

    def _problem(self, kind: str, cell: Cell, system: System, turn: int, step: str, text: str) -> None:
        problem = Problem(
            kind, cell.workload.name, step, system.name, str(cell.condition), cell.clients, turn, text.strip()
        )
        # What is skipped is skipped in each round; once is enough.
        if kind == "skipped":
            problem = dataclasses.replace(problem, round=0)
        if problem not in self.findings.problems:
            self.findings.problems.append(problem)


def latency(outcome: Outcome) -> Latency | None:
    """Percentiles by nearest rank."""
    if not outcome.latencies_ns:
        return None
    values = sorted(outcome.latencies_ns)

    def percentile(per_mille: int) -> int:
        return values[max(0, -(-len(values) * per_mille // 1000) - 1)]

    return Latency(len(values), percentile(500), percentile(990), percentile(999), values[-1])


def figures(workloads: Sequence[type[Workload]]) -> tuple[Figure, ...]:
    """Descriptions of all their steps."""
    return tuple(
        Figure(
            workload=workload.name,
            step=step.name,
            group=str(workload.group),
            workload_title=workload.title,
            title=step.title,
            cache=str(step.cache),
            cache_text=caches.TEXT[step.cache],
            unit=step.unit,
            throughput=step.throughput,
        )
        for workload in workloads
        for step in workload.steps
    )


@contextlib.contextmanager
def _watchdog(mounts: Sequence[Mount]) -> Iterator[None]:
    """Kill the servers of ``mounts`` when the block takes too long: a thread, since the main one may wait for them."""

    def bite() -> None:
        for pid in [pid for mount in mounts for pid in mount.servers]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(STEP_TIMEOUT_S, bite)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _remove(folder: Path) -> None:
    """Remove a folder, unless something is mounted there still: that may be the template or ext4's copy."""
    left = [entry.mountpoint for entry in mount_table() if entry.mountpoint.startswith(f"{folder}/")]
    if left:
        raise OSError(f"still mounted: {', '.join(left)}")
    shutil.rmtree(folder)
