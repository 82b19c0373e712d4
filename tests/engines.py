"""The engines that the tests run on, and a store whose containers are mounted with a chosen one.

Rule: ``ENGINES`` is the one place that says which there are. A test that depends on the engine is parametrized over it;
one that doesn't runs on the last, which is the one that ``auto`` takes here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from vzfs import Container, Store
from vzfs.api import StrPath
from vzfs.fuse.direct import WANTED
from vzfs.fuse.wire import InitFlag
from vzfs.store.container import CtId

ENGINES = tuple(os.environ.get("VZFS_TEST_ENGINES", "pyfuse3,direct").split(","))
DEFAULT = ENGINES[-1]
each_engine = pytest.mark.parametrize("engine", ENGINES)
NEWER = WANTED & ~InitFlag(0xFFFFFFFF)
"""What the direct engine takes of a new kernel's offer and Debian 12's (6.1) doesn't make: passthrough and more."""
PATIENCE_S = 60.0
"""What starting, ending and all else that is waited for may take, however busy the machine is."""


class EngineStore(Store):
    """A store whose containers are mounted with ``engine`` and patiently, unless a test says otherwise; with
    ``withheld``, as on a kernel that doesn't offer these flags."""

    def __init__(self, root: StrPath, engine: str = DEFAULT, withheld: int = 0) -> None:
        super().__init__(root)
        self.engine = engine
        self.withheld = withheld

    def create(self, ct: CtId, **options: Any) -> EngineContainer:
        return EngineContainer(self, super().create(ct, **options).path)

    def container(self, ct: CtId) -> EngineContainer:
        return EngineContainer(self, super().container(ct).path)


class EngineContainer(Container):
    """A container of such a store."""

    def __init__(self, store: EngineStore, path: Path) -> None:
        super().__init__(store, path)
        self._chosen: dict[str, Any] = {"engine": store.engine, "timeout": PATIENCE_S}
        self._withheld = store.withheld

    def mount(self, mountpoint: StrPath | None = None, **options: Any) -> Path:
        return super().mount(mountpoint, **{"mkdir": mountpoint is not None, **self._chosen, **options})

    def _order(self, mountpoint: StrPath | None, **options: Any) -> dict[str, object]:
        return {**super()._order(mountpoint, **options), "withheld": self._withheld}

    def umount(self, **options: Any) -> None:
        super().umount(**{"timeout": PATIENCE_S, **options})
