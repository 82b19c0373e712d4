"""Keeps a mount's device open and serves it on whenever its server dies: what a supervisor will do in production.

Run as a program: ``python -m tests.keeper ORDER_JSON PID DEVICE_FD STATE_FD LOCK_FD``; takes the three descriptors from
process PID, says ``ready``, then prints the pid of every successor. Ends when one ends by itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import sys

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


def main() -> None:
    assert direct.NEEDED  # imported before it is needed in a hurry
    pid = int(sys.argv[2])
    device, state, lock = (take_fd(pid, int(number)) for number in sys.argv[3:6])
    order = Order(**{**json.loads(sys.argv[1]), "device": device, "state": state, "lock": lock})
    print("ready", flush=True)
    wait_for_end(pid)
    while True:
        child = os.fork()
        if not child:
            serve.serve(order)
            os._exit(0)
        print(child, flush=True)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) >= 0:
            return


if __name__ == "__main__":
    main()
