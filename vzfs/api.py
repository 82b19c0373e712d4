"""The Python interface for lifecycle managers, which the command line uses as well.

    from vzfs import Store

    store = Store()                                  # $VZFS_ROOT or /vz
    container = store.create(101, template="debian-12")
    with container.mounted() as root:
        subprocess.run(["chroot", root, "/bin/sh", "-c", "echo hello > /etc/motd"])
    print(list(container.diff()))
    container.destroy()

Every call is synchronous and may be made from any thread; every deliberate error is a ``VzfsError``. Root is needed for
all that changes something.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vzfs.errors import BusyError, DamagedError, NotFoundError, NotMountedError, UnsupportedError, UsageError
from vzfs.fuse import mount as mounts
from vzfs.store.conf import OSTEMPLATE, VE_ROOT, Conf
from vzfs.store.container import CtId, create_container, destroy_container, existing_container
from vzfs.store.layout import CONF, LOG, Layout
from vzfs.store.lock import Holder, read_holder
from vzfs.store.magic import valid_template_name
from vzfs.store.noted import identity_of, read_note
from vzfs.store.problem import Problem
from vzfs.store.progress import Progress, no_progress
from vzfs.store.shape import container_paths, faults, is_container
from vzfs.store.users import template_users

if TYPE_CHECKING:
    from vzfs.fuse.state import Agreed, State, Statistics
    from vzfs.store.diff import Change
    from vzfs.store.sources import SourceOptions
    from vzfs.store.template import TemplateInfo

StrPath = str | os.PathLike[str]

MAX_BUSY_POLL_US = 10_000
"""Polling for longer than this would be nothing but a lost CPU."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a container is doing; ``since`` in seconds since 1970, ``ct`` its number, else its path.

    What the engine agreed upon with the kernel: the FUSE ``protocol``, for example ``7.45``, the names of its
    ``flags``, whether the kernel reads and writes files by itself (``passthrough``), and ``max_write`` in bytes. They
    are ``None`` where that isn't known: libfuse, below the pyfuse3 engine, doesn't tell.

    ``problem`` says what is wrong with the container's own files at first sight, ``None``: nothing. What they would
    have told is then empty or ``None``; ``check`` looks closer.
    """

    ct: str
    path: str
    template: str
    mounted: bool
    mountpoint: str | None
    pid: int | None
    engine: str | None
    since: float | None
    read_only: bool
    protocol: str | None = None
    flags: tuple[str, ...] | None = None
    passthrough: bool | None = None
    max_write: int | None = None
    problem: str | None = None


class Store:
    """The templates and containers below one root directory, ``$VZFS_ROOT`` or ``/vz`` if not given."""

    def __init__(self, root: StrPath | None = None) -> None:
        self.layout = Layout.at(root)

    @property
    def root(self) -> Path:
        """The root directory."""
        return self.layout.root

    def create_template(
        self, name: str, source: str, options: SourceOptions | None = None, progress: Progress = no_progress
    ) -> Template:
        """Make a template from a directory, a tar archive, ``-`` or ``debootstrap:SUITE``; as fast as
        it can be copied.

        Raises ``UsageError``, ``ExistsError``, ``SourceError``, ``FullError``, ``UnsupportedError``; nothing is
        left then.
        """
        from vzfs.store.template import create_template

        _need_root()
        create_template(self.layout, name, source, options, progress)
        return Template(self, name)

    def templates(self) -> list[Template]:
        """All templates, by name."""
        from vzfs.store.opened import template_names

        return [Template(self, name) for name in template_names(self.layout)]

    def template(self, name: str) -> Template:
        """The template ``name``, sound or damaged. Raises ``NotFoundError``."""
        from vzfs.store.opened import template_paths

        template_paths(self.layout, name)
        return Template(self, name)

    def create(
        self, ct: CtId, *, template: str, name: str | None = None, mountpoint: StrPath | None = None
    ) -> Container:
        """Make a container, in milliseconds and a few blocks whatever the template's size.

        ``ct`` is a number or a path, ``name`` and ``mountpoint`` go into its conf. Raises ``ExistsError``,
        ``NotFoundError`` (the template), ``UsageError``, ``FullError``.
        """
        _need_root()
        return Container(self, create_container(self.layout, ct, template, name=name, mountpoint=mountpoint))

    def containers(self) -> list[Container]:
        """The containers in the store's own folder, by number."""
        return [Container(self, path) for path in container_paths(self.layout)]

    def container(self, ct: CtId) -> Container:
        """The container with this number, path or NAME. Raises ``NotFoundError``, ``UsageError``."""
        return Container(self, existing_container(self.layout, ct))


