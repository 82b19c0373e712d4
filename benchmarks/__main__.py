"""Run measurements; see ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from benchmarks.figures import Report
from benchmarks.workspace import bench, machine

MEASUREMENTS = ("container_creation", "first_write", "mount_time", "memory", "lookup_cost", "request_cost")
LEAST_ROUNDS = 5
NAMESPACE_VARIABLE = "VZFS_BENCH_NAMESPACE"
"""Set in the process that has its mount namespace."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure vzfs. A figure is the median over the rounds, with the smallest and the largest value.",
    )
    parser.add_argument(
        "measurements", nargs="*", metavar="MEASUREMENT", help=f"of {', '.join(MEASUREMENTS)}; all by default"
    )
    parser.add_argument("--rounds", type=int, default=7, help=f"rounds, at least {LEAST_ROUNDS} (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the size, to see that it works")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--scratch", default="/var/tmp", metavar="DIR", help="where the scratch folder is made (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.measurements) - set(MEASUREMENTS))
    if unknown:
        parser.error(f"there is no measurement {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
    if options.rounds < LEAST_ROUNDS:
        parser.error(f"--rounds {options.rounds} is too few; {LEAST_ROUNDS} are the least")
    if os.geteuid() != 0:
        parser.error("measuring needs root, to mount")
    if not os.path.isdir(options.scratch):
        parser.error(f"--scratch {options.scratch} is no directory")
    if options.quick:
        options.rounds = LEAST_ROUNDS
    return options


def enter_namespace() -> None:
    """Start over in a mount namespace of its own.

    A namespace that another program makes meanwhile, a container's for example, would get copies of the mounts, which
    would keep serving processes from ending.
    """
    if NAMESPACE_VARIABLE not in os.environ:
        os.environ[NAMESPACE_VARIABLE] = "1"
        python = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", *python])


def main() -> int:
    """Run what the command line asks for; 0 when every target was met, else 1."""
    options = parse()
    enter_namespace()
    about = machine(Path(options.scratch))
    reports: list[Report] = []
    if not options.json:
        print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n", flush=True)
    with bench(options.scratch, rounds=options.rounds, quick=options.quick) as place:
        for name in options.measurements or MEASUREMENTS:
            place.say(name)
            report = importlib.import_module(f"benchmarks.{name}").measure(place)
            reports.append(report)
            if not options.json:
                print(report.text(), flush=True)
    about["load_after"] = round(os.getloadavg()[0], 2)
    if options.json:
        print(json.dumps({"machine": about, "reports": [report.as_dict() for report in reports]}, indent=1))
    missed = any(figure.verdict == "missed" for report in reports for figure in report.figures)
    return 1 if missed and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
