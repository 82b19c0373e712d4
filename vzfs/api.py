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
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vzfs.errors import (
    BusyError,
    DamagedError,
    NotFoundError,
    NotMountedError,
    UnsupportedError,
    UsageError,
    VzfsError,
)
from vzfs.fuse import mount as mounts
from vzfs.fuse import umount as umounts
from vzfs.fuse.probe import PATIENCE_S
from vzfs.fuse.table import resolved, vzfs_mount
from vzfs.status import Status, agreed_of, counts_of, states_of, without_passthrough
from vzfs.store.conf import NAME, OSTEMPLATE, USERNS_UID, VE_ROOT, Conf
from vzfs.store.container import (
    NO_UID,
    CtId,
    create_container,
    destroy_container,
    existing_container,
    known_containers,
)
from vzfs.store.layout import CONF, LOG, Layout
from vzfs.store.lock import Holder, last_holder, read_holder
from vzfs.store.magic import valid_template_name
from vzfs.store.noted import identity_of, read_note
from vzfs.store.problem import Problem
from vzfs.store.progress import Progress, no_progress
from vzfs.store.shape import container_paths, faults, is_container
from vzfs.store.users import template_users

if TYPE_CHECKING:
    from vzfs.fuse.state import Statistics
    from vzfs.store.diff import Change
    from vzfs.store.sources import SourceOptions
    from vzfs.store.template import TemplateInfo

_logger = logging.getLogger(__name__)
StrPath = str | os.PathLike[str]

MOUNT_TIMEOUT_S = 60.0
"""How long a root may take to be usable: a fifth of a second mostly, more on a node that boots with many containers."""
ENDING_S = 10.0
"""How long a server may take to end whose root was unmounted: it flushes what it has."""
CGROUPS = ("auto", "keep")
MAX_BUSY_POLL_US = 10_000
"""Polling for longer than this would be nothing but a lost CPU."""


