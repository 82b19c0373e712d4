"""``vzfs doctor``: findings of this machine, which can run vzfs, and of machines made to lack something."""

from __future__ import annotations

import errno
import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.realuse_helpers import loop_mounted
from vzfs import doctor
from vzfs.cli.app import cli
from vzfs.doctor import Finding, Offer, can_run, decode_init, examine, nearest_directory

CHECKOUT = Path(__file__).resolve().parent.parent


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


def mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()


def test_this_machine_can_run_vzfs_and_nothing_is_left_behind(tmp_path: Path) -> None:
    before = mounts()
    root = tmp_path / "not" / "yet"
    findings = examine(root)
    assert can_run(findings), [finding for finding in findings if finding.ok == "missing"]
    assert mounts() == before
    assert list(tmp_path.iterdir()) == []
    found = by_name(findings)
    for name in ("/dev/fuse", "FUSE mount", "capabilities", "libfuse", "pyfuse3", "trusted attributes", "device nodes"):
        assert found[name].ok == "ok"
    assert "protocol 7." in found["FUSE mount"].value
    assert str(root) in found["store"].value
    assert "will be made" in found["store"].value


def test_whatever_is_not_ok_comes_with_a_remedy(tmp_path: Path) -> None:
    for finding in examine(tmp_path):
        assert finding.value
        assert (finding.ok == "ok") == (not finding.remedy), finding


def init_request(minor: int, flags: int, flags2: int | None, opcode: int = 26) -> bytes:
    body = struct.pack("<IIII", 7, minor, 131072, flags)
    if flags2 is not None:
        body += struct.pack("<I11I", flags2, *[0] * 11)
    return struct.pack("<IIQQIIIHH", 40 + len(body), opcode, 1, 0, 0, 0, 0, 0, 0) + body


@pytest.mark.parametrize(
    ("request_bytes", "offer"),
    [
        (init_request(45, 1 << 30, 1 << 5), Offer(7, 45, True, True)),
        (init_request(45, 0, 1 << 5), Offer(7, 45, False, False)),  # flags2 counts only with INIT_EXT
        (init_request(39, 1 << 30, 1 << 4), Offer(7, 39, True, False)),
        (init_request(31, 0, None), Offer(7, 31, False, False)),  # an old kernel's short request
    ],
)
def test_decode_init(request_bytes: bytes, offer: Offer) -> None:
    assert decode_init(request_bytes) == offer


@pytest.mark.parametrize("request_bytes", [b"", b"\0" * 40, init_request(45, 0, 0)[:50], init_request(45, 0, 0, 1)])
def test_decode_init_refuses_what_is_no_init(request_bytes: bytes) -> None:
    with pytest.raises(ValueError, match="FUSE_INIT"):
        decode_init(request_bytes)


def test_the_kernel_answers_a_trial_mount() -> None:
    offer = doctor.ask_kernel()
    assert offer.major == 7
    assert offer.minor >= 31


def test_root_without_capabilities_is_told_what_to_do(tmp_path: Path) -> None:
    """As in a container: uid 0, but without capabilities."""
    program = f"from vzfs.cli import main; main(['--root', '{tmp_path / 'vz'}', 'doctor', '--json'])"
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    findings = by_name([Finding(**finding) for finding in json.loads(done.stdout)])
    assert "CAP_SYS_ADMIN" in findings["capabilities"].value
    for name in ("FUSE mount", "capabilities", "trusted attributes", "device nodes"):
        assert findings[name].ok == "missing"
        assert "root" in findings[name].remedy


def test_a_missing_device_asks_for_the_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "FUSE_DEVICE", str(tmp_path / "fuse"))
    finding = by_name(examine(tmp_path))[str(tmp_path / "fuse")]
    assert finding.ok == "missing"
    assert "modprobe fuse" in finding.remedy


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    """A file system without extended attributes."""
    place = tmp_path / "ramfs"
    place.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_file_system_without_attributes_is_no_place_for_a_store(ramfs: Path) -> None:
    findings = by_name(examine(ramfs / "vz"))
    assert findings["store"].value.startswith(f"{ramfs}/vz on ramfs")
    for name in ("trusted attributes", "trusted attributes of symlinks"):
        assert findings[name].ok == "missing"
        assert "ramfs can't" in findings[name].remedy
    assert not can_run(list(findings.values()))
    assert list(ramfs.iterdir()) == []


