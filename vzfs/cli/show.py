"""How values look on a terminal and as JSON.

Rule: no name from a file system reaches the terminal raw. File names are any bytes but NUL and ``/``, so a container
could otherwise write escape sequences to its administrator's terminal.

Names are escaped as ``ls --escape`` does: a backslash becomes ``\\\\``, a byte or character that can't be printed
becomes ``\\n``, ``\\t``, ``\\xNN`` or ``\\uNNNN``. In JSON, names have ``\\\\`` and ``\\xNN`` (for bytes that are not
UTF-8) only; JSON has its own escapes for the rest, which are used for all that can't be printed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

import click

NAME_KEYS = frozenset({"path", "old_path", "mountpoint"})
"""The JSON members whose strings are file names."""

_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_FIRST_ESCAPED_BYTE = 0xDC80  # surrogateescape: U+DC80..U+DCFF stand for the bytes 0x80..0xFF
_LAST_ESCAPED_BYTE = 0xDCFF


def _escape_char(char: str) -> str:
    code = ord(char)
    if _FIRST_ESCAPED_BYTE <= code <= _LAST_ESCAPED_BYTE:
        return f"\\x{code - 0xDC00:02x}"
    if char in _SHORT:
        return _SHORT[char]
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def printable(text: str) -> str:
    """``text`` without any character that a terminal might obey; backslashes stay."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape_char(char) for char in text)


def escape_name(name: str | bytes | PurePath) -> str:
    """A file name for people, reversible: see the module's text."""
    text = os.fsdecode(name) if isinstance(name, bytes | PurePath) else name
    return printable(text.replace("\\", "\\\\"))


def _json_text(text: str, *, name: bool) -> str:
    if name:
        text = text.replace("\\", "\\\\")
    if text.isascii():
        return text
    return "".join(_escape_char(char) if 0xD800 <= ord(char) <= 0xDFFF else char for char in text)


def plain(value: Any, key: str = "") -> Any:
    """``value`` as what JSON knows: dataclasses become objects, tuples lists, paths and bytes strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name), field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {_json_text(str(name), name=False): plain(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, key) for item in value]
    if isinstance(value, bytes | PurePath):
        return _json_text(os.fsdecode(value), name=True)
    if isinstance(value, str):
        return _json_text(value, name=key in NAME_KEYS)
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON in which whatever a terminal might obey or reorder text by is written with JSON's escapes."""
    text = json.dumps(plain(value), indent=indent, ensure_ascii=False)
    if text.isprintable():
        return text
    # What can't be printed is inside strings, but for the ends of lines that the indentation makes.
    return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)


def print_json(value: Any) -> None:
    click.echo(json_text(value, indent=2))


def print_json_lines(values: Iterable[Any]) -> None:
    """A JSON array, one element per line, written while the elements are found."""
    lead = "["
    for value in values:
        click.echo(lead)
        click.echo(json_text(value), nl=False)
        lead = ","
    click.echo("[]" if lead == "[" else "\n]")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table; on a terminal by rich, else text whose columns are aligned and separated by two spaces or more."""
    lines = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich_table(columns, lines)
        return
    widths = [max(len(row[n]) for row in [columns, *lines]) for n in range(len(columns))]
    for row in [columns, *lines]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_rich_table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in lines:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def print_fields(pairs: Iterable[tuple[str, str]]) -> None:
    """``name:  value`` lines, the values aligned."""
    pairs = tuple(pairs)
    width = max(len(name) for name, _ in pairs) + 1
    for name, value in pairs:
        click.echo(f"{name + ':':<{width}}  {printable(value)}")


def size(count: int) -> str:
    """A number of bytes for people, in binary units: ``1.5 MiB``."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def moment(when: float | None) -> str:
    """Seconds since the epoch as local time with its offset, to the second; ``-`` for none."""
    if when is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(when))


def duration(ns: int) -> str:
    """Nanoseconds for people, to two or three digits: ``850 ns``, ``12 µs``, ``4.5 ms``, ``3 h 12 min``."""
    for limit, unit in ((1_000, "ns"), (1_000_000, "µs"), (1_000_000_000, "ms"), (60_000_000_000, "s")):
        if ns < limit:
            amount = ns * 1000 / limit if unit != "s" else ns / 1e9
            return f"{amount:.0f} {unit}" if amount >= 10 or unit == "ns" else f"{amount:.1f} {unit}"
    minutes = ns // 60_000_000_000
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def dash(value: object) -> str:
    """``value`` for a table cell, ``-`` for none."""
    return "-" if value is None or value == "" else str(value)
