"""``vzfs template``: make, look at and remove templates."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from vzfs.cli.base import (
    Group,
    complete_file,
    complete_template,
    existing_store,
    json_option,
    open_store,
    template_argument,
    wants_json,
)
from vzfs.cli.failure import EXIT_PROBLEMS
from vzfs.cli.progress import progress_bar
from vzfs.cli.show import dash, moment, plain, print_fields, print_json, print_table, printable, size
from vzfs.errors import UsageError

if TYPE_CHECKING:
    from vzfs.store.template import TemplateInfo

DEBOOTSTRAP_DEFAULT = "base"
"""Given as --variant: what debootstrap makes without one."""


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """The number of bytes that an option says: ``1048576``, ``1024K``, ``1M``; with ``iB`` behind it is the same."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]{1,18})(?:([KMGT])(?:iB)?)?", value, re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{value!r} is no size such as 500M or 2G", ctx, param)
    return int(match[1]) << 10 * " KMGT".index((match[2] or " ").upper())


@click.group(
    cls=Group,
    examples=[
        ("vzfs template create debian-12 --from debootstrap:bookworm", "a template of Debian 12"),
        ("vzfs template list", "what there is"),
    ],
)
def template() -> None:
    """Make, look at and remove templates."""


@template.command(
    examples=[
        ("vzfs template create debian-12 --from debootstrap:bookworm", "download and install Debian 12"),
        (
            "vzfs template create web --from debootstrap:bookworm --include nginx,openssl",
            "with more packages",
        ),
        ("vzfs template create alma-9 --from /srv/roots/alma-9", "copy a directory"),
        (
            "vzfs template create app --from app-root.tar.zst",
            "unpack an archive (tar; gzip, bzip2, xz or zstd)",
        ),
        ("vzfs template create app --from downloaded.tar --max-size 2G", "one that shall not fill the disk"),
        ("docker export app | vzfs template create app --from - --no-devices", "unpack standard input"),
    ],
)
@click.argument("name", metavar="NAME")
@click.option(
    "--from",
    "source",
    metavar="SOURCE",
    required=True,
    shell_complete=complete_file,
    help="A directory, a tar archive (plain, gzip, bzip2, xz or zstd), '-' for an archive on standard input, "
    "or debootstrap:SUITE.",
)
@click.option("--mirror", metavar="URL", help="Where debootstrap downloads from.")
@click.option(
    "--variant",
    metavar="NAME",
    help="debootstrap's variant: minbase (the default), buildd, …, or base for its own default.",
)
@click.option(
    "--include", metavar="PACKAGE[,PACKAGE]", multiple=True, help="Packages debootstrap adds; may be repeated."
)
@click.option("--no-devices", is_flag=True, help="Refuse a source that holds device nodes.")
@click.option(
    "--max-size",
    metavar="SIZE",
    callback=_bytes,
    help="How much data it may have, in bytes or with K, M, G or T.  [default: what is free in the store, less 5 %]",
)
@json_option
@click.pass_context
def create(
    ctx: click.Context,
    name: str,
    source: str,
    mirror: str | None,
    variant: str | None,
    include: tuple[str, ...],
    no_devices: bool,
    max_size: int | None,
) -> None:
    """Make template NAME from SOURCE and seal it.

    The source is copied with owners, modes, times, extended attributes, capabilities, ACLs, hard links, devices and
    holes; a sealed template never changes. When this fails or is interrupted, nothing is left behind.
    """
    from vzfs.store.sources import SourceOptions

    if source == "-" and sys.stdin.isatty():
        raise UsageError("--from - reads an archive from standard input, which is a terminal", remedy="pipe one in")
    if not source.startswith("debootstrap:") and (mirror or variant or include):
        raise UsageError(
            "--mirror, --variant and --include are for debootstrap only",
            remedy="leave them out, or use --from debootstrap:SUITE",
        )
    packages = tuple(package for group in include for package in group.split(",") if package)
    options = SourceOptions(mirror=mirror, include=packages, allow_devices=not no_devices, max_size=max_size)
    if variant:
        options = replace(options, variant=None if variant == DEBOOTSTRAP_DEFAULT else variant)
    with progress_bar() as progress:
        made = open_store(ctx).create_template(name, source, options, progress)
    info = made.info()
    if wants_json(ctx):
        print_json(info)
        return
    click.echo(f"template {name}: {info.entries:,} entries, {size(info.size)}, sealed")


