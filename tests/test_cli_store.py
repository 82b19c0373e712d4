"""The ``vzfs`` program where things are not as expected: no store, closed or full outputs, vanishing containers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.realuse_helpers import (
    CHECKOUT,
    Rig,
    environment,
    one_engine,
    rig_fixture,  # noqa: F401
    vzfs,
)
from tests.test_cli_program import on_terminal
from vzfs import NotFoundError, Store
from vzfs.store.faults import FaultPoints


def shell(script: str, root: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which ``vzfs`` is the program on this store."""
    command = f"{sys.executable} -m vzfs --root {root}"
    return subprocess.run(
        ["bash", "-c", script.replace("vzfs", command)],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=120,
    )


# ------------------------------------------------------------------------------------------------------------ no store

LOOKING = (
    ["list"],
    ["status"],
    ["status", "101"],
    ["check", "--all"],
    ["umount", "--all"],
    ["stats", "--all"],
    ["template", "list"],
    ["template", "show", "x"],
    ["destroy", "101", "--yes"],
    ["diff", "101"],
)


@pytest.mark.parametrize("args", LOOKING, ids=" ".join)
def test_a_store_that_does_not_exist_is_an_error(tmp_path: Path, args: list[str]) -> None:
    for root in (tmp_path / "none", tmp_path):
        done = vzfs(*args, root=root, code=3)
        assert str(root) in done.stderr
        assert done.stdout == ""
        failed = vzfs("--json", *args, root=root, code=3)
        assert json.loads(failed.stderr)["error"]["exit_code"] == 3
    assert not (tmp_path / "none").exists()


def test_an_empty_root_is_refused(tmp_path: Path) -> None:
    for args in (["list"], ["doctor"], ["create", "101", "--template", "x"]):
        command = [sys.executable, "-m", "vzfs", "--root", "", *args]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "empty path" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "vzfs", "list"], env=environment(VZFS_ROOT=str(tmp_path)), capture_output=True, text=True
    )
    assert str(tmp_path) in done.stderr


# ---------------------------------------------------------------------------------------------------------------- JSON


@one_engine
def test_with_json_there_is_always_a_document(rig: Rig) -> None:
    rig.template()
    assert json.loads(vzfs("check", "--all", "--json", root=rig.root).stdout) == []
    assert json.loads(vzfs("umount", "--all", "--json", root=rig.root).stdout) == []
    assert json.loads(vzfs("stats", "--all", "--json", root=rig.root).stdout) == []
    rig.container(101).mount()
    rig.container(102)
    failed = vzfs("umount", "101", "102", "--json", root=rig.root, code=6)
    assert [one["ct"] for one in json.loads(failed.stdout)] == ["101"]
    assert json.loads(failed.stderr)["error"]["kind"] == "NotMountedError"
    gone = json.loads(vzfs("--json", "destroy", "101", "102", "--yes", root=rig.root).stdout)
    assert [one["ct"] for one in gone] == ["101", "102"]
    assert json.loads(vzfs("template", "remove", "small", "--json", root=rig.root).stdout) == [{"name": "small"}]


@one_engine
def test_check_all_skips_what_is_mounted(rig: Rig) -> None:
    rig.container(101).mount()
    rig.container(102)
    done = vzfs("check", "--all", root=rig.root)
    assert done.stdout == "container 102 is clean\n"
    assert "container 101 is skipped: " in done.stderr
    first, second = json.loads(vzfs("check", "--all", "--json", root=rig.root).stdout)
    assert "in use" in first["skipped"]
    assert (second["skipped"], second["problems"]) == (None, [])
    vzfs("check", "101", root=rig.root, code=5)


# ------------------------------------------------------------------------------------------------- coming and going


@one_engine
def test_list_while_containers_come_and_go(rig: Rig) -> None:
    rig.template()
    rig.container(1)
    end = threading.Event()

    def churn() -> None:
        store = Store(rig.root)
        while not end.is_set():
            made = [store.create(number, template="small") for number in range(100, 130)]
            for container in made:
                container.destroy()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(150):
            found = rig.store.statuses()
            assert found[0].ct == "1"
            for container in rig.store.containers():
                try:
                    container.status()
                except NotFoundError:
                    assert container.ct != "1"
        for _ in range(5):
            vzfs("list", root=rig.root)
            vzfs("status", "--json", root=rig.root)
    finally:
        end.set()
        thread.join()


# ------------------------------------------------------------------------------------------------------------- outputs


@one_engine
def test_outputs_that_take_nothing(rig: Rig) -> None:
    rig.container()
    full = shell("vzfs list >/dev/full", rig.root)
    assert (full.returncode, full.stderr) == (
        1,
        "vzfs: standard output: No space left on device\n  give the output another place\n",
    )
    closed = shell("vzfs list >&-", rig.root)
    assert (closed.returncode, closed.stderr.splitlines()[0]) == (1, "vzfs: standard output: Bad file descriptor")
    for line in ("vzfs template dump small >/dev/full", "vzfs diff 101 --json >&-", "vzfs --help >/dev/full"):
        done = shell(line, rig.root)
        assert done.returncode == 1
        assert "standard output" in done.stderr
        assert "Traceback" not in done.stderr
    for line in ("vzfs check 101 <&- 2>&-", "vzfs list <&-"):
        assert shell(line, rig.root).returncode == 0
    asked = shell("vzfs destroy 101 <&-", rig.root)
    assert asked.returncode == 2
    # What was closed doesn't become a file that is then written to.
    assert shell("vzfs create 102 --template small >&- 2>&- <&-", rig.root).returncode == 1
    assert "made" not in (rig.root / "private/102/lock").read_text() + (rig.root / "private/102/conf").read_text()


