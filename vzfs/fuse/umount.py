"""Ending mounts, from outside of their serving processes.

Rule: a file system ends with its last mount, in whatever mount namespace that is. So what keeps it alive is looked for
first, and where something does, it is named and nothing is touched, unless the caller said how to deal with it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vzfs import linux
from vzfs.errors import BusyError, NotMountedError, UnsupportedError, UsageError, VzfsError
from vzfs.fuse.apart import apart
from vzfs.fuse.mount import source_name, unmount_dead
from vzfs.fuse.probe import Answer, ask
from vzfs.fuse.table import FSTYPE, MountEntry, Space, beyond, mount_table, parse_table, users
from vzfs.store.lock import Holder, last_holder, read_holder

log = logging.getLogger(__name__)

_POLL_S = 0.005
_NAMED = 8
"""Processes and mounts that a message names at most."""
_ENTER_S = 10.0
"""How long unmounting in another namespace may take: a path there may lead through a file system that hangs."""
_ENDING_S = 1.0
"""How long a server whose root is mounted nowhere may take to end before anybody is suspected to keep it: it flushes
what it has. Meanwhile the kernel may have given its device number to another file system."""
_AGAIN = 20
"""Attempts at unmounting something that a process which just ended may still hold for an instant."""


@dataclass(frozen=True, slots=True)
class How:
    """How to unmount: ``lazy``, in use or not; ``everywhere``, in other mount namespaces and bind mounts as well."""

    lazy: bool = False
    everywhere: bool = False
    timeout_s: float = 10.0


def unmount(container: Path, mountpoint: Path, how: How) -> None:
    """Unmount and wait until the serving process is done. ``mountpoint`` is where a mount of a dead one is looked for.

    Raises ``NotMountedError``, ``BusyError`` when it is in use, unless ``how.lazy``, or mounted at other places, too,
    unless ``how.everywhere``; nothing was touched then.
    """
    holder = read_holder(container)
    if holder is None:
        if not unmount_dead_of(container, mountpoint):
            raise NotMountedError(
                f"container {container} is not mounted", remedy=f"mount it with: vzfs mount {container.name}"
            )
        return
    if holder.device is None:
        raise BusyError(
            f"container {container} is in use: process {holder.pid} {holder.doing} it", remedy="wait until it is done"
        )
    log.debug("process %d %s %s, device %s", holder.pid, holder.doing, container, holder.device)
    main = _main_mount(holder)
    if main is None and _ended_within(container, holder, _ENDING_S):
        return
    binds, spaces = beyond(main, holder.device)
    if not (main or binds or spaces):
        _await_detached(container, holder, how)
        return
    if not how.lazy:
        _refuse_stopped(container, holder)
    locked = False
    if how.everywhere:
        locked = _unmount_everywhere(container, holder, binds, spaces, lazy=how.lazy)
    elif main is None or not how.lazy:
        _refuse_beyond(container, main, binds, spaces)
    if main:
        _unmount_here(main, holder.device, lazy=how.lazy)
    if locked:
        _end_server(holder)
    if not how.lazy:
        _await_end(container, holder, how.timeout_s)


def _main_mount(holder: Holder) -> MountEntry | None:
    """The mount that the server made, or what is left of it after it was moved."""
    mounts = [entry for entry in mount_table() if entry.device == holder.device]
    at_place = [entry for entry in mounts if entry.mountpoint == holder.mountpoint]
    return at_place[-1] if at_place else None


# ------------------------------------------------------------------------------------------------ refusing beforehand


def _refuse_stopped(container: Path, holder: Holder) -> None:
    """A stopped server wouldn't notice its end, and the caller would wait in vain."""
    if is_stopped(holder.pid):
        raise BusyError(
            f"process {holder.pid}, which serves {container}, is stopped",
            remedy=f"let it go on: kill -CONT {holder.pid}; or end it: kill -KILL {holder.pid}; then unmount again",
        )


