"""Templates: made from a source, sealed with an index and a link farm, verified, removed.

Rule: a template exists when its folder and its index exist, both arriving by rename; a sealed template is never
written.

Making happens in ``template/.vzfs/.new-<name>-<random>/`` (``tree`` and ``meta``), removing in
``.old-<name>-<random>/``; whoever works there holds a flock on that folder, so what a dead process left is told from
what a live one is doing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vzfs import linux
from vzfs.errors import BusyError, DamagedError, ExistsError, FullError, SourceError
from vzfs.store.escape import printable
from vzfs.store.index import INO_START, Attributes, Index, Meta
from vzfs.store.index_check import find_fault
from vzfs.store.index_write import EntryData, link_groups, write_index
from vzfs.store.layout import LINK_BUCKET, OWN_FOLDER_MODE, Layout, TemplatePaths, farm_entry
from vzfs.store.magic import TARGET_MAX, MagicLink
from vzfs.store.opened import open_index, template_names, template_paths
from vzfs.store.problem import Problem
from vzfs.store.progress import Progress, no_progress
from vzfs.store.seal import open_sealed
from vzfs.store.sources import SourceOptions, populate
from vzfs.store.xattrs import RESERVED_PREFIX

_INO_ALIGN = 1 << 16
_HOLES_MAX = 1 << 40
"""Bytes of holes in a file: an archive can claim any size, and digesting so much takes ten minutes."""
_NEVER_READ_NS = 4_102_444_800 * 10**9
"""Access time of a prepared link, the year 2100: so reading it, as each look-up in an unfolded directory does, writes
none (``relatime``, mount(8)); that took a quarter of such a look-up."""
_WORK = re.compile(r"\.(new|old)-(.+)-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class TemplateInfo:
    """What there is to know of a template; sizes in bytes, ``created`` in seconds since 1970.

    ``digest`` says what is in it (``vzfs.store.seal``). ``problem`` says why its index can't be used, ``None``: it can;
    with one, all else but the index's size is empty.
    """

    name: str
    entries: int
    files: int
    directories: int
    size: int
    created: float
    source: str
    ino_base: int
    index_size: int
    used_by: list[str]
    digest: str | None = None
    problem: str | None = None


# ------------------------------------------------------------------------------------------------------------- making


def create_template(
    layout: Layout,
    name: str,
    source: str,
    options: SourceOptions | None = None,
    progress: Progress = no_progress,
) -> None:
    """Make the template ``name`` from ``source`` (see ``sources.populate``) and seal it.

    Raises ``ExistsError``, ``SourceError``, ``FullError``, ``UsageError``; whatever is raised, nothing is left behind.
    """
    paths = layout.template(name)
    layout.make()
    _clean_up(layout)
    _refuse_existing(paths, name)
    try:
        with _work_folder(layout, "new", name) as work:
            tree, meta = work / "tree", work / "meta"
            tree.mkdir(mode=OWN_FOLDER_MODE)
            meta.mkdir(mode=OWN_FOLDER_MODE)
            populate(source, tree, options or SourceOptions(), progress)
            entries = _scan(tree, name, progress)
            _make_link_farm(meta, name, entries, progress)
            with _store_lock(layout):
                _refuse_existing(paths, name)
                about = Meta(
                    name,
                    _about_source(source),
                    _free_ino_base(layout, len(entries)),
                    time.time_ns(),
                    _data_size(entries),
                )
                with open(meta / "index", "xb") as file:
                    write_index(file, entries, about)
                    os.fsync(file.fileno())
                progress("examining the index", 0, None)
                open_sealed(TemplatePaths(tree, meta))  # so that the first mount needn't examine it
                _flush(tree)
                os.rename(tree, paths.tree)
                os.rename(meta, paths.meta)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FullError(
                f"no space left for template {name} in {layout.root}", remedy="free some space there"
            ) from error
        raise


def _about_source(source: str) -> str:
    return "standard input" if source == "-" else source


def _refuse_existing(paths: TemplatePaths, name: str) -> None:
    if paths.index.exists():
        raise ExistsError(f"template {name} exists already", remedy=f"remove it with: vzfs template remove {name}")
    if os.path.lexists(paths.tree):
        raise ExistsError(
            f"{paths.tree} is in the way and no template of vzfs", remedy="move it away or choose another name"
        )


def _flush(tree: Path) -> None:
    fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    try:
        linux.syncfs(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _store_lock(layout: Layout) -> Iterator[None]:
    """Hold what serializes the arrival and departure of templates."""
    fd = os.open(layout.templates_meta, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _work_folder(layout: Layout, what: str, name: str) -> Iterator[Path]:
    """A new locked folder below ``.vzfs`` that is gone afterwards."""
    path = layout.templates_meta / f".{what}-{name}-{secrets.token_hex(4)}"
    with _store_lock(layout):
        path.mkdir(mode=OWN_FOLDER_MODE)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        _remove(path)
        os.close(fd)


def _remove(path: Path) -> None:
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        linux.remove_tree(parent, os.fsencode(path.name))
    finally:
        os.close(parent)


def _clean_up(layout: Layout) -> None:
    """Finish or undo what dead processes were making or removing."""
    with _store_lock(layout):
        for entry in os.listdir(layout.templates_meta):
            match = _WORK.fullmatch(entry)
            if not match:
                continue
            path = layout.templates_meta / entry
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _finish(path, match[1], layout.template(match[2]))
            except BlockingIOError:
                continue
            finally:
                os.close(fd)


def _finish(work: Path, what: str, paths: TemplatePaths) -> None:
    """Bring one abandoned work folder to its end; of the two renames in making and removing, one may have happened."""
    meta_here, tree_here = (work / "meta").exists(), (work / "tree").exists()
    if what == "new" and meta_here and not tree_here and not paths.meta.exists():
        if paths.tree.exists() and (work / "meta" / "index").exists():
            os.rename(work / "meta", paths.meta)
    elif what == "old" and meta_here and not tree_here and not paths.meta.exists() and paths.tree.exists():
        os.rename(paths.tree, work / "tree")
    _remove(work)


def _scan(tree: Path, name: str, progress: Progress) -> list[EntryData]:
    """All entries of ``tree`` breadth first, digests included."""
    entries = [EntryData(0, b"", os.lstat(tree), xattrs=_read_xattrs(os.fsencode(tree)))]
    paths = [b""]
    room = TARGET_MAX - len(MagicLink(name, b"x").text()) + 1
    root = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for number, entry in enumerate(entries):  # grows while it is walked
            if stat.S_ISDIR(entry.info.st_mode):
                _scan_directory(root, number, entries, paths, room)
            if number % 256 == 0:
                progress("indexing", number, len(entries))
    finally:
        os.close(root)
    link_groups(entries)
    progress("indexing", len(entries), len(entries))
    return entries


def _scan_directory(root: int, number: int, entries: list[EntryData], paths: list[bytes], room: int) -> None:
    path = paths[number]
    fd = linux.openat2(root, path or b".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for child in sorted(os.fsencode(name) for name in os.listdir(fd)):
            child_path = path + b"/" + child if path else child
            if len(child_path) > room:
                raise SourceError(
                    f"the path {printable(child_path[:200])}… is {len(child_path)} bytes long",
                    remedy=f"{room} are the limit",
                )
            info = os.lstat(child, dir_fd=fd)
            blob = b""
            if stat.S_ISLNK(info.st_mode):
                blob = os.readlink(child, dir_fd=fd)
            elif stat.S_ISREG(info.st_mode):
                if info.st_size - info.st_blocks * 512 > _HOLES_MAX:
                    raise SourceError(
                        f"{printable(child_path[:200])} has more than a terabyte of holes", remedy="leave it out"
                    )
                blob = _digest(fd, child)
            entries.append(EntryData(number, child, info, blob, _read_xattrs(linux.entry_path(fd, child))))
            paths.append(child_path)
    finally:
        os.close(fd)


def _digest(dir_fd: int, name: bytes) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NOATIME, dir_fd=dir_fd)
    with open(fd, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").digest()


def _read_xattrs(path: bytes, *, symlink: bool = True) -> dict[str, bytes]:
    """All extended attributes of the entry at ``path`` but the store's own; ``symlink`` false follows a link there."""
    return {
        name: os.getxattr(path, name, follow_symlinks=not symlink)
        for name in os.listxattr(path, follow_symlinks=not symlink)  # any bytes, which the xattr package can't read
        if not name.startswith(RESERVED_PREFIX)
    }


