"""``debootstrap:SUITE``: Debian's tool is run safely, followed, ended and cleaned up after; once for real."""

from __future__ import annotations

import os
import pathlib
import signal
import stat
import subprocess
import time
from dataclasses import dataclass

import pytest
from test_sources import PAX, assert_same, snapshot

from tests.realuse_helpers import alive, wait_for
from vzfs.errors import SourceError, UnsupportedError, UsageError
from vzfs.store.sources import SourceOptions, bootstrap, populate


@pytest.fixture
def target(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "store" / "target"
    path.mkdir(parents=True)
    path.chmod(0o700)
    return path


@pytest.fixture
def tool(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Where a test writes a stand-in for debootstrap."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    path = folder / "debootstrap"
    path.write_text("#!/bin/sh\nexit 99\n")
    path.chmod(0o755)
    return path


def script(tool: pathlib.Path, text: str) -> None:
    tool.write_text("#!/bin/sh\n" + text)


def mounts(path: pathlib.Path) -> list[bytes]:
    return bootstrap.mounts_below(os.fsencode(path))


@dataclass(frozen=True)
class Debian:
    """A Debian root made for real, and what debootstrap said meanwhile."""

    root: pathlib.Path
    seen: list[tuple[str, int, int | None]]


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Debian:
    made = Debian(tmp_path_factory.mktemp("debian"), [])
    populate("debootstrap:bookworm", made.root, SourceOptions(), lambda *what: made.seen.append(what))
    return made


@pytest.mark.slow
def test_debian_for_real(debian: Debian) -> None:
    assert stat.S_IMODE(debian.root.stat().st_mode) == 0o755
    assert (debian.root / "etc/debian_version").read_text().startswith("12.")
    ran = subprocess.run(["chroot", debian.root, "dpkg", "--audit"], capture_output=True, check=True)
    assert ran.stdout == b""
    assert list((debian.root / "var/cache/apt/archives").glob("*.deb")) == []
    assert not (debian.root / "debootstrap").exists()
    assert mounts(debian.root) == []
    assert any(phase.startswith("Retrieving libc6") for phase, _, _ in debian.seen)
    assert [count for _, count, _ in debian.seen] == list(range(1, len(debian.seen) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["directory", "cat", "gzip -1", "xz -0", "zstd -1"])
def test_debian_as_directory_and_archive(debian: Debian, target: pathlib.Path, how: str) -> None:
    source = debian.root
    want = snapshot(debian.root)
    if how != "directory":
        source = target.parent / "archive"
        with open(source, "wb") as packed:
            make = subprocess.Popen(["tar", "-c", *PAX, "-C", debian.root, "."], stdout=subprocess.PIPE)
            subprocess.run(how.split(), stdin=make.stdout, stdout=packed, check=True)
            assert make.wait() == 0
    populate(str(source), target)
    got = snapshot(target)
    assert len(got) > 6000
    assert_same(got, want, without=("atime",))  # reading the text of links has set theirs


def test_arguments(tool: pathlib.Path, target: pathlib.Path) -> None:
    script(tool, 'for each in "$@"; do echo "I: <$each>"; done')
    seen: list[str] = []
    options = SourceOptions(
        mirror="http://deb.debian.org/debian/",
        variant="buildd",
        include=("g++", "libc6-dev", "gcc:amd64"),
        keyring="/usr/share/keyrings/debian-archive-keyring.gpg",
    )
    populate("debootstrap:bookworm", target, options, lambda phase, _done, _total: seen.append(phase))
    assert seen == [
        "<--variant=buildd>",
        "<--include=g++,libc6-dev,gcc:amd64>",
        "<--keyring=/usr/share/keyrings/debian-archive-keyring.gpg>",
        "<bookworm>",
        f"<{target}>",
        "<http://deb.debian.org/debian/>",
    ]


def test_local_mirror_and_default_variant(tool: pathlib.Path, target: pathlib.Path) -> None:
    script(tool, 'echo "$*"')
    seen: list[str] = []
    options = SourceOptions(mirror="/srv/mirror", variant=None)
    populate("debootstrap:stable", target, options, lambda phase, _done, _total: seen.append(phase))
    assert seen == [f"stable {target} file:///srv/mirror"]


@pytest.mark.parametrize(
    ("suite", "options"),
    [
        ("", SourceOptions()),
        ("--help", SourceOptions()),
        ("../bookworm", SourceOptions()),
        ("book worm", SourceOptions()),
        ("bookworm\n", SourceOptions()),
        ("$(reboot)", SourceOptions()),
        ("bookworm", SourceOptions(variant="--foreign")),
        ("bookworm", SourceOptions(variant="min base")),
        ("bookworm", SourceOptions(include=("vim", "--exclude=dpkg"))),
        ("bookworm", SourceOptions(include=("vim,--x",))),
        ("bookworm", SourceOptions(include=("",))),
        ("bookworm", SourceOptions(mirror="--no-check-gpg")),
        ("bookworm", SourceOptions(mirror="relative/path")),
        ("bookworm", SourceOptions(mirror="http://x/;reboot")),
        ("bookworm", SourceOptions(mirror="http://x/$(reboot)")),
        ("bookworm", SourceOptions(mirror="http://x/ y")),
        ("bookworm", SourceOptions(keyring="keyring.gpg")),
        ("bookworm", SourceOptions(keyring="/a b")),
    ],
)
def test_nothing_becomes_an_option_or_shell_text(
    tool: pathlib.Path, target: pathlib.Path, suite: str, options: SourceOptions
) -> None:
    script(tool, f"touch {tool}.ran")
    with pytest.raises(UsageError, match="for debootstrap"):
        populate(f"debootstrap:{suite}", target, options)
    assert not pathlib.Path(f"{tool}.ran").exists()


def test_missing_tool(target: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(bootstrap, "_PATH", "/nonexistent")
    with pytest.raises(UnsupportedError, match="apt-get install debootstrap"):
        populate("debootstrap:bookworm", target)


def test_unknown_suite_of_the_real_tool(target: pathlib.Path) -> None:
    with pytest.raises(SourceError, match="No such script") as raised:
        populate("debootstrap:no-such-suite", target)
    assert "/usr/share/debootstrap/scripts" in raised.value.remedy


def test_failure_tells_the_last_errors_and_a_remedy(tool: pathlib.Path, target: pathlib.Path) -> None:
    script(tool, "echo I: Retrieving InRelease; printf 'E: Failed getting release file http://x/\\033[31m' >&2; exit 1")
    with pytest.raises(SourceError, match=r"exit status 1: E: Failed getting release file http://x/ \[31m") as raised:
        populate("debootstrap:bookworm", target)
    assert "mirror" in raised.value.remedy


def test_killed_tool(tool: pathlib.Path, target: pathlib.Path) -> None:
    script(tool, "kill -9 $$")
    with pytest.raises(SourceError, match="signal 9: it said nothing"):
        populate("debootstrap:bookworm", target)


def test_devices_are_left_out_where_forbidden(tool: pathlib.Path, target: pathlib.Path) -> None:
    script(tool, 'mkdir -p "$3/dev/pts"; mknod "$3/dev/null" c 1 3; touch "$3/dev/file"; ln -s null "$3/dev/link"')
    populate("debootstrap:bookworm", target, SourceOptions(allow_devices=False))
    assert sorted(os.listdir(target / "dev")) == ["file", "link", "pts"]


def test_downloaded_packages_are_left_out(tool: pathlib.Path, target: pathlib.Path) -> None:
    script(tool, 'd="$3/var/cache/apt/archives"; mkdir -p "$d/partial"; touch "$d/x.deb" "$d/lock"')
    populate("debootstrap:bookworm", target)
    assert sorted(os.listdir(target / "var/cache/apt/archives")) == ["lock", "partial"]


@pytest.mark.parametrize("code", [0, 1])
def test_what_is_left_mounted_is_unmounted(tool: pathlib.Path, target: pathlib.Path, code: int) -> None:
    script(
        tool,
        'mkdir -p "$3/proc" "$3/sys"; mount -t proc proc "$3/proc"; mount -t tmpfs none "$3/sys"; mkdir "$3/sys/deep"\n'
        f'mount -t tmpfs none "$3/sys/deep"; mount -t tmpfs none "$3/sys/deep"; exit {code}\n',
    )
    if code:
        with pytest.raises(SourceError):
            populate("debootstrap:bookworm", target)
    else:
        populate("debootstrap:bookworm", target)
    assert mounts(target) == []
    assert os.listdir(target / "proc") == []


def test_mount_points_of_odd_names_are_found(tmp_path: pathlib.Path) -> None:
    """They are escaped in mountinfo; and a neighbour whose name begins the same isn't below."""
    inner, neighbour = tmp_path / "a b" / "c\td\n\\e", tmp_path / "a b2"
    for point in (inner, neighbour):
        point.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True)
    try:
        assert mounts(tmp_path / "a b") == [os.fsencode(inner)]
        bootstrap.unmount_below(os.fsencode(tmp_path / "a b"))
        assert mounts(tmp_path) == [os.fsencode(neighbour)]
    finally:
        bootstrap.unmount_below(os.fsencode(tmp_path))
    assert mounts(tmp_path) == []


def test_path_that_debootstrap_cannot_take(tool: pathlib.Path, tmp_path: pathlib.Path) -> None:
    odd = tmp_path / "my store"
    odd.mkdir()
    with pytest.raises(UnsupportedError, match=r"my store.*spaces"):
        populate("debootstrap:bookworm", odd)


class Interrupted(BaseException):
    """What KeyboardInterrupt stands for here; pytest would take the real one for its own."""


@pytest.mark.parametrize("stubborn", [False, True], ids=["willing", "stubborn"])
def test_interruption_ends_the_whole_group(
    tool: pathlib.Path, target: pathlib.Path, monkeypatch: pytest.MonkeyPatch, stubborn: bool
) -> None:
    monkeypatch.setattr(bootstrap, "_GRACE", 1.0)
    ignore = "trap '' TERM;" if stubborn else ""
    script(
        tool, f'{ignore} mkdir "$3/proc"; mount -t proc proc "$3/proc"\nsleep 1000 &\necho "pid $!"; wait; sleep 1000\n'
    )
    pids: list[int] = []

    def listen(phase: str, _done: int, _total: int | None) -> None:
        pids.append(int(phase.split()[1]))
        raise Interrupted

    with pytest.raises(Interrupted):
        populate("debootstrap:bookworm", target, SourceOptions(), listen)
    assert len(pids) == 1
    wait_for(lambda: not alive(pids[0]))
    assert mounts(target) == []


def test_a_daemon_that_a_package_started_is_ended(tool: pathlib.Path, target: pathlib.Path) -> None:
    """It keeps the pipe open: waiting for its end would last forever."""
    script(tool, 'sleep 1000 &\necho "$!" > "$3/pid"; exit 0\n')
    started = time.monotonic()
    populate("debootstrap:bookworm", target)
    assert time.monotonic() - started < 300
    wait_for(lambda: not alive(int((target / "pid").read_text())))


def test_own_signals_are_left_alone(tool: pathlib.Path, target: pathlib.Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    script(tool, "exit 0")
    populate("debootstrap:bookworm", target)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == before
