"""Every error that vzfs reports on purpose, as one tree.

Rule: an error names the thing and the remedy. The command line turns ``exit_code`` into its exit status; inside a
mount, errors are plain ``OSError`` with the errno that the kernel passes to the program, never one of these.
"""

from __future__ import annotations


class VzfsError(Exception):
    """Base of all vzfs errors.

    ``message`` names what went wrong and with which thing; ``remedy``, when there is one, says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class UsageError(VzfsError):
    """An argument that can't be meant: a bad name, an option that doesn't apply."""

    exit_code = 2


class NotFoundError(VzfsError):
    """No such store, template or container."""

    exit_code = 3


class ExistsError(VzfsError):
    """The template or container is there already."""

    exit_code = 4


class BusyError(VzfsError):
    """In use: a mounted container, a template that containers need, a mount point with open files."""

    exit_code = 5


class NotMountedError(VzfsError):
    """The container is not mounted."""

    exit_code = 6


class UnsupportedError(VzfsError):
    """This machine or process lacks what is needed: root, /dev/fuse, a program, extended attributes."""

    exit_code = 7


class SourceError(VzfsError):
    """A template source that can't be used: hostile or damaged archive, failed debootstrap."""

    exit_code = 8


class DamagedError(VzfsError):
    """The store contradicts itself: a broken index, a digest that differs, a malformed container."""

    exit_code = 9


class FullError(VzfsError):
    """The disk is full or a quota is reached."""

    exit_code = 10
