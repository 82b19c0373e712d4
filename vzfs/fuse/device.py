"""The device on which a mount is served: requests out of it, answers into it, backing files registered with it.

Rule: knows bytes and descriptors only. Several threads may answer at once, one reads.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import time
from collections.abc import Callable
from functools import partial

from vzfs.fuse import wire

_GONE = (errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN)
"""The mount ended: by umount, or aborted."""
_AGAIN = (errno.EINTR, errno.EAGAIN, errno.ENOENT)
"""Nothing to read after all: the request was taken back while it was being read."""


class Device:
    """One mount's device, by its descriptor, with a buffer for one request.

    ``busy_poll_us``: how many microseconds to look for the next request again and again before sleeping.
    """

    def __init__(self, fd: int, max_write: int, busy_poll_us: int = 0) -> None:
        self.fd = fd
        # The kernel wants room for the largest WRITE, its header and one page more; only touched pages cost memory.
        self.buffer = bytearray(max_write + 4096)
        self._read = partial(os.readv, fd, [self.buffer])
        os.set_blocking(fd, not busy_poll_us)
        self.receive: Callable[[], int] = self._poll if busy_poll_us else self._read
        self._busy_poll_ns = busy_poll_us * 1000
        self._poller = select.poll()
        self._poller.register(fd, select.POLLIN)

    def _poll(self) -> int:
        """Wait for a request, awake at first."""
        end = time.perf_counter_ns() + self._busy_poll_ns
        while True:
            try:
                return self._read()
            except BlockingIOError:
                if time.perf_counter_ns() > end:
                    self._poller.poll()

    def send(self, answer: bytes) -> None:
        """Write a whole answer or notification. That nobody waits for it any more is no error."""
        try:
            os.write(self.fd, answer)
        except OSError as error:
            if error.errno not in (errno.ENOENT, *_GONE):
                raise

    def open_backing(self, fd: int) -> int:
        """Register an open regular file, to which the kernel shall pass reads and writes; gives its id.

        ``fd`` may be closed afterwards. Raises ``OSError``: ``EPERM`` without CAP_SYS_ADMIN, ``ELOOP`` for a file on a
        stacked file system.
        """
        wanted = bytearray(wire.BACKING_MAP.pack(fd, 0, 0))  # only a mutable argument brings the id back
        backing_id: int = fcntl.ioctl(self.fd, wire.BACKING_OPEN, wanted)
        return backing_id

    def close_backing(self, backing_id: int) -> None:
        """End a registration; files that are open with it stay so."""
        fcntl.ioctl(self.fd, wire.BACKING_CLOSE, backing_id.to_bytes(4, "little"))


def ended(error: OSError) -> bool:
    """Whether a failed ``receive`` says that the mount is over; otherwise it is to be tried again."""
    if error.errno in _GONE:
        return True
    if error.errno in _AGAIN:
        return False
    raise error
