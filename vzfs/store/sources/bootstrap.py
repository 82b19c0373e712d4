"""``debootstrap:SUITE`` as the source of a template: Debian's own tool, run into the target directory.

Rule: nothing that the user typed can become an option or shell text; whatever happens, no process of debootstrap's
group and no mount below the target is left when this returns, because the caller may remove the target next.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import time
from collections import deque
from collections.abc import Callable

from vzfs import linux
from vzfs.errors import SourceError, UnsupportedError, UsageError
from vzfs.store.progress import Progress
from vzfs.store.sources.options import SourceOptions

_SUITE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_VARIANT = re.compile(r"[a-z0-9][a-z0-9-]*")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9][a-z0-9-]*)?")
# debootstrap is a shell script: of what URLs may hold, only what no shell reads as anything else.
_MIRROR = re.compile(r"(?:(?:https?|ftp|file|copy|ssh)://|/)[A-Za-z0-9._~:/@+,=%-]+")
_KEYRING = re.compile(r"/[A-Za-z0-9._~:/@+,=%-]+")
_TARGET = re.compile(rb"/[A-Za-z0-9._/+-]+")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_GRACE = 10.0  # seconds between SIGTERM, upon which debootstrap unmounts what it mounted, and SIGKILL
_LAST_LINES = 12
_ESCAPED = re.compile(rb"\\([0-7]{3})")

_REMEDIES = (
    ("No such script", "see /usr/share/debootstrap/scripts for the suites that this debootstrap knows"),
    ("Failed getting release", "check the suite's name, the mirror and the network"),
    ("Couldn't download", "check the mirror, the network and the names of the packages"),
    ("Couldn't find these debs", "check the names of the packages"),
    ("Release signed by unknown key", "name the keyring that has the suite's key"),
    ("No keyring installed", "install debian-archive-keyring, or name a keyring"),
    ("NOEXEC or NODEV", "keep the store on a file system mounted without noexec and nodev"),
    ("No space left", "free some space, try again"),
)


def bootstrap(suite: str, target_fd: int, options: SourceOptions, progress: Progress) -> None:
    """Install a minimal system of ``suite`` into the empty directory ``target_fd``.

    Progress gets debootstrap's lines as phases, counted. Raises ``UsageError`` for a malformed suite or option,
    ``UnsupportedError`` without debootstrap, ``SourceError`` with debootstrap's last lines when it fails.
    """
    arguments = command_arguments(suite, options)
    program = shutil.which("debootstrap", path=os.environ.get("PATH", "") + ":" + _PATH)
    if program is None:
        raise UnsupportedError("debootstrap is not installed", remedy="apt-get install debootstrap")
    target = os.readlink(linux.fd_path(target_fd))
    if not _TARGET.fullmatch(target):
        raise UnsupportedError(
            f"debootstrap can't work below {os.fsdecode(target)!r}, for it stumbles over spaces and the like in a path",
            remedy="keep the store at a path of letters, digits and ._+-",
        )
    positional = [suite, os.fsdecode(target)]
    if options.mirror:
        positional.append(f"file://{options.mirror}" if options.mirror.startswith("/") else options.mirror)
    try:
        _run([program, *arguments, *positional], progress)
    finally:
        unmount_below(target)
    _tidy(target_fd, options)


def command_arguments(suite: str, options: SourceOptions) -> list[str]:
    """The options for debootstrap, every value checked. Raises ``UsageError``."""
    _check(_SUITE, "suite", suite)
    arguments = []
    if options.variant is not None:
        arguments.append(f"--variant={_check(_VARIANT, 'variant', options.variant)}")
    if options.include:
        packages = [_check(_PACKAGE, "package", package) for package in options.include]
        arguments.append(f"--include={','.join(packages)}")
    if options.keyring is not None:
        arguments.append(f"--keyring={_check(_KEYRING, 'keyring', options.keyring)}")
    if options.mirror is not None:
        _check(_MIRROR, "mirror", options.mirror)
    return arguments


def _check(pattern: re.Pattern[str], what: str, value: str) -> str:
    if not pattern.fullmatch(value):
        raise UsageError(f"{value!r} can't be the {what} for debootstrap")
    return value


def _run(command: list[str], progress: Progress) -> None:
    environment = os.environ | {"LC_ALL": "C", "LANGUAGE": "C", "DEBIAN_FRONTEND": "noninteractive"}
    environment["PATH"] = environment.get("PATH", "") + ":" + _PATH
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd="/",
        start_new_session=True,  # its own process group: Ctrl-C reaches only us, and we end all of it
    )
    last: deque[str] = deque(maxlen=_LAST_LINES)
    try:
        _follow(process, last, progress)
    except BaseException:
        _end_group(process, signal.SIGTERM)
        raise
    finally:
        _end_group(process, signal.SIGKILL)
        code = process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if code:
        raise _failure(code, list(last))


def _follow(process: subprocess.Popen[bytes], last: deque[str], progress: Progress) -> None:
    """Hand on lines until debootstrap ends; a daemon that a package started may keep the pipe open longer."""
    assert process.stdout is not None
    fd = process.stdout.fileno()
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    rest = b""
    count = 0
    while True:
        if not poll.poll(500):
            if _has_ended(process):
                return
            continue
        data = os.read(fd, 1 << 16)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            count += 1
            text = _printable(line)
            last.append(text)
            progress(text.removeprefix("I: "), count, None)
        if not data:
            if rest:
                last.append(_printable(rest))
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            return


def _printable(line: bytes) -> str:
    return "".join(c if c.isprintable() else " " for c in line.decode("utf-8", "replace")).strip()


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _end_group(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Send ``how`` to debootstrap's process group, and after SIGTERM give its leader time.

    Until the end the leader isn't reaped (WNOWAIT), so its number can't have become another group's.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    deadline = time.monotonic() + (_GRACE if how is signal.SIGTERM else 0)
    while time.monotonic() < deadline and not _has_ended(process):
        time.sleep(0.05)


def _failure(code: int, last: list[str]) -> SourceError:
    useful = [line for line in last if line.startswith(("E:", "W:"))] or last[-3:]
    text = " ".join(last)
    remedy = next((remedy for sign, remedy in _REMEDIES if sign in text), "")
    how = f"signal {-code}" if code < 0 else f"exit status {code}"
    return SourceError(f"debootstrap failed with {how}: {'; '.join(useful) or 'it said nothing'}", remedy=remedy)


def unmount_below(path: bytes) -> None:
    """Detach every mount strictly below ``path`` (canonical), the latest first. Raises ``SourceError`` if one stays."""
    for point in reversed(mounts_below(path)):
        try:
            linux.umount2(point, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # gone with the one it was in
                continue
            raise SourceError(
                f"debootstrap left {os.fsdecode(point)} mounted, and unmounting it failed: {error.strerror}",
                remedy=f"umount -R {os.fsdecode(point)}",
            ) from error


def mounts_below(path: bytes) -> list[bytes]:
    """Mount points strictly below ``path``, in the order in which they were made (proc(5), mountinfo)."""
    with open("/proc/self/mountinfo", "rb") as lines:
        points = [_ESCAPED.sub(lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4]) for line in lines]
    return [point for point in points if point.startswith(path + b"/")]


def _tidy(target_fd: int, options: SourceOptions) -> None:
    """Leave out the downloaded packages; make the root directory one that everybody may enter."""
    with contextlib.suppress(FileNotFoundError):
        _unlink_matching(target_fd, b"var/cache/apt/archives", lambda name, _info: name.endswith(b".deb"))
    if not options.allow_devices:
        with contextlib.suppress(FileNotFoundError):
            _unlink_matching(
                target_fd, b"dev", lambda _name, info: stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode)
            )
    os.fchmod(target_fd, 0o755)


def _unlink_matching(target_fd: int, path: bytes, unwanted: Callable[[bytes, os.stat_result], bool]) -> None:
    fd = linux.openat2(target_fd, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in map(os.fsencode, os.listdir(fd)):
            if unwanted(name, os.lstat(name, dir_fd=fd)):
                os.unlink(name, dir_fd=fd)
    finally:
        os.close(fd)