@one_engine
def test_verbose_tells_what_is_done(rig: Rig) -> None:
    rig.container()
    plain = vzfs("mount", "101", root=rig.root)
    assert plain.stderr == ""
    told = vzfs("-v", "umount", "101", root=rig.root)
    assert f"unmounted {rig.root}/root/101" in told.stderr
    assert "DEBUG" not in told.stderr
    detailed = vzfs("-vv", "mount", "101", root=rig.root)
    assert "DEBUG" in detailed.stderr
    assert "started process" in detailed.stderr
    assert detailed.stdout == plain.stdout
    assert "Traceback" in vzfs("-vv", "mount", "101", root=rig.root, code=5).stderr


@one_engine
def test_logging_to_standard_error_needs_foreground(rig: Rig) -> None:
    rig.container()
    refused = vzfs("mount", "101", "--log", "-", root=rig.root, code=2)
    assert "--foreground" in refused.stderr
    assert not rig.store.container(101).status().mounted


# ---------------------------------------------------------------------------------------------------------------- diff


@one_engine
def test_diff_for_people(rig: Rig) -> None:
    container, root = rig.mounted()
    for number in range(20):
        (root / f"opt/app/{number}").mkdir(parents=True)
        (root / f"opt/app/{number}/file").touch()
    (root / "etc/motd").write_text("mine\n")
    subprocess.run(["rm", "-r", root / "usr/lib/deep"], check=True)
    os.rename(root / "etc/passwd", root / "opt/app/passwd")
    lines = vzfs("diff", "101", root=rig.root).stdout.splitlines()
    assert "A /opt and 41 below" in lines
    assert "R /etc/passwd -> /opt/app/passwd" in lines
    removed = next(line for line in lines if line.startswith("D /usr/lib/deep"))
    assert removed == "D /usr/lib/deep and 303 below"
    assert len(lines) < 10
    everything = vzfs("diff", "101", "--all", root=rig.root).stdout.splitlines()
    assert {"A /opt", "A /opt/app/3/file", "D /usr/lib/deep/007"} <= set(everything)
    assert len(json.loads(vzfs("diff", "101", "--json", root=rig.root).stdout)) == len(everything)
    assert vzfs("diff", "101", "/etc", root=rig.root).stdout.splitlines()[0].startswith("C /etc ")
    assert {
        line[:2] for line in vzfs("diff", "101", "opt/app/3", "/opt/app/4/", root=rig.root).stdout.splitlines()
    } == {"A "}
    assert vzfs("diff", "101", "/opt/app/3", root=rig.root).stdout == "A /opt/app/3 and 1 below\n"
    counts = json.loads(vzfs("diff", "101", "--stat", "--json", root=rig.root).stdout)
    assert counts["added"] == {"total": 42, "dir": 22, "file": 20}
    assert counts["removed"]["total"] == 304
    assert counts["renamed"]["total"] == 1
    table = vzfs("diff", "101", "--stat", root=rig.root).stdout
    assert "added    42     22 dir, 20 file" in table
    arguments = ("--root", str(rig.root), "diff", "101")
    assert "\x1b[32mA /opt" in on_terminal(*arguments)[1]
    os.environ["NO_COLOR"] = "1"
    try:
        assert "\x1b[" not in on_terminal(*arguments)[1]
    finally:
        del os.environ["NO_COLOR"]
    container.umount()


# --------------------------------------------------------------------------------------------------------------- stats


@one_engine
def test_stats_of_several(rig: Rig) -> None:
    first, second = rig.container(101), rig.container(102)
    rig.container(103)
    first.mount()
    second.mount()
    both = json.loads(vzfs("stats", "101", "102", "--json", root=rig.root).stdout)
    assert [one["ct"] for one in both] == ["101", "102"]
    assert [one["ct"] for one in json.loads(vzfs("stats", "--all", "--json", root=rig.root).stdout)] == ["101", "102"]
    assert json.loads(vzfs("stats", "101", "--json", root=rig.root).stdout)["ct"] == "101"
    text = vzfs("stats", "--all", root=rig.root).stdout
    assert "container 101" in text
    assert "container 102" in text
    vzfs("stats", "101", "103", root=rig.root, code=6)
    vzfs("stats", root=rig.root, code=2)


@one_engine
def test_watching_over_a_remount_shows_no_negative_rates(rig: Rig) -> None:
    container, root = rig.mounted()
    for number in range(300):
        (root / f"tmp/{number}").touch()
    command = [sys.executable, "-m", "vzfs", "--root", rig.root, "stats", "--all", "--watch", "0.3"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        seen = ""
        while "PER SECOND" not in seen:
            seen += process.stdout.readline()
        container.umount()
        container.mount()
        for _ in range(100):
            seen += process.stdout.readline()
    finally:
        process.terminate()
        rest, _ = process.communicate()
    assert "  -" not in "".join(line for line in (seen + rest).splitlines(keepends=True) if "answered" not in line)


# ------------------------------------------------------------------------------------------------------------- the rest


def test_fault_points_with_colons_in_their_names(tmp_path: Path) -> None:
    for setting in ("rename:done", "rename:done:3", "*:5", "x"):
        FaultPoints(setting)
    program = "import vzfs.store.faults as f; f.step('rename:before'); f.step('rename:done'); print('alive')"
    for setting, code in (("rename:done", -9), ("rename:done:2", 0), ("rename:done:1", -9)):
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment(VZFS_CRASH_AT=setting), capture_output=True, cwd=CHECKOUT
        )
        assert done.returncode == code, done.stderr


def test_a_template_with_an_attribute_whose_name_is_no_text(rig: Rig) -> None:
    (rig.place / "odd").mkdir()
    os.setxattr(rig.place / "odd", b"user.\xff\xfe", b"1")
    rig.template("odd", rig.place / "odd")
    assert rig.store.template("odd").verify() == []
