"""What is mounted where: the mount tables of this process and of others, and whom an unmount reaches.

Rule: only reads /proc; nothing here asks a file system, so nothing waits for a server that hangs.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vzfs import linux

FSTYPE = "fuse.vzfs"
_MOST_LINKS = 40  # as the kernel, path_resolution(7)
_ESCAPED = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of /proc/self/mountinfo: where and what; ``device`` is the file system's ``major:minor``.

    ``shared`` is the peer group that mounting below it is told to, ``master`` the one it is told by, 0 for none
    (mount_namespaces(7)).
    """

    mountpoint: str
    fstype: str
    source: str
    device: str
    number: int = 0
    parent: int = 0
    shared: int = 0
    master: int = 0


def mount_table(process: int | str = "self") -> Iterator[MountEntry]:
    """All mounts that this process, or another, sees, the topmost of a place last."""
    return parse_table(Path(f"/proc/{process}/mountinfo").read_bytes())


def parse_table(text: bytes) -> Iterator[MountEntry]:
    """The mounts in the text of a ``mountinfo`` (proc(5))."""
    # As bytes: names may hold whatever str takes for white space or the end of a line, the kernel escapes four of them.
    for line in text.split(b"\n"):
        if not line:  # at the end; and all there is for a process in a root that was lazily unmounted
            continue
        fields = line.split(b" ")
        separator = fields.index(b"-", 6)
        groups = dict(field.split(b":") for field in fields[6:separator] if b":" in field)
        yield MountEntry(
            _unescape(fields[4]),
            os.fsdecode(fields[separator + 1]),
            _unescape(fields[separator + 2]),
            os.fsdecode(fields[2]),
            int(fields[0]),
            int(fields[1]),
            int(groups.get(b"shared", 0)),
            int(groups.get(b"master", 0)),
        )


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), field))


def vzfs_mount(mountpoint: Path) -> MountEntry | None:
    """The topmost mount at ``mountpoint`` if it is of vzfs."""
    entries = [entry for entry in mount_table() if entry.mountpoint == os.path.abspath(mountpoint)]
    return entries[-1] if entries and entries[-1].fstype == FSTYPE else None


def resolved(path: str | os.PathLike[str]) -> str:
    """``path``, which may be a mount point, absolute and with symbolic links resolved.

    Unlike realpath(3) it doesn't ask the file system that is mounted there: lstat would wait for a server that hangs.
    """
    place = os.path.abspath(path)
    for _ in range(_MOST_LINKS):
        parent, name = os.path.split(place)
        place = os.path.join(os.path.realpath(parent), name)
        try:
            target = os.readlink(place)
        except OSError:  # no symbolic link, or nothing
            break
        place = os.path.normpath(os.path.join(os.path.dirname(place), target))
    return place


def processes() -> list[int]:
    """The numbers of all processes that this one can see."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())


@dataclass(slots=True)
class Space:
    """A mount namespace: processes that live in it, and the mounts that they see."""

    pids: list[int]
    table: dict[int, MountEntry]

    def mounts_of(self, device: str) -> list[MountEntry]:
        """The mounts of the file system ``device`` here, innermost first."""
        found = [entry for entry in self.table.values() if entry.device == device]
        return sorted(found, key=lambda entry: -entry.mountpoint.count("/"))


def other_spaces() -> list[Space]:
    """The mount namespaces of the processes that this one can see, but for its own.

    One without any process, kept by a descriptor or a bind mount of its ``/proc/PID/ns/mnt``, is not found.
    """
    spaces: dict[int, Space] = {os.stat("/proc/self/ns/mnt").st_ino: Space([], {})}
    own = next(iter(spaces))
    looked: set[tuple[int, str]] = set()
    for pid in processes():
        with contextlib.suppress(OSError):  # it ended meanwhile
            number = os.stat(f"/proc/{pid}/ns/mnt").st_ino
            space = spaces.setdefault(number, Space([], {}))
            space.pids.append(pid)
            view = (number, os.readlink(f"/proc/{pid}/root"))  # it sees what is below its root directory only
            if number != own and view not in looked:
                looked.add(view)
                for entry in mount_table(pid):
                    space.table.setdefault(entry.number, entry)
    del spaces[own]
    return list(spaces.values())


def beyond(main: MountEntry | None, device: str) -> tuple[list[MountEntry], list[Space]]:
    """The mounts of ``device`` that unmounting ``main`` leaves as they are: those here, and the other namespaces that
    have some.

    Where a namespace gets mounts by propagation, as the services of systemd do, it gets unmounts too.
    """
    table = {entry.number: entry for entry in mount_table()}
    here = Space([], table)
    spaces = [space for space in other_spaces() if space.mounts_of(device)]
    parent = table.get(main.parent) if main else None
    told = _groups_told({parent.shared} - {0} if parent else set(), [table, *(space.table for space in spaces)])

    def left(space: Space) -> list[MountEntry]:
        return [entry for entry in space.mounts_of(device) if entry != main and not _is_told(space, entry, told)]

    return left(here), [space for space in spaces if left(space)]


def _is_told(space: Space, entry: MountEntry, told: set[int]) -> bool:
    parent = space.table.get(entry.parent)
    return parent is not None and (parent.shared in told or parent.master in told)


def _groups_told(groups: set[int], tables: list[dict[int, MountEntry]]) -> set[int]:
    """``groups`` and the peer groups that follow them, directly or not."""
    told = set(groups)
    following = {(entry.master, entry.shared) for table in tables for entry in table.values() if entry.master}
    grown = True
    while grown:
        grown = False
        for master, shared in following:
            if master in told and shared and shared not in told:
                told.add(shared)
                grown = True
    return told


def users(device: str) -> list[int]:
    """The processes that have something of the file system ``device`` open, mapped, or as root or working directory."""
    return [pid for pid in processes() if _uses(pid, device)]


def _uses(pid: int, device: str) -> bool:
    links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root", f"/proc/{pid}/exe"]
    with contextlib.suppress(OSError):
        links += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    for link in links:
        with contextlib.suppress(OSError):
            if linux.device_of(link) == device:
                return True
    with contextlib.suppress(OSError, ValueError):
        major, minor = (int(part) for part in device.split(":"))
        return b" %02x:%02x " % (major, minor) in Path(f"/proc/{pid}/maps").read_bytes()
    return False
