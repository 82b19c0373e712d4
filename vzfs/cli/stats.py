"""``vzfs stats``: what a mount has counted."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from vzfs.cli.base import Command, any_containers_argument, existing_store, json_option, neither_or_both, wants_json
from vzfs.cli.show import duration, json_text, plain, print_fields, print_json, print_table, printable, size
from vzfs.errors import NotFoundError, NotMountedError, UsageError

if TYPE_CHECKING:
    from vzfs.api import Container, Store
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
        ("vzfs stats --all --json", "those of all mounted containers"),
    ],
)
@any_containers_argument
@click.option("--all", "everything", is_flag=True, help="All mounted containers of the store.")
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
def stats(ctx: click.Context, ct_ids: tuple[str, ...], everything: bool, watch: float | None) -> None:
    """Show what the mounts of containers CT_ID have counted.

    Requests of the kernel by kind, where their answers came from, what was copied, and how long requests kept others
    waiting. Asking costs the mount nothing.
    """
    if bool(ct_ids) == everything:
        raise neither_or_both(ctx, everything=everything)
    if watch is not None and not watch >= LEAST_WATCH_S:
        raise UsageError(f"can't print every {watch:g} s", remedy=f"choose {LEAST_WATCH_S:g} s or more")
    store = existing_store(ctx)
    ask = _Mounted(store) if everything else _Named([store.container(ct_id) for ct_id in ct_ids])
    single = len(ct_ids) == 1
    if watch is None:
        found = ask()
        if wants_json(ctx):
            print_json(_document(found, single=single))
        else:
            _show_all(found, {}, single=single)
        return
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        _watch(ctx, ask, watch, single=single)


Found = dict[str, "Statistics"]
"""What was counted, by container."""


class _Named:
    """Asks containers that must be mounted."""

    def __init__(self, containers: Sequence[Container]) -> None:
        self._containers = containers

    def __call__(self) -> Found:
        return {container.ct: container.stats() for container in self._containers}


class _Mounted:
    """Asks all that are mounted at the time."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __call__(self) -> Found:
        found = {}
        for container in self._store.containers():
            with contextlib.suppress(NotMountedError, NotFoundError):
                found[container.ct] = container.stats()
        return found


def _watch(ctx: click.Context, ask: Callable[[], Found], every_s: float, *, single: bool) -> None:
    before: Found = {}
    for found in _snapshots(ask, every_s):
        if wants_json(ctx):
            click.echo(json_text(_document(found, single=single)))
        else:
            click.clear()  # only on a terminal
            _show_all(found, before, single=single)
            click.echo()
        sys.stdout.flush()
        before = found


def _snapshots(ask: Callable[[], Found], every_s: float) -> Iterator[Found]:
    next_s = time.monotonic()
    while True:
        yield ask()
        next_s = max(next_s + every_s, time.monotonic())
        time.sleep(max(0.0, next_s - time.monotonic()))


def _document(found: Found, *, single: bool) -> Any:
    """One container that was asked for is an object, several are an array of them."""
    rows = [{"ct": ct, **plain(now)} for ct, now in found.items()]
    return rows[0] if single else rows


def _show_all(found: Found, before: Found, *, single: bool) -> None:
    for number, (ct, now) in enumerate(found.items()):
        if not single:
            click.echo(("\n" if number else "") + f"container {printable(ct)}\n")
        past = before.get(ct)
        # It began to count anew when it was mounted anew.
        show(now, past if past is not None and past.mounted_s < now.mounted_s else None)


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
