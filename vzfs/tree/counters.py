"""What a tree counts of its own work.

Rule: the tree increments the attributes (``counters.copy_ups += 1``) under its lock and never reads or resets them.
Where the counts are kept is the engine's business: ``keep_in`` moves them into memory that others see.
"""

from __future__ import annotations

from collections.abc import MutableSequence

COPY_UPS, COPIED_BYTES, UNFOLDS = range(3)
"""Their order in the words given to ``keep_in``."""
COUNTERS = 3


class Counters:
    """Copies of template files into the private area, the bytes of data in them, and directories unfolded there.

    A file changed without a copy of its data (``chmod``) is no copy-up; a reflinked one is, with all its bytes.
    """

    __slots__ = ("_words",)

    def __init__(self) -> None:
        self._words: MutableSequence[int] | memoryview = [0] * COUNTERS

    def keep_in(self, words: memoryview) -> None:
        """Count in ``words``, 64-bit unsigned ones, from now on; what was counted before is added to what is there."""
        for n in range(COUNTERS):
            words[n] += self._words[n]
        self._words = words

    @property
    def copy_ups(self) -> int:
        """Template files copied."""
        return self._words[COPY_UPS]

    @copy_ups.setter
    def copy_ups(self, value: int) -> None:
        self._words[COPY_UPS] = value

    @property
    def copied_bytes(self) -> int:
        """Bytes of data in the copies."""
        return self._words[COPIED_BYTES]

    @copied_bytes.setter
    def copied_bytes(self, value: int) -> None:
        self._words[COPIED_BYTES] = value

    @property
    def unfolds(self) -> int:
        """Template directories unfolded into real ones."""
        return self._words[UNFOLDS]

    @unfolds.setter
    def unfolds(self, value: int) -> None:
        self._words[UNFOLDS] = value
