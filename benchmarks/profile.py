"""What a run's figures are made of: FUSE requests by opcode, and a flame graph of the serving process.

Rule: recording must not change what is measured more than it has to. Requests are counted by the server in memory that
is mapped from here (vzfs) or by the kernel's tracepoint (all others), py-spy reads a process without stopping it; even
so a profiled run is for explaining figures, not for quoting them. Only the first round is recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzfs.errors import UnsupportedError
from vzfs.fuse.state import NAME, State, Statistics

if TYPE_CHECKING:
    from benchmarks.plan import Cell
    from benchmarks.systems import System
    from benchmarks.workload import Place

RATE_HZ = 250
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 60.0
BUFFER_KIB = 32 << 10
"""Of the kernel's trace, per CPU: some 700,000 requests."""
EVENT = "events/fuse/fuse_request_send"
_OPCODE = re.compile(r"opcode \d+ \((?:FUSE_)?(\w+)\)")
_LOST = re.compile(r"^(?:overrun|dropped events): (\d+)$", re.MULTILINE)


class Profiler:
    """Writes profiles into ``folder``; ``files`` tells the title and name of each.

    Raises ``UnsupportedError`` when py-spy is missing, before anything is measured.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        self._program = find_program()

    @contextlib.contextmanager
    def probe(self, cell: Cell, system: System, turn: int, place: Place) -> Iterator[None]:
        """Record what happens meanwhile on ``place`` if it is served by processes and this is the first round."""
        if turn != 1 or not place.servers:
            yield
            return
        clients = f"{cell.clients} client{'s' if cell.clients > 1 else ''}"
        title = f"{cell.workload.name}, {system.name}, {cell.condition}, {clients}"
        stem = f"{cell.workload.name}-{system.name}-{cell.condition}-{cell.clients}"
        with contextlib.ExitStack() as stack:
            counts = stack.enter_context(requests(place.root, place.servers[0]))
            for server in filter(_is_python, place.servers):
                stack.enter_context(self._flames(server, f"{stem}.svg", title))
            yield
        path = self.folder / f"{stem}.requests.json"
        path.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
        self.files[f"{title}: requests"] = path.name

    @contextlib.contextmanager
    def _flames(self, server: int, name: str, title: str) -> Iterator[None]:
        path = self.folder / name
        command = [str(self._program), "record", "--nonblocking", "--threads", "--format", "flamegraph"]
        command += ["--rate", str(RATE_HZ), "--pid", str(server), "--output", str(path)]
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
            try:
                _wait_for_sampling(process, said.fileno())
                yield
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        # A server that slept all the time leaves no stack to draw.
        if path.exists():
            self.files[f"{title}: flame graph"] = path.name


def find_program() -> Path:
    """py-spy, beside this interpreter or in the path. Raises ``UnsupportedError``."""
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    if found is None:
        raise UnsupportedError("--profile needs py-spy, which is not installed", remedy="pip install 'vzfs[bench]'")
    return Path(found)


def _wait_for_sampling(process: subprocess.Popen[bytes], said: int) -> None:
    """Wait until py-spy has found the interpreter in the process, which takes longer than some workloads do."""
    end = time.monotonic() + START_TIMEOUT_S
    while b"Sampling process" not in os.pread(said, 4096, 0):
        if process.poll() is not None or time.monotonic() > end:
            text = os.pread(said, 4096, 0).decode(errors="replace").strip()
            raise UnsupportedError(f"py-spy can't look at the serving process: {text}", remedy="leave out --profile")
        time.sleep(0.01)


def _is_python(pid: int) -> bool:
    return Path(os.readlink(f"/proc/{pid}/exe")).name.startswith("python")


# ---- requests --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def requests(root: Path, server: int) -> Iterator[dict[str, Any]]:
    """Count the FUSE requests to the mount ``root`` during the block; the dictionary is filled at its end.

    ``source`` says who counted, ``requests`` is by opcode; from vzfs also what it counts besides.
    """
    counts: dict[str, Any] = {}
    state = state_of(server)
    if state is None:
        with _traced(root, counts):
            yield counts
        return
    with state:
        before = state.statistics()
        yield counts
        counts.update(_difference(before, state.statistics()))


def state_of(server: int) -> State | None:
    """The memory in which ``server`` counts, if it is one of vzfs that does."""
    for name in os.listdir(f"/proc/{server}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{server}/fd/{name}").startswith(f"/memfd:{NAME}"):
                return State.open_of(server, int(name))
    return None


def _difference(before: Statistics, after: Statistics) -> dict[str, Any]:
    requests = {name: count - before.requests.get(name, 0) for name, count in after.requests.items()}
    numbers = ("errors", "interrupted", "copy_ups", "copied_bytes", "unfolds")
    counts: dict[str, Any] = {"source": "the server", "requests": {name: n for name, n in requests.items() if n}}
    counts |= {name: getattr(after, name) - getattr(before, name) for name in numbers}
    if after.answered is not None:
        counts["answered"] = {
            name: getattr(after.answered, name) - (getattr(before.answered, name) if before.answered else 0)
            for name in ("index", "tree", "store")
        }
    return counts


@contextlib.contextmanager
def _traced(root: Path, counts: dict[str, Any]) -> Iterator[None]:
    """Let the kernel note each request in a trace buffer of our own."""
    with contextlib.ExitStack() as stack:
        try:
            trace = _instance(stack)
            device = os.stat(root).st_dev
            (trace / "buffer_size_kb").write_text(str(BUFFER_KIB))
            # The kernel's own encoding of a device number: MINORBITS is 20 (include/linux/kdev_t.h).
            (trace / EVENT / "filter").write_text(f"connection == {os.major(device) << 20 | os.minor(device)}")
            (trace / EVENT / "enable").write_text("1")
        except OSError as error:
            counts.update({"source": "nobody", "requests": {}, "why": f"no tracing of FUSE requests: {error}"})
            yield
            return
        yield
        (trace / EVENT / "enable").write_text("0")
        with (trace / "trace").open(encoding="utf-8", errors="replace") as lines:
            found = Counter(match[1] for line in lines if (match := _OPCODE.search(line)))
        lost = sum(int(n) for cpu in trace.glob("per_cpu/*/stats") for n in _LOST.findall(cpu.read_text()))
        counts.update({"source": "the kernel's tracepoint", "requests": dict(found.most_common()), "lost": lost})


def _instance(stack: contextlib.ExitStack) -> Path:
    """A trace buffer of our own, so that nobody else's tracing is disturbed; gone when ``stack`` is closed."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vzfs-bench-trace-")))
    mounted = subprocess.run(["mount", "-t", "tracefs", "tracefs", str(folder)], capture_output=True, check=False)
    if mounted.returncode != 0:
        raise OSError(mounted.stderr.decode(errors="replace").strip())
    stack.callback(subprocess.run, ["umount", str(folder)], check=True)
    instance = folder / f"instances/vzfs-bench-{os.getpid()}"
    instance.mkdir()
    stack.callback(instance.rmdir)
    return instance
