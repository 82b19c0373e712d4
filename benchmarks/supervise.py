"""Nothing stays behind, however a run ends.

The program runs itself again as a *worker* in a mount namespace of its own, with one scratch folder. The worker
unmounts and removes what it made, also after an error or a signal. If it ends without having done so (killed,
crashed), the supervisor kills every process left in that namespace, upon which the kernel takes its mounts away, and
removes the folder. If the supervisor is killed, the worker gets SIGTERM and cleans up as usual.

The namespace also keeps containers that other programs start meanwhile from getting copies of the mounts.

A signal becomes an exception wherever the worker just is. Rule: what has to be undone is done, noted and undone within
``uninterrupted()``, and whoever goes on after an error asks ``raise_again()`` first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import vzfs
from benchmarks.systems import DIES_WITH_PARENT

FOLDER_VARIABLE = "VZFS_BENCH_FOLDER"
"""Set in the worker: its scratch folder."""
PREFIX = "vzfs-bench-"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SIGNAL_EXIT = 128
PATIENCE_S = 20.0


def is_worker() -> bool:
    """Whether this process is the worker."""
    return FOLDER_VARIABLE in os.environ


def supervise(arguments: Sequence[str], scratch: Path) -> int:
    """Run this program again as the worker and give its exit status; 128 + number after a signal."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=scratch.absolute()))
    unshare = ["unshare", "--mount", "--propagation", "private"]
    worker: subprocess.Popen[bytes] | None = None
    got: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        got.append(number)
        if worker is not None and worker.poll() is None:
            # Asked once more, it is not asked any more.
            worker.send_signal(number if len(got) < 3 else signal.SIGKILL)

    with _handlers(dict.fromkeys(SIGNALS, forward)):
        try:
            worker = subprocess.Popen(
                [*DIES_WITH_PARENT, *unshare, sys.executable, "-m", "benchmarks", *arguments],
                env=environment(folder),
                process_group=0,  # Ctrl-C of a terminal reaches the supervisor only, which passes it on once
            )
            namespace = _namespace(worker)
            if got:
                worker.send_signal(got[0])
            code = worker.wait()
            _kill_left(namespace)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if got:
        return SIGNAL_EXIT + got[0]
    return code if code >= 0 else SIGNAL_EXIT - code


def environment(folder: Path) -> dict[str, str]:
    """For the worker and what it starts: this checkout, modules compiled once, as an installed vzfs has them."""
    values = dict(os.environ)
    values.pop("PYTHONDONTWRITEBYTECODE", None)
    values.pop("VZFS_ROOT", None)
    # Instead of the folder that the user is in, which "python -m" would put first.
    own = str(Path(vzfs.__file__).parents[1])
    return values | {
        "PYTHONPATH": own,
        "PYTHONSAFEPATH": "1",
        "PYTHONPYCACHEPREFIX": str(folder / "pycache"),
        FOLDER_VARIABLE: str(folder),
    }


@contextlib.contextmanager
def worker_folder() -> Iterator[Path]:
    """The worker's scratch folder; the first signal becomes ``SystemExit``, further ones don't disturb the cleaning."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    with _handlers(dict.fromkeys(SIGNALS, _Stop())):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # the supervisor may not be there any more
            raise_again()


@contextlib.contextmanager
def uninterrupted() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Let signals wait; then whoever handled them before does, also if the block raised.

    Gives what makes a part of the block an exception: there they act as before, those that have waited at once. So an
    interruption comes only from that part, and finds all else whole::

        with uninterrupted() as interruptible, ExitStack() as stack:
            stack.enter_context(something_to_undo())
            with interruptible():
                ...
    """
    waiting: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    def deliver() -> None:
        while waiting:
            signal.raise_signal(waiting.pop(0))

    @contextlib.contextmanager
    def interruptible() -> Iterator[None]:
        with _handlers(before):
            deliver()
            yield

    try:
        with _handlers(dict.fromkeys(SIGNALS, wait)):
            yield interruptible
    finally:
        deliver()


def raise_again() -> None:
    """Raise the worker's ``SystemExit`` once more if there was a signal, outside of ``uninterrupted()``.

    An error of the cleaning may have taken its place, or it came up in a destructor, where exceptions are lost.
    """
    handler = signal.getsignal(SIGNALS[0])
    if isinstance(handler, _Stop):
        handler.raise_again()


class _Stop:
    """The worker's handler. It stays in place after the first signal, to tell of it and to let others do nothing."""

    def __init__(self) -> None:
        self._first = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self._first:
            self._first = number
            self.raise_again()

    def raise_again(self) -> None:
        if self._first:
            raise SystemExit(SIGNAL_EXIT + self._first)


@contextlib.contextmanager
def _handlers(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _namespace(worker: subprocess.Popen[bytes]) -> str:
    """The worker's mount namespace, once it has one of its own; empty if it ended before."""
    own = os.readlink("/proc/self/ns/mnt")
    while worker.poll() is None:
        with contextlib.suppress(OSError):
            other = os.readlink(f"/proc/{worker.pid}/ns/mnt")
            if other != own:
                return other
        time.sleep(0.005)
    return ""


def _kill_left(namespace: str) -> None:
    """Kill all processes in a mount namespace and wait until they are gone."""
    end = time.monotonic() + PATIENCE_S
    while namespace and time.monotonic() < end:
        left = [pid for pid in filter(str.isdecimal, os.listdir("/proc")) if _is_in(pid, namespace)]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.02)


def _is_in(pid: str, namespace: str) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/mnt") == namespace
    return False
