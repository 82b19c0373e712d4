"""File names and link texts, any bytes, as visible ASCII."""

from __future__ import annotations

import re

_ESCAPES = re.compile(rb"[^\x21-\x5b\x5d-\x7e]")


def printable(raw: bytes) -> str:
    """``raw`` with everything but visible ASCII, and the backslash, as ``\\xNN``."""
    return _ESCAPES.sub(lambda match: b"\\x%02x" % match[0][0], raw).decode("ascii")
