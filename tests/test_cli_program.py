"""The ``vzfs`` program in processes of its own, on a real store with real mounts."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent


def vzfs(*args: str, root: Path | None = None, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """``python -m vzfs`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    environment.pop("VZFS_DEBUG", None)
    before = ["--root", str(root)] if root else []
    command = [sys.executable, "-m", "vzfs", *before, *args]
    done = subprocess.run(
        command,
        env=environment,
        text=True,
        errors="surrogateescape",
        capture_output=True,
        timeout=60,
        check=False,
        **options,
    )
    assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def imported(*args: str) -> set[str]:
    """Top-level modules that a command loads."""
    program = "import sys, atexit; atexit.register(lambda: print('\\n'.join(sys.modules), file=sys.stderr));"
    done = subprocess.run(
        [sys.executable, "-c", f"{program} from vzfs.cli import main; main({list(args)!r})"],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        text=True,
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return {line.split(".")[0] for line in done.stderr.splitlines()}


HEAVY = {"rich", "trio", "pyfuse3", "asyncio"}


@pytest.mark.parametrize("args", [["--help"], ["mount", "--help"], ["completion", "zsh"]], ids=" ".join)
def test_starting_loads_nothing_heavy(args: list[str]) -> None:
    assert imported(*args) & HEAVY == set()


def test_the_program_exits_2_on_usage_errors_and_0_on_help() -> None:
    assert "Examples:" in vzfs("--help").stdout
    assert "No such command" in vzfs("launch", code=2).stderr


def test_output_that_the_terminal_cannot_encode_is_escaped() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from vzfs.cli import main; main(['Zürich-東京'])"],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONIOENCODING": "latin-1"},
        encoding="latin-1",
        check=False,
        capture_output=True,
    )
    assert done.returncode == 2
    assert "No such command 'Zürich-\\u6771\\u4eac'" in done.stderr


def on_terminal(*args: str, answer: str = "") -> tuple[int, str]:
    """Run ``python -m vzfs`` with a terminal for everything: the exit code and what the terminal showed."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vzfs", *args],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "TERM": "xterm", "COLUMNS": "120"},
        stdin=side,
        stdout=side,
        stderr=side,
    )
    os.close(side)
    os.write(main, answer.encode())
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # EIO: the last writer is gone
            break
        if not part:
            break
        shown += part
    os.close(main)
    return process.wait(timeout=60), shown.decode(errors="replace")


# A real store


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small root directory to make templates of."""
    top = tmp_path / "source"
    for folder in ("etc", "usr/bin", "usr/share/doc/vzfs"):
        (top / folder).mkdir(parents=True)
    (top / "etc/motd").write_text("from the template\n")
    (top / "etc/odd\\name\x1b").write_text("odd\n")
    (top / "usr/bin/tool").write_text("#!/bin/sh\necho tool\n")
    (top / "usr/bin/tool").chmod(0o755)
    (top / "bin").symlink_to("usr/bin")
    for number in range(200):
        (top / f"usr/share/doc/vzfs/{number}").write_text(f"{number}\n" * 50)
    return top


def unmount_below(place: Path) -> None:
    """Whatever a failed test left mounted."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        point = line.split(" ")[1].encode().decode("unicode_escape")
        if Path(point).is_relative_to(place):
            subprocess.run(["umount", "--lazy", point], check=False)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """An empty store; everything is unmounted at the end."""
    place = tmp_path / "vz"
    yield place
    unmount_below(place)


@pytest.fixture
def store(root: Path, source: Path) -> Path:
    """A store with template ``small`` and container 101."""
    vzfs("template", "create", "small", "--from", str(source), root=root)
    vzfs("create", "101", "--template", "small", root=root)
    return root


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def mounted(where: Path) -> bool:
    return os.path.ismount(where)


def parsed(*args: str, root: Path, code: int = 0) -> Any:
    return json.loads(vzfs(*args, "--json", root=root, code=code).stdout)


def test_the_whole_life_of_two_containers(root: Path, source: Path) -> None:
    info = parsed("template", "create", "small", "--from", str(source), root=root)
    assert info["name"] == "small"
    assert info["entries"] >= 210
    assert vzfs("template", "verify", "small", root=root).stdout == "template small is as it was sealed\n"

    made = parsed("create", "101", "--template", "small", root=root)
    assert (made["ct"], made["template"], made["mounted"]) == ("101", "small", False)
    vzfs("create", "102", "--template", "small", "--name", "web", root=root)
    assert [one["name"] for one in parsed("list", root=root)] == [None, "web"]

    first = Path(vzfs("mount", "101", root=root).stdout.rstrip("\n"))
    second = Path(parsed("mount", "web", root=root)["mountpoint"])
    assert (first, second) == (root / "root/101", root / "root/102")
    assert all(one["mounted"] and one["pid"] for one in parsed("status", root=root))
    (first / "etc/motd").write_text("from 101\n")
    (first / "etc/new\x07").touch()
    (first / "usr/bin/tool").unlink()
    assert (second / "etc/motd").read_text() == "from the template\n"
    assert (root / "template/small/etc/motd").read_text() == "from the template\n"
    assert (second / "usr/bin/tool").exists()

    lines = vzfs("diff", "101", root=root).stdout.splitlines()
    assert "A /etc/new\\x07" in lines
    assert "D /usr/bin/tool" in lines
    assert any(line.startswith("C /etc/motd (content") for line in lines)
    assert vzfs("diff", "web", root=root).stdout == ""
    changed = {change["path"]: change for change in parsed("diff", "101", "--content", root=root)}
    assert "+from 101" in changed["/etc/motd"]["content"].splitlines()

    vzfs("umount", "--all", root=root)
    assert not mounted(first)
    assert not mounted(second)
    assert vzfs("check", "--all", root=root).stdout == "container 101 is clean\ncontainer 102 is clean\n"
    vzfs("destroy", "101", "web", "--yes", root=root)
    assert parsed("list", root=root) == []
    vzfs("template", "remove", "small", root=root)
    assert parsed("template", "list", root=root) == []


def test_failures_have_their_exit_codes(store: Path) -> None:
    assert "202" in vzfs("mount", "202", root=store, code=3).stderr
    assert "nosuch" in vzfs("create", "102", "--template", "nosuch", root=store, code=3).stderr
    vzfs("template", "show", "nosuch", root=store, code=3)
    vzfs("create", "101 or so", "--template", "small", root=store, code=2)
    vzfs("template", "create", "../evil", "--from", "/etc", root=store, code=2)
    vzfs("create", "101", "--template", "small", root=store, code=4)
    vzfs("template", "create", "small", "--from", "/etc", root=store, code=4)
    vzfs("umount", "101", root=store, code=6)
    assert "101" in vzfs("template", "remove", "small", root=store, code=5).stderr
    vzfs("mount", "101", root=store)
    vzfs("mount", "101", root=store, code=5)
    vzfs("destroy", "101", "--yes", root=store, code=5)
    error = json.loads(vzfs("mount", "101", "--json", root=store, code=5).stderr)["error"]
    assert (error["kind"], error["exit_code"]) == ("BusyError", 5)
    assert "101" in error["message"]


def test_a_root_in_use_is_busy_until_it_is_detached(store: Path) -> None:
    where = Path(vzfs("mount", "101", root=store).stdout.strip())
    with open(where / "etc/motd") as stream:
        vzfs("umount", "101", root=store, code=5)
        assert mounted(where)
        vzfs("umount", "101", "--lazy", root=store)
        assert not mounted(where)
        assert stream.read() == "from the template\n"


def test_a_container_elsewhere_read_only(store: Path, tmp_path: Path) -> None:
    place, where = tmp_path / "srv" / "ve" / "103", tmp_path / "mnt"
    place.parent.mkdir(parents=True)
    where.mkdir()
    vzfs("create", str(place), "--template", "small", "--mountpoint", str(tmp_path / "other"), root=store)
    assert [one["ct"] for one in parsed("list", root=store)] == ["101"]
    try:
        assert vzfs("mount", str(place), str(where), "--ro", root=store).stdout == f"{where}\n"
        assert (where / "bin/tool").read_text().startswith("#!/bin/sh")
        with pytest.raises(OSError, match="Read-only"):
            (where / "etc/motd").write_text("no")
        assert parsed("status", str(place), root=store)["read_only"] is True
        vzfs("umount", str(place), root=store)
    finally:
        unmount_below(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_serving_in_the_foreground_until_a_signal(store: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "vzfs", "--root", str(store), "mount", "101", "--foreground", "--log", "-"]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            where = store / "root/101"
            wait_for(lambda: mounted(where))
            wait_for(lambda: parsed("status", "101", root=store)["pid"] == process.pid)
            (where / "etc/motd").write_text("changed\n")
            process.send_signal(number)
            _, log = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0, log
    assert "Traceback" not in log
    assert not mounted(where)
    assert vzfs("diff", "101", root=store).stdout.startswith("C /etc/motd")


def test_check_reports_and_repairs(store: Path) -> None:
    where = Path(vzfs("mount", "101", root=store).stdout.strip())
    (where / "etc/motd").write_text("mine\n")
    vzfs("umount", "101", root=store)
    link = store / "private/101/private/broken"
    link.symlink_to("//vz/template/small/never/was")
    ((result,)) = parsed("check", "101", root=store, code=1)
    assert [problem["repaired"] for problem in result["problems"]] == [False]
    assert "broken" in result["problems"][0]["path"]
    assert "[repaired]" in vzfs("check", "101", "--repair", root=store).stdout
    assert parsed("check", "101", root=store)[0]["problems"] == []
    assert (store / "private/101/private/etc/motd").read_text() == "mine\n"


def test_verify_finds_a_changed_template(store: Path) -> None:
    (store / "template/small/etc/motd").write_text("from the TEMPLATE\n")
    assert "/etc/motd" in vzfs("template", "verify", "small", root=store, code=1).stdout


def test_names_in_dump_are_escaped(store: Path) -> None:
    text = vzfs("template", "dump", "small", root=store).stdout
    assert "motd" in text
    assert "\x1b" not in text


def test_a_template_from_standard_input(root: Path) -> None:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as archive:
        member = tarfile.TarInfo("etc/motd")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"hi\n"))
    command = [sys.executable, "-m", "vzfs", "--root", str(root), "template", "create", "piped", "--from", "-"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, env=environment, input=memory.getvalue(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (root / "template/piped/etc/motd").read_text() == "hi\n"


def test_an_interrupted_creation_leaves_nothing_behind(root: Path) -> None:
    command = [sys.executable, "-m", "vzfs", "--root", str(root), "template", "create", "half", "--from", "-"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stderr
        member = tarfile.TarInfo("big")
        member.size = 1 << 30
        process.stdin.write(member.tobuf() + b"x" * 100_000)
        process.stdin.flush()
        wait_for(lambda: any(path.name == "big" for path in root.rglob("*")))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        message = process.stderr.read().decode()
    assert message.strip() == "vzfs: interrupted"
    assert [path for path in root.rglob("*") if not path.is_dir()] == []
    assert parsed("template", "list", root=root) == []


def test_a_full_disk_is_told_as_such_and_leaves_nothing(tmp_path: Path, source: Path) -> None:
    place = tmp_path / "full"
    place.mkdir()
    (source / "big").write_bytes(os.urandom(3 << 20))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)], check=True)
    try:
        message = vzfs("template", "create", "big", "--from", str(source), root=place, code=10).stderr
        assert "space" in message
        assert parsed("template", "list", root=place) == []
        assert os.statvfs(place).f_bfree > os.statvfs(place).f_blocks // 2
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_user_who_is_not_root_gets_an_answer(store: Path) -> None:
    """The modules are loaded first: the checkout may lie where only root can read."""
    program = (
        "import os, json, vzfs.api; from vzfs.cli import main;"
        f"os.setgid(65534); os.setuid(65534); main(['--root', '{store}', 'mount', '101'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "root" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_loads_nothing_heavy(store: Path) -> None:
    assert imported("--root", str(store), "status") & HEAVY == set()
    assert imported("--root", str(store), "list", "--json") & HEAVY == set()


def test_nobody_reads_the_output(store: Path) -> None:
    command = f"{sys.executable} -m vzfs --root {store} template dump small; echo $? >&2"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        ["sh", "-c", command], env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.stderr == "141\n"


# On a terminal


def test_destroy_asks_on_a_terminal(store: Path) -> None:
    code, shown = on_terminal("--root", str(store), "destroy", "101", answer="n\n")
    assert code == 0
    assert "[y/N]" in shown
    assert (store / "private/101").exists()
    code, _ = on_terminal("--root", str(store), "destroy", "101", answer="y\n")
    assert code == 0
    assert not (store / "private/101").exists()


def test_tables_and_progress_on_a_terminal(root: Path, source: Path) -> None:
    code, shown = on_terminal("--root", str(root), "template", "create", "small", "--from", str(source))
    assert code == 0
    assert "\x1b[" in shown, "no progress was drawn"
    assert "template small: " in shown
    code, shown = on_terminal("--root", str(root), "template", "list")
    assert code == 0
    assert "small" in shown
    assert "─" in shown


def test_sigterm_leaves_nothing_of_a_template_that_was_being_made(tmp_path: Path) -> None:
    root = tmp_path / "store"
    command = [sys.executable, "-m", "vzfs", "--root", str(root), "template", "create", "t", "--from", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        work = root / "template/.vzfs"
        while not (work.is_dir() and any(name.startswith(".new-t-") for name in os.listdir(work))):
            time.sleep(0.01)
        process.terminate()
        assert process.stderr is not None
        assert b"interrupted" in process.stderr.read()
    assert process.returncode == 130
    assert os.listdir(work) == []
    assert os.listdir(root / "template") == [".vzfs"]


def test_a_relative_ve_root_is_refused(store: Path) -> None:
    vzfs("create", "106", "--template", "small", root=store)
    with open(store / "private/106/conf", "a") as conf:
        conf.write('VE_ROOT="srv/$VEID"\n')
    refused = vzfs("mount", "106", root=store, code=2)
    assert "'srv/106'" in refused.stderr
    assert "VE_ROOT" in refused.stderr
    assert "106" in vzfs("list", root=store).stdout
    vzfs("destroy", "106", "--yes", root=store)
