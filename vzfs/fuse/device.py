"""The device on which a mount is served: requests out of it, answers into it, backing files registered with it.

Rule: knows bytes and descriptors only. Several threads may answer at once, one reads.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from functools import partial

from vzfs.fuse import wire

MAX_WRITE = 1 << 20
"""Bytes in one WRITE or READ of a file that passthrough is refused for: the most that the kernel sends by default."""
_GONE = (errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN)
"""The mount ended: by umount, or aborted."""
_AGAIN = (errno.EINTR, errno.EAGAIN, errno.ENOENT)
"""Nothing to read after all: the request was taken back while it was being read."""


class Device:
    """One mount's device, by its descriptor, with a buffer for one request.

    ``receive()`` reads the next request into ``buffer`` and gives its length; see ``wait_awake`` for how it waits.
    """

    def __init__(self, fd: int, max_write: int) -> None:
        self.fd = fd
        # The kernel wants room for the largest WRITE, its header and one page more; only touched pages cost memory.
        self.buffer = bytearray(max_write + 4096)
        self._read = partial(os.readv, fd, [self.buffer])
        self._awake_ns = 0
        self.receive: Callable[[], int] = self._read
        os.set_blocking(fd, True)

    def wait_awake(self, microseconds: int) -> None:
        """Look for a request again and again for so long before sleeping; 0: sleep at once."""
        if microseconds * 1000 == self._awake_ns:
            return
        self._awake_ns = microseconds * 1000
        os.set_blocking(self.fd, not microseconds)
        self.receive = self._receive_awake if microseconds else self._read

    def _receive_awake(self) -> int:
        end = time.perf_counter_ns() + self._awake_ns
        while True:
            try:
                return self._read()
            except BlockingIOError:
                if time.perf_counter_ns() > end:
                    break
        os.set_blocking(self.fd, True)
        try:
            return self._read()
        finally:
            os.set_blocking(self.fd, False)

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
