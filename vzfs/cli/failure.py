"""Every failure put into words, and its exit code: the one place.

Rule: people see what went wrong, with which thing, and what to do; never a traceback, unless they ask for it with
``--verbose`` or ``VZFS_DEBUG``.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from dataclasses import dataclass

import click

from vzfs.cli.show import printable
from vzfs.errors import FullError, UnsupportedError, UsageError, VzfsError

EXIT_PROBLEMS = 1
"""``check`` and ``template verify`` found problems that remain."""
EXIT_INTERNAL = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

_VERBOSE = re.compile("-v+")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EPERM, errno.EACCES})
_REMEDIES = {
    errno.EROFS: "remount that file system writable, or use another place",
    errno.EIO: "the disk or its driver failed; see the kernel's log: dmesg",
    errno.ENOENT: "give a place that exists and where directories can be made",
    errno.ENOTDIR: "a part of that path is not a directory; give another",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.ENFILE: "raise the limit of open files of the machine: sysctl fs.file-max",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EOPNOTSUPP: "the file system can't do that; see 'vzfs doctor'",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """What is told: ``kind`` is the error's class for programs, ``log`` the file that holds the traceback."""

    kind: str
    message: str
    remedy: str
    exit_code: int
    log: str | None = None


def explain(error: BaseException) -> Failure:
    """The words and the exit code for any exception that ends a command."""
    if isinstance(error, VzfsError):
        return Failure(type(error).__name__, error.message, error.remedy, error.exit_code)
    if isinstance(error, click.ClickException):
        return _explain_click(error)
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return Failure("Interrupted", "interrupted", "", EXIT_INTERRUPTED)
    if isinstance(error, OSError) and error.errno in _FULL:
        remedy = "free some space or enlarge the quota or file system, then try again; nothing was half done"
        return Failure(FullError.__name__, f"no space left for {_thing(error)}", remedy, FullError.exit_code)
    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        remedy = "run vzfs as root" if os.geteuid() else "see 'vzfs doctor' for the capabilities vzfs needs"
        message = f"{_thing(error)}: {error.strerror}"
        return Failure(UnsupportedError.__name__, message, remedy, UnsupportedError.exit_code)
    if isinstance(error, OSError) and error.filename is not None:
        remedy = _REMEDIES.get(error.errno or 0, "vzfs could not use it; 'vzfs -v …' shows for what")
        return Failure("OSError", f"{_thing(error)}: {error.strerror}", remedy, VzfsError.exit_code)
    log = _write_log(error)
    what = traceback.format_exception_only(error)[-1].strip()
    remedy = "this is a bug in vzfs; please report it" + (f" with {log}, which says where it happened" if log else "")
    return Failure("InternalError", f"internal error: {what}", remedy, EXIT_INTERNAL, log)


def _explain_click(error: click.ClickException) -> Failure:
    message = error.format_message()
    ctx = getattr(error, "ctx", None)
    if ctx is None:
        return Failure(UsageError.__name__, message, "see 'vzfs --help'", error.exit_code)
    usage = ctx.get_usage().removeprefix("Usage: ")
    return Failure(
        UsageError.__name__, message, f"usage: {usage}; see '{ctx.command_path} --help'", UsageError.exit_code
    )


def _thing(error: OSError) -> str:
    name = error.filename if error.filename is not None else "the store"
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)


def _write_log(error: BaseException) -> str | None:
    """The traceback in a file of its own; ``None`` where not even that can be written."""
    import tempfile

    text = "".join(traceback.format_exception(error))
    try:
        descriptor, path = tempfile.mkstemp(prefix="vzfs-error-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(f"vzfs {' '.join(sys.argv[1:])}\n{text}")
    except OSError:
        return None
    return path


def report(failure: Failure, *, as_json: bool) -> None:
    """Writes the failure to standard error, as text or as one JSON object ``{"error": {...}}``."""
    if as_json:
        from vzfs.cli.show import json_text

        click.echo(json_text({"error": failure}), err=True)
        return
    message, *more = failure.message.split("\n")
    click.echo(f"vzfs: {printable(message)}", err=True)
    for line in [*more, *failure.remedy.split("\n")]:
        if line:
            click.echo(f"  {printable(line)}", err=True)


def wants_traceback(args: list[str]) -> bool:
    """Asked for by ``VZFS_DEBUG`` or by ``-v``, ``-vv``; looked up in ``args`` as parsing may have failed."""
    return bool(os.environ.get("VZFS_DEBUG")) or any(arg == "--verbose" or _VERBOSE.fullmatch(arg) for arg in args)
