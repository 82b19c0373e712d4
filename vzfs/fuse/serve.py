"""The serving process of one mount: takes the lock, mounts, serves until unmounted or told to stop, cleans up.

Rule: whoever starts it learns from the report whether the root is usable or why not; after that it answers to signals
(SIGTERM, SIGINT: unmount and end) and to umount(8) only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import logging.handlers
import os
import resource
import signal
import sys as python
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pyfuse3
import trio

from vzfs.errors import DamagedError, FullError, UnsupportedError, UsageError, VzfsError
from vzfs.fuse.mount import attach, detach, source_name, unmount_dead, vzfs_mount
from vzfs.fuse.portable import Engine
from vzfs.store.conf import OSTEMPLATE, Conf
from vzfs.store.container import remember_user
from vzfs.store.layout import CONF, OWN_FOLDER_MODE, Layout
from vzfs.store.lock import Holder, Lock
from vzfs.store.magic import valid_template_name
from vzfs.tree.area import Sync
from vzfs.tree.tree import Tree

log = logging.getLogger(__name__)

JOURNAL_SOCKET = "/dev/log"
_NOBODY_WAITS = f"fuse_reply_* failed with {os.strerror(errno.ENOENT)}"


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


def serve(order: Order, report_fd: int = -1) -> None:
    """Mount and serve until unmounted. ``report_fd``, if given, gets one JSON line: ``{}`` when the root is usable.

    Raises ``VzfsError`` when the root can't be mounted.
    """
    container, mountpoint = Path(order.container), Path(order.mountpoint)
    layout = Layout.at(order.root)
    engine = _choose_engine(order.engine)
    holder = Holder(os.getpid(), "mounts", time.time(), str(mountpoint), engine, order.read_only)
    lock = Lock.acquire(container, holder)
    try:
        _set_up_log(order)
        _prepare_mountpoint(mountpoint)
        _set_up_process()
        template = _template_of(container)
        tree = _open_tree(order, layout, container)
        try:
            remember_user(layout, template, container)
            device = _mount(tree, order, mountpoint)
            try:
                lock.describe(replace(holder, doing="serves", device=device))
                log.info("serving %s at %s, engine %s", container, mountpoint, engine)
                trio.run(_run, report_fd)
            finally:
                detach(mountpoint, device)
                pyfuse3.close(unmount=False)
                log.info("unmounted %s", mountpoint)
        finally:
            tree.close()
    finally:
        lock.release()


def _choose_engine(wanted: str) -> str:
    if wanted in ("auto", "pyfuse3"):
        return "pyfuse3"
    raise UsageError(f"there is no engine {wanted!r}", remedy="the engines are: auto, pyfuse3")


def _set_up_log(order: Order) -> None:
    handler: logging.Handler
    if order.log == "-":
        handler = logging.StreamHandler()
    elif order.log == "journal":
        if not os.path.exists(JOURNAL_SOCKET):
            raise UnsupportedError(
                f"no journal or syslog listens at {JOURNAL_SOCKET}", remedy="choose a file: --log FILE"
            )
        handler = logging.handlers.SysLogHandler(JOURNAL_SOCKET)
    else:
        try:
            handler = logging.FileHandler(order.log)
        except OSError as error:
            raise UsageError(
                f"can't write the log {order.log}: {error.strerror}", remedy="choose another with --log"
            ) from error
    stamp = "" if order.log == "journal" else "%(asctime)s "
    handler.setFormatter(logging.Formatter(f"{stamp}vzfs[%(process)d] {order.container}: %(levelname)s %(message)s"))
    handler.addFilter(_is_news)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _is_news(record: logging.LogRecord) -> bool:
    """False for what pyfuse3 logs as an error when nobody waits for an answer any more: the program was killed, or the
    kernel asked to release a file and ended the mount."""
    return not (record.name == "pyfuse3" and record.getMessage().endswith(_NOBODY_WAITS))


def _set_up_process() -> None:
    os.umask(0)  # modes come from the kernel, with the program's umask applied
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-900")  # its death takes a container's root away


def _prepare_mountpoint(mountpoint: Path) -> None:
    unmount_dead(mountpoint)
    try:
        mountpoint.mkdir(mode=OWN_FOLDER_MODE, parents=True, exist_ok=True)
        occupied = any(mountpoint.iterdir())
    except OSError as error:
        _refuse_full_disk(error, mountpoint)
        raise UsageError(
            f"can't mount at {mountpoint}: {error.strerror}", remedy="choose an empty directory"
        ) from error
    if os.path.ismount(mountpoint) or occupied:
        raise UsageError(f"can't mount at {mountpoint}: it is not empty", remedy="choose an empty directory")


def _template_of(container: Path) -> str:
    name = Conf.load(container / CONF).get(OSTEMPLATE)
    if not valid_template_name(name):
        raise DamagedError(
            f"{container / CONF} names no template: OSTEMPLATE is {name!r}",
            remedy="set it to the one that the container was made from; vzfs template list shows all",
        )
    return name


def _open_tree(order: Order, layout: Layout, container: Path) -> Tree:
    try:
        sync = Sync(order.sync)
    except ValueError:
        raise UsageError(f"there is no sync policy {order.sync!r}", remedy="choose none, data or full") from None
    try:
        return Tree(layout, container, read_only=order.read_only, sync=sync)
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


def _mount(tree: Tree, order: Order, mountpoint: Path) -> str:
    """Mount, and give the new file system's ``major:minor``."""
    fd = attach(mountpoint, source_name(Path(order.container)), read_only=order.read_only)
    entry = vzfs_mount(mountpoint)
    device = entry.device if entry else ""
    try:
        pyfuse3.init(Engine(tree), f"/dev/fd/{fd}", set())  # libfuse serves a descriptor that is mounted already
    except BaseException:
        detach(mountpoint, device)
        raise
    return device


async def _run(report_fd: int) -> None:
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            nursery.start_soon(_end_on_signal, signals)
            report(report_fd, {})
            await pyfuse3.main()
            nursery.cancel_scope.cancel()


async def _end_on_signal(signals: object) -> None:
    async for number in signals:  # type: ignore[attr-defined]
        log.info("ending on signal %d", number)
        pyfuse3.terminate()


def report(fd: int, message: dict[str, object]) -> None:
    """Tell the process that waits at the other end of ``fd``, and let it go on."""
    if fd >= 0:
        with contextlib.suppress(BrokenPipeError):
            os.write(fd, json.dumps(message).encode() + b"\n")
        os.close(fd)


def main() -> None:
    """Entry point of the detached process: an order in JSON on the command line, the report on descriptor 3."""
    order = Order(**json.loads(python.argv[1]))
    report_fd = int(python.argv[2])
    try:
        serve(order, report_fd)
    except VzfsError as error:
        log.warning("not served: %s", error)
        report_failure(report_fd, error)
        python.exit(error.exit_code)
    except Exception as error:
        log.exception("the serving process failed")
        report_failure(report_fd, VzfsError(f"mounting failed: {error}", remedy=f"see {order.log}"))
        python.exit(70)


def report_failure(fd: int, error: VzfsError) -> None:
    """Report that the root will not be usable."""
    with contextlib.suppress(OSError):  # closed: it was usable once, and nobody waits any more
        report(fd, {"error": type(error).__name__, "message": error.message, "remedy": error.remedy})


if __name__ == "__main__":
    main()
