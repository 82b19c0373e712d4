"""What is long work, to be done in a thread, because look-ups must not wait for it."""

from __future__ import annotations

from dataclasses import dataclass

from vzfs.tree.area import Sync

SLOW_COPY = 128 << 10
"""Bytes of a file whose copy-up is long work even without a flush."""
SLOW_UNFOLD = 64
"""Entries of a directory whose unfolding is long work: about a millisecond."""
NOTHING_IS_QUICK = -1


@dataclass(frozen=True, slots=True)
class Speed:
    """From how many bytes and entries on copying and unfolding are long work."""

    copy: int
    unfold: int

    @staticmethod
    def of(sync: Sync) -> Speed:
        """A flush is long work, however little is flushed."""
        copy = {Sync.NONE: SLOW_COPY, Sync.DATA: 0, Sync.FULL: NOTHING_IS_QUICK}[sync]
        return Speed(copy, NOTHING_IS_QUICK if sync is Sync.FULL else SLOW_UNFOLD)
