"""The store's own folders in a container, its conf, and what a died mount leaves in ``cow``."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from vzfs import linux
from vzfs.errors import DamagedError
from vzfs.store.check.finding import LOST_AND_FOUND, Mend, Report
from vzfs.store.check.ground import Ground
from vzfs.store.conf import OSTEMPLATE, Conf
from vzfs.store.layout import CONF, COW, DUMP, LAYERS, LINKS, LOG, ORPHANS, OWN_FOLDER_MODE, STAGE
from vzfs.store.ownfile import kind_of

_NEEDED = (COW, DUMP)
_POSSIBLE = (*(f"{COW}/{name.decode()}" for name in (STAGE, LINKS, ORPHANS)), LAYERS, LOST_AND_FOUND)
"""Folders that are made when they are needed."""


def check_folders(ground: Ground, report: Report) -> None:
    """Every folder of the store's own is a directory that only root may enter."""
    _check_mode(ground, report, ".", os.stat(ground.top_fd))
    for name in (*_NEEDED, *_POSSIBLE):
        try:
            info = _look_at(ground, name)
        except FileNotFoundError:
            if name in _NEEDED:
                report(name, "missing", "the folder is missing", _make(ground, name))
            continue
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                continue  # cow itself is none and told already
            raise
        if stat.S_ISDIR(info.st_mode):
            _check_mode(ground, report, name, info)
        else:
            report(name, "missing", "something that is no folder is in its place", _displace(ground, name))


def _look_at(ground: Ground, name: str) -> os.stat_result:
    """What is at ``name`` in the container, seen through no symbolic link."""
    fd = linux.openat2(ground.top_fd, os.fsencode(name), os.O_PATH | os.O_NOFOLLOW)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def check_log(ground: Ground, report: Report) -> None:
    """The log, where there is one, is a file: what else has its name is never written to."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(LOG, dir_fd=ground.top_fd).st_mode
        if not stat.S_ISREG(mode):
            report(LOG, "malformed", f"is {kind_of(mode)}, not a file", _displace(ground, LOG))


def _check_mode(ground: Ground, report: Report, name: str, info: os.stat_result) -> None:
    mode = stat.S_IMODE(info.st_mode)
    if mode == OWN_FOLDER_MODE and info.st_uid == info.st_gid == 0:
        return

    def mend() -> str:
        fd = linux.openat2(ground.top_fd, os.fsencode(name), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fchown(fd, 0, 0)
            os.fchmod(fd, OWN_FOLDER_MODE)
        finally:
            os.close(fd)
        return ""

    detail = f"has mode {mode:04o} and owner {info.st_uid}:{info.st_gid}, should have {OWN_FOLDER_MODE:04o} and 0:0"
    report(name, "mode", detail, mend)


def _make(ground: Ground, name: str) -> Mend:
    def mend() -> str:
        os.mkdir(name, OWN_FOLDER_MODE, dir_fd=ground.top_fd)
        return ""

    return mend


def _displace(ground: Ground, name: str) -> Mend | None:
    """Take away what is no folder; a needed one is then found missing and made."""
    if name == LOST_AND_FOUND:
        return None
    folder, _, last = os.fsencode(name).rpartition(b"/")

    def mend() -> str:
        fd = os.open(folder or b".", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=ground.top_fd)
        try:
            return ground.lost.take(fd, last)
        finally:
            os.close(fd)

    return mend


def check_conf(ground: Ground, report: Report) -> list[str]:
    """The templates that conf names are in the store. Gives their names, the container's own first."""
    try:
        names = Conf.load(ground.path / CONF).templates()
    except FileNotFoundError:
        report(CONF, "template", "the file is missing", None)
        return []
    except DamagedError as error:
        report(CONF, "template", error.message, None)
        return []
    if not names[0]:
        report(CONF, "template", f"no line {OSTEMPLATE}=NAME", None)
        return []
    for name in names:
        if ground.templates.get(name) is None:
            ground.tell_template(name, report)
    return names


def check_remains(ground: Ground, report: Report) -> None:
    """Nothing is staged and nothing is unlinked but kept: nobody is working in a container that isn't mounted."""
    for folder, kind in ((STAGE, "leftover"), (ORPHANS, "orphan")):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            fd = ground.open_cow(folder)
            try:
                names = sorted(map(os.fsencode, os.listdir(linux.fd_path(fd))))
                details = [_describe(kind, os.lstat(name, dir_fd=fd)) for name in names]
            finally:
                os.close(fd)
            for name, detail in zip(names, details, strict=True):
                path = os.fsencode(COW) + b"/" + folder + b"/" + name
                report(path, kind, detail, ground.in_cow(folder, name, _remove))


def _describe(kind: str, info: os.stat_result) -> str:
    if kind == "leftover":
        return "left by an interrupted change"
    if stat.S_ISREG(info.st_mode) and info.st_nlink > 1:
        return f"kept name of a file of {info.st_size} bytes that has others"
    if stat.S_ISREG(info.st_mode):
        return f"a file of {info.st_size} bytes that was unlinked"
    return "something that was unlinked"


def _remove(dir_fd: int, name: bytes) -> str:
    linux.remove_tree(dir_fd, name)
    return "removed"
