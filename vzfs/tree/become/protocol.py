"""How a node becomes the container's own, whatever it is: staged without the lock, put in place under it.

Rules:
- One thread does it, others that need the same node wait for it.
- Whatever goes wrong before the rename that puts it in place leaves nothing changed.
- ``stage`` only touches the stage and immutable templates and so runs without the tree's lock; ``commit`` runs under
  it. Steps are named by ``faults.step`` so that a test can die at each.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from vzfs.tree.area import PrivateArea, Sync
from vzfs.tree.become.stage import Stage
from vzfs.tree.lookup import Lookup
from vzfs.tree.node import Kind, Node
from vzfs.tree.table import Table

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Protocol:
    """Of one mount; ``busy`` has the nodes that are becoming the container's own, by number."""

    def __init__(
        self,
        area: PrivateArea,
        lock: AbstractContextManager[object],
        sync: Sync,
        table: Table,
        lookup: Lookup,
        stage: Stage,
    ) -> None:
        self._area = area
        self._lock = lock
        self._sync = sync
        self._table = table
        self._lookup = lookup
        self._stage = stage
        self.busy: dict[int, threading.Event] = {}

    def own(
        self,
        number: int,
        wanted: Callable[[Node], bool],
        stage: Callable[[Node, bytes], None],
        commit: Callable[[Node, bytes], None],
    ) -> None:
        """Stage and commit unless the node is the container's own already; one thread does it, others wait for it."""
        while True:
            with self._lock:
                node = self._lookup.get(number)
                if not wanted(node) or (node.dead and node.is_directory):
                    return
                other = self.busy.get(number)
                if other is None:
                    self.busy[number] = threading.Event()
                    break
            other.wait()
        try:
            self._stage_and_commit(number, stage, commit)
        finally:
            with self._lock:
                self.busy.pop(number).set()

    def _stage_and_commit(
        self, number: int, stage: Callable[[Node, bytes], None], commit: Callable[[Node, bytes], None]
    ) -> None:
        with self._lock:
            node = self._lookup.get(number)
            staged = self._area.stage_name()
        flush = None
        try:
            stage(node, staged)
            with self._lock:
                node = self._lookup.get(number)
                if node.dead and node.is_directory:
                    self._stage.discard(staged)
                    return
                commit(node, staged)
                flush = self._flush_place(node)
        except BaseException:
            with contextlib.suppress(OSError):
                self._stage.discard(staged)
            raise
        if flush:
            flush()

    def _flush_place(self, node: Node) -> Callable[[], None] | None:
        """With ``Sync.FULL``, what flushes the directory in which the node just changed; to be run without the lock."""
        if self._sync is not Sync.FULL or node.dead:
            return None
        fd = os.open(b".", _DIRECTORY, dir_fd=self._lookup.location(node)[0])

        def flush() -> None:
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

        return flush

    def is_own(self, number: int) -> bool:
        """Whether the node is known to be the container's own; a quick answer, which never turns from yes to no."""
        node = self._table.registered(number)
        return node is not None and (node.kind is Kind.DIRECTORY or node.kind is Kind.OWN)
