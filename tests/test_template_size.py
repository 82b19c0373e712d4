"""Making a template stops at what it may hold, writes zeros as holes, and leaves nothing behind whatever ends it."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.test_full_disk import loop_mounted
from vzfs import FullError, Store
from vzfs.cli.app import cli
from vzfs.store.sources import SourceOptions

TOP = Path(__file__).parents[1]
MIB = 1 << 20


def run(store: Store, *words: str) -> Result:
    result = CliRunner().invoke(cli, ["--root", str(store.root), *words])
    assert "Traceback" not in result.output
    return result


def left_over(store: Store) -> list[str]:
    """What is in the store's folders of templates."""
    folder = store.layout.templates_meta
    return sorted(os.listdir(folder)) + sorted(set(os.listdir(folder.parent)) - {".vzfs"}) if folder.exists() else []


def tar_of(path: Path, **files: bytes) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def zeros_archive(path: Path, size: int) -> Path:
    """A file of so many zeros in an archive of a few kilobytes."""
    member = tarfile.TarInfo("zeros")
    member.size = size
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(member.tobuf())
        for _ in range(size // MIB):
            file.write(bytes(MIB))
        file.write(bytes(1024))
    return path


def test_zeros_become_holes_and_data_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "vz")
    noise = os.urandom(MIB)
    files = {
        "zeros": bytes(64 * MIB),
        "between": noise + bytes(8 * MIB) + noise,
        "odd": b"x" * 777 + bytes(3 * MIB + 5) + b"y",
        "tail": noise + bytes(5 * MIB),
        "few": b"a" + bytes(1000) + b"b",
        "short-zeros": bytes(100),
        "one": b"\0",
        "empty": b"",
        "noise": noise,
    }
    made = store.create_template("t", str(tar_of(tmp_path / "t.tar.gz", **files)))
    for name, data in files.items():
        assert (made.path / name).read_bytes() == data, name
    blocks = {name: (made.path / name).stat().st_blocks * 512 for name in files}
    assert blocks["zeros"] < MIB
    assert blocks["between"] < 3 * MIB
    assert blocks["odd"] < MIB
    assert blocks["tail"] < 2 * MIB
    assert made.verify() == []


def test_holes_of_a_directory_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with open(source / "sparse", "wb") as file:
        file.seek(1 << 30)
        file.write(b"end")
    store = Store(tmp_path / "vz")
    made = store.create_template("t", str(source), SourceOptions(max_size=MIB))
    assert (made.path / "sparse").stat().st_blocks * 512 < MIB


def test_an_archive_of_zeros_is_stopped(tmp_path: Path) -> None:
    archive = zeros_archive(tmp_path / "bomb.tar.gz", 256 * MIB)
    assert archive.stat().st_size < 2 * MIB
    store = Store(tmp_path / "vz")
    refused = run(store, "template", "create", "t", "--from", str(archive), "--max-size", "100M")
    assert refused.exit_code == 10
    assert "'zeros'" in refused.stderr
    assert "--max-size" in refused.stderr
    assert left_over(store) == []
    done = run(store, "template", "create", "t", "--from", str(archive), "--max-size", "256MiB", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["size"] == 256 * MIB
    assert (store.template("t").path / "zeros").stat().st_blocks * 512 < MIB


def test_what_is_free_is_the_limit_if_none_is_said(tmp_path: Path) -> None:
    archive = zeros_archive(tmp_path / "bomb.tar.gz", 256 * MIB)
    with loop_mounted(tmp_path / "image", tmp_path / "disk", 128 * MIB, "ext4") as disk:
        store = Store(disk / "vz")
        refused = run(store, "template", "create", "t", "--from", str(archive))
        assert refused.exit_code == 10
        assert "less five percent" in refused.stderr
        assert left_over(store) == []
        assert run(store, "template", "create", "t", "--from", str(archive), "--max-size", "1G").exit_code == 0


def test_a_directory_is_stopped(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(10):
        (source / f"{number}").write_bytes(os.urandom(MIB))
    os.link(source / "0", source / "again")  # the same data
    store = Store(tmp_path / "vz")
    with pytest.raises(FullError, match="bytes that the template may have"):
        store.create_template("t", str(source), SourceOptions(max_size=9 * MIB))
    assert left_over(store) == []
    store.create_template("t", str(source), SourceOptions(max_size=11 * MIB))


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5G", "1X", "9" * 30])
def test_sizes_that_are_none(tmp_path: Path, text: str) -> None:
    refused = run(Store(tmp_path), "template", "create", "t", "--from", "/etc", "--max-size", text)
    assert refused.exit_code == 2


# ------------------------------------------------------------------------------------------------------------- signals


def creating(store: Store) -> subprocess.Popen[bytes]:
    """A creation that waits for more of its archive."""
    command = [sys.executable, "-m", "vzfs", "--root", str(store.root), "template", "create", "t", "--from", "-"]
    process = subprocess.Popen(
        ["env", "--default-signal", *command],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=TOP,
    )
    member = tarfile.TarInfo("file")
    member.size = 100 * MIB
    assert process.stdin is not None
    process.stdin.write(member.tobuf() + os.urandom(4 * MIB))
    process.stdin.flush()
    end = time.monotonic() + 60
    while not list(store.root.glob("template/.vzfs/.new-*/tree/file")):
        assert time.monotonic() < end
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_after_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    store = Store(tmp_path / "vz")
    process = creating(store)
    process.send_signal(number)
    if number != signal.SIGINT:
        process.send_signal(number)  # a terminal that closes sends more than one
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, b"vzfs: interrupted")
    assert left_over(store) == []


def test_nohup_is_heeded(tmp_path: Path) -> None:
    store = Store(tmp_path / "vz")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command = [sys.executable, "-m", "vzfs", "--root", str(store.root), "template", "create", "t", "--from", "-"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=TOP)
        end = time.monotonic() + 60
        while not list(store.root.glob("template/.vzfs/.new-*/tree")):
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        process.communicate(tar_of(tmp_path / "t.tar.gz", a=b"a").read_bytes(), timeout=60)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.returncode == 0
    assert (store.template("t").path / "a").read_bytes() == b"a"
