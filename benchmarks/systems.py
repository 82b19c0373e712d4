"""The systems that are compared: what each needs, how it is mounted over the template, how it goes away.

To add one, write a small class and put it into ``SYSTEMS``. Rules: every mount is fresh, with nothing changed; options
are those that a careful user would take for a container root (ownership kept, caching on), no tricks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import ClassVar

from benchmarks.workload import Skip
from vzfs import Container, Store
from vzfs.errors import NotMountedError, UnsupportedError
from vzfs.fuse.table import mount_table

MOUNT_TIMEOUT_S = 20.0
DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM")
"""Before a command: its process gets SIGTERM when the one that started it ends, however that happens."""
MOST_COPIES = 3
"""Plain copies of the template at once; more would say nothing but "as much again"."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What the suite made for all systems, on one disk file system.

    ``tree``: the template as plain files, never changed: the lower directory of everything that has one. ``folder``:
    for what a system keeps as long as this template is used. ``changed``: whether some workload will write to it.
    """

    tree: Path
    folder: Path
    template: str
    changed: bool = True


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted system: see ``Place`` for the fields. ``handle`` is the system's own."""

    root: Path
    stored: Path
    kept: tuple[Path, ...] = ()
    servers: tuple[int, ...] = ()
    handle: object = field(default=None, compare=False)


class System(ABC):
    """One system."""

    name: ClassVar[str]
    """As on the command line."""
    title: ClassVar[str]
    command: ClassVar[str]
    """How it is mounted, as a user would type it."""
    writable: ClassVar[bool] = True
    """Whether it can be written to without changing the template."""
    peer: ClassVar[bool] = True
    """Whether it is what a user could pick instead of vzfs."""

    @abstractmethod
    def missing(self) -> str | None:
        """Why it can't be measured here, with the remedy; None when it can."""

    @abstractmethod
    def version(self) -> str:
        """Its version."""

    def set_up(self, ground: Ground) -> None:  # noqa: B027
        """Once before the first mount on ``ground``: copy or import the template. May take long; mounts nothing."""

    def try_out(self, ground: Ground) -> None:  # noqa: B027
        """Once after ``set_up``: mount and unmount, where a kernel may refuse it. Not interrupted, as ``mount``."""

    def furnish(self, ground: Ground, place: Path) -> None:  # noqa: B027
        """Before ``mount`` at the same ``place``: what takes long. Leaves nothing but files there."""

    @abstractmethod
    def mount(self, ground: Ground, place: Path) -> Mount:
        """Mount one more container; ``place`` is a new folder for everything it needs.

        A signal waits until this is done and noted for ``unmount``, so that nothing mounted is forgotten.
        """

    @abstractmethod
    def unmount(self, mount: Mount) -> None:
        """Unmount it and wait until its servers have ended. The folder is removed by the caller."""

    def restore(self, ground: Ground) -> None:  # noqa: B027
        """After a workload that writes: undo its changes where they did not go into ``place``."""


# ---- kernel file systems ---------------------------------------------------------------------------------------------


class Ext4(System):
    """The disk's file system itself: the limit. A plain copy of the template, mounted as it is (bind)."""

    name = "ext4"
    title = "ext4 (plain copy)"
    command = "cp -a TEMPLATE COPY; mount --bind COPY ROOT"
    peer = False

    def __init__(self) -> None:
        self._copies: list[Path] = []

    def missing(self) -> str | None:
        """Only restoring needs a program."""
        return None if shutil.which("rsync") else "rsync is not installed; apt-get install rsync"

    def version(self) -> str:
        """That of the kernel."""
        return os.uname().release

    def set_up(self, ground: Ground) -> None:
        """Copy the template, unless nobody will write to it."""
        if ground.changed:
            run("cp", "-a", ground.tree, self._copy(ground))

    def furnish(self, ground: Ground, place: Path) -> None:
        """A copy of its own for each further mount at the same time."""
        if len(self._copies) >= MOST_COPIES:
            raise Skip("each further plain copy takes as much time and space as the template")
        if self._copies:
            run("cp", "-a", ground.tree, place / "copy")

    def mount(self, ground: Ground, place: Path) -> Mount:
        """The copy, or that of its own."""
        copy = self._copy(ground) if ground.changed else ground.tree
        if self._copies:
            copy = place / "copy"
        root = made(place / "root")
        run("mount", "--bind", copy, root)
        self._copies.append(root)
        return Mount(root, copy, handle=copy)

    def unmount(self, mount: Mount) -> None:
        """Unmount it; the copy stays."""
        unmount(mount.root)
        self._copies.remove(mount.root)

    def restore(self, ground: Ground) -> None:
        """Make the copy equal to the template again."""
        if ground.changed:
            run("rsync", "-aHAX", "--delete", "--modify-window=-1", f"{ground.tree}/", f"{self._copy(ground)}/")

    @staticmethod
    def _copy(ground: Ground) -> Path:
        return ground.folder / "ext4"


