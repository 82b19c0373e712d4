"""Threads for what takes long.

Rule: handing work over costs the serving thread next to nothing, a microsecond instead of the ten that
``concurrent.futures`` takes for results nobody asks for. The work deals with its own errors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeAlias

Work: TypeAlias = tuple[Callable[..., object], tuple[object, ...]]


class Workers:
    """At most ``most`` threads, begun as they are needed; ``begin`` is the first thing that each does."""

    def __init__(self, most: int, begin: Callable[[], None]) -> None:
        self._most = most
        self._begin = begin
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._pending = 0

    def submit(self, function: Callable[..., object], *arguments: object) -> None:
        """Let a thread call ``function``, which must not raise."""
        with self._lock:
            self._pending += 1
            short = self._pending > len(self._threads) < self._most
        if short:
            thread = threading.Thread(target=self._run, name=f"vzfs-worker-{len(self._threads)}")
            self._threads.append(thread)
            thread.start()
        self._queue.put((function, arguments))

    def _run(self) -> None:
        self._begin()
        while (work := self._queue.get()) is not None:
            function, arguments = work
            function(*arguments)
            with self._lock:
                self._pending -= 1
            del work, function, arguments

    def finish(self) -> None:
        """Wait until everything handed over is done, and end the threads. Nothing may be handed over any more."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
