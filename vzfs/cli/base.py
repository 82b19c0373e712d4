"""What every command is made of: examples in its help, the global options, completion of names.

Rule: options that every command understands are defined here once; a command never looks at ``sys.argv`` or the
environment itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vzfs.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from vzfs.api import Store

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Example = tuple[str, str]
"""A command line and what it does."""

JSON_KEY = "vzfs.json"


class Command(click.Command):
    """A click command whose help ends with examples."""

    def __init__(self, *args: Any, examples: Sequence[Example] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(self.examples, formatter)
        super().format_epilog(ctx, formatter)


class Group(click.Group):
    """A click group whose help ends with examples and whose commands are ``Command``."""

    command_class = Command

    def __init__(self, *args: Any, examples: Sequence[Example] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of definition, which is the order of use."""
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(self.examples, formatter)
        super().format_epilog(ctx, formatter)


def write_examples(examples: Iterable[Example], formatter: click.HelpFormatter) -> None:
    """Each example on a line of its own, unwrapped so that it can be copied, below what it does."""
    examples = tuple(examples)
    if not examples:
        return
    with formatter.section("Examples"):
        for line, meaning in examples:
            formatter.write(f"{'':>{formatter.current_indent}}# {meaning}\n")
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def json_option(command: Decorated) -> Decorated:
    """``--json`` on a command; ``wants_json`` tells, whether it was given there or before the command."""
    option = click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=_note_json,
        help="Print JSON, for programs.",
    )
    return option(command)


def _note_json(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    if value:
        ctx.meta[JSON_KEY] = True
    return value


def wants_json(ctx: click.Context) -> bool:
    return bool(ctx.meta.get(JSON_KEY, False))


def open_store(ctx: click.Context) -> Store:
    """The store of ``--root``, of ``VZFS_ROOT``, or /vz."""
    from vzfs.api import Store

    return Store(ctx.find_root().params.get("root"))


def existing_store(ctx: click.Context) -> Store:
    """The same; one that doesn't exist is not taken for an empty one, as its path is probably a mistake.

    Raises ``NotFoundError``.
    """
    store = open_store(ctx)
    if not store.exists:
        raise NotFoundError(
            f"there is no store at {store.root}",
            remedy="'vzfs template create' makes one; another is given with --root or VZFS_ROOT",
        )
    return store


def neither_or_both(ctx: click.Context, *, everything: bool) -> UsageError:
    """The error for naming no containers without ``--all``, or some with it."""
    return UsageError(
        "both CT_ID and --all were given" if everything else "no container was given",
        remedy=f"name containers, or use --all; see '{ctx.command_path} --help'",
    )


def complete_container(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Containers for the shell, by number and NAME, and directories when a path was begun.

    Nothing where the store can't be read, as there is no place for an error.
    """
    from click.shell_completion import CompletionItem

    if "/" in incomplete:
        return [CompletionItem(incomplete, type="dir")]
    names = []
    try:
        for container in open_store(ctx).containers():
            names += [container.ct, container.conf.get("NAME")]
    except Exception:  # noqa: BLE001
        return []
    return [CompletionItem(name) for name in dict.fromkeys(names) if name and name.startswith(incomplete)]


def complete_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files for the shell, where an option takes one, but other words as well."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def complete_template(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    try:
        names = [template.name for template in open_store(ctx).templates()]
    except Exception:  # noqa: BLE001
        return []
    return [name for name in names if name.startswith(incomplete)]


container_argument = click.argument("ct_id", metavar="CT_ID", shell_complete=complete_container)
containers_argument = click.argument(
    "ct_ids", metavar="CT_ID...", nargs=-1, required=True, shell_complete=complete_container
)
any_containers_argument = click.argument("ct_ids", metavar="[CT_ID]...", nargs=-1, shell_complete=complete_container)
template_argument = click.argument("name", metavar="NAME", shell_complete=complete_template)