@pytest.fixture
def nodev(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "no dev\x0b\u2028\n"  # white space to Python, but not to the kernel
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nodev,size=4m,nr_inodes=50", "none", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_nodev_and_little_room_are_noticed(nodev: Path) -> None:
    findings = by_name(examine(nodev))
    assert " on tmpfs" in findings["store"].value
    assert findings["device nodes"].ok == "missing"
    assert "nodev" in findings["device nodes"].remedy
    assert findings["free space"].ok == "warning"
    assert findings["free inodes"].ok == "warning"


@pytest.mark.parametrize(("options", "verdict"), [([], "ok"), (["-O", "^has_journal"], "warning")])
def test_ext4_without_a_journal_is_noticed(tmp_path: Path, options: list[str], verdict: str) -> None:
    with loop_mounted(tmp_path / "image", tmp_path / "there", 32 << 20, options=options) as there:
        finding = by_name(examine(there))["journal"]
    assert finding.ok == verdict
    assert ("has_journal" in finding.remedy) == (verdict == "warning")


def test_a_read_only_store_is_missing_not_a_crash(nodev: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(nodev)], check=True)
    finding = by_name(examine(nodev))["store writable"]
    assert (finding.ok, finding.value) == ("missing", f"{nodev}: {os.strerror(errno.EROFS)}")


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "vz"
    path.touch()
    finding = by_name(examine(path))["store"]
    assert finding.ok == "missing"
    assert "not a directory" in finding.value
    assert nearest_directory(path) == tmp_path


@pytest.mark.parametrize(
    ("limit", "ok"),
    [(1024, "warning"), (8192, "ok"), (resource.RLIM_INFINITY, "ok")],
    ids=["few", "enough", "no limit"],
)
def test_open_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int, ok: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, limit))
    assert by_name(examine(tmp_path))["open files"].ok == ok


@pytest.mark.parametrize("direct", [True, False])
def test_missing_programs_and_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, direct: bool) -> None:
    """Only the engine pyfuse3 needs its modules, and it has to serve where the kernel is too old for the direct one."""

    def broken(name: str) -> None:
        raise ImportError(f"libfuse3.so.3: cannot open shared object file ({name})")

    monkeypatch.setattr(doctor.shutil, "which", lambda *args, **options: None)
    monkeypatch.setattr(doctor, "import_module", broken)
    monkeypatch.setattr(doctor, "ask_kernel", lambda: Offer(7, 37 if direct else 34, direct, False))
    findings = by_name(examine(tmp_path))
    assert (findings["debootstrap"].ok, findings["fusermount3"].ok) == ("warning", "warning")
    for name in ("pyfuse3", "trio"):
        assert findings[name].ok == ("warning" if direct else "missing")
        assert ("only --engine pyfuse3" in findings[name].remedy) == direct
    assert findings["direct engine"].ok == ("ok" if direct else "warning")
    assert findings["FUSE passthrough"].ok == "warning"
    assert findings["xattr"].ok == "missing"
    assert "pip install 'pyfuse3" in findings["pyfuse3"].remedy


def test_the_command_shows_all_and_exits_7_when_something_is_missing(ramfs: Path, tmp_path: Path) -> None:
    good = CliRunner().invoke(cli, ["--root", str(tmp_path / "vz"), "doctor"])
    assert (good.exit_code, good.stdout.splitlines()[-1]) == (0, "vzfs can run here")
    bad = CliRunner().invoke(cli, ["--root", str(ramfs / "vz"), "doctor"])
    assert bad.exit_code == 7
    assert "vzfs can't run here" in bad.stdout
    assert "-> ramfs can't do it" in bad.stdout
    parsed = json.loads(CliRunner().invoke(cli, ["--root", str(ramfs), "doctor", "--json"]).stdout)
    assert {"name", "ok", "value", "remedy"} == set(parsed[0])
