"""For what comes after a change that is done."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

log = logging.getLogger(__name__)


@contextlib.contextmanager
def best_effort(what: str) -> Iterator[None]:
    """For what comes after a change that is done: it can't fail any more. What is left over, ``check`` finds."""
    try:
        yield
    except OSError as error:
        log.error("can't %s: %s", what, error)  # noqa: TRY400
