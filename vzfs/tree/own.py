"""Making things the container's own: unfolding directories, copying files up, keeping changed attributes, link groups.

Rule: every change is staged under ``cow/stage`` where nobody looks, and becomes visible by one rename. Whatever goes
wrong before that rename leaves nothing changed. Steps are named by ``faults.step`` so that a test can die at each.

``stage_*`` methods only touch the stage and immutable templates and so run without the tree's lock; ``commit_*`` and
all others are called under it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator

from vzfs.store import sys
from vzfs.store.faults import step
from vzfs.store.flush import flusher
from vzfs.store.layout import ATTR_XATTR, FOLDS_XATTR, NLINK_XATTR, ORIGIN_XATTR, OWN_FOLDER_MODE, XATTR_PREFIX
from vzfs.store.opened import SPLIT_XATTR, OpenTemplate, apply_attributes
from vzfs.store.ownlink import make_own_link
from vzfs.store.record import Record, read_own_xattrs
from vzfs.tree.area import PrivateArea, Sync, list_names
from vzfs.tree.counters import Counters
from vzfs.tree.node import Kind, Node, private_number
from vzfs.tree.nodes import Nodes
from vzfs.tree.times import unchanged_times

log = logging.getLogger(__name__)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_SET_ID = stat.S_ISUID | stat.S_ISGID


class Owner:
    """Turns nodes of the template into the container's own."""

    def __init__(self, nodes: Nodes, area: PrivateArea, sync: Sync, counters: Counters) -> None:
        self._counters = counters
        self._nodes = nodes
        self._area = area
        self._sync = sync
        self._flush = os.fdatasync if area.read_only else flusher(area.stage_fd)

    # -------------------------------------------------------------------------------------------------- directories

    def stage_directory(self, template: OpenTemplate, entry: int, name: bytes) -> None:
        """Stage the template directory ``entry`` as a real one called ``name``, its children magic links."""
        stage = self._area.stage_fd
        os.mkdir(name, OWN_FOLDER_MODE, dir_fd=stage)
        step("unfold:made")
        fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=stage)
        try:
            template.unfold_into(fd, entry)
        finally:
            os.close(fd)
        step("unfold:staged")

    def commit_directory(self, node: Node, staged: bytes) -> None:
        """Swap the staged directory in for the magic link of the folded ``node``."""
        parent = self._nodes.parent(node)
        backing = os.lstat(staged, dir_fd=self._area.stage_fd).st_ino
        folder, name = self._nodes.location(node)
        with unchanged_times(folder):
            sys.renameat2(self._area.stage_fd, staged, folder, name, sys.RENAME_EXCHANGE)
            step("unfold:swapped")
        if parent.folded_children:
            parent.folded_children -= 1
        self._nodes.unfolded(node, backing)
        self._counters.unfolds += 1
        with _best_effort("remove the magic link that came back"):
            os.unlink(staged, dir_fd=self._area.stage_fd)

    @contextlib.contextmanager
    def folder_like(self, folder: int) -> Iterator[int]:
        """A folder on the stage that gives what is made in it the ACLs that ``folder`` would give it."""
        try:
            acl = os.getxattr(sys.entry_path(folder, b"."), sys.ACL_XATTRS[1])
        except OSError:  # ENODATA, EOPNOTSUPP: there is none
            yield self._area.stage_fd
            return
        name = self._area.stage_name()
        os.mkdir(name, OWN_FOLDER_MODE, dir_fd=self._area.stage_fd)
        with contextlib.ExitStack() as cleaning:
            cleaning.callback(self._clear_stage, name)
            fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._area.stage_fd)
            cleaning.callback(os.close, fd)
            os.setxattr(fd, sys.ACL_XATTRS[1], acl)
            yield fd

    def stands_in(self, folder: int, staged: bytes) -> bool:
        """Whether what was just made has a number that it may not have, and so was put where it keeps others off it."""
        backing = os.lstat(staged, dir_fd=folder).st_ino
        if not self._nodes.is_lost(backing):
            return False
        number = private_number(backing)
        os.rename(staged, b"%d" % number, src_dir_fd=folder, dst_dir_fd=self._area.orphans_fd)
        self._nodes.stand_ins.add(number)
        return True

    def _clear_stage(self, staged: bytes) -> None:
        with _best_effort("clear the stage"):
            self.discard_stage(staged)

    def mark_folds(self, directory: Node) -> None:
        """Say on disk that a real directory is about to hold a folded one."""
        if directory.folded_children is None or not directory.folded_children:
            os.setxattr(self._nodes.path(directory), FOLDS_XATTR, b"1", follow_symlinks=False)

    # -------------------------------------------------------------------------------------------------------- files

    def stage_file(self, source_fd: int, name: bytes, size: int, mode: int) -> int:
        """Stage a copy of the first ``size`` bytes of ``source_fd``, of the template's ``mode``, without its other
        attributes yet; gives a descriptor of it."""
        fd = os.open(name, _NEW_FILE, stat.S_IMODE(mode) & ~_SET_ID, dir_fd=self._area.stage_fd)
        while self.stands_in(self._area.stage_fd, name):
            os.close(fd)
            fd = os.open(name, _NEW_FILE, stat.S_IMODE(mode) & ~_SET_ID, dir_fd=self._area.stage_fd)
        try:
            step("copy-up:made")
            written = size > 0 and sys.copy_data(source_fd, fd, size)
            step("copy-up:copied")
            if written and self._sync is not Sync.NONE:  # names and shared blocks are the journal's, which keeps order
                self._flush(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def stage_special(self, node: Node, name: bytes) -> None:
        """Stage a symbolic link, device, FIFO or socket like the template's."""
        template = node.template
        assert template is not None
        attributes = template.index.attributes(node.entry)
        if stat.S_ISLNK(attributes.mode):
            make_own_link(self._area.stage_fd, name, template.index.target(node.entry))
        else:
            os.mknod(name, attributes.mode, attributes.rdev, dir_fd=self._area.stage_fd)
        step("copy-up:copied")

    def commit_copy(self, node: Node, staged: bytes, fd: int, mtime_ns: int | None = None) -> None:
        """Give the staged copy the node's attributes and put it in the place of the node's magic link or record.

        ``fd`` is a descriptor of it, or -1. ``mtime_ns`` replaces its modification time: a copy that lacks a part of
        the content is a modified file.
        """
        template = node.template
        assert template is not None
        copy = fd if fd >= 0 else sys.entry_path(self._area.stage_fd, staged)
        follow = fd >= 0
        attributes, xattrs = self._nodes.attributes(node), self.xattrs(node)
        os.setxattr(copy, ORIGIN_XATTR, template.origin(node.entry), follow_symlinks=follow)
        apply_attributes(copy, attributes if mtime_ns is None else attributes._replace(mtime_ns=mtime_ns), xattrs)
        backing = os.stat(copy, follow_symlinks=follow).st_ino
        keep_readers = node.passed > 0 and not node.dead
        if keep_readers:
            os.setxattr(copy, SPLIT_XATTR, b"1", follow_symlinks=follow)
        with contextlib.ExitStack() as cleaning:
            fds = [] if keep_readers else self._for_handles(node, staged, cleaning)
            step("copy-up:staged")
            self._place_copy(node, staged, attributes.nlink)
            self._counters.copy_ups += 1
            if keep_readers:
                node.last = attributes
                self._nodes.split(node, backing, sys.generation_of(fd, b""))
                self._nodes.changed(node.number)
                return
            self._nodes.set_own(node, Kind.OWN, backing)
            self._nodes.register(node)
            for handle, fd in zip(node.handles or (), fds, strict=True):
                os.dup2(fd, handle.fd, inheritable=False)
            self._nodes.changed(node.number)

    def _place_copy(self, node: Node, staged: bytes, nlink: int) -> None:
        """Put the finished copy in the place of what stood for the node."""
        stage = self._area.stage_fd
        if node.dead:
            orphan = b"%d" % node.number
            os.rename(staged, orphan, src_dir_fd=stage, dst_dir_fd=self._area.orphans_fd)
            node.orphan = orphan
        elif node.group:
            self._place_record(node, staged, nlink)
        else:
            folder, name = self._nodes.location(node)
            with unchanged_times(folder):
                os.rename(staged, name, src_dir_fd=stage, dst_dir_fd=folder)
                step("copy-up:renamed")

    def _for_handles(self, node: Node, staged: bytes, cleaning: contextlib.ExitStack) -> list[int]:
        """Descriptors of the copy: who has the file open already shall see it, as on any other file system."""
        fds = []
        for _ in node.handles or ():
            fds.append(os.open(staged, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._area.stage_fd))
            cleaning.callback(os.close, fds[-1])
        return fds

    def flush_place(self, node: Node) -> Callable[[], None] | None:
        """With ``Sync.FULL``, what flushes the directory in which the node just changed; to be run without the lock."""
        if self._sync is not Sync.FULL or node.dead:
            return None
        fd = os.open(b".", _DIRECTORY, dir_fd=self._nodes.location(node)[0])

        def flush() -> None:
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

        return flush

    # --------------------------------------------------------------------------------------------------- attributes

    def change_record(
        self, node: Node, change: Callable[[Record], Record], xattrs: dict[str, bytes] | None = None
    ) -> None:
        """Keep changed attributes, and the whole set of extended ones if given, of a template file without its data."""
        record = self._record(node)
        record = change(record)
        if node.kind is Kind.RECORD:
            path = self._nodes.path(node)
            if xattrs is not None:
                self._replace_xattrs(path, xattrs)
            os.setxattr(path, ATTR_XATTR, record.encode(), follow_symlinks=False)
            _touch(path)  # the same value again would not move the change time
            node.record = record
            return
        self._make_record(node, record, xattrs, self._nodes.attributes(node).nlink)

    def touch(self, node: Node) -> None:
        """Move the change time of what stores the node."""
        _touch(self._nodes.path(node))

    def _record(self, node: Node) -> Record:
        if node.kind is not Kind.RECORD or node.dead:
            return Record()
        return self._nodes.record(node)

    def _make_record(self, node: Node, record: Record, xattrs: dict[str, bytes] | None, nlink: int) -> None:
        """Stage a magic link with attributes and put it in the place of the node's shared one."""
        template = node.template
        assert template is not None
        staged = self._area.stage_name()
        stage = self._area.stage_fd
        path = sys.entry_path(stage, staged)
        os.symlink(template.link_text(node.entry), staged, dir_fd=stage)
        try:
            step("record:made")
            os.setxattr(path, ATTR_XATTR, record.encode(), follow_symlinks=False)
            for xattr, value in (xattrs or {}).items():
                os.setxattr(path, XATTR_PREFIX + xattr, value, follow_symlinks=False)
            step("record:staged")
            if node.group:
                self._place_record(node, staged, nlink)
            else:
                folder, name = self._nodes.location(node)
                with unchanged_times(folder):
                    os.rename(staged, name, src_dir_fd=stage, dst_dir_fd=folder)
                    step("record:renamed")
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged, dir_fd=stage)
            raise
        node.kind = Kind.RECORD
        node.record = record
        self._nodes.register(node)

    @staticmethod
    def _replace_xattrs(path: bytes, wanted: dict[str, bytes]) -> None:
        present = read_own_xattrs(path)
        for name in present.keys() - wanted.keys():
            os.removexattr(path, XATTR_PREFIX + name, follow_symlinks=False)
        for name, value in wanted.items():
            if present.get(name) != value:
                os.setxattr(path, XATTR_PREFIX + name, value, follow_symlinks=False)

    def xattrs(self, node: Node) -> dict[str, bytes]:
        """All extended attributes of a node that still has the template's data."""
        assert node.template is not None
        if node.kind is Kind.RECORD and self._record(node).own_xattrs:
            return read_own_xattrs(self._nodes.path(node))
        return node.template.index.xattrs(node.entry)

    # -------------------------------------------------------------------------------------------------- link groups

    def _place_record(self, node: Node, staged: bytes, nlink: int) -> None:
        """Make the staged object the record of the node's link group: all its names change at once."""
        assert node.template is not None
        stage = self._area.stage_fd
        key = node.template.group_key(node.entry)
        os.setxattr(sys.entry_path(stage, staged), NLINK_XATTR, b"%d" % nlink, follow_symlinks=False)
        step("link-group:staged")
        os.rename(staged, key, src_dir_fd=stage, dst_dir_fd=self._area.links_fd)
        step("link-group:renamed")
        self._nodes.add_group(node.template, node.entry)

    def make_group(self, node: Node) -> None:
        """Let a template entry with one name become a link group, so that it can have more."""
        record, own = self._record(node), None
        if record.own_xattrs:
            own = self.xattrs(node)
        nlink = self._nodes.attributes(node).nlink
        node.group = True
        try:
            self._make_record(node, record, own, nlink)
        except BaseException:
            node.group = False
            raise
        self._nodes.leave_place(node)

    def begin_counting(self, node: Node) -> None:
        """Make sure that the count of the group's names can be changed without needing space, by making its record."""
        if node.kind is Kind.TEMPLATE:
            self._make_record(node, Record(), None, self._nodes.group_nlink(node))

    def change_group_nlink(self, node: Node, difference: int) -> None:
        """Count names of the node's link group that are to come (or, negative, didn't)."""
        self.begin_counting(node)
        nlink = self._nodes.group_nlink(node) + difference
        os.setxattr(self._nodes.path(node), NLINK_XATTR, b"%d" % nlink, follow_symlinks=False)
        step("link-group:counted")

    def count_lost_name(self, node: Node) -> None:
        """Count a name of the link group that is gone."""
        with _best_effort("count the names of a link group"):
            self.change_group_nlink(node, -1)

    def end_group(self, node: Node) -> None:
        """The last name of the group is gone: remove its record, or keep it as an orphan while it is known."""
        assert node.template is not None
        key = node.template.group_key(node.entry)
        with _best_effort("remove a link group's record"):
            if self._nodes.is_known(node) and node.kind is Kind.OWN:
                orphan = b"%d" % node.number
                os.rename(key, orphan, src_dir_fd=self._area.links_fd, dst_dir_fd=self._area.orphans_fd)
                node.orphan = orphan
            else:
                os.unlink(key, dir_fd=self._area.links_fd)
        step("link-group:ended")
        self._nodes.end_group(node.template, node.entry)

    # ------------------------------------------------------------------------------------------------------ orphans

    # An own object that loses its last known name gets one in ``cow/orphans`` if it is open, large or a directory (else
    # see ``Pins``): so it stays usable, and its inode number isn't given to another while the kernel still holds it.

    def move_to_orphans(self, node: Node, folder: int, name: bytes) -> None:
        """Take the last ``name`` of an own object away."""
        orphan = b"%d" % node.number
        os.rename(name, orphan, src_dir_fd=folder, dst_dir_fd=self._area.orphans_fd)
        step("orphan:moved")
        node.orphan = orphan

    def move_directory_to_orphans(self, node: Node, folder: int, name: bytes) -> None:
        """Take the ``name`` of a directory away. Raises ``OSError`` ``ENOTEMPTY``."""
        fd = self._nodes.directory_fd(node)  # open, so that it keeps its inode number if it can't be moved
        if list_names(fd):
            raise OSError(errno.ENOTEMPTY, "directory not empty", name)
        try:
            self.move_to_orphans(node, folder, name)
        except OSError:  # no space for one more name there
            os.rmdir(name, dir_fd=folder)

    def link_to_orphans(self, node: Node, folder: int, name: bytes) -> None:
        """Keep an own object that is about to lose ``name``."""
        orphan = b"%d" % node.number
        os.link(name, orphan, src_dir_fd=folder, dst_dir_fd=self._area.orphans_fd, follow_symlinks=False)
        step("orphan:linked")
        node.orphan = orphan

    def leave_orphans(self, node: Node) -> None:
        """Undo ``link_to_orphans``: the node keeps its name."""
        orphan, node.orphan = node.orphan, b""
        with _best_effort("remove an orphan's name"):
            os.unlink(orphan, dir_fd=self._area.orphans_fd)

    def discard_stage(self, staged: bytes) -> None:
        """Remove what was staged in vain."""
        sys.remove_tree(self._area.stage_fd, staged)


@contextlib.contextmanager
def _best_effort(what: str) -> Iterator[None]:
    """For what comes after a change that is done: it can't fail any more. What is left over, ``check`` finds."""
    try:
        yield
    except OSError:
        log.exception("can't %s", what)


def _touch(path: bytes) -> None:
    """Move the change time of what is at ``path``, not followed."""
    info = os.lstat(path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def no_space(error: OSError) -> bool:
    """Whether the error says that an extended attribute did not fit where one was tried to be kept."""
    return error.errno in (errno.ENOSPC, errno.E2BIG, errno.ERANGE)
