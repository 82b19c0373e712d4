"""The listing of one open directory.

Rule: which names there are is decided when the listing starts (or is rewound), what each one is when it is asked for;
so a listing in pieces never repeats or skips a name that stays, and never brings back one that went.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vzfs.tree.node import Entry


class Listing:
    """Names in directory ``number``, ``.`` and ``..`` first; a removed directory has none."""

    __slots__ = ("_describe", "_names", "number")

    def __init__(
        self, number: int, names: Callable[[int], Sequence[bytes]], describe: Callable[[int, bytes], Entry | None]
    ) -> None:
        self.number = number
        self._describe = describe
        self._names = names(number)

    def __len__(self) -> int:
        return len(self._names)

    def at(self, position: int) -> tuple[bytes, Entry | None]:
        """The name at ``position`` and what it is now, ``None`` when it is gone."""
        name = self._names[position]
        return name, self._describe(self.number, name)
