"""Every behaviour on every target: ``-k rename``, ``-k "template and group"`` or VZFS_BEHAVIOUR_TARGETS pick some."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.behaviours")

from tests.behaviour_targets import FACTORIES, Target, chosen_targets  # noqa: E402
from tests.behaviours import BEHAVIOURS, Behaviour, Dir, File, HardLink, Place, Seed, behaviour, plant  # noqa: E402
from tests.behaviours.place import expect_errno  # noqa: E402


@pytest.fixture(scope="session", params=chosen_targets())
def prepared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Target, Mapping[str, Path]]]:
    """A target with the seeds of the behaviours that this session selected for it."""
    target = FACTORIES[request.param](tmp_path_factory.mktemp(f"behaviours-{request.param}"))
    try:
        yield target, target.prepare(_selected(request.session, request.param))
    finally:
        target.close()


def _selected(session: pytest.Session, target: str) -> list[Behaviour]:
    items = [item for item in session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    calls = [item.callspec.params for item in items]
    return [BEHAVIOURS[str(call["name"])] for call in calls if call.get("prepared") == target]


@pytest.mark.parametrize("name", BEHAVIOURS, ids=[f"{one.group}.{one.name}" for one in BEHAVIOURS.values()])
def test_behaviour(prepared: tuple[Target, Mapping[str, Path]], name: str) -> None:
    target, places = prepared
    BEHAVIOURS[name].run(places[name], target.features)


# The suite itself: a judge that can't say no is worth nothing.


def test_expect_errno_refuses_success_and_other_errors() -> None:
    with pytest.raises(AssertionError, match="got success"):
        expect_errno(errno.ENOENT, os.getpid)
    with pytest.raises(AssertionError, match="expected EPERM, got ENOENT"):
        expect_errno(errno.EPERM, os.stat, "/none/such")


def test_child_passes_results_and_exceptions_back(tmp_path: Path) -> None:
    place = Place(tmp_path, frozenset())

    def work(value: int) -> int:
        assert value == 7, "seven please"
        return value + os.getuid()

    assert place.in_child(work, 7) == 7
    assert place.as_user(20_001, 20_001, [], work, 7) == 20_008
    with pytest.raises(AssertionError, match="seven please"):
        place.in_child(work, 8)
    with pytest.raises(FileNotFoundError):
        place.in_child(os.stat, "none")


def test_child_of_a_user_has_no_power(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)
    (tmp_path / "f").write_bytes(b"x")
    os.chmod(tmp_path / "f", 0o600)
    place = Place(tmp_path, frozenset())
    with pytest.raises(PermissionError):
        place.as_user(20_001, 20_001, [0], os.open, "f", os.O_RDONLY)
    assert place.as_user(20_001, 20_002, [20_003], lambda: (os.getuid(), os.getgid(), os.getgroups())) == (
        20_001,
        20_002,
        [20_003],
    )


def test_undeclared_feature_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="declare needs"):
        Place(tmp_path, frozenset({"fallocate"})).has("fallocate")
    with pytest.raises(ValueError, match="unknown features"):
        behaviour(needs={"fallocat"})


def test_leaked_descriptor_fails_the_behaviour(tmp_path: Path) -> None:
    leaked = []
    leaky = Behaviour("leaky", "none", lambda d: leaked.append(os.open(d.path, os.O_RDONLY)), (), frozenset())
    with pytest.raises(AssertionError, match="left descriptors open"):
        leaky.run(tmp_path)
    os.close(leaked[0])


def test_planting_is_exact(tmp_path: Path) -> None:
    seeds: list[Seed] = [
        Dir("d", mode=0o2751, uid=1, gid=2, mtime_ns=5),
        File("d/f", b"head", 0o6711, 3, 4, 6, {"user.k": b"v"}, ((8192, b"tail"),), 10_000),
        HardLink("d/g", "d/f"),
    ]
    plant(seeds, tmp_path / "top")
    found = os.stat(tmp_path / "top/d/g")
    assert (found.st_mode, found.st_uid, found.st_gid, found.st_nlink) == (0o106711, 3, 4, 2)
    assert (found.st_size, found.st_mtime_ns) == (10_000, 6)
    assert (tmp_path / "top/d/f").read_bytes() == b"head" + bytes(8188) + b"tail" + bytes(1804)
    assert os.getxattr(tmp_path / "top/d/f", "user.k") == b"v"
    folder = os.stat(tmp_path / "top/d")
    assert (folder.st_mode, folder.st_uid, folder.st_gid, folder.st_mtime_ns) == (0o042751, 1, 2, 5)
