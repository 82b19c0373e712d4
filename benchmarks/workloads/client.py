"""The measured loops, in a process of their own: ``python -I -S client.py``, an order as one line of JSON on its input.

Rule: a program by itself, of the standard library alone, and the same for every system. It gets everything ready, says
``ready``, waits for a line, and then does nothing but the system calls in question with one reading of the clock after
each: the differences are the latencies, so that nothing lies between two operations that is not counted. What proves
the work (sizes, first bytes) is collected by what costs tens of nanoseconds and put together after the last operation.

The answer is one line of JSON: ``start`` and ``end`` (ns, CLOCK_MONOTONIC, which is one clock for all clients),
``operations``, ``bytes``, ``proof`` (text) and ``stamps``, the clock after each operation.
"""

from __future__ import annotations

import gc
import hashlib
import json
import mmap
import os
import random
import select
import stat
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

Order = dict[str, Any]
"""``loop``: name of a function below; ``root``: directory to work in; and what that function takes."""
Stamp = Callable[[int], None]
Run = Callable[[Stamp], None]
Finish = Callable[[], tuple[int, str]]
"""What follows the last operation: gives the bytes moved and the proof."""
Loop = tuple[Run, Finish]

now = time.monotonic_ns
BLOCK = 256 << 10
"""Bytes of a sequential read or write: what a second-level cache holds, so that copying is no figure of the memory."""
PAGE = 4096
HEAD = 16
"""Bytes of every sequential block that go into the proof."""


def digest(*parts: object) -> str:
    """A short text that differs when any of ``parts`` does."""
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        state.update(part if isinstance(part, bytes) else repr(part).encode())
        state.update(b"\0")
    return state.hexdigest()


def lstat(order: Order) -> Loop:
    """lstat of each of ``paths``."""
    paths = order["paths"]
    sizes: list[int] = []

    def run(stamp: Stamp) -> None:
        call, note = os.lstat, sizes.append
        for path in paths:
            note(call(path).st_size)
            stamp(now())

    return run, lambda: (0, digest(sizes))


def absent(order: Order) -> Loop:
    """Look up each of ``paths``, which do not exist; access(2), as lstat would cost an exception for each."""
    paths = order["paths"]
    found: list[bool] = []

    def run(stamp: Stamp) -> None:
        call, note = os.access, found.append
        for path in paths:
            note(call(path, os.F_OK))
            stamp(now())

    return run, lambda: (0, f"{len(found)} asked, {sum(found)} found")


def listing(order: Order) -> Loop:
    """List each directory of ``paths`` (getdents64, types included, no attributes)."""
    paths = order["paths"]
    lists: list[list[str]] = []

    def run(stamp: Stamp) -> None:
        for path in paths:
            with os.scandir(path) as entries:
                lists.append([entry.name for entry in entries])
            stamp(now())

    return run, lambda: (0, digest(*(sorted(names) for names in lists)))


def read_files(order: Order) -> Loop:
    """open, one read of up to a page, close: of each of ``paths``."""
    paths = order["paths"]
    contents: list[bytes] = []

    def run(stamp: Stamp) -> None:
        opening, reading, closing, note = os.open, os.read, os.close, contents.append
        for path in paths:
            file = opening(path, os.O_RDONLY)
            note(reading(file, PAGE))
            closing(file)
            stamp(now())

    return run, lambda: (sum(len(content) for content in contents), digest(*contents))


def sequential_read(order: Order) -> Loop:
    """Read ``size`` bytes of the file ``path`` from ``offset`` on, or up to its end, blocks into one buffer."""
    path, left = order["path"], order["size"]
    heads: list[bytes] = []
    buffer = memoryview(bytearray(b"x" * BLOCK))
    head = buffer[:HEAD]
    total = 0

    def run(stamp: Stamp) -> None:
        nonlocal total
        with open(path, "rb", buffering=0) as file:
            file.seek(order["offset"])
            reading, note = file.readinto, heads.append
            while count := reading(buffer[: left - total]):
                note(bytes(head))
                total += count
                stamp(now())

    return run, lambda: (total, digest(total, *heads))


