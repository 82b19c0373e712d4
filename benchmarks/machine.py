"""What a reader needs to know to judge figures: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.results import Machine
from vzfs.store.flush import has_own_journal

PACKAGES = ("vzfs", "pyfuse3", "trio", "numpy", "scipy")
PROGRAMS = {"fio": ("fio", "--version"), "libfuse": ("fusermount3", "--version"), "git": ("git", "--version")}


def machine(scratch: Path) -> Machine:
    """This machine, and the file system that holds ``scratch``."""
    mount = _output("findmnt", "-n", "-o", "FSTYPE,SOURCE", "--target", str(scratch)).split()
    virtual = _output("systemd-detect-virt", "--vm")
    return Machine(
        cpu=_cpu(),
        cpus=os.cpu_count() or 1,
        memory_mib=int(Path("/proc/meminfo").read_text().split()[1]) // 1024,
        architecture=platform.machine(),
        virtual="" if virtual == "none" else virtual,
        file_system=_file_system(mount[0], scratch) if mount else "",
        device=mount[1] if len(mount) > 1 else "",
        kernel=platform.release(),
    )


def _file_system(name: str, folder: Path) -> str:
    """Also whether ext4 has a journal: without, it passes over each inode freed in the last minutes to make a file."""
    if name == "ext4" and not has_own_journal(os.stat(folder).st_dev):
        return "ext4 without a journal"
    return name


def versions() -> dict[str, str]:
    """Of what takes part, name to version; what is not installed is left out."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    for name, command in PROGRAMS.items():
        if text := _output(*command):
            found[name] = text.split()[-1].removeprefix("fio-")
    return found


def commit() -> str:
    """The commit of this checkout, with ``+`` if files differ from it; empty outside of one."""
    top = str(Path(__file__).parents[1])
    git = ("git", "-c", f"safe.directory={top}", "-C", top)
    found = _output(*git, "rev-parse", "--short", "HEAD")
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no") if found else ""
    return found + ("+" if changed else "")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
