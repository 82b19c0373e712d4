"""Starting and ending serving processes, from outside of them.

Rule: imports neither trio nor pyfuse3, so that the command line stays fast; the serving process is a new interpreter,
so a lifecycle manager may have threads, its own trio, or whatever it likes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import stat
import subprocess
import sys as python
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vzfs import errors
from vzfs.errors import BusyError, NotMountedError, UnsupportedError, UsageError, VzfsError
from vzfs.store import sys
from vzfs.store.lock import Holder, read_holder

FSTYPE = "fuse.vzfs"
PASSTHROUGH_ABOVE = 64 << 10
"""93 % of the files of a Debian 12 are no larger, with 22 % of its bytes: what is locked, configured and logged to.
Above it are the libraries and programs, which containers shall share in memory."""
_ESCAPED = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of /proc/self/mountinfo: where and what; ``device`` is the file system's ``major:minor``."""

    mountpoint: str
    fstype: str
    source: str
    device: str


def mount_table(process: int | str = "self") -> Iterator[MountEntry]:
    """All mounts that this process, or another, sees, the topmost of a place last."""
    # As bytes: names may hold whatever str takes for white space or the end of a line, the kernel escapes four of them.
    for line in Path(f"/proc/{process}/mountinfo").read_bytes().split(b"\n"):
        if not line:  # at the end; and all there is for a process in a root that was lazily unmounted
            continue
        fields = line.split(b" ")
        separator = fields.index(b"-", 6)
        yield MountEntry(
            _unescape(fields[4]),
            os.fsdecode(fields[separator + 1]),
            _unescape(fields[separator + 2]),
            os.fsdecode(fields[2]),
        )


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), field))


def vzfs_mount(mountpoint: Path) -> MountEntry | None:
    """The topmost mount at ``mountpoint`` if it is of vzfs."""
    entries = [entry for entry in mount_table() if entry.mountpoint == os.path.abspath(mountpoint)]
    return entries[-1] if entries and entries[-1].fstype == FSTYPE else None


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
    flags = sys.MS_NOATIME | sys.MS_POSIXACL | (sys.MS_RDONLY if read_only else 0)
    try:
        sys.mount(name.encode(), os.fsencode(mountpoint), FSTYPE.encode(), flags, data.encode())
    except OSError as error:
        os.close(fd)
        raise UnsupportedError(f"can't mount at {mountpoint}: {error.strerror}", remedy="see: vzfs doctor") from error
    return fd


def detach(mountpoint: Path, device: str) -> None:
    """Take the file system ``device`` out of the tree of files if it is still at ``mountpoint``, in use or not."""
    entry = vzfs_mount(mountpoint)
    if entry is not None and entry.device == device:  # else unmounted meanwhile, and perhaps another's place now
        with contextlib.suppress(OSError):
            sys.umount2(os.fsencode(mountpoint), sys.MNT_DETACH)


def unmount_dead(mountpoint: Path) -> None:
    """Take away mounts of vzfs at ``mountpoint`` whose serving process is gone."""
    while vzfs_mount(mountpoint):
        try:
            os.statvfs(mountpoint)  # stat would be answered from the kernel's cache
            return
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
                return
        sys.umount2(os.fsencode(mountpoint), sys.MNT_DETACH)


def start(order: dict[str, object], timeout_s: float) -> None:
    """Start a detached serving process and return when the root is usable.

    ``order`` has the fields of ``serve.Order``. Raises the ``VzfsError`` that kept the process from mounting.
    """
    read_end, write_end = os.pipe()
    try:
        # The environment finds the same vzfs, installed or not.
        path = os.pathsep.join(filter(None, (str(Path(errors.__file__).parents[1]), os.environ.get("PYTHONPATH", ""))))
        process = subprocess.Popen(
            [python.executable, "-m", "vzfs.fuse.serve", json.dumps(order), str(write_end)],
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
        message = _read_report(read_end, timeout_s)
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)
    if message is None:
        process.terminate()
        raise VzfsError(f"the root was not usable within {timeout_s:g} s", remedy=f"see the log {order['log']}")
    if "error" in message:
        process.wait()
        kind = getattr(errors, str(message["error"]), VzfsError)
        raise kind(str(message["message"]), remedy=str(message["remedy"]))


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


