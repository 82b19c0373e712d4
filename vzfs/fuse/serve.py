"""The serving process of one mount: takes the lock, mounts, serves until unmounted or told to stop, cleans up.

Rule: whoever starts it learns from the report whether the root is usable or why not; after that it answers to signals
(SIGTERM, SIGINT: unmount and end) and to umount(8) only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from vzfs import linux
from vzfs.errors import DamagedError, FullError, UnsupportedError, UsageError, VzfsError
from vzfs.fuse.cgroup import leave_cgroup
from vzfs.fuse.log import set_up_log
from vzfs.fuse.mount import PASSTHROUGH_ABOVE, attach, detach, source_name, unmount_dead
from vzfs.fuse.passage import let_pass
from vzfs.fuse.state import DURABLE, OPEN, State
from vzfs.fuse.table import vzfs_mount
from vzfs.fuse.wire import InitFlag
from vzfs.store.granted import Granted
from vzfs.store.layout import CONF, OWN_FOLDER_MODE, Layout
from vzfs.store.lock import Holder, Lock
from vzfs.store.users import remember_user
from vzfs.tree.area import Sync
from vzfs.tree.durable import Words
from vzfs.tree.tree import Tree

log = logging.getLogger(__name__)

DEEP = 100_000
"""Frames of Python that a walk through a hostile container's directories may take; they are no C stack."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to serve and how; ``log`` is a file, ``journal``, or ``-`` for standard error."""

    root: str
    container: str
    mountpoint: str
    engine: str = "auto"
    read_only: bool = False
    sync: str = "data"
    log: str = "-"
    busy_poll_us: int = 0
    passthrough_above: int = PASSTHROUGH_ABOVE
    """Bytes of a template's file above which the direct engine lets the kernel read it by itself."""
    withheld: int = 0
    """Bits of ``wire.InitFlag`` that the direct engine does not take, as on a kernel without them: for tests."""
    mkdir: bool = True
    """Make the mount point where it is missing."""
    userns_uid: int | None = None
    """Make the folder around the mount point one that only root and this user can pass."""
    cgroup: str = "keep"
    """``auto`` to leave the caller's (``vzfs.fuse.cgroup``), or ``keep``."""
    device: int = -1
    """Descriptor of a mount that is there already, to be served from now on; and the state that goes with it."""
    state: int = -1
    lock: int = -1
    """Descriptor of the container's lock, held by who gives the order; else it is taken."""


@dataclass(slots=True)
class Served:
    """A mount: its device (-1 after its end), what is shared about it, where it is, and the engine it began with."""

    fd: int
    state: State
    mountpoint: Path
    device: str
    engine: str

    def end(self) -> None:
        """Take it away, in use or not, unless that was done."""
        if self.fd < 0:
            return
        detach(self.mountpoint, self.device)
        os.close(self.fd)
        self.fd = -1


def serve(order: Order, report_fd: int = -1) -> None:
    """Mount and serve until unmounted. ``report_fd``, if given, gets one JSON line: ``{}`` when the root is usable.

    Raises ``VzfsError`` when the root can't be mounted.
    """
    container, mountpoint = Path(order.container), Path(order.mountpoint)
    layout = Layout.at(order.root)
    if order.engine not in ENGINES:
        raise UsageError(f"there is no engine {order.engine!r}", remedy=f"the engines are: {', '.join(ENGINES)}")
    place = leave_cgroup() if order.cgroup == "auto" else ""
    holder = Holder(os.getpid(), "mounts", time.time(), str(mountpoint), order.engine, order.read_only)
    with contextlib.ExitStack() as ending:
        lock = Lock.acquire(container, holder) if order.lock < 0 else Lock(order.lock)
        ending.callback(lock.release)
        set_up_log(order.log, order.container)
        resumed = order.device >= 0
        made: list[Path] = []  # until the root is usable
        if not resumed:
            ending.callback(_remove_empty, made)
            if order.userns_uid is not None:
                let_pass(mountpoint.parent, order.userns_uid)
            _prepare_mountpoint(mountpoint, made, mkdir=order.mkdir)
        _set_up_process()
        granted = _granted(container, layout)
        served = _adopt(order, mountpoint) if resumed else _mount(order, container, mountpoint)
        ending.callback(log.info, "unmounted %s", mountpoint)
        ending.callback(served.end)
        holder = replace(holder, engine=served.engine, device=served.device, state=served.state.fd, lock=lock.fileno())
        lock.describe(holder)
        run = _run_direct if served.engine == "direct" else _run_portable
        for name in granted.names:
            remember_user(layout, name, container)
        if not order.read_only:
            granted.note_digests()

        def ready() -> None:
            lock.describe(replace(holder, doing="serves"))
            made.clear()
            log.info("serving %s at %s, engine %s", container, mountpoint, served.engine)
            if order.cgroup == "auto":
                log.info("cgroup: %s", place)
            report(report_fd, {})

        run(order, layout, served, ready)


