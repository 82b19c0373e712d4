"""``check``: everything it knows, broken on purpose, found, mended, and sound afterwards."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import SMALL, make_source
from tests.random_changes import Step, make_changes, remove_tree, steps, write
from tests.stateful_model import TreeFs, snapshot
from vzfs import BusyError, Container, DamagedError, Store
from vzfs.store.layout import OWN_FOLDER_MODE
from vzfs.store.lock import read_holder
from vzfs.store.opened import open_index
from vzfs.store.problem import Problem
from vzfs.store.xattrs import ATTR_XATTR, FOLDS_XATTR, NLINK_XATTR, ORIGIN_XATTR


@pytest.fixture
def container(small_store: Store) -> Container:
    return small_store.create(101, template=SMALL)


@contextlib.contextmanager
def changing(container: Container) -> Iterator[TreeFs]:
    """The container's tree for changes as programs in it make them; closed as an unmount does."""
    fs = TreeFs(container.store.layout, container.path)
    before = os.umask(0)
    try:
        yield fs
    finally:
        os.umask(before)
        fs.shut()


def area(container: Container) -> Path:
    return container.path / "private"


def unfold(container: Container, *folders: str) -> None:
    with changing(container) as fs:
        for folder in folders:
            fs.mkdir(folder.encode() + b"/.unfold", 0o755)
            fs.rmdir(folder.encode() + b"/.unfold")


def kinds(problems: list[Problem]) -> list[tuple[str, str]]:
    return sorted((problem.kind, problem.path) for problem in problems)


def found_and_mended(container: Container, *expected: tuple[str, str]) -> list[Problem]:
    """Both ways of checking find exactly that; repairing mends all of it and leaves a container that works."""
    before = kinds(container.check())
    assert before == sorted(expected)
    assert kinds(container.check()) == before, "checking alone changed something"
    mended = container.check(repair=True)
    assert kinds(mended) == before
    assert all(problem.repaired for problem in mended), mended
    assert container.check() == []
    with changing(container) as fs:
        snapshot(fs)
    return mended


def entry_of(container: Container, path: bytes) -> int:
    entry = open_index(container.store.layout, SMALL).find_path(path)
    assert entry is not None
    return entry


def magic_link(path: str) -> str:
    return f"//vz/template/{SMALL}/{path}"


# --------------------------------------------------------------------------------------------------------- soundness


def test_a_new_container_is_sound(container: Container) -> None:
    assert container.check() == []
    assert container.check(repair=True) == []
    assert read_holder(container.path) is None
    assert not (container.path / "lost+found").exists()


def test_everything_that_a_program_may_do_is_sound(container: Container) -> None:
    with changing(container) as fs:
        write(fs, b"etc/passwd", b"x")
        fs.chmod(b"bin/tool", 0o700)
        fs.link(b"etc/shadow", b"second")
        fs.rename(b"lib", b"var/log/lib")
        fs.rename(b"usr/share/doc", b"doc")
        fs.symlink(b"//vz/template/small/etc", b"forged")
        fs.chown(b"etc/relative", 1, 1)
        fs.mkdir(b"new", 0o777)
        fs.rename(b"var/nest", b"new/nest")
        fs.unlink(b"usr/share/pair-a")
    assert container.check() == []


def test_a_mounted_container_is_busy(container: Container) -> None:
    with container.mounted(), pytest.raises(BusyError, match="serves"):
        container.check()
    assert container.check() == []


def test_without_private_area(container: Container) -> None:
    shutil.rmtree(area(container))
    with pytest.raises(DamagedError, match="no folder private"):
        container.check()
    assert read_holder(container.path) is None
    (container.path / "private").symlink_to("/etc")
    with pytest.raises(DamagedError, match="no folder private"):
        container.check(repair=True)


# ------------------------------------------------------------------------------------------------- the store's folders


def test_leftovers_are_removed(container: Container) -> None:
    unfold(container, "etc")
    stage = container.path / "cow/stage"
    (stage / "1").write_text("half a copy")
    (stage / "2/deep/er").mkdir(parents=True)
    os.symlink(magic_link("etc"), stage / "3")
    found_and_mended(container, ("leftover", "cow/stage/1"), ("leftover", "cow/stage/2"), ("leftover", "cow/stage/3"))
    assert os.listdir(stage) == []
    assert (container.store.template(SMALL).path / "etc/passwd").exists()


