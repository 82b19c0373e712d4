"""Executing files: binaries, scripts, setuid programs, and files that are busy."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from pathlib import Path

from .base import behaviour
from .place import ALICE, ALICES, STAFF, Place, append, expect_errno, get, open_close, opened, patch, put
from .seeds import File, HardLink, Symlink

ID = Path("/usr/bin/id").read_bytes()
SLEEP = Path("/bin/sleep").read_bytes()
SCRIPT = b"#!/bin/sh\necho script $1\n"


def run(*command: str | Path) -> bytes:
    """A command's output; raises OSError when it can't be started and CalledProcessError when it fails."""
    return subprocess.run(command, check=True, capture_output=True).stdout


@behaviour(seeds=[File("bin/id", ID, mode=0o755)])
def binary_of_seed_runs(d: Place) -> None:
    assert run(d / "bin/id", "-u") == b"0\n"
    assert d.alice(run, "bin/id", "-u") == b"%d\n" % ALICE


@behaviour(seeds=[File("bin/script", SCRIPT, mode=0o755)])
def script_of_seed_runs(d: Place) -> None:
    assert run(d / "bin/script", "one") == b"script one\n"
    append(d / "bin/script", b"echo more\n")
    assert run(d / "bin/script", "two") == b"script two\nmore\n"


@behaviour(seeds=[File("bin/id", ID, mode=0o644)])
def execution_needs_the_bit(d: Place) -> None:
    expect_errno(errno.EACCES, run, d / "bin/id", "-u")
    os.chmod(d / "bin/id", 0o744)
    assert run(d / "bin/id", "-u") == b"0\n"
    expect_errno(errno.EACCES, d.alice, run, "bin/id", "-u")
    os.chmod(d / "bin/id", 0o711)
    assert d.alice(run, "bin/id", "-u") == b"%d\n" % ALICE  # executable without being readable
    expect_errno(errno.EACCES, d.alice, get, "bin/id")


@behaviour()
def program_made_here_runs(d: Place) -> None:
    put(d / "id", ID)
    os.chmod(d / "id", 0o755)
    assert run(d / "id", "-u") == b"0\n"
    os.rename(d / "id", d / "renamed")
    assert run(d / "renamed", "-u") == b"0\n"


@behaviour(seeds=[File("bin/id", ID, mode=0o755), Symlink("sbin", "bin"), HardLink("id2", "bin/id")])
def program_runs_through_links(d: Place) -> None:
    assert run(d / "sbin/id", "-u") == run(d / "id2", "-u") == b"0\n"


@behaviour(seeds=[File("bin/id", ID, mode=0o4755)])
def setuid_program_of_seed_works(d: Place) -> None:
    assert d.alice(run, "bin/id", "-u") == b"0\n"
    assert d.alice(run, "bin/id", "-ru") == b"%d\n" % ALICE


@behaviour(seeds=[File("bin/id", ID, mode=0o2755, gid=STAFF)])
def setgid_program_of_seed_works(d: Place) -> None:
    assert d.alice(run, "bin/id", "-g") == b"%d\n" % STAFF
    assert d.alice(run, "bin/id", "-rg") == b"%d\n" % ALICES


@behaviour(seeds=[File("bin/id", ID, mode=0o755)])
def setuid_bit_set_here_works(d: Place) -> None:
    os.chown(d / "bin/id", ALICE, ALICES)
    os.chmod(d / "bin/id", 0o4755)
    assert d.bob(run, "bin/id", "-u") == b"%d\n" % ALICE


@behaviour(seeds=[File("bin/sleep", SLEEP, mode=0o755)])
def running_program_is_busy(d: Place) -> None:
    process = subprocess.Popen([d / "bin/sleep", "60"])
    try:
        expect_errno(errno.ETXTBSY, open_close, d / "bin/sleep", os.O_WRONLY)
        expect_errno(errno.ETXTBSY, open_close, d / "bin/sleep", os.O_RDWR)
        expect_errno(errno.ETXTBSY, os.truncate, d / "bin/sleep", 0)
        assert get(d / "bin/sleep") == SLEEP
    finally:
        process.kill()
        process.wait()
    append(d / "bin/sleep", b"x")


@behaviour(seeds=[File("bin/id", ID, mode=0o755)])
def file_open_for_writing_does_not_run(d: Place) -> None:
    with opened(d / "bin/id", os.O_WRONLY):
        expect_errno(errno.ETXTBSY, run, d / "bin/id", "-u")
    assert run(d / "bin/id", "-u") == b"0\n"


@behaviour(seeds=[File("bin/sleep", SLEEP, mode=0o755)])
def running_program_is_replaced(d: Place) -> None:
    process = subprocess.Popen([d / "bin/sleep", "60"])
    try:
        put(d / "bin/new", ID)
        os.chmod(d / "bin/new", 0o755)
        os.rename(d / "bin/new", d / "bin/sleep")
        assert run(d / "bin/sleep", "-u") == b"0\n"
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@behaviour(seeds=[File("bin/sleep", SLEEP, mode=0o755)])
def running_program_is_unlinked(d: Place) -> None:
    process = subprocess.Popen([d / "bin/sleep", "60"])
    try:
        os.unlink(d / "bin/sleep")
        assert get(f"/proc/{process.pid}/exe") == SLEEP
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@behaviour(seeds=[File("bin/junk", b"\0\1\2\3", mode=0o755), File("bin/lost", b"#!/none/such\n", mode=0o755)])
def execution_errors(d: Place) -> None:
    expect_errno(errno.ENOEXEC, run, d / "bin/junk")
    expect_errno(errno.ENOENT, run, d / "bin/lost")
    expect_errno(errno.EACCES, run, d / "bin")
    expect_errno(errno.ENOENT, run, d / "bin/none")


@behaviour(seeds=[File("bin/id", ID, mode=0o755)])
def program_changed_after_a_run(d: Place) -> None:
    assert run(d / "bin/id", "-u") == b"0\n"
    put(d / "bin/id", SCRIPT)
    assert run(d / "bin/id", "now") == b"script now\n"


@behaviour(seeds=[File("bin/id", ID, mode=0o755)])
def program_patched_after_a_run(d: Place) -> None:
    assert run(d / "bin/id", "-u") == b"0\n"
    patch(d / "bin/id", len(ID), b"appended")
    assert get(d / "bin/id") == ID + b"appended"
    assert run(d / "bin/id", "-u") == b"0\n"


@behaviour(seeds=[File("bin/id", ID, mode=0o755)])
def program_is_mapped_executable(d: Place) -> None:
    with opened(d / "bin/id") as fd:
        view = mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
        assert view[:4] == b"\x7fELF"
        view.close()


@behaviour(seeds=[File("bin/id", ID, mode=0o755)])
def program_runs_by_descriptor(d: Place) -> None:
    with opened(d / "bin/id") as fd:
        os.unlink(d / "bin/id")
        process = subprocess.run([f"/proc/self/fd/{fd}", "-u"], capture_output=True, check=True, pass_fds=[fd])
    assert process.stdout == b"0\n"
