"""What a hostile user of a container may use up: the server's descriptors and stack, other users' room."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from tests.engines import EngineContainer, EngineStore, each_engine
from tests.realuse_helpers import expect, in_child
from vzfs import linux as calls
from vzfs.store.lock import read_holder
from vzfs.tree.open import OWN_DESCRIPTORS

USER = 20_001


def make(place: Path, engine: str, plant: str = "f") -> EngineContainer:
    (place / "source").mkdir()
    (place / "source" / plant).write_bytes(b"template's")
    (place / "source/tmp").mkdir()
    (place / "source/tmp").chmod(0o1777)
    store = EngineStore(place / "vz", engine)
    store.create_template("t", str(place / "source"))
    return store.create(101, template="t")


def server(container: EngineContainer) -> int:
    holder = read_holder(container.path)
    assert holder is not None
    return holder.pid


def limit_descriptors(container: EngineContainer, most: int) -> None:
    resource.prlimit(server(container), resource.RLIMIT_NOFILE, (most, most))


def descriptors(container: EngineContainer) -> int:
    return len(os.listdir(f"/proc/{server(container)}/fd"))


def as_user(root: Path, work: object) -> None:
    def become() -> None:
        os.chdir(root)
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        work()  # type: ignore[operator]

    in_child(become)


def others_work(root: Path) -> None:
    """Everybody else goes on."""
    (root / "tmp/roots").write_bytes(b"root's")
    assert (root / "tmp/roots").read_bytes() == b"root's"
    assert "roots" in os.listdir(root / "tmp")
    assert (root / "f").read_bytes() == b"template's"
    os.unlink(root / "tmp/roots")


@each_engine
def test_removed_directories_hold_no_descriptors(clean_path: Path, engine: str) -> None:
    container = make(clean_path, engine)
    with container.mounted() as root:
        before = descriptors(container)

        def hold() -> None:
            held = []
            for _ in range(3000):
                os.mkdir("tmp/d")
                held.append(os.open("tmp/d", os.O_PATH))
                os.rmdir("tmp/d")
            for _ in range(1500):  # and those that another takes the place of
                os.mkdir("tmp/a")
                os.mkdir("tmp/b")
                held.append(os.open("tmp/b", os.O_PATH))
                os.rename("tmp/a", "tmp/b")
                held.append(os.open("tmp/b", os.O_PATH))
                os.rmdir("tmp/b")
            assert descriptors(container) < before + 1500, "one for each"
            others_work(root)

        resource.setrlimit(resource.RLIMIT_NOFILE, (8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        in_child(lambda: (os.chdir(root), hold()))
        others_work(root)


def test_open_files_need_no_descriptor_of_the_server(clean_path: Path) -> None:
    container = make(clean_path, "direct")
    with container.mounted() as root:
        before = descriptors(container)
        held = [os.open(root / f"tmp/{number}", os.O_CREAT | os.O_RDWR) for number in range(1000)]
        held += [os.open(root / "f", os.O_RDONLY) for _ in range(100)]
        assert descriptors(container) <= before + 8
        for fd in held:
            os.close(fd)


def test_who_opens_most_is_refused_first(clean_path: Path) -> None:
    """The pyfuse3 engine needs a descriptor for each open file."""
    container = make(clean_path, "pyfuse3")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with container.mounted() as root:
        room = int(Path(f"/proc/{server(container)}/limits").read_text().split("Max open files")[1].split()[0])
        assert room > OWN_DESCRIPTORS * 2

        def hold() -> None:
            held = []
            try:
                while len(held) < room:
                    held.append(os.open(f"tmp/{len(held) % 100}", os.O_CREAT | os.O_RDWR))
            except OSError as error:
                assert error.errno == errno.ENFILE, error
            assert len(held) > OWN_DESCRIPTORS, "refused much too early"
            for fd in held:
                os.close(fd)

        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        as_user(root, hold)
        others_work(root)


@each_engine
def test_deep_directories_are_changed_at_the_bottom(clean_path: Path, engine: str) -> None:
    deep = 1200
    top = clean_path / "source"
    top.mkdir()
    (top / "f").write_bytes(b"template's")
    fd = os.open(top, os.O_RDONLY)
    for _ in range(deep):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    store = EngineStore(clean_path / "vz", engine)
    store.create_template("t", str(top))
    container = store.create(101, template="t")
    for _ in range(2):  # again from real directories
        with container.mounted() as root:
            fd = os.open(root, os.O_RDONLY)
            for _ in range(deep):
                below = os.open("d", os.O_PATH, dir_fd=fd)
                os.close(fd)
                fd = below
            made = os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
            os.write(made, b"made")
            os.close(made)
            writer = os.open("bottom", os.O_WRONLY | os.O_APPEND, dir_fd=fd)
            os.write(writer, b"+")
            os.close(writer)
            names = os.open(".", os.O_RDONLY, dir_fd=fd)
            assert sorted(os.listdir(names)) == ["bottom", "new"]
            os.close(names)
            os.close(fd)
            assert "Traceback" not in (container.path / "vzfs.log").read_text()
    parent = os.open(clean_path, os.O_RDONLY)
    calls.remove_tree(parent, b"source")  # too deep for rmtree
    calls.remove_tree(parent, b"vz")
    os.close(parent)


@each_engine
def test_the_server_may_not_exceed_limits_of_the_disk(clean_path: Path, engine: str) -> None:
    container = make(clean_path, engine)
    with container.mounted():
        status = Path(f"/proc/{server(container)}/status").read_text()
        for kind in ("CapEff", "CapPrm"):
            (line,) = [line for line in status.split("\n") if line.startswith(kind)]
            assert not int(line.split()[1], 16) >> 24 & 1, f"{kind} has CAP_SYS_RESOURCE"


def test_a_user_may_set_what_an_owner_may(clean_path: Path) -> None:
    container = make(clean_path, "direct")
    with container.mounted() as root:
        (root / "own").write_bytes(b"x")
        for name in ("own", "f"):
            fd = os.open(root / name, os.O_RDWR)
            try:
                flags = calls.get_file_flags(fd)
                before = os.fstat(fd).st_ctime_ns
                calls.set_file_flags(fd, flags | 0x40)  # nodump
                assert calls.get_file_flags(fd) == flags | 0x40
                assert os.fstat(fd).st_ctime_ns > before
                for refused in (0x10, 0x20, 0x4000, 0x20000000):  # immutable, append, journal-data, projinherit
                    expect(errno.EOPNOTSUPP, calls.set_file_flags, fd, flags | refused)
                assert calls.get_file_flags(fd) == flags | 0x40
            finally:
                os.close(fd)


@pytest.mark.parametrize("many", [9000])
def test_opening_costs_the_same_however_much_is_open(clean_path: Path, many: int) -> None:
    """By what the server does, not by time: no request may look at all that is open."""
    from vzfs.fuse import openfiles

    container = make(clean_path, "direct")
    resource.setrlimit(resource.RLIMIT_NOFILE, (many + 1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    assert many > openfiles.REGISTERED
    with container.mounted() as root:
        held = [os.open(root / f"tmp/{number}", os.O_CREAT | os.O_RDWR) for number in range(many)]
        ticks = _user_ticks(server(container))
        for number in range(2000):
            os.close(os.open(root / f"tmp/more{number}", os.O_CREAT | os.O_RDWR))
        many_open = _user_ticks(server(container)) - ticks
        for fd in held:
            os.close(fd)
        ticks = _user_ticks(server(container))
        for number in range(2000, 4000):
            os.close(os.open(root / f"tmp/more{number}", os.O_CREAT | os.O_RDWR))
        few_open = _user_ticks(server(container)) - ticks
        assert many_open < 3 * few_open + 20, f"{many_open} ticks of CPU for what takes {few_open}"


def _user_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])