class Template:
    """A sealed template."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name

    @property
    def path(self) -> Path:
        """Where its files are."""
        return self.store.layout.template(self.name).tree

    def users(self) -> list[Container]:
        """The containers that need it."""
        return [Container(self.store, path) for path in template_users(self.store.layout, self.name)]

    def info(self) -> TemplateInfo:
        """Its figures. Raises ``DamagedError`` when its index can't be used."""
        from vzfs.store.template import template_info

        return template_info(self.store.layout, self.name, [container.ct for container in self.users()])

    def summary(self) -> TemplateInfo:
        """Its figures as far as they can be told, so that one damaged template keeps nobody from seeing the others."""
        from vzfs.store.template import damaged_info

        try:
            return self.info()
        except DamagedError as error:
            used_by = [container.ct for container in self.users()]
            return damaged_info(self.store.layout, self.name, used_by, error.message)

    def dump(self) -> Iterator[str]:
        """Its index as lines of text."""
        from vzfs.store.template import dump_template

        return dump_template(self.store.layout, self.name)

    def verify(self, progress: Progress = no_progress) -> list[Problem]:
        """Compare every file's content and attributes with the index; reads all of it."""
        from vzfs.store.template import verify_template

        return verify_template(self.store.layout, self.name, progress)

    def remove(self) -> None:
        """Remove it. Raises ``BusyError`` naming the containers that need it."""
        from vzfs.store.template import remove_template

        _need_root()
        remove_template(self.store.layout, self.name, [container.ct for container in self.users()])


