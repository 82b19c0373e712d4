"""What a mount counts: the shared memory by itself, then mounts on every engine, asked by the API and the program."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import LARGE_SIZE, SMALL, make_source
from tests.engines import ENGINES, PATIENCE_S, EngineContainer, EngineStore
from tests.realuse_helpers import asked, environment, expect, settled, vzfs, wait_for
from vzfs import NotFoundError, NotMountedError, Statistics, UnsupportedError, UsageError
from vzfs.api import MAX_BUSY_POLL_US
from vzfs.fuse.state import (
    ANSWERED,
    BUCKETS,
    DURABLE,
    ERRORS,
    OPEN,
    OPEN_TOP,
    OPEN_WORDS,
    PAUSES,
    REQUESTS,
    SIZE,
    SLOW,
    WORDS,
    Agreed,
    Answered,
    Pauses,
    State,
    percentile,
)
from vzfs.fuse.wire import OPCODES, InitFlag, Opcode
from vzfs.store.lock import Holder, Lock, read_holder
from vzfs.tree.counters import Counters
from vzfs.tree.durable import DURABLE_WORDS

# ------------------------------------------------------------------------------------------------------------ counters


def histogram(values: list[int]) -> list[int]:
    buckets = [0] * BUCKETS
    for value in values:
        buckets[value.bit_length()] += 1
    return buckets


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1), st.floats(0.01, 1))
def test_a_percentile_lies_in_the_bucket_of_the_true_one(values: list[int], share: float) -> None:
    rank = share * len(values)
    true = next(value for n, value in enumerate(sorted(values), start=1) if n >= rank)
    assert percentile(histogram(values), share).bit_length() == true.bit_length()


@given(st.lists(st.integers(0, 2**63 - 1)))
def test_percentiles_grow_up_to_the_longest(values: list[int]) -> None:
    pauses = Pauses.of(histogram(values))
    assert pauses.count == len(values)
    assert 0 <= pauses.p50_ns <= pauses.p90_ns <= pauses.p99_ns <= pauses.longest_ns
    assert pauses.longest_ns.bit_length() == max(values, default=0).bit_length()
    assert len(pauses.buckets) == (max(values).bit_length() + 1 if values else 0)


@given(st.lists(st.integers(0, 2**63 - 1)), st.lists(st.integers(0, 2**63 - 1)))
def test_pauses_since_an_earlier_snapshot(before: list[int], later: list[int]) -> None:
    both = Pauses.of(histogram(before + later))
    assert both.since(Pauses.of(histogram(before))) == Pauses.of(histogram(later))


def test_an_even_spread_is_interpolated() -> None:
    pauses = Pauses.of(histogram(list(range(1024, 2048))))
    assert abs(pauses.p50_ns - 1536) <= 1
    assert abs(pauses.p90_ns - (1024 + 0.9 * 1024)) <= 2


def test_the_words_do_not_overlap() -> None:
    ends = [(ERRORS, 2), (ANSWERED, 3), (REQUESTS, OPCODES), (PAUSES, BUCKETS), (SLOW, BUCKETS)]
    for (start, length), (following, _) in zip(ends, [*ends[1:], (DURABLE, 0)], strict=True):
        assert start + length <= following
    assert (WORDS - OPEN) % OPEN_WORDS == 0
    assert DURABLE + DURABLE_WORDS == OPEN
    assert max(Opcode) < OPCODES


def test_a_tree_counts_in_shared_memory_what_it_counted_before_too() -> None:
    counters = Counters()
    counters.copy_ups += 2
    with State.create() as state:
        state.note(counters)
        counters.copied_bytes += 1 << 40
        counters.unfolds += 3
        counters.copy_ups += 1
        counted = state.statistics()
        assert (counted.copy_ups, counted.copied_bytes, counted.unfolds) == (3, 1 << 40, 3)
        assert (counters.copy_ups, counters.copied_bytes, counters.unfolds) == (3, 1 << 40, 3)
        successor = Counters()  # a second server of the same mount
        state.note(successor)
        successor.copy_ups += 1
        assert state.statistics().copy_ups == 4
        del counters, successor


def test_a_snapshot_names_what_was_counted() -> None:
    with State.create() as state:
        words = state.words
        words[REQUESTS + Opcode.LOOKUP] = 5
        words[REQUESTS + Opcode.STATX] = 1
        words[REQUESTS] = 2
        words[PAUSES + 10] = 7
        words[ERRORS] = 4
        assert state.statistics().answered is None
        words[ANSWERED + 1] = 6
        # Open twice, free, registered, served, beyond those that were ever in use.
        opened = (7, 1, 5 << 24 | 2, 0, 9, 9, 8, 2 | 1 << 31 | 42 << 32, 6 << 24, 9, 42 << 32, 7 << 24 | 1, 1, 1, 1)
        words[OPEN : OPEN + 15] = memoryview(b"".join(n.to_bytes(8, "little") for n in opened)).cast("Q")
        words[OPEN_TOP] = 4
        counted = state.statistics()
        assert counted.requests == {"OPCODE_0": 2, "LOOKUP": 5, "STATX": 1}
        assert counted.total == 8
        assert counted.answered == Answered(0, 6, 0)
        assert (counted.pauses.count, counted.slow.count, counted.errors) == (7, 0, 4)
        assert (counted.backing_open, counted.backing_registered) == (1, 2)


def test_what_was_agreed_upon() -> None:
    with State.create() as state:
        assert state.agreed is None
        state.agree(InitFlag.INIT_EXT | InitFlag.PASSTHROUGH, 45, 1 << 20)
        assert state.agreed == Agreed("7.45", ("INIT_EXT", "PASSTHROUGH"), True, 1 << 20)
        assert state.max_write == 1 << 20
        state.agree(InitFlag.INIT_EXT | 1 << 63, 45, 4096)  # one that has no name here
        assert state.agreed == Agreed("7.45", ("INIT_EXT",), False, 4096)


def test_a_successor_goes_on_counting() -> None:
    first = State.create()
    first.words[REQUESTS + 1] = 10
    mounted = first.statistics().mounted_s
    fd = os.dup(first.fd)
    first.close()
    time.sleep(0.02)
    with State.adopt(fd) as second:
        second.words[REQUESTS + 1] += 1
        counted = second.statistics()
    assert counted.requests == {"LOOKUP": 11}
    assert counted.incarnation == 2
    assert counted.mounted_s >= mounted + 0.02
    assert counted.uptime_s < counted.mounted_s - 0.01


def test_a_reader_sees_counts_and_can_change_nothing() -> None:
    with State.create() as state, State.open_of(os.getpid(), state.fd) as reader:
        state.words[ERRORS] += 1
        assert reader.statistics().errors == 1
        with pytest.raises(TypeError):
            reader.words[ERRORS] = 0
        expect(errno.EPERM, os.ftruncate, state.fd, 0)  # a reader would die of it


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(FileNotFoundError):
        State.open_of(os.getpid(), 999_999)
    with open("/dev/null", "rb") as file, pytest.raises(ProcessLookupError):
        State.open_of(os.getpid(), file.fileno())
    with State.create() as state:
        state.words[1] += 1  # the version
        with pytest.raises(UnsupportedError, match="another version"):
            State.open_of(os.getpid(), state.fd)
    fd = os.memfd_create("vzfs-state")
    try:
        for size in (4096, SIZE):  # another size; a header of zeros
            os.ftruncate(fd, size)
            with pytest.raises(UnsupportedError, match="another version"):
                State.open_of(os.getpid(), fd)
    finally:
        os.close(fd)


def test_readers_leave_no_descriptor_and_no_map() -> None:
    def used() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count("vzfs-state")
        return len(os.listdir("/proc/self/fd")), maps

    with State.create() as state:
        before = used()
        for _ in range(10):
            with State.open_of(os.getpid(), state.fd) as reader:
                reader.statistics()
        assert used() == before


# ------------------------------------------------------------------------------------------------------------ a mount


@pytest.fixture(params=ENGINES)
def container(request: pytest.FixtureRequest, clean_path: Path) -> EngineContainer:
    """Container 101 of the template ``small``, not yet mounted, for each engine."""
    store = EngineStore(clean_path / "vz", request.param)
    store.create_template(SMALL, str(make_source(clean_path / "source")))
    return store.create(101, template=SMALL)


def engine_of(container: EngineContainer) -> str:
    return str(container.status().engine)


@contextlib.contextmanager
def counting(container: EngineContainer) -> Iterator[Callable[[str], int]]:
    """Within the block: how often a request came since its beginning."""
    before = settled(container).requests
    yield lambda name: settled(container).requests.get(name, 0) - before.get(name, 0)


def test_requests_are_counted_by_name(container: EngineContainer) -> None:
    with container.mounted() as root:
        os.listdir(root)
        with counting(container) as count:
            for n in range(100):
                assert not (root / f"no-such-{n}").exists()
            assert count("LOOKUP") == 100
        with counting(container) as count:
            for n in range(20):
                (root / f"folder-{n}").mkdir()
            for n in range(20):
                (root / f"folder-{n}").rmdir()
            assert (count("MKDIR"), count("RMDIR")) == (20, 20)
        with counting(container) as count:
            for n in range(10):
                (root / "tmp" / f"file-{n}").write_text("data")
            assert (count("CREATE"), count("RELEASE")) == (10, 10)
            written = count("WRITE")
        assert written == (10 if engine_of(container) == "pyfuse3" else 0)


def test_every_request_has_its_time(container: EngineContainer) -> None:
    with container.mounted() as root:
        for _ in range(3):
            subprocess.run(["ls", "-lR", root], check=True, stdout=subprocess.DEVNULL)
        os.sync()
        counted = settled(container)
        assert counted.total > 100
        timed = counted.pauses.count + counted.slow.count
        assert counted.total - 1 <= timed <= counted.total + counted.slow.count  # INIT isn't timed
        assert 0 < counted.pauses.p50_ns <= counted.pauses.p99_ns <= counted.pauses.longest_ns < 60e9
        assert 0 < counted.uptime_s <= counted.mounted_s < 600
        assert counted.incarnation == 1


def test_work_beside_the_loop_is_slow_and_no_pause(container: EngineContainer) -> None:
    with container.mounted() as root, open(root / "new", "wb") as file:
        file.write(b"data")
        file.flush()
        before = settled(container).slow.count
        for _ in range(5):
            os.fsync(file.fileno())
        assert settled(container).slow.count == before + 5


def test_copies_and_unfolded_directories_are_counted(container: EngineContainer) -> None:
    with container.mounted() as root:
        assert (container.stats().copy_ups, container.stats().copied_bytes, container.stats().unfolds) == (0, 0, 0)
        with open(root / "lib/large", "r+b") as file:
            file.write(b"changed")
        counted = container.stats()
        assert (counted.copy_ups, counted.copied_bytes, counted.unfolds) == (1, LARGE_SIZE, 1)
        (root / "lib/large").write_bytes(b"again")
        (root / "lib/new").write_bytes(b"its own")
        (root / "etc/passwd").chmod(0o600)
        counted = container.stats()
        assert (counted.copy_ups, counted.copied_bytes, counted.unfolds) == (1, LARGE_SIZE, 2)  # lib and etc
        (root / "lib/deep/er/est/new").mkdir()
        assert container.stats().unfolds == 5


def test_refusals_are_counted_as_errors(container: EngineContainer) -> None:
    with container.mounted() as root:
        before = settled(container).errors
        for n in range(7):
            expect(errno.ENODATA, os.getxattr, root / "etc/passwd", f"user.none{n}")
        assert settled(container).errors == before + 7
        os.getxattr(root / "etc/passwd", "user.note")
        assert settled(container).errors == before + 7


def test_open_backing_files(container: EngineContainer) -> None:
    with container.mounted(passthrough_above=0) as root:
        direct = engine_of(container) == "direct"
        with open(root / "etc/passwd"), open(root / "etc/shadow"), open(root / "tmp/new", "w"):
            counted = container.stats()
            assert counted.backing_open == (3 if direct else 0)
            assert counted.backing_registered >= counted.backing_open
        wait_for(lambda: container.stats().backing_open == 0)


def test_where_answers_came_from(container: EngineContainer) -> None:
    with container.mounted() as root:
        subprocess.run(["ls", "-lR", root], check=True, stdout=subprocess.DEVNULL)
        answered = settled(container).answered
        if engine_of(container) == "pyfuse3":
            assert answered is None
            return
        assert answered is not None
        assert answered.index > 20
        assert answered.index > answered.store
        (root / "tmp/new").write_text("data")
        now = settled(container).answered
        assert now is not None
        assert now.store > answered.store


def test_asking_sends_the_mount_nothing(container: EngineContainer) -> None:
    with container.mounted() as root:
        os.listdir(root)
        before = settled(container)
        for _ in range(50):
            container.stats()
            container.status(patience=0)
        after = container.stats()
        assert asked(after) == asked(before)
        container.status()  # asks the root whether it answers
        assert asked(container.stats()) == {**asked(after), "STATFS": 1}


def test_a_mount_begins_at_zero(container: EngineContainer) -> None:
    for _ in range(2):
        with container.mounted() as root:
            assert container.stats().requests.get("MKDIR", 0) == 0
            (root / "folder").mkdir()
            assert container.stats().requests["MKDIR"] == 1
            (root / "folder").rmdir()


def test_status_says_what_was_negotiated(container: EngineContainer) -> None:
    status = container.status()
    assert (status.protocol, status.flags, status.passthrough, status.max_write) == (None, None, None, None)
    with container.mounted():
        status = container.status()
        shown = vzfs("status", "101", root=container.store.root).stdout
        parsed = json.loads(vzfs("status", "101", "--json", root=container.store.root).stdout)
        assert parsed["engine"] == status.engine
        assert parsed["passthrough"] == status.passthrough
        if status.engine == "pyfuse3":
            assert (status.protocol, status.flags, status.passthrough) == (None, None, False)
            assert "left to libfuse" in shown
            assert "passthrough:  no" in shown
            assert parsed["flags"] is None
        else:
            assert status.passthrough is True
            assert status.flags is not None and {"PASSTHROUGH", "POSIX_ACL", "HAS_RESEND"} <= set(status.flags)
            assert status.max_write is not None and status.max_write >= 1 << 16
            assert "passthrough:  yes" in shown
            assert "FUSE 7." in shown and " PASSTHROUGH" in shown
            assert parsed["flags"] == list(status.flags)
            assert parsed["max_write"] == status.max_write


# ------------------------------------------------------------------------------------------------------ not mounted


def test_without_a_mount_there_is_nothing_to_tell(container: EngineContainer) -> None:
    with pytest.raises(NotMountedError, match="101 is not mounted") as caught:
        container.stats()
    assert caught.value.remedy == "mount it with: vzfs mount 101"
    with container.mounted():
        pid = container.status().pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: container.status().pid is None)
        with pytest.raises(NotMountedError):
            container.stats()


@pytest.fixture
def stopped(clean_path: Path) -> EngineContainer:
    """Container 101, whose engine doesn't matter."""
    store = EngineStore(clean_path / "vz")
    store.create_template(SMALL, str(make_source(clean_path / "source")))
    return store.create(101, template=SMALL)


