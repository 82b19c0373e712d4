"""Real use: a Debian 12 root as the template, and what administrators and programs do in a container of it.

The tests share one container and follow each other as its life does; each works alone, too. What they leave is found
again, to the last attribute, by the remount test at the end, and told exactly by ``diff``.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engines import ENGINES
from tests.realuse_helpers import (
    Item,
    Rig,
    bound,
    chroot,
    clean,
    debian_tree,
    differences,
    manifest,
    run,
    unmount_below,
)
from vzfs import Container

pytestmark = pytest.mark.slow

NOT_OURS = frozenset({"proc", "dev/pts"})
"""Other file systems while programs run."""


@dataclass(frozen=True, slots=True)
class Life:
    """The container that is used, and one beside it that isn't."""

    rig: Rig
    container: Container
    root: Path
    idle: Container
    idle_root: Path

    def sh(self, script: str, *, code: int = 0) -> str:
        """Run a shell script inside."""
        with bound(self.root):
            return chroot(self.root, script, code=code)

    def install(self, *packages: str) -> None:
        """Install Debian packages, those which are installed already at no cost."""
        self.sh(
            '[ -n "$(ls /var/lib/apt/lists/*Packages* 2>/dev/null)" ] || apt-get -q update\n'
            f"apt-get -q install -y --no-install-recommends {' '.join(packages)}"
        )

    def user(self) -> str:
        """An ordinary user inside."""
        self.sh("id worker 2>/dev/null || useradd --create-home --shell /bin/sh worker")
        return "worker"


@pytest.fixture(scope="module", params=ENGINES)
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    place = tmp_path_factory.mktemp("real-use")
    rig = Rig(place, request.param)
    try:
        rig.template("debian", debian_tree())
        container, root = rig.mounted(101, "debian")
        idle, idle_root = rig.mounted(102, "debian")
        (root / "etc/resolv.conf").write_bytes(Path("/etc/resolv.conf").read_bytes())
        proxy = run("apt-config", "dump", "Acquire::http::Proxy", "Acquire::https::Proxy")
        (root / "etc/apt/apt.conf.d/99node").write_text(proxy + 'Acquire::Retries "5";\n')
        yield Life(rig, container, root, idle, idle_root)
        rig.finish()
    finally:
        unmount_below(place)
        shutil.rmtree(place, ignore_errors=True)


def test_packages_are_installed_and_verify(life: Life) -> None:
    life.install("gcc", "libc6-dev", "less", "file", "zip", "python3-minimal", "sqlite3", "libcap2-bin", "iputils-ping")
    assert "cap_net_raw=ep" in life.sh("getcap /bin/ping")
    assert "ELF 64-bit" in life.sh("file -L /bin/ping")
    assert life.sh("dpkg --verify") == ""
    assert life.sh("dpkg --audit") == ""


def test_a_downloaded_package_comes_and_goes(life: Life) -> None:
    life.sh("ls /var/lib/apt/lists/*Packages* || apt-get -q update")
    before = manifest(life.root / "usr/bin")
    life.sh("cd /tmp && apt-get -q download hello && dpkg -i hello_*.deb && rm hello_*.deb")
    assert life.sh("hello") == "Hello, world!\n"
    assert life.sh("dpkg --verify hello") == ""
    life.sh("dpkg --purge hello")
    assert differences(before, manifest(life.root / "usr/bin"), but=frozenset({"mtime_ns"})) == []
    assert not (life.root / "usr/share/doc/hello").exists()


def test_users_come_work_and_go(life: Life) -> None:
    life.sh("useradd --create-home --shell /bin/sh --groups adm,staff guest && echo guest:secret | chpasswd")
    assert "staff" in life.sh("su - guest -c id")
    life.sh("su - guest -c 'umask 027; mkdir work && echo mine >work/file && ln -s work/file link && cat link'")
    made = os.lstat(life.root / "home/guest/work/file")
    passwd = {line.split(":")[0]: line.split(":") for line in (life.root / "etc/passwd").read_text().splitlines()}
    assert (str(made.st_uid), stat.S_IMODE(made.st_mode)) == (passwd["guest"][2], 0o640)
    life.sh("su guest -c 'cat /etc/shadow'", code=1)
    life.sh("su guest -c 'echo x >>/etc/passwd'", code=2)
    life.sh("su guest -c 'rm -f /bin/ls'", code=1)
    life.sh("chgrp adm /home/guest/work/file; chmod 640 /home/guest/work/file; chown root /home/guest/work/file")
    assert life.sh("su guest -c 'cat ~/work/file'") == "mine\n"
    life.sh("userdel --remove guest")
    assert not (life.root / "home/guest").exists()
    assert "guest" not in (life.root / "etc/shadow").read_text()


