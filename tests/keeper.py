"""Keeps a mount's device open and serves it on whenever its server dies: what a supervisor will do in production.

Run as a program: ``python -m tests.keeper ORDER_JSON PID DEVICE_FD STATE_FD``; takes the two descriptors from process
PID, says ``ready``, then prints the pid of every successor. Ends when one ends by itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import sys
import time

from vzfs.errors import BusyError
from vzfs.fuse import direct, serve
from vzfs.fuse.serve import Order

_NR_PIDFD_GETFD = 438


def take_fd(pid: int, number: int) -> int:
    """A copy of descriptor ``number`` of another process."""
    pidfd = os.pidfd_open(pid)
    try:
        fd = ctypes.CDLL(None, use_errno=True).syscall(_NR_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return int(fd)
    finally:
        os.close(pidfd)


def wait_for_end(pid: int) -> None:
    """Wait until the process has ended; it need not be a child."""
    pidfd = os.pidfd_open(pid)
    select.select([pidfd], [], [])
    os.close(pidfd)


def succeed(order: Order) -> None:
    """Serve in this process, as soon as the predecessor has let go of the lock."""
    for _ in range(1000):
        try:
            serve.serve(order)
            return
        except BusyError:  # its last thread is still closing files
            time.sleep(0.001)
    raise SystemExit("the predecessor's lock is still held")


def main() -> None:
    assert direct.NEEDED  # imported before it is needed in a hurry
    pid = int(sys.argv[2])
    device, state = take_fd(pid, int(sys.argv[3])), take_fd(pid, int(sys.argv[4]))
    order = Order(**{**json.loads(sys.argv[1]), "device": device, "state": state})
    print("ready", flush=True)
    wait_for_end(pid)
    while True:
        child = os.fork()
        if not child:
            succeed(order)
            os._exit(0)
        print(child, flush=True)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) >= 0:
            return


if __name__ == "__main__":
    main()
