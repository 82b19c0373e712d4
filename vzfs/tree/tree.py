"""One mounted container: the operations of a file system on node numbers and names.

Synchronous, knows nothing of FUSE, works without a mount. Rules:
- Every method may be called from any thread. The lock, which may be entered again and whose holder sees nothing change,
  is held for what is quick; copying data and building directories happen without it (``Owner.stage_*``), so that
  look-ups go on.
- Errors are ``OSError`` with the errno that the program shall see.
- Permission has been checked by the caller (the kernel, with ``default_permissions``); ownership of what is made is set
  here.
- Names are single components of 1 to 255 bytes without ``/`` and NUL, which the kernel guarantees but for the length.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import TypeVar

from vzfs.store import sys
from vzfs.store.faults import step
from vzfs.store.index import Attributes
from vzfs.store.ownlink import make_own_link
from vzfs.tree.core import ROOT, SLOW_COPY, Caller, Changes
from vzfs.tree.files import BACKING_FLAGS, Files
from vzfs.tree.node import Entry, Handle, Kind, Node, refuse_damaged
from vzfs.tree.nodes import check_name

Made = TypeVar("Made")


class Tree(Files):
    """The file system of the container at ``container``; its lock must be held by the caller.

    With ``resume`` the kernel goes on with what it knows from a dead process that served the container: orphans are
    kept and every node number that process gave is understood (see ``vzfs.tree.resume``).

    ``changed(number)`` is called, under the lock, whenever the object that holds the data of the node is another one
    from now on, or gone. Raises ``OSError`` and, at construction, ``VzfsError`` when the container or its template is
    damaged or missing.
    """

    # ---------------------------------------------------------------------------------------------------------- making

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Entry:
        """Make a directory."""
        return self._make(parent, name, caller, lambda fd, name: os.mkdir(name, mode & 0o7777, dir_fd=fd))[1]

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Entry:
        """Make a regular file, device, FIFO or socket; ``mode`` has the type."""
        return self._make(parent, name, caller, lambda fd, name: os.mknod(name, mode, rdev, dir_fd=fd))[1]

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Entry:
        """Make a symbolic link; a text that would be a magic link is stored so that it is none."""
        return self._make(parent, name, caller, lambda fd, name: make_own_link(fd, name, target))[1]

    def _make(self, parent: int, name: bytes, caller: Caller, make: Callable[[int, bytes], Made]) -> tuple[Made, Entry]:
        check_name(name)
        self._own_directory(parent)
        with self.lock:
            return self._make_in(self._living_directory(parent), name, caller, make)

    def _make_in(
        self, directory: Node, name: bytes, caller: Caller, make: Callable[[int, bytes], Made]
    ) -> tuple[Made, Entry]:
        """Let ``make`` make ``name`` as the caller's own, and give what it gave; ``name`` never has another owner.

        The umask is the process's, and applied by the file system unless a default ACL decides instead; all else that
        is made here gets its mode by chmod(2) afterwards.
        """
        fd = self._nodes.directory_fd(directory)
        gid = _given_group(fd)
        rooted = caller.uid == os.geteuid() and (gid is not None or caller.gid == os.getegid())
        if rooted and not self._pins.lost:
            os.umask(caller.umask)
            try:
                made = make(fd, name)
            finally:
                os.umask(0)
            step("make:made")
            return made, self._adopt(directory, fd, name)
        with self._made_on_stage(fd, gid, caller, make) as (made, stage, staged):
            sys.renameat2(stage, staged, fd, name, sys.RENAME_NOREPLACE)
            step("make:named")
        return made, self._adopt(directory, fd, name)

    @contextlib.contextmanager
    def _made_on_stage(
        self, fd: int, gid: int | None, caller: Caller, make: Callable[[int, bytes], Made]
    ) -> Iterator[tuple[Made, int, bytes]]:
        """What ``make`` made for the directory ``fd``, which gives it the group ``gid``; removed if the block fails."""
        with self._owner.folder_like(fd) as stage:
            staged = self._area.stage_name()
            try:
                os.umask(caller.umask)
                try:
                    made = make(stage, staged)
                    while self._owner.stands_in(stage, staged):
                        made = make(stage, staged)
                finally:
                    os.umask(0)
                step("make:made")
                _give_to(stage, staged, caller.uid, caller.gid if gid is None else gid)
                if gid is not None and stat.S_ISDIR(os.lstat(staged, dir_fd=stage).st_mode):
                    _add_mode(stage, staged, stat.S_ISGID)
                yield made, stage, staged
            except BaseException:
                sys.remove_tree(stage, staged)
                raise

    def _adopt(self, directory: Node, fd: int, name: bytes) -> Entry:
        """Give the just made ``name`` a node; if that fails, it is unmade."""
        try:
            info = os.lstat(name, dir_fd=fd)
            node = self._nodes.adopt(directory, name, info)
            node.lookups += 1
            return self._nodes.entry(node, info)
        except BaseException:
            sys.remove_tree(fd, name)
            raise

    def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Handle, Entry]:
        """Make a regular file and open it, or open it if it is there and ``flags`` don't have ``O_EXCL``."""
        check_name(name)
        self._check_room(caller)
        self._own_directory(parent)
        while True:
            with self.lock:
                directory = self._living_directory(parent)
                present = None if flags & os.O_EXCL else self._nodes.child(directory, name)
                if present is None:
                    return self._create(directory, name, mode, flags, caller)
            # Not under the lock: it may be waiting for whoever is copying the file.
            handle = self.open(present.number, flags, caller)
            with self.lock:
                node = self._nodes.child(self._directory(parent), name)
                if node is handle.node:
                    node.lookups += 1
                    return handle, self._nodes.entry(node)
            self.release(handle.number)  # it is another file by now

    def _create(self, directory: Node, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Handle, Entry]:
        with _NewFile(mode, flags) as make:
            backing, entry = self._make_in(directory, name, caller, make)
        return self._add_handle(self._nodes.get(entry.number), backing, flags, caller), entry

    def tmpfile(self, parent: int, mode: int, flags: int, caller: Caller) -> tuple[Handle, Entry]:
        """Make a regular file without a name and open it (``O_TMPFILE``); ``link`` may give it one."""
        self._check_room(caller)
        self._own_directory(parent)
        with self.lock:
            fd = self._nodes.directory_fd(self._living_directory(parent))
            with (
                _NewFile(mode, flags) as make,
                self._made_on_stage(fd, _given_group(fd), caller, make) as (backing, stage, staged),
            ):
                node = self._nodes.new_own(Kind.OWN, os.fstat(backing).st_ino, sys.generation_of(backing, b""))
                self._owner.move_to_orphans(node, stage, staged)
            node.dead = True
            node.lookups += 1
            node.last = self._nodes.attributes(node)
            self._nodes.register(node)
            return self._add_handle(node, backing, flags, caller), self._nodes.entry(node)

    def link(self, number: int, parent: int, name: bytes) -> Entry:
        """Make ``name`` one more hard link to the node."""
        check_name(name)
        self._own_directory(parent)
        with self.lock:
            node = self._nodes.get(number)
            directory = self._living_directory(parent)
            fd = self._nodes.directory_fd(directory)
            if node.is_directory:
                raise PermissionError(errno.EPERM, "a directory has one name", name)
            refuse_damaged(node)
            if self._exists(fd, name):
                raise FileExistsError(errno.EEXIST, "exists", name)
            if node.dead:
                self._name_again(node, directory, fd, name)
            elif node.kind is Kind.OWN and not node.group:
                source, source_name = self._nodes.location(node)
                os.link(source_name, name, src_dir_fd=source, dst_dir_fd=fd, follow_symlinks=False)
                self._nodes.add_name(node, directory, name)
            else:
                self._link_group(node, fd, name)
            node.lookups += 1
            return self._nodes.entry(node)

    def _name_again(self, node: Node, directory: Node, fd: int, name: bytes) -> None:
        """Give an own file a name that has none."""
        if not node.orphan or node.group:
            raise FileNotFoundError(errno.ENOENT, "the node was unlinked", name)
        backing = os.lstat(node.orphan, dir_fd=self._area.orphans_fd).st_ino
        sys.renameat2(self._area.orphans_fd, node.orphan, fd, name, sys.RENAME_NOREPLACE)
        step("orphan:named")
        node.orphan, node.dead, node.last = b"", False, None
        self._nodes.set_own(node, Kind.OWN, backing)
        self._nodes.place(node, directory, name)

    def _link_group(self, node: Node, fd: int, name: bytes) -> None:
        assert node.template is not None
        if not node.group:
            self._owner.make_group(node)
        self._durable.doubt = node.number
        self._owner.change_group_nlink(node, +1)
        try:
            node.template.plant_link(fd, name, node.entry)
            step("link-group:planted")
        except BaseException:
            self._owner.change_group_nlink(node, -1)
            raise
        finally:
            self._durable.doubt = 0

    @staticmethod
    def _exists(fd: int, name: bytes) -> bool:
        try:
            os.lstat(name, dir_fd=fd)
        except FileNotFoundError:
            return False
        return True

    # -------------------------------------------------------------------------------------------------------- removing

    def unlink(self, parent: int, name: bytes) -> int | None:
        """Remove a name of something that is no directory.

        Gives the number of a node whose much space should be given back at once, by ``free``, because nobody has it
        open and the kernel forgets it in its own time.
        """
        self._own_directory(parent)
        with self.lock:
            directory = self._living_directory(parent)
            node, info = self._existing(directory, name)
            if node.is_directory:
                raise IsADirectoryError(errno.EISDIR, "is a directory", name)
            last = self._loses_last_name(node, info)
            fd = self._nodes.directory_fd(directory)
            keep = self._must_keep(node, directory, name, last=last)
            if keep and last and self._pin(node, fd, name):
                keep = False
            with self._losing_name(node):
                step("unlink:before")
                if keep and last:
                    self._owner.move_to_orphans(node, fd, name)
                else:
                    if keep:
                        self._owner.link_to_orphans(node, fd, name)
                    os.unlink(name, dir_fd=fd)
                step("unlink:done")
            self._after_losing_name(node, directory, name, last=last)
            much = node.orphan and not node.is_open and node.last is not None and node.last.blocks * 512 > SLOW_COPY
            return node.number if much else None

    def free(self, number: int) -> None:
        """Give back the space of an unlinked node unless somebody has it open; for large files this is long work."""
        with self.lock:
            node = self._nodes.registered(number)
            if node is None or not node.dead or node.is_open or not node.orphan:
                return
            orphan, node.orphan = node.orphan, b""
            self._nodes.changed(number)
        os.unlink(orphan, dir_fd=self._area.orphans_fd)

    def _existing(self, directory: Node, name: bytes) -> tuple[Node, os.stat_result | None]:
        node, info = self._nodes.find(directory, name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "no such name", name)
        return node, info

    def _must_keep(self, node: Node, directory: Node, name: bytes, *, last: bool) -> bool:
        """Whether the node, about to lose this name, needs another one to stay usable for who knows it already."""
        if node.kind is not Kind.OWN or node.group or node.orphan:
            return False
        if last:
            return self._nodes.is_known(node)
        return node.is_open and not node.others and self._nodes.lies_at(node, directory, name)

    def _pin(self, node: Node, folder: int, name: bytes) -> bool:
        """Let the node, about to lose its last name, need none: if nobody has it open and it takes little space.

        After a predecessor's death nobody knows for certain what is open.
        """
        assert node.last is not None
        if node.is_open or self._nodes.resumed or node.last.blocks * 512 > SLOW_COPY:
            return False
        return self._pins.pin(node, folder, name, node.last)

    def _loses_last_name(self, node: Node, info: os.stat_result | None) -> bool:
        """Whether the node, about to lose a name, has only that; then its attributes without it are noted."""
        if node.kind is Kind.OWN and not node.group and info is not None and not stat.S_ISLNK(info.st_mode):
            last = info.st_nlink - bool(node.orphan) <= 1  # all that ``attributes`` would look at
            if last:
                node.last = Attributes.of(info, node.ino, 0)
            return last
        now = self._nodes.attributes(node, info)
        last = now.nlink <= 1 or node.is_directory
        if last:
            node.last = now._replace(nlink=0)
        return last

    @contextlib.contextmanager
    def _losing_name(self, node: Node) -> Iterator[None]:
        """Around what takes a name of the node away.

        A link group is counted afterwards: dying in between leaves it counted too high, which keeps its data, while
        counted too low it would be given up with a name still there.
        """
        orphan = node.orphan
        if node.group:
            self._durable.doubt = node.number
            self._owner.begin_counting(node)
        try:
            yield
        except BaseException:
            if node.orphan != orphan:
                self._owner.leave_orphans(node)
            self._pins.release(node.number)
            raise
        if node.group:
            self._owner.count_lost_name(node)

    def _after_losing_name(self, node: Node, directory: Node, name: bytes, *, last: bool) -> None:
        if node.group:
            if last:
                self._owner.end_group(node)
            self._durable.doubt = 0
        if last:
            self._nodes.bury(node)
        elif not node.group:
            self._nodes.remove_name(node, directory, name)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        self._own_directory(parent)
        with self.lock:
            directory = self._living_directory(parent)
            node, info = self._existing(directory, name)
            fd = self._nodes.directory_fd(directory)
            if not node.is_directory:
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", name)
            self._loses_last_name(node, info)
            step("rmdir:before")
            if node.kind is Kind.FOLDED:
                self._check_empty(node)
                os.unlink(name, dir_fd=fd)
                self._count_folded(directory, -1)
            elif self._nodes.is_known(node):
                self._owner.move_directory_to_orphans(node, fd, name)
            else:
                os.rmdir(name, dir_fd=fd)
            step("rmdir:done")
            self._nodes.bury(node)

    @staticmethod
    def _check_empty(node: Node) -> None:
        assert node.template is not None
        if node.template.index.child_count[node.entry]:
            raise OSError(errno.ENOTEMPTY, "directory not empty")

    @staticmethod
    def _count_folded(directory: Node, difference: int) -> None:
        if directory.folded_children is not None:
            directory.folded_children += difference

    # -------------------------------------------------------------------------------------------------------- renaming

    def rename(
        self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int = 0, request: int = 0
    ) -> None:
        """rename(2) with the flags of renameat2(2); a successor can ask about ``request``, see ``renamed``."""
        if flags & ~(sys.RENAME_NOREPLACE | sys.RENAME_EXCHANGE | sys.RENAME_WHITEOUT):
            raise OSError(errno.EINVAL, "unknown rename flags")
        check_name(new_name)
        self._own_directory(old_parent)
        self._own_directory(new_parent)
        with self.lock:
            source_dir, target_dir = self._living_directory(old_parent), self._living_directory(new_parent)
            source, _ = self._existing(source_dir, old_name)
            target, info = self._nodes.find(target_dir, new_name)
            self._check_rename(source, target, source_dir, target_dir, flags)
            first = self._to_be_own(source, target, flags)
            if first is None:
                self._rename(source_dir, old_name, source, target_dir, new_name, target, info, flags, request)
                return
        if first.is_directory:
            self._own_directory(first.number)
        else:
            self.own_file(first.number)
        self.rename(old_parent, old_name, new_parent, new_name, flags, request)

    def renamed(self, request: int, old_parent: int, old_name: bytes) -> bool:
        """Whether ``request``, one that leaves something at the old name, had been carried out by a predecessor."""
        noted = self._durable.noted_rename(request)
        if noted is None:
            return False
        with self.lock:
            directory = self._directory(old_parent)
            if directory.kind is not Kind.DIRECTORY or directory.dead:
                return False
            fd = self._nodes.directory_fd(directory)
            return os.lstat(old_name, dir_fd=fd).st_ino != noted

    def _check_rename(self, source: Node, target: Node | None, source_dir: Node, target_dir: Node, flags: int) -> None:
        """What the kernel checks as well, and what only we know."""
        if target is None:
            if flags & sys.RENAME_EXCHANGE:
                raise FileNotFoundError(errno.ENOENT, "nothing to exchange with")
            self._check_not_below(source, target_dir)
            return
        if flags & sys.RENAME_NOREPLACE:
            raise FileExistsError(errno.EEXIST, "exists")
        self._check_not_below(source, target_dir)
        if flags & sys.RENAME_EXCHANGE:
            self._check_not_below(target, source_dir)
            return
        if target is source:
            return
        if source.is_directory and not target.is_directory:
            raise NotADirectoryError(errno.ENOTDIR, "can't replace by a directory")
        if target.is_directory and not source.is_directory:
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        if target.kind is Kind.FOLDED:
            self._check_empty(target)

    def _check_not_below(self, node: Node, directory: Node) -> None:
        """A directory can't be moved below itself."""
        while node.is_directory and directory is not self._nodes.root:
            if directory.number == node.number:
                raise OSError(errno.EINVAL, "can't move a directory into itself")
            directory = self._nodes.parent(directory)

    def _rename(
        self,
        source_dir: Node,
        old_name: bytes,
        source: Node,
        target_dir: Node,
        new_name: bytes,
        target: Node | None,
        target_info: os.stat_result | None,
        flags: int,
        request: int,
    ) -> None:
        if target is not None and target.number == source.number:
            return  # two names of one inode: rename(2) does nothing
        self._nodes.register(source)
        exchange = bool(flags & sys.RENAME_EXCHANGE)
        last = target is not None and not exchange and self._loses_last_name(target, target_info)
        if source.kind is Kind.FOLDED and target_dir is not source_dir:
            self._owner.mark_folds(target_dir)
        if exchange and target is not None and target.kind is Kind.FOLDED:
            self._owner.mark_folds(source_dir)
        self._change_ctime(source)
        if exchange and target is not None:
            self._change_ctime(target)
        if last and target is not None and target.kind is Kind.DIRECTORY:
            self._nodes.directory_fd(target)  # open, so that it keeps its inode number
        source_fd, target_fd = self._nodes.directory_fd(source_dir), self._nodes.directory_fd(target_dir)
        keep = target is not None and not exchange and self._must_keep(target, target_dir, new_name, last=last)
        if keep and last and target is not None and self._pin(target, target_fd, new_name):
            keep = False
        with self._losing_name(target) if target is not None and not exchange else contextlib.nullcontext():
            if keep and target is not None:
                self._owner.link_to_orphans(target, target_fd, new_name)
            if request and flags & (sys.RENAME_EXCHANGE | sys.RENAME_WHITEOUT):
                self._durable.note_rename(request, os.lstat(old_name, dir_fd=source_fd).st_ino)
            step("rename:before")
            sys.renameat2(source_fd, old_name, target_fd, new_name, flags)
            step("rename:done")
        if source.kind is Kind.FOLDED:
            self._count_folded(source_dir, -1)
            self._count_folded(target_dir, +1)
        if target is not None and target.kind is Kind.FOLDED:
            self._count_folded(target_dir, -1)
            if exchange:
                self._count_folded(source_dir, +1)
        if target is not None and not exchange:
            self._after_losing_name(target, target_dir, new_name, last=last)
        self._moved(source, source_dir, old_name, target_dir, new_name)
        if target is not None and exchange:
            self._moved(target, target_dir, new_name, source_dir, old_name)

    @staticmethod
    def _to_be_own(source: Node, target: Node | None, flags: int) -> Node | None:
        """What has to be made the container's own before a rename, if anything.

        A template's symbolic link or device, since a record holds the new change time of regular files only; and one of
        two directories, see ``_must_be_real``.
        """
        if target is not None and target.number == source.number:
            return None
        for node in (source, target if flags & sys.RENAME_EXCHANGE else None):
            if node is not None and node.kind is Kind.TEMPLATE:
                assert node.template is not None
                if not stat.S_ISREG(node.template.index.mode(node.entry)):
                    return node
        return None if target is None or flags else _must_be_real(source, target)

    def _change_ctime(self, node: Node) -> None:
        """Give what is renamed a change time of its own, by which incremental backups go, where the store's rename(2)
        doesn't: a template's regular file, and what lies in a link group's record."""
        if node.kind in (Kind.TEMPLATE, Kind.RECORD):
            self._owner.change_record(node, lambda record: record)
        elif node.group:
            self._owner.touch(node)

    def _moved(self, node: Node, old_directory: Node, old_name: bytes, directory: Node, name: bytes) -> None:
        if not node.group:
            self._nodes.move_name(node, old_directory, old_name, directory, name)
            self._nodes.register(node)