class Container:
    """A container's directory and, while mounted, its root."""

    def __init__(self, store: Store, path: Path) -> None:
        self.store = store
        self.path = path

    @property
    def alias(self) -> str:
        """The last part of its path."""
        return self.path.name

    @property
    def ct(self) -> str:
        """How to call it: its number, or its path if it lies elsewhere."""
        return self.alias if self.path.parent == self.store.layout.containers else str(self.path)

    @property
    def conf(self) -> Conf:
        """Its settings, read anew."""
        return Conf.load(self.path / CONF)

    @property
    def mountpoint(self) -> Path:
        """Where it is mounted if nothing else is said: ``VE_ROOT`` (``$VEID`` replaced), else the store's ``root``.

        Raises ``UsageError`` for a relative ``VE_ROOT``.
        """
        configured = self.conf.get(VE_ROOT).replace("$VEID", self.alias).replace("${VEID}", self.alias)
        if configured and not os.path.isabs(configured):
            raise UsageError(
                f"{self.path / CONF} says to mount at {configured!r}, relative to nothing",
                remedy=f"write the whole path there: {VE_ROOT}=/…",
            )
        return Path(configured) if configured else self.store.layout.mounts / self.alias

    def mount(
        self,
        mountpoint: StrPath | None = None,
        *,
        read_only: bool = False,
        engine: str = "auto",
        sync: str = "data",
        log: str | None = None,
        busy_poll_us: int = 0,
        timeout: float = 10.0,
    ) -> Path:
        """Mount it, served by a process of its own, and return where when the root is usable.

        ``engine`` is ``auto`` (direct where this machine can, else pyfuse3), ``direct`` or ``pyfuse3``.
        ``busy_poll_us`` is for how many microseconds the direct engine looks for the next request before it sleeps,
        which costs CPU. ``sync`` says when vzfs flushes what it copies: ``none``, ``data`` or ``full``.
        ``log`` is a file (``vzfs.log`` in the container), ``journal`` or ``-``; ``timeout`` is in seconds. Raises
        ``BusyError`` when it is mounted already, ``UsageError``, ``UnsupportedError``, ``DamagedError``,
        ``NotFoundError`` (its template).
        """
        _need_root()
        order = self._order(
            mountpoint, read_only=read_only, engine=engine, sync=sync, log=log, busy_poll_us=busy_poll_us
        )
        self._examine_templates()
        mounts.start(order, timeout)
        return Path(str(order["mountpoint"]))

    def serve(
        self,
        mountpoint: StrPath | None = None,
        *,
        read_only: bool = False,
        engine: str = "auto",
        sync: str = "data",
        log: str | None = "-",
        busy_poll_us: int = 0,
    ) -> None:
        """Mount it and serve it in this process's main thread until it is unmounted, or SIGTERM or SIGINT comes."""
        from vzfs.fuse.serve import Order, serve

        _need_root()
        order = self._order(
            mountpoint, read_only=read_only, engine=engine, sync=sync, log=log, busy_poll_us=busy_poll_us
        )
        serve(Order(**order))  # type: ignore[arg-type]

    def _examine_templates(self) -> None:
        """Have the indexes examined that weren't, as those of an earlier vzfs or of a copied store: of a large one that
        takes seconds, for which ``timeout`` was not meant. What is wrong with them, the serving process says."""
        for name in self.conf.templates():
            with contextlib.suppress(OSError, UsageError, DamagedError):
                paths = self.store.layout.template(name)
                if read_note(paths.checked, identity_of(paths.index.stat())):
                    continue
                from vzfs.store.seal import open_sealed

                open_sealed(paths)

    def _order(
        self,
        mountpoint: StrPath | None,
        *,
        read_only: bool,
        engine: str,
        sync: str,
        log: str | None,
        busy_poll_us: int,
    ) -> dict[str, object]:
        _check_busy_poll(busy_poll_us, engine)
        where = os.path.abspath(mountpoint) if mountpoint is not None else str(self.mountpoint)
        return {
            "root": str(self.store.root),
            "container": str(self.path),
            "mountpoint": os.path.realpath(where),
            "engine": engine,
            "read_only": read_only,
            "sync": sync,
            "busy_poll_us": busy_poll_us,
            "log": (log if log in ("-", "journal") else os.path.abspath(log)) if log else str(self.path / LOG),
        }

    def umount(self, *, lazy: bool = False, timeout: float = 10.0) -> None:
        """Unmount it and wait, up to ``timeout`` seconds, until its serving process has ended.

        ``lazy`` takes it out of sight at once; it ends when its last file is closed. Raises ``NotMountedError``,
        ``BusyError`` naming the processes that use it.
        """
        _need_root()
        holder = read_holder(self.path)
        where = holder.mountpoint if holder and holder.mountpoint else os.path.realpath(self.mountpoint)
        mounts.unmount(self.path, Path(where), lazy=lazy, timeout_s=timeout)

    @contextlib.contextmanager
    def mounted(self, mountpoint: StrPath | None = None, **options: object) -> Iterator[Path]:
        """Mount it for a ``with`` block; options are those of ``mount``."""
        where = self.mount(mountpoint, **options)  # type: ignore[arg-type]
        try:
            yield where
        finally:
            with contextlib.suppress(NotMountedError):
                self.umount()

    def is_served(self) -> bool:
        """Whether it is mounted now. Raises ``DamagedError`` when its lock can't tell."""
        holder = read_holder(self.path)
        return holder is not None and holder.doing == "serves"

    def status(self) -> Status:
        """What it is doing now, also of a damaged one. Raises ``NotFoundError`` when it was removed meanwhile."""
        found = faults(self.path)
        template, holder = "", None
        try:
            template = self.conf.get(OSTEMPLATE)
            if not valid_template_name(template):
                found.append(f"its conf names no template: {OSTEMPLATE} is {template!r}")
        except (DamagedError, OSError) as error:
            self._refuse_removed()
            if not found:
                found.append(f"its conf can't be read: {_reason(error)}")
        try:
            holder = read_holder(self.path)
        except (DamagedError, OSError) as error:
            if not found:
                found.append(f"its lock can't be read: {_reason(error)}")
        agreed = _agreed(holder)
        return Status(
            ct=self.ct,
            path=str(self.path),
            template=template,
            mounted=holder is not None and holder.doing == "serves",
            mountpoint=holder.mountpoint if holder else None,
            pid=holder.pid if holder else None,
            engine=holder.engine if holder else None,
            since=holder.since if holder else None,
            read_only=holder.read_only if holder else False,
            protocol=agreed.protocol if agreed else None,
            flags=agreed.flags if agreed else None,
            passthrough=agreed.passthrough if agreed else _without_passthrough(holder),
            max_write=agreed.max_write if agreed else None,
            problem="; ".join(found) or None,
        )

    def _refuse_removed(self) -> None:
        if not is_container(self.store.layout, self.path):
            raise NotFoundError(f"there is no container at {self.path}", remedy="vzfs list shows all")

    def stats(self) -> Statistics:
        """What its mount has counted so far; asking disturbs nobody. Subtract two for what happened in between.

        Raises ``NotMountedError``; ``UnsupportedError`` when another version of vzfs serves it.
        """
        _need_root()
        holder = read_holder(self.path)
        if holder is None or holder.doing != "serves":
            raise self._not_mounted()
        if holder.state is None:
            raise UnsupportedError(
                f"the process that serves {self.path} is of an older version, which doesn't count",
                remedy=f"umount and mount it again: vzfs umount {self.ct}; vzfs mount {self.ct}",
            )
        try:
            with _state_of(holder.pid, holder.state) as state:
                return state.statistics()
        except (FileNotFoundError, ProcessLookupError) as error:
            raise self._not_mounted() from error

    def _not_mounted(self) -> NotMountedError:
        return NotMountedError(
            f"container {self.path} is not mounted, so nothing is counted",
            remedy=f"mount it with: vzfs mount {self.ct}",
        )

    def diff(self, *, content: bool = False) -> Iterator[Change]:
        """What it added, changed, renamed and removed against its template; with ``content`` also how text differs."""
        from vzfs.store.diff import diff_container

        return diff_container(self.store.layout, self.path, content=content)

    def check(self, *, repair: bool = False) -> list[Problem]:
        """Find what an interrupted or foreign change left wrong, repair it if asked; ``BusyError`` while mounted."""
        from vzfs.store.check import check_container

        return check_container(self.store.layout, self.path, repair=repair)

    def destroy(self) -> None:
        """Remove it and all its data, damaged or not. Raises ``BusyError`` while it is mounted."""
        _need_root()
        try:
            read_holder(self.path)
        except DamagedError:
            self._refuse_mounted()
        destroy_container(self.store.layout, self.path)

    def _refuse_mounted(self) -> None:
        """Raise ``BusyError`` if it is mounted where it usually is: for a container that has no lock to tell."""
        try:
            place = self.mountpoint
        except (DamagedError, UsageError, OSError):
            place = self.store.layout.mounts / self.alias
        entry = mounts.vzfs_mount(Path(os.path.realpath(place)))
        if entry is not None and entry.source == mounts.source_name(self.path):
            raise BusyError(f"container {self.path} is mounted at {place}", remedy=f"umount {place}")