ENGINES = ("auto", "direct", "pyfuse3")


def _mount(order: Order, container: Path, mountpoint: Path) -> Served:
    """Mount, and find the engine that serves it."""
    reason = ""
    if order.engine != "pyfuse3":
        served = _attach(order, container, mountpoint, "direct")
        try:
            from vzfs.fuse.direct import negotiate

            negotiate(served.fd, served.state, order.withheld)
            return served
        except UnsupportedError as error:
            served.end()
            if order.engine == "direct":
                raise
            reason = error.message
            log.info("engine pyfuse3, because %s", error.message)
        except BaseException:
            served.end()
            raise
    _need_pyfuse3(reason)
    return _attach(order, container, mountpoint, "pyfuse3")


def _need_pyfuse3(reason: str) -> None:
    """Raise ``UnsupportedError`` if pyfuse3 can't run. ``reason``: why the direct engine can't, if it was tried."""
    try:
        import vzfs.fuse.portable  # noqa: F401
    except ImportError as error:
        but = f", and the direct one can't either: {reason}" if reason else ""
        raise UnsupportedError(
            f"the engine pyfuse3 can't run: {error}{but}",
            remedy="install what is missing, see: vzfs doctor" + ("" if reason else "; or choose --engine direct"),
        ) from error


def _attach(order: Order, container: Path, mountpoint: Path, engine: str) -> Served:
    fd = attach(mountpoint, source_name(container), read_only=order.read_only)
    entry = vzfs_mount(mountpoint)
    return Served(fd, State.create(), mountpoint, entry.device if entry else "", engine)


def _adopt(order: Order, mountpoint: Path) -> Served:
    """Take over a mount whose server died, from who kept its device open."""
    entry = vzfs_mount(mountpoint)
    if entry is None:
        raise UsageError(f"nothing of vzfs is mounted at {mountpoint}", remedy="mount it: vzfs mount")
    return Served(order.device, State.adopt(order.state), mountpoint, entry.device, "direct")


def _run_direct(order: Order, layout: Layout, served: Served, ready: Callable[[], None]) -> None:
    """Serve with the direct engine, in the main thread: a signal ends its wait for a request."""
    from vzfs.fuse.direct import Engine

    resumed = order.device >= 0

    def changed(number: int) -> None:
        engine.changed(number)

    tree = _open_tree(
        order,
        layout,
        passthrough_above=order.passthrough_above if served.state.has(InitFlag.PASSTHROUGH) else None,
        resume=resumed,
        changed=changed,
        durable=served.state.words[DURABLE:OPEN],
    )
    try:
        engine = Engine(tree, served.fd, served.state, busy_poll_us=order.busy_poll_us)
        if resumed:
            engine.resume()

        def end(number: int, frame: FrameType | None) -> None:
            log.info("ending on signal %d", number)
            engine.end()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        ready()
        try:
            engine.run()
        finally:
            served.end()  # before the tree: nobody can ask for more
    finally:
        tree.close()


def _run_portable(order: Order, layout: Layout, served: Served, ready: Callable[[], None]) -> None:
    from vzfs.fuse.portable import serve_mount

    tree = _open_tree(order, layout)
    try:
        serve_mount(tree, served.state, os.dup(served.fd), ready, served.end)  # libfuse closes what it serves
    finally:
        tree.close()


def _set_up_process() -> None:
    os.umask(0)  # modes come from the kernel, with the program's umask applied
    _raise_descriptor_limit()
    sys.setrecursionlimit(DEEP)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-900")  # its death takes a container's root away
    # Last, the above needs it. With it the kernel would let passed-through writes into reserved blocks and over quota.
    linux.drop_capability(linux.CAP_SYS_RESOURCE)