def test_capabilities_and_set_id_programs_work_when_executed(life: Life) -> None:
    life.install("libcap2-bin")
    user = life.user()
    life.sh("cp /bin/chown /usr/local/bin/give && setcap cap_chown+ep /usr/local/bin/give; touch /tmp/given")
    life.sh(f"su {user} -c 'chown {user} /tmp/given'", code=1)
    life.sh(f"su {user} -c '/usr/local/bin/give {user} /tmp/given'")
    assert life.sh("stat -c %U /tmp/given").strip() == user
    # A template's file gets and loses a capability: its data stays the template's.
    before = (life.root / "bin/mknod").read_bytes()
    life.sh("setcap cap_mknod+ep /bin/mknod && cd ~worker && su worker -c 'mknod node c 1 3' && echo x >node")
    life.sh("setcap -r /bin/mknod && cd ~worker && su worker -c 'mknod node2 c 1 3'", code=1)
    assert (life.root / "bin/mknod").read_bytes() == before
    life.sh("cp /usr/bin/id /usr/local/bin/id4 && chmod 4755 /usr/local/bin/id4")
    assert "euid=0(root)" in life.sh(f"su {user} -c /usr/local/bin/id4")
    life.sh("chmod u+s /usr/bin/id")
    assert "euid=0(root)" in life.sh(f"su {user} -c id")
    life.sh("chmod u-s /usr/bin/id")
    assert "euid" not in life.sh(f"su {user} -c id")


PROGRAM = r"""
#include <assert.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Maps argv[1] twice, writes through the shared mapping, reads through the other, a read() and a private one. */
int main(int argc, char **argv) {
    int fd = open(argv[1], O_RDWR);
    assert(fd >= 0);
    struct stat st;
    assert(!fstat(fd, &st) && st.st_size > 8192);
    char *one = mmap(0, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *two = mmap(0, st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    char *own = mmap(0, st.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    assert(one != MAP_FAILED && two != MAP_FAILED && own != MAP_FAILED);
    own[0] = '!';
    memcpy(one + 4090, "across the pages", 16);
    char text[16];
    assert(pread(fd, text, 16, 4090) == 16 && !memcmp(text, "across the pages", 16));
    assert(!memcmp(two + 4090, "across the pages", 16) && two[0] != '!');
    assert(!msync(one, st.st_size, MS_SYNC) && !fsync(fd));
    printf("mapped %lld bytes\n", (long long)st.st_size);
    return 0;
}
"""


def test_a_c_program_is_compiled_and_maps_files(life: Life) -> None:
    life.install("gcc", "libc6-dev")
    (life.root / "root/map.c").write_text(PROGRAM)
    life.sh("cd /root && gcc -O2 -Wall -Werror -o map map.c && ldd map")
    target = life.root / "usr/share/common-licenses/GPL-3"  # the template's
    size, ino = target.stat().st_size, target.stat().st_ino
    assert life.sh("/root/map /usr/share/common-licenses/GPL-3") == f"mapped {size} bytes\n"
    assert target.read_bytes()[4090:4106] == b"across the pages"
    assert target.read_bytes()[:1] != b"!"
    assert target.stat().st_ino == ino
    assert b"across" not in (life.idle_root / "usr/share/common-licenses/GPL-3").read_bytes()[4090:4106]
    life.sh("cd /root && head -c 100000 /dev/zero >new && ./map new && cp map copy && ./map copy")
    assert (life.root / "root/new").read_bytes()[4090:4106] == b"across the pages"


def test_a_database_with_shared_memory(life: Life) -> None:
    life.install("sqlite3")
    life.sh(
        "cd /root && rm -f db*\n"
        "sqlite3 db 'PRAGMA journal_mode=WAL; CREATE TABLE t (n INTEGER PRIMARY KEY, s TEXT)'\n"
        "for w in 1 2 3 4; do (for n in $(seq 25); do\n"
        "  sqlite3 -cmd '.timeout 200000' db \"INSERT INTO t (s) VALUES ('$w-$n')\"; done) & done; wait"
    )
    assert life.sh("cd /root && sqlite3 db 'SELECT count(*), count(DISTINCT s) FROM t; PRAGMA integrity_check'") == (
        "100|100\nok\n"
    )