def _must_be_real(source: Node, target: Node) -> Node | None:
    """Which of two directories has to be unfolded so that ``source`` can replace ``target``, if one has.

    A folded directory lies in the private area as a link, which can't replace a real one or be replaced by one.
    """
    if source.kind is Kind.FOLDED and target.kind is Kind.DIRECTORY:
        return source
    return target if source.kind is Kind.DIRECTORY and target.kind is Kind.FOLDED else None


def _given_group(folder: int) -> int | None:
    """The group that a directory gives to what is made in it, if it does."""
    info = os.fstat(folder)
    return info.st_gid if info.st_mode & stat.S_ISGID else None


def _give_to(folder: int, name: bytes, uid: int, gid: int) -> None:
    """Set the owner of the new ``name`` and keep its mode, from which chown(2) takes bits."""
    mode = os.lstat(name, dir_fd=folder).st_mode
    os.chown(name, uid, gid, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISLNK(mode):
        _add_mode(folder, name, mode & (stat.S_ISUID | stat.S_ISGID))


def _add_mode(folder: int, name: bytes, bits: int) -> None:
    mode = stat.S_IMODE(os.lstat(name, dir_fd=folder).st_mode)
    if bits & ~mode:
        os.chmod(name, mode | bits, dir_fd=folder)


class _NewFile:
    """Makes and opens a regular file with the flags of open(2), when called; called again, it closes the one of before.

    It is closed again if the block fails.
    """

    __slots__ = ("_fd", "_flags", "_mode")

    def __init__(self, mode: int, flags: int) -> None:
        self._flags = flags & BACKING_FLAGS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._mode = mode & 0o7777
        self._fd = -1

    def __call__(self, folder: int, name: bytes) -> int:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._fd = os.open(name, self._flags, self._mode, dir_fd=folder)
        return self._fd

    def __enter__(self) -> _NewFile:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if failed is not None and self._fd >= 0:
            os.close(self._fd)


__all__ = ["ROOT", "Caller", "Changes", "Tree"]
