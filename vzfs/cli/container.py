"""The commands about containers: make, mount, look at, check and destroy them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from vzfs.cli.base import (
    Command,
    any_containers_argument,
    complete_template,
    container_argument,
    containers_argument,
    json_option,
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
    print_json_lines,
    print_table,
    printable,
    size,
)
from vzfs.errors import NotFoundError, UsageError, VzfsError

if TYPE_CHECKING:
    from vzfs.api import Container, Status
    from vzfs.store.diff import Change

LETTERS = {"added": "A", "changed": "C", "removed": "D", "renamed": "R"}


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
        raise UsageError(
            "both CT_ID and --all were given" if everything else "no container was given",
            remedy=f"name containers, or use --all; see '{ctx.command_path} --help'",
        )
    store = open_store(ctx)
    return store.containers() if everything else [store.container(ct_id) for ct_id in ct_ids]


def _name_of(container: Container) -> str:
    try:
        return container.conf.get("NAME")
    except (VzfsError, OSError):  # the status says what is wrong with it
        return ""


def _row(container: Container) -> dict[str, Any]:
    return _with_name(container.status(), _name_of(container))


def _with_name(one: Status, name: str) -> dict[str, Any]:
    return {**asdict(one), "name": name or None}


def _present(containers: Iterable[Container]) -> Iterator[tuple[Container, Status]]:
    """The containers and what they are doing, without those that somebody destroys meanwhile."""
    for container in containers:
        with contextlib.suppress(NotFoundError):
            yield container, container.status()


@click.command(
    cls=Command,
    examples=[
        ("vzfs create 101 --template debian-12", "container 101, mounted at /vz/root/101 later"),
        ("vzfs create 102 --template debian-12 --name web", "with a name that may be used instead of the number"),
        ("vzfs create /srv/ve/103 --template debian-12", "outside the store's own folder"),
        ("vzfs create 104 --template debian-12 --mountpoint /mnt/104", "to be mounted elsewhere"),
    ],
)
@click.argument("ct_id", metavar="CT_ID")
@click.option("--template", metavar="NAME", required=True, shell_complete=complete_template, help="Its template.")
@click.option("--name", metavar="ALIAS", help="A name to use instead of CT_ID.")
@click.option("--mountpoint", metavar="DIR", type=click.Path(file_okay=False), help="Where 'mount' mounts it.")
@json_option
@click.pass_context
def create(ctx: click.Context, ct_id: str, template: str, name: str | None, mountpoint: str | None) -> None:
    """Make a container from a template.

    CT_ID is a number, or the path of a container directory elsewhere.

    It takes a few milliseconds and a few kilobytes, whatever the template's size.
    """
    made = open_store(ctx).create(ct_id, template=template, name=name, mountpoint=mountpoint)
    if wants_json(ctx):
        print_json(_row(made))
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
@click.pass_context
def destroy(ctx: click.Context, ct_ids: tuple[str, ...], yes: bool) -> None:
    """Delete containers with all their files. A mounted container is refused."""

    def action(container: Container) -> None:
        path = escape_name(container.path)
        if not yes and not click.confirm(f"Delete container {path} and everything in it?", err=True):
            click.echo(f"container {path} kept", err=True)
            return
        container.destroy()
        click.echo(f"container {path} destroyed")

    if not yes and not sys.stdin.isatty():
        raise UsageError("destroy asks before it deletes, and standard input is no terminal", remedy="add --yes")
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
    found = [(one, _name_of(container)) for container, one in _present(open_store(ctx).containers())]
    if wants_json(ctx):
        print_json([_with_name(one, name) for one, name in found])
        return
    print_table(
        ("CT", "NAME", "TEMPLATE", "STATE", "MOUNTPOINT"),
        [(one.ct, dash(name), dash(one.template), _state(one), dash(one.mountpoint)) for one, name in found],
    )


@click.command(
    cls=Command,
    examples=[
        ("vzfs status", "every container"),
        ("vzfs status 101", "one container"),
        ("vzfs status 101 --json", "for programs"),
    ],
)
@click.argument("ct_id", metavar="[CT_ID]", required=False)
@json_option
@click.pass_context
def status(ctx: click.Context, ct_id: str | None) -> None:
    """Show what is mounted where, and served by which process."""
    store = open_store(ctx)
    if ct_id is not None:
        _print_status(ctx, store.container(ct_id))
        return
    found = [one for _, one in _present(store.containers())]
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
    state = "mounted, read-only" if one.mounted and one.read_only else "mounted" if one.mounted else "stopped"
    if one.problem is None:
        return state
    return f"{state}, damaged: {one.problem}" if one.mounted else f"damaged: {one.problem}"


def _print_status(ctx: click.Context, container: Container) -> None:
    one = container.status()
    if wants_json(ctx):
        print_json(_row(container))
        return
    print_fields(
        (
            ("container", str(one.ct)),
            ("name", dash(_name_of(container))),
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
    "--sync",
    type=click.Choice(["none", "data", "full"]),
    default="data",
    show_default=True,
    help="What is flushed to disk before a copied file takes its place: nothing, its data, its data and directory.",
)
@click.option("--foreground", is_flag=True, help="Serve in this process, until it is unmounted or interrupted.")
@click.option("--log", metavar="FILE|journal|-", help="Where the serving process logs; - is standard error.")
@json_option
@click.pass_context
def mount(
    ctx: click.Context,
    ct_id: str,
    mountpoint: str | None,
    read_only: bool,
    engine: str,
    busy_poll: int,
    sync: str,
    foreground: bool,
    log: str | None,
) -> None:
    """Mount the root of container CT_ID, and print where.

    Returns when the root is usable; a process of its own serves it until 'vzfs umount'.
    """
    container = open_store(ctx).container(ct_id)
    if foreground:
        container.serve(
            mountpoint, read_only=read_only, engine=engine, sync=sync, log=log or "-", busy_poll_us=busy_poll
        )
        return
    where = container.mount(mountpoint, read_only=read_only, engine=engine, sync=sync, log=log, busy_poll_us=busy_poll)
    if wants_json(ctx):
        print_json(_row(container))
        return
    click.echo(escape_name(where))


@click.command(
    cls=Command,
    examples=[
        ("vzfs umount 101", "end the mount when nothing uses it"),
        ("vzfs umount 101 --lazy", "detach it now; it ends when the last user is gone"),
        ("vzfs umount --all", "everything of this store"),
    ],
)
@any_containers_argument
@click.option("--lazy", is_flag=True, help="Detach at once, although files are open.")
@click.option("--all", "everything", is_flag=True, help="All mounted containers of the store.")
@click.pass_context
def umount(ctx: click.Context, ct_ids: tuple[str, ...], lazy: bool, everything: bool) -> None:
    """Unmount containers. Returns when their serving processes have written everything and ended."""

    def action(container: Container) -> None:
        if not everything or container.is_served():
            container.umount(lazy=lazy)

    _each(ctx, _named(ctx, ct_ids, everything), action)


@click.command(
    cls=Command,
    examples=[
        ("vzfs diff 101", "what was added (A), changed (C), removed (D) and renamed (R)"),
        ("vzfs diff 101 --content", "with the changed lines of text files"),
        ("vzfs diff 101 --json | jq -r '.[] | select(.kind == \"added\") | .path'", "the added paths"),
    ],
)
@container_argument
@click.option("--content", is_flag=True, help="Show how the content of text files differs.")
@json_option
@click.pass_context
def diff(ctx: click.Context, ct_id: str, content: bool) -> None:
    """List what container CT_ID changed.

    Its files are compared with its template: A added, C changed, D removed, R renamed. The exit code is 0, whether
    there are differences or not.
    """
    changes = open_store(ctx).container(ct_id).diff(content=content)
    if wants_json(ctx):
        print_json_lines(changes)
        return
    for change in changes:
        click.echo(describe(change))
        if change.content:
            click.echo("\n".join(printable(line) for line in change.content.splitlines()))


def describe(change: Change) -> str:
    """One line of ``vzfs diff``, for example ``C /etc/motd (content, times)``."""
    letter = LETTERS[change.kind]
    path = escape_name(change.path)
    if change.kind == "renamed" and change.old_path is not None:
        path = f"{escape_name(change.old_path)} -> {path}"
    what = f" ({', '.join(change.what)})" if change.what else ""
    return f"{letter} {path}{what}"


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
    """Look for crash leftovers and damage."""
    results: list[dict[str, Any]] = []

    def action(container: Container) -> None:
        problems = container.check(repair=repair)
        results.append({"ct": container.ct, "path": container.path, "problems": problems})
        if wants_json(ctx):
            return
        for problem in problems:
            mended = "  [repaired]" if problem.repaired else ""
            click.echo(printable(f"{container.ct}: {problem.path}: {problem.kind}: {problem.detail}{mended}"))
        if not problems:
            click.echo(f"container {printable(container.ct)} is clean")

    try:
        _each(ctx, _named(ctx, ct_ids, everything), action)
    finally:
        if wants_json(ctx) and results:
            print_json(results)
    if any(not problem.repaired for result in results for problem in result["problems"]):
        ctx.exit(EXIT_PROBLEMS)


COMMANDS = (create, list_containers, status, mount, umount, diff, check, destroy)