def _reason(error: DamagedError | OSError) -> str:
    return error.message if isinstance(error, DamagedError) else error.strerror or str(error)


def _state_of(pid: int, fd: int) -> State:
    from vzfs.fuse.state import State

    return State.open_of(pid, fd)


def _agreed(holder: Holder | None) -> Agreed | None:
    """What the holder's engine and the kernel agreed upon, as far as that can be seen from here."""
    if holder is None or holder.state is None:
        return None
    try:
        with _state_of(holder.pid, holder.state) as state:
            return state.agreed
    except (OSError, UnsupportedError):  # it ended meanwhile, or is of another version
        return None


def _without_passthrough(holder: Holder | None) -> bool | None:
    return False if holder is not None and holder.engine == "pyfuse3" else None


def _check_busy_poll(microseconds: int, engine: str) -> None:
    if not 0 <= microseconds <= MAX_BUSY_POLL_US:
        raise UsageError(
            f"can't poll for {microseconds} µs", remedy=f"choose from 0, which is not to poll, to {MAX_BUSY_POLL_US}"
        )
    if microseconds and engine == "pyfuse3":
        raise UsageError("the pyfuse3 engine can't poll", remedy="leave busy polling out, or choose the direct engine")


def _need_root() -> None:
    if os.geteuid() != 0:
        raise UnsupportedError("this needs root", remedy="run it as root, e.g. with sudo")
