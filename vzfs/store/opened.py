"""A sealed template in use: its mapped index, its files and its link farm, by descriptors."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vzfs import linux
from vzfs.errors import NotFoundError
from vzfs.store.faults import step
from vzfs.store.index import Attributes, Index
from vzfs.store.layout import Layout, TemplatePaths, farm_entry
from vzfs.store.magic import MagicLink, valid_template_name
from vzfs.store.seal import open_sealed
from vzfs.store.view import View
from vzfs.store.xattrs import ORIGIN_XATTR

_READING = os.O_RDONLY | os.O_NOATIME | os.O_NOFOLLOW


def template_names(layout: Layout) -> list[str]:
    """Names of the store's templates, sorted."""
    try:
        names = os.listdir(layout.templates_meta)
    except FileNotFoundError:
        return []
    return sorted(name for name in names if not name.startswith(".") and _exists(layout.template(name)))


def _exists(paths: TemplatePaths) -> bool:
    return paths.index.is_file() and paths.tree.is_dir()


def open_index(layout: Layout, name: str) -> Index:
    """Map the index of template ``name``, examined as a whole if it wasn't before (``vzfs.store.seal``).

    Raises ``NotFoundError``, ``DamagedError``.
    """
    return open_sealed(template_paths(layout, name)).index


def template_paths(layout: Layout, name: str) -> TemplatePaths:
    """Where the template ``name`` lies, sound or damaged. Raises ``NotFoundError`` when there is none."""
    paths = layout.template(name)
    if not _exists(paths):
        known = ", ".join(template_names(layout)) or "none"
        raise NotFoundError(
            f"there is no template {name!r} in {layout.root}",
            remedy=f"there are: {known}; make one with: vzfs template create {name} --from SOURCE",
        )
    return paths


class OpenTemplate:
    """One template in use. Node and inode number of its entry ``n`` is ``base + leader[n]``.

    ``digest`` says what is in it (``vzfs.store.seal``).
    """

    __slots__ = ("_farm_fd", "_plain_fd", "_root_fd", "base", "digest", "end", "index", "name")

    def __init__(self, layout: Layout, name: str, view: View | None = None) -> None:
        """Links are planted through ``view``, if given, as the directories must be in which they are."""
        paths = template_paths(layout, name)
        self.name = name
        sealed = open_sealed(paths)
        self.index, self.digest = sealed.index, sealed.digest
        self.base = self.index.ino_base
        self.end = self.base + self.index.count
        self._plain_fd = os.open(paths.tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._root_fd = linux.clone_mount(
                linux.fd_path(self._plain_fd), linux.MOUNT_RDONLY | linux.MOUNT_NOSUID | linux.MOUNT_NOATIME
            )
        except OSError:  # not permitted in a container, unknown to an old kernel: then O_NOATIME must do
            self._root_fd = os.dup(self._plain_fd)
        try:
            self._farm_fd = _open_farm(paths.links) if view is None else view.open_directory(paths.links)
        except FileNotFoundError:
            self._farm_fd = -1

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self._plain_fd, self._root_fd, self._farm_fd):
            if fd >= 0:
                os.close(fd)
        self._plain_fd = self._root_fd = self._farm_fd = -1

    def open_file(self, entry: int) -> int:
        """A descriptor to read the regular file ``entry``.

        Where the kernel permits, it is on a mount of its own on which nothing can be written, whoever gets hold of the
        descriptor and reopens it, and no access time changes.
        """
        return linux.openat2(self._root_fd, self.index.path(entry), _READING)

    def open_source(self, entry: int) -> int:
        """A descriptor to copy the regular file ``entry`` from: blocks are not shared across mounts before 5.18."""
        return linux.openat2(self._plain_fd, self.index.path(entry), _READING)

    def link_text(self, entry: int) -> bytes:
        """Text of the magic link to ``entry``."""
        return MagicLink(self.name, self.index.path(entry)).text()

    def plant_link(self, dir_fd: int, name: bytes, entry: int) -> None:
        """Make ``name`` in ``dir_fd`` a magic link to ``entry``: the farm's prepared one, else a fresh one.

        Raises ``FileExistsError`` and other ``OSError``.
        """
        try:
            os.link(farm_entry(entry), name, src_dir_fd=self._farm_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError:  # EMLINK, EXDEV, no farm; if the disk is full, symlink says so
            os.symlink(self.link_text(entry), name, dir_fd=dir_fd)

    def origin(self, entry: int) -> bytes:
        """Text of ``trusted.vzfs.origin`` on what was copied from ``entry``."""
        return b"%s/%d" % (self.name.encode(), entry)

    def group_key(self, entry: int) -> bytes:
        """Name of the record, in ``cow/links``, of the link group that ``entry`` belongs to."""
        return b"%s:%d" % (self.name.encode(), self.index.leader[entry])

    def unfold_into(self, dir_fd: int, entry: int) -> None:
        """Make the empty directory ``dir_fd`` equal to the directory ``entry``, each child a magic link."""
        for child in self.index.children(entry):
            self.plant_link(dir_fd, self.index.name(child), child)
        step("unfold:planted")
        os.setxattr(dir_fd, ORIGIN_XATTR, self.origin(entry))
        apply_attributes(dir_fd, self.index.attributes(entry), self.index.xattrs(entry))


def _open_farm(path: Path) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def parse_group_key(key: bytes) -> tuple[str, int] | None:
    """Template and leader in the name of a link group's record, the reverse of ``OpenTemplate.group_key``."""
    name, colon, number = key.decode("ascii", "replace").rpartition(":")
    if not colon or not valid_template_name(name) or not number.isdecimal() or len(number) > 10:
        return None
    return (name, int(number)) if str(int(number)) == number else None


def apply_attributes(target: bytes | int, attributes: Attributes, xattrs: dict[str, bytes]) -> None:
    """Give a new object these attributes: an open one, or that at a path whose last component is not followed.

    In the order that leaves all of them standing: chown drops setuid bits and capabilities, an ACL changes the mode.
    """
    follow = isinstance(target, int)
    now = os.stat(target, follow_symlinks=follow)
    chown = (now.st_uid, now.st_gid) != (attributes.uid, attributes.gid)
    if chown:
        os.chown(target, attributes.uid, attributes.gid, follow_symlinks=follow)
    for name, value in xattrs.items():
        os.setxattr(target, name, value, follow_symlinks=follow)
    if not stat.S_ISLNK(attributes.mode) and (chown or xattrs or now.st_mode != attributes.mode):
        os.chmod(target, stat.S_IMODE(attributes.mode))
    os.utime(target, ns=(attributes.atime_ns, attributes.mtime_ns), follow_symlinks=follow)
