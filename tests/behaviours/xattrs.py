"""Extended attributes in every namespace, POSIX ACLs and file capabilities."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from pathlib import Path

from .base import behaviour
from .place import (
    ALICE,
    ALICES,
    BOB,
    STAFF,
    Place,
    append,
    attempt,
    expect_errno,
    get,
    mode_of,
    names,
    opened,
    put,
    tick,
)
from .seeds import SEED_TIME, CharDev, Dir, Fifo, File, HardLink, Symlink

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
CAPABILITY = "security.capability"

# linux/posix_acl_xattr.h: version 2, then (tag, permissions, id) per entry, sorted by tag.
_TAGS = {"u:": 0x01, "u": 0x02, "g:": 0x04, "g": 0x08, "m:": 0x10, "o:": 0x20}
_UNDEFINED_ID = 0xFFFF_FFFF


def acl(text: str) -> bytes:
    """An ACL's stored form, from words such as ``u::rw-`` and ``u:20001:r--`` in canonical order."""
    packed = struct.pack("<I", 2)
    for word in text.split():
        kind, name, letters = word.split(":")
        bits = sum(bit for letter, bit in zip("rwx", (4, 2, 1), strict=True) if letter in letters)
        packed += struct.pack("<HHI", _TAGS[kind if name else kind + ":"], bits, int(name) if name else _UNDEFINED_ID)
    return packed


def capability(*numbers: int) -> bytes:
    """A security.capability value (linux/capability.h, revision 2), permitted and effective."""
    bits = sum(1 << number for number in numbers)
    return struct.pack("<5I", 0x0200_0001, bits & 0xFFFF_FFFF, 0, bits >> 32, 0)


CAP_DAC_READ_SEARCH = 2
ACL_TEXT = f"u::rw- u:{ALICE}:r-- g::r-- m::r-- o::---"
CAT = Path("/bin/cat").read_bytes()

DRESSED = File("a/b/f", b"data", xattrs={"user.one": b"1", "user.two": b"2" * 300, "trusted.t": b"\0\xff"})


def user_names(path: Path) -> list[str]:
    return sorted(name for name in os.listxattr(path) if name.startswith(("user.", "trusted.")))


@behaviour(seeds=[DRESSED])
def xattrs_of_seed(d: Place) -> None:
    assert os.getxattr(d / "a/b/f", "user.one") == b"1"
    assert os.getxattr(d / "a/b/f", "user.two") == b"2" * 300
    assert os.getxattr(d / "a/b/f", "trusted.t") == b"\0\xff"
    assert user_names(d / "a/b/f") == ["trusted.t", "user.one", "user.two"]


@behaviour(seeds=[DRESSED])
def xattr_set_change_remove(d: Place) -> None:
    path = d / "a/b/f"
    os.setxattr(path, "user.three", b"3")
    os.setxattr(path, "user.one", b"changed")
    os.removexattr(path, "user.two")
    assert os.getxattr(path, "user.one") == b"changed"
    assert user_names(path) == ["trusted.t", "user.one", "user.three"]
    assert get(path) == b"data"


@behaviour(seeds=[DRESSED])
def xattr_change_then_write(d: Place) -> None:
    os.setxattr(d / "a/b/f", "user.one", b"changed")
    append(d / "a/b/f", b"+")
    assert os.getxattr(d / "a/b/f", "user.one") == b"changed"
    assert os.getxattr(d / "a/b/f", "trusted.t") == b"\0\xff"
    assert user_names(d / "a/b/f") == ["trusted.t", "user.one", "user.two"]


@behaviour(seeds=[DRESSED])
def xattrs_survive_write_truncate_chmod_rename(d: Place) -> None:
    append(d / "a/b/f", b"+")
    os.chmod(d / "a/b/f", 0o600)
    put(d / "a/b/f", b"new")
    os.rename(d / "a/b/f", d / "g")
    assert user_names(d / "g") == ["trusted.t", "user.one", "user.two"]
    assert os.getxattr(d / "g", "user.two") == b"2" * 300


@behaviour(seeds=[DRESSED])
def xattr_removal_of_all_then_write(d: Place) -> None:
    for name in user_names(d / "a/b/f"):
        os.removexattr(d / "a/b/f", name)
    append(d / "a/b/f", b"+")
    assert user_names(d / "a/b/f") == []
    expect_errno(errno.ENODATA, os.getxattr, d / "a/b/f", "user.one")


