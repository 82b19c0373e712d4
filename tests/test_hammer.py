"""Two containers of one template, eight processes at once: each finds what it left, nobody finds another's.

Every process keeps a model of its own folder and compares after each change that it can see; in folders that all use
it may only meet errors that the race explains. What is left is compared with the models again, after a remount.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.realuse_helpers import (
    Rig,
    alive,
    clean,
    differences,
    manifest,
    rig_fixture,  # noqa: F401
    small_tree,
    together,
)

PROCESSES = 4
"""In each of the two containers."""
OPERATIONS = 1000
"""Of each process."""
FILES = 60
RACES = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EPERM}
"""What may be answered where another process changes the same names, directories among them."""


class Worker:
    """One process: its own folder, whose model it keeps, and the folders of all."""

    def __init__(self, root: Path, tag: str, place: str) -> None:
        self.root = root
        self.tag = tag
        self.top = root / place
        self.chance = random.Random(tag)
        self.files = {path.name: path.read_bytes() for path in self.top.iterdir() if path.is_file()}
        self.modes = {name: stat.S_IMODE((self.top / name).stat().st_mode) for name in self.files}
        self.made = 0
        self.own = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("own_")]
        self.shared = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("shared_")]

    def run(self, count: int) -> None:
        """Make ``count`` changes, two of three in the own folder."""
        for number in range(count):
            if number % 3 < 2:
                self.chance.choice(self.own)()
            else:
                try:
                    self.chance.choice(self.shared)(self.path_for_all(), self.path_for_all())
                except OSError as error:
                    if error.errno not in RACES:
                        raise
        self.verify()
        # A name that the template has not, so that it can be read back after the remount.
        (self.root / "tmp" / f"model-{self.tag}").write_text(
            json.dumps({name: [data.hex(), self.modes[name]] for name, data in self.files.items()})
        )

    def verify(self) -> None:
        """All of the own folder is as the model says."""
        assert {path.name for path in self.top.iterdir() if path.is_file()} == set(self.files)
        for name in self.files:
            self.check(name)

    def check(self, name: str) -> None:
        assert (self.top / name).read_bytes() == self.files[name], f"{self.tag}: {name}"
        assert stat.S_IMODE((self.top / name).stat().st_mode) == self.modes[name], f"{self.tag}: {name}"

    def any_file(self) -> str:
        return self.chance.choice(sorted(self.files)) if self.files else self.own_create()

    def content(self) -> bytes:
        return f"{self.tag} {self.made} ".encode() * self.chance.choice([1, 20, 500, 6000])

    def own_create(self) -> str:
        self.made += 1
        name = f"made-{self.tag}-{self.made}"
        fd = os.open(self.top / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640)
        self.files[name] = self.content()
        with open(fd, "wb") as file:
            file.write(self.files[name])
        self.modes[name] = 0o640
        return name

    def own_rewrite(self) -> None:
        name = self.any_file()
        self.files[name] = self.content()
        (self.top / name).write_bytes(self.files[name])

    def own_append(self) -> None:
        name = self.any_file()
        with open(self.top / name, "ab") as file:
            file.write(b"appended")
        self.files[name] += b"appended"
        self.check(name)

    def own_overwrite_a_part(self) -> None:
        name = self.any_file()
        position = self.chance.randrange(10_000)
        with open(self.top / name, "r+b") as file:
            file.seek(position)
            file.write(b"part")
        old = self.files[name]
        self.files[name] = old[:position].ljust(position, b"\0") + b"part" + old[position + 4 :]
        self.check(name)

    def own_chmod(self) -> None:
        name = self.any_file()
        self.modes[name] = self.chance.choice([0o600, 0o644, 0o755, 0o4711])
        os.chmod(self.top / name, self.modes[name])
        self.check(name)

    def own_rename(self) -> None:
        name, other = self.any_file(), self.any_file()
        if name == other:
            return
        if self.chance.randrange(2):
            self.made += 1
            other = f"renamed-{self.tag}-{self.made}"
        os.rename(self.top / name, self.top / other)
        self.files[other], self.modes[other] = self.files.pop(name), self.modes.pop(name)
        self.check(other)
        assert not (self.top / name).exists()

    def own_unlink(self) -> None:
        name = self.any_file()
        with open(self.top / name, "rb") as file:
            os.unlink(self.top / name)
            assert file.read() == self.files.pop(name)
        del self.modes[name]

    def own_tree(self) -> None:
        place = self.top / f"tree-{self.made}"
        for folder in ("a/b/c", "a/d"):
            (place / folder).mkdir(parents=True)
        for number in range(6):
            (place / "a/b/c" / f"{number}").write_bytes(self.tag.encode())
        os.rename(place / "a/b", place / "a/d/moved")
        assert sorted(os.listdir(place / "a/d/moved/c")) == ["0", "1", "2", "3", "4", "5"]
        shutil.rmtree(place)
        assert not place.exists()

    def own_link(self) -> None:
        name = self.any_file()
        other = self.top / f"link-{self.tag}"
        os.link(self.top / name, other)
        assert other.stat().st_ino == (self.top / name).stat().st_ino
        assert other.read_bytes() == self.files[name]
        with open(other, "ab") as file:
            file.write(b"!")
        self.files[name] += b"!"
        os.unlink(other)
        self.check(name)

    def own_read(self) -> None:
        self.check(self.any_file())

    def path_for_all(self) -> Path:
        return self.root / "shared" / self.chance.choice(["", "d", "d/e"]) / self.chance.choice("abcdefgh")

    def shared_create(self, path: Path, other: Path) -> None:
        path.write_bytes(self.tag[:2].encode() * 100)

    def shared_read(self, path: Path, other: Path) -> None:
        data = path.read_bytes()
        assert set(data.replace(b"appended", b"")) <= set(b"of the template" + self.tag[:2].encode() + b"\0"), data[:80]

    def shared_append(self, path: Path, other: Path) -> None:
        with open(path, "ab") as file:
            file.write(b"appended")

    def shared_unlink(self, path: Path, other: Path) -> None:
        os.unlink(path)

    def shared_rename(self, path: Path, other: Path) -> None:
        os.rename(path, other)

    def shared_mkdir(self, path: Path, other: Path) -> None:
        os.mkdir(path)

    def shared_rmdir(self, path: Path, other: Path) -> None:
        os.rmdir(path)

    def shared_chmod(self, path: Path, other: Path) -> None:
        os.chmod(path, 0o755)

    def shared_link(self, path: Path, other: Path) -> None:
        os.link(path, other)

    def shared_list(self, path: Path, other: Path) -> None:
        for entry in os.scandir(path.parent):
            with contextlib.suppress(FileNotFoundError):
                entry.stat(follow_symlinks=False)

    def shared_rmtree(self, path: Path, other: Path) -> None:
        if not self.chance.randrange(5):
            shutil.rmtree(path, ignore_errors=True)


def template_tree(top: Path) -> Path:
    """The small tree, a folder of files for each process, and folders for all."""
    small_tree(top)
    for number in range(PROCESSES):
        place = top / f"work/{number}"
        place.mkdir(parents=True)
        for name in range(FILES):
            (place / f"{name}").write_bytes(f"template {number} {name} ".encode() * (name * name))
    for folder in ("shared", "shared/d", "shared/d/e"):
        (top / folder).mkdir()
        for name in "abcf":
            (top / folder / name).write_bytes(b"of the template" * 1000)
    os.link(top / "shared/a", top / "shared/d/h")
    return top


def test_two_containers_and_eight_processes(rig: Rig) -> None:
    rig.template("hammered", template_tree(rig.place / "source"))
    containers = [rig.container(number, "hammered") for number in (101, 102)]
    idle = rig.container(103, "hammered")
    roots = [container.mount() for container in containers]
    works: list[Callable[[], None]] = []
    for root, name in zip(roots, ("AA", "BB"), strict=True):
        works += [Worker(root, f"{name}{number}", f"work/{number}").run for number in range(PROCESSES)]
    together(*[lambda work=work: work(OPERATIONS) for work in works])  # type: ignore[misc]
    seen = []
    for container, root in zip(containers, roots, strict=True):
        pid = container.status().pid
        assert pid
        assert alive(pid)
        seen.append(manifest(root))
        container.umount()
        clean(container)
        container.mount()
    for root, before, name, other in zip(roots, seen, ("AA", "BB"), ("BB", "AA"), strict=True):
        assert differences(before, manifest(root)) == []
        for number in range(PROCESSES):
            model = json.loads((root / f"tmp/model-{name}{number}").read_text())
            place = root / f"work/{number}"
            assert set(os.listdir(place)) == set(model)
            for file, (data, mode) in model.items():
                assert (place / file).read_bytes() == bytes.fromhex(data)
                assert stat.S_IMODE((place / file).stat().st_mode) == mode
        for path in root.rglob("*"):
            assert other not in path.name
            if path.is_file() and path.is_relative_to(root / "shared"):
                assert other.encode() not in path.read_bytes()
    with idle.mounted() as root:
        assert differences(manifest(rig.place / "source"), manifest(root), but=frozenset({"ino"})) == []
    assert rig.store.template("hammered").verify() == []


@pytest.mark.parametrize("first", ["write", "unlink", "chmod", "mkdir"])
def test_all_at_once_begin_in_the_same_folded_directory(rig: Rig, first: str) -> None:
    """The first changes in a directory race for its unfolding, and for the copy-up of one file; none may get lost."""
    container, root = rig.mounted()
    place = root / "usr/lib/deep"
    actions: dict[str, Callable[[int], object]] = {
        "write": lambda n: (place / f"{n:03}").write_text(f"by {n}"),
        "unlink": lambda n: os.unlink(place / f"{n:03}"),
        "chmod": lambda n: os.chmod(place / f"{n:03}", 0o700 + n),
        "mkdir": lambda n: os.mkdir(place / f"d{n}"),
    }

    def work(number: int) -> Callable[[], None]:
        def steps() -> None:
            actions[first](number)
            with open(place / "er/big", "r+b") as file:
                file.seek(number * 10)
                file.write(b"%010d" % number)
            with open(place / "same", "ab") as file:
                file.write(b"x" * 10)

        return steps

    together(*[work(number) for number in range(8)])
    assert (place / "er/big").read_bytes()[:80] == b"".join(b"%010d" % number for number in range(8))
    assert (root / "usr/bin/same").read_text() == "one inode\n" + "x" * 80
    for number in range(8):
        path = place / f"{number:03}"
        if first == "write":
            assert path.read_text() == f"by {number}"
        elif first == "unlink":
            assert not path.exists()
        elif first == "chmod":
            assert stat.S_IMODE(path.stat().st_mode) == 0o700 + number
        else:
            assert (place / f"d{number}").is_dir()
    assert len(os.listdir(place)) == 302 + {"unlink": -8, "mkdir": 8}.get(first, 0)
    container.umount()
    clean(container)
