"""What this machine can do for vzfs: ``vzfs doctor``, and a function for programs that want to know beforehand.

Rule: a capability is found by using it, not by reading a version: a FUSE file system is really mounted, an attribute
really set, a file really cloned. Whatever that makes is taken away again: files lie in a folder that is removed, the
mount in a mount namespace that ends with the process that made it.

Run as a script (``python doctor.py``) this file is that process: it prints what the kernel says in FUSE_INIT as JSON.
It therefore imports nothing but the standard library at its top.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "missing", "warning"]

ENOUGH_BYTES = 1 << 30
ENOUGH_INODES = 10_000
ENOUGH_FILES = 8_192
"""Open files: each file a container keeps open is one descriptor of the process that serves the mount."""

FUSE_DEVICE = "/dev/fuse"
PROBE_SECONDS = 10.0
FUSE_INIT = 26
FUSE_IN_HEADER = struct.Struct("<IIQQIIIHH")
FUSE_INIT_IN = struct.Struct("<IIIII")  # major, minor, max_readahead, flags, flags2
INIT_EXT = 1 << 30
PASSTHROUGH_FLAGS2 = 1 << (37 - 32)
DIRECT_ENGINE = "direct engine"
FUSE_MINIMUM_READ = 8192  # FUSE_MIN_READ_BUFFER of linux/fuse.h

CLONE_NEWNS = 0x00020000
MS_REC_PRIVATE = 0x4000 | 0x40000
FICLONE = 0x40049409

CAPABILITIES = {
    0: ("CAP_CHOWN", "owners"),
    1: ("CAP_DAC_OVERRIDE", "files of other users"),
    3: ("CAP_FOWNER", "modes and times"),
    4: ("CAP_FSETID", "set-group-id bits"),
    21: ("CAP_SYS_ADMIN", "mounting and trusted attributes"),
    27: ("CAP_MKNOD", "device nodes"),
    31: ("CAP_SETFCAP", "file capabilities"),
}
"""Bit number of linux/capability.h, name, and what vzfs needs it for."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing examined: ``missing`` keeps vzfs from running, ``warning`` only from running well."""

    name: str
    ok: Verdict
    value: str
    remedy: str = ""


def can_run(findings: Iterable[Finding]) -> bool:
    """Whether nothing is missing that vzfs needs."""
    return all(finding.ok != "missing" for finding in findings)


def examine(root: Path) -> list[Finding]:
    """Examine this machine for a store at ``root``, which need not exist. Takes less than a second; never raises."""
    protocol = list(_fuse_protocol())
    direct = any(finding.name == DIRECT_ENGINE and finding.ok == "ok" for finding in protocol)
    findings = [_python(), _kernel(), _device(), *protocol, _capabilities(), _fusermount()]
    findings += [_of_pyfuse3(finding, direct=direct) for finding in _pyfuse3()]
    findings += [_module("xattr", "0.10"), *_store(root), _open_files(), _debootstrap()]
    return findings


def _pyfuse3() -> Iterator[Finding]:
    """What the engine pyfuse3 stands on."""
    yield _libfuse()
    yield _module("pyfuse3", "3.2.1")
    yield _module("trio", "0.22")


def _of_pyfuse3(finding: Finding, *, direct: bool) -> Finding:
    """``finding``, which is no more than a warning where the direct engine serves without it."""
    if finding.ok != "missing" or not direct:
        return finding
    return replace(finding, ok="warning", remedy=f"{finding.remedy} (only --engine pyfuse3 needs it)")


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})")


def _kernel() -> Finding:
    return Finding("kernel", "ok", f"{platform.system()} {platform.release()} ({platform.machine()})")


# FUSE


def _device() -> Finding:
    try:
        descriptor = os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            remedy = "load the module: modprobe fuse (in a container: pass the device in)"
        else:
            remedy = "run as root (in a container: allow the device, character 10:229)"
        return Finding(FUSE_DEVICE, "missing", error.strerror or str(error), remedy)
    os.close(descriptor)
    return Finding(FUSE_DEVICE, "ok", "can be opened")


@dataclass(frozen=True, slots=True)
class Offer:
    """What the kernel offers in FUSE_INIT."""

    major: int
    minor: int
    direct: bool
    """Whether the direct engine can take it: Linux 5.17 and later."""
    passthrough: bool


def _fuse_protocol() -> Iterator[Finding]:
    try:
        offer = ask_kernel()
    except OSError as error:
        remedy = "run as root with CAP_SYS_ADMIN; in a container, on the host"
        yield Finding("FUSE mount", "missing", f"a trial mount failed: {error.strerror or error}", remedy)
        return
    yield Finding("FUSE mount", "ok", f"a trial mount worked, protocol {offer.major}.{offer.minor}")
    if offer.direct:
        yield Finding(DIRECT_ENGINE, "ok", "can run")
    else:
        yield Finding(DIRECT_ENGINE, "warning", "this kernel is too old for it", "Linux 5.17 isn't; pyfuse3 serves")
    if offer.passthrough:
        yield Finding("FUSE passthrough", "ok", "offered")
    else:
        remedy = "to read without a detour use Linux 6.9 or newer with CONFIG_FUSE_PASSTHROUGH; vzfs works without"
        yield Finding("FUSE passthrough", "warning", "not offered by this kernel", remedy)


