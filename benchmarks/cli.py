"""``vzfs-bench``: run, report, compare. Exit codes are those of ``vzfs.errors``, and the ones below.

Rule: what the user gave is checked completely before anything is made or mounted.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks import plan as plans
from benchmarks.supervise import is_worker, supervise
from benchmarks.workload import Condition
from vzfs.errors import UnsupportedError, VzfsError

EXIT_PROBLEMS = 11
"""The run is complete, but some system failed or gave other answers than ext4; the results say which."""
EXIT_SLOWER = 12
"""``compare``: something takes longer than before, by more than the noise."""
EXTRA = ("numpy", "scipy", "matplotlib")
CONDITIONS = [str(condition) for condition in Condition]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Measure vzfs against ext4, overlayfs and other FUSE file systems, in turns, on this machine."""


def _names(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """``--systems a,b --systems c`` is a, b, c."""
    return tuple(dict.fromkeys(name for value in values for name in value.replace(",", " ").split()))


def _list_all(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        _say_what_there_is()
        context.exit()


@cli.command()
@click.option("--quick", is_flag=True, help="Small sizes and one round, to see that it works: 2 minutes.")
@click.option("--systems", multiple=True, metavar="NAME,…", callback=_names, help="Only these (default: all).")
@click.option("--workloads", multiple=True, metavar="NAME,…", callback=_names, help="Only these workloads or groups.")
@click.option(
    "--conditions", multiple=True, metavar="NAME,…", callback=_names, help="idle, busy or both (default: both)."
)
@click.option("--rounds", type=int, help="At least 5, 1 with --quick (which are the defaults, too).")
@click.option("--tree", metavar="DIR", help="Make the template of this root tree instead of running debootstrap.")
@click.option("--mirror", metavar="URL", default="", help="For debootstrap.")
@click.option(
    "--scratch", metavar="DIR", default="/var/tmp", show_default=True, help="Where to work: on the disk to measure."
)
@click.option("--output", metavar="FILE", help="Results as JSON [vzfs-bench-DATE.json].")
@click.option(
    "--profile", is_flag=True, help="Record requests and a flame graph beside each workload, in an extra round."
)
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list_all, help="What there is.")
def run(**options: Any) -> None:
    """Measure, and write the results as JSON.

    Needs root. Everything happens below one scratch folder and in a mount namespace of its own; all of it is unmounted
    and removed at the end, after an error and after a signal as well.

    \b
    vzfs-bench run                                       everything: one to two hours
    vzfs-bench run --quick --tree /srv/debian            does it work?
    vzfs-bench run --workloads lookup,read --systems ext4,overlayfs,vzfs-direct
    """
    plan = _plan(options)
    plans.check_machine(plan)
    _need_extra()
    if not is_worker():
        sys.exit(supervise(sys.argv[1:], plan.scratch))
    from benchmarks.session import measure

    sys.exit(measure(plan, EXIT_PROBLEMS))


def _plan(options: dict[str, Any]) -> plans.Plan:
    from benchmarks.catalogue import WORKLOADS

    quick = options["quick"]
    least = plans.QUICK_ROUNDS if quick else plans.LEAST_ROUNDS
    rounds = least if options["rounds"] is None else options["rounds"]
    if rounds < least:
        raise click.UsageError(f"--rounds {rounds} is too few, {least} are the least")
    unknown = [name for name in options["conditions"] if name not in CONDITIONS]
    if unknown:
        raise click.UsageError(f"there is no condition {', '.join(unknown)}; there are {', '.join(CONDITIONS)}")
    workloads = plans.choose_workloads(options["workloads"], WORKLOADS)
    systems, missing = plans.choose_systems(options["systems"])
    base = options["tree"]
    if quick and base is None:
        base = ""
    today = datetime.datetime.now().astimezone().strftime("%Y-%m-%d-%H%M")
    return plans.Plan(
        systems=systems,
        missing=missing,
        workloads=workloads,
        conditions=tuple(Condition(name) for name in CONDITIONS if name in (options["conditions"] or CONDITIONS)),
        rounds=rounds,
        sizes=plans.sizes_for(quick=quick),
        base=os.path.abspath(base) if base else base,
        mirror=options["mirror"],
        scratch=Path(options["scratch"]).absolute(),
        output=Path(options["output"] or f"vzfs-bench-{today}.json").absolute(),
        profile=options["profile"],
    )


def _say_what_there_is() -> None:
    from benchmarks.catalogue import WORKLOADS
    from benchmarks.systems import SYSTEMS

    click.echo("systems:")
    for system in (kind() for kind in SYSTEMS):
        click.echo(f"  {system.name:<16} {system.missing() or system.title}")
    group = ""
    for workload in WORKLOADS:
        if workload.group != group:
            group = workload.group
            click.echo(f"{group}:")
        click.echo(f"  {workload.name:<24} {workload.title}")


@cli.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Where to write [beside RESULTS].")
@click.option(
    "--document",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also replace the generated part of this Markdown page, with its plots beside it.",
)
def report(results: Path, output: Path | None, document: Path | None) -> None:
    """Make a page (HTML), and Markdown with SVG plots, of the results of a run."""
    _need_extra()
    from benchmarks.report import write_report
    from benchmarks.results import Run

    for path in write_report(Run.load(results), output or results.parent, document=document):
        click.echo(path)


@cli.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Also what did not change by more than the noise.")
@click.option("--systems", multiple=True, metavar="NAME,…", callback=_names, help="Only these.")
@click.option(
    "--least",
    type=click.FloatRange(0, 1000),
    default=5.0,
    show_default=True,
    metavar="PERCENT",
    help="Changes smaller than this don't matter.",
)
def compare(old: Path, new: Path, everything: bool, systems: tuple[str, ...], least: float) -> None:
    """Say which figures of run NEW differ from run OLD by more than the noise."""
    _need_extra()
    from benchmarks.compare import changes, show
    from benchmarks.results import Run

    before, after = Run.load(old), Run.load(new)
    found = changes(before, after, systems, least / 100)
    show(before, after, found, everything=everything)
    if any(change.verdict == "slower" for change in found):
        sys.exit(EXIT_SLOWER)


def _need_extra() -> None:
    """Raises ``UnsupportedError`` when the libraries of the extra ``bench`` are not installed."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"not installed: {', '.join(missing)}", remedy="tools/install --bench")


def main() -> None:
    """The program."""
    _with_errors(cli)


def _with_errors(command: Callable[[], None]) -> None:
    try:
        command()
    except VzfsError as error:
        click.echo(f"vzfs-bench: {error.message}", err=True)
        if error.remedy:
            click.echo(f"  {error.remedy}", err=True)
        sys.exit(error.exit_code)
