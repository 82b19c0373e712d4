"""Containers on disk: made from a template in a few links, found by number, name or path, destroyed.

Rule: a container is one directory that means the same wherever it lies; it appears by one rename and disappears by one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import time
from pathlib import Path

from vzfs import linux
from vzfs.errors import DamagedError, ExistsError, FullError, NotFoundError, UsageError
from vzfs.store.conf import NAME, OSTEMPLATE, TEMPLATES, USERNS_UID, VE_ROOT, Conf
from vzfs.store.layout import CONF, COW, DUMP, OWN_FOLDER_MODE, PRIVATE_AREA, Layout
from vzfs.store.lock import Holder, Lock, make_lock
from vzfs.store.opened import OpenTemplate, template_names
from vzfs.store.shape import WORK_PREFIXES, container_paths, is_container
from vzfs.store.users import forget_user, remember_user

CtId = int | str | os.PathLike[str]
"""What names a container: its number, its path (anything with a ``/``), or the ``NAME`` in its conf."""

NO_UID = (1 << 32) - 1
"""What says "no user" where a uid is expected (chown(2))."""
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")
_ABANDONED_S = 3600.0
"""Age in seconds from which a work folder counts as abandoned: one takes milliseconds to make, minutes to remove."""


def container_path(layout: Layout, ct: CtId) -> Path:
    """Where the container ``ct`` lies or would lie (a ``NAME`` must). Raises ``NotFoundError``, ``UsageError``."""
    text = os.fspath(ct) if not isinstance(ct, int) else str(ct)
    if "/" in text:
        return Path(os.path.abspath(text))
    if _NUMBER.fullmatch(text):
        return layout.containers / text
    if not text or text.isdigit() or text.startswith((".", "-")):
        raise UsageError(f"{text!r} can't name a container", remedy="give a number such as 101, a path, or a NAME")
    found = named_containers(layout, text)
    if len(found) > 1:
        raise UsageError(
            f"{len(found)} containers have the NAME {text!r}: {', '.join(map(str, found))}",
            remedy="say which by its number or path, and give one another NAME in its conf",
        )
    if not found:
        raise NotFoundError(f"no container in {layout.root} has the NAME {text!r}", remedy="vzfs list shows them all")
    return found[0]


def named_containers(layout: Layout, name: str) -> list[Path]:
    """The containers that the store knows by the ``NAME`` ``name``, those elsewhere among them."""
    found = []
    for path in known_containers(layout):
        with contextlib.suppress(OSError, DamagedError):  # of one that is damaged or removed nobody knows its NAME
            if (path.name == name and path.parent == layout.containers) or Conf.load(path / CONF).get(NAME) == name:
                found.append(path)
    return found


def existing_container(layout: Layout, ct: CtId) -> Path:
    """Where the container ``ct`` lies. Raises ``NotFoundError`` when nothing there is a container."""
    path = container_path(layout, ct)
    if not is_container(layout, path):
        if os.path.lexists(path):
            raise NotFoundError(
                f"what is at {path} is no container: it lacks {CONF} or {PRIVATE_AREA}",
                remedy="see what it is, and move it away or remove it by hand",
            )
        raise NotFoundError(
            f"there is no container at {path}",
            remedy=f"make it with: vzfs create {ct} --template NAME; vzfs list shows all",
        )
    return path


def known_containers(layout: Layout) -> list[Path]:
    """The containers in the store's own folder, then those elsewhere that were made or mounted with this store."""
    found = container_paths(layout)
    with contextlib.suppress(FileNotFoundError):
        for template in sorted(os.listdir(layout.templates_meta)):
            folder = layout.templates_meta / template / "users"
            with contextlib.suppress(OSError):
                paths = sorted(Path(os.readlink(folder / link)) for link in os.listdir(folder))
                found += [path for path in paths if path not in found and (path / CONF).is_file()]
    return found