def ask_kernel() -> Offer:
    """Mount a throw-away FUSE file system in a process of its own and read the kernel's FUSE_INIT.

    Raises ``OSError`` when the mount is not possible or the kernel says nothing in time.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", __file__], capture_output=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from error
    try:
        answer = json.loads(child.stdout)
    except ValueError as error:
        raise OSError(errno.EIO, "the trial process ended without a result") from error
    if "errno" in answer:
        raise OSError(answer["errno"], f"{os.strerror(answer['errno'])} ({answer['step']})")
    return Offer(answer["major"], answer["minor"], answer["direct"], answer["passthrough"])


def decode_init(request: bytes) -> Offer:
    """The offer in the bytes of a FUSE_INIT request (header and ``init_in``); ``ValueError`` for anything else."""
    if len(request) < FUSE_IN_HEADER.size + FUSE_INIT_IN.size - 4:
        raise ValueError(f"{len(request)} bytes are too few for FUSE_INIT")
    _, opcode, *_ = FUSE_IN_HEADER.unpack_from(request)
    if opcode != FUSE_INIT:
        raise ValueError(f"opcode {opcode} is not FUSE_INIT")
    body = request[FUSE_IN_HEADER.size :].ljust(FUSE_INIT_IN.size, b"\0")  # kernels before 5.17 send no flags2
    major, minor, _, flags, flags2 = FUSE_INIT_IN.unpack_from(body)
    direct = bool(flags & INIT_EXT)
    return Offer(major, minor, direct, direct and bool(flags2 & PASSTHROUGH_FLAGS2))


def _try_mount() -> dict[str, object]:
    """In the trial process: mount in a private mount namespace, which takes the mount along when the process ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
    step = "open /dev/fuse"
    try:
        device = os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        step = "unshare the mount namespace"
        _check(libc.unshare(CLONE_NEWNS))
        _check(libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None))
        step = "mount"
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
        # Nobody else sees this namespace, so any directory will do.
        _check(libc.mount(b"vzfs-doctor", b"/", b"fuse.vzfs-doctor", 0, options))
        step = "read FUSE_INIT"
        offer = decode_init(os.read(device, FUSE_MINIMUM_READ + 4096))
    except OSError as error:
        return {"errno": error.errno, "step": step}
    return asdict(offer)


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _capabilities() -> Finding:
    have = _effective_capabilities()
    lacking = [f"{name} ({use})" for bit, (name, use) in CAPABILITIES.items() if not have >> bit & 1]
    if lacking:
        remedy = "run as root; in a container, grant these capabilities"
        return Finding("capabilities", "missing", "without " + ", ".join(lacking), remedy)
    return Finding("capabilities", "ok", ", ".join(name for name, _ in CAPABILITIES.values()))


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _fusermount() -> Finding:
    path = shutil.which("fusermount3")
    if path is None:
        return Finding("fusermount3", "warning", "not found", "apt-get install fuse3 (root can mount without it)")
    return Finding("fusermount3", "ok", path)


def _libfuse() -> Finding:
    for name in ("libfuse3.so.3", "libfuse3.so.4"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        try:
            library.fuse_pkgversion.restype = ctypes.c_char_p
            version = (library.fuse_pkgversion() or b"").decode()
        except AttributeError:
            version = "version unknown"
        return Finding("libfuse", "ok", f"{version} ({name})")
    return Finding("libfuse", "missing", "libfuse3 not found", "apt-get install libfuse3-3")


def _module(name: str, minimum: str) -> Finding:
    """A Python package that really imports: a version alone doesn't tell whether its libraries load."""
    try:
        import_module(name)
    except Exception as error:  # noqa: BLE001  a broken installation can raise anything
        return Finding(name, "missing", f"{type(error).__name__}: {error}", f"pip install '{name}>={minimum}'")
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "ok", "version unknown")


# The store's file system


def nearest_directory(path: Path) -> Path:
    """``path`` or the nearest parent of it that exists and is a directory."""
    path = Path(os.path.abspath(path))
    return next(place for place in [path, *path.parents] if os.path.isdir(place))