class Overlayfs(System):
    """The kernel's overlayfs."""

    name = "overlayfs"
    title = "overlayfs (kernel)"
    command = "mount -t overlay -o lowerdir=TEMPLATE,upperdir=UPPER,workdir=WORK overlay ROOT"

    def missing(self) -> str | None:
        """The kernel has it, or can load it."""
        if "overlay" not in Path("/proc/filesystems").read_text().split():
            subprocess.run(["modprobe", "--quiet", "overlay"], check=False)
        have = "overlay" in Path("/proc/filesystems").read_text().split()
        return None if have else "this kernel has no overlayfs"

    def version(self) -> str:
        """That of the kernel."""
        return os.uname().release

    def mount(self, ground: Ground, place: Path) -> Mount:
        """A fresh upper directory over the template."""
        upper, work, root = made(place / "upper"), made(place / "work"), made(place / "root")
        options = f"lowerdir={ground.tree},upperdir={upper},workdir={work}"
        run("mount", "-t", "overlay", "-o", options, "overlay", root)
        return Mount(root, ground.tree, (upper, work))

    def unmount(self, mount: Mount) -> None:
        """Unmount it."""
        unmount(mount.root)


# ---- FUSE file systems of others -------------------------------------------------------------------------------------


class FuseProgram(System):
    """A FUSE file system that is one program, kept in the foreground."""

    program: ClassVar[str]
    package: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]
    """What follows the program's name; {lower}, {upper}, {work} and {root} are replaced."""

    def missing(self) -> str | None:
        """The program and the device."""
        if shutil.which(self.program) is None:
            return f"{self.program} is not installed; apt-get install {self.package}"
        return None if os.path.exists("/dev/fuse") else "there is no /dev/fuse; modprobe fuse"

    def version(self) -> str:
        """What the program says."""
        output = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=False)
        own = [line for line in (output.stdout + output.stderr).splitlines() if self.program in line]
        found = re.search(r"\d+(\.\d+)+", " ".join(own))
        return found[0] if found else "unknown"

    def mount(self, ground: Ground, place: Path) -> Mount:
        """Start the program and wait until the kernel has the mount and the program answers."""
        upper, work, root = made(place / "upper"), made(place / "work"), made(place / "root")
        values = {"lower": ground.tree, "upper": upper, "work": work, "root": root}
        command = [*DIES_WITH_PARENT, self.program, *(argument.format(**values) for argument in self.arguments)]
        log = place / "log"
        with log.open("wb") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        kept = tuple(path for name, path in (("upper", upper), ("work", work)) if self._uses(name))
        mount = Mount(root, ground.tree, kept, (server.pid,), server)
        try:
            self._wait(mount, server, log)
        except BaseException:
            self.unmount(mount)
            raise
        return mount

    def _uses(self, folder: str) -> bool:
        return any(f"{{{folder}}}" in argument for argument in self.arguments)

    def _wait(self, mount: Mount, server: subprocess.Popen[bytes], log: Path) -> None:
        end = time.monotonic() + MOUNT_TIMEOUT_S
        while not is_mounted(mount.root):
            if server.poll() is not None or time.monotonic() > end:
                text = log.read_text(errors="replace").strip()
                raise UnsupportedError(f"{self.name} does not mount: {text}", remedy=f"try it by hand: {self.command}")
            time.sleep(0.002)
        os.listdir(mount.root)

    def unmount(self, mount: Mount) -> None:
        """Unmount it; its program then ends, or is ended."""
        unmount(mount.root)
        server = mount.handle
        assert isinstance(server, subprocess.Popen)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


class FuseOverlayfs(FuseProgram):
    """What rootless Podman uses."""

    name = "fuse-overlayfs"
    title = "fuse-overlayfs"
    program = package = "fuse-overlayfs"
    command = "fuse-overlayfs -o lowerdir=TEMPLATE,upperdir=UPPER,workdir=WORK,suid,dev ROOT"
    arguments = ("-f", "-o", "lowerdir={lower},upperdir={upper},workdir={work},suid,dev", "{root}")


class UnionfsFuse(FuseProgram):
    """A union mount in FUSE with copy-on-write."""

    name = "unionfs-fuse"
    title = "unionfs-fuse"
    program = "unionfs"
    package = "unionfs-fuse"
    command = "unionfs -o cow,allow_other,default_permissions,suid,dev UPPER=RW:TEMPLATE=RO ROOT"
    arguments = ("-f", "-o", "cow,allow_other,default_permissions,suid,dev", "{upper}=RW:{lower}=RO", "{root}")


class Mergerfs(FuseProgram):
    """A union mount without copy-on-write."""

    name = "mergerfs"
    title = "mergerfs (read-only)"
    program = package = "mergerfs"
    command = "mergerfs -o allow_other,cache.files=auto-full,ro,suid,dev TEMPLATE ROOT"
    arguments = ("-f", "-o", "allow_other,cache.files=auto-full,ro,suid,dev", "{lower}", "{root}")
    writable = False