def unmount(container: Path, mountpoint: Path, *, lazy: bool, timeout_s: float) -> None:
    """Unmount and wait until the serving process is done.

    Raises ``NotMountedError``, ``BusyError`` (files are open there, and not ``lazy``; or it is mounted elsewhere, too).
    """
    holder = read_holder(container)
    entry = vzfs_mount(mountpoint)
    if entry is None or not _belongs(entry, holder, container):
        if holder is not None:
            raise BusyError(
                f"process {holder.pid} {holder.doing} {container} elsewhere", remedy="unmount it from there"
            )
        raise NotMountedError(
            f"container {container} is not mounted", remedy=f"mount it with: vzfs mount {container.name}"
        )
    try:
        sys.umount2(os.fsencode(mountpoint), sys.UMOUNT_NOFOLLOW | (sys.MNT_DETACH if lazy else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(f"{mountpoint} is in use{_users(mountpoint)}", remedy="end them, or use --lazy") from error
        if error.errno == errno.EPERM:
            raise UnsupportedError("unmounting needs root", remedy="run it as root") from error
        raise UsageError(f"can't unmount {mountpoint}: {error.strerror}") from error
    if lazy:
        return
    end = time.monotonic() + timeout_s
    while read_holder(container) is not None:
        if time.monotonic() > end:
            _refuse_other_mounts(container, mountpoint, entry.device)
            raise VzfsError(
                f"the serving process of {container} did not end within {timeout_s:g} s", remedy="see its log"
            )
        time.sleep(0.005)


def _belongs(entry: MountEntry, holder: Holder | None, container: Path) -> bool:
    """Whether the mount is the container's: the one that its living server tells, or what a dead one left."""
    return entry.device == holder.device if holder else entry.source == source_name(container)


def _refuse_other_mounts(container: Path, mountpoint: Path, device: str) -> None:
    """Raise ``BusyError`` if the file system lives on without its mount point: bound, or in another mount namespace."""
    others = [entry.mountpoint for entry in mount_table() if entry.device == device]
    if others:
        raise BusyError(
            f"{container} is unmounted from {mountpoint} but mounted at {', '.join(others)}, too",
            remedy=f"umount {' '.join(others)}",
        )
    namespaces = {os.stat("/proc/self/ns/mnt").st_ino}
    for pid in _processes():
        with contextlib.suppress(OSError):  # it ended meanwhile
            namespace = os.stat(f"/proc/{pid}/ns/mnt").st_ino
            if namespace in namespaces:
                continue
            namespaces.add(namespace)
            if any(entry.device == device for entry in mount_table(pid)):
                raise BusyError(
                    f"{container} is unmounted here but not in the mount namespace of process {pid}",
                    remedy=f"end that process, or: nsenter --mount --target {pid} umount {mountpoint}",
                )


def _users(mountpoint: Path) -> str:
    """Which processes and mounts use the mount, as far as can be seen, to be put into a message."""
    pids = [str(pid) for pid in _processes() if _uses(pid, str(mountpoint))]
    mounts = [entry.mountpoint for entry in mount_table() if entry.mountpoint.startswith(f"{mountpoint}/")]
    users = [f"process {', '.join(pids[:8])}"] if pids else []
    users += [f"the mount {', '.join(mounts[:8])}"] if mounts else []
    return f" by {' and '.join(users)}" if users else ""


def _processes() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())


def _uses(pid: int, mountpoint: str) -> bool:
    links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root", f"/proc/{pid}/exe"]
    with contextlib.suppress(OSError):
        links += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    for link in links:
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target == mountpoint or target.startswith(mountpoint + "/"):
                return True
    return False