class Store:
    """The templates and containers below one root directory, ``$VZFS_ROOT`` or ``/vz`` if not given."""

    def __init__(self, root: StrPath | None = None) -> None:
        self.layout = Layout.at(root)

    @property
    def root(self) -> Path:
        """The root directory."""
        return self.layout.root

    @property
    def exists(self) -> bool:
        """Whether there is one already: the first template makes it, and until then it is empty."""
        return self.layout.is_there

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
        _logger.info("making template %s of %s in %s", name, source, self.root)
        create_template(self.layout, name, source, options, progress)
        _logger.info("made template %s", name)
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
        self,
        ct: CtId,
        *,
        template: str,
        name: str | None = None,
        mountpoint: StrPath | None = None,
        userns_uid: int | None = None,
    ) -> Container:
        """Make a container, in milliseconds and a few blocks whatever the template's size.

        ``ct`` is a number or a path, ``name`` and ``mountpoint`` go into its conf, and so does ``userns_uid``, the user
        of the node who is root in the container's user namespace: that user, too, can reach its mount point then.
        Raises ``ExistsError``, ``NotFoundError`` (the template), ``UsageError``, ``FullError``.
        """
        _need_root()
        path = create_container(self.layout, ct, template, name=name, mountpoint=mountpoint, userns_uid=userns_uid)
        _logger.info("made container %s from template %s", path, template)
        return Container(self, path)

    def containers(self) -> list[Container]:
        """The containers in the store's own folder, by number."""
        return [Container(self, path) for path in container_paths(self.layout)]

    def container(self, ct: CtId) -> Container:
        """The container with this number, path or NAME. Raises ``NotFoundError``, ``UsageError``."""
        found = Container(self, existing_container(self.layout, ct))
        _logger.debug("%s is the container %s", ct, found.path)
        return found

    def statuses(self) -> list[Status]:
        """The status of all containers in the store's own folder, but of those that are removed meanwhile.

        As fast for many roots that don't answer as for one.
        """
        found = [(container, *container._holder()) for container in self.containers()]
        states = states_of([holder for _, holder, _ in found])
        rows = []
        for (container, holder, problems), state in zip(found, states, strict=True):
            with contextlib.suppress(NotFoundError, FileNotFoundError):
                rows.append(container._status(holder, problems, state))
        return rows

    def mounted_at(self, mountpoint: StrPath) -> Container | None:
        """The container whose root is mounted at ``mountpoint``, alive or dead; ``None`` when nothing of vzfs is there.

        Raises ``NotFoundError`` when the store doesn't know it.
        """
        place = resolved(mountpoint)
        entry = vzfs_mount(Path(place))
        if entry is None:
            return None
        known = [Container(self, path) for path in known_containers(self.layout)]
        for container in known:
            with contextlib.suppress(DamagedError):
                holder = last_holder(container.path)
                if holder is not None and holder.device == entry.device:
                    return container
        raise NotFoundError(
            f"{place} is the root of a container that the store {self.root} doesn't know ({entry.source})",
            remedy="name the container by its path, or give its store with --root; umount --lazy takes a dead one away",
        )


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

        _logger.info("verifying template %s", self.name)
        return verify_template(self.store.layout, self.name, progress)

    def remove(self) -> None:
        """Remove it. Raises ``BusyError`` naming the containers that need it."""
        from vzfs.store.template import remove_template

        _need_root()
        _logger.info("removing template %s", self.name)
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
        """Its settings, read anew. Raises ``NotFoundError`` when it was destroyed, ``DamagedError``."""
        try:
            return Conf.load(self.path / CONF)
        except FileNotFoundError:
            raise NotFoundError(f"there is no container at {self.path}", remedy="vzfs list shows all") from None

    @property
    def mountpoint(self) -> Path:
        """Where it is mounted if nothing else is said: ``VE_ROOT`` (``$VEID`` replaced), else below the store's
        ``root``, or below its ``userns`` if conf has ``USERNS_UID``.

        Raises ``UsageError`` for a relative ``VE_ROOT``.
        """
        conf = self.conf
        configured = conf.get(VE_ROOT).replace("$VEID", self.alias).replace("${VEID}", self.alias)
        if configured and not os.path.isabs(configured):
            raise UsageError(
                f"{self.path / CONF} says to mount at {configured!r}, relative to nothing",
                remedy=f"write the whole path there: {VE_ROOT}=/…",
            )
        if configured:
            return Path(configured)
        layout = self.store.layout
        return layout.userns / self.alias / "root" if conf.get(USERNS_UID) else layout.mounts / self.alias

    @property
    def userns_uid(self) -> int | None:
        """The user of the node who is root in its user namespace. Raises ``DamagedError`` when conf names none."""
        text = self.conf.get(USERNS_UID)
        if not text:
            return None
        if not text.isdecimal() or not 0 < int(text) < NO_UID:
            raise DamagedError(f"{self.path / CONF}: {USERNS_UID} is {text!r}", remedy="set it to a uid, or remove it")
        return int(text)

    def _usual_place(self) -> Path:
        """``mountpoint`` with symbolic links resolved; where the store has it if the conf can't tell."""
        try:
            place = self.mountpoint
        except (VzfsError, OSError):
            place = self.store.layout.mounts / self.alias
        return Path(resolved(place))

    def mount(
        self,
        mountpoint: StrPath | None = None,
        *,
        read_only: bool = False,
        engine: str = "auto",
        sync: str = "data",
        log: str | None = None,
        busy_poll_us: int = 0,
        passthrough_above: int | None = None,
        timeout: float = MOUNT_TIMEOUT_S,
        mkdir: bool = False,
        cgroup: str = "auto",
    ) -> Path:
        """Mount it, served by a process of its own, and return where when the root is usable.

        ``engine`` is ``auto`` (direct where this machine can, from Linux 5.17 on, else pyfuse3), ``direct`` or
        ``pyfuse3``.
        ``busy_poll_us`` is for how many microseconds the direct engine looks for the next request before it sleeps,
        which costs CPU. ``passthrough_above`` is the size in bytes (64 KiB) above which it lets the kernel read a
        template's file by itself: such a file is in memory once for all containers, but who reads it while another
        program first changes it keeps the old one.
        ``sync`` says when vzfs flushes what it copies: ``none``, ``data`` or ``full``.
        ``log`` is a file (``vzfs.log`` in the container) or ``journal``; ``timeout`` is in seconds. ``mkdir`` makes a
        ``mountpoint`` that is missing; the container's own is made in any case. ``cgroup`` is ``auto``, where the
        process leaves the cgroup of its caller unless that is a service's, or ``keep``. Raises
        ``BusyError`` when it is mounted already, ``UsageError``, ``UnsupportedError``, ``DamagedError``,
        ``NotFoundError`` (its template). Nothing is mounted then.
        """
        _need_root()
        if log == "-":
            raise UsageError(
                "a process of its own can't log to standard error: its caller goes on without it",
                remedy="give a file, or journal; or serve in this process: vzfs mount --foreground",
            )
        order = self._order(
            mountpoint,
            read_only=read_only,
            engine=engine,
            sync=sync,
            log=log,
            busy_poll_us=busy_poll_us,
            passthrough_above=passthrough_above,
            mkdir=mkdir,
            cgroup=cgroup,
        )
        _logger.info("mounting %s at %s", self.path, order["mountpoint"])
        _logger.debug("order: %s", order)
        umounts.await_detached(self.path, min(timeout, ENDING_S))
        self._examine_templates()
        mounts.start(order, timeout)
        _logger.info("mounted %s; it logs to %s", self.path, order["log"])
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
        passthrough_above: int | None = None,
        mkdir: bool = False,
    ) -> None:
        """Mount it and serve it in this process's main thread until it is unmounted, or SIGTERM or SIGINT comes."""
        from vzfs.fuse.serve import Order, serve

        _need_root()
        order = self._order(
            mountpoint,
            read_only=read_only,
            engine=engine,
            sync=sync,
            log=log,
            busy_poll_us=busy_poll_us,
            passthrough_above=passthrough_above,
            mkdir=mkdir,
            cgroup="keep",
        )
        umounts.await_detached(self.path, ENDING_S)
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
        passthrough_above: int | None,
        mkdir: bool,
        cgroup: str,
    ) -> dict[str, object]:
        _check_busy_poll(busy_poll_us, engine)
        if passthrough_above is None:
            passthrough_above = mounts.PASSTHROUGH_ABOVE
        elif passthrough_above < 0:
            raise UsageError(f"no file has {passthrough_above} bytes", remedy="choose 0 or more for passthrough-above")
        if mountpoint is not None and not os.fspath(mountpoint):
            raise UsageError("an empty path is no mount point", remedy="give a directory, or leave it out")
        if cgroup not in CGROUPS:
            raise UsageError(f"{cgroup!r} says nothing about a cgroup", remedy=f"choose {' or '.join(CGROUPS)}")
        return {
            "root": str(self.store.root),
            "container": str(self.path),
            "mountpoint": resolved(self.mountpoint if mountpoint is None else mountpoint),
            "mkdir": mkdir or mountpoint is None,
            "userns_uid": self.userns_uid if mountpoint is None and not self.conf.get(VE_ROOT) else None,
            "cgroup": cgroup,
            "engine": engine,
            "read_only": read_only,
            "sync": sync,
            "busy_poll_us": busy_poll_us,
            "passthrough_above": passthrough_above,
            "log": (log if log in ("-", "journal") else os.path.abspath(log)) if log else str(self.path / LOG),
        }

    def umount(self, *, lazy: bool = False, everywhere: bool = False, timeout: float = 10.0) -> None:
        """Unmount it and wait, up to ``timeout`` seconds, until its serving process has ended.

        ``lazy`` takes it out of sight at once; it ends when its last file is closed. ``everywhere`` unmounts it in
        other mount namespaces and takes its bind mounts away, too. Raises ``NotMountedError``, ``BusyError`` naming
        what uses it; nothing was touched then.
        """
        _need_root()
        _logger.info("unmounting %s", self.path)
        umounts.unmount(
            self.path, self._usual_place(), umounts.How(lazy=lazy, everywhere=everywhere, timeout_s=timeout)
        )

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

    def status(self, *, patience: float = PATIENCE_S) -> Status:
        """What it is doing now, also of a damaged one. Raises ``NotFoundError`` when it was removed meanwhile.

        A mounted root is asked, for up to ``patience`` seconds, whether it answers; 0: not.
        """
        holder, found = self._holder()
        return self._status(holder, found, *states_of([holder], patience))

    def _holder(self) -> tuple[Holder | None, list[str]]:
        """Who holds it, and what is wrong with its own files at first sight."""
        found = faults(self.path)
        try:
            return read_holder(self.path), found
        except (DamagedError, OSError) as error:
            return None, found or [f"its lock can't be read: {_reason(error)}"]

    def _status(self, holder: Holder | None, found: list[str], state: str) -> Status:
        template = name = ""
        try:
            conf = self.conf
            template, name = conf.get(OSTEMPLATE), conf.get(NAME)
            if not valid_template_name(template):
                found = [*found, f"its conf names no template: {OSTEMPLATE} is {template!r}"]
        except (DamagedError, NotFoundError, OSError) as error:
            self._refuse_removed()
            found = found or [f"its conf can't be read: {_reason(error)}"]
        agreed = agreed_of(holder)
        return Status(
            ct=self.ct,
            path=str(self.path),
            template=template,
            mounted=state in ("mounted", "not answering"),
            mountpoint=holder.mountpoint if holder and state != "detached" else None,
            pid=holder.pid if holder else None,
            engine=holder.engine if holder else None,
            since=holder.since if holder else None,
            read_only=holder.read_only if holder else False,
            protocol=agreed.protocol if agreed else None,
            flags=agreed.flags if agreed else None,
            passthrough=agreed.passthrough if agreed else without_passthrough(holder),
            max_write=agreed.max_write if agreed else None,
            state=state,
            name=name or None,
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
            with counts_of(holder.pid, holder.state) as state:
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

        _logger.info("comparing %s with its template", self.path)
        return diff_container(self.store.layout, self.path, content=content)

    def check(self, *, repair: bool = False) -> list[Problem]:
        """Find what an interrupted or foreign change left wrong, repair it if asked; ``BusyError`` while mounted."""
        from vzfs.store.check import check_container

        _logger.info("%s %s", "repairing" if repair else "checking", self.path)
        return check_container(self.store.layout, self.path, repair=repair)

    def destroy(self) -> None:
        """Remove it and all its data, damaged or not, and what a dead server left mounted.

        Raises ``BusyError`` while it is mounted.
        """
        _need_root()
        try:
            umounts.await_detached(self.path, ENDING_S)
            umounts.unmount_dead_of(self.path, self._usual_place())
        except DamagedError:
            self._refuse_mounted()
        destroy_container(self.store.layout, self.path)
        _logger.info("destroyed %s", self.path)

    def _refuse_mounted(self) -> None:
        """Raise ``BusyError`` if it is mounted where it usually is: for a container that has no lock to tell."""
        place = self._usual_place()
        entry = vzfs_mount(place)
        if entry is not None and entry.source == mounts.source_name(self.path):
            raise BusyError(f"container {self.path} is mounted at {place}", remedy=f"umount {place}")


def _reason(error: VzfsError | OSError) -> str:
    return error.message if isinstance(error, VzfsError) else error.strerror or str(error)


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


__all__ = ["Container", "Status", "Store", "StrPath", "Template"]