class Bindfs(FuseProgram):
    """A folder shown elsewhere: the least that a FUSE file system can do."""

    name = "bindfs"
    title = "bindfs (read-only)"
    program = package = "bindfs"
    command = "bindfs -r -o suid,dev TEMPLATE ROOT"
    arguments = ("-f", "-r", "-o", "suid,dev", "{lower}", "{root}")
    writable = False


# ---- vzfs ------------------------------------------------------------------------------------------------------------


class Vzfs(System):
    """vzfs with one of its engines; both share a store."""

    engine: ClassVar[str]
    module: ClassVar[str]
    peer = False

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def missing(self) -> str | None:
        """Whether the engine exists and its parts can be imported; whether it mounts shows in ``try_out``."""
        from vzfs.fuse.serve import ENGINES

        if self.engine not in ENGINES or importlib.util.find_spec(f"vzfs.fuse.{self.module}") is None:
            return f"this vzfs has no engine {self.engine}"
        return None if os.path.exists("/dev/fuse") else "there is no /dev/fuse; modprobe fuse"

    def version(self) -> str:
        """Of vzfs."""
        try:
            return package_version("vzfs")
        except PackageNotFoundError:
            return "not installed, run from a checkout"

    def set_up(self, ground: Ground) -> None:
        """Import the template into the store."""
        store = self.store(ground)
        if all(template.name != ground.template for template in store.templates()):
            store.create_template(ground.template, str(ground.tree))

    def try_out(self, ground: Ground) -> None:
        """The kernel may refuse an engine."""
        probe = made(ground.folder / f"probe-{self.engine}")
        self.unmount(self.mount(ground, probe))

    def mount(self, ground: Ground, place: Path) -> Mount:
        """Create a container and mount it."""
        store = self.store(ground)
        container = store.create(place / f"{self.engine}-{next(self._numbers)}", template=ground.template)
        try:
            root = container.mount(place / "root", mkdir=True, engine=self.engine, timeout=MOUNT_TIMEOUT_S)
        except BaseException:
            container.destroy()
            raise
        pid = container.status().pid
        servers = (pid,) if pid else ()
        return Mount(root, store.template(ground.template).path, (container.path,), servers, container)

    def unmount(self, mount: Mount) -> None:
        """Unmount and destroy the container."""
        container = mount.handle
        assert isinstance(container, Container)
        with contextlib.suppress(NotMountedError):
            container.umount(timeout=MOUNT_TIMEOUT_S)
        container.destroy()

    @staticmethod
    def store(ground: Ground) -> Store:
        """The store of both engines."""
        return Store(ground.folder / "vzfs")


class VzfsPyfuse3(Vzfs):
    """The engine that runs everywhere."""

    name = "vzfs-pyfuse3"
    title = "vzfs (pyfuse3)"
    engine = "pyfuse3"
    module = "portable"
    command = "vzfs create CT --template TEMPLATE; vzfs mount --engine pyfuse3 CT"


class VzfsDirect(Vzfs):
    """The engine that talks to the kernel itself."""

    name = "vzfs-direct"
    title = "vzfs (direct)"
    engine = "direct"
    module = "direct"
    command = "vzfs create CT --template TEMPLATE; vzfs mount --engine direct CT"


SYSTEMS: tuple[type[System], ...] = (
    Ext4,
    Overlayfs,
    FuseOverlayfs,
    UnionfsFuse,
    Mergerfs,
    Bindfs,
    VzfsPyfuse3,
    VzfsDirect,
)
"""In the order in which they take turns and are shown."""


# ---- helpers ---------------------------------------------------------------------------------------------------------


def run(*command: str | os.PathLike[str]) -> None:
    """Run a program. Raises ``UnsupportedError`` with what it complained about."""
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        words = " ".join(str(word) for word in command)
        raise UnsupportedError(f"{words}: {done.stderr.strip()}", remedy="see whether this machine permits it")


def made(folder: Path) -> Path:
    """``folder``, made."""
    folder.mkdir()
    return folder


def is_mounted(root: Path) -> bool:
    """Whether something is mounted at ``root``; asks the mount table, not a file system that may not answer."""
    return any(entry.mountpoint == str(root) for entry in mount_table())


def unmount(root: Path) -> None:
    """Unmount ``root``, waiting for a process that has just ended; lazily if somebody still uses it."""
    for _ in range(50):
        if not is_mounted(root):
            return
        if subprocess.run(["umount", root], stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return
        time.sleep(0.02)
    subprocess.run(["umount", "--lazy", root], stderr=subprocess.DEVNULL, check=False)


def by_names(names: Iterable[str]) -> list[System]:
    """The systems called so, in their own order; all for no names. Unknown names are the caller's matter."""
    wanted = set(names)
    return [system() for system in SYSTEMS if not wanted or system.name in wanted]