def test_a_lock_of_an_older_version_is_understood(stopped: EngineContainer) -> None:
    lock = Lock.acquire(stopped.path, Holder(os.getpid(), "mounts", time.time()))
    try:
        with pytest.raises(NotMountedError):
            stopped.stats()
        old = {"pid": os.getpid(), "doing": "serves", "since": 1.0, "mountpoint": "/m", "engine": "pyfuse3"}
        os.pwrite(lock.fileno(), json.dumps(old).encode().ljust(4096), 0)
        holder = read_holder(stopped.path)
        assert holder is not None
        assert (holder.pid, holder.mountpoint, holder.state) == (os.getpid(), "/m", None)
        with pytest.raises(UnsupportedError, match="older version"):
            stopped.stats()
        assert stopped.status().mounted
        assert stopped.status().flags is None
        lock.describe(Holder(os.getpid(), "serves", 1.0, state=999_999))  # it ended, or another has its number
        with pytest.raises(NotMountedError):
            stopped.stats()
        assert stopped.status().flags is None
    finally:
        lock.release()


# ------------------------------------------------------------------------------------------------------------ program


def test_the_table(container: EngineContainer) -> None:
    with container.mounted() as root:
        for n in range(1234):
            assert not (root / f"no-{n}").exists()
        (root / "lib/large").chmod(0o600)
        with open(root / "lib/large", "r+b") as file:
            file.write(b"changed")
        shown = vzfs("stats", "101", root=container.store.root).stdout
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0] == ["REQUEST", "COUNT"]
    name, count = lines[1]
    assert name == "LOOKUP"
    assert 1234 <= int(count.replace(",", "")) < 1334
    assert "copied files:          1 (293.0 KiB)" in shown
    assert "unfolded directories:  1" in shown
    assert "pauses:  " in shown and "50 % up to " in shown
    assert "serving process:       number 1, for " in shown


