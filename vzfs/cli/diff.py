"""``vzfs diff``: what a container changed.

Rule: a tree that came or went as a whole is one line with the number of what it holds, since that is what a person did;
``--all`` and ``--json`` show every entry.
"""

from __future__ import annotations

import os
import posixpath
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from vzfs.cli.base import Command, container_argument, json_option, open_store, wants_json
from vzfs.cli.show import escape_name, print_json, print_json_lines, print_table, printable
from vzfs.errors import UsageError

if TYPE_CHECKING:
    from vzfs.store.diff import Change

LETTERS = {"added": "A", "changed": "C", "removed": "D", "renamed": "R"}
COLOURS = {"added": "green", "changed": "yellow", "removed": "red", "renamed": "cyan"}
WHOLE = ("added", "removed")
"""Kinds of changes that a whole tree may have at once."""


@click.command(
    cls=Command,
    examples=[
        ("vzfs diff 101", "what was added (A), changed (C), removed (D) and renamed (R)"),
        ("vzfs diff 101 /etc /usr/local", "only there"),
        ("vzfs diff 101 --content", "with the changed lines of text files"),
        ("vzfs diff 101 --stat", "how many of each kind"),
        ("vzfs diff 101 --json | jq -r '.[] | select(.kind == \"added\") | .path'", "the added paths"),
    ],
)
@container_argument
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@click.option("--content", is_flag=True, help="Show how the content of text files differs.")
@click.option("--all", "everything", is_flag=True, help="Show all that is in an added or removed directory.")
@click.option("--stat", is_flag=True, help="Show only how many entries were added, changed, removed and renamed.")
@json_option
@click.pass_context
def diff(ctx: click.Context, ct_id: str, paths: tuple[str, ...], content: bool, everything: bool, stat: bool) -> None:
    """List what container CT_ID changed, or what it changed at and below PATHs of it.

    Its files are compared with its template: A added, C changed, D removed, R renamed. The exit code is 0, whether
    there are differences or not.
    """
    if stat and content:
        raise UsageError("--stat shows no content", remedy="leave one of them out")
    places = [_place(path) for path in paths]
    changes: Iterable[Change] = open_store(ctx).container(ct_id).diff(content=content)
    if places:
        changes = (change for change in changes if any(_concerns(change, place) for place in places))
    if stat:
        _print_counts(ctx, changes)
    elif wants_json(ctx):
        print_json_lines(changes)
    else:
        _print_changes(changes, everything=everything)


def _place(path: str) -> str:
    if not path:
        raise UsageError("an empty path is no place in a container", remedy="give / for all of it")
    return posixpath.normpath("/" + path.lstrip("/"))


def _concerns(change: Change, place: str) -> bool:
    ends = [change.path] if change.old_path is None else [change.path, change.old_path]
    return place == "/" or any(end == place or end.startswith(place + "/") for end in ends)


def _print_changes(changes: Iterable[Change], *, everything: bool) -> None:
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    counted = ((change, 0) for change in changes) if everything else gathered(changes)
    for change, below in counted:
        line = describe(change, below)
        click.echo(click.style(line, fg=COLOURS[change.kind]) if coloured else line)
        if change.content:
            click.echo("\n".join(printable(text) for text in change.content.splitlines()))


def gathered(changes: Iterable[Change]) -> Iterator[tuple[Change, int]]:
    """The changes without those in a directory that was added or removed as well; that has their number instead.

    What else happened in such a directory, such as a rename into it, follows it.
    """
    top: Change | None = None
    below = 0
    others: list[Change] = []
    for change in changes:
        if top is not None and change.path.startswith(top.path + "/"):
            if change.kind == top.kind and not change.content:
                below += 1
            else:
                others.append(change)
            continue
        if top is not None:
            yield top, below
            yield from ((other, 0) for other in others)
        top, below, others = None, 0, []
        if change.kind in WHOLE and change.type == "dir":
            top = change
        else:
            yield change, 0
    if top is not None:
        yield top, below
        yield from ((other, 0) for other in others)


def describe(change: Change, below: int = 0) -> str:
    """One line of ``vzfs diff``, for example ``C /etc/motd (content, times)``; ``below`` it there were so many more."""
    letter = LETTERS[change.kind]
    path = escape_name(change.path)
    if change.kind == "renamed" and change.old_path is not None:
        path = f"{escape_name(change.old_path)} -> {path}"
    what = f" ({', '.join(change.what)})" if change.what else ""
    more = f" and {below:,} below" if below else ""
    return f"{letter} {path}{what}{more}"


def _print_counts(ctx: click.Context, changes: Iterable[Change]) -> None:
    counts = Counter((change.kind, change.type) for change in changes)
    kinds = {kind: {name: count for (of, name), count in sorted(counts.items()) if of == kind} for kind in LETTERS}
    if wants_json(ctx):
        print_json({kind: {"total": sum(types.values()), **types} for kind, types in kinds.items()})
        return
    print_table(
        ("KIND", "TOTAL", "OF THEM"),
        [
            (kind, f"{sum(types.values()):,}", ", ".join(f"{count:,} {name}" for name, count in types.items()) or "-")
            for kind, types in kinds.items()
        ],
    )


COMMANDS = (diff,)
