"""vzfs: a copy-on-write template file system for containers.

The names below are the Python interface; see ``vzfs.api``.
"""

from __future__ import annotations

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

__all__ = [
    "BusyError",
    "Container",
    "DamagedError",
    "ExistsError",
    "FullError",
    "NotFoundError",
    "NotMountedError",
    "SourceError",
    "Status",
    "Store",
    "Template",
    "UnsupportedError",
    "UsageError",
    "VzfsError",
]