def test_json(container: EngineContainer) -> None:
    with container.mounted() as root:
        os.listdir(root)
        before = settled(container)
        parsed = json.loads(vzfs("stats", "101", "--json", root=container.store.root).stdout)
        after = container.stats()
    assert list(parsed) == ["ct", *Statistics.__dataclass_fields__]
    assert parsed["ct"] == "101"
    assert parsed["requests"].items() >= asked(before).items()
    assert before.pauses.count <= parsed["pauses"]["count"] <= after.pauses.count
    assert sum(parsed["pauses"]["buckets"]) == parsed["pauses"]["count"]
    assert parsed["incarnation"] == 1
    assert before.mounted_s < parsed["mounted_s"] < after.mounted_s


def watch(container: EngineContainer, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vzfs", "--root", str(container.store.root), "stats", "101", *options]
    return subprocess.Popen(command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_watching_until_the_end_of_the_mount(container: EngineContainer) -> None:
    with container.mounted() as root:
        process = watch(container, "--json", "--watch", "0.1")
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        (root / "folder").mkdir()
        wait_for(lambda: container.stats().requests.get("MKDIR") == 1)
        lines = (json.loads(line) for line in iter(process.stdout.readline, ""))
        later = next(line for line in lines if line["requests"].get("MKDIR"))
        assert later["mounted_s"] > first["mounted_s"]
        assert "MKDIR" not in first["requests"]
        container.umount()
        _, complaint = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == NotMountedError.exit_code
        assert "is not mounted" in complaint


def test_watching_until_interrupted(container: EngineContainer) -> None:
    with container.mounted() as root:
        process = watch(container, "--watch", "0.1")
        assert process.stdout is not None
        assert process.stdout.readline().split() == ["REQUEST", "COUNT"]
        for n in range(100):
            assert not (root / f"no-{n}").exists()
        for line in process.stdout:
            if line.startswith("REQUEST"):
                break
        assert line.split() == ["REQUEST", "COUNT", "PER", "SECOND"]
        for line in process.stdout:
            if line.startswith("LOOKUP"):
                break
        assert int(line.split()[1]) >= 1
        assert any(line.startswith("new pauses:") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, complaint) == (0, "")


def test_clear_words_when_there_is_nothing(stopped: EngineContainer) -> None:
    root = stopped.store.root
    complaint = vzfs("stats", "101", root=root, code=NotMountedError.exit_code).stderr
    assert "is not mounted, so nothing is counted" in complaint
    assert "vzfs mount 101" in complaint
    vzfs("stats", "102", root=root, code=NotFoundError.exit_code)
    complaint = vzfs("stats", "101", "--watch", "0", root=root, code=2).stderr
    assert "choose 0.1 s or more" in complaint
    vzfs("stats", "101", "--watch", "nan", root=root, code=2)


# -------------------------------------------------------------------------------------------------------- busy polling


def test_busy_polling_is_bounded_and_for_the_direct_engine(stopped: EngineContainer) -> None:
    for microseconds in (-1, MAX_BUSY_POLL_US + 1):
        with pytest.raises(UsageError, match="can't poll for"):
            stopped.mount(busy_poll_us=microseconds)
    with pytest.raises(UsageError, match="pyfuse3 engine can't poll"):
        stopped.mount(engine="pyfuse3", busy_poll_us=100)
    assert not stopped.status().mounted


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine == "direct"])
def test_a_polling_mount_works_and_sleeps_when_idle(stopped: EngineContainer, engine: str) -> None:
    vzfs("mount", "101", "--engine", engine, "--busy-poll", "200", root=stopped.store.root)
    try:
        status = stopped.status()
        assert status.engine == engine and status.pid
        root = Path(str(status.mountpoint))
        for n in range(200):
            (root / f"tmp/{n}").write_text(str(n))
            assert (root / f"tmp/{n}").read_text() == str(n)
        ticks = cpu_ticks(status.pid)
        time.sleep(1)
        assert cpu_ticks(status.pid) - ticks <= 0.1 * os.sysconf("SC_CLK_TCK")
    finally:
        stopped.umount()


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_the_shared_memory_is_small() -> None:
    assert SIZE <= 1 << 22
    assert SIZE % 8 == 0
    with State.create() as state, mmap.mmap(state.fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        assert int.from_bytes(mapped[:8], "little") == state.words[0]
        assert os.fstat(state.fd).st_blocks * 512 <= 8192  # only what is counted in takes memory
