"""The commands about containers: make, mount, look at, check and destroy them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from vzfs.cli.base import (
    Command,
    any_containers_argument,
    complete_container,
    complete_file,
    complete_template,
    container_argument,
    containers_argument,
    existing_store,
    json_option,
    neither_or_both,
    open_store,
    wants_json,
)
from vzfs.cli.failure import EXIT_PROBLEMS, explain, report
from vzfs.cli.show import (
    dash,
    escape_name,
    moment,
    print_fields,
    print_json,
    print_table,
    printable,
    size,
)
from vzfs.errors import BusyError, UsageError, VzfsError

if TYPE_CHECKING:
    from vzfs.api import Container, Status, Store


@contextlib.contextmanager
def _results(ctx: click.Context, results: list[dict[str, Any]]) -> Iterator[None]:
    """With ``--json``, print ``results`` as one document at the end, of what succeeded although others failed."""
    try:
        yield
    except click.exceptions.Exit:
        if wants_json(ctx):
            print_json(results)
        raise
    if wants_json(ctx):
        print_json(results)


def _each(ctx: click.Context, containers: Iterable[Container], action: Callable[[Container], None]) -> None:
    """Does ``action`` to every container, although one may fail; the first failure gives the exit code."""
    code = 0
    for container in containers:
        try:
            action(container)
        except (VzfsError, OSError) as error:
            failure = explain(error)
            report(failure, as_json=wants_json(ctx))
            code = code or failure.exit_code
    if code:
        ctx.exit(code)


def _named(ctx: click.Context, ct_ids: tuple[str, ...], everything: bool) -> list[Container]:
    """The containers of the arguments, or all of the store with ``--all``; exactly one of both must be given."""
    if bool(ct_ids) == everything:
        raise neither_or_both(ctx, everything=everything)
    store = existing_store(ctx)
    return store.containers() if everything else [store.container(ct_id) for ct_id in ct_ids]


@click.command(
    cls=Command,
    examples=[
        ("vzfs create 101 --template debian-12", "container 101, mounted at /vz/root/101 later"),
        ("vzfs create 102 --template debian-12 --name web", "with a name that may be used instead of the number"),
        ("vzfs create /srv/ve/103 --template debian-12", "outside the store's own folder"),
        ("vzfs create 104 --template debian-12 --mountpoint /mnt/104", "to be mounted elsewhere"),
        ("vzfs create 105 --template debian-12 --userns-uid 100000", "for a runtime with a user namespace"),
    ],
)
@click.argument("ct_id", metavar="CT_ID")
@click.option("--template", metavar="NAME", required=True, shell_complete=complete_template, help="Its template.")
@click.option("--name", metavar="ALIAS", help="A name to use instead of CT_ID.")
@click.option("--mountpoint", metavar="DIR", type=click.Path(file_okay=False), help="Where 'mount' mounts it.")
@click.option(
    "--userns-uid",
    metavar="UID",
    type=int,
    help="The user whom root of the container's user namespace is mapped to: may reach the mount point.",
)
@json_option
@click.pass_context
def create(
    ctx: click.Context, ct_id: str, template: str, name: str | None, mountpoint: str | None, userns_uid: int | None
) -> None:
    """Make a container from a template.

    CT_ID is a number, or the path of a container directory elsewhere.

    It takes a few milliseconds and a few kilobytes, whatever the template's size.
    """
    made = open_store(ctx).create(ct_id, template=template, name=name, mountpoint=mountpoint, userns_uid=userns_uid)
    if wants_json(ctx):
        print_json(made.status())
        return
    click.echo(f"container {escape_name(made.path)} made from template {template}")


@click.command(
    cls=Command,
    examples=[
        ("vzfs destroy 101", "ask, then delete the container and everything in it"),
        ("vzfs destroy 101 102 --yes", "don't ask"),
    ],
)
@containers_argument
@click.option("-y", "--yes", is_flag=True, help="Don't ask. Needed when standard input is no terminal.")
@json_option
@click.pass_context
def destroy(ctx: click.Context, ct_ids: tuple[str, ...], yes: bool) -> None:
    """Delete containers with all their files. A mounted container is refused."""
    destroyed: list[dict[str, Any]] = []

    def action(container: Container) -> None:
        path = escape_name(container.path)
        if not yes and not click.confirm(f"Delete container {path} and everything in it?", err=True):
            click.echo(f"container {path} kept", err=True)
            return
        container.destroy()
        destroyed.append({"ct": container.ct, "path": container.path})
        if not wants_json(ctx):
            click.echo(f"container {path} destroyed")

    if not yes and not sys.stdin.isatty():
        raise UsageError("destroy asks before it deletes, and standard input is no terminal", remedy="add --yes")
    with _results(ctx, destroyed):
        _each(ctx, _named(ctx, ct_ids, everything=False), action)


@click.command(
    "list",
    cls=Command,
    examples=[
        ("vzfs list", "all containers of the store"),
        ("vzfs list --json | jq -r '.[] | select(.mounted) | .ct'", "the mounted ones"),
    ],
)
@json_option
@click.pass_context
def list_containers(ctx: click.Context) -> None:
    """List the containers of the store."""
    found = existing_store(ctx).statuses()
    if wants_json(ctx):
        print_json(found)
        return
    print_table(
        ("CT", "NAME", "TEMPLATE", "STATE", "MOUNTPOINT"),
        [(one.ct, dash(one.name), dash(one.template), _state(one), dash(one.mountpoint)) for one in found],
    )


@click.command(
    cls=Command,
    examples=[
        ("vzfs status", "every container"),
        ("vzfs status 101", "one container"),
        ("vzfs status 101 --json", "for programs"),
    ],
)
@click.argument("ct_id", metavar="[CT_ID]", required=False, shell_complete=complete_container)
@json_option
@click.pass_context
def status(ctx: click.Context, ct_id: str | None) -> None:
    """Show what is mounted where, and served by which process."""
    store = existing_store(ctx)
    if ct_id is not None:
        _print_status(ctx, store.container(ct_id))
        return
    found = store.statuses()
    if wants_json(ctx):
        print_json(found)
        return
    print_table(
        ("CT", "STATE", "MOUNTPOINT", "PID", "ENGINE", "SINCE"),
        [
            (str(one.ct), _state(one), dash(one.mountpoint), dash(one.pid), dash(one.engine), moment(one.since))
            for one in found
        ],
    )


def _state(one: Status) -> str:
    state = f"{one.state}, read-only" if one.mounted and one.read_only else one.state
    if one.problem is None:
        return state
    return f"{state}, damaged: {one.problem}" if one.mounted else f"damaged: {one.problem}"


def _print_status(ctx: click.Context, container: Container) -> None:
    one = container.status()
    if wants_json(ctx):
        print_json(one)
        return
    print_fields(
        (
            ("container", str(one.ct)),
            ("name", dash(one.name)),
            ("path", escape_name(str(one.path))),
            ("template", dash(one.template)),
            ("state", _state(one)),
            ("mountpoint", dash(one.mountpoint)),
            ("pid", dash(one.pid)),
            ("engine", dash(one.engine)),
            ("since", moment(one.since)),
            ("protocol", _protocol(one)),
            ("passthrough", "-" if one.passthrough is None else "yes" if one.passthrough else "no"),
            ("max write", "-" if one.max_write is None else size(one.max_write)),
        )
    )


def _protocol(one: Status) -> str:
    if one.flags is None:
        return "left to libfuse" if one.engine == "pyfuse3" else "-"
    return f"FUSE {one.protocol}: {' '.join(one.flags)}"


@click.command(
    cls=Command,
    examples=[
        ("vzfs mount 101", "at /vz/root/101, or where its conf says"),
        ("vzfs mount 101 /mnt/ct --ro", "elsewhere, read-only"),
        ("vzfs mount /srv/ve/103", "a container outside the store's own folder"),
        ("vzfs mount 101 --engine pyfuse3", "by libfuse; 'vzfs status 101' shows what is in use"),
        ("vzfs mount 101 --foreground --log -", "serve in this terminal; Ctrl-C unmounts"),
        ('chroot "$(vzfs mount 101)" /bin/bash', "mount and enter"),
    ],
)
@container_argument
@click.argument("mountpoint", metavar="[MOUNTPOINT]", required=False, type=click.Path(file_okay=False))
@click.option("--ro", "read_only", is_flag=True, help="Mount read-only.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "direct", "pyfuse3"]),
    default="auto",
    show_default=True,
    help="What talks to the kernel; auto is direct where this machine can, else pyfuse3.",
)
@click.option(
    "--busy-poll",
    metavar="MICROSECONDS",
    type=int,
    default=0,
    help="How long the direct engine looks for the next request before it sleeps. Costs CPU.  [default: 0, not at all]",
)
@click.option(
    "--passthrough-above",
    metavar="BYTES",
    type=int,
    help="Size above which the direct engine shares a template's file in memory with other containers; who has such a "
    "file open keeps the old one when it is first changed.  [default: 65536]",
)
@click.option(
    "--sync",
    type=click.Choice(["none", "data", "full"]),
    default="data",
    show_default=True,
    help="What is flushed to disk before a copied file takes its place: nothing, its data, its data and directory.",
)
@click.option("--foreground", is_flag=True, help="Serve in this process, until it is unmounted or interrupted.")
@click.option(
    "--log",
    metavar="FILE|journal|-",
    shell_complete=complete_file,
    help="Where the serving process logs; -, with --foreground, is standard error.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    help="How long the root may take to be usable.  [default: 60]",
)
@click.option("--mkdir", is_flag=True, help="Make MOUNTPOINT if it is missing.")
@click.option(
    "--cgroup",
    type=click.Choice(["auto", "keep"]),
    default="auto",
    show_default=True,
    help="Whether the serving process leaves its caller's cgroup (auto: unless that is a service's).",
)
@json_option
@click.pass_context
def mount(
    ctx: click.Context,
    ct_id: str,
    mountpoint: str | None,
    read_only: bool,
    engine: str,
    busy_poll: int,
    passthrough_above: int | None,
    sync: str,
    foreground: bool,
    log: str | None,
    timeout: float,
    mkdir: bool,
    cgroup: str,
) -> None:
    """Mount the root of container CT_ID, and print where.

    Returns when the root is usable; a process of its own serves it until 'vzfs umount'.
    """
    container = open_store(ctx).container(ct_id)
    if foreground:
        container.serve(
            mountpoint,
            read_only=read_only,
            engine=engine,
            sync=sync,
            log=log or "-",
            busy_poll_us=busy_poll,
            passthrough_above=passthrough_above,
            mkdir=mkdir,
        )
        return
    where = container.mount(
        mountpoint,
        read_only=read_only,
        engine=engine,
        sync=sync,
        log=log,
        busy_poll_us=busy_poll,
        passthrough_above=passthrough_above,
        timeout=timeout,
        mkdir=mkdir,
        cgroup=cgroup,
    )
    if wants_json(ctx):
        print_json(container.status())
        return
    click.echo(escape_name(where))


@click.command(
    cls=Command,
    examples=[
        ("vzfs umount 101", "end the mount when nothing uses it"),
        ("vzfs umount 101 --lazy", "detach it now; it ends when the last user is gone"),
        ("vzfs umount 101 --everywhere", "in other mount namespaces, too, and bind mounts of it"),
        ("vzfs umount /vz/root/101", "named by its mount point"),
        ("vzfs umount --all", "everything of this store"),
    ],
)
@any_containers_argument
@click.option("--lazy", is_flag=True, help="Detach at once, although files are open.")
@click.option("--everywhere", is_flag=True, help="In other mount namespaces as well, and bind mounts of it.")
@click.option("--all", "everything", is_flag=True, help="All mounted containers of the store.")
@json_option
@click.pass_context
def umount(ctx: click.Context, ct_ids: tuple[str, ...], lazy: bool, everywhere: bool, everything: bool) -> None:
    """Unmount containers. Returns when their serving processes have written everything and ended.

    CT_ID may be a mount point as well. What is in use is refused, and nothing is touched then.
    """
    if bool(ct_ids) == everything:
        raise neither_or_both(ctx, everything=everything)
    store = existing_store(ctx) if everything else open_store(ctx)
    if everything:
        containers = [store.container(one.path) for one in store.statuses() if one.mounted]
    else:
        containers = [_at_mountpoint(store, ct_id) or store.container(ct_id) for ct_id in ct_ids]
    unmounted: list[dict[str, Any]] = []

    def action(container: Container) -> None:
        container.umount(lazy=lazy, everywhere=everywhere)
        unmounted.append({"ct": container.ct, "path": container.path})

    with _results(ctx, unmounted):
        _each(ctx, containers, action)


def _at_mountpoint(store: Store, ct_id: str) -> Container | None:
    """What is mounted at ``ct_id``, if it is a path. Looked for first: a container decides what is in its root."""
    return store.mounted_at(ct_id) if "/" in ct_id else None


@click.command(
    cls=Command,
    examples=[
        ("vzfs check 101", "look for damage; exit code 1 if there is some"),
        ("vzfs check 101 --repair", "and mend it; exit code 0 if all was mended"),
        ("vzfs check --all --json", "every container, for programs"),
    ],
)
@any_containers_argument
@click.option("--repair", is_flag=True, help="Mend what is found. A container's data is never deleted silently.")
@click.option("--all", "everything", is_flag=True, help="All containers of the store.")
@json_option
@click.pass_context
def check(ctx: click.Context, ct_ids: tuple[str, ...], repair: bool, everything: bool) -> None:
    """Look for crash leftovers and damage.

    A container that is in use is refused; with --all it is skipped.
    """
    results: list[dict[str, Any]] = []

    def action(container: Container) -> None:
        try:
            problems = container.check(repair=repair)
        except BusyError as error:
            if not everything:
                raise
            results.append({"ct": container.ct, "path": container.path, "problems": [], "skipped": error.message})
            click.echo(printable(f"container {container.ct} is skipped: {error.message}"), err=True)
            return
        results.append({"ct": container.ct, "path": container.path, "problems": problems, "skipped": None})
        if wants_json(ctx):
            return
        for problem in problems:
            mended = "  [repaired]" if problem.repaired else ""
            click.echo(printable(f"{container.ct}: {problem.path}: {problem.kind}: {problem.detail}{mended}"))
        if not problems:
            click.echo(f"container {printable(container.ct)} is clean")

    with _results(ctx, results):
        _each(ctx, _named(ctx, ct_ids, everything), action)
    if any(not problem.repaired for result in results for problem in result["problems"]):
        ctx.exit(EXIT_PROBLEMS)


COMMANDS = (create, list_containers, status, mount, umount, check, destroy)
