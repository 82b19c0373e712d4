"""Who may do what: users, groups, sticky and set-id bits, and what clears them."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from .base import behaviour
from .libc import RENAME_EXCHANGE, renameat2
from .place import (
    ALICE,
    ALICES,
    BOB,
    BOBS,
    STAFF,
    Place,
    append,
    expect_errno,
    get,
    mode_of,
    names,
    open_close,
    opened,
    patch,
    put,
)
from .seeds import Dir, File, Symlink

FILES = (
    File("secret", b"root only", mode=0o600),
    File("public", b"all read", mode=0o644),
    File("alices", b"hers", mode=0o600, uid=ALICE, gid=ALICES),
    File("staff", b"staff read", mode=0o640, gid=STAFF),
    File("groupless", b"group denied", mode=0o604, gid=STAFF),
    File("ownerless", b"owner denied", mode=0o044, uid=ALICE, gid=ALICES),
)


@behaviour(seeds=FILES)
def reading_obeys_the_mode(d: Place) -> None:
    def work() -> None:
        expect_errno(errno.EACCES, get, "secret")
        assert get("public") == b"all read"
        assert get("alices") == b"hers"
        expect_errno(errno.EACCES, get, "staff")
        assert get("groupless") == b"group denied"
        expect_errno(errno.EACCES, get, "ownerless")

    d.alice(work)


@behaviour(seeds=FILES)
def supplementary_groups_count(d: Place) -> None:
    def work() -> None:
        assert get("staff") == b"staff read"
        expect_errno(errno.EACCES, get, "groupless")
        expect_errno(errno.EACCES, append, "staff", b"x")

    d.as_user(ALICE, ALICES, [1, 2, 3, STAFF, 99], work)


@behaviour(seeds=FILES)
def the_last_of_many_groups_counts(d: Place) -> None:
    groups = [30_000 + number for number in range(200)]
    assert d.as_user(BOB, BOBS, [*groups, STAFF], get, "staff") == b"staff read"
    expect_errno(errno.EACCES, d.as_user, BOB, BOBS, groups, get, "staff")


@behaviour(seeds=FILES)
def root_reads_and_writes_everything(d: Place) -> None:
    for seed in FILES:
        assert get(d / seed.path) == seed.data
        append(d / seed.path, b"+")


@behaviour(seeds=FILES)
def writing_obeys_the_mode(d: Place) -> None:
    def work() -> None:
        for name in ("secret", "public", "staff"):
            expect_errno(errno.EACCES, append, name, b"x")
            expect_errno(errno.EACCES, open_close, name, os.O_RDONLY | os.O_TRUNC)
            expect_errno(errno.EACCES, os.truncate, name, 0)
        append("alices", b"+")
        assert get("alices") == b"hers+"

    d.alice(work)
    assert get(d / "public") == b"all read"


@behaviour(seeds=FILES)
def access_tells_what_open_allows(d: Place) -> None:
    def work() -> dict[str, tuple[bool, bool, bool]]:
        return {name: tuple(os.access(name, what) for what in (os.R_OK, os.W_OK, os.X_OK)) for name in os.listdir(".")}  # type: ignore[misc]

    assert d.as_user(ALICE, ALICES, [STAFF], work) == {
        "secret": (False, False, False),
        "public": (True, False, False),
        "alices": (True, True, False),
        "staff": (True, False, False),
        "groupless": (False, False, False),
        "ownerless": (False, False, False),
    }
    assert not os.access(d / "public", os.X_OK)
    assert os.access(d / "secret", os.R_OK | os.W_OK)
    os.chmod(d / "public", 0o645)
    assert os.access(d / "public", os.X_OK)


@behaviour(seeds=[File("closed/f", b"x"), Dir("nolist"), File("nolist/f", b"y"), File("nosearch/f", b"z")])
def search_permission(d: Place) -> None:
    os.chmod(d / "closed", 0o700)
    os.chmod(d / "nolist", 0o711)
    os.chmod(d / "nosearch", 0o744)

    def work() -> None:
        expect_errno(errno.EACCES, os.stat, "closed/f")
        expect_errno(errno.EACCES, os.listdir, "closed")
        assert stat.S_ISDIR(os.stat("closed").st_mode)
        assert get("nolist/f") == b"y"
        expect_errno(errno.EACCES, os.listdir, "nolist")
        assert os.listdir("nosearch") == ["f"]
        expect_errno(errno.EACCES, os.stat, "nosearch/f")
        expect_errno(errno.EACCES, os.stat, "nosearch/none")
        expect_errno(errno.ENOENT, os.stat, "nolist/none")

    d.alice(work)


@behaviour(seeds=[Dir("a", mode=0o700), File("a/b/c/f", b"x", mode=0o666)])
def search_permission_of_seeds_deep_down(d: Place) -> None:
    expect_errno(errno.EACCES, d.alice, get, "a/b/c/f")
    os.chmod(d / "a", 0o711)
    assert d.alice(get, "a/b/c/f") == b"x"
    os.chmod(d / "a/b", 0o700)
    expect_errno(errno.EACCES, d.alice, get, "a/b/c/f")
    assert get(d / "a/b/c/f") == b"x"


@behaviour(seeds=[File("d/f", b"x", mode=0o666), Dir("d/sub"), Symlink("d/l", "f")])
def changing_a_closed_directory(d: Place) -> None:
    def work() -> None:
        expect_errno(errno.EACCES, put, "d/new", b"")
        expect_errno(errno.EACCES, os.unlink, "d/f")
        expect_errno(errno.EACCES, os.rmdir, "d/sub")
        expect_errno(errno.EACCES, os.mkdir, "d/new")
        expect_errno(errno.EACCES, os.symlink, "x", "d/new")
        expect_errno(errno.EACCES, os.mkfifo, "d/new")
        expect_errno(errno.EACCES, os.rename, "d/f", "d/g")
        expect_errno(errno.EACCES, os.link, "d/f", "d/g")
        expect_errno(errno.EEXIST, os.mkdir, "d/sub")
        append("d/f", b"+")

    d.alice(work)
    assert names(d / "d") == ["f", "l", "sub"]
    assert get(d / "d/f") == b"x+"


@behaviour(seeds=[File("open/f", b"x"), Dir("open/sub")])
def changing_an_open_directory(d: Place) -> None:
    os.chmod(d / "open", 0o777)

    def work() -> None:
        os.rename("open/f", "open/g")  # not the file's mode, but the directory's decides
        os.unlink("open/g")
        os.rmdir("open/sub")
        put("open/mine", b"m")

    d.alice(work)
    assert names(d / "open") == ["mine"]
    assert os.stat(d / "open/mine").st_uid == ALICE


STICKY = (
    Dir("tmp", mode=0o1777),
    File("tmp/alices", b"a", uid=ALICE, gid=ALICES, mode=0o666),
    File("tmp/bobs", b"b", uid=BOB, gid=BOBS, mode=0o666),
    Dir("tmp/alicesdir", uid=ALICE, gid=ALICES, mode=0o777),
)


@behaviour(seeds=STICKY)
def sticky_directory_protects_others_files(d: Place) -> None:
    def work() -> None:
        expect_errno(errno.EPERM, os.unlink, "tmp/alices")
        expect_errno(errno.EPERM, os.rename, "tmp/alices", "tmp/x")
        expect_errno(errno.EPERM, os.rename, "tmp/bobs", "tmp/alices")
        expect_errno(errno.EPERM, os.rmdir, "tmp/alicesdir")
        expect_errno(errno.EPERM, renameat2, "tmp/bobs", "tmp/alices", RENAME_EXCHANGE)
        os.rename("tmp/bobs", "tmp/bobs2")
        os.unlink("tmp/bobs2")
        put("tmp/new", b"")

    d.bob(work)
    assert names(d / "tmp") == ["alices", "alicesdir", "new"]


@behaviour(seeds=STICKY)
def sticky_directory_obeys_owner_of_file_and_root(d: Place) -> None:
    d.alice(os.unlink, "tmp/alices")
    d.alice(os.rmdir, "tmp/alicesdir")
    os.unlink(d / "tmp/bobs")
    assert names(d / "tmp") == []


@behaviour(seeds=STICKY)
def sticky_directory_obeys_its_owner(d: Place) -> None:
    os.chown(d / "tmp", BOB, BOBS)
    d.bob(os.unlink, "tmp/alices")
    assert names(d / "tmp") == ["alicesdir", "bobs"]


@behaviour(seeds=[Dir("team", mode=0o2775, gid=STAFF)])
def setgid_directory_hands_down_its_group(d: Place) -> None:
    put(d / "team/f", b"")
    os.mkdir(d / "team/sub")
    os.mkdir(d / "team/sub/subsub", 0o700)
    os.symlink("x", d / "team/l")
    os.mkfifo(d / "team/p")
    for name in ("f", "sub", "l", "p", "sub/subsub"):
        assert os.lstat(d / "team" / name).st_gid == STAFF, name
    assert mode_of(d / "team/sub") == 0o2755
    assert mode_of(d / "team/sub/subsub") == 0o2700
    assert mode_of(d / "team/f") == 0o644


@behaviour(seeds=[Dir("team", mode=0o2777, gid=STAFF)])
def setgid_directory_and_users(d: Place) -> None:
    def work() -> None:
        put("team/f", b"")
        os.mkdir("team/sub")
        # A user who is not in the group can't get a setgid program of it that way.
        open_close("team/prog", os.O_CREAT | os.O_WRONLY, 0o2755)

    d.alice(work)
    found = os.stat(d / "team/f")
    assert (found.st_uid, found.st_gid) == (ALICE, STAFF)
    assert mode_of(d / "team/sub") == 0o2755
    assert os.stat(d / "team/sub").st_gid == STAFF
    assert mode_of(d / "team/prog") == 0o755


@behaviour(seeds=[File("f", mode=0o644, uid=ALICE, gid=ALICES)])
def chmod_is_for_the_owner(d: Place) -> None:
    expect_errno(errno.EPERM, d.bob, os.chmod, "f", 0o777)
    d.alice(os.chmod, "f", 0o600)
    assert mode_of(d / "f") == 0o600


@behaviour(seeds=[File("f", uid=ALICE, gid=ALICES), File("g", uid=ALICE, gid=STAFF)])
def chmod_setgid_needs_the_group(d: Place) -> None:
    d.alice(os.chmod, "f", 0o2755)
    d.alice(os.chmod, "g", 0o2755)
    assert mode_of(d / "f") == 0o2755
    assert mode_of(d / "g") == 0o755
    d.as_user(ALICE, ALICES, [STAFF], os.chmod, "g", 0o2755)
    assert mode_of(d / "g") == 0o2755


@behaviour(seeds=[File("f", uid=ALICE, gid=ALICES)])
def chown_is_for_root(d: Place) -> None:
    def work() -> None:
        expect_errno(errno.EPERM, os.chown, "f", BOB, -1)
        expect_errno(errno.EPERM, os.chown, "f", -1, BOBS)
        expect_errno(errno.EPERM, os.chown, "f", 0, 0)
        os.chown("f", ALICE, ALICES)
        os.chown("f", -1, STAFF)

    d.as_user(ALICE, ALICES, [STAFF], work)
    assert (os.stat(d / "f").st_uid, os.stat(d / "f").st_gid) == (ALICE, STAFF)
    expect_errno(errno.EPERM, d.bob, os.chown, "f", BOB, BOBS)


SUID = File("a/prog", b"#!program", mode=0o6755)


@behaviour(seeds=[SUID, File("a/locked", mode=0o2644)])
def chown_clears_set_id_bits(d: Place) -> None:
    os.chown(d / "a/prog", ALICE, ALICES)
    assert mode_of(d / "a/prog") == 0o755
    os.chown(d / "a/locked", ALICE, ALICES)
    assert mode_of(d / "a/locked") == 0o2644  # setgid without group execute means locking


@behaviour(seeds=[File("f", mode=0o6755, uid=ALICE, gid=ALICES)])
def chown_by_user_clears_set_id_bits(d: Place) -> None:
    d.as_user(ALICE, ALICES, [STAFF], os.chown, "f", -1, STAFF)
    assert mode_of(d / "f") == 0o755


@behaviour(seeds=[Dir("a/d", mode=0o6755)])
def chown_keeps_set_id_bits_of_directory(d: Place) -> None:
    os.chown(d / "a/d", ALICE, ALICES)
    assert mode_of(d / "a/d") == 0o6755


@behaviour(seeds=[File("f", b"program", mode=0o6777), File("g", b"program", mode=0o6777)])
def write_by_user_clears_set_id_bits(d: Place) -> None:
    d.alice(patch, "f", 0, b"P")
    assert mode_of(d / "f") == 0o777
    d.alice(os.truncate, "g", 3)
    assert mode_of(d / "g") == 0o777
    assert get(d / "g") == b"pro"


@behaviour(seeds=[File("f", b"program", mode=0o6777)])
def open_truncate_by_user_clears_set_id_bits(d: Place) -> None:
    d.alice(open_close, "f", os.O_WRONLY | os.O_TRUNC)
    assert mode_of(d / "f") == 0o777


@behaviour(seeds=[SUID])
def write_by_root_keeps_set_id_bits(d: Place) -> None:
    patch(d / "a/prog", 0, b"##")
    assert mode_of(d / "a/prog") == 0o6755
    assert get(d / "a/prog") == b"##program"


@behaviour(seeds=[File("f", b"x", mode=0o644, uid=ALICE, gid=ALICES)])
def times_are_for_owner_or_writer(d: Place) -> None:
    expect_errno(errno.EPERM, d.bob, os.utime, "f", (1, 1))
    expect_errno(errno.EACCES, d.bob, os.utime, "f")
    os.chmod(d / "f", 0o666)
    d.bob(os.utime, "f")
    expect_errno(errno.EPERM, d.bob, os.utime, "f", (1, 1))
    d.alice(os.utime, "f", (1, 1))
    assert os.stat(d / "f").st_mtime == 1


@behaviour(seeds=[File("f", b"x", mode=0o644, uid=ALICE, gid=ALICES)])
def noatime_is_for_the_owner(d: Place) -> None:
    expect_errno(errno.EPERM, d.bob, open_close, "f", os.O_RDONLY | os.O_NOATIME)
    d.alice(open_close, "f", os.O_RDONLY | os.O_NOATIME)


@behaviour(needs={"coherent-readers"}, seeds=[File("f", b"x", mode=0o644)])
def descriptor_outlives_permission(d: Place) -> None:
    os.chmod(d / "f", 0o666)

    def work(reader: int, writer: int) -> bytes:
        expect_errno(errno.EACCES, get, "f")
        os.pwrite(writer, b"y", 0)
        return os.pread(reader, 1, 0)

    with opened(d / "f") as reader, opened(d / "f", os.O_WRONLY) as writer:
        os.chmod(d / "f", 0)
        assert d.alice(work, reader, writer) == (b"y" if d.has("coherent-readers") else b"x")


@behaviour(seeds=[Dir("d", mode=0o777), Dir("d/sub", uid=ALICE, gid=ALICES)])
def moving_a_directory_needs_write_on_it(d: Place) -> None:
    # Its '..' changes: a directory that one may not write can be renamed, but not moved elsewhere.
    os.mkdir(d / "other")
    os.chmod(d / "other", 0o777)
    os.chown(d / "d/sub", 0, 0)
    expect_errno(errno.EACCES, d.alice, os.rename, "d/sub", "other/sub")
    d.alice(os.rename, "d/sub", "d/sub2")
    assert names(d / "d") == ["sub2"]


@behaviour(seeds=[Dir("d", mode=0o777)])
def device_nodes_are_made_by_root_only(d: Place) -> None:
    expect_errno(errno.EPERM, d.alice, os.mknod, "d/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    expect_errno(errno.EPERM, d.alice, os.mknod, "d/disk", stat.S_IFBLK | 0o666, os.makedev(7, 9))
    d.alice(os.mkfifo, "d/fifo")
    assert names(d / "d") == ["fifo"]


@behaviour(seeds=[Dir("home", mode=0o755, uid=ALICE, gid=ALICES), File("home/doc/f", b"x", uid=ALICE, gid=ALICES)])
def a_user_works_in_her_home(d: Place) -> None:
    os.chown(d / "home/doc", ALICE, ALICES)

    def work() -> None:
        os.chdir("home")
        append("doc/f", b"+")
        os.mkdir("new", 0o700)
        os.rename("doc/f", "new/f")
        os.chmod("new/f", 0o400)
        expect_errno(errno.EACCES, append, "new/f", b"no")
        os.link("new/f", "doc/f")
        os.setxattr("doc", "user.tag", b"t")
        os.unlink("new/f")
        os.rmdir("new")

    d.alice(work)
    assert names(d / "home") == ["doc"]
    assert get(d / "home/doc/f") == b"x+"
    found = os.stat(d / "home/doc/f")
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (ALICE, ALICES, 0o400)


@behaviour(seeds=[File("f", b"x", mode=0o644, uid=ALICE, gid=ALICES)])
def effective_user_decides_not_the_real_one(d: Place) -> None:
    def work() -> tuple[bool, bool]:
        os.setresgid(BOBS, ALICES, ALICES)
        os.setresuid(BOB, ALICE, ALICE)
        append("f", b"+")
        return os.access("f", os.W_OK), os.access("f", os.W_OK, effective_ids=True)

    assert d.in_child(work) == (False, True)


@behaviour(seeds=[File("seed", b"s", mode=0o600), Dir("d", mode=0o755)])
def permission_denied_changes_nothing(d: Place) -> None:
    before = _facts(d / "seed"), _facts(d / "d")

    def work() -> None:
        expect_errno(errno.EACCES, append, "seed", b"x")
        expect_errno(errno.EPERM, os.chmod, "seed", 0o777)
        expect_errno(errno.EACCES, put, "d/x", b"")
        expect_errno(errno.EPERM, os.chown, "d", ALICE, ALICES)

    d.alice(work)
    assert (_facts(d / "seed"), _facts(d / "d")) == before


def _facts(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_mode, found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns, found.st_ctime_ns
