"""Client processes: start them, let them go at once, put together what they measured.

Rule: what is measured lies in ``client.py``; here time only passes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.supervise import uninterrupted
from benchmarks.workload import Outcome, Place
from benchmarks.workloads.client import Order

PROGRAM = Path(__file__).with_name("client.py")
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/nonexistent",
    "LC_ALL": "C",
    "DEBIAN_FRONTEND": "noninteractive",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
}
"""Of every program that is measured, so that a figure depends on no one's settings."""


class ClientError(RuntimeError):
    """A client failed: its system returned an error, or something that no file system may return."""


class Client:
    """One client process; it gets its order, then waits for the word."""

    def __init__(self, order: Order) -> None:
        self.loop = order["loop"]
        self._order = order
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def get_ready(self) -> None:
        """Hand over the order and wait until all is prepared. Raises ``ClientError``."""
        self._say(json.dumps(self._order))
        if self._hear() != "ready":
            raise self._failure()

    def go(self) -> None:
        """Start the loop; also ends one that goes on until it is told."""
        self._say("")

    def answer(self) -> dict[str, Any]:
        """Wait for what it measured. Raises ``ClientError``."""
        line = self._hear()
        if not line:
            raise self._failure()
        return dict(json.loads(line))

    def close(self) -> None:
        """End it, however far it came."""
        self.process.kill()
        self.process.communicate()

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it says on its standard error why it ended
            _pipe(self.process.stdin).write(line + "\n")
            _pipe(self.process.stdin).flush()

    def _hear(self) -> str:
        return _pipe(self.process.stdout).readline().rstrip("\n")

    def _failure(self) -> ClientError:
        self.process.kill()
        said = self.process.communicate()[1].strip()
        return ClientError(f"{self.loop}: {said or f'ended with {self.process.returncode}'}")


def _pipe(file: IO[str] | None) -> IO[str]:
    if file is None:
        raise ClientError("a client without pipes")
    return file


@contextlib.contextmanager
def started(orders: Sequence[Order]) -> Iterator[list[Client]]:
    """A ready client for each of ``orders``; they are gone afterwards."""
    # One that was forgotten would keep its mount busy.
    with uninterrupted() as interruptible, contextlib.ExitStack() as stack:
        clients = []
        for order in orders:
            client = Client(order)
            stack.callback(client.close)
            clients.append(client)
            with interruptible():
                client.get_ready()
        with interruptible():
            yield clients


def measure(place: Place, orders: Order | Sequence[Order], *, names: int = 0, whole: bool = False) -> Outcome:
    """Let a client do each of ``orders`` (below ``place.root``, if they say nothing else), all at once.

    The time is from the first one's start to the last one's end. ``names`` as in ``Outcome``. With ``whole`` everything
    is one operation.
    """
    each = [orders] if isinstance(orders, dict) else list(orders)
    with started([{"root": str(place.root)} | order for order in each]) as clients:
        for client in clients:
            client.go()
        answers = [client.answer() for client in clients]
    seconds = (max(answer["end"] for answer in answers) - min(answer["start"] for answer in answers)) / 1e9
    return Outcome(
        seconds=seconds,
        operations=1 if whole else sum(answer["operations"] for answer in answers),
        proof="; ".join(answer["proof"] for answer in answers),
        bytes=sum(answer["bytes"] for answer in answers),
        latencies_ns=() if whole else [latency for answer in answers for latency in latencies(answer)],
        names=names,
    )


def latencies(answer: dict[str, Any]) -> list[int]:
    """How long each operation of an answer took, in ns."""
    stamps = [answer["start"], *answer["stamps"]]
    return [end - start for start, end in itertools.pairwise(stamps)]


def shares(place: Place, loop: str, paths: Sequence[str]) -> list[Order]:
    """``paths`` dealt out to ``place.clients`` clients: the work as a whole stays the same."""
    return [{"loop": loop, "paths": list(paths[turn :: place.clients])} for turn in range(place.clients)]


def program(*commands: Sequence[str], output: str = "all", chroot: bool = False) -> Order:
    """An order to run ``commands`` one after the other; see ``client.spawn``."""
    return {
        "loop": "spawn",
        "commands": [list(command) for command in commands],
        "environment": ENVIRONMENT,
        "output": output,
        "chroot": chroot,
    }
