"""The measurements run, clean up after themselves and say what they found; what they found is no matter of tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import MEASUREMENTS, parse
from benchmarks.figures import Figure, Report
from benchmarks.workspace import plain_tree

TOP = Path(__file__).parents[1]


def run(scratch: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the program in ``scratch``."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "--scratch", str(scratch), *arguments],
        cwd=TOP,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def mounts_below(folder: Path, pid: int) -> bool:
    """Whether process ``pid`` sees mounts below ``folder``."""
    return f" {folder}/" in Path(f"/proc/{pid}/mountinfo").read_text()


def servers_below(folder: Path) -> list[int]:
    """Processes that serve mounts below ``folder``."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
            if "vzfs.fuse.serve" in command and f"{folder}/" in command:
                found.append(int(pid))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_quick_run_gives_figures_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    process = run(tmp_path, "--quick", "--json", name)
    output, complaints = process.communicate(timeout=300)
    assert process.returncode == 0, complaints
    result: dict[str, Any] = json.loads(output)
    (report,) = result["reports"]
    assert report["name"] == name
    assert report["what"]
    assert report["figures"]
    for figure in report["figures"]:
        assert len(figure["values"]) >= 5
        assert 0 < figure["min"] <= figure["median"] <= figure["max"]
    assert result["machine"]["kernel"] == os.uname().release
    assert servers_below(tmp_path) == []
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    process = run(tmp_path, "--quick", "memory")
    end = time.monotonic() + 60
    while not mounts_below(tmp_path, process.pid):
        assert time.monotonic() < end, "nothing was mounted"
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert servers_below(tmp_path) == []
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [["nonsense"], ["--rounds", "4"], ["--scratch", "/nowhere"]])
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.parametrize("entries", [100, 1_000, 20_000])
def test_a_generated_tree_has_the_wanted_number_of_entries(entries: int) -> None:
    tree = plain_tree(entries)
    assert 1 + len(tree) + sum(tree.values()) == entries


def test_a_table_shows_the_median_the_spread_and_the_verdict() -> None:
    figures = [
        Figure("fast", "ms", (3.0, 1.0, 2.0), target=2.5),
        Figure("slow", "ms", (3.0, 1.0, 2.0), target=2.0),
        Figure("large", "entries", (12345.0,)),
    ]
    fast, slow, large = Report("name", "what", figures).table().splitlines()[2:]
    assert [cell.strip() for cell in fast.strip("|").split("|")] == ["fast", "2 ms", "1 – 3", "< 2.50 ms", "ok"]
    assert [cell.strip() for cell in slow.strip("|").split("|")] == ["slow", "2 ms", "1 – 3", "< 2 ms", "missed"]
    assert "12,345 entries" in large
