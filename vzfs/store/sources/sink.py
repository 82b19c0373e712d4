"""Writing an archive's members below one directory, whatever their names and order are.

Rule: nothing outside the target is ever touched. A name is taken apart here and checked; its directory is opened by
openat2 beneath the target through no symbolic link; the entry itself is made in that descriptor by calls that fail when
anything is there (O_EXCL, mkdir, mknod, symlink, link). Attributes of directories come last, deepest first, because
making entries changes a directory's times, and because a default ACL would be inherited by what is made in it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TypeVar

from vzfs import linux
from vzfs.store.sources import attributes as attrs
from vzfs.store.sources.attributes import Attributes
from vzfs.store.sources.errors import entry_error, refused, shown

NAME_MAX = 255
"""Bytes of one component (<linux/limits.h>)."""

MAX_WAITING = 256 << 20
"""Bytes of extended attributes that may wait in memory for their directories: 1 KiB for each of 262,144 directories."""

IMPLIED_MODE = 0o755
"""Mode of a directory that no member describes, the root included."""

Parts = tuple[bytes, ...]
T = TypeVar("T")


def split(name: bytes, what: bytes) -> Parts:
    """The components of a member's name; ``()`` is the root. The ``SourceError`` for a hostile one names ``what``."""
    if not name:
        raise refused(what, "an empty name")
    other = "" if name == what else f" {shown(name)}"  # a link's target
    if name.startswith(b"/"):
        raise refused(what, f"an absolute name{other}", remedy="make the archive with relative names")
    if b"\0" in name:
        raise refused(what, "a name with a NUL byte in it")
    parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
    if b".." in parts:
        raise refused(what, f"'..' in the name{other}")
    if any(len(part) > NAME_MAX for part in parts):
        raise refused(what, f"a name component of more than {NAME_MAX} bytes")
    return parts