def test_orphans_are_removed_and_their_size_told(container: Container) -> None:
    unfold(container, "etc")
    (container.path / "cow/orphans/77").write_bytes(b"x" * 12345)
    (area(container) / "kept").write_text("data")
    os.link(area(container) / "kept", container.path / "cow/orphans/78")
    mended = found_and_mended(container, ("orphan", "cow/orphans/77"), ("orphan", "cow/orphans/78"))
    assert "12345 bytes" in mended[0].detail
    assert (area(container) / "kept").read_text() == "data"


def test_modes_and_owners_of_the_stores_folders(container: Container) -> None:
    unfold(container, "etc")
    container.path.chmod(0o755)
    (container.path / "cow/links").chmod(0o777)
    os.chown(container.path / "dump", 1000, 0)
    found_and_mended(container, ("mode", "."), ("mode", "cow/links"), ("mode", "dump"))
    for folder in (".", "cow/links", "dump"):
        info = (container.path / folder).stat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid) == (OWN_FOLDER_MODE, 0)


def test_the_mode_of_the_root_is_the_containers_own_affair(container: Container) -> None:
    with changing(container) as fs:
        fs.chmod(b"", 0o777)
    assert container.check() == []


def test_missing_folders_are_made(container: Container) -> None:
    shutil.rmtree(container.path / "cow")
    (container.path / "dump").rmdir()
    found_and_mended(container, ("missing", "cow"), ("missing", "dump"))


def test_what_is_no_folder_is_kept_elsewhere(container: Container) -> None:
    (container.path / "cow/stage").write_text("somebody's")
    (container.path / "dump").rmdir()
    (container.path / "dump").symlink_to("/etc")
    before = kinds(container.check())
    assert before == [("missing", "cow/stage"), ("missing", "dump")]
    assert all(problem.repaired for problem in container.check(repair=True))
    assert container.check() == []
    assert (container.path / "lost+found/stage").read_text() == "somebody's"
    assert os.readlink(container.path / "lost+found/dump") == "/etc"


def test_unknown_files_are_kept(container: Container) -> None:
    (container.path / "notes").write_text("mine")
    (container.path / "mounts").mkdir(mode=0o777)
    assert container.check(repair=True) == []
    assert (container.path / "notes").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize("value", ["", "gone", "../etc"])
def test_no_template(container: Container, value: str) -> None:
    unfold(container, "etc")
    conf = container.conf
    conf.set("OSTEMPLATE", value)
    conf.set("TEMPLATES", "")
    conf.save()
    problems = container.check(repair=True)
    assert kinds(problems) == [("template", "conf")]
    assert not problems[0].repaired
    assert (area(container) / "etc/passwd").is_symlink()


def test_missing_conf(container: Container) -> None:
    (container.path / "conf").unlink()
    assert kinds(container.check(repair=True)) == [("template", "conf")]


def test_a_template_that_conf_names_is_not_the_links_fault(container: Container) -> None:
    """The administrator may have forgotten to bring the template along; nothing may be torn out for that."""
    with changing(container) as fs:
        write(fs, b"etc/passwd", b"x")
        fs.chmod(b"bin/tool", 0o700)
    meta = container.store.layout.templates_meta / SMALL
    meta.rename(meta.with_name("elsewhere"))
    problems = container.check(repair=True)
    assert kinds(problems) == [("template", "conf")]
    assert "no template 'small'" in problems[0].detail
    meta.with_name("elsewhere").rename(meta)
    assert container.check() == []


def test_a_damaged_index_moves_nothing(container: Container) -> None:
    index = container.store.layout.template(SMALL).index
    content = index.read_bytes()
    index.write_bytes(content[:1000])
    assert kinds(container.check(repair=True)) == [("template", "conf")]
    index.write_bytes(content)
    assert container.check() == []


# --------------------------------------------------------------------------------------------------------- magic links


def test_dangling_and_malformed_links_go_to_lost_and_found(container: Container) -> None:
    texts = {
        "dangling": magic_link("no/such"),
        "of-no-template": "//vz/template/other/etc",
        "dots": magic_link("../../etc/shadow"),
        "no-name": "//vz/template/",
        "root": "//vz/template/small",
        "empty-part": magic_link("etc//passwd"),
    }
    for name, text in texts.items():
        os.symlink(text, area(container) / name)
    expected = {"dangling": "dangling", "of-no-template": "dangling"}
    mended = found_and_mended(container, *((expected.get(name, "malformed"), f"private/{name}") for name in texts))
    assert {problem.detail.rpartition(" ")[2] for problem in mended} == {f"lost+found/{name}" for name in texts}
    for name, text in texts.items():
        assert os.readlink(container.path / "lost+found" / name) == text
        assert not os.path.lexists(area(container) / name)