def _data_size(entries: list[EntryData]) -> int:
    return sum(e.info.st_size for n, e in enumerate(entries) if stat.S_ISREG(e.info.st_mode) and e.leader == n)


def _make_link_farm(meta: Path, name: str, entries: list[EntryData], progress: Progress) -> None:
    (meta / "links").mkdir(mode=OWN_FOLDER_MODE)
    farm = os.open(meta / "links", os.O_RDONLY | os.O_DIRECTORY)
    paths = [b""]
    try:
        for number, entry in enumerate(entries):
            if number:
                above = paths[entry.parent]
                paths.append(above + b"/" + entry.name if above else entry.name)
            if number % LINK_BUCKET == 0:
                os.mkdir(b"%d" % (number // LINK_BUCKET), OWN_FOLDER_MODE, dir_fd=farm)
                progress("preparing links", number, len(entries))
            os.symlink(MagicLink(name, paths[number]).text(), farm_entry(number), dir_fd=farm)
            os.utime(farm_entry(number), ns=(_NEVER_READ_NS, 0), dir_fd=farm, follow_symlinks=False)
    finally:
        os.close(farm)
    progress("preparing links", len(entries), len(entries))


def _free_ino_base(layout: Layout, count: int) -> int:
    """The first stretch of ``count`` inode numbers that no template of this store has."""
    base = INO_START
    for index in sorted(_headers(layout), key=lambda index: index.ino_base):
        if base + count <= index.ino_base:
            break
        base = -(-(index.ino_base + index.count) // _INO_ALIGN) * _INO_ALIGN
    return base


def _headers(layout: Layout) -> Iterator[Index]:
    """The indexes of all templates whose header can be read: a damaged one must not keep others from being made."""
    for name in template_names(layout):
        with contextlib.suppress(DamagedError):
            yield Index(layout.template(name).index)


# -------------------------------------------------------------------------------------------------- telling, removing


def template_info(layout: Layout, name: str, used_by: list[str]) -> TemplateInfo:
    """Figures of the template ``name``, which the containers ``used_by`` need."""
    sealed = open_sealed(template_paths(layout, name))
    index = sealed.index
    kinds = [stat.S_IFMT(index.mode(number)) for number in range(index.count)]
    return TemplateInfo(
        name=name,
        entries=index.count,
        files=kinds.count(stat.S_IFREG),
        directories=kinds.count(stat.S_IFDIR),
        size=index.meta.data_size,
        created=index.meta.created_ns / 1e9,
        source=index.meta.source,
        ino_base=index.ino_base,
        index_size=index.size,
        used_by=used_by,
        digest=sealed.digest,
    )


def damaged_info(layout: Layout, name: str, used_by: list[str], problem: str) -> TemplateInfo:
    """What there is to say of a template whose index can't be used."""
    size = layout.template(name).index.stat().st_size
    return TemplateInfo(name, 0, 0, 0, 0, 0.0, "", 0, size, used_by, None, problem)


def remove_template(layout: Layout, name: str, used_by: list[str]) -> None:
    """Remove the template ``name``. Raises ``BusyError`` when ``used_by`` names containers, ``NotFoundError``."""
    paths = template_paths(layout, name)
    if used_by:
        raise BusyError(f"template {name} is used by {', '.join(used_by)}", remedy="destroy these containers first")
    _clean_up(layout)
    with _work_folder(layout, "old", name) as work:
        os.rename(paths.meta, work / "meta")
        os.rename(paths.tree, work / "tree")


def dump_template(layout: Layout, name: str) -> Iterator[str]:
    """The index as text, one line per entry in path order; see docs/format.md."""
    index = open_index(layout, name)
    meta = index.meta
    yield f"vzfs-index 1 name={meta.name} entries={index.count} ino_base={index.ino_base} created_ns={meta.created_ns}"
    for number in index.walk():
        yield _dump_line(index, number)


def _dump_line(index: Index, number: int) -> str:
    attributes = index.attributes(number)
    kind = stat.S_IFMT(attributes.mode)
    fields = [
        "/" + printable(index.path(number)),
        f"{attributes.mode:06o}",
        f"ino={attributes.ino}",
        f"nlink={attributes.nlink}",
        f"uid={attributes.uid}",
        f"gid={attributes.gid}",
        f"size={attributes.size}",
        f"mtime={attributes.mtime_ns // 10**9}.{attributes.mtime_ns % 10**9:09d}",
    ]
    if kind == stat.S_IFLNK:
        fields.append(f"target={printable(index.target(number))}")
    elif kind == stat.S_IFREG:
        fields.append(f"sha256={index.digest(number).hex()}")
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        fields.append(f"rdev={os.major(attributes.rdev)}:{os.minor(attributes.rdev)}")
    if index.leader[number] != number:
        fields.append("link=/" + printable(index.path(index.leader[number])))
    fields += [f"xattr:{printable(os.fsencode(key))}={value.hex()}" for key, value in index.xattrs(number).items()]
    return " ".join(fields)


# ---------------------------------------------------------------------------------------------------------- verifying


def verify_template(layout: Layout, name: str, progress: Progress = no_progress) -> list[Problem]:
    """Compare the template's files with its index: every name, attribute, extended attribute, link and digest."""
    paths = template_paths(layout, name)
    with contextlib.suppress(OSError):
        paths.checked.unlink()  # a disk that rots changes no times: whoever opens it next examines it, too
    try:
        index = Index(paths.index)
    except DamagedError as error:
        return [Problem(str(paths.index), "index", error.message)]
    if fault := find_fault(index):
        return [Problem(str(paths.index), "index", f"{fault}; so nothing can be compared with it")]
    problems = []
    if not index.intact():
        problems.append(Problem(str(paths.index), "index", "the checksum differs"))
    root = os.open(paths.tree, os.O_RDONLY | os.O_DIRECTORY)
    groups: dict[int, tuple[int, int]] = {}
    try:
        for done, number in enumerate(index.walk()):
            problems += _verify_entry(root, index, number, groups)
            progress("verifying", done + 1, index.count)
    finally:
        os.close(root)
    problems += _verify_farm(paths, name, index)
    return problems


def _verify_entry(root: int, index: Index, number: int, groups: dict[int, tuple[int, int]]) -> list[Problem]:
    path = index.path(number)
    shown = "/" + os.fsdecode(path)
    try:
        fd = linux.openat2(root, path or b".", os.O_PATH | os.O_NOFOLLOW)
    except OSError as error:
        return [Problem(shown, "missing", os.strerror(error.errno or 0))]
    try:
        info = os.fstat(fd)
        problems = [
            Problem(shown, kind, f"is {is_now}, was {was}")
            for kind, is_now, was in _differences(info, index.attributes(number))
        ]
        if stat.S_IFMT(info.st_mode) != stat.S_IFMT(index.mode(number)):
            return problems
        if groups.setdefault(index.leader[number], (info.st_dev, info.st_ino)) != (info.st_dev, info.st_ino):
            problems.append(Problem(shown, "links", "is no longer a hard link of its group"))
        if _read_xattrs(linux.fd_path(fd), symlink=False) != index.xattrs(number):
            problems.append(Problem(shown, "xattrs", "the extended attributes differ"))
        return problems + _verify_content(root, fd, index, number, path, shown)
    finally:
        os.close(fd)


def _differences(info: os.stat_result, was: Attributes) -> Iterator[tuple[str, object, object]]:
    if info.st_mode != was.mode:
        yield "mode", f"{info.st_mode:06o}", f"{was.mode:06o}"
    if (info.st_uid, info.st_gid) != (was.uid, was.gid):
        yield "owner", f"{info.st_uid}:{info.st_gid}", f"{was.uid}:{was.gid}"
    if info.st_mtime_ns != was.mtime_ns:
        yield "times", info.st_mtime_ns, was.mtime_ns
    if not stat.S_ISDIR(info.st_mode) and info.st_size != was.size:
        yield "size", info.st_size, was.size
    if info.st_rdev != was.rdev:
        yield "device", info.st_rdev, was.rdev


def _verify_content(root: int, fd: int, index: Index, number: int, path: bytes, shown: str) -> list[Problem]:
    mode = index.mode(number)
    if stat.S_ISLNK(mode) and os.readlink(b"", dir_fd=fd) != index.target(number):
        return [Problem(shown, "target", "the link's text differs")]
    if stat.S_ISREG(mode):
        folder, _, name = path.rpartition(b"/")
        parent = linux.openat2(root, folder or b".", os.O_PATH | os.O_DIRECTORY)
        try:
            if _digest(parent, name) != index.digest(number):
                return [Problem(shown, "content", "the digest differs")]
        finally:
            os.close(parent)
    if stat.S_ISDIR(mode):
        parent = linux.openat2(root, path or b".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            return [
                Problem(f"{shown.rstrip('/')}/{name}", "extra", "is not in the index")
                for name in os.listdir(parent)
                if not index.find(number, os.fsencode(name))
            ]
        finally:
            os.close(parent)
    return []


def _verify_farm(paths: TemplatePaths, name: str, index: Index) -> list[Problem]:
    problems = []
    for number in range(1, index.count):
        path = paths.links / os.fsdecode(farm_entry(number))
        text = MagicLink(name, index.path(number)).text()
        try:
            found = os.readlink(os.fsencode(path))
        except OSError as error:
            found = b""
            if error.errno not in (errno.ENOENT, errno.EINVAL):
                raise
        if found != text:
            problems.append(Problem(str(path), "link farm", f"should be a link to {printable(text)}"))
    return problems