def create_container(
    layout: Layout,
    ct: CtId,
    template: str,
    *,
    name: str | None = None,
    mountpoint: str | os.PathLike[str] | None = None,
    userns_uid: int | None = None,
) -> Path:
    """Make the container ``ct`` from ``template``; ``name``, ``mountpoint`` and ``userns_uid`` go into its conf.

    So does a mount point of its own if the one that it would have is that of another container of the same last name.

    Raises ``ExistsError``, ``NotFoundError`` (no such template), ``UsageError``, ``FullError``.
    """
    path = _free_path(layout, ct)
    if name is not None:
        _check_name(layout, name)
    if mountpoint is not None and not os.fspath(mountpoint):
        raise UsageError("an empty path is no mount point", remedy="give a directory, or leave it out")
    if userns_uid is not None and not 0 < userns_uid < NO_UID:
        raise UsageError(f"{userns_uid} is no user", remedy="give the uid that the container's root is mapped to")
    if mountpoint is None and userns_uid is None and any(other.name == path.name for other in known_containers(layout)):
        mountpoint = layout.mounts / f"{path.name}-{_mark(path)}"
    layout.make()
    _clear_work_folders(layout)
    opened = OpenTemplate(layout, template)
    staged = path.with_name(f".new-{path.name}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir(mode=OWN_FOLDER_MODE)
        settings = {NAME: name, VE_ROOT: os.path.abspath(mountpoint) if mountpoint is not None else None}
        settings[USERNS_UID] = None if userns_uid is None else str(userns_uid)
        _fill(staged, opened, settings)
        _appear(staged, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FullError(f"no space left for container {path}", remedy="free some space there") from error
        raise
    finally:
        _remove(staged)
        opened.close()
    remember_user(layout, template, path)
    return path


def _free_path(layout: Layout, ct: CtId) -> Path:
    text = str(ct) if isinstance(ct, int) else os.fspath(ct)
    if "/" not in text and not _NUMBER.fullmatch(text):
        raise UsageError(
            f"{text!r} can't be a new container", remedy="give a number such as 101, or a path; --name gives it a name"
        )
    path = container_path(layout, ct)
    if os.path.lexists(path):
        if not (path / CONF).is_file():
            raise ExistsError(
                f"{path} exists already, and is no container",
                remedy="choose another, or move that away",
            )
        raise ExistsError(f"{path} exists already", remedy=f"choose another, or remove it with: vzfs destroy {text}")
    return path


def _check_name(layout: Layout, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name) or name.isdecimal():
        raise UsageError(
            f"{name!r} can't be a container's NAME", remedy="use letters, digits, '_', '.' and '-', not only digits"
        )
    with contextlib.suppress(NotFoundError):
        raise ExistsError(f"{container_path(layout, name)} has the NAME {name!r} already", remedy="choose another")


def _fill(folder: Path, template: OpenTemplate, settings: dict[str, str | None]) -> None:
    (folder / COW).mkdir(mode=OWN_FOLDER_MODE)
    (folder / DUMP).mkdir(mode=OWN_FOLDER_MODE)
    area = folder / PRIVATE_AREA
    area.mkdir(mode=OWN_FOLDER_MODE)
    fd = os.open(area, os.O_RDONLY | os.O_DIRECTORY)
    try:
        template.unfold_into(fd, 0)
    finally:
        os.close(fd)
    conf = Conf(folder / CONF)
    conf.set(OSTEMPLATE, template.name)
    conf.set(TEMPLATES, template.name)
    for key, value in settings.items():
        if value is not None:
            conf.set(key, value)
    conf.set_digests({template.name: template.digest})
    (folder / CONF).write_text(conf.text())
    make_lock(folder)


def _appear(staged: Path, path: Path) -> None:
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        linux.renameat2(parent, os.fsencode(staged.name), parent, os.fsencode(path.name), linux.RENAME_NOREPLACE)
    except FileExistsError:
        raise ExistsError(f"{path} exists already", remedy="choose another number or path") from None
    finally:
        os.close(parent)


def destroy_container(layout: Layout, path: Path) -> None:
    """Remove the container at ``path`` and all that is in it. Raises ``BusyError`` while it is mounted."""
    with contextlib.ExitStack() as held:
        try:
            held.callback(Lock.acquire(path, Holder(os.getpid(), "destroys", time.time())).release)
        except DamagedError:
            pass  # what is no file can't be held by anybody; the rename lets one of two destroyers win
        doomed = path.with_name(f".old-{path.name}-{secrets.token_hex(4)}")
        try:
            os.rename(path, doomed)
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no container at {path}", remedy="vzfs list shows all") from error
        for template in template_names(layout):  # its conf needn't be readable
            forget_user(layout, template, path)
        _remove(doomed)
    for folder in (layout.mounts / path.name, layout.userns / path.name / "root", layout.userns / path.name):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _remove(path: Path) -> None:
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        linux.remove_tree(parent, os.fsencode(path.name))
    finally:
        os.close(parent)


def _clear_work_folders(layout: Layout) -> None:
    """Remove what creations and destructions left in the store's folder that were interrupted some time ago."""
    for name in os.listdir(layout.containers):
        path = layout.containers / name
        with contextlib.suppress(OSError):  # another process removes it as well
            if name.startswith(WORK_PREFIXES) and time.time() - path.lstat().st_ctime > _ABANDONED_S:
                _remove(path)


def _mark(path: Path) -> str:
    """A few characters by which ``path`` differs from others."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
