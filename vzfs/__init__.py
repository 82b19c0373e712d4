"""vzfs: a copy-on-write template file system for containers.

The names below are the Python interface; see ``vzfs.api``. They are loaded when first used, because every module of the
package imports this one, and the start of a mount is worth milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vzfs.api import Container, Status, Store, Template
    from vzfs.errors import (
        BusyError,
        DamagedError,
        ExistsError,
        FullError,
        NotFoundError,
        NotMountedError,
        SourceError,
        UnsupportedError,
        UsageError,
        VzfsError,
    )
    from vzfs.fuse.state import Statistics

__all__ = [
    "BusyError",
    "Container",
    "DamagedError",
    "ExistsError",
    "FullError",
    "NotFoundError",
    "NotMountedError",
    "SourceError",
    "Statistics",
    "Status",
    "Store",
    "Template",
    "UnsupportedError",
    "UsageError",
    "VzfsError",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "Statistics":
        from vzfs.fuse.state import Statistics

        return Statistics
    from vzfs import api, errors

    return getattr(errors if hasattr(errors, name) else api, name)
