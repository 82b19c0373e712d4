"""Unified diffs of small text files.

Rule: time is bounded whatever the files hold, for a container's files are hostile: lines that occur once match first,
and beyond ``_EFFORT`` a stretch between those is shown as replaced.
"""

from __future__ import annotations

import bisect
import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

CONTENT_MAX = 1 << 20
"""Bytes of the largest file whose lines are compared."""
_EFFORT = 200_000
"""Pairs of lines that difflib may compare for one file; its time grows faster than their number, to seconds here."""
_CONTEXT = 3


def unified_diff(old: bytes, new: bytes, old_name: bytes | None, new_name: bytes) -> str | None:
    """The differences as text, names escaped, as ``diff -u`` prints them, with a final newline if there are any.

    ``old_name`` is ``None`` for a new file. Gives ``None`` when either is no text (UTF-8 without NUL) or too long.
    """
    if max(len(old), len(new)) > CONTENT_MAX or b"\0" in old or b"\0" in new:
        return None
    try:
        old_lines, new_lines = _lines(old.decode()), _lines(new.decode())
    except UnicodeDecodeError:
        return None
    if old == new:
        return ""
    parts = [f"--- {_label(b'template', old_name)}\n", f"+++ {_label(b'container', new_name)}\n"]
    for group in _Matcher(old_lines, new_lines).get_grouped_opcodes(_CONTEXT):
        parts.extend(_hunk(group, old_lines, new_lines))
    return "".join(parts)


def _label(top: bytes, name: bytes | None) -> str:
    if name is None:
        return "/dev/null"
    text = (top + name).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _lines(text: str) -> list[str]:
    """Lines with their newlines, which nothing but a newline ends (``str.splitlines`` knows a dozen more)."""
    lines = text.split("\n")
    last = lines.pop()
    return [line + "\n" for line in lines] + ([last] if last else [])


class _Matcher(difflib.SequenceMatcher[str]):
    """Lines matched at those that both files have exactly once (patience diff), then between these by difflib."""

    def __init__(self, old: Sequence[str], new: Sequence[str]) -> None:
        super().__init__(autojunk=False)
        self._old, self._new = self.a, self.b = old, new
        self._effort = _EFFORT

    def get_matching_blocks(self) -> list[difflib.Match]:
        """As of the base class: equal stretches in order, ending with an empty one."""
        merged: list[difflib.Match] = []
        for i, j, size in self._pieces():
            if merged and i == merged[-1].a + merged[-1].size and j == merged[-1].b + merged[-1].size:
                i, j, before = merged.pop()
                size += before
            if size:
                merged.append(difflib.Match(i, j, size))
        return [*merged, difflib.Match(len(self._old), len(self._new), 0)]

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        old, new = self._old, self._new
        shorter = min(len(old), len(new))
        start = 0
        while start < shorter and old[start] == new[start]:
            start += 1
        tail = 0
        while tail < shorter - start and old[-1 - tail] == new[-1 - tail]:
            tail += 1
        end = (len(old) - tail, len(new) - tail)
        yield 0, 0, start
        i, j = start, start
        for next_i, next_j in [*self._anchors(start, *end), end]:
            yield from self._between(i, next_i, j, next_j)
            yield next_i, next_j, int((next_i, next_j) != end)
            i, j = next_i + 1, next_j + 1
        yield *end, tail

    def _anchors(self, start: int, old_end: int, new_end: int) -> list[tuple[int, int]]:
        """The longest rising sequence of places of lines that both files have exactly once."""
        places: dict[str, int] = {}
        for j in range(start, new_end):
            places[self._new[j]] = -1 if self._new[j] in places else j
        counts = Counter(self._old[start:old_end])
        ends: list[int] = []  # the least new place at which a rising sequence of that length ends
        chain: list[tuple[int, int, int]] = []  # old place, new place, its predecessor here
        last: list[int] = []  # for each length its end in ``chain``
        for i in range(start, old_end):
            j = places.get(self._old[i], -1)
            if j < 0 or counts[self._old[i]] != 1:
                continue
            length = bisect.bisect_left(ends, j)
            chain.append((i, j, last[length - 1] if length else -1))
            ends[length : length + 1] = [j]
            last[length : length + 1] = [len(chain) - 1]
        found = []
        at = last[-1] if last else -1
        while at >= 0:
            i, j, at = chain[at]
            found.append((i, j))
        return found[::-1]

    def _between(self, i: int, old_end: int, j: int, new_end: int) -> Iterator[tuple[int, int, int]]:
        effort = (old_end - i) * (new_end - j)
        if effort <= 0 or effort > self._effort:
            return
        self._effort -= effort
        old, new = self._old[i:old_end], self._new[j:new_end]
        for a, b, size in difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks():
            yield i + a, j + b, size


def _hunk(group: Iterable[tuple[str, int, int, int, int]], old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    group = list(group)
    (_, old_from, _, new_from, _), (_, _, old_to, _, new_to) = group[0], group[-1]
    yield f"@@ -{_span(old_from, old_to)} +{_span(new_from, new_to)} @@\n"
    for tag, a, b, c, d in group:
        if tag == "equal":
            yield from _marked(" ", old[a:b])
        else:
            yield from _marked("-", old[a:b])
            yield from _marked("+", new[c:d])


def _span(start: int, end: int) -> str:
    length = end - start
    if length == 1:
        return f"{start + 1}"
    return f"{start + 1 if length else start},{length}"


def _marked(mark: str, lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        yield mark + line
        if not line.endswith("\n"):
            yield "\n\\ No newline at end of file\n"