def test_python_imports_and_compiles(life: Life) -> None:
    life.install("python3-minimal")
    life.sh(
        "mkdir -p /opt/app/pack && cd /opt/app && echo 'VALUE = 6' >pack/__init__.py\n"
        'for n in $(seq 200); do echo "from pack import VALUE; N = $n" >pack/m$n.py; done\n'
        "cat >run.py <<'END'\n"
        "import importlib, sys\n"
        "print(sum(importlib.import_module(f'pack.m{n}').N for n in range(1, 201)))\n"
        "END"
    )
    assert life.sh("cd /opt/app && python3 run.py") == "20100\n"
    compiled = list((life.root / "opt/app/pack/__pycache__").iterdir())
    assert len(compiled) == 201
    before = {path: path.stat().st_mtime_ns for path in compiled}
    assert life.sh("cd /opt/app && python3 run.py") == "20100\n"
    assert {path: path.stat().st_mtime_ns for path in compiled} == before, "compiled again: times of sources changed"


def test_alternatives_and_diversions(life: Life) -> None:
    original = (life.root / "bin/uname").read_bytes()
    life.sh(
        "dpkg-divert --local --rename --divert /bin/uname.real --add /bin/uname\n"
        "printf '#!/bin/sh\\necho diverted\\n' >/bin/uname && chmod 755 /bin/uname"
    )
    assert life.sh("uname") == "diverted\n"
    assert (life.root / "bin/uname.real").read_bytes() == original
    life.sh("rm /bin/uname && dpkg-divert --local --rename --remove /bin/uname")
    assert (life.root / "bin/uname").read_bytes() == original
    assert not (life.root / "bin/uname.real").exists()
    life.sh(
        "update-alternatives --install /usr/local/bin/lister lister /bin/ls 10\n"
        "update-alternatives --install /usr/local/bin/lister lister /bin/dir 20"
    )
    assert life.sh("readlink -f /usr/local/bin/lister") in ("/bin/dir\n", "/usr/bin/dir\n")
    life.sh("update-alternatives --set lister /bin/ls && update-alternatives --remove lister /bin/dir")
    assert life.sh("readlink -f /usr/local/bin/lister") in ("/bin/ls\n", "/usr/bin/ls\n")


def test_an_upgrade_keeps_or_replaces_changed_conffiles(life: Life) -> None:
    life.sh(
        "cd /tmp && for v in 1 2 3; do\n"
        "  mkdir -p p$v/DEBIAN p$v/etc/demo p$v/usr/lib/demo; echo /etc/demo/conf >p$v/DEBIAN/conffiles\n"
        "  printf 'Package: demo\\nVersion: %s\\nArchitecture: all\\nMaintainer: T <t@example.org>\\n"
        "Description: demo\\n' $v >p$v/DEBIAN/control\n"
        "  echo version $v >p$v/etc/demo/conf; echo $v >p$v/usr/lib/demo/data; echo $v >p$v/usr/lib/demo/only$v\n"
        "  ln p$v/usr/lib/demo/data p$v/usr/lib/demo/again\n"
        "  chmod -R u=rwX,go=rX p$v; dpkg-deb --root-owner-group -b p$v demo$v.deb; done"
    )
    life.sh("cd /tmp && dpkg -i demo1.deb && echo edited >>/etc/demo/conf && dpkg --force-confold -i demo2.deb")
    folder = life.root / "etc/demo"
    assert (folder / "conf").read_text() == "version 1\nedited\n"
    assert (folder / "conf.dpkg-dist").read_text() == "version 2\n"
    life.sh("cd /tmp && dpkg --force-confnew -i demo3.deb")
    assert (folder / "conf").read_text() == "version 3\n"
    assert (folder / "conf.dpkg-old").read_text() == "version 1\nedited\n"
    assert sorted(path.name for path in (life.root / "usr/lib/demo").iterdir()) == ["again", "data", "only3"]
    assert (life.root / "usr/lib/demo/again").stat().st_nlink == 2
    life.sh("dpkg --verify demo; rm -rf /tmp/p? /tmp/demo?.deb")


