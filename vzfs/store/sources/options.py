"""What the maker of a template may choose about its source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How to read a template's source.

    ``mirror`` (URL or absolute path), ``variant`` (``None``: debootstrap's own default), ``include`` (package names)
    and ``keyring`` (absolute path) are for ``debootstrap:SUITE`` only. With ``allow_devices`` false, a device node in a
    directory or an archive is refused, and those that debootstrap makes in ``/dev`` are removed. ``max_size`` is how
    many bytes its files may have together, ``None``: what is free in the store, less five percent (``budget``).
    """

    mirror: str | None = None
    variant: str | None = "minbase"
    include: tuple[str, ...] = ()
    allow_devices: bool = True
    keyring: str | None = None
    max_size: int | None = None
