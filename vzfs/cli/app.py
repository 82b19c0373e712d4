"""The ``vzfs`` group: global options, and the way from a command's outcome to the exit code."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from vzfs.cli import container, diff, machine, stats, template
from vzfs.cli.base import JSON_KEY, Group
from vzfs.cli.failure import EXIT_BROKEN_PIPE, explain, report, wants_traceback
from vzfs.cli.output import OutputError, prepare_streams, throw_output_away

PROGRAM = "vzfs"
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that end a command in an orderly way, as Ctrl-C does: asked to, the terminal is gone, Ctrl-\\."""


class _NeverRaisedError(click.UsageError):
    pass


_NO_ARGUMENTS: type[click.UsageError] = getattr(click.exceptions, "NoArgsIsHelpError", _NeverRaisedError)
"""What click raises for no arguments at all; before 8.2 it prints the help and succeeds."""


class Program(Group):
    """The outermost group: every way to end a command leads through ``main``."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Runs a command line and exits: 0, a result of the command, or the exit code of its failure.

        ``standalone_mode`` is there for click's callers; this always ends the process (``SystemExit``).
        """
        given = list(sys.argv[1:] if args is None else args)
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup(1) sets it
                    signal.signal(number, _interrupt)
        try:
            outcome = super().main(given, prog_name or PROGRAM, complete_var, standalone_mode=False, **extra)
        except _NO_ARGUMENTS as error:
            click.echo(error.format_message(), err=True)
            sys.exit(error.exit_code)
        except OutputClosedError:
            throw_output_away()
            sys.exit(EXIT_BROKEN_PIPE)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
            if isinstance(error, OutputError):
                throw_output_away()
            if wants_traceback(given) and not isinstance(error, click.ClickException | click.Abort):
                sys.excepthook(type(error), error, error.__traceback__)
            failure = explain(error)
            report(failure, as_json="--json" in given)
            sys.exit(failure.exit_code)
        sys.exit(outcome if isinstance(outcome, int) else 0)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _noticing_closed_output():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _noticing_closed_output():
            return super().invoke(ctx)


def _interrupt(number: int, frame: object) -> NoReturn:
    """On these as on SIGINT: what is half done is undone, what was started is ended; which another one shall not stop,
    for a terminal that closes sends more than one."""
    for other in ENDING:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


class OutputClosedError(Exception):
    """Nobody reads standard output any more, as in ``vzfs diff 101 | head``."""


@contextmanager
def _noticing_closed_output() -> Iterator[None]:
    """click takes a BrokenPipeError for exit code 1, which ``check`` has another use for."""
    try:
        yield
    except BrokenPipeError as error:
        raise OutputClosedError from error


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vzfs")
    except PackageNotFoundError:
        return "not installed"


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"{PROGRAM} {_version()}")
        ctx.exit()


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    examples=[
        ("vzfs template create debian-12 --from debootstrap:bookworm", "make a template of Debian 12"),
        ("vzfs create 101 --template debian-12", "make a container that shares its files"),
        ("vzfs mount 101", "mount its root at /vz/root/101"),
        ("vzfs diff 101", "what the container changed"),
        ("vzfs --root /srv/vz list --json", "another store, and output for programs"),
    ],
)
@click.option(
    "--root",
    metavar="DIR",
    envvar="VZFS_ROOT",
    type=click.Path(file_okay=False),
    help="The store.  [env: VZFS_ROOT; default: /vz]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs, where a command has output.")
@click.option(
    "-v", "--verbose", count=True, help="Log to standard error what is done (-vv: in detail); tracebacks of errors."
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
@click.pass_context
def cli(ctx: click.Context, root: str | None, as_json: bool, verbose: int) -> None:
    """Container roots from shared templates, with copy-on-write.

    A template is a sealed tree of files. Containers made from it use its files as if they were their own: one copy on
    disk, one copy in memory; a file is copied when a container first changes it.
    """
    if as_json:
        ctx.meta[JSON_KEY] = True
    if verbose:
        import logging

        level = logging.INFO if verbose == 1 else logging.DEBUG
        logging.basicConfig(level=level, format="%(asctime)s %(name)s %(levelname)s %(message)s")


cli.add_command(template.template)
for module in (container, diff, stats, machine):
    for command in module.COMMANDS:
        cli.add_command(command)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The ``vzfs`` program. Output that the terminal's encoding can't hold is escaped instead of failing."""
    prepare_streams()
    cli.main(args, prog_name=PROGRAM)
