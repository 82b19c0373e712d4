"""Mounting, and starting serving processes, from outside of them; ``vzfs.fuse.umount`` ends them.

Rule: imports neither trio nor pyfuse3, so that the command line stays fast; the serving process is a new interpreter,
so a lifecycle manager may have threads, its own trio, or whatever it likes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import stat
import subprocess
import sys
import time
from pathlib import Path

from vzfs import errors, linux
from vzfs.errors import UnsupportedError, VzfsError
from vzfs.fuse.probe import Answer, ask
from vzfs.fuse.table import FSTYPE, vzfs_mount
from vzfs.store.lock import last_holder

log = logging.getLogger(__name__)

PASSTHROUGH_ABOVE = 64 << 10
"""93 % of the files of a Debian 12 are no larger, with 22 % of its bytes: what is locked, configured and logged to.
Above it are the libraries and programs, which containers shall share in memory."""

GIVE_UP_S = 2.0
"""How long a serving process that is to end may take before it is killed, and then to be dead."""


def source_name(container: Path) -> str:
    """What the mount table calls the root of the container at ``container``."""
    return f"vzfs#{container.name}"


def attach(mountpoint: Path, name: str, *, read_only: bool) -> int:
    """Mount a new FUSE file system called ``name`` at ``mountpoint``; gives the descriptor on which it is to be served.

    Done here rather than by libfuse because of ``MS_POSIXACL``: with it the kernel leaves a program's umask to the
    server, which must ignore it in directories with a default ACL (fuse_fill_super_common in fs/fuse/inode.c).
    Raises ``UnsupportedError`` naming the remedy.
    """
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UnsupportedError(
            f"can't open /dev/fuse: {error.strerror}", remedy="load the module: modprobe fuse"
        ) from error
    root_mode = stat.S_IFDIR | 0o755
    data = f"fd={fd},rootmode={root_mode:o},user_id=0,group_id=0,default_permissions,allow_other"
    flags = linux.MS_NOATIME | linux.MS_POSIXACL | (linux.MS_RDONLY if read_only else 0)
    try:
        linux.mount(os.fsencode(name), os.fsencode(mountpoint), FSTYPE.encode(), flags, data.encode())
    except OSError as error:
        os.close(fd)
        raise UnsupportedError(f"can't mount at {mountpoint}: {error.strerror}", remedy="see: vzfs doctor") from error
    return fd


def detach(mountpoint: Path, device: str) -> None:
    """Take the file system ``device`` out of the tree of files if it is still at ``mountpoint``, in use or not."""
    entry = vzfs_mount(mountpoint)
    if entry is not None and entry.device == device:  # else unmounted meanwhile, and perhaps another's place now
        with contextlib.suppress(OSError):
            linux.umount2(os.fsencode(mountpoint), linux.MNT_DETACH)


def unmount_dead(mountpoint: Path) -> bool:
    """Take away mounts of vzfs at ``mountpoint`` whose serving process is gone; gives whether there was one."""
    found = False
    while (entry := vzfs_mount(mountpoint)) and ask([(str(mountpoint), entry.device)]) == [Answer.DEAD]:
        linux.umount2(os.fsencode(mountpoint), linux.MNT_DETACH)
        found = True
    return found


def start(order: dict[str, object], timeout_s: float) -> None:
    """Start a detached serving process and return when the root is usable.

    ``order`` has the fields of ``serve.Order``. Raises the ``VzfsError`` that kept the process from mounting.
    """
    read_end, write_end = os.pipe()
    try:
        # The environment finds the same vzfs, installed or not.
        path = os.pathsep.join(filter(None, (str(Path(errors.__file__).parents[1]), os.environ.get("PYTHONPATH", ""))))
        process = subprocess.Popen(
            [sys.executable, "-m", "vzfs.fuse.serve", json.dumps(order), str(write_end)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write_end,),
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": path},
        )
        os.close(write_end)
        write_end = -1
        log.debug("started process %d to serve %s", process.pid, order["container"])
        message = _read_report(read_end, timeout_s)
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)
    if message is None:
        _give_up(process, Path(str(order["container"])), Path(str(order["mountpoint"])))
        raise VzfsError(
            f"the root was not usable within {timeout_s:g} s, and was given up",
            remedy=f"see the log {order['log']}; a busy machine may need more time: vzfs mount --timeout SECONDS",
        )
    if "error" in message:
        process.wait()
        kind = getattr(errors, str(message["error"]), VzfsError)
        raise kind(str(message["message"]), remedy=str(message["remedy"]))


def _give_up(process: subprocess.Popen[bytes], container: Path, mountpoint: Path) -> None:
    """End a serving process that isn't ready yet, and take away what it has mounted."""
    for end in (process.terminate, process.kill):
        end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GIVE_UP_S)
            break
    holder = last_holder(container)
    if holder is not None and holder.pid == process.pid and holder.device:
        detach(mountpoint, holder.device)
    unmount_dead(mountpoint)  # killed before it could say which it is


def _read_report(fd: int, timeout_s: float) -> dict[str, object] | None:
    """The serving process's report, ``None`` after ``timeout_s``; its silent death is a report, too."""
    data = b""
    end = time.monotonic() + timeout_s
    poll = select.poll()  # select(2) knows no descriptor above 1023, and the caller may have many
    poll.register(fd, select.POLLIN)
    while poll.poll(max(0.0, end - time.monotonic()) * 1000):
        chunk = os.read(fd, 65536)
        data += chunk
        if data.endswith(b"\n"):
            message: dict[str, object] = json.loads(data)
            return message
        if not chunk:
            return {"error": "VzfsError", "message": "the serving process died while mounting", "remedy": "see its log"}
    return None
