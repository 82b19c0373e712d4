"""What a tree must remember beyond the death of its process, in words of memory that its successor maps.

Everything else a successor finds on the disk. Rules:
- A word is written at once, so its old or its new value is found; where several belong together, the one that makes
  them count is written last and taken away first.
- The layout changes only together with ``vzfs.fuse.state.VERSION``.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, MutableSequence
from typing import TypeAlias

from vzfs.store.index import Attributes

Words: TypeAlias = MutableSequence[int] | memoryview

PINS = 1024
"""Removed files that are remembered at the same time, see ``vzfs.tree.pins``."""
PIN_WORDS = 1 + len(Attributes._fields)
RENAMES = 32
"""Exchanges remembered, more than are ever being done at once: the number of threads is half of that."""
_RENAME_WORDS = 2
_DOUBT, _NEXT_RENAME, _PINS_AT = 0, 1, 2
_RENAMES_AT = _PINS_AT + PINS * PIN_WORDS
DURABLE_WORDS = _RENAMES_AT + RENAMES * _RENAME_WORDS
_WORD = (1 << 64) - 1


class Durable:
    """The words of one tree, ``DURABLE_WORDS`` of them; its own, lost with the process, if none are given."""

    def __init__(self, words: Words | None = None) -> None:
        self._words = [0] * DURABLE_WORDS if words is None else words
        self._free = [at for at in range(_RENAMES_AT - PIN_WORDS, _PINS_AT - 1, -PIN_WORDS) if not self._words[at]]

    # ---------------------------------------------------------------------------------------------------- link groups

    @property
    def doubt(self) -> int:
        """Number of the link group whose names were just being counted, 0: none."""
        return self._words[_DOUBT]

    @doubt.setter
    def doubt(self, number: int) -> None:
        self._words[_DOUBT] = number

    # ---------------------------------------------------------------------------------------------------- removed files

    def pinned(self) -> Iterator[tuple[int, int]]:
        """Number of each remembered file, and its place."""
        for at in range(_PINS_AT, _RENAMES_AT, PIN_WORDS):
            if self._words[at]:
                yield self._words[at], at

    def pin(self, number: int, attributes: Attributes) -> int:
        """Remember a removed file; gives its place, -1 when there is none left."""
        if not self._free:
            return -1
        at = self._free.pop()
        for word, value in enumerate(attributes, at + 1):
            self._words[word] = value & _WORD
        self._words[at] = number
        return at

    def pinned_attributes(self, at: int) -> Attributes:
        """What stat told of the file remembered at ``at`` when it was removed."""
        *values, atime, mtime, ctime = self._words[at + 1 : at + PIN_WORDS]
        return Attributes(*values, *(time - (time >> 63 << 64) for time in (atime, mtime, ctime)))

    def unpin(self, at: int) -> None:
        """Remember the file no longer."""
        self._words[at] = 0
        self._free.append(at)

    # -------------------------------------------------------------------------------------------------------- exchanges

    def note_rename(self, request: int, source: int) -> None:
        """Remember the inode number of what ``request`` is about to take away from the old name."""
        turn = self._words[_NEXT_RENAME]
        self._words[_NEXT_RENAME] = (turn + 1) % RENAMES
        at = _RENAMES_AT + turn * _RENAME_WORDS
        self._words[at] = 0
        self._words[at + 1] = source
        self._words[at] = request

    def noted_rename(self, request: int) -> int | None:
        """What ``note_rename`` remembered of ``request``."""
        for at in range(_RENAMES_AT, DURABLE_WORDS, _RENAME_WORDS):
            if self._words[at] == request:
                return self._words[at + 1]
        return None


def unknown_attributes(number: int) -> Attributes:
    """Of what is gone and left nothing that tells what it was."""
    return Attributes(number, stat.S_IFDIR | 0o755, 0, 0, 0, 0, 0, 0, 4096, 0, 0, 0)
