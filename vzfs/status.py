"""What a container is doing: who holds it, how its mount is, and what its engine agreed upon with the kernel.

Rule: asking disturbs nobody and waits for no hanging server longer than it is told to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vzfs.errors import UnsupportedError
from vzfs.fuse import umount as umounts
from vzfs.fuse.probe import PATIENCE_S, Answer, ask
from vzfs.store.lock import Holder

if TYPE_CHECKING:
    from vzfs.fuse.state import Agreed, State

STATES = ("stopped", "mounting", "mounted", "not answering", "detached", "in use")
"""What a container may be doing. ``not answering``: mounted, its server is stopped or hangs. ``detached``: unmounted
and served on until the last program that uses it ends. ``in use``: being checked or destroyed."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a container is doing; ``since`` in seconds since 1970, ``ct`` its number, else its path, ``name`` its NAME.

    ``state`` is one of ``STATES``; ``mounted`` says whether there is a root that a program may be started in, so it is
    true for ``mounted`` and ``not answering``.

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
    state: str = "stopped"
    name: str | None = None
    problem: str | None = None


def states_of(holders: Sequence[Holder | None], patience: float = PATIENCE_S) -> list[str]:
    """The state of each of ``holders``; roots that must be asked are asked all at once."""
    states = [_state(holder) for holder in holders]
    served = [n for n, state in enumerate(states) if state == "mounted" and patience]
    for n, answer in zip(served, ask([_root_of(holders[n]) for n in served], patience), strict=True):
        if answer in (Answer.SILENT, Answer.DEAD):
            states[n] = "not answering"
    return states


def _state(holder: Holder | None) -> str:
    """The state as far as it shows without asking the root."""
    if holder is None:
        return "stopped"
    if holder.doing != "serves":
        return "mounting" if holder.doing == "mounts" else "in use"
    if umounts.is_detached(holder):
        return "detached"
    return "not answering" if umounts.is_stopped(holder.pid) else "mounted"


def _root_of(holder: Holder | None) -> tuple[str, str]:
    """Where the root is to be asked, from whatever mount namespace, and its device."""
    assert holder is not None
    return f"/proc/{holder.pid}/root{holder.mountpoint}", holder.device or ""


def counts_of(pid: int, fd: int) -> State:
    from vzfs.fuse.state import State

    return State.open_of(pid, fd)


def agreed_of(holder: Holder | None) -> Agreed | None:
    """What the holder's engine and the kernel agreed upon, as far as that can be seen from here."""
    if holder is None or holder.state is None:
        return None
    try:
        with counts_of(holder.pid, holder.state) as state:
            return state.agreed
    except (OSError, UnsupportedError):  # it ended meanwhile, or is of another version
        return None


def without_passthrough(holder: Holder | None) -> bool | None:
    return False if holder is not None and holder.engine == "pyfuse3" else None
