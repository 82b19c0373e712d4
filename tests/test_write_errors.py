"""What a program wrote and the disk did not take: each who has the file open is told by fsync(2), once, as on ext4.

The disk is an ext4 in a file on a tmpfs that is full, so its writes fail.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import EngineStore, each_engine

MIB = 1 << 20
EXT4 = [[errno.ENOSPC] * 2, [0, 0], [0]]


@contextlib.contextmanager
def failing_disk(place: Path) -> Iterator[tuple[Path, Path]]:
    """A mounted disk, and the file that takes its last space away as long as it is there."""
    memory, disk = place / "memory", place / "disk"
    memory.mkdir()
    disk.mkdir()
    run = lambda *command: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: E731
    with contextlib.ExitStack() as ending:
        run("mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", memory)
        ending.callback(run, "umount", "--lazy", memory)
        with open(memory / "image", "wb") as image:
            image.truncate(160 * MIB)
        options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
        run("mkfs.ext4", "-q", "-E", options, "-J", "size=8", memory / "image")
        run("mount", "-o", "loop,errors=continue", memory / "image", disk)
        ending.callback(run, "umount", "--lazy", disk)
        yield disk, memory / "filler"


def fill(filler: Path) -> None:
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(MIB))
    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def outcome(fd: int) -> int:
    try:
        os.fsync(fd)
    except OSError as error:
        return error.errno or -1
    return 0


def told(path: Path, filler: Path) -> list[list[int]]:
    """What two writers, one reader and one who came later are told: at first and again."""
    writers = [os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)]
    os.pwrite(writers[0], os.urandom(24 * MIB), 0)
    fill(filler)
    first = [outcome(fd) for fd in writers]
    filler.unlink()
    again = [outcome(fd) for fd in writers]
    late = os.open(path, os.O_RDWR)
    last = [outcome(late)]
    for fd in (*writers, late):
        os.close(fd)
    return [first, again, last]


def test_what_ext4_says(tmp_path: Path) -> None:
    with failing_disk(tmp_path) as (disk, filler):
        (disk / "f").write_bytes(b"")
        os.sync()
        assert told(disk / "f", filler) == EXT4


@each_engine
@pytest.mark.parametrize("served", [False, True])
def test_everybody_is_told_of_a_failed_write(tmp_path: Path, engine: str, served: bool) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/f").write_bytes(b"template's")
    with failing_disk(tmp_path) as (disk, filler):
        store = EngineStore(disk / "vz", engine)
        store.create_template("t", str(tmp_path / "source"))
        container = store.create(101, template="t")
        with container.mounted(log=str(tmp_path / "log")) as root:
            reader = os.open(root / "f", os.O_RDONLY) if served else -1
            os.close(os.open(root / "f", os.O_WRONLY))
            os.sync()
            assert told(root / "f", filler) == EXT4
            if reader >= 0:
                os.close(reader)