def _raise_descriptor_limit() -> None:
    """As far as this process may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    for limit in (most, hard):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, hard)))
            return


def _prepare_mountpoint(mountpoint: Path, made: list[Path], *, mkdir: bool) -> None:
    """Take a dead mount away from it, and make it if it is missing; adds what was made to ``made``, outermost first."""
    unmount_dead(mountpoint)
    entry = vzfs_mount(mountpoint)
    if entry is not None:  # not to be looked into: its server may hang
        raise UsageError(
            f"can't mount at {mountpoint}: {entry.source} is mounted there",
            remedy=f"unmount that with: vzfs umount {mountpoint}; or choose another directory",
        )
    try:
        if not mkdir and not mountpoint.exists():
            raise UsageError(
                f"can't mount at {mountpoint}: there is no such directory", remedy="make it, or add --mkdir"
            )
        for folder in [*reversed(mountpoint.parents), mountpoint]:
            if not folder.exists():
                folder.mkdir(mode=OWN_FOLDER_MODE if folder == mountpoint else 0o755, exist_ok=True)
                made.append(folder)
        occupied = any(mountpoint.iterdir())
    except OSError as error:
        _refuse_full_disk(error, mountpoint)
        raise UsageError(
            f"can't mount at {mountpoint}: {error.strerror}", remedy="choose an empty directory"
        ) from error
    if os.path.ismount(mountpoint) or occupied:
        raise UsageError(f"can't mount at {mountpoint}: it is not empty", remedy="choose an empty directory")


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in reversed(folders):
            folder.rmdir()


def _granted(container: Path, layout: Layout) -> Granted:
    """What the container may use; the template of its root is there and the right one."""
    try:
        granted = Granted(layout, container)
    except FileNotFoundError as error:
        raise DamagedError(
            f"container {container} is damaged: its {CONF} is missing",
            remedy="bring it back from a backup, or destroy the container",
        ) from error
    granted.open(granted.os_template).close()
    return granted


def _open_tree(
    order: Order,
    layout: Layout,
    *,
    passthrough_above: int | None = None,
    resume: bool = False,
    changed: Callable[[int], None] | None = None,
    durable: Words | None = None,
) -> Tree:
    container = Path(order.container)
    try:
        sync = Sync(order.sync)
    except ValueError:
        raise UsageError(f"there is no sync policy {order.sync!r}", remedy="choose none, data or full") from None
    try:
        return Tree(
            layout,
            container,
            read_only=order.read_only,
            sync=sync,
            passthrough_above=passthrough_above,
            resume=resume,
            changed=changed,
            durable=durable,
        )
    except OSError as error:
        _refuse_full_disk(error, container)
        raise DamagedError(
            f"container {container} can't be opened: {error.strerror}: {_shown(error.filename)}",
            remedy="see what is there; vzfs check finds more",
        ) from error


def _refuse_full_disk(error: OSError, where: Path) -> None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise FullError(f"no space left to mount {where}", remedy="free some space there") from error


def _shown(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else str(name)


def report(fd: int, message: dict[str, object]) -> None:
    """Tell the process that waits at the other end of ``fd``, and let it go on."""
    if fd >= 0:
        with contextlib.suppress(BrokenPipeError):
            os.write(fd, json.dumps(message).encode() + b"\n")
        os.close(fd)


def main() -> None:
    """Entry point of the detached process: an order in JSON on the command line, the report on descriptor 3."""
    order = Order(**json.loads(sys.argv[1]))
    report_fd = int(sys.argv[2])
    try:
        serve(order, report_fd)
    except VzfsError as error:
        log.warning("not served: %s", error)
        report_failure(report_fd, error)
        sys.exit(error.exit_code)
    except Exception as error:
        log.exception("the serving process failed")
        report_failure(report_fd, VzfsError(f"mounting failed: {error}", remedy=f"see {order.log}"))
        sys.exit(70)


def report_failure(fd: int, error: VzfsError) -> None:
    """Report that the root will not be usable."""
    with contextlib.suppress(OSError):  # closed: it was usable once, and nobody waits any more
        report(fd, {"error": type(error).__name__, "message": error.message, "remedy": error.remedy})


if __name__ == "__main__":
    main()
