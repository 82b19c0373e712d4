"""What containers do all day."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from benchmarks.workload import Cache, Group, Outcome, Place, Sizes, Skip, Step, Workload
from benchmarks.workloads.clients import ENVIRONMENT, measure, program

PAST = 1_600_000_000
"""Modification time of generated sources: older than any index or object file, so that no tool doubts what it noted."""


class Start(Workload):
    """Start programs in chroot, each once with names unknown to the kernel, then many times."""

    name = "start"
    title = "Start of programs in chroot"
    group = Group.CONTAINER
    needs_programs = True
    programs = (
        ("sh", ("/bin/sh", "-c", ":")),
        ("perl", ("/usr/bin/perl", "-e", "1")),
        ("python3", ("/usr/bin/python3", "-c", "1")),
        ("dpkg", ("/usr/bin/dpkg", "--version")),
    )
    steps = tuple(
        step
        for name, _ in programs
        for step in (
            Step(f"{name}-first", f"{name}, names dropped", Cache.DENTRIES),
            Step(name, f"{name} again", Cache.WARM),
        )
    )
    repetitions = 40

    def run(self, place: Place, step: Step) -> Outcome:
        name = step.name.removesuffix("-first")
        command = dict(self.programs)[name]
        if not os.path.lexists(f"{place.root}{command[0]}"):
            raise Skip(f"the template has no {command[0]}")
        times = 1 if step.name != name else place.sizes.scaled(self.repetitions, 5)
        return measure(place, program(*[command] * times, chroot=True))


class InstallPackage(Workload):
    """dpkg in chroot installing a package of 300 files, which lies in the template."""

    name = "install-package"
    title = "Install a package of 300 files in chroot"
    group = Group.CONTAINER
    writes = True
    needs_programs = True
    steps = (
        Step("install", "dpkg --install", Cache.FRESH),
        Step("remove", "dpkg --purge", Cache.ANY),
    )
    files = 300
    package = "bench/install-package/package.deb"

    def furnish(self, tree: Path, sizes: Sizes) -> None:
        if shutil.which("dpkg-deb") is None:
            return
        rng = random.Random(5)
        folder = (tree / self.package).parent
        content = folder / "content"
        (content / "DEBIAN").mkdir(parents=True)
        (content / "DEBIAN/control").write_text(
            "Package: vzfs-bench\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\n"
            "Description: files to be installed\n"
        )
        for number in range(sizes.scaled(self.files)):
            file = content / f"usr/share/vzfs-bench/part{number // 30:02d}/file{number:03d}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(rng.randbytes(rng.randrange(200, 20_000)))
        command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(content), str(tree / self.package)]
        subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
        shutil.rmtree(content)

    def run(self, place: Place, step: Step) -> Outcome:
        if not (place.stored / self.package).exists():
            raise Skip("the template was made without dpkg-deb: apt-get install dpkg")
        dpkg = ["/usr/bin/dpkg", "--force-unsafe-io"]  # what image builders do; fsync has a figure of its own
        what = ["--install", f"/{self.package}"] if step.name == "install" else ["--purge", "vzfs-bench"]
        done = measure(place, program([*dpkg, *what], output="none", chroot=True), whole=True)
        files = [path for path in sorted((place.root / "usr/share/vzfs-bench").rglob("*")) if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        return replace(done, proof=f"{len(files)} files of {size} bytes installed")


class Compile(Workload):
    """make(1) and the machine's own compiler building a program of 20 sources in a template directory."""

    name = "compile"
    title = "Compile a C project of 20 sources"
    group = Group.CONTAINER
    writes = True
    steps = (Step("make", "make", Cache.FRESH),)
    sources = 20
    folder = "bench/compile"

    def furnish(self, tree: Path, sizes: Sizes) -> None:
        folder = tree / self.folder
        folder.mkdir(parents=True)
        count = sizes.scaled(self.sources, 3)
        numbers = range(count)
        for number in numbers:
            functions = "\n".join(
                f"static int step{step}(int x) {{ return x * {step + 3} + {number}; }}" for step in range(20)
            )
            calls = " + ".join(f"step{step}(x)" for step in range(20))
            (folder / f"part{number}.h").write_text(f"int part{number}(int x);\n")
            (folder / f"part{number}.c").write_text(
                f'#include <stdio.h>\n#include <stdlib.h>\n#include "part{number}.h"\n'
                f"{functions}\nint part{number}(int x) {{ return {calls}; }}\n"
            )
        includes = "\n".join(f'#include "part{number}.h"' for number in numbers)
        calls = " + ".join(f"part{number}(1)" for number in numbers)
        (folder / "main.c").write_text(
            f'#include <stdio.h>\n{includes}\nint main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
        )
        objects = " ".join(["main.o", *(f"part{number}.o" for number in numbers)])
        (folder / "Makefile").write_text(f"program: {objects}\n\t$(CC) -o $@ $^\n%.o: %.c\n\t$(CC) -O1 -c -o $@ $<\n")
        _age(folder)

    def prepare(self, place: Place) -> None:
        for tool in ("make", "gcc"):
            if shutil.which(tool) is None:
                raise Skip(f"{tool} is not installed: apt-get install {tool}")

    def run(self, place: Place, step: Step) -> Outcome:
        command = ["/usr/bin/make", "--silent", "-C", self.folder, "CC=gcc"]
        done = measure(place, program(command), whole=True)
        built = subprocess.run([place.root / self.folder / "program"], capture_output=True, text=True, check=True)
        return replace(done, proof=f"{done.proof}; the program says {built.stdout.strip()}")


