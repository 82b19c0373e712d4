"""``vzfs stats``: what a mount has counted."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from vzfs.cli.base import Command, container_argument, json_option, open_store, wants_json
from vzfs.cli.show import duration, json_text, plain, print_fields, print_json, print_table, size
from vzfs.errors import UsageError

if TYPE_CHECKING:
    from vzfs.api import Container
    from vzfs.fuse.state import Pauses, Statistics

WATCH_S = 2.0
"""Seconds between two figures of ``--watch``."""
LEAST_WATCH_S = 0.1


@click.command(
    cls=Command,
    examples=[
        ("vzfs stats 101", "what its programs asked for since it was mounted, and how long the answers took"),
        ("vzfs stats 101 --watch", "again and again, with rates; Ctrl-C ends it"),
        ("vzfs stats 101 --json | jq .requests.LOOKUP", "one figure, for programs"),
        ("vzfs stats 101 --json --watch 10 >> stats.jsonl", "a line every ten seconds"),
    ],
)
@container_argument
@click.option(
    "--watch",
    metavar="[SECONDS]",
    type=float,
    is_flag=False,
    flag_value=WATCH_S,
    help=f"Print it every SECONDS ({WATCH_S:g} if not given) until interrupted or unmounted; stands after CT_ID.",
)
@json_option
@click.pass_context
def stats(ctx: click.Context, ct_id: str, watch: float | None) -> None:
    """Show what the mount of container CT_ID has counted.

    Requests of the kernel by kind, where their answers came from, what was copied, and how long requests kept others
    waiting. Asking costs the mount nothing.
    """
    if watch is not None and not watch >= LEAST_WATCH_S:
        raise UsageError(f"can't print every {watch:g} s", remedy=f"choose {LEAST_WATCH_S:g} s or more")
    container = open_store(ctx).container(ct_id)
    if watch is None:
        now = container.stats()
        if wants_json(ctx):
            print_json(_row(container, now))
        else:
            show(now)
        return
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        _watch(ctx, container, watch)


def _watch(ctx: click.Context, container: Container, every_s: float) -> None:
    before: Statistics | None = None
    for now in _snapshots(container, every_s):
        if wants_json(ctx):
            click.echo(json_text(_row(container, now)))
        else:
            click.clear()  # only on a terminal
            show(now, before)
            click.echo()
        sys.stdout.flush()
        before = now


def _snapshots(container: Container, every_s: float) -> Iterator[Statistics]:
    next_s = time.monotonic()
    while True:
        yield container.stats()
        next_s = max(next_s + every_s, time.monotonic())
        time.sleep(max(0.0, next_s - time.monotonic()))


def _row(container: Container, now: Statistics) -> dict[str, Any]:
    return {"ct": container.ct, **plain(now)}


def show(now: Statistics, before: Statistics | None = None) -> None:
    """A snapshot for people; with an earlier one, also how often each request came since then, and the pauses of it."""
    rows = sorted(now.requests.items(), key=lambda row: -row[1])
    rows.append(("total", now.total))
    if before is None:
        print_table(("REQUEST", "COUNT"), [(name, f"{count:,}") for name, count in rows])
    else:
        past = {**before.requests, "total": before.total}
        elapsed_s = now.mounted_s - before.mounted_s
        rates = (f"{(count - past.get(name, 0)) / elapsed_s:,.1f}" for name, count in rows)
        print_table(
            ("REQUEST", "COUNT", "PER SECOND"),
            [(name, f"{count:,}", rate) for (name, count), rate in zip(rows, rates, strict=True)],
        )
    click.echo()
    print_fields(_fields(now, before))


def _fields(now: Statistics, before: Statistics | None) -> Iterator[tuple[str, str]]:
    yield "answered from", _answered(now)
    yield "errors", f"{now.errors:,}"
    yield "copied files", f"{now.copy_ups:,} ({size(now.copied_bytes)})"
    yield "unfolded directories", f"{now.unfolds:,}"
    yield "backing files", f"{now.backing_open:,} open, {now.backing_registered:,} registered"
    if before is None:
        yield "pauses", _pauses(now.pauses)
        yield "slow requests", _pauses(now.slow)
    else:
        yield "new pauses", _pauses(now.pauses.since(before.pauses))
        yield "new slow requests", _pauses(now.slow.since(before.slow))
    yield "mounted for", duration(round(now.mounted_s * 1e9))
    yield "serving process", f"number {now.incarnation}, for {duration(round(now.uptime_s * 1e9))}"


def _answered(now: Statistics) -> str:
    if now.answered is None:
        return "-"
    answered = now.answered
    return f"index {answered.index:,}, tree {answered.tree:,}, store {answered.store:,}"


def _pauses(pauses: Pauses) -> str:
    if not pauses.count:
        return "none"
    shares = ((50, pauses.p50_ns), (90, pauses.p90_ns), (99, pauses.p99_ns))
    percentiles = ", ".join(f"{share} % up to {duration(ns)}" for share, ns in shares)
    return f"{pauses.count:,}: {percentiles}, none above {duration(pauses.longest_ns)}"


COMMANDS = (stats,)
