"""The log of a serving process.

Rule: what a container can cause as often as it likes must not fill the node's disk, so complaints are limited; what
vzfs itself does (level INFO) is always told.
"""

from __future__ import annotations

import errno
import logging
import logging.handlers
import os
import threading
import time
from pathlib import Path
from typing import TextIO

from vzfs.errors import UnsupportedError, UsageError
from vzfs.store.ownfile import open_own

JOURNAL_SOCKET = "/dev/log"
BURST = 100
"""Complaints that are logged at once."""
PERIOD_S = 10.0
"""Time after which one more is."""
_NOBODY_WAITS = f"fuse_reply_* failed with {os.strerror(errno.ENOENT)}"


def set_up_log(where: str, container: str) -> None:
    """Log to the file ``where``, ``journal``, or ``-``: standard error. Raises ``UnsupportedError``, ``UsageError``."""
    handler: logging.Handler
    if where == "-":
        handler = logging.StreamHandler()
    elif where == "journal":
        if not os.path.exists(JOURNAL_SOCKET):
            raise UnsupportedError(
                f"no journal or syslog listens at {JOURNAL_SOCKET}", remedy="choose a file: --log FILE"
            )
        handler = logging.handlers.SysLogHandler(JOURNAL_SOCKET)
    else:
        try:
            handler = logging.StreamHandler(_open(Path(where), Path(container)))
        except OSError as error:
            raise UsageError(
                f"can't write the log {where}: {error.strerror}", remedy="choose another with --log"
            ) from error
    stamp = "" if where == "journal" else "%(asctime)s "
    handler.setFormatter(logging.Formatter(f"{stamp}vzfs[%(process)d] {container}: %(levelname)s %(message)s"))
    handler.addFilter(_is_news)
    handler.addFilter(Limit())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _open(path: Path, container: Path) -> TextIO:
    """The log, to be appended to: in the container a file or nothing, elsewhere whatever the caller chose, too."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    if path.parent == container:
        fd = open_own(path, flags, mode=0o644)
    else:
        # A FIFO that nobody reads is refused rather than waited for.
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o644)
    return open(fd, "a", encoding="utf-8", errors="backslashreplace")


def _is_news(record: logging.LogRecord) -> bool:
    """False for what pyfuse3 logs as an error when nobody waits for an answer any more: the program was killed, or the
    kernel asked to release a file and ended the mount."""
    return not (record.name == "pyfuse3" and record.getMessage().endswith(_NOBODY_WAITS))


class Limit(logging.Filter):
    """Lets ``BURST`` complaints pass, then one each ``PERIOD_S``; what passes next tells how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._allowed = float(BURST)
        self._last = time.monotonic()
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        with self._lock:
            if record.levelno >= logging.WARNING and not self._may_complain():
                self._left_out += 1
                return False
            left_out, self._left_out = self._left_out, 0
        if left_out:
            record.msg, record.args = f"{record.getMessage()} ({left_out} complaints before this are left out)", None
        return True

    def _may_complain(self) -> bool:
        now = time.monotonic()
        self._allowed = min(BURST, self._allowed + (now - self._last) / PERIOD_S)
        self._last = now
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True
