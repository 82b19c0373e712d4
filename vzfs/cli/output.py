"""Standard output that was closed, is full, or that nobody reads any more.

Rule: what goes wrong with the output is told as that, not as something wrong with the store.
"""

from __future__ import annotations

import io
import os
import sys

from vzfs.errors import VzfsError


class OutputError(VzfsError):
    """Standard output takes nothing. ``exit_code`` is that of errors without one of their own."""


class Output(io.TextIOWrapper):
    """A standard output whose failures are ``OutputError``; but a broken pipe stays what it is."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _refused(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _refused(error) from error


def _refused(error: OSError) -> OutputError:
    return OutputError(f"standard output: {error.strerror}", remedy="give the output another place")


def prepare_streams() -> None:
    """Make standard input, output and error such that they can be used, whatever the caller did to them.

    What the terminal's encoding can't hold is escaped. Descriptors that the caller closed (``>&-``) are taken, so that
    no file that is opened next gets their number and is then printed into; printing fails as it would have.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number != 2 else os.O_WRONLY)  # the lowest free number
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    if type(sys.stdout) is io.TextIOWrapper:
        encoding, lines = sys.stdout.encoding, sys.stdout.line_buffering
        sys.stdout = Output(sys.stdout.detach(), encoding=encoding, errors="backslashreplace", line_buffering=lines)
    reconfigure = getattr(sys.stderr, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def throw_output_away() -> None:
    """What is still in the buffer must go somewhere, or the interpreter complains at its end."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # not a real file
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