def _store(root: Path) -> Iterator[Finding]:
    if os.path.lexists(root) and not os.path.isdir(root):
        yield Finding("store", "missing", f"{root} is not a directory", "give another --root, or move that file away")
        return
    place = nearest_directory(root)
    kind = _file_system(place)
    about = "" if place == Path(os.path.abspath(root)) else ", will be made by the first 'template create'"
    yield Finding("store", "ok", f"{root} on {kind}{about}")
    try:
        with _scratch(place) as scratch:
            yield from _try_file_system(scratch, kind)
    except OSError as error:
        remedy = "give another --root, remount it writable, or run as root"
        yield Finding("store writable", "missing", f"{place}: {error.strerror or error}", remedy)
        return
    if kind == "ext4":
        yield _journal(place)
    yield from _space(place)


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    path = tempfile.mkdtemp(prefix=".vzfs-doctor-", dir=place)
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _file_system(place: Path) -> str:
    """Type of the file system below ``place``: of the longest mount point that holds it, the latest if mounted over."""
    from vzfs.fuse.table import mount_table

    best, kind = "", "an unknown file system"
    for entry in mount_table():
        if place.is_relative_to(entry.mountpoint) and len(entry.mountpoint) >= len(best):
            best, kind = entry.mountpoint, entry.fstype
    return kind


Trial = tuple[str, Verdict, Callable[[Path], object], str]


def _trials(kind: str) -> Sequence[Trial]:
    move = f"{kind} can't do it; put the store on ext4, XFS or btrfs"
    return (
        ("trusted attributes", "missing", _set_trusted, move + ", and run as root on the host"),
        ("trusted attributes of symlinks", "missing", _set_trusted_on_symlink, move),
        ("user attributes", "warning", _set_user, move),
        ("hard links to symlinks", "warning", _link_symlink, move + "; without, containers take more inodes"),
        ("device nodes", "missing", _make_device, "run as root on the host, on a file system mounted without nodev"),
        ("reflinks", "warning", _clone, "copy-up copies the data; XFS and btrfs can share it until it changes"),
    )


def _try_file_system(scratch: Path, kind: str) -> Iterator[Finding]:
    for name, verdict, trial, remedy in _trials(kind):
        try:
            trial(scratch)
        except OSError as error:
            yield Finding(name, verdict, error.strerror or str(error), remedy)
        else:
            yield Finding(name, "ok", "work here")


def _set(path: Path, name: str = "trusted.vzfs.doctor") -> None:
    import xattr  # type: ignore[import-untyped]

    xattr.setxattr(os.fspath(path), name, b"1", symlink=True)


def _set_trusted(scratch: Path) -> None:
    path = scratch / "file"
    path.touch()
    _set(path)


def _set_trusted_on_symlink(scratch: Path) -> None:
    path = scratch / "attribute-link"
    path.symlink_to("//vz/template/x")
    _set(path)


def _set_user(scratch: Path) -> None:
    path = scratch / "user"
    path.touch()
    _set(path, "user.vzfs.doctor")


def _link_symlink(scratch: Path) -> None:
    path = scratch / "link"
    path.symlink_to("//vz/template/x")
    os.link(path, scratch / "hard-link", follow_symlinks=False)


def _make_device(scratch: Path) -> None:
    """Like /dev/null, and opened: a nodev mount lets it be made, but not opened (EACCES)."""
    path = scratch / "null"
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))


def _clone(scratch: Path) -> None:
    with open(scratch / "original", "w+b") as original, open(scratch / "clone", "wb") as clone:
        original.write(b"vzfs" * 1024)
        original.flush()
        fcntl.ioctl(clone.fileno(), FICLONE, original.fileno())


def _journal(place: Path) -> Finding:
    from vzfs.store.flush import has_own_journal

    if has_own_journal(os.stat(place).st_dev):
        return Finding("journal", "ok", "inside the file system")
    text = "each copy-up is flushed by itself, and a power failure may mix up names; tune2fs -O has_journal DEVICE"
    return Finding("journal", "warning", "none inside the file system", text)


def _space(place: Path) -> Iterator[Finding]:
    state = os.statvfs(place)
    free = state.f_bavail * state.f_frsize
    text = f"{free / (1 << 30):.1f} GiB"
    if free < ENOUGH_BYTES:
        yield Finding("free space", "warning", text, "a Debian template takes about 0.3 GiB; make room or use --root")
    else:
        yield Finding("free space", "ok", text)
    if state.f_files == 0:  # btrfs and others make inodes as they need them
        yield Finding("free inodes", "ok", "not limited")
    elif state.f_favail < ENOUGH_INODES:
        remedy = "a Debian template takes about 14,000; use a file system made with more inodes"
        yield Finding("free inodes", "warning", f"{state.f_favail:,}", remedy)
    else:
        yield Finding("free inodes", "ok", f"{state.f_favail:,}")


# The rest


def _open_files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return Finding("open files", "ok", "not limited")
    if hard < ENOUGH_FILES:
        remedy = f"raise it to {ENOUGH_FILES:,} or more: ulimit -Hn, LimitNOFILE= of the service, limits.conf"
        return Finding("open files", "warning", f"at most {hard:,}", remedy)
    return Finding("open files", "ok", f"at most {hard:,}")


def _debootstrap() -> Finding:
    path = shutil.which("debootstrap", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        remedy = "apt-get install debootstrap (only for 'template create --from debootstrap:SUITE')"
        return Finding("debootstrap", "warning", "not found", remedy)
    return Finding("debootstrap", "ok", path)


if __name__ == "__main__":
    print(json.dumps(_try_mount()))
