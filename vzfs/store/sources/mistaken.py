"""Sources that are not what a template is made of, though they look like a directory or an archive of files.

Rule: refused is only what certainly is something else: a part of a store of vzfs, whose files mean something only where
they lie, or a container image in the form in which its layers are archives. The error says what it is and what to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from itertools import islice

from vzfs import linux
from vzfs.errors import SourceError
from vzfs.store import magic
from vzfs.store.index import MAGIC
from vzfs.store.layout import CONF, PRIVATE_AREA
from vzfs.store.sources.errors import shown
from vzfs.store.xattrs import ORIGIN_XATTR

_ORIGIN = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}/[0-9]{1,10}")
_LOOKED_AT = 1000
"""Names of a directory that are looked at: a root has a few dozen."""
_MANIFEST_MAX = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOUNT_IT = "mount the container and give its mount point: vzfs mount CT_ID; --from /vz/root/CT_ID"
_EXPORT_IT = (
    "export the files of a container of it: docker create --name x IMAGE; docker export x | vzfs template create NAME "
    "--from - (podman has the same commands)"
)


def refuse_part_of_store(fd: int, path: bytes) -> None:
    """Raise ``SourceError`` if the directory ``fd``, at ``path`` in the source, is in a private area, a container, or
    where a store keeps what it knows of templates."""
    if _is_private_area(fd):
        raise _refused(path, "a container's private area", _MOUNT_IT)
    if _exists(fd, CONF) and _is_planted(fd, PRIVATE_AREA):
        raise _refused(path, "a container of vzfs with its settings and links", _MOUNT_IT)
    if _exists(fd, ".vzfs") and _has_index(fd):
        raise _refused(path, "a store of vzfs", "give the folder of one template, or the mount point of a container")


def refuse_image(fd: int) -> None:
    """Raise ``SourceError`` if the directory ``fd`` is an image as docker save or an OCI tool writes it."""
    if _is_file(fd, "oci-layout") and _is_file(fd, "index.json") and _is_directory(fd, "blobs"):
        raise _refused(b"", "an OCI image layout, with its layers as archives", _EXPORT_IT)
    if _is_file(fd, "manifest.json") and _has_layers(fd):
        raise _refused(b"", "an image as docker save writes it, with its layers as archives", _EXPORT_IT)


def refuse_unpacked(fd: int) -> None:
    """Raise ``SourceError`` if what an archive had in it, now in ``fd``, is one of these."""
    refuse_image(fd)
    if _exists(fd, CONF) and _is_planted(fd, PRIVATE_AREA):
        raise _refused(b"", "an archive of a container of vzfs", _MOUNT_IT)
    if _has_magic_links(fd):
        raise _refused(b"", "an archive of a container's private area", _MOUNT_IT)


def _refused(path: bytes, what: str, remedy: str) -> SourceError:
    where = f"{shown(path)} in the source" if path else "the source"
    return SourceError(f"{where} is {what}, not a root directory", remedy=remedy)


def _is_private_area(fd: int) -> bool:
    try:
        return _ORIGIN.fullmatch(os.getxattr(fd, ORIGIN_XATTR)) is not None
    except OSError:
        return False


def _is_planted(fd: int, name: str) -> bool:
    """Whether ``name`` in ``fd`` is a private area, also one copied without its extended attributes."""
    try:
        area = os.open(name, _DIRECTORY, dir_fd=fd)
    except OSError:
        return False
    try:
        return _is_private_area(area) or _has_magic_links(area)
    finally:
        os.close(area)


def _has_magic_links(fd: int) -> bool:
    """Whether most names in the directory ``fd`` are magic links to what a template has under that name in its root, as
    in a container that was changed little."""
    found = looked = 0
    with os.scandir(fd) as entries:
        for entry in islice(entries, _LOOKED_AT):
            looked += 1
            name = os.fsencode(entry.name)
            with contextlib.suppress(OSError):
                link = magic.parse(os.readlink(name, dir_fd=fd)) if entry.is_symlink() else None
                found += link is not None and link.path == name
    return 2 * found > looked


def _has_index(fd: int) -> bool:
    """Whether ``.vzfs`` in ``fd`` has the index of a template."""
    try:
        meta = os.open(".vzfs", _DIRECTORY, dir_fd=fd)
    except OSError:
        return False
    try:
        return any(_begins(meta, os.fsencode(name) + b"/index", MAGIC) for name in os.listdir(meta))
    finally:
        os.close(meta)


def _begins(dir_fd: int, path: bytes, start: bytes) -> bool:
    return _read(dir_fd, path, len(start)) == start


def _has_layers(fd: int) -> bool:
    """Whether ``manifest.json`` lists images with their layers, as docker save writes it."""
    try:
        images = json.loads(_read(fd, b"manifest.json", _MANIFEST_MAX))
    except (ValueError, RecursionError):
        return False
    return isinstance(images, list) and any(isinstance(image, dict) and "Layers" in image for image in images)


def _read(dir_fd: int, path: bytes, size: int) -> bytes:
    """The first bytes of a regular file; nothing of anything else."""
    try:
        fd = linux.openat2(dir_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return b""
    try:
        return os.read(fd, size) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)


def _mode(fd: int, name: str) -> int:
    try:
        return os.lstat(name, dir_fd=fd).st_mode
    except OSError:
        return 0


def _exists(fd: int, name: str) -> bool:
    return _mode(fd, name) != 0


def _is_file(fd: int, name: str) -> bool:
    return stat.S_ISREG(_mode(fd, name))


def _is_directory(fd: int, name: str) -> bool:
    return stat.S_ISDIR(_mode(fd, name))