class Sink:
    """Makes entries below the directory ``root_fd``; ``finish`` completes them, ``close`` frees descriptors."""

    def __init__(self, root_fd: int, *, allow_devices: bool) -> None:
        self._root = root_fd
        self._allow_devices = allow_devices
        self._directories: dict[Parts, Attributes | None] = {(): None}
        self._waiting = 0
        self._parent_parts: Parts | None = None
        self._parent_fd = -1

    def directory(self, parts: Parts, attributes: Attributes) -> None:
        """Make a directory, or take new attributes for one that is there."""
        self._waiting += sum(len(name) + len(value) for name, value in attributes.xattrs.items())
        if self._waiting > MAX_WAITING:
            raise refused(b"/".join(parts), "the directories' extended attributes need too much memory")
        if parts:
            self._make(parts, _new_directory)
        self._directories[parts] = attributes

    def file(self, parts: Parts, attributes: Attributes, fill: Callable[[int], None]) -> None:
        """Make a regular file whose data ``fill`` writes to a descriptor."""
        fd = self._make(_entry(parts), _new_file)
        try:
            fill(fd)
            attrs.apply_to_fd(fd, attributes)
        finally:
            os.close(fd)

    def symlink(self, parts: Parts, text: bytes, attributes: Attributes) -> None:
        """Make a symbolic link; its text may be anything, for nothing here follows it."""
        if not text or b"\0" in text:
            raise refused(b"/".join(parts), "a symbolic link with an impossible text")
        self._make(_entry(parts), lambda fd, name: os.symlink(text, name, dir_fd=fd))
        attrs.apply_to_symlink(self._parent_fd, parts[-1], attributes)

    def fifo(self, parts: Parts, attributes: Attributes) -> None:
        """Make a FIFO."""
        self._make(_entry(parts), lambda fd, name: os.mkfifo(name, 0o600, dir_fd=fd))
        attrs.apply_to_node(self._parent_fd, parts[-1], attributes)

    def device(self, parts: Parts, kind: int, number: tuple[int, int], attributes: Attributes) -> None:
        """Make a device node; ``kind`` is ``S_IFCHR`` or ``S_IFBLK``, ``number`` is ``(major, minor)``."""
        if not self._allow_devices:
            raise device_refused(b"/".join(parts))
        major, minor = number
        if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):  # <linux/kdev_t.h>
            raise refused(b"/".join(parts), f"device number {major}:{minor} is impossible")
        device = os.makedev(major, minor)
        self._make(_entry(parts), lambda fd, name: os.mknod(name, kind | 0o600, device, dir_fd=fd))
        attrs.apply_to_node(self._parent_fd, parts[-1], attributes)

    def link(self, parts: Parts, target: Parts) -> None:
        """Make a hard link to ``target``, an entry that is there and no directory."""
        shown_name = b"/".join(parts)
        remedy = "make the archive of the whole tree"
        if not target:
            raise refused(shown_name, "a hard link to the root directory")
        try:
            target_dir = self._open_directory(target[:-1])
        except FileNotFoundError:
            raise refused(shown_name, "a hard link to a member that isn't there", remedy=remedy) from None
        try:
            try:
                found = os.lstat(target[-1], dir_fd=target_dir)
            except FileNotFoundError:
                raise refused(shown_name, "a hard link to a member that isn't there", remedy=remedy) from None
            if stat.S_ISDIR(found.st_mode):
                raise refused(shown_name, "a hard link to a directory")
            if not self._is_same(_entry(parts), found):
                self._make(parts, lambda fd, name: _link(target_dir, target[-1], fd, name))
        finally:
            os.close(target_dir)

    def finish(self) -> None:
        """Give every directory its attributes; call once, when all entries are there."""
        for parts in sorted(self._directories, key=len, reverse=True):
            try:
                self._finish_directory(parts, self._directories[parts])
            except OSError as error:
                raise entry_error(error, b"/".join(parts) or b".", self._root) from error

    def close(self) -> None:
        """Free the descriptor that is kept between two calls."""
        if self._parent_fd >= 0:
            os.close(self._parent_fd)
        self._parent_fd, self._parent_parts = -1, None

    def _finish_directory(self, parts: Parts, attributes: Attributes | None) -> None:
        fd = linux.openat2(self._root, b"/".join(parts) or b".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            if attributes is None:
                os.fchmod(fd, IMPLIED_MODE)
            else:
                attrs.apply_to_fd(fd, attributes)
        finally:
            os.close(fd)

    def _make(self, parts: Parts, make: Callable[[int, bytes], T]) -> T:
        """Run ``make(directory descriptor, name)``; when something is in the way, remove it and run once more."""
        parent = self._parent(parts[:-1])
        try:
            return make(parent, parts[-1])
        except FileExistsError:
            self._make_room(parent, parts)
        return make(parent, parts[-1])

    def _make_room(self, parent: int, parts: Parts) -> None:
        if not stat.S_ISDIR(os.lstat(parts[-1], dir_fd=parent).st_mode):
            os.unlink(parts[-1], dir_fd=parent)
            return
        os.rmdir(parts[-1], dir_fd=parent)
        self._directories.pop(parts, None)

    def _is_same(self, parts: Parts, other: os.stat_result) -> bool:
        try:
            here = os.lstat(parts[-1], dir_fd=self._parent(parts[:-1]))
        except FileNotFoundError:
            return False
        return os.path.samestat(here, other)

    def _parent(self, parts: Parts) -> int:
        """A descriptor of the directory ``parts``, made if missing; valid until the next call."""
        if parts != self._parent_parts:
            try:
                fd = self._open_directory(parts)
            except FileNotFoundError:
                fd = self._make_directories(parts)
            self.close()
            self._parent_fd, self._parent_parts = fd, parts
        return self._parent_fd

    def _open_directory(self, parts: Parts) -> int:
        return linux.openat2(self._root, b"/".join(parts) or b".", os.O_PATH | os.O_DIRECTORY)

    def _make_directories(self, parts: Parts) -> int:
        for depth in range(1, len(parts) + 1):
            above = self._open_directory(parts[: depth - 1])
            try:
                os.mkdir(parts[depth - 1], 0o700, dir_fd=above)
                self._directories[parts[:depth]] = None
            except FileExistsError:
                continue  # whatever it is: opening it tells
            finally:
                os.close(above)
        return self._open_directory(parts)


def device_refused(name: bytes) -> Exception:
    """The error for a device node where the options forbid them."""
    return refused(name, "a device, and devices are not allowed", remedy="allow devices, or leave it out of the source")


def _entry(parts: Parts) -> Parts:
    """``parts``, which must not be the root: that is a directory and stays one."""
    if not parts:
        raise refused(b".", "the root of a template must be a directory")
    return parts


def _new_directory(parent: int, name: bytes) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
            raise


def _new_file(parent: int, name: bytes) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return linux.openat2(parent, name, flags, 0o600)


def _link(from_fd: int, from_name: bytes, to_fd: int, to_name: bytes) -> None:
    os.link(from_name, to_name, src_dir_fd=from_fd, dst_dir_fd=to_fd, follow_symlinks=False)
