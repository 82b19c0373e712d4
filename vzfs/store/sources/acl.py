"""POSIX ACLs: from the text that tar archives carry to the bytes of ``system.posix_acl_*``.

Text forms: acl(5), long and short, entries parted by commas or newlines, and star's with the numeric id as a fourth
field (``user:lisa:rwx:502``). Binary form: ``vzfs.store.acl``.
"""

from __future__ import annotations

from collections.abc import Callable

from vzfs.store.acl import ENTRY, GROUP, GROUP_OBJ, MASK, OTHER, UNDEFINED_ID, USER, USER_OBJ, VERSION

LookUp = Callable[[bytes], int | None]
"""From a name to its id; ``None`` when nobody has that name."""

_NAMED = {USER_OBJ: USER, GROUP_OBJ: GROUP}
_TAGS = {
    b"user": USER_OBJ,
    b"u": USER_OBJ,
    b"group": GROUP_OBJ,
    b"g": GROUP_OBJ,
    b"mask": MASK,
    b"m": MASK,
    b"other": OTHER,
    b"o": OTHER,
}
_BITS = {b"r": 4, b"w": 2, b"x": 1, b"-": 0}


def parse(text: bytes, uid_of: LookUp, gid_of: LookUp) -> bytes:
    """The binary ACL that ``text`` means; empty for an empty one.

    Raises ``ValueError`` that says what is wrong: a malformed entry, a name that can't be resolved.
    """
    entries = []
    for line in text.replace(b",", b"\n").split(b"\n"):
        entry = line.split(b"#", 1)[0].strip()  # "#effective:r--" is a remark
        if entry:
            entries.append(_entry(entry, uid_of, gid_of))
    if not entries:
        return b""
    return VERSION + b"".join(ENTRY.pack(*entry) for entry in sorted(entries, key=lambda e: (e[0], e[2])))


def _entry(text: bytes, uid_of: LookUp, gid_of: LookUp) -> tuple[int, int, int]:
    fields = text.split(b":")
    tag = _TAGS.get(fields[0])
    # "other:r--" and "mask:r--" are written by some systems without the empty middle field.
    if len(fields) == 2 and tag in (MASK, OTHER):
        fields.insert(1, b"")
    if tag is None or len(fields) not in (3, 4):
        raise ValueError(f"malformed ACL entry {text[:80]!r}")
    name, permissions = fields[1], fields[2]
    bits = _permissions(permissions, text)
    if not name:
        return tag, bits, UNDEFINED_ID
    if tag not in _NAMED:
        raise ValueError(f"malformed ACL entry {text[:80]!r}")
    look_up = uid_of if tag == USER_OBJ else gid_of
    return _NAMED[tag], bits, _id(name, fields[3:], look_up)


def _permissions(text: bytes, entry: bytes) -> int:
    bits = 0
    for at in range(len(text)):
        letter = text[at : at + 1]
        if letter not in _BITS:
            raise ValueError(f"malformed ACL entry {entry[:80]!r}")
        bits |= _BITS[letter]
    return bits


def _id(name: bytes, numbers: list[bytes], look_up: LookUp) -> int:
    for text in (*numbers, name):
        if text.isdigit() and len(text) <= 10 and int(text) < UNDEFINED_ID:
            return int(text)
    found = look_up(name)
    if found is None:
        raise ValueError(f"ACL entry for {name[:80]!r}, whom nobody here knows by number")
    return found
