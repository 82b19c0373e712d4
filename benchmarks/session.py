"""One run, in the worker: progress for people, results for the file."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import conditions
from benchmarks.machine import commit, machine, versions
from benchmarks.plan import Plan
from benchmarks.results import WRONG, Problem, Run, Sample, SystemInfo
from benchmarks.runner import Findings, Probe, Runner, figures, no_probe
from benchmarks.statistics import summary
from benchmarks.supervise import uninterrupted, worker_folder
from benchmarks.systems import SYSTEMS


def measure(plan: Plan, exit_problems: int) -> int:
    """Do what the plan says and write the results, also of a run that was interrupted. The exit code."""
    console = Console(stderr=True)
    about = machine(plan.scratch)
    started, load = _now(), os.getloadavg()[0]
    for name, reason in plan.missing.items():
        console.print(f"missing: {escape(name)}: {escape(reason)}", highlight=False)
    record, profiles = probe(plan)
    with worker_folder() as folder, Screen(console, plan.runs()) as screen:
        runner = Runner(plan, folder, screen.say, screen.advance, record)
        try:
            runner.run()
        except BaseException:
            runner.findings.problems.append(Problem("failed", "", "", "", "", 0, 0, "the run was interrupted"))
            raise
        finally:
            with uninterrupted():  # what was measured is kept
                result = Run(
                    machine=about,
                    versions=versions(),
                    started=started,
                    ended=_now(),
                    load_before=round(load, 2),
                    load_after=round(os.getloadavg()[0], 2),
                    commit=commit(),
                    template=_template(plan),
                    entries=runner.findings.entries,
                    quick=plan.sizes.quick,
                    rounds=plan.rounds,
                    conditions={str(one): conditions.TEXT[one] for one in plan.conditions},
                    systems=_systems(plan, runner.findings),
                    figures=figures(plan.workloads),
                    samples=tuple(runner.findings.samples),
                    problems=tuple(runner.findings.problems),
                    profiles={title: f"{folder_of_profiles(plan).name}/{name}" for title, name in profiles.items()},
                )
                _write(plan.output, result.as_json())
    tell(console, result)
    console.print(f"results: {plan.output}", markup=False, highlight=False, soft_wrap=True)
    return exit_problems if any(problem.kind in WRONG for problem in result.problems) else 0


def probe(plan: Plan) -> tuple[Probe, dict[str, str]]:
    """What records profiles, if asked for, into a folder named after the results. Raises ``UnsupportedError``."""
    if not plan.profile:
        return no_probe, {}
    from benchmarks.profile import Profiler

    folder = folder_of_profiles(plan)
    folder.mkdir(exist_ok=True)
    profiler = Profiler(folder)
    return lambda cell, system, place: profiler.probe(cell, system, 1, place), profiler.files


def folder_of_profiles(plan: Plan) -> Path:
    """Beside the results."""
    return plan.output.with_suffix(".profiles")


def _systems(plan: Plan, findings: Findings) -> tuple[SystemInfo, ...]:
    wanted = {system.name for system in plan.systems} | set(findings.missing)
    return tuple(
        SystemInfo(
            name=system.name,
            title=system.title,
            version="" if system.name in plan.missing else system.version(),
            command=system.command,
            writable=system.writable,
            missing=findings.missing.get(system.name, ""),
            peer=system.peer,
        )
        for system in (kind() for kind in SYSTEMS)
        if system.name in wanted
    )


def _template(plan: Plan) -> str:
    sizes = plan.sizes
    base = "Debian 12 (debootstrap)" if plan.base is None else Path(plan.base).name if plan.base else "no base"
    return (
        f"{base}, {sizes.small_files:,} small files, a file of {sizes.large_bytes >> 20} MiB, "
        f"a directory of {sizes.huge_entries:,} files"
    )


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class Screen:
    """Progress: a bar on a terminal, elsewhere a line for each new thing."""

    def __init__(self, console: Console, runs: int) -> None:
        self._console = console
        self._last = ""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=runs)
        self._begun = 0

    def __enter__(self) -> Screen:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """What is being made ready."""
        self._show(text, text)

    def advance(self, what: str, where: str) -> None:
        """A run begins; all before it are done."""
        self._bar.update(self._task, completed=self._begun)
        self._begun += 1
        self._show(f"{what}: {where}", what)

    def _show(self, text: str, line: str) -> None:
        self._bar.update(self._task, description=escape(text))
        if not self._console.is_terminal and line != self._last:
            self._console.print(line, markup=False, highlight=False)
        self._last = line


def tell(console: Console, run: Run) -> None:
    """The medians, in short; and what went wrong."""
    cells: dict[tuple[str, str, str, int], dict[str, list[Sample]]] = {}
    for sample in run.samples:
        key = (sample.workload, sample.step, sample.condition, sample.clients)
        cells.setdefault(key, {}).setdefault(sample.system, []).append(sample)
    systems = [system.name for system in run.systems if not system.missing]
    table = Table("figure", *systems, title="Medians; * = cache state not verified in each round")
    described = {(figure.workload, figure.step): figure for figure in run.figures}
    for (workload, step, which, clients), by_system in cells.items():
        figure = described[workload, step]
        name = f"{workload}/{step}, {which}" + (f", {clients} clients" if clients > 1 else "")
        table.add_row(escape(name), *(_cell(by_system.get(system, []), figure.unit) for system in systems))
    console.print(table)
    for kind, text, where in _gathered(run.problems):
        console.print(f"{kind}: {where}: {text}", markup=False, highlight=False)
    for system in run.systems:
        if system.missing:
            console.print(f"missing: {system.name}: {system.missing}", markup=False, highlight=False)


def _gathered(problems: Iterable[Problem]) -> Iterator[tuple[str, str, str]]:
    """Kind, text, and where: once for all places that have them in common."""
    places: dict[tuple[str, str], dict[str, None]] = {}
    for problem in problems:
        where = f"{problem.workload} on {problem.system}" if problem.workload else "the suite"
        if problem.kind in WRONG and problem.workload:
            where += (
                f", {problem.step or 'start'}, {problem.condition}, {problem.clients} clients, round {problem.round}"
            )
        places.setdefault((problem.kind, problem.text), {})[where] = None
    for (kind, text), found in places.items():
        yield kind, text, ", ".join(found)


def _cell(samples: Sequence[Sample], unit: str) -> str:
    if not samples:
        return "-"
    value = summary([sample.figure for sample in samples]).median
    text = f"{value:,.4g} {unit}" if unit else seconds(value)
    return text + ("" if all(sample.evidence.verified for sample in samples) else "*")


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"
