"""The commands about this machine: ``doctor`` and ``completion``."""

from __future__ import annotations

import click

from vzfs.cli.base import Command, json_option, open_store, wants_json
from vzfs.cli.show import print_json, printable
from vzfs.errors import UnsupportedError

COLOURS = {"ok": "green", "warning": "yellow", "missing": "red"}
PLACES = {
    "bash": "/etc/bash_completion.d/vzfs",
    "zsh": "/usr/local/share/zsh/site-functions/_vzfs",
    "fish": "/etc/fish/completions/vzfs.fish",
}
"""Where each shell looks for a completion script that root installs."""


@click.command(
    cls=Command,
    examples=[
        ("vzfs doctor", "what works here, and what to do about the rest"),
        ("vzfs --root /srv/vz doctor", "for a store elsewhere"),
        ("vzfs doctor --json | jq -r '.[] | select(.ok != \"ok\") | .name'", "the weak points"),
    ],
)
@json_option
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Examine what this machine can do for vzfs.

    The exit code is 0 if vzfs can run here, and 7 if something that it needs is missing.
    """
    from vzfs.doctor import can_run, examine

    findings = examine(open_store(ctx).root)
    if wants_json(ctx):
        print_json(findings)
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            mark = click.style(f"{finding.ok:<7}", fg=COLOURS[finding.ok])
            click.echo(f"{mark}  {finding.name:<{width}}  {printable(finding.value)}")
            if finding.remedy:
                click.echo(f"{'':7}  {'':{width}}  -> {printable(finding.remedy)}")
        verdict = "vzfs can run here" if can_run(findings) else "vzfs can't run here: see what is missing above"
        click.echo(f"\n{verdict}")
    if not can_run(findings):
        ctx.exit(UnsupportedError.exit_code)


@click.command(
    cls=Command,
    examples=[
        (f"vzfs completion bash > {PLACES['bash']}", "for every new bash"),
        (f"vzfs completion zsh > {PLACES['zsh']}", "for every new zsh"),
        (f"vzfs completion fish > {PLACES['fish']}", "for every new fish"),
        ('eval "$(vzfs completion bash)"', "for this bash only"),
    ],
)
@click.argument("shell", type=click.Choice(sorted(PLACES)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a completion script for SHELL.

    It completes commands, options, containers and templates."""
    from click.shell_completion import get_completion_class

    maker = get_completion_class(shell)
    if maker is None:
        raise click.UsageError(f"click has no completion for {shell}")
    click.echo(maker(ctx.find_root().command, {}, "vzfs", "_VZFS_COMPLETE").source())


COMMANDS = (doctor, completion)
