"""Whole trees of seeds: what package managers, archivers and administrators do to them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

from .base import behaviour
from .place import Place, append, expect_errno, get, mode_of, names, patch, put
from .seeds import SEED_TIME, BlockDev, CharDev, Dir, Fifo, File, HardLink, Seed, Symlink
from .xattrs import ACCESS, CAPABILITY, CAT, acl, capability

BIG = hashlib.shake_256(b"five mebibytes").digest(5 << 20)

# A small root file system with everything in it that can make trouble.
ROOT: tuple[Seed, ...] = (
    Dir("root/etc", mode=0o755),
    File("root/etc/passwd", b"root:x:0:0::/root:/bin/sh\n"),
    File("root/etc/shadow", b"root:*:1::::::\n", mode=0o640, gid=42),
    File("root/etc/conf.d/a.conf", b"a=1\n"),
    File("root/etc/conf.d/b.conf", b"b=1\n"),
    Symlink("root/etc/mtab", "/proc/mounts"),
    File("root/usr/bin/perl", b"#!perl" * 1000, mode=0o755),
    HardLink("root/usr/bin/perl5", "root/usr/bin/perl"),
    HardLink("root/usr/lib/perl/perl", "root/usr/bin/perl"),
    File("root/usr/bin/su", b"su", mode=0o4755),
    File("root/usr/bin/wall", b"wall", mode=0o2755, gid=5),
    File("root/usr/bin/ping", CAT, mode=0o755, xattrs={CAPABILITY: capability(13)}),
    File("root/usr/lib/big.so", BIG),
    File("root/usr/lib/sparse", b"s", size=4 << 20, pieces=((2 << 20, b"m"),)),
    Symlink("root/lib", "usr/lib"),
    Dir("root/tmp", mode=0o1777),
    Dir("root/var/mail", mode=0o2775, gid=8),
    File("root/var/acl", b"acl", mode=0o660, xattrs={ACCESS: acl("u::rw- u:20001:rw- g::r-- m::rw- o::---")}),
    File("root/var/attr", b"attr", xattrs={"user.origin": b"seed", "trusted.t": b"t"}),
    CharDev("root/dev/null", 1, 3),
    BlockDev("root/dev/disk", 7, 200),
    Fifo("root/run/initctl", mode=0o600),
    *[File(f"root/usr/share/doc/p{n}/copyright", b"licence %d\n" % n) for n in range(20)],
    *[Symlink(f"root/usr/share/doc/p{n}/NEWS", "copyright") for n in range(20)],
)


def picture(top: Path) -> dict[str, tuple[object, ...]]:
    """Everything that one can see of a tree but inode numbers, atime and ctime."""
    seen: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(top):
        for name in [*folders, *files, "."]:
            path = Path(folder) / name if name != "." else Path(folder)
            found = os.lstat(path)
            content: bytes | str = b""
            if stat.S_ISREG(found.st_mode):
                content = hashlib.sha256(get(path)).digest()
            elif stat.S_ISLNK(found.st_mode):
                content = os.readlink(path)
            xattrs = {
                key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
            }
            size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
            facts = (found.st_mode, found.st_uid, found.st_gid, found.st_nlink, found.st_rdev, size, found.st_mtime_ns)
            seen[str(path.relative_to(top))] = (*facts, content, xattrs)
    return seen


@behaviour(seeds=ROOT)
def tree_is_removed_completely(d: Place) -> None:
    shutil.rmtree(d / "root")
    assert names(d.path) == []
    assert os.stat(d.path).st_nlink == 2
    os.mkdir(d / "root")
    assert names(d / "root") == []


@behaviour(seeds=ROOT)
def tree_is_removed_by_rm(d: Place) -> None:
    subprocess.run(["rm", "-rf", d / "root/usr/share/doc", d / "root/etc"], check=True)
    assert names(d / "root/usr/share") == []
    expect_errno(errno.ENOENT, os.stat, d / "root/usr/share/doc/p3/copyright")
    assert "etc" not in names(d / "root")
    assert len(get(d / "root/usr/lib/big.so")) == 5 << 20


@behaviour(seeds=ROOT)
def tree_survives_being_moved(d: Place) -> None:
    before = picture(d / "root")
    os.mkdir(d / "new")
    os.rename(d / "root", d / "new/place")
    assert picture(d / "new/place") == before


@behaviour(seeds=ROOT)
def tree_survives_a_round_of_touching(d: Place) -> None:
    # Every file becomes the container's own; nothing that one can see may change but what was changed.
    before = picture(d / "root")
    for name, facts in before.items():
        path = d / "root" / name
        if stat.S_ISREG(int(str(facts[0]))):
            patch(path, 0, get(path)[:1])
            if name.endswith("ping"):
                os.setxattr(path, CAPABILITY, capability(13))  # the write dropped it
            os.utime(path, ns=(SEED_TIME, SEED_TIME))
    assert picture(d / "root") == before


@behaviour(seeds=ROOT)
def tree_is_chowned_recursively(d: Place) -> None:
    before = picture(d / "root")
    subprocess.run(["chown", "-hR", "20001:20002", d / "root"], check=True)
    after = picture(d / "root")
    assert set(after) == set(before)
    assert {(facts[1], facts[2]) for facts in after.values()} == {(20001, 20002)}
    assert {name: facts[7] for name, facts in after.items()} == {name: facts[7] for name, facts in before.items()}
    assert {name: facts[3] for name, facts in after.items()} == {name: facts[3] for name, facts in before.items()}
    assert mode_of(d / "root/usr/bin/su") == 0o755


@behaviour(seeds=ROOT)
def tree_is_archived_and_extracted(d: Place) -> None:
    before = picture(d / "root")
    os.mkdir(d / "copy")
    flags = ["--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "-S"]
    archive = subprocess.run(["tar", "-C", d / "root", *flags, "-cf", "-", "."], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-C", d / "copy", *flags, "-xpf", "-"], input=archive, check=True, capture_output=True)
    assert picture(d / "copy") == before
    assert picture(d / "root") == before


@behaviour(seeds=ROOT)
def tree_is_copied_by_cp(d: Place) -> None:
    subprocess.run(["cp", "-a", d / "root", d / "copy"], check=True)
    assert picture(d / "copy") == picture(d / "root")
    append(d / "copy/etc/passwd", b"new:x:1:1::/:/bin/sh\n")
    assert get(d / "root/etc/passwd") == b"root:x:0:0::/root:/bin/sh\n"


@behaviour(seeds=ROOT)
def tree_is_overwritten_by_extraction(d: Place) -> None:
    archive = subprocess.run(["tar", "-C", d / "root", "-cf", "-", "."], check=True, capture_output=True).stdout
    append(d / "root/etc/passwd", b"changed\n")
    os.unlink(d / "root/usr/bin/perl")
    shutil.rmtree(d / "root/usr/share/doc")
    subprocess.run(["tar", "-C", d / "root", "-xpf", "-"], input=archive, check=True, capture_output=True)
    assert get(d / "root/etc/passwd") == b"root:x:0:0::/root:/bin/sh\n"
    assert names(d / "root/usr/share/doc/p7") == ["NEWS", "copyright"]
    assert os.stat(d / "root/usr/bin/perl").st_ino == os.stat(d / "root/usr/lib/perl/perl").st_ino
    assert os.stat(d / "root/usr/bin/perl5").st_nlink == 3


@behaviour(seeds=ROOT)
def tree_upgrade_as_dpkg_does_it(d: Place) -> None:
    # New file beside the old, backup link, rename over, remove the backup.
    for name in ("usr/bin/su", "usr/bin/perl", "etc/conf.d/a.conf", "usr/share/doc/p1/copyright"):
        path, new, old = (d / "root" / (name + suffix) for suffix in ("", ".dpkg-new", ".dpkg-tmp"))
        mode = mode_of(path)
        put(new, b"version 2")
        os.chown(new, 0, 0)
        os.chmod(new, mode)
        os.link(path, old)
        os.rename(new, path)
        os.unlink(old)
        assert get(path) == b"version 2"
        assert mode_of(path) == mode
    assert get(d / "root/usr/bin/perl5") == b"#!perl" * 1000
    assert os.stat(d / "root/usr/bin/perl5").st_nlink == 2
    assert names(d / "root/etc/conf.d") == ["a.conf", "b.conf"]


@behaviour(seeds=ROOT)
def tree_account_files_are_replaced(d: Place) -> None:
    # useradd: copy with '+', fsync, rename, '-' backup as hard link
    etc = d / "root/etc"
    os.link(etc / "passwd", etc / "passwd-")
    put(etc / "passwd+", get(etc / "passwd") + b"new:x:1000:1000::/home/new:/bin/sh\n")
    os.rename(etc / "passwd+", etc / "passwd")
    assert get(etc / "passwd").count(b"\n") == 2
    assert get(etc / "passwd-").count(b"\n") == 1
    assert os.stat(etc / "passwd-").st_nlink == 1


@behaviour(seeds=ROOT)
def tree_symlink_swapped_for_directory(d: Place) -> None:
    os.mkdir(d / "root/lib.new")
    put(d / "root/lib.new/own.so", b"own")
    os.unlink(d / "root/lib")
    os.rename(d / "root/lib.new", d / "root/lib")
    assert names(d / "root/lib") == ["own.so"]
    assert "big.so" in names(d / "root/usr/lib")


@behaviour(seeds=ROOT)
def tree_directory_swapped_for_symlink(d: Place) -> None:
    os.rename(d / "root/etc/conf.d", d / "root/var/conf.d")
    os.symlink("../var/conf.d", d / "root/etc/conf.d")
    append(d / "root/etc/conf.d/a.conf", b"a=2\n")
    assert get(d / "root/var/conf.d/a.conf") == b"a=1\na=2\n"


@behaviour(seeds=ROOT)
def tree_big_file_changed_in_place(d: Place) -> None:
    patch(d / "root/usr/lib/big.so", 3 << 20, b"PATCH")
    content = bytearray(BIG)
    content[3 << 20 : (3 << 20) + 5] = b"PATCH"
    assert get(d / "root/lib/big.so") == bytes(content)
    os.truncate(d / "root/usr/lib/big.so", 1 << 20)
    assert get(d / "root/usr/lib/big.so") == BIG[: 1 << 20]


@behaviour(seeds=ROOT)
def tree_seeds_in_every_directory_gain_a_neighbour(d: Place) -> None:
    before = picture(d / "root")
    folders = [name for name, facts in before.items() if stat.S_ISDIR(int(str(facts[0])))]
    for name in folders:
        put(d / "root" / name / "added", name.encode())
    after = picture(d / "root")
    assert len(after) == len(before) + len(folders)
    assert all(after[name] == before[name] for name in before if name not in folders)
    for name in folders:
        os.unlink(d / "root" / name / "added")
        os.utime(d / "root" / name, ns=(SEED_TIME, SEED_TIME))
    assert picture(d / "root") == before


@behaviour(seeds=ROOT)
def tree_walked_by_find_is_complete(d: Place) -> None:
    done = subprocess.run(["find", d / "root", "-printf", "%y %P\n"], check=True, capture_output=True, text=True)
    found = [line.split(" ") for line in done.stdout.splitlines()]
    letters = {File: "f", HardLink: "f", Symlink: "l", CharDev: "c", BlockDev: "b", Fifo: "p", Dir: "d"}
    expected = {Path(seed.path).relative_to("root"): letters[type(seed)] for seed in ROOT}
    folders = {parent: "d" for path in expected for parent in path.parents}
    everything = {str(path) if path.name else "": kind for path, kind in (folders | expected).items()}
    assert sorted(found) == sorted([kind, path] for path, kind in everything.items())


@behaviour(seeds=[File(f"m/f{n:03}", b"%03d" % n, mode=0o600 + n % 8) for n in range(300)])
def each_of_300_seeds_is_copied_on_write(d: Place) -> None:
    inos = [os.stat(d / f"m/f{n:03}").st_ino for n in range(300)]
    for number in range(300):
        append(d / f"m/f{number:03}", b"+")
    for number in range(300):
        found = os.stat(d / f"m/f{number:03}")
        assert get(d / f"m/f{number:03}") == b"%03d+" % number
        assert (found.st_ino, stat.S_IMODE(found.st_mode)) == (inos[number], 0o600 + number % 8)
    assert len(names(d / "m")) == 300


@behaviour(seeds=[File("a/f", b"one"), File("a/g", b"two"), File("a/h", b"three")])
def seeds_renamed_over_seeds(d: Place) -> None:
    os.rename(d / "a/f", d / "a/g")
    os.rename(d / "a/g", d / "a/h")
    assert names(d / "a") == ["h"]
    assert get(d / "a/h") == b"one"
    put(d / "a/f", b"new")
    assert get(d / "a/f") == b"new"


@behaviour(seeds=[File("a/x/f", b"ax"), File("b/x/f", b"bx"), File("b/x/g", b"g")])
def seed_directories_trade_names(d: Place) -> None:
    os.rename(d / "a", d / "tmp")
    os.rename(d / "b", d / "a")
    os.rename(d / "tmp", d / "b")
    assert (get(d / "a/x/f"), get(d / "b/x/f")) == (b"bx", b"ax")
    append(d / "b/x/f", b"+")
    append(d / "a/x/g", b"+")
    assert (get(d / "b/x/f"), get(d / "a/x/g"), get(d / "a/x/f")) == (b"ax+", b"g+", b"bx")
    assert (names(d / "a/x"), names(d / "b/x")) == (["f", "g"], ["f"])


@behaviour(seeds=[File("pool/d1/f", b"1"), File("pool/d2/f", b"2"), File("pool/d3/deep/f", b"3")])
def seed_directories_regrouped(d: Place) -> None:
    os.rename(d / "pool/d1", d / "pool/d2/d1")
    os.rename(d / "pool/d2", d / "pool/d3/deep/d2")
    os.unlink(d / "pool/d3/deep/d2/f")
    append(d / "pool/d3/deep/d2/d1/f", b"+")
    assert get(d / "pool/d3/deep/d2/d1/f") == b"1+"
    assert names(d / "pool") == ["d3"]
    assert names(d / "pool/d3/deep") == ["d2", "f"]
    shutil.rmtree(d / "pool/d3/deep/d2")
    assert get(d / "pool/d3/deep/f") == b"3"
    assert os.stat(d / "pool/d3/deep").st_nlink == 2


@behaviour(seeds=[File("work/a/one", b"1"), File("work/a/two", b"2"), File("work/b/three", b"3")])
def eight_processes_in_one_tree(d: Place) -> None:
    def work(number: int) -> None:
        for turn in range(10):
            mine = f"work/a/own{number}"
            put(mine, b"%d" % turn)
            append("work/a/one", b"x")
            os.rename(mine, f"work/b/own{number}")
            os.mkdir(f"work/d{number}")
            os.rename(f"work/b/own{number}", f"work/d{number}/f")
            assert get(f"work/d{number}/f") == b"%d" % turn
            shutil.rmtree(f"work/d{number}")

    children = [d.start(work, number) for number in range(8)]
    for child in children:
        child.result()
    assert get(d / "work/a/one") == b"1" + b"x" * 80
    assert (names(d / "work"), names(d / "work/a"), names(d / "work/b")) == (["a", "b"], ["one", "two"], ["three"])


@behaviour(seeds=[File("a/f", b"seed" * 1000)])
def first_write_by_eight_processes_at_once(d: Place) -> None:
    def work(number: int) -> None:
        patch("a/f", number * 100, b"%d" % number)

    children = [d.start(work, number) for number in range(8)]
    for child in children:
        child.result()
    expected = bytearray(b"seed" * 1000)
    for number in range(8):
        expected[number * 100] = ord(str(number))
    assert get(d / "a/f") == bytes(expected)