class GitStatus(Workload):
    """git status in a repository of 5,000 files that came with the template, once its index knows the container."""

    name = "git-status"
    title = "git status in a repository of 5,000 files"
    group = Group.CONTAINER
    writes = True
    steps = (
        Step("first", "names dropped", Cache.DENTRIES),
        Step("again", "again", Cache.WARM),
    )
    folder = "bench/git-status"
    per_folder = 50
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "safe.directory=*")

    def furnish(self, tree: Path, sizes: Sizes) -> None:
        if shutil.which("git") is None:
            return
        folder = tree / self.folder
        rng = random.Random(6)
        for number in range(sizes.lookups):
            file = folder / f"part{number // self.per_folder:03d}" / f"source{number % self.per_folder:02d}.c"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"/* %d */\n" % number + rng.randbytes(rng.randrange(40, 800)).hex().encode())
        _age(folder)
        for command in (
            ("init", "--quiet", "--initial-branch=main"),
            ("add", "--all"),
            ("commit", "--quiet", "--message=all"),
            ("repack", "-a", "-d", "--quiet"),
        ):
            self._git(folder, *command)

    def prepare(self, place: Place) -> None:
        if shutil.which("git") is None or not (place.stored / self.folder / ".git").exists():
            raise Skip("the template was made without git: apt-get install git")
        # Device, inode and change time differ from what the index noted: this reads all files and writes a new one.
        self._git(place.root / self.folder, "status", "--porcelain")

    def run(self, place: Place, step: Step) -> Outcome:
        command = ["/usr/bin/git", *self.identity, "-C", self.folder, "status", "--porcelain", "--branch"]
        found = measure(place, program(command), whole=True)
        names = place.sizes.lookups if step.cache is Cache.DENTRIES else 0
        return replace(found, operations=1, names=names)

    def _git(self, folder: Path, *command: str) -> None:
        git = ["git", *self.identity, "-C", str(folder), *command]
        done = subprocess.run(git, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"git {command[0]}: {done.stderr.strip()}")


def _age(folder: Path) -> None:
    """Give everything in ``folder`` a modification time long ago."""
    for path in folder.rglob("*"):
        os.utime(path, (PAST, PAST))
