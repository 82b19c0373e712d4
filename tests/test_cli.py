"""The command line: help, errors, exit codes and output forms, on a store made of values.

The program on a real store, with real mounts, is in test_cli_program.py.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from vzfs.cli.app import cli
from vzfs.cli.base import Command, Group
from vzfs.cli.progress import _amount
from vzfs.cli.show import duration, escape_name, plain, printable, size
from vzfs.errors import BusyError, DamagedError, FullError, NotFoundError, NotMountedError, SourceError, VzfsError
from vzfs.store.problem import Problem

CHECKOUT = Path(__file__).resolve().parent.parent


# A store made of values


@dataclass(frozen=True, slots=True)
class FakeStatus:
    ct: str
    path: str
    template: str
    mounted: bool
    mountpoint: str | None
    pid: int | None
    engine: str | None
    since: float | None
    read_only: bool
    protocol: str | None = None
    flags: tuple[str, ...] | None = None
    passthrough: bool | None = None
    max_write: int | None = None
    state: str = "stopped"
    name: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class FakeChange:
    kind: str
    path: str
    type: str = "file"
    what: tuple[str, ...] = ()
    old_path: str | None = None
    content: str | None = None


@dataclass(frozen=True, slots=True)
class FakeInfo:
    name: str
    entries: int = 6768
    files: int = 5000
    directories: int = 900
    size: int = 3 << 20
    created: float = 1_700_000_000.0
    source: str = "debootstrap:bookworm"
    ino_base: int = 1 << 32
    index_size: int = 4096
    used_by: list[str] = field(default_factory=lambda: ["101"])
    digest: str | None = None
    problem: str | None = None


@dataclass
class FakeContainer:
    alias: str
    is_mounted: bool = False
    changes: list[FakeChange] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    failure: BaseException | None = None
    calls: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return Path("/store/private") / self.alias

    @property
    def ct(self) -> str:
        return self.alias

    @property
    def conf(self) -> dict[str, str]:
        return {"NAME": "web" if self.alias == "101" else ""}

    def is_served(self) -> bool:
        return self.is_mounted

    def status(self) -> FakeStatus:
        where = f"/store/root/{self.alias}" if self.is_mounted else None
        pid = 4242 if self.is_mounted else None
        return FakeStatus(
            self.alias,
            str(self.path),
            "debian-12",
            self.is_mounted,
            where,
            pid,
            "pyfuse3",
            1_700_000_000.0,
            False,
            state="mounted" if self.is_mounted else "stopped",
            name=self.conf["NAME"] or None,
        )

    def _call(self, name: str, *args: Any) -> None:
        self.calls.append((name, args))
        if self.failure is not None:
            raise self.failure

    def mount(self, mountpoint: str | None = None, **options: Any) -> Path:
        self._call("mount", mountpoint, options)
        return Path(mountpoint or f"/store/root/{self.alias}")

    def serve(self, mountpoint: str | None = None, **options: Any) -> None:
        self._call("serve", mountpoint, options)

    def umount(self, *, lazy: bool = False, everywhere: bool = False) -> None:
        self._call("umount", lazy, everywhere)

    def destroy(self) -> None:
        self._call("destroy")

    def diff(self, content: bool = False) -> Iterator[FakeChange]:
        self._call("diff", content)
        yield from self.changes

    def check(self, repair: bool = False) -> list[Problem]:
        self._call("check", repair)
        return self.problems


@dataclass
class FakeTemplate:
    name: str
    lines: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    failure: BaseException | None = None

    @property
    def path(self) -> Path:
        return Path("/store/template") / self.name

    def info(self) -> FakeInfo:
        return FakeInfo(self.name)

    def summary(self) -> FakeInfo:
        return self.info()

    def dump(self) -> Iterator[str]:
        yield from self.lines

    def verify(self, progress: Callable[[str, int, int | None], None]) -> list[Problem]:
        progress("verify", 1, 2)
        return self.problems

    def remove(self) -> None:
        if self.failure is not None:
            raise self.failure


@dataclass
class FakeStore:
    """What the commands see as ``vzfs.api.Store``; ``made`` remembers the arguments of creations."""

    cts: list[FakeContainer] = field(default_factory=list)
    tpls: list[FakeTemplate] = field(default_factory=list)
    made: list[tuple[Any, ...]] = field(default_factory=list)
    roots: list[str | None] = field(default_factory=list)

    def __call__(self, root: str | None = None) -> FakeStore:
        self.roots.append(root)
        return self

    def containers(self) -> list[FakeContainer]:
        return self.cts

    exists = True
    root = Path("/store")

    def statuses(self) -> list[FakeStatus]:
        return [one.status() for one in self.cts]

    def mounted_at(self, path: str) -> None:
        return None

    def container(self, ct: str | Path) -> FakeContainer:
        for one in self.cts:
            if str(ct) in (one.alias, str(one.path), one.conf.get("NAME")):
                return one
        raise NotFoundError(f"no container {ct}", remedy="vzfs list shows what there is")

    def templates(self) -> list[FakeTemplate]:
        return self.tpls

    def template(self, name: str) -> FakeTemplate:
        return next(one for one in self.tpls if one.name == name)

    def create(self, ct: str, **options: Any) -> FakeContainer:
        self.made.append((ct, options))
        return FakeContainer(ct)

    def create_template(self, name: str, source: str, options: Any, progress: Any) -> FakeTemplate:
        self.made.append((name, source, options))
        return FakeTemplate(name)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    fake = FakeStore(
        cts=[FakeContainer("101", is_mounted=True), FakeContainer("102")], tpls=[FakeTemplate("debian-12")]
    )
    module = types.ModuleType("vzfs.api")
    module.Store = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vzfs.api", module)
    monkeypatch.delenv("VZFS_ROOT", raising=False)
    monkeypatch.delenv("VZFS_DEBUG", raising=False)
    return fake


def run(*args: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, list(args))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    return result


# Help


def commands(group: Group, path: tuple[str, ...] = ("vzfs",)) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


assert isinstance(cli, Group)
COMMANDS = dict(commands(cli))


def test_every_command_of_the_reference_exists() -> None:
    template = {f"vzfs template {name}" for name in ("create", "list", "show", "dump", "verify", "remove")}
    others = (
        "create",
        "list",
        "status",
        "stats",
        "mount",
        "umount",
        "diff",
        "check",
        "destroy",
        "doctor",
        "completion",
        "template",
    )
    assert {" ".join(path) for path in COMMANDS} == {"vzfs", *template, *(f"vzfs {name}" for name in others)}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_has_a_description_and_examples_of_this_very_command(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    assert isinstance(command, Command | Group)
    text = run(*path[1:], "--help").stdout
    assert "Examples:\n" in text
    assert command.help
    assert command.examples
    for line, meaning in command.examples:
        assert f"  {line}\n" in text, "an example must not be wrapped, or it can't be copied"
        assert meaning in text
        if len(path) > 1:
            assert re.search(rf"\bvzfs\b.*\b{path[-1]}\b", line)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_examples_of_the_help_can_be_parsed(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    assert isinstance(command, Command | Group)
    for line, _ in command.examples:
        for call in re.findall(r"(?:^|[|(])\s*(vzfs [^|()<>]*)", line):
            words = shlex.split(call.rstrip(' "'))[1:]
            with cli.make_context("vzfs", list(words)) as ctx:
                assert isinstance(ctx.command, Group)
                _parse(ctx)


def _parse(ctx: click.Context) -> None:
    """Resolve and parse sub-commands as click does, without running any."""
    while isinstance(ctx.command, Group):
        rest = [*ctx._protected_args, *ctx.args]
        name, command, rest = ctx.command.resolve_command(ctx, rest)
        assert command is not None
        ctx = command.make_context(name, rest, parent=ctx)


def test_no_command_prints_the_help_and_fails() -> None:
    result = run(code=2)
    assert "Commands:" in result.stderr
    assert result.stdout == ""


def test_version() -> None:
    assert re.fullmatch(r"vzfs \S.*\n", run("--version").stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_accepted_by_their_shell(shell: str) -> None:
    script = run("completion", shell).stdout
    assert "_VZFS_COMPLETE" in script
    if shell == "bash":
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")


def complete(*words: str, incomplete: str = "") -> list[str]:
    found = ShellComplete(cli, {}, "vzfs", "_VZFS_COMPLETE").get_completions(list(words), incomplete)
    return [item.value for item in found]


def test_completion_knows_containers_and_templates(store: FakeStore) -> None:
    assert complete("mount") == ["101", "web", "102"]
    assert complete("status", incomplete="w") == ["web"]
    assert complete("mount", incomplete="/srv/v") == ["/srv/v"]
    assert complete("template", "create", "x", "--from", incomplete="/sr") == ["/sr"]
    assert complete("diff", incomplete="102") == ["102"]
    assert complete("create", "5", "--template", incomplete="deb") == ["debian-12"]
    assert complete("template", "show") == ["debian-12"]
    assert "umount" in complete(incomplete="u")
    assert complete("stats", incomplete="10") == ["101", "102"]
    assert complete("mount", "101", "--engine") == ["auto", "direct", "pyfuse3"]
    assert "--busy-poll" in complete("mount", incomplete="--b")
    assert "--watch" in complete("stats", "101", incomplete="--w")


def test_completion_of_an_unreadable_store_is_empty(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[FakeContainer]:
        raise DamagedError("no store")

    monkeypatch.setattr(store, "containers", broken)
    assert complete("mount") == []


# Failures


@pytest.mark.parametrize(
    ("error", "code", "texts"),
    [
        (NotFoundError("no container 9", remedy="vzfs list shows them"), 3, ["vzfs: no container 9", "  vzfs list"]),
        (BusyError("101 is mounted", remedy="vzfs umount 101"), 5, ["vzfs: 101 is mounted", "  vzfs umount 101"]),
        (NotMountedError("101 is not mounted"), 6, ["vzfs: 101 is not mounted"]),
        (SourceError("bad archive"), 8, ["vzfs: bad archive"]),
        (DamagedError("index torn"), 9, ["vzfs: index torn"]),
        (FullError("no space"), 10, ["vzfs: no space"]),
        (
            OSError(errno.ENOSPC, "No space left on device", "/vz/x"),
            10,
            ["vzfs: no space left for /vz/x", "  free some"],
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 10, ["vzfs: no space left for the store"]),
        (PermissionError(errno.EACCES, "Permission denied", b"/vz/y"), 7, ["vzfs: /vz/y: Permission denied"]),
        (OSError(errno.EROFS, "Read-only file system", "/vz/z"), 1, ["vzfs: /vz/z: Read-only", "  remount"]),
        (OSError(errno.ELOOP, "Too many levels", "/vz/l"), 1, ["vzfs: /vz/l: Too many levels", "  vzfs could not"]),
        (KeyboardInterrupt(), 130, ["vzfs: interrupted"]),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, []),  # told by the exit code alone
        (SourceError("member \x1b[31m\x07evil"), 8, ["vzfs: member \\x1b[31m\\x07evil"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_failures_name_the_thing_and_the_remedy(
    store: FakeStore, error: BaseException, code: int, texts: list[str]
) -> None:
    store.cts[0].failure = error
    result = run("diff", "101", code=code)
    for text in texts:
        assert text in result.stderr
    assert "\x1b" not in result.stderr
    if isinstance(error, VzfsError):
        assert error.exit_code == code


def test_an_unexpected_failure_is_short_and_says_where_its_traceback_is(store: FakeStore) -> None:
    store.cts[0].failure = ZeroDivisionError("by accident")
    result = run("diff", "101", code=70)
    first, second = result.stderr.splitlines()
    assert first == "vzfs: internal error: ZeroDivisionError: by accident"
    found = re.search(r"/\S+/vzfs-error-\S+\.log", second)
    assert found
    log = Path(found[0])
    try:
        assert "Traceback" in log.read_text()
        assert log.stat().st_mode & 0o777 == 0o600
    finally:
        log.unlink()


@pytest.mark.parametrize("how", ["--verbose", "environment"])
def test_a_traceback_is_shown_when_asked_for(store: FakeStore, how: str) -> None:
    store.cts[0].failure = NotFoundError("gone")
    args = ["--verbose", "diff", "101"] if how == "--verbose" else ["diff", "101"]
    result = CliRunner().invoke(cli, args, env={"VZFS_DEBUG": "1"} if how == "environment" else {})
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("vzfs: gone\n")


def test_failures_as_json(store: FakeStore) -> None:
    store.cts[0].failure = BusyError("101 is mounted", remedy="vzfs umount 101")
    result = run("diff", "101", "--json", code=5)
    assert json.loads(result.stderr) == {
        "error": {
            "kind": "BusyError",
            "message": "101 is mounted",
            "remedy": "vzfs umount 101",
            "exit_code": 5,
            "log": None,
        }
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["mount"], "Missing argument 'CT_ID'."),
        (["mount", "101", "--enginee", "auto"], "No such option"),
        (["mount", "101", "--engine", "steam"], "'steam' is not one of"),
        (["launch"], "No such command 'launch'."),
        (["create", "101"], "Missing option '--template'."),
        (["template", "create", "x"], "Missing option '--from'."),
        (["umount"], "no container was given"),
        (["umount", "101", "--all"], "both CT_ID and --all were given"),
        (["check"], "no container was given"),
        (["destroy", "101"], "standard input is no terminal"),
        (["completion", "tcsh"], "'tcsh' is not one of"),
        (["template", "create", "x", "--from", "/tmp", "--variant", "minbase"], "for debootstrap only"),
    ],
    ids=" ".join,
)
def test_usage_errors_exit_2_and_point_to_the_help(store: FakeStore, args: list[str], message: str) -> None:
    first, *rest = run(*args, code=2).stderr.splitlines()
    assert first.startswith("vzfs: ")
    assert message in first
    assert any("--help'" in line or "--yes" in line or "debootstrap:SUITE" in line for line in rest), rest
    error = json.loads(run("--json", *args, code=2).stderr)["error"]
    assert error["exit_code"] == 2
    assert message in error["message"]


# Output


ODD = "/odd\udcff\x1b[2J\\name\nnext"


def test_names_are_escaped_for_people_and_programs(store: FakeStore) -> None:
    store.cts[0].changes = [FakeChange("added", ODD)]
    assert run("diff", "101").stdout == "A /odd\\xff\\x1b[2J\\\\name\\nnext\n"
    (change,) = json.loads(run("diff", "101", "--json").stdout)
    assert change["path"] == "/odd\\xff\x1b[2J\\\\name\nnext"


def test_escape_name_is_reversible_for_bytes() -> None:
    name = bytes(range(1, 256)).replace(b"/", b"")
    text = escape_name(name)
    assert text.isascii() or text.isprintable()
    back = re.sub(
        r"\\(x..|[ntr\\])",
        lambda found: (
            {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}.get(found[1]) or os.fsdecode(bytes([int(found[1][1:], 16)]))
        ),
        text,
    )
    assert os.fsencode(back) == name


def test_printable_hides_what_a_terminal_obeys() -> None:
    assert printable("a\u202eb\x9bc\x7f") == "a\\u202eb\\x9bc\\x7f"
    assert printable("Ünïcode \\ stays") == "Ünïcode \\ stays"


def test_plain_turns_values_into_json() -> None:
    value = plain({"path": Path("/a"), "problems": [Problem("/p\udc80", "orphan", "x\\y")], "count": 1, "none": None})
    assert value == {
        "path": "/a",
        "problems": [{"path": "/p\\x80", "kind": "orphan", "detail": "x\\y", "repaired": False}],
        "count": 1,
        "none": None,
    }


def test_sizes() -> None:
    assert [size(count) for count in (0, 1023, 1536, 5 << 20, 3 << 30, 2 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.0 GiB",
        "2.0 TiB",
    ]


def test_amounts_of_progress_have_rates() -> None:
    assert _amount(3 << 30, 6 << 30, 210 << 20, in_bytes=True) == "3.0 GiB of 6.0 GiB, 210.0 MiB/s"
    assert _amount(1200, 6768, 850.4, in_bytes=False) == "1,200 of 6,768, 850/s"
    assert _amount(1200, None, None, in_bytes=False) == "1,200"


def test_durations() -> None:
    minute = 60_000_000_000
    spans = (0, 850, 1_500, 12_345, 4_500_000, 999_999_999, 1_500_000_000, 59 * 10**9)
    assert [duration(ns) for ns in spans] == [
        "0 ns",
        "850 ns",
        "1.5 µs",
        "12 µs",
        "4.5 ms",
        "1000 ms",
        "1.5 s",
        "59 s",
    ]
    spans = (minute, 59 * minute, 60 * minute, 192 * minute, 48 * 60 * minute, 50 * 60 * minute)
    assert [duration(ns) for ns in spans] == ["1 min", "59 min", "1 h 0 min", "3 h 12 min", "2 d 0 h", "2 d 2 h"]


def test_diff_lines(store: FakeStore) -> None:
    store.cts[0].changes = [
        FakeChange("added", "/new"),
        FakeChange("added", "/link", what=("links",)),
        FakeChange("changed", "/etc/motd", what=("mode", "content"), content="-old\n+new\x1b[0m\n"),
        FakeChange("removed", "/gone", type="dir"),
        FakeChange("renamed", "/b", old_path="/a", what=("mode",)),
        FakeChange("renamed", "/d", old_path="/c"),
    ]
    assert run("diff", "101", "--content").stdout.splitlines() == [
        "A /new",
        "A /link (links)",
        "C /etc/motd (mode, content)",
        "-old",
        "+new\\x1b[0m",
        "D /gone",
        "R /a -> /b (mode)",
        "R /c -> /d",
    ]
    assert store.cts[0].calls == [("diff", (True,))]
    parsed = json.loads(run("--json", "diff", "web").stdout)
    assert [change["kind"] for change in parsed] == ["added", "added", "changed", "removed", "renamed", "renamed"]
    assert parsed[2]["what"] == ["mode", "content"]
    store.cts[0].changes = []
    assert json.loads(run("diff", "101", "--json").stdout) == []


def test_list_and_status(store: FakeStore) -> None:
    assert [line.split() for line in run("list").stdout.splitlines()] == [
        ["CT", "NAME", "TEMPLATE", "STATE", "MOUNTPOINT"],
        ["101", "web", "debian-12", "mounted", "/store/root/101"],
        ["102", "-", "debian-12", "stopped", "-"],
    ]
    first, second = json.loads(run("list", "--json").stdout)
    assert (first["ct"], first["name"], first["mounted"], first["pid"]) == ("101", "web", True, 4242)
    assert (second["ct"], second["name"], second["mounted"], second["mountpoint"]) == ("102", None, False, None)
    assert json.loads(run("status", "web", "--json").stdout) == first
    assert [one["ct"] for one in json.loads(run("status", "--json").stdout)] == ["101", "102"]
    assert re.search(r"^pid: +4242$", run("status", "101").stdout, re.MULTILINE)
    assert run("status").stdout.splitlines()[2].startswith("102  stopped")


def test_root_comes_from_the_option_then_the_environment(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run("list")
    monkeypatch.setenv("VZFS_ROOT", "/from-environment")
    run("list")
    run("--root", "/from-option", "list")
    assert store.roots == [None, "/from-environment", "/from-option"]


def test_create_passes_everything_on(store: FakeStore) -> None:
    run("create", "/srv/ve/103", "--template", "debian-12", "--name", "db", "--mountpoint", "/mnt/db")
    assert store.made == [
        ("/srv/ve/103", {"template": "debian-12", "name": "db", "mountpoint": "/mnt/db", "userns_uid": None})
    ]
    assert json.loads(run("create", "104", "--template", "debian-12", "--json").stdout)["ct"] == "104"


def test_mount_passes_everything_on(store: FakeStore) -> None:
    mount = ["mount", "101", "/mnt/x", "--ro", "--engine", "pyfuse3", "--sync", "full", "--log", "/var/log/x"]
    assert run(*mount).stdout == "/mnt/x\n"
    options = {"read_only": True, "engine": "pyfuse3", "sync": "full", "log": "/var/log/x", "busy_poll_us": 0}
    options |= {"passthrough_above": None}
    options["mkdir"] = False
    served = dict(options)
    options |= {"timeout": 60.0, "cgroup": "auto"}
    run(*mount, "--foreground")
    run("mount", "102")
    assert store.cts[0].calls == [("mount", ("/mnt/x", options)), ("serve", ("/mnt/x", served))]
    run("mount", "102", "--engine", "direct", "--busy-poll", "150")
    defaults = {"read_only": False, "engine": "auto", "sync": "data", "log": None, "busy_poll_us": 0}
    defaults |= {"passthrough_above": None}
    defaults |= {"timeout": 60.0, "mkdir": False, "cgroup": "auto"}
    polling = {**defaults, "engine": "direct", "busy_poll_us": 150}
    assert store.cts[1].calls == [("mount", (None, defaults)), ("mount", (None, polling))]
    assert "'auto', 'direct', 'pyfuse3'" in run("mount", "102", "--engine", "best", code=2).stderr


def test_umount_all_takes_the_mounted_ones(store: FakeStore) -> None:
    run("umount", "--all", "--lazy")
    assert store.cts[0].calls == [("umount", (True, False))]
    assert store.cts[1].calls == []


def test_one_failing_container_does_not_stop_the_others(store: FakeStore) -> None:
    store.cts[0].failure = BusyError("101 is in use")
    result = run("umount", "101", "102", code=5)
    assert "vzfs: 101 is in use" in result.stderr
    assert store.cts[1].calls == [("umount", (False, False))]


@pytest.mark.parametrize(("repaired", "code"), [(True, 0), (False, 1)])
def test_check_exits_1_only_if_problems_remain(store: FakeStore, repaired: bool, code: int) -> None:
    store.cts[0].problems = [Problem("cow/stage/1", "leftover", "interrupted copy-up", repaired)]
    text = run("check", "--all", "--repair", code=code).stdout
    assert "101: cow/stage/1: leftover: interrupted copy-up" in text
    assert ("[repaired]" in text) == repaired
    assert "container 102 is clean" in text
    first, second = json.loads(run("check", "--all", "--json", code=code).stdout)
    assert first["ct"] == "101"
    assert first["problems"][0]["repaired"] == repaired
    assert second["problems"] == []


def test_destroy_with_yes(store: FakeStore) -> None:
    run("destroy", "101", "102", "--yes")
    assert [one.calls for one in store.cts] == [[("destroy", ())], [("destroy", ())]]


def test_templates(store: FakeStore) -> None:
    fetch = ("--from", "debootstrap:bookworm", "--mirror", "http://m.example/", "--variant", "buildd")
    made = run("template", "create", "web", *fetch, "--include", "nginx,openssl", "--include", "vim", "--no-devices")
    assert made.stdout == "template web: 6,768 entries, 3.0 MiB, sealed\n"
    name, source, options = store.made[0]
    assert (name, source) == ("web", "debootstrap:bookworm")
    assert (options.mirror, options.variant) == ("http://m.example/", "buildd")
    assert (options.include, options.allow_devices) == (("nginx", "openssl", "vim"), False)
    run("template", "create", "web", "--from", "debootstrap:bookworm")
    run("template", "create", "web", "--from", "debootstrap:bookworm", "--variant", "base")
    assert [options.variant for _, _, options in store.made[1:]] == ["minbase", None]

    assert run("template", "list").stdout.splitlines()[1].startswith("debian-12  6,768    3.0 MiB  2023-11-1")
    assert json.loads(run("template", "list", "--json").stdout)[0]["used_by"] == ["101"]
    assert "debootstrap:bookworm" in run("template", "show", "debian-12").stdout
    shown = json.loads(run("template", "show", "debian-12", "--json").stdout)
    assert (shown["path"], shown["entries"]) == ("/store/template/debian-12", 6768)
    store.tpls[0].lines = ["0 dir 0755 /", "1 file 0644 /\x1b"]
    assert run("template", "dump", "debian-12").stdout == "0 dir 0755 /\n1 file 0644 /\\x1b\n"


def test_template_verify_exits_1_when_something_differs(store: FakeStore) -> None:
    assert run("template", "verify", "debian-12").stdout == "template debian-12 is as it was sealed\n"
    assert json.loads(run("template", "verify", "debian-12", "--json").stdout) == []
    store.tpls[0].problems = [Problem("/bin/sh", "digest", "differs")]
    assert run("template", "verify", "debian-12", code=1).stdout.startswith("/bin/sh: digest: differs\n")
    (problem,) = json.loads(run("template", "verify", "debian-12", "--json", code=1).stdout)
    assert problem["path"] == "/bin/sh"


def test_template_remove(store: FakeStore) -> None:
    assert run("template", "remove", "debian-12").stdout == "template debian-12 removed\n"
    store.tpls[0].failure = BusyError("template debian-12 is used by 101", remedy="destroy them first")
    run("template", "remove", "debian-12", code=5)


# Names that a terminal would obey

HOSTILE = "/a\x9b31m\x1b]0;x\x07\u202eb\u2066c\x7f\u2028d\u200fe\ufeff\udc9b\U000e0001"


@pytest.mark.parametrize("words", [["diff", "101"], ["check", "101"], ["list"], ["status"], ["template", "list"]])
@pytest.mark.parametrize("as_json", [False, True])
def test_no_output_has_control_characters_or_bidirectional_marks(
    store: FakeStore, words: list[str], as_json: bool
) -> None:
    one = store.cts[0]
    one.changes = [FakeChange("renamed", HOSTILE, old_path=HOSTILE, content=HOSTILE)]
    one.problems = [Problem(HOSTILE, "mode", HOSTILE)]
    one.alias = HOSTILE if words[0] in ("list", "status") else one.alias
    store.tpls = [FakeTemplate(HOSTILE)]
    result = run(*words, *(["--json"] if as_json else []), code=1 if words[0] == "check" else 0)
    assert [char for char in result.stdout if not char.isprintable() and char != "\n"] == []
    if as_json:
        told = json.loads(result.stdout)[0]
        told = told["problems"][0] if words[0] == "check" else told
        name = told["name"] if words[0] == "template" else told["path"]
        assert HOSTILE.replace("\udc9b", "\\x9b") in name  # the same for programs


def test_failures_have_no_control_characters_either(store: FakeStore) -> None:
    store.cts[0].failure = BusyError(HOSTILE, remedy=HOSTILE)
    for extra in ([], ["--json"]):
        result = run(*extra, "umount", "101", code=5)
        assert [char for char in result.stderr if not char.isprintable() and char != "\n"] == []
