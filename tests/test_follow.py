"""Co-location: where the serving thread of the direct engine runs, and that it costs nothing while nobody asks."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import SMALL, make_source
from tests.engines import EngineContainer, EngineStore
from tests.realuse_helpers import in_child, wait_for
from vzfs.fuse.follow import EVERY, SAMPLES, Follower

CPUS = sorted(os.sched_getaffinity(0))
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
MIB = 1 << 20


# -------------------------------------------------------------------------------------------------- decisions alone


class Seen(Follower):
    """A follower that is told where clients run."""

    def __init__(self) -> None:
        super().__init__()
        self.where: dict[int, int] = {}

    def _processor(self, client: int) -> int:  # type: ignore[override]
        return self.where.get(client, -1)

    def look_at(self, *clients: tuple[int, int]) -> set[int]:
        """See the clients, each on its CPU; where the thread may run then."""
        for client, cpu in clients:
            self.where[client] = cpu
            self.look(client)
        return os.sched_getaffinity(0)


def placed(*looks: Sequence[tuple[int, int]]) -> list[set[int]]:
    """What a follower in a process of its own did after each of ``looks``."""
    read_end, write_end = os.pipe()

    def work() -> None:
        follower = Seen()
        results = [sorted(follower.look_at(*look)) for look in looks]
        os.write(write_end, json.dumps(results).encode())

    in_child(work)
    os.close(write_end)
    with open(read_end, "rb") as file:
        return [set(result) for result in json.load(file)]


@two_cpus
def test_one_client_is_followed_where_it_goes() -> None:
    first, second = CPUS[:2]
    few = [(7, first)] * (SAMPLES - 1)
    assert placed(few, [(7, first)], [(7, second)], [(7, first)]) == [set(CPUS), {first}, {second}, {first}]


@two_cpus
def test_a_client_that_the_scheduler_takes_away_each_time_is_left() -> None:
    first, second = CPUS[:2]
    begun = [(7, first)] * SAMPLES
    assert placed(begun, [(7, second)], [(7, first)], [(7, second)]) == [{first}, {second}, {first}, set(CPUS)]


@two_cpus
def test_a_client_that_stays_now_and_then_is_not_left() -> None:
    first, second = CPUS[:2]
    moves = [(7, second), (7, second), (7, first), (7, first)]
    assert placed([(7, first)] * SAMPLES, *([move] for move in moves * 3))[-1] == {first}


@two_cpus
def test_several_clients_are_left_to_the_scheduler() -> None:
    first, second = CPUS[:2]
    assert placed(
        [(7, first)] * SAMPLES,
        [(8, second)],
        [(7, first), (8, second)] * 5,
        [(7, first)] * SAMPLES,
    ) == [{first}, set(CPUS), set(CPUS), {first}]


@two_cpus
def test_programs_one_after_another_on_one_cpu_are_followed() -> None:
    second = CPUS[1]
    assert placed([(client, second) for client in range(1, SAMPLES + 1)]) == [{second}]


@two_cpus
def test_clients_that_can_not_be_seen_are_not_followed() -> None:
    assert placed([(7, -1)] * 10, [(7, CPUS[0])] * SAMPLES, [(9, -1)]) == [set(CPUS), {CPUS[0]}, set(CPUS)]


@two_cpus
def test_a_cpu_that_is_not_ours_is_not_taken() -> None:
    read_end, write_end = os.pipe()

    def work() -> None:
        os.sched_setaffinity(0, {CPUS[0]})
        follower = Seen()
        follower.look_at(*[(7, CPUS[1])] * 10)
        os.write(write_end, json.dumps([*os.sched_getaffinity(0), follower.moves]).encode())

    in_child(work)
    os.close(write_end)
    with open(read_end, "rb") as file:
        assert json.load(file) == [CPUS[0], 0]


def test_where_a_process_runs() -> None:
    code = f"import os, time; os.sched_setaffinity(0, {{{CPUS[-1]}}}); print(flush=True); time.sleep(60)"
    with subprocess.Popen(["python3", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert Follower._processor(process.pid) == CPUS[-1]
        process.kill()
        process.wait()
        assert Follower._processor(process.pid) == -1


# ------------------------------------------------------------------------------------------------------ on a mount


@pytest.fixture
def container(clean_path: Path) -> EngineContainer:
    store = EngineStore(clean_path / "vz", "direct")
    source = make_source(clean_path / "source")
    (source / "big").write_bytes(os.urandom(MIB) * 32)
    store.create_template(SMALL, str(source))
    return store.create(101, template=SMALL)


@contextlib.contextmanager
def asking(root: Path, cpu: int) -> Iterator[int]:
    """A process on ``cpu`` that asks for one name after another that isn't there; its number."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            os.sched_setaffinity(0, {cpu})
            for number in itertools.count():
                with contextlib.suppress(FileNotFoundError):
                    os.stat(root / f"no-{cpu}-{number}")
        os._exit(1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def server(container: EngineContainer) -> int:
    pid = container.status().pid
    assert pid is not None
    return pid


@two_cpus
def test_the_serving_thread_follows_and_returns(container: EngineContainer) -> None:
    first, second = CPUS[:2]
    with container.mounted() as root:
        pid = server(container)
        assert os.sched_getaffinity(pid) == set(CPUS)
        with asking(root, second):
            wait_for(lambda: os.sched_getaffinity(pid) == {second})
        with asking(root, first):
            wait_for(lambda: os.sched_getaffinity(pid) == {first})
            with asking(root, second):  # several: left to the scheduler, sooner or later
                wait_for(lambda: os.sched_getaffinity(pid) == set(CPUS))
        with asking(root, first):
            wait_for(lambda: os.sched_getaffinity(pid) == {first})


@two_cpus
def test_few_requests_do_not_move_it(container: EngineContainer) -> None:
    with container.mounted() as root:
        for number in range(EVERY):
            assert not (root / f"no-{number}").exists()
        assert os.sched_getaffinity(server(container)) == set(CPUS)


@two_cpus
def test_workers_run_anywhere(container: EngineContainer) -> None:
    with container.mounted() as root:
        pid = server(container)
        with asking(root, CPUS[1]):
            wait_for(lambda: os.sched_getaffinity(pid) == {CPUS[1]})
            with open(root / "big", "ab") as file:  # copied up by a worker
                file.write(b"more")
            workers = [int(task) for task in os.listdir(f"/proc/{pid}/task") if int(task) != pid]
            assert workers
            assert all(os.sched_getaffinity(task) == set(CPUS) for task in workers)


def used_s(pid: int) -> float:
    """CPU seconds that all threads of the process have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def switches(pid: int) -> int:
    """How often the process's threads were woken."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
    return total


@pytest.mark.parametrize("busy_poll_us", [0, 500])
def test_nothing_is_used_while_nobody_asks(container: EngineContainer, busy_poll_us: int) -> None:
    with container.mounted(busy_poll_us=busy_poll_us) as root:
        pid = server(container)
        for name in os.listdir(root):
            (root / name).stat()
        with open(root / "big", "ab") as file:  # workers exist
            file.write(b"more")
        time.sleep(0.3)
        used, woken = used_s(pid), switches(pid)
        time.sleep(2)
        assert used_s(pid) - used <= TICK_S
        assert switches(pid) - woken <= 2


def test_busy_polling_is_bounded(container: EngineContainer) -> None:
    """Requests that come slowly cost as long a look-out each as was allowed, and what answering them costs."""
    requests, pause_s, poll_us = 100, 0.01, 1000
    used = {}
    for busy_poll_us in (0, poll_us):
        with container.mounted(busy_poll_us=busy_poll_us) as root:
            pid = server(container)
            for number in range(10):
                assert not (root / f"warm-{number}").exists()
            before = used_s(pid)
            for number in range(requests):
                assert not (root / f"no-{number}").exists()
                time.sleep(pause_s)
            used[busy_poll_us] = used_s(pid) - before
    assert used[0] <= 0.2 * requests * pause_s
    assert used[poll_us] <= used[0] + 2 * requests * poll_us * 1e-6 + 3 * TICK_S
    assert used[poll_us] >= 0.3 * requests * poll_us * 1e-6, "it looked out at all"


def test_a_polling_mount_ends_like_another(container: EngineContainer) -> None:
    root = container.mount(busy_poll_us=1000)
    assert (root / "etc/passwd").read_bytes()
    started = time.monotonic()
    container.umount()
    assert time.monotonic() - started < 10
    container.mount(busy_poll_us=1000)
    os.kill(server(container), signal.SIGTERM)
    wait_for(lambda: container.status().state == "stopped")
    assert container.check() == []