def random_read(order: Order) -> Loop:
    """Read ``count`` pages of the file ``path`` at places that ``seed`` gives; opening is not measured."""
    file = os.open(os.path.join(order["root"], order["path"]), os.O_RDONLY)
    pages = os.fstat(file).st_size // PAGE
    places = random.Random(order["seed"])
    offsets = [places.randrange(pages) * PAGE for _ in range(order["count"])]
    buffer = bytearray(PAGE)
    heads = bytearray()

    def run(stamp: Stamp) -> None:
        reading, into, note = os.preadv, [buffer], heads.append
        for offset in offsets:
            reading(file, into, offset)
            note(buffer[0])
            stamp(now())

    return run, lambda: (len(heads) * PAGE, digest(bytes(heads)))


def mmap_touch(order: Order) -> Loop:
    """Map the file ``path`` and take one byte of each of its pages; one operation."""
    touched = b""
    size = 0

    def run(stamp: Stamp) -> None:
        nonlocal touched, size
        with open(order["path"], "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            with mmap.mmap(file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
                touched = memory[::PAGE]  # walks the mapping in C
        stamp(now())

    return run, lambda: (size, digest(touched))


def create(order: Order) -> Loop:
    """Make an empty file at each of ``paths``."""
    paths = order["paths"]

    def run(stamp: Stamp) -> None:
        opening, closing = os.open, os.close
        for path in paths:
            closing(opening(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            stamp(now())

    return run, lambda: (0, digest(*(stat.S_ISREG(os.lstat(path).st_mode) for path in paths)))


def rename(order: Order) -> Loop:
    """Rename each of ``paths`` to the name at its place in ``targets``."""
    pairs = list(zip(order["paths"], order["targets"], strict=True))

    def run(stamp: Stamp) -> None:
        call = os.rename
        for path, target in pairs:
            call(path, target)
            stamp(now())

    return run, lambda: (0, digest(*((os.path.lexists(a), os.path.lexists(b)) for a, b in pairs)))


def unlink(order: Order) -> Loop:
    """Unlink each of ``paths``."""
    paths = order["paths"]

    def run(stamp: Stamp) -> None:
        call = os.unlink
        for path in paths:
            call(path)
            stamp(now())

    return run, lambda: (0, digest(*(os.path.lexists(path) for path in paths)))


def first_write(order: Order) -> Loop:
    """Overwrite the first bytes of each of ``paths``; with ``fsync`` each is on the disk before it is closed."""
    paths, durable, content = order["paths"], order["fsync"], b"written!"

    def run(stamp: Stamp) -> None:
        opening, writing, syncing, closing = os.open, os.pwrite, os.fsync, os.close
        for path in paths:
            file = opening(path, os.O_WRONLY)
            writing(file, content, 0)
            if durable:
                syncing(file)
            closing(file)
            stamp(now())

    def finish() -> tuple[int, str]:
        sizes = [os.lstat(path).st_size for path in paths]
        return sum(sizes), digest(sizes, *(_edges(path) for path in paths))

    return run, finish


def _edges(path: str) -> bytes:
    """The first and the last page of a file."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(PAGE)
        file.seek(max(0, os.fstat(file.fileno()).st_size - PAGE))
        return head + file.read(PAGE)


def chmod(order: Order) -> Loop:
    """Give each of ``paths``, whose names the kernel knows, the mode ``mode``."""
    paths, mode = order["paths"], order["mode"]
    for path in paths:
        os.lstat(os.path.join(order["root"], path))

    def run(stamp: Stamp) -> None:
        call = os.chmod
        for path in paths:
            call(path, mode)
            stamp(now())

    return run, lambda: (0, digest(*((os.lstat(path).st_mode, os.lstat(path).st_size) for path in paths)))


def sequential_write(order: Order) -> Loop:
    """Write ``size`` bytes into the new file ``path``; with ``fsync`` they are on the disk before it is closed."""
    path, blocks, durable = order["path"], order["size"] // BLOCK, order["fsync"]
    content = random.Random(1).randbytes(BLOCK)

    def run(stamp: Stamp) -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        writing = os.write
        for _ in range(blocks):
            if writing(file, content) != BLOCK:
                raise OSError(f"{path}: a short write")
            stamp(now())
        if durable:
            os.fsync(file)
        os.close(file)

    return run, lambda: (blocks * BLOCK, digest(os.lstat(path).st_size, _edges(path)))


def append_sync(order: Order) -> Loop:
    """Append a page to the new file ``path`` and fsync it, ``count`` times."""
    path, count, content = order["path"], order["count"], b"x" * PAGE
    file = os.open(os.path.join(order["root"], path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)

    def run(stamp: Stamp) -> None:
        writing, syncing = os.write, os.fsync
        for _ in range(count):
            writing(file, content)
            syncing(file)
            stamp(now())

    return run, lambda: (count * PAGE, digest(os.lstat(path).st_size, _edges(path)))


def paced_lstat(order: Order) -> Loop:
    """lstat of the next of ``paths`` every ``pause`` seconds until a line arrives, of at least ``least``.

    The clock is read after each pause as well: every second latency is one of a look-up.
    """
    paths, pause, least = order["paths"], order["pause"], order["least"]

    def run(stamp: Stamp) -> None:
        poll = select.poll()
        poll.register(0, select.POLLIN)
        for number, path in enumerate(paths):
            if number >= least and poll.poll(0):
                break
            time.sleep(pause)
            stamp(now())
            os.lstat(path)
            stamp(now())

    return run, lambda: (0, "all found")


def spawn(order: Order) -> Loop:
    """Run each of ``commands`` (arguments, the program's path first) to its end, in ``root`` or chrooted to it.

    Their output is kept in memory; ``output`` says what of it goes into the proof: ``all``, ``none``, or ``sizes`` for
    find's lines of type and size, of which directories' sizes differ between file systems.
    """
    commands, environment = order["commands"], order.get("environment", {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    output = os.memfd_create("output", 0)
    nothing = os.open("/dev/null", os.O_RDONLY)
    if order.get("chroot"):
        os.chroot(order["root"])
    actions = [(os.POSIX_SPAWN_DUP2, nothing, 0), (os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]

    def run(stamp: Stamp) -> None:
        for command in commands:
            pid = os.posix_spawn(command[0], command, environment, file_actions=actions)
            _, status = os.waitpid(pid, 0)
            stamp(now())
            if status != 0:
                raise OSError(f"{' '.join(command)}: status {status >> 8}: {_text(output)[-1000:].strip()}")

    def finish() -> tuple[int, str]:
        text = _text(output)
        if order.get("output", "all") == "sizes":
            lines = [line.split() for line in text.splitlines()]
            return 0, f"{len(lines)} entries of {sum(int(size) for kind, size in lines if kind != 'd')} bytes"
        return 0, digest(text) if order.get("output", "all") == "all" else ""

    return run, finish


def _text(output: int) -> str:
    return os.pread(output, os.fstat(output).st_size, 0).decode(errors="replace")


LOOPS: dict[str, Callable[[Order], Loop]] = {
    function.__name__: function
    for function in (
        lstat,
        absent,
        listing,
        read_files,
        sequential_read,
        random_read,
        mmap_touch,
        create,
        rename,
        unlink,
        first_write,
        chmod,
        sequential_write,
        append_sync,
        paced_lstat,
        spawn,
    )
}


def complain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What went wrong, for people: the place in this program tells nobody anything."""
    print(f"{kind.__name__}: {error}", file=sys.stderr, flush=True)


def main() -> None:
    """Do one order."""
    sys.excepthook = complain
    order = json.loads(sys.stdin.readline())
    run, finish = LOOPS[order["loop"]](order)
    os.chdir("/" if order.get("chroot") else order["root"])
    stamps: list[int] = []
    gc.collect()
    gc.freeze()
    gc.disable()
    print("ready", flush=True)
    sys.stdin.readline()
    start = now()
    run(stamps.append)
    end = now()
    moved, proof = finish()
    answer = {"start": start, "end": end, "operations": len(stamps), "bytes": moved, "proof": proof, "stamps": stamps}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