@template.command(
    "list",
    examples=[
        ("vzfs template list", "names, sizes and users"),
        ("vzfs template list --json | jq -r '.[].name'", "only the names"),
    ],
)
@json_option
@click.pass_context
def list_templates(ctx: click.Context) -> None:
    """List the templates of the store."""
    infos = [found.summary() for found in existing_store(ctx).templates()]
    if wants_json(ctx):
        print_json(infos)
        return
    print_table(
        ("NAME", "ENTRIES", "SIZE", "CREATED", "USED BY"),
        [_row(info) for info in infos],
    )


def _row(info: TemplateInfo) -> tuple[str, ...]:
    users = " ".join(info.used_by) or "-"
    if info.problem is not None:
        return info.name, "-", "-", f"damaged: {info.problem}", users
    return info.name, f"{info.entries:,}", size(info.size), moment(info.created), users


@template.command(examples=[("vzfs template show debian-12", "all that is known of it")])
@template_argument
@json_option
@click.pass_context
def show(ctx: click.Context, name: str) -> None:
    """Show what is known of template NAME."""
    found = open_store(ctx).template(name)
    info = found.info()
    if wants_json(ctx):
        print_json({"path": str(found.path), **plain(info)})
        return
    print_fields(
        (
            ("name", info.name),
            ("path", str(found.path)),
            ("source", info.source),
            ("digest", dash(info.digest)),
            ("created", moment(info.created)),
            ("entries", f"{info.entries:,} ({info.files:,} files, {info.directories:,} directories)"),
            ("data", size(info.size)),
            ("index", size(info.index_size)),
            ("inodes from", str(info.ino_base)),
            ("used by", " ".join(info.used_by) or "-"),
        )
    )


@template.command(
    examples=[
        ("vzfs template dump debian-12 | less", "read the index"),
        ("diff <(vzfs template dump a) <(vzfs template dump b)", "compare two templates"),
    ],
)
@template_argument
@click.pass_context
def dump(ctx: click.Context, name: str) -> None:
    """Print the index of template NAME as text, one line per entry."""
    for line in open_store(ctx).template(name).dump():
        click.echo(printable(line))


@template.command(
    examples=[
        ("vzfs template verify debian-12", "compare every file with its digest; exit code 1 if one differs"),
        ("vzfs template verify debian-12 --json", "the problems, for programs"),
    ],
)
@template_argument
@json_option
@click.pass_context
def verify(ctx: click.Context, name: str) -> None:
    """Compare template NAME with its index: every digest, mode, owner and link."""
    with progress_bar() as progress:
        problems = open_store(ctx).template(name).verify(progress)
    if wants_json(ctx):
        print_json(problems)
    else:
        for problem in problems:
            click.echo(printable(f"{problem.path}: {problem.kind}: {problem.detail}"))
        click.echo(f"template {name}: {len(problems)} problems" if problems else f"template {name} is as it was sealed")
    if problems:
        ctx.exit(EXIT_PROBLEMS)


@template.command(examples=[("vzfs template remove debian-11", "delete it; refused while a container uses it")])
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_template)
@json_option
@click.pass_context
def remove(ctx: click.Context, names: tuple[str, ...]) -> None:
    """Delete templates that no container uses."""
    store = open_store(ctx)
    removed: list[dict[str, str]] = []
    try:
        for name in names:
            store.template(name).remove()
            removed.append({"name": name})
            if not wants_json(ctx):
                click.echo(f"template {printable(name)} removed")
    finally:
        if wants_json(ctx):
            print_json(removed)