def test_lost_and_found_keeps_things_of_one_name_apart(container: Container) -> None:
    name = b"N" * 255
    for folder in ("a", "b", "c"):
        (area(container) / folder).mkdir()
        os.symlink(magic_link(f"no/{folder}"), os.fsencode(area(container) / folder) + b"/" + name)
    (container.path / "lost+found").mkdir(mode=0o700)
    (container.path / "lost+found" / name.decode()).write_text("an earlier one")
    assert all(problem.repaired for problem in container.check(repair=True))
    kept = os.listdir(os.fsencode(container.path / "lost+found"))
    assert sorted(len(each) for each in kept) == [242, 242, 242, 255]
    assert container.check() == []


def test_links_with_any_name(container: Container) -> None:
    names = [b"\xff\xfe", b"new\nline", b" ", b"-rf", b"\x1b[2J", b"back\\slash"]
    for name in names:
        os.symlink(magic_link("no/such"), os.fsencode(area(container)) + b"/" + name)
    mended = found_and_mended(container, *(("dangling", os.fsdecode(b"private/" + name)) for name in names))
    assert all(problem.detail.isprintable() for problem in mended)
    assert sorted(os.listdir(os.fsencode(container.path / "lost+found"))) == sorted(names)


def test_a_symbolic_link_is_not_followed(container: Container, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    os.symlink(magic_link("no/such"), tmp_path / "outside/link")
    (tmp_path / "outside").chmod(0o777)
    os.symlink(tmp_path / "outside", area(container) / "out")
    assert container.check(repair=True) == []
    shutil.rmtree(container.path / "cow")
    os.symlink(tmp_path / "outside", container.path / "cow")
    assert kinds(container.check(repair=True))[0] == ("missing", "cow")
    assert os.listdir(tmp_path / "outside") == ["link"]
    assert stat.S_IMODE((tmp_path / "outside").stat().st_mode) == 0o777
    assert container.check() == []


def test_a_folded_directory_at_a_second_place(container: Container) -> None:
    os.symlink(magic_link("usr"), area(container) / "zusr")
    os.symlink(magic_link("usr/share"), area(container) / "ashare")
    mended = found_and_mended(container, ("alias", "private/zusr"), ("alias", "private/ashare"))
    assert {problem.detail.rpartition(" ")[2] for problem in mended} == {"lost+found/zusr", "lost+found/ashare"}
    with changing(container) as fs:
        assert b"share" in fs.listdir(b"usr")


def test_a_folded_directory_at_two_other_places(container: Container) -> None:
    with changing(container) as fs:
        fs.rename(b"usr", b"moved")
    os.symlink(magic_link("usr"), area(container) / "other")
    found_and_mended(container, ("alias", "private/other"))
    with changing(container) as fs:
        assert b"share" in fs.listdir(b"moved")


def test_a_link_to_an_unfolded_directory(container: Container) -> None:
    unfold(container, "etc")
    (area(container) / "etc/own").write_text("own")
    os.symlink(magic_link("etc"), area(container) / "a")
    found_and_mended(container, ("alias", "private/a"))
    assert (area(container) / "etc/own").read_text() == "own"


def test_an_unfolded_directory_inside_a_folded_one_is_told(container: Container) -> None:
    unfold(container, "usr/share")
    (area(container) / "usr").rename(area(container) / "moved")
    os.removexattr(area(container) / "moved", ORIGIN_XATTR)
    os.symlink(magic_link("usr"), area(container) / "usr")
    problems = container.check(repair=True)
    assert ("alias", "private/moved/share") in kinds(problems)
    left = [problem for problem in problems if not problem.repaired]
    assert kinds(left) == [("alias", "private/moved/share")]
    assert kinds(container.check()) == kinds(left)


def test_a_file_linked_twice_becomes_a_hard_link(container: Container) -> None:
    with changing(container) as fs:
        fs.chmod(b"etc/passwd", 0o600)
        fs.setxattr(b"etc/passwd", b"user.own", b"kept")
    os.symlink(magic_link("etc/passwd"), area(container) / "zpasswd")
    found_and_mended(container, ("alias", "private/zpasswd"))
    with changing(container) as fs:
        first, second = fs.lstat(b"etc/passwd"), fs.lstat(b"zpasswd")
        assert first == second
        assert (first.nlink, stat.S_IMODE(first.mode)) == (2, 0o600)
        assert fs.xattrs(b"zpasswd")[b"user.own"] == b"kept"
        write(fs, b"zpasswd", b"BOTH")
        fd = fs.open(b"etc/passwd", os.O_RDONLY)
        assert fs.pread(fd, 4, 0) == b"BOTH"
    assert container.check() == []


def test_a_file_linked_beside_its_folded_directory(container: Container) -> None:
    for name in ("one", "two"):
        os.symlink(magic_link("lib/deep/er/other"), area(container) / name)
    found_and_mended(container, ("alias", "private/two"))
    with changing(container) as fs:
        assert fs.lstat(b"lib/deep/er/other").nlink == 3


# ------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("value", [b"", b"mode=9", b"uid=x", b"what=1", b"\xff", b"mtime=1.5"])
def test_a_malformed_record(container: Container, value: bytes) -> None:
    with changing(container) as fs:
        fs.chmod(b"etc/passwd", 0o600)
    os.setxattr(area(container) / "etc/passwd", ATTR_XATTR, value, follow_symlinks=False)
    if not value:
        assert container.check() == []  # an empty one changes nothing, and renamed files have it
        return
    mended = found_and_mended(container, ("bad-record", "private/etc/passwd"))
    assert ATTR_XATTR in mended[0].detail


def test_a_record_on_a_directory(container: Container) -> None:
    (area(container) / "usr").unlink()
    os.symlink(magic_link("usr"), area(container) / "usr")
    os.setxattr(area(container) / "usr", ATTR_XATTR, b"mode=0700", follow_symlinks=False)
    found_and_mended(container, ("bad-record", "private/usr"))


@pytest.mark.parametrize(
    "value", [b"", b"small", b"small/", b"small/x", b"small/99999", b"../x/1", b"other/1", b"small/0"]
)
def test_a_malformed_origin(container: Container, value: bytes) -> None:
    (area(container) / "own").write_text("own")
    os.setxattr(area(container) / "own", ORIGIN_XATTR, value)
    found_and_mended(container, ("bad-record", "private/own"))
    assert (area(container) / "own").read_text() == "own"


def test_an_origin_of_another_type(container: Container) -> None:
    (area(container) / "own").write_text("own")
    os.setxattr(area(container) / "own", ORIGIN_XATTR, b"small/%d" % entry_of(container, b"var/log"))
    found_and_mended(container, ("bad-record", "private/own"))


def test_two_copies_of_one_file(container: Container) -> None:
    with changing(container) as fs:
        write(fs, b"etc/passwd", b"one")
        number = fs.lstat(b"etc/passwd").ino
    (area(container) / "a").write_text("two")
    os.setxattr(area(container) / "a", ORIGIN_XATTR, b"small/%d" % entry_of(container, b"etc/passwd"))
    found_and_mended(container, ("duplicate-origin", "private/a"))
    with changing(container) as fs:
        assert fs.lstat(b"etc/passwd").ino == number
        assert fs.lstat(b"a").ino != number


def test_hard_links_to_one_copy_are_sound(container: Container) -> None:
    with changing(container) as fs:
        write(fs, b"etc/passwd", b"one")
        fs.link(b"etc/passwd", b"a")
        fs.link(b"etc/passwd", b"z")
    assert container.check() == []
    with changing(container) as fs:
        fs.unlink(b"etc/passwd")
    assert container.check() == []


def test_a_copy_beside_its_link(container: Container) -> None:
    (area(container) / "own").write_text("own")
    os.setxattr(area(container) / "own", ORIGIN_XATTR, b"small/%d" % entry_of(container, b"etc/passwd"))
    found_and_mended(container, ("duplicate-origin", "private/own"))
    with changing(container) as fs:
        write(fs, b"etc/passwd", b"x")
    os.symlink(magic_link("etc/passwd"), area(container) / "link")
    found_and_mended(container, ("duplicate-origin", "private/etc/passwd"))


def test_two_directories_of_one_origin(container: Container) -> None:
    unfold(container, "usr")
    (area(container) / "zusr").mkdir()
    os.setxattr(area(container) / "zusr", ORIGIN_XATTR, os.getxattr(area(container) / "usr", ORIGIN_XATTR))
    (area(container) / "zusr/own").write_text("own")
    found_and_mended(container, ("duplicate-origin", "private/zusr"))
    assert (area(container) / "zusr/own").read_text() == "own"


def test_a_missing_mark_of_folded_directories(container: Container) -> None:
    with changing(container) as fs:
        fs.mkdir(b"new", 0o755)
        fs.rename(b"usr", b"new/usr")
        fs.rename(b"lib", b"var/empty/lib")  # a template's directory that had none
    for folder in ("new", "var/empty"):
        os.removexattr(area(container) / folder, FOLDS_XATTR)
    found_and_mended(container, ("folds", "private/new"), ("folds", "private/var/empty"))
    with changing(container) as fs:
        assert fs.lstat(b"new").nlink == 3
        assert fs.lstat(b"var/empty").nlink == 3


# --------------------------------------------------------------------------------------------------------- link groups


def record_of(container: Container, path: bytes) -> Path:
    index = open_index(container.store.layout, SMALL)
    return container.path / f"cow/links/{SMALL}:{index.leader[entry_of(container, path)]}"


@pytest.mark.parametrize("value", [b"0", b"1", b"4", b"x", b"-1", None])
def test_a_wrong_number_of_names(container: Container, value: bytes | None) -> None:
    """Two names are in folded directories, one of them moved, one is in a real one."""
    with changing(container) as fs:
        fs.rename(b"lib", b"var/lib")
        fs.chmod(b"bin/tool", 0o700)
    record = record_of(container, b"bin/tool")
    assert os.getxattr(record, NLINK_XATTR, follow_symlinks=False) == b"3"
    if value is None:
        os.removexattr(record, NLINK_XATTR, follow_symlinks=False)
    else:
        os.setxattr(record, NLINK_XATTR, value, follow_symlinks=False)
    found_and_mended(container, ("link-count", f"cow/links/{record.name}"))
    assert os.getxattr(record, NLINK_XATTR, follow_symlinks=False) == b"3"


def test_a_name_that_went_or_came_unnoticed(container: Container) -> None:
    unfold(container, "usr/share", "bin")
    with changing(container) as fs:
        write(fs, b"usr/share/pair-a", b"x")
        write(fs, b"bin/tool", b"x")
        fs.mkdir(b"bin/sub", 0o755)
    (area(container) / "usr/share/pair-b").unlink()
    os.symlink(magic_link("lib/deep/tool-again"), area(container) / "bin/sub/more")
    pair, tool = record_of(container, b"usr/share/pair-a"), record_of(container, b"bin/tool")
    found_and_mended(container, *(("link-count", f"cow/links/{record.name}") for record in (pair, tool)))
    assert os.getxattr(pair, NLINK_XATTR) == b"1"
    assert os.getxattr(tool, NLINK_XATTR) == b"4"


def test_a_name_that_went_or_came_without_a_record(container: Container) -> None:
    unfold(container, "usr/share", "bin")
    (area(container) / "usr/share/pair-b").unlink()
    os.symlink(magic_link("lib/deep/tool-again"), area(container) / "bin/more")
    pair, tool = record_of(container, b"usr/share/pair-a"), record_of(container, b"bin/tool")
    found_and_mended(container, *(("link-count", f"cow/links/{record.name}") for record in (pair, tool)))
    with changing(container) as fs:
        assert fs.lstat(b"usr/share/pair-a").nlink == 1
        assert fs.lstat(b"bin/more").nlink == 4


def test_names_that_went_with_their_directory(container: Container) -> None:
    (area(container) / "lib").unlink()
    record = record_of(container, b"bin/tool")
    found_and_mended(container, ("link-count", f"cow/links/{record.name}"))
    with changing(container) as fs:
        assert fs.lstat(b"bin/tool").nlink == 2


def test_a_group_without_names_is_kept_in_lost_and_found(container: Container) -> None:
    unfold(container, "usr/share")
    with changing(container) as fs:
        write(fs, b"usr/share/pair-a", b"PRECIOUS")
    for name in ("pair-a", "pair-b"):
        (area(container) / "usr/share" / name).unlink()
    record = record_of(container, b"usr/share/pair-a")
    found_and_mended(container, ("orphan-group", f"cow/links/{record.name}"))
    assert (container.path / "lost+found" / record.name).read_bytes().startswith(b"PRECIOUS")


def test_records_that_are_none(container: Container) -> None:
    with changing(container) as fs:
        fs.chmod(b"bin/tool", 0o700)
    links = container.path / "cow/links"
    directory, symlink = entry_of(container, b"etc"), entry_of(container, b"usr/symlink")
    (links / "no record").write_text("data")
    (links / f"{SMALL}:007").write_text("data")
    (links / f"{SMALL}:99999").write_text("data")
    (links / f"{SMALL}:{directory}").mkdir()
    (links / "other:3").write_text("data")
    (links / f"{SMALL}:{symlink}").write_text("no symbolic link")
    record = record_of(container, b"bin/tool")
    again = entry_of(container, b"lib/deep/tool-again")
    (links / f"{SMALL}:{again}").write_text("a member, not the leader")
    found_and_mended(
        container,
        ("malformed", "cow/links/no record"),
        ("malformed", f"cow/links/{SMALL}:007"),
        ("dangling", f"cow/links/{SMALL}:99999"),
        ("dangling", f"cow/links/{SMALL}:{directory}"),
        ("dangling", f"cow/links/{SMALL}:{again}"),
        ("dangling", "cow/links/other:3"),
        ("malformed", f"cow/links/{SMALL}:{symlink}"),
    )
    assert os.listdir(links) == [record.name]
    assert (container.path / "lost+found/no record").read_text() == "data"


def test_a_record_that_links_elsewhere(container: Container) -> None:
    with changing(container) as fs:
        fs.chmod(b"bin/tool", 0o700)
    record = record_of(container, b"bin/tool")
    record.unlink()
    os.symlink(magic_link("etc/passwd"), record)
    found_and_mended(container, ("malformed", f"cow/links/{record.name}"))
    with changing(container) as fs:
        assert stat.S_IMODE(fs.lstat(b"bin/tool").mode) == 0o755


def test_a_group_with_malformed_attributes(container: Container) -> None:
    with changing(container) as fs:
        fs.chmod(b"bin/tool", 0o700)
    record = record_of(container, b"bin/tool")
    os.setxattr(record, ATTR_XATTR, b"nonsense", follow_symlinks=False)
    found_and_mended(container, ("bad-record", f"cow/links/{record.name}"))


def test_a_copy_of_a_group_outside_its_record(container: Container) -> None:
    (area(container) / "own").write_text("own")
    os.setxattr(area(container) / "own", ORIGIN_XATTR, b"small/%d" % entry_of(container, b"usr/share/pair-b"))
    found_and_mended(container, ("duplicate-origin", "private/own"))


# ----------------------------------------------------------------------------------------------------- whatever happens


def test_a_repair_that_fails_is_told(container: Container) -> None:
    os.symlink(magic_link("no/such"), area(container) / "dangling")
    (container.path / "lost+found").write_text("in the way")
    problems = container.check(repair=True)
    assert kinds(problems) == [("dangling", "private/dangling"), ("missing", "lost+found")]
    assert not any(problem.repaired for problem in problems)
    assert "could not be repaired" in problems[1].detail or "could not be repaired" in problems[0].detail
    assert os.path.lexists(area(container) / "dangling")
    (container.path / "lost+found").unlink()
    found_and_mended(container, ("dangling", "private/dangling"))


def test_check_changes_nothing(container: Container) -> None:
    with changing(container) as fs:
        write(fs, b"etc/passwd", b"x")
        fs.chmod(b"bin/tool", 0o700)
    os.symlink(magic_link("no/such"), area(container) / "dangling")

    def stamps() -> dict[bytes, int]:
        return {
            os.path.join(folder, name): os.lstat(os.path.join(folder, name)).st_ctime_ns
            for folder, directories, files in os.walk(os.fsencode(container.path))
            for name in directories + files
            if name != b"lock"
        }

    before = stamps()
    assert len(container.check()) == 1
    assert stamps() == before


def test_nothing_stays_open(container: Container) -> None:
    os.symlink(magic_link("no/such"), area(container) / "dangling")
    unfold(container, "usr/share")
    before = len(os.listdir("/proc/self/fd"))
    container.check(repair=True)
    container.check()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    top = tmp_path_factory.mktemp("check")
    store = Store(top / "vz")
    store.create_template(SMALL, str(make_source(top / "source")))
    return store


def _things(container: Container, wanted: Callable[[os.stat_result], bool]) -> list[bytes]:
    found = []
    for folder, directories, files in os.walk(os.fsencode(area(container))):
        for name in sorted(directories + files):
            path = os.path.join(folder, name)
            if wanted(os.lstat(path)):
                found.append(path)
    return sorted(found)


def damage(container: Container, how: str, number: int, other: int) -> None:
    """Break something in the container."""
    links = _things(container, lambda info: stat.S_ISLNK(info.st_mode))
    folders = [os.fsencode(area(container)), *_things(container, lambda info: stat.S_ISDIR(info.st_mode))]
    things = _things(container, lambda info: True)
    place = folders[number % len(folders)] + b"/broken%d" % other
    index = open_index(container.store.layout, SMALL)
    records = sorted((container.path / "cow/links").glob("*")) if (container.path / "cow/links").is_dir() else []
    if os.path.lexists(place):
        return
    if how == "link":
        os.symlink(magic_link(os.fsdecode(index.path(other % index.count))), place)
    elif how == "text":
        os.symlink((magic_link("no"), "//vz/template/../x", "//vz/template/other/a")[other % 3], place)
    elif how == "copy link" and links:
        os.link(links[other % len(links)], place, follow_symlinks=False)
    elif how == "unlink" and links:
        os.unlink(links[other % len(links)])
    elif how == "move":
        source = things[other % len(things)]
        if not (place + b"/").startswith(source + b"/"):
            os.rename(source, place)
    elif how == "origin" and things:
        with contextlib.suppress(OSError):  # symbolic links and the like may have none
            value = b"small/%d" % (other % (index.count + 5))
            os.setxattr(things[number % len(things)], ORIGIN_XATTR, value, follow_symlinks=False)
    elif how == "no xattrs":
        thing = things[other % len(things)]
        if os.lstat(thing).st_nlink == 1 or stat.S_ISDIR(os.lstat(thing).st_mode):
            for name in os.listxattr(thing, follow_symlinks=False):
                os.removexattr(thing, name, follow_symlinks=False)
    elif how == "count" and records:
        os.setxattr(records[other % len(records)], NLINK_XATTR, b"%d" % (other % 7), follow_symlinks=False)
    elif how == "record":
        (container.path / "cow/links").mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (container.path / f"cow/links/{SMALL}:{number % (index.count + 3)}").touch(exist_ok=False)
    elif how == "own":
        with open(place, "xb") as file:
            file.write(b"own %d" % number)
    elif how == "stage":
        (container.path / "cow/stage").mkdir(mode=0o700, exist_ok=True)
        (container.path / f"cow/stage/{other}").touch()


DAMAGES = ("link", "text", "copy link", "unlink", "move", "origin", "no xattrs", "count", "record", "own", "stage")
damages = st.lists(
    st.tuples(st.sampled_from(DAMAGES), st.integers(0, 9999), st.integers(0, 9999)), min_size=1, max_size=8
)
_numbers = itertools.count(1)


def own_data(container: Container) -> list[bytes]:
    """The contents of all regular files of the container's own, wherever they lie, but what is staged."""
    found = []
    for top in ("private", "lost+found", "cow/links"):
        for folder, _, files in os.walk(container.path / top):
            for name in files:
                path = os.path.join(folder, name)
                if stat.S_ISREG(os.lstat(path).st_mode):
                    found.append(Path(path).read_bytes())
    return sorted(found)


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(wanted=steps, broken=damages)
def test_any_damage_is_mended_or_told(
    shared_store: Store, wanted: list[Step], broken: list[tuple[str, int, int]]
) -> None:
    container = shared_store.create(next(_numbers), template=SMALL)
    with changing(container) as fs:
        make_changes(fs, wanted)
    assert container.check() == []
    for how, number, other in broken:
        damage(container, how, number, other)
    list(container.diff(content=True))
    data = own_data(container)
    found = kinds(container.check())
    problems = container.check(repair=True)
    assert set(found) <= set(kinds(problems)) or any(problem.repaired for problem in problems)
    assert bool(found) == bool(problems)
    left = kinds([problem for problem in problems if not problem.repaired])
    assert kinds(container.check()) == left
    assert kinds(container.check(repair=True)) == left
    assert own_data(container) == data, "data was lost"
    if not left:
        with changing(container) as fs:
            snapshot(fs)
            remove_all(fs)
        assert container.check() == []
    container.destroy()


def remove_all(fs: TreeFs) -> None:
    for name in fs.listdir(b""):
        remove_tree(fs, name)
    assert fs.listdir(b"") == []
