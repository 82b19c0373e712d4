"""Set-user-ID and set-group-ID bits: who changes a program may not leave it with another's powers.

Each way of writing is tried on the container's own file, on a file as it was found and on one of several names, through
a descriptor from before the bits were set, one from after it, and one that root opened and handed on.
"""

from __future__ import annotations

import mmap
import os
import shutil
import stat
import subprocess
from collections.abc import Callable

from .base import behaviour
from .libc import FALLOC_FL_KEEP_SIZE, fallocate
from .place import ALICE, ALICES, STAFF, Place, mode_of, opened, put
from .seeds import File, HardLink

BODY = b"#!program that root wrote\n" * 4
PROGRAMS = (File("found", BODY, mode=0o644), File("linked", BODY, mode=0o644), HardLink("linked2", "linked"))
NAMES = ("own", "found", "linked")
MODE = 0o6777

Way = Callable[[int], object]


def _write(fd: int) -> None:
    os.pwrite(fd, b"EVIL", 0)


def _splice(fd: int) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"EVIL")
    assert os.splice(reader, fd, 4, offset_dst=0) == 4
    os.close(reader)
    os.close(writer)


def _sendfile(fd: int) -> None:
    with opened("source") as source:
        assert os.sendfile(fd, source, 0, 4) == 4


def _copy_file_range(fd: int) -> None:
    with opened("source") as source:
        assert os.copy_file_range(source, fd, 4, 0, 0) == 4


def _allocate(fd: int) -> None:
    fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 1 << 16)


def _truncate(fd: int) -> None:
    os.ftruncate(fd, 3)


def _try_everywhere(d: Place, way: Way, left: int) -> None:
    """``way``, done by a user, leaves the mode ``left``, whatever file and descriptor it is done to."""
    put(d / "source", b"EVIL")
    put(d / "own", BODY)

    def open_and(name: str) -> None:
        with opened(name, os.O_RDWR) as fd:
            way(fd)

    for name in NAMES:
        path = d / name
        os.chmod(path, 0o666)
        with opened(path, os.O_RDWR) as before:
            os.chmod(path, MODE)
            d.alice(way, before)
        assert mode_of(path) == left, f"{name}, opened before chmod: {mode_of(path):o}"
        os.chmod(path, MODE)
        d.alice(open_and, name)
        assert mode_of(path) == left, f"{name}, opened after chmod: {mode_of(path):o}"
        os.chmod(path, MODE)
        with opened(path, os.O_RDWR) as roots:
            d.alice(way, roots)
        assert mode_of(path) == left, f"{name}, opened by root: {mode_of(path):o}"
    assert mode_of(d / "linked2") == left


@behaviour(seeds=PROGRAMS)
def write_takes_set_id_bits(d: Place) -> None:
    _try_everywhere(d, _write, 0o777)


@behaviour(seeds=PROGRAMS)
def splice_takes_set_id_bits(d: Place) -> None:
    _try_everywhere(d, _splice, 0o777)


@behaviour(seeds=PROGRAMS)
def sendfile_takes_set_id_bits(d: Place) -> None:
    _try_everywhere(d, _sendfile, 0o777)


@behaviour(seeds=PROGRAMS)
def copy_file_range_takes_set_id_bits(d: Place) -> None:
    _try_everywhere(d, _copy_file_range, 0o777)


@behaviour(seeds=PROGRAMS)
def truncate_takes_set_id_bits(d: Place) -> None:
    _try_everywhere(d, _truncate, 0o777)


@behaviour(seeds=PROGRAMS, needs={"fallocate"})
def fallocate_takes_set_id_bits(d: Place) -> None:
    if d.has("fallocate"):
        _try_everywhere(d, _allocate, 0o777)


@behaviour(seeds=PROGRAMS)
def storing_through_a_mapping_is_no_write(d: Place) -> None:
    """A store tells nobody who did it: ext4 leaves the bits, and so must who wants to be like it."""

    def store(fd: int) -> None:
        with mmap.mmap(fd, 0) as view:
            view[:4] = b"EVIL"

    _try_everywhere(d, store, MODE)


@behaviour(seeds=[File("id", b"", mode=0o644)])
def a_changed_program_runs_without_root(d: Place) -> None:
    """The whole attack: a user rewrites root's writable set-user-ID program and runs it."""
    shutil.copyfile("/usr/bin/id", d / "id")
    os.chmod(d / "id", 0o6777)

    def work() -> tuple[bytes, bytes]:
        before = subprocess.run(["./id", "-u"], check=True, capture_output=True).stdout
        with open("id", "r+b", buffering=0) as file:
            file.seek(0, os.SEEK_END)
            file.write(b"EVIL")
        return before, subprocess.run(["./id", "-u"], check=True, capture_output=True).stdout

    nosuid = bool(os.statvfs(d.path).f_flag & os.ST_NOSUID)
    assert d.alice(work) == (b"%d\n" % (ALICE if nosuid else 0), b"%d\n" % ALICE)


@behaviour(seeds=[File("f", BODY, mode=0o4755), File("g", BODY, mode=0o2644, gid=STAFF)])
def chown_to_nobody_new_takes_set_id_bits(d: Place) -> None:
    before = os.stat(d / "f").st_ctime_ns
    os.chown(d / "f", -1, -1)
    assert mode_of(d / "f") == 0o755
    assert os.stat(d / "f").st_ctime_ns > before
    os.chown(d / "g", -1, -1)
    assert mode_of(d / "g") == 0o2644  # root may keep what doesn't make it a program of the group


@behaviour(needs={"setgid-without-execute"}, seeds=[File("in", BODY, mode=0o666), File("out", BODY, mode=0o666)])
def setgid_without_execute_is_kept_by_the_group_only(d: Place) -> None:
    for name in ("in", "out"):
        os.chown(d / name, 0, STAFF)
        os.chmod(d / name, 0o2646 if name == "out" else 0o2666)

    def work(name: str) -> None:
        with opened(name, os.O_WRONLY) as fd:
            os.pwrite(fd, b"x", 0)

    d.as_user(ALICE, ALICES, [STAFF], work, "in")
    d.alice(work, "out")
    left = 0o646 if d.has("setgid-without-execute") else 0o2646
    assert (mode_of(d / "in"), mode_of(d / "out")) == (0o2666, left)
    d.as_user(ALICE, ALICES, [STAFF], os.truncate, "in", 1)
    assert mode_of(d / "in") == 0o2666


@behaviour(seeds=[File("f", BODY, mode=0o6777)])
def root_keeps_set_id_bits(d: Place) -> None:
    for way in (_write, _splice, _truncate):
        with opened(d / "f", os.O_RDWR) as fd:
            way(fd)
        assert mode_of(d / "f") == 0o6777, way.__name__


@behaviour(seeds=[File("f", BODY, mode=0o644)])
def a_program_made_with_set_id_loses_it_by_writing(d: Place) -> None:
    def work() -> int:
        with opened("new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o4755) as fd:
            made = stat.S_IMODE(os.fstat(fd).st_mode)
            os.write(fd, b"x")
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o755
            return made

    os.chmod(d.path, 0o777)
    assert d.alice(work) == 0o4755