def large_tree(top: Path) -> None:
    """5,000 files of all kinds in 200 directories."""
    chance = random.Random(5000)
    for number in range(200):
        (top / f"d{number % 20}" / f"e{number}").mkdir(parents=True)
    folders = sorted(top.glob("d*/e*"))
    for number in range(5000):
        path = folders[number % 200] / f"{number}-{'x' * chance.randrange(200)}"
        choice = number % 50
        if choice == 0:
            path.symlink_to(f"../{'y' * chance.randrange(1, 100)}")
        elif choice == 1:
            os.link(folders[0] / max(os.listdir(folders[0])), path, follow_symlinks=False)
        elif choice == 2:
            os.mkfifo(path)
        else:
            path.write_bytes(chance.randbytes(chance.choice([0, 10, 1000, 5000, 20_000])))
            os.chmod(path, chance.choice([0o600, 0o644, 0o755, 0o4711, 0o2755]))
            os.utime(path, ns=(1, chance.randrange(10**18)))


def test_a_large_archive_is_extracted_exactly(life: Life, tmp_path: Path) -> None:
    large_tree(tmp_path / "tree")
    run("tar", "--format=posix", "-cf", life.root / "tmp/tree.tar", "-C", tmp_path, "tree")
    life.sh("mkdir -p /srv && cd /srv && rm -rf tree && tar -xpf /tmp/tree.tar && rm /tmp/tree.tar")
    before = manifest(tmp_path / "tree")
    assert len(before) >= 5200
    assert differences(before, manifest(life.root / "srv/tree"), but=frozenset({"ino"})) == []


def test_documentation_is_removed(life: Life) -> None:
    assert len(list((life.root / "usr/share/doc").rglob("*"))) > 100
    life.sh("rm -rf /usr/share/doc")
    assert not (life.root / "usr/share/doc").exists()
    assert "doc" not in os.listdir(life.root / "usr/share")
    assert len(list((life.idle_root / "usr/share/doc").rglob("*"))) > 100
    assert (life.rig.root / "template/debian/usr/share/doc").is_dir()


def test_all_of_it_is_found_after_a_remount(life: Life) -> None:
    before = manifest(life.root)
    life.container.umount()
    assert life.container.check() == []
    clean(life.container)
    assert life.container.mount() == life.root
    assert differences(before, manifest(life.root)) == []
    assert life.sh("dpkg --audit") == ""


def what_differs(old: Item, new: Item) -> set[str]:
    """The words of ``Change.what`` for two items."""
    if old.type != new.type:
        return {"type"}
    word = {"symlink": "target", "char": "device", "block": "device"}.get(new.type, "content")
    same = {
        word: old.content == new.content,
        "mode": old.mode == new.mode,
        "owner": old.owner == new.owner,
        "times": old.mtime_ns == new.mtime_ns,
        "xattrs": old.xattrs == new.xattrs,
    }
    return {word for word, equal in same.items() if not equal}


def test_diff_tells_exactly_what_happened(life: Life) -> None:
    old, new = manifest(life.rig.root / "template/debian"), manifest(life.root)
    changes = list(life.container.diff())
    told: dict[str, set[str]] = {"added": set(), "removed": set(), "changed": set()}
    for change in changes:
        if change.kind == "renamed":
            assert change.old_path is not None
            told["removed"].add(change.old_path)
            told["added"].add(change.path)
        else:
            told[change.kind].add(change.path)
    names = {path: "/" + path for path in old.keys() | new.keys()}
    assert told["added"] == {names[path] for path in new.keys() - old.keys()}
    assert told["removed"] == {names[path] for path in old.keys() - new.keys()}
    assert told["changed"] == {names[path] for path in old.keys() & new.keys() if what_differs(old[path], new[path])}
    for change in changes:
        if change.kind == "changed":
            path = change.path.removeprefix("/")
            assert set(change.what) - {"links"} == what_differs(old[path], new[path]), path
            assert change.type == new[path].type


def test_nobody_else_noticed(life: Life) -> None:
    but = frozenset({"ino"})
    template = manifest(life.rig.root / "template/debian")
    assert differences(template, manifest(life.idle_root), but=but) == []
    assert list(life.idle.diff()) == []
    life.idle.umount()
    clean(life.idle)
    used = int(run("du", "-s", "-k", life.idle.path).split()[0])
    assert used <= 80, f"an unused container takes {used} KiB"
    assert life.rig.store.template("debian").verify() == []