def is_stopped(pid: int) -> bool:
    """Whether the process was stopped by a signal, or by a debugger."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] in (b"T", b"t")
    return False


def _refuse_beyond(
    container: Path, main: MountEntry | None, binds: Sequence[MountEntry], spaces: Sequence[Space]
) -> None:
    """Raise ``BusyError`` if there are other mounts of the file system than ``main``."""
    if not binds and not spaces:
        return
    places = [f"at {_some(entry.mountpoint for entry in binds)}"] if binds else []
    places += [f"in the mount namespace of {_named(space.pids)}" for space in spaces[:_NAMED]]
    where = f"{container} is mounted {' and '.join(places)}" + (", too" if main else ", not here")
    raise BusyError(
        f"{where}; nothing was unmounted",
        remedy=f"unmount it there or end those processes, or: vzfs umount --everywhere {container}",
    )


def _named(pids: Sequence[int]) -> str:
    return f"process {_some(f'{pid} ({name})' if (name := _program(pid)) else str(pid) for pid in pids)}"


def _program(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return ""


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


# -------------------------------------------------------------------------------------------------- unmounting it here


def _unmount_here(entry: MountEntry, device: str, *, lazy: bool) -> None:
    """Take one mount away. Raises ``BusyError`` naming who uses it."""
    place = entry.mountpoint
    try:
        if not _is_at(device, place):
            raise BusyError(f"{place} is hidden below another mount", remedy="unmount that first; findmnt shows it")
        linux.umount2(os.fsencode(place), linux.UMOUNT_NOFOLLOW | (linux.MNT_DETACH if lazy else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(f"{place} is in use{_used_by(place, device)}", remedy="end them, or use --lazy") from error
        if error.errno == errno.EPERM:
            raise UnsupportedError("unmounting needs root", remedy="run it as root") from error
        raise UsageError(f"can't unmount {place}: {error.strerror}") from error
    log.info("unmounted %s", place)


def _is_at(device: str, place: str) -> bool:
    try:
        return linux.device_of(place) == device
    except (FileNotFoundError, NotADirectoryError):
        return False


def _used_by(mountpoint: str, device: str) -> str:
    """Which processes and mounts use the mount, as far as can be seen, to be put into a message."""
    pids = users(device)
    mounts = [entry.mountpoint for entry in mount_table() if entry.mountpoint.startswith(f"{mountpoint}/")]
    used = [_named(pids)] if pids else []
    used += [f"the mount {_some(mounts)}"] if mounts else []
    return f" by {' and '.join(used)}" if used else ""


def _await_end(container: Path, holder: Holder, timeout_s: float) -> None:
    """Wait until the server has ended. Raises ``BusyError`` naming what keeps it, ``VzfsError`` if nothing is seen."""
    if _ended_within(container, holder, timeout_s):
        return
    device = str(holder.device)
    binds, spaces = beyond(None, device)  # made meanwhile
    _refuse_beyond(container, None, binds, spaces)
    pids = users(device)
    if pids:
        raise BusyError(f"{container} is unmounted, but still used by {_named(pids)}", remedy="end them")
    raise VzfsError(
        f"process {holder.pid}, which serves {container}, did not end within {timeout_s:g} s",
        remedy="see its log; it may be writing, or a mount namespace without processes may keep the root",
    )


def _ended_within(container: Path, holder: Holder, timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while True:
        now = read_holder(container)
        if now is None or now.pid not in (holder.pid, 0):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)


# ------------------------------------------------------------------------------------- what isn't mounted any more, yet


def await_detached(container: Path, timeout_s: float) -> None:
    """Wait for the end of a server whose root was unmounted, as after ``umount MOUNTPOINT``; else do nothing.

    Raises ``BusyError`` when processes keep it.
    """
    holder = read_holder(container)
    if holder is not None and holder.device is not None and is_detached(holder):
        _await_detached(container, holder, How(timeout_s=timeout_s))


def is_detached(holder: Holder) -> bool:
    """Whether the server's file system is mounted nowhere any more, here and in the server's own mount namespace."""
    if holder.device is None:
        return False
    tables = [mount_table()]
    with contextlib.suppress(OSError):
        tables.append(mount_table(holder.pid))
    return not any(entry.device == holder.device for table in tables for entry in table)


def _await_detached(container: Path, holder: Holder, how: How) -> None:
    if how.lazy or _ended_within(container, holder, _ENDING_S):
        return
    binds, spaces = beyond(None, str(holder.device))
    _refuse_beyond(container, None, binds, spaces)
    pids = users(str(holder.device))
    if pids:
        raise BusyError(
            f"container {container} is in use: it is detached, but still served to {_named(pids)}",
            remedy="end them; then it ends by itself",
        )
    _await_end(container, holder, how.timeout_s)


def unmount_dead_of(container: Path, mountpoint: Path) -> bool:
    """Take away what a dead server of this container left mounted here: at the place that it told, at ``mountpoint``,
    and bind mounts of it. Gives whether there was something.
    """
    told = last_holder(container)
    places = {str(mountpoint), str(told.mountpoint) if told and told.mountpoint else str(mountpoint)}
    mounts = [entry for entry in mount_table() if entry.fstype == FSTYPE and entry.source == source_name(container)]
    devices = {entry.device for entry in mounts if entry.mountpoint in places}
    if told and told.device and any(entry.device == told.device for entry in mounts):
        devices.add(told.device)
    found = False
    for entry in sorted(mounts, key=lambda entry: -entry.mountpoint.count("/")):
        if entry.device in devices and ask([(entry.mountpoint, entry.device)]) == [Answer.DEAD]:
            found = unmount_dead(Path(entry.mountpoint)) or found
    return found


# ---------------------------------------------------------------------------------------------------------- everywhere


def _unmount_everywhere(
    container: Path, holder: Holder, binds: Sequence[MountEntry], spaces: Sequence[Space], *, lazy: bool
) -> bool:
    """Take away all mounts but the main one; gives whether one stays for good that nobody uses.

    Raises ``BusyError`` with nothing touched when one is in use.
    """
    device = str(holder.device)
    pids = users(device)
    if pids and not lazy:
        raise BusyError(
            f"{container} is in use by {_named(pids)}; nothing was unmounted", remedy="end them, or add --lazy"
        )
    results = apart([_unmounting(space.pids[0], device, lazy=lazy) for space in spaces], _ENTER_S)
    locked = False
    for space, answer in zip(spaces, results, strict=True):
        left: list[tuple[str, int]] = json.loads(answer) if answer else [("?", errno.ETIMEDOUT)]
        locked = locked or any(code == errno.EINVAL for _, code in left)
        hindered = [f"{place}: {os.strerror(code)}" for place, code in left if code != errno.EINVAL]
        if hindered and _still_there(space, device):
            raise BusyError(
                f"{container} can't be unmounted in the mount namespace of {_named(space.pids)}: {_some(hindered)}",
                remedy="end those processes, or add --lazy",
            )
        log.info("unmounted in the mount namespace of %s", _named(space.pids))
    for entry in binds:
        _unmount_here(entry, device, lazy=lazy)
    return locked and not pids


def _still_there(space: Space, device: str) -> bool:
    """Whether a namespace is there that has the file system: its processes may have ended meanwhile."""
    for pid in space.pids:
        with contextlib.suppress(OSError):
            if any(entry.device == device for entry in mount_table(pid)):
                return True
    return False


def _unmounting(pid: int, device: str, *, lazy: bool) -> Callable[[], bytes]:
    """Work for a process of its own: in the mount namespace of ``pid``, unmount ``device``; gives what stayed, as JSON.

    The processes of that namespace may move things about meanwhile: whatever they do, they do to their own namespace.
    """
    flags = linux.UMOUNT_NOFOLLOW | (linux.MNT_DETACH if lazy else 0)

    def work() -> bytes:
        namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
        proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)  # that one may have another /proc, or none
        linux.enter_mounts(namespace)
        with open(os.open("self/mountinfo", os.O_RDONLY, dir_fd=proc), "rb") as file:
            table = {entry.number: entry for entry in parse_table(file.read())}
        left = [(entry.mountpoint, 0) for entry in Space([], table).mounts_of(device)]
        for _ in range(len(left)):  # again, because one may hide another
            left = [(place, code) for place, _ in left if (code := _try(place, device, flags))]
        return json.dumps(left).encode()

    return work


def _try(place: str, device: str, flags: int) -> int:
    """Unmount ``place`` if ``device`` is there; the errno, 0 for success."""
    for attempt in range(_AGAIN):
        try:
            if linux.device_of(place) != device:
                return errno.EBUSY  # below another mount
            linux.umount2(os.fsencode(place), flags)
        except OSError as error:
            if error.errno != errno.EBUSY or attempt == _AGAIN - 1:
                return error.errno or errno.EIO
            time.sleep(_POLL_S)
        else:
            return 0
    return errno.EBUSY


def _end_server(holder: Holder) -> None:
    """End a server whose file system can't be unmounted in a namespace of less privileged users, because it came
    there with the mounts around it (MNT_LOCKED, mount_namespaces(7)). Nobody uses it there; a dead mount stays.
    """
    from vzfs.fuse.state import State

    with contextlib.suppress(OSError, UnsupportedError):
        State.open_of(holder.pid, -1 if holder.state is None else holder.state).close()  # it is a server
        os.kill(holder.pid, signal.SIGTERM)
        log.info("told process %d to end: a mount namespace keeps its root for good", holder.pid)
