"""``python -m tests.behaviours DIRECTORY [NAME …] [--without FEATURE]``: judge any file system by hand.

The directory must be empty; every behaviour's seeds are planted in a folder of its own there. Exits with 1 when a
behaviour fails. Must run as root.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

from . import BEHAVIOURS, FEATURES, Behaviour, plant


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.behaviours", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help="behaviours to run; all unless given")
    parser.add_argument("--without", action="append", default=[], choices=sorted(FEATURES), help="what it lacks")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks and times")
    options = parser.parse_args()
    features = FEATURES - set(options.without)
    chosen = [BEHAVIOURS[name] for name in options.names] or list(BEHAVIOURS.values())
    failed = [one.name for one in chosen if not _passes(one, options.directory / one.name, features, options.verbose)]
    print(f"{len(chosen) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def _passes(one: Behaviour, directory: Path, features: frozenset[str], verbose: bool) -> bool:
    start = time.monotonic()
    try:
        plant(one.seeds, directory)
        one.run(directory, features)
    except Exception as error:
        print(
            f"FAILED {one.group}.{one.name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        if verbose:
            traceback.print_exc()
        return False
    if verbose:
        print(f"passed {one.group}.{one.name} {time.monotonic() - start:.3f} s")
    return True


if __name__ == "__main__":
    sys.exit(main())