@behaviour(seeds=[DRESSED])
def xattr_create_and_replace_flags(d: Place) -> None:
    path = d / "a/b/f"
    expect_errno(errno.EEXIST, os.setxattr, path, "user.one", b"x", os.XATTR_CREATE)
    expect_errno(errno.ENODATA, os.setxattr, path, "user.none", b"x", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.one") == b"1"
    os.setxattr(path, "user.one", b"x", os.XATTR_REPLACE)
    os.setxattr(path, "user.none", b"y", os.XATTR_CREATE)
    assert (os.getxattr(path, "user.one"), os.getxattr(path, "user.none")) == (b"x", b"y")
    expect_errno(errno.EINVAL, os.setxattr, path, "user.one", b"x", 4)


@behaviour(seeds=[DRESSED])
def xattr_missing_is_enodata(d: Place) -> None:
    for path in (d / "a/b/f", d / "a/b"):
        for name in ("user.none", "trusted.none", "security.none", CAPABILITY, ACCESS):
            expect_errno(errno.ENODATA, os.getxattr, path, name)
        expect_errno(errno.ENODATA, os.removexattr, path, "user.none")
    expect_errno(errno.ENOENT, os.getxattr, d / "none", "user.one")


@behaviour(seeds=[File("a/f", xattrs={"user.big": b"v" * 1000})])
def xattr_small_buffer_is_erange(d: Place) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(d / "a/f")
    buffer = ctypes.create_string_buffer(2000)
    assert libc.getxattr(path, b"user.big", None, 0) == 1000
    assert libc.getxattr(path, b"user.big", buffer, 999) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert libc.getxattr(path, b"user.big", buffer, 1000) == 1000
    needed = libc.listxattr(path, None, 0)
    assert needed >= len("user.big") + 1
    assert libc.listxattr(path, buffer, needed - 1) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert libc.listxattr(path, buffer, needed) == needed


@behaviour(seeds=[DRESSED])
def xattr_bad_names(d: Place) -> None:
    path = d / "a/b/f"
    expect_errno(errno.EOPNOTSUPP, os.setxattr, path, "nonamespace", b"x")
    expect_errno(errno.EOPNOTSUPP, os.setxattr, path, "other.name", b"x")
    expect_errno(errno.EOPNOTSUPP, os.getxattr, path, "other.name")
    expect_errno(errno.ERANGE, os.setxattr, path, "user." + "n" * 251, b"x")
    expect_errno(errno.ERANGE, os.setxattr, path, "", b"x")
    expect_errno(errno.EINVAL, os.setxattr, path, "user.", b"x")
    assert len(user_names(path)) == 3


@behaviour(seeds=[File("a/f")])
def xattr_name_of_255_bytes(d: Place) -> None:
    name = "user." + "n" * 250
    os.setxattr(d / "a/f", name, b"x")
    assert os.getxattr(d / "a/f", name) == b"x"
    assert user_names(d / "a/f") == [name]


@behaviour(seeds=[File("a/f")])
def xattr_values_of_many_sizes(d: Place) -> None:
    for size in (0, 1, 100, 1000, 3000):
        value = os.urandom(size)
        os.setxattr(d / "a/f", "user.v", value)
        assert os.getxattr(d / "a/f", "user.v") == value
    assert get(d / "a/f") == b""


@behaviour(seeds=[File("a/f", xattrs={"user.v": b"small"})])
def xattr_too_large_is_refused(d: Place) -> None:
    expect_errno(errno.E2BIG, os.setxattr, d / "a/f", "user.v", b"x" * 65_537)
    # ext4 keeps them in one block, unless it has the ea_inode feature.
    kept = attempt(errno.ENOSPC, os.setxattr, d / "a/f", "user.v", b"x" * 60_000)
    assert os.getxattr(d / "a/f", "user.v") == (b"x" * 60_000 if kept else b"small")


@behaviour(seeds=[File("a/f")])
def xattr_many_until_full(d: Place) -> None:
    kept = []
    for number in range(200):
        if not attempt(errno.ENOSPC, os.setxattr, d / "a/f", f"user.{number:03}", b"v" * 200):
            break
        kept.append(f"user.{number:03}")
    assert len(kept) >= 10
    assert user_names(d / "a/f") == kept
    append(d / "a/f", b"x")
    assert user_names(d / "a/f") == kept


@behaviour(seeds=[Dir("a/d", xattrs={"user.one": b"1", "trusted.t": b"t"}), File("a/d/f")])
def xattrs_of_directory(d: Place) -> None:
    assert user_names(d / "a/d") == ["trusted.t", "user.one"]
    os.setxattr(d / "a/d", "user.two", b"2")
    os.removexattr(d / "a/d", "user.one")
    put(d / "a/d/new", b"")
    assert user_names(d / "a/d") == ["trusted.t", "user.two"]
    os.rename(d / "a/d", d / "e")
    assert user_names(d / "e") == ["trusted.t", "user.two"]
    assert names(d / "e") == ["f", "new"]
    assert user_names(d / "e/new") == []


@behaviour(seeds=[Symlink("a/l", "f", xattrs={"trusted.t": b"link"}), File("a/f"), Fifo("a/p"), CharDev("a/n", 1, 3)])
def xattrs_of_symlinks_and_special_files(d: Place) -> None:
    assert os.getxattr(d / "a/l", "trusted.t", follow_symlinks=False) == b"link"
    expect_errno(errno.ENODATA, os.getxattr, d / "a/l", "trusted.t")
    os.setxattr(d / "a/l", "trusted.t", b"new", follow_symlinks=False)
    assert os.getxattr(d / "a/l", "trusted.t", follow_symlinks=False) == b"new"
    for name in ("l", "p", "n"):
        # user attributes are for files and directories only, man 7 xattr
        expect_errno(errno.EPERM, os.setxattr, d / "a" / name, "user.x", b"1", follow_symlinks=False)
    os.setxattr(d / "a/p", "trusted.p", b"pipe")
    assert os.getxattr(d / "a/p", "trusted.p") == b"pipe"
    assert os.readlink(d / "a/l") == "f"


@behaviour(seeds=[DRESSED])
def xattrs_through_descriptor(d: Place) -> None:
    with opened(d / "a/b/f") as fd:
        os.setxattr(fd, "user.fd", b"x")
        assert os.getxattr(fd, "user.fd") == b"x"
        assert "user.fd" in os.listxattr(fd)
        os.removexattr(fd, "user.fd")
    assert "user.fd" not in os.listxattr(d / "a/b/f")


@behaviour(seeds=[File("f", mode=0o666, xattrs={"trusted.t": b"secret", "user.u": b"open", "security.s": b"s"})])
def trusted_xattrs_are_hidden_from_users(d: Place) -> None:
    def work() -> None:
        expect_errno(errno.ENODATA, os.getxattr, "f", "trusted.t")
        expect_errno(errno.EPERM, os.setxattr, "f", "trusted.t", b"x")
        expect_errno(errno.EPERM, os.removexattr, "f", "trusted.t")
        assert "trusted.t" not in os.listxattr("f")
        assert os.getxattr("f", "user.u") == b"open"

    d.alice(work)
    assert os.getxattr(d / "f", "trusted.t") == b"secret"


@behaviour(seeds=[File("f", mode=0o666, xattrs={"security.s": b"s"})])
def security_xattrs_are_read_by_users_and_set_by_root(d: Place) -> None:
    def work() -> None:
        assert os.getxattr("f", "security.s") == b"s"
        assert "security.s" in os.listxattr("f")
        expect_errno(errno.EPERM, os.setxattr, "f", "security.s", b"x")

    d.alice(work)
    os.setxattr(d / "f", "security.s", b"changed")
    assert os.getxattr(d / "f", "security.s") == b"changed"


@behaviour(seeds=[File("f", mode=0o600, xattrs={"user.u": b"u"}), File("r", mode=0o644, xattrs={"user.u": b"u"})])
def user_xattrs_obey_the_mode(d: Place) -> None:
    def work() -> None:
        expect_errno(errno.EACCES, os.getxattr, "f", "user.u")
        expect_errno(errno.EACCES, os.setxattr, "f", "user.u", b"x")
        assert os.getxattr("r", "user.u") == b"u"
        expect_errno(errno.EACCES, os.setxattr, "r", "user.u", b"x")

    d.alice(work)


@behaviour(seeds=[Dir("sticky", mode=0o1777), Dir("plain", mode=0o777)])
def user_xattrs_on_sticky_directory_are_for_its_owner(d: Place) -> None:
    def work() -> None:
        expect_errno(errno.EPERM, os.setxattr, "sticky", "user.u", b"x")
        os.setxattr("plain", "user.u", b"x")

    d.alice(work)
    os.setxattr(d / "sticky", "user.u", b"x")


@behaviour(seeds=[File("a/one", xattrs={"user.k": b"1"}), HardLink("b/two", "a/one")])
def xattrs_are_shared_by_links(d: Place) -> None:
    os.setxattr(d / "b/two", "user.k", b"2")
    assert os.getxattr(d / "a/one", "user.k") == b"2"
    append(d / "a/one", b"x")
    assert os.getxattr(d / "b/two", "user.k") == b"2"


@behaviour(seeds=[DRESSED])
def xattr_change_moves_ctime_not_mtime(d: Place) -> None:
    before = os.stat(d / "a/b/f")
    tick()
    os.setxattr(d / "a/b/f", "user.one", b"x")
    after = os.stat(d / "a/b/f")
    assert after.st_ctime_ns > before.st_ctime_ns
    assert after.st_mtime_ns == SEED_TIME
    tick()
    os.removexattr(d / "a/b/f", "user.one")
    assert os.stat(d / "a/b/f").st_ctime_ns > after.st_ctime_ns


@behaviour(seeds=[Dir("a")])
def xattrs_of_new_file_are_empty(d: Place) -> None:
    put(d / "a/f", b"")
    assert user_names(d / "a/f") == []
    expect_errno(errno.ENODATA, os.getxattr, d / "a/f", "user.any")
    os.setxattr(d / "a/f", "user.any", b"1")
    os.unlink(d / "a/f")
    put(d / "a/f", b"")
    assert user_names(d / "a/f") == []


# --- ACLs ---


def getfacl(path: Path) -> list[str]:
    done = subprocess.run(["getfacl", "-cpnE", "--", path], check=True, capture_output=True, text=True)
    return done.stdout.split()


def setfacl(*words: str, path: Path) -> None:
    subprocess.run(["setfacl", *words, "--", path], check=True, capture_output=True, text=True)


@behaviour(seeds=[File("a/f", mode=0o640, xattrs={ACCESS: acl(ACL_TEXT)})])
def acl_of_seed(d: Place) -> None:
    assert os.getxattr(d / "a/f", ACCESS) == acl(ACL_TEXT)
    assert getfacl(d / "a/f") == ["user::rw-", f"user:{ALICE}:r--", "group::r--", "mask::r--", "other::---"]
    assert ACCESS in os.listxattr(d / "a/f")


@behaviour(seeds=[File("f", b"secret", mode=0o640, xattrs={ACCESS: acl(ACL_TEXT)})])
def acl_decides_access(d: Place) -> None:
    assert d.alice(get, "f") == b"secret"
    expect_errno(errno.EACCES, d.bob, get, "f")
    expect_errno(errno.EACCES, d.alice, append, "f", b"x")


@behaviour(seeds=[File("f", b"data", mode=0o600)])
def acl_set_and_removed_by_tools(d: Place) -> None:
    setfacl("-m", f"u:{ALICE}:rw-,g:{STAFF}:r--", path=d / "f")
    assert getfacl(d / "f") == [
        "user::rw-",
        f"user:{ALICE}:rw-",
        "group::---",
        f"group:{STAFF}:r--",
        "mask::rw-",
        "other::---",
    ]
    assert mode_of(d / "f") == 0o660
    d.alice(append, "f", b"+")
    assert d.as_user(BOB, BOB, [STAFF], get, "f") == b"data+"
    setfacl("-b", path=d / "f")
    assert getfacl(d / "f") == ["user::rw-", "group::---", "other::---"]
    expect_errno(errno.ENODATA, os.getxattr, d / "f", ACCESS)
    expect_errno(errno.EACCES, d.alice, get, "f")


@behaviour(seeds=[File("f", b"x", mode=0o660, xattrs={ACCESS: acl(f"u::rw- u:{ALICE}:rw- g::r-- m::rw- o::---")})])
def chmod_changes_the_mask(d: Place) -> None:
    assert mode_of(d / "f") == 0o660
    os.chmod(d / "f", 0o640)
    assert getfacl(d / "f")[3] == "mask::r--"
    expect_errno(errno.EACCES, d.alice, append, "f", b"x")
    assert d.alice(get, "f") == b"x"
    os.chmod(d / "f", 0o600)
    expect_errno(errno.EACCES, d.alice, get, "f")
    os.chmod(d / "f", 0o604)
    assert getfacl(d / "f") == ["user::rw-", f"user:{ALICE}:rw-", "group::r--", "mask::---", "other::r--"]


@behaviour(seeds=[File("f", mode=0o600)])
def mask_changes_the_mode(d: Place) -> None:
    os.setxattr(d / "f", ACCESS, acl(f"u::rwx u:{ALICE}:rwx g::r-- m::r-x o::--x"))
    assert mode_of(d / "f") == 0o751


@behaviour(seeds=[File("f", mode=0o600)])
def acl_without_names_becomes_the_mode(d: Place) -> None:
    os.setxattr(d / "f", ACCESS, acl("u::rwx g::r-x o::r--"))
    assert mode_of(d / "f") == 0o754
    expect_errno(errno.ENODATA, os.getxattr, d / "f", ACCESS)
    assert ACCESS not in os.listxattr(d / "f")


@behaviour(seeds=[File("a/f", b"x", mode=0o640, xattrs={ACCESS: acl(ACL_TEXT)})])
def acl_survives_write_and_rename(d: Place) -> None:
    append(d / "a/f", b"y")
    os.rename(d / "a/f", d / "g")
    assert os.getxattr(d / "g", ACCESS) == acl(ACL_TEXT)
    assert mode_of(d / "g") == 0o640
    assert d.alice(get, "g") == b"xy"


@behaviour(seeds=[Dir("a/d", xattrs={DEFAULT: acl(f"u::rwx u:{ALICE}:rwx g::r-x m::rwx o::---")})])
def default_acl_is_inherited_by_files(d: Place) -> None:
    os.close(os.open(d / "a/d/f", os.O_CREAT | os.O_WRONLY, 0o666))
    assert getfacl(d / "a/d/f") == ["user::rw-", f"user:{ALICE}:rwx", "group::r-x", "mask::rw-", "other::---"]
    assert mode_of(d / "a/d/f") == 0o660
    assert DEFAULT not in os.listxattr(d / "a/d/f")


@behaviour(seeds=[Dir("a/d", xattrs={DEFAULT: acl(f"u::rwx u:{ALICE}:rwx g::r-x m::rwx o::---")})])
def default_acl_is_inherited_by_directories(d: Place) -> None:
    os.mkdir(d / "a/d/sub", 0o777)
    os.mkdir(d / "a/d/sub/subsub", 0o700)
    for name, mode in (("sub", 0o770), ("sub/subsub", 0o700)):
        assert os.getxattr(d / "a/d" / name, DEFAULT) == os.getxattr(d / "a/d", DEFAULT)
        assert mode_of(d / "a/d" / name) == mode
    assert getfacl(d / "a/d/sub/subsub")[:5] == [
        "user::rwx",
        f"user:{ALICE}:rwx",
        "group::r-x",
        "mask::---",
        "other::---",
    ]


@behaviour(seeds=[Dir("a/d", xattrs={DEFAULT: acl("u::rwx g::r-x o::r-x")})])
def default_acl_replaces_the_umask(d: Place) -> None:
    old = os.umask(0o077)
    try:
        os.close(os.open(d / "a/d/f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkfifo(d / "a/d/p", 0o666)
        os.mkdir(d / "a/d/sub", 0o777)
    finally:
        os.umask(old)
    assert (mode_of(d / "a/d/f"), mode_of(d / "a/d/p"), mode_of(d / "a/d/sub")) == (0o644, 0o644, 0o755)


@behaviour(seeds=[Dir("a/d"), File("a/d/f")])
def default_acl_set_and_removed(d: Place) -> None:
    setfacl("-d", "-m", f"u:{ALICE}:r--", path=d / "a/d")
    assert f"default:user:{ALICE}:r--" in getfacl(d / "a/d")
    put(d / "a/d/g", b"")
    assert f"user:{ALICE}:r--" in getfacl(d / "a/d/g")
    assert ACCESS not in os.listxattr(d / "a/d/f")
    setfacl("-k", path=d / "a/d")
    expect_errno(errno.ENODATA, os.getxattr, d / "a/d", DEFAULT)
    expect_errno(errno.EACCES, os.setxattr, d / "a/d/f", DEFAULT, acl("u::rwx g::r-x o::r-x"))


@behaviour(seeds=[File("f", uid=ALICE, gid=ALICES)])
def acl_is_set_by_owner_only(d: Place) -> None:
    value = acl(f"u::rw- u:{BOB}:rw- g::r-- m::rw- o::r--")
    expect_errno(errno.EPERM, d.bob, os.setxattr, "f", ACCESS, value)
    d.alice(os.setxattr, "f", ACCESS, value)
    d.bob(append, "f", b"bob")
    assert get(d / "f") == b"bob"


@behaviour(seeds=[File("f")])
def acl_malformed_is_einval(d: Place) -> None:
    expect_errno(errno.EINVAL, os.setxattr, d / "f", ACCESS, acl(f"u::rw- u:{ALICE}:rw- g::r-- o::r--"))
    expect_errno(errno.EINVAL, os.setxattr, d / "f", ACCESS, acl("u::rw-"))
    expect_errno(errno.EINVAL, os.setxattr, d / "f", ACCESS, b"\x02\0\0\0junk!")
    expect_errno(errno.EOPNOTSUPP, os.setxattr, d / "f", ACCESS, b"\x09\0\0\0")


@behaviour(
    seeds=[Dir("d", mode=0o700, xattrs={ACCESS: acl(f"u::rwx u:{ALICE}:r-x g::--- m::r-x o::---")}), File("d/f")]
)
def acl_of_directory_allows_search(d: Place) -> None:
    assert d.alice(names, "d") == ["f"]
    assert d.alice(get, "d/f") == b""
    expect_errno(errno.EACCES, d.alice, put, "d/new", b"")
    expect_errno(errno.EACCES, d.bob, names, "d")


# --- file capabilities ---


@behaviour(
    seeds=[
        File("d/cat", CAT, mode=0o755, xattrs={CAPABILITY: capability(CAP_DAC_READ_SEARCH)}),
        File("k", b"key", mode=0o600),
    ]
)
def capability_of_seed_works_when_executed(d: Place) -> None:
    assert d.alice(run, "./d/cat", "k") == (0, b"key")


@behaviour(seeds=[File("d/cat", CAT, mode=0o755), File("k", b"key", mode=0o600)])
def capability_set_works_when_executed(d: Place) -> None:
    assert d.alice(run, "./d/cat", "k")[0] == 1
    subprocess.run(["setcap", "cap_dac_read_search=ep", d / "d/cat"], check=True)
    assert os.getxattr(d / "d/cat", CAPABILITY)[4:8] == struct.pack("<I", 1 << CAP_DAC_READ_SEARCH)
    assert d.alice(run, "./d/cat", "k") == (0, b"key")
    os.removexattr(d / "d/cat", CAPABILITY)
    assert d.alice(run, "./d/cat", "k")[0] == 1


def run(*command: str) -> tuple[int, bytes]:
    done = subprocess.run(command, capture_output=True)
    return done.returncode, done.stdout


@behaviour(seeds=[File("a/cat", CAT, mode=0o755, xattrs={CAPABILITY: capability(CAP_DAC_READ_SEARCH)})])
def capability_is_dropped_by_write(d: Place) -> None:
    append(d / "a/cat", b"x")
    expect_errno(errno.ENODATA, os.getxattr, d / "a/cat", CAPABILITY)


@behaviour(seeds=[File("a/cat", CAT, mode=0o755, xattrs={CAPABILITY: capability(CAP_DAC_READ_SEARCH)})])
def capability_is_dropped_by_chown_and_truncate(d: Place) -> None:
    os.chown(d / "a/cat", 3, 4)
    expect_errno(errno.ENODATA, os.getxattr, d / "a/cat", CAPABILITY)
    os.setxattr(d / "a/cat", CAPABILITY, capability(CAP_DAC_READ_SEARCH))
    os.truncate(d / "a/cat", 100)
    expect_errno(errno.ENODATA, os.getxattr, d / "a/cat", CAPABILITY)


@behaviour(seeds=[File("a/cat", CAT, mode=0o755, xattrs={CAPABILITY: capability(CAP_DAC_READ_SEARCH), "user.k": b"v"})])
def capability_survives_chmod_and_rename(d: Place) -> None:
    value = os.getxattr(d / "a/cat", CAPABILITY)
    os.chmod(d / "a/cat", 0o700)
    os.rename(d / "a/cat", d / "cat")
    os.link(d / "cat", d / "dog")
    assert os.getxattr(d / "dog", CAPABILITY) == value == capability(CAP_DAC_READ_SEARCH)


@behaviour(seeds=[File("f", mode=0o755, uid=ALICE)])
def capability_is_set_by_root_only(d: Place) -> None:
    expect_errno(errno.EPERM, d.alice, os.setxattr, "f", CAPABILITY, capability(CAP_DAC_READ_SEARCH))
    expect_errno(errno.EINVAL, os.setxattr, d / "f", CAPABILITY, b"nonsense")
