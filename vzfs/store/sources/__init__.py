"""SOURCE -> files below a directory: what ``vzfs template create --from`` accepts.

A source is a directory, a tar archive (plain, gzip, xz, zstd or bzip2, told by content), ``-`` for one on standard
input, or ``debootstrap:SUITE``. Rule: everything the source says about an entry is kept, nothing outside the target is
touched, and what can't be kept or trusted is refused by an error that names the entry.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from vzfs.errors import SourceError, UnsupportedError, UsageError
from vzfs.store.progress import Progress, no_progress
from vzfs.store.sources import archive, attributes, bootstrap, directory
from vzfs.store.sources.budget import Budget
from vzfs.store.sources.errors import entry_error
from vzfs.store.sources.options import SourceOptions

__all__ = ["BOOTSTRAP", "STDIN", "SourceOptions", "populate"]

BOOTSTRAP = "debootstrap:"
STDIN = "-"


def populate(
    source: str,
    target: int | str | os.PathLike[str],
    options: SourceOptions | None = None,
    progress: Progress = no_progress,
) -> None:
    """Fill ``target``, an existing empty directory as a path or a descriptor, with the entries of ``source``.

    The caller removes ``target`` when this fails. Raises ``SourceError`` for a source that is missing, hostile or
    damaged, ``FullError``, ``UsageError`` for options that can't be meant, ``UnsupportedError`` without root or a
    program that is needed.
    """
    options = options or SourceOptions()
    if os.geteuid() != 0:
        raise UnsupportedError("making a template needs root, to keep owners and devices", remedy="use sudo")
    with _target_directory(target) as target_fd:
        budget = Budget(target_fd, options.max_size)
        if source.startswith(BOOTSTRAP):
            bootstrap.bootstrap(source.removeprefix(BOOTSTRAP), target_fd, options, progress)
            directory.spend_all(target_fd, budget)
            return
        if options.mirror or options.include or options.keyring:
            raise UsageError("mirror, include and keyring are for a source debootstrap:SUITE only")
        with _opened(source) as source_fd:
            if stat.S_ISDIR(os.fstat(source_fd).st_mode):
                directory.copy(source_fd, target_fd, options, budget, progress)
            else:
                archive.unpack(source_fd, target_fd, options, budget, progress)


@contextlib.contextmanager
def _target_directory(target: int | str | os.PathLike[str]) -> Iterator[int]:
    path, base = (".", target) if isinstance(target, int) else (target, None)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=base)
    try:
        attributes.remove_acls(fd)
        yield fd
    except OSError as error:
        raise entry_error(error, b".", fd) from error
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened(source: str) -> Iterator[int]:
    if source == STDIN:
        yield 0
        return
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise SourceError(
            f"the source {source!r} can't be opened: {error.strerror}",
            remedy="name a directory, a tar archive, - for standard input, or debootstrap:SUITE",
        ) from error
    except ValueError as error:
        raise SourceError(f"{source!r} can't be the name of a source") from error
    try:
        yield fd
    finally:
        os.close(fd)
