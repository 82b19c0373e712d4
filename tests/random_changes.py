"""Random changes to a container, made through ``TreeFs`` as programs in it would make them."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from hypothesis import strategies as st

from tests.stateful_model import FileSystem, TreeFs, attempt
from vzfs.linux import RENAME_EXCHANGE

Step = tuple[str, int, int]

_KINDS = ("write", "replace", "truncate", "chmod", "chown", "utime", "setxattr", "unlink", "rmtree", "rmdir", "mkdir")
_MORE = ("symlink", "mknod", "link", "rename", "rename", "move", "move", "exchange", "touch-new")
_NAMES = (b"new", b"etc", b"share", b"file", b"passwd", b"tool", b"pair-a", b"a\xff\n b", b"zz")

steps: st.SearchStrategy[list[Step]] = st.lists(
    st.tuples(st.sampled_from(_KINDS + _MORE), st.integers(0, 9999), st.integers(0, 9999)), min_size=1, max_size=14
)


def all_paths(fs: FileSystem) -> list[bytes]:
    """Every path below the root, sorted."""
    found: list[bytes] = []
    folders = [b""]
    while folders:
        folder = folders.pop()
        for name in fs.listdir(folder):
            path = folder + b"/" + name if folder else name
            found.append(path)
            if stat.S_ISDIR(fs.lstat(path).mode):
                folders.append(path)
    return sorted(found)


def make_changes(fs: TreeFs, wanted: Sequence[Step]) -> None:
    """Make the changes one after the other; those that the file system refuses are left out."""
    for kind, first, second in wanted:
        paths = all_paths(fs)
        if paths:
            _make(fs, kind, paths, first, second)


def _make(fs: TreeFs, kind: str, paths: list[bytes], first: int, second: int) -> None:
    path, other = paths[first % len(paths)], paths[second % len(paths)]
    folders = [b"", *(each for each in paths if stat.S_ISDIR(fs.lstat(each).mode))]
    folder = folders[first % len(folders)]
    name = _NAMES[second % len(_NAMES)]
    new = folder + b"/" + name if folder else name
    moved = folders[second % len(folders)]
    into = (moved + b"/" if moved else b"") + path.rpartition(b"/")[2]
    mode = fs.lstat(path).mode
    if kind == "write" and stat.S_ISREG(mode):
        attempt(write, fs, path, b"%d" % second)
    elif kind == "replace" and stat.S_ISREG(mode):
        attempt(write, fs, new + b"~", b"replaced %d" % second)
        attempt(fs.rename, new + b"~", path)
    elif kind == "touch-new":
        attempt(write, fs, new, b"new\n" * (second % 5))
    elif kind == "truncate":
        attempt(fs.truncate, path, second % 10)
    elif kind == "chmod" and not stat.S_ISLNK(mode):
        attempt(fs.chmod, path, (0o600, 0o755, 0o4711)[second % 3])
    elif kind == "chown":
        attempt(fs.chown, path, second % 3, 7)
    elif kind == "utime":
        attempt(fs.utime, path, 5, second * 1_000_000_001)
    elif kind == "setxattr":
        attempt(fs.setxattr, path, b"trusted.test", b"%d" % second)
    elif kind == "unlink":
        attempt(fs.unlink, path)
    elif kind == "rmdir":
        attempt(fs.rmdir, path)
    elif kind == "rmtree":
        remove_tree(fs, path)
    elif kind == "mkdir":
        attempt(fs.mkdir, new, 0o755)
    elif kind == "symlink":
        attempt(fs.symlink, b"//vz/template/small/etc", new)
    elif kind == "mknod":
        attempt(fs.mknod, new, stat.S_IFCHR | 0o600, os.makedev(1, 3 + second % 3))
    elif kind == "link":
        attempt(fs.link, other, new)
    elif kind == "rename":
        attempt(fs.rename, path, new)
    elif kind == "move":
        attempt(fs.rename, path, into)
    elif kind == "exchange" and not (path + b"/").startswith(other + b"/") and not other.startswith(path + b"/"):
        attempt(fs.rename, path, other, RENAME_EXCHANGE)


def write(fs: FileSystem, path: bytes, data: bytes) -> None:
    """Put ``data`` at the beginning of a file, which is made if it isn't there."""
    fd = fs.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        fs.pwrite(fd, data, 0)
    finally:
        fs.close(fd)


def remove_tree(fs: FileSystem, path: bytes) -> None:
    """Remove a path and all below it."""
    if not stat.S_ISDIR(fs.lstat(path).mode):
        fs.unlink(path)
        return
    for name in fs.listdir(path):
        remove_tree(fs, path + b"/" + name)
    fs.rmdir(path)
