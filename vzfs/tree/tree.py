"""One mounted container: the operations of a file system on node numbers and names.

Synchronous, knows nothing of FUSE, works without a mount. Rules:
- Every method may be called from any thread. The lock, which may be entered again and whose holder sees nothing change,
  is held for what is quick; copying data and building directories happen without it (``become.protocol``), so that
  look-ups go on.
- Errors are ``OSError`` with the errno that the program shall see.
- Permission has been checked by the caller (the kernel, with ``default_permissions``); ownership of what is made is set
  here.
- Names are single components of 1 to 255 bytes without ``/`` and NUL, which the kernel guarantees but for the length.

This is the front of the house: each operation is in the room that is named for it. Rooms know those below them only:
templates, table, lookup, attributes; stage and ``become``; groups, orphans, open; and above them make, link, remove,
rename, change, xattrs, flags, listing.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from vzfs import linux
from vzfs.store.granted import Granted
from vzfs.store.index import Attributes
from vzfs.store.layout import Layout
from vzfs.store.ownlink import read_own_link
from vzfs.store.view import View
from vzfs.tree.area import PrivateArea, Sync, list_names
from vzfs.tree.attributes import AttributeReader
from vzfs.tree.become.directory import Directories
from vzfs.tree.become.file import Copies
from vzfs.tree.become.protocol import Protocol
from vzfs.tree.become.record import Records
from vzfs.tree.become.speed import Speed
from vzfs.tree.become.stage import Stage
from vzfs.tree.caller import ROOT, Caller
from vzfs.tree.change import Changes, Changing
from vzfs.tree.counters import Counters
from vzfs.tree.durable import Durable, Words
from vzfs.tree.flags import FileFlags
from vzfs.tree.groups import Groups
from vzfs.tree.link import Linking
from vzfs.tree.listing import Listings
from vzfs.tree.lookup import Lookup
from vzfs.tree.make import Making
from vzfs.tree.node import Entry, Kind
from vzfs.tree.open import OpenFiles
from vzfs.tree.orphans import Orphans
from vzfs.tree.pins import Pins
from vzfs.tree.ready import Ready
from vzfs.tree.remove import Removing
from vzfs.tree.rename import Renaming
from vzfs.tree.resume import Resuming, count_doubted
from vzfs.tree.table import Table
from vzfs.tree.templates import TemplatesInUse
from vzfs.tree.xattrs import ExtendedAttributes


class Tree:
    """The file system of the container at ``container``; its lock must be held by the caller.

    With ``resume`` the kernel goes on with what it knows from a dead process that served the container: orphans are
    kept and every node number that process gave is understood (see ``vzfs.tree.resume``); ``durable`` is what that
    process left in memory.

    ``passthrough_above`` is the size in bytes above which the engine lets the kernel read a template's file by itself;
    ``None``: it never does. ``changed(number)`` is called, under the lock, whenever the object that holds the data of
    the node is another one from now on, or gone. Raises ``OSError`` and, at construction, ``VzfsError`` when the
    container or its template is damaged or missing.
    """

    def __init__(
        self,
        layout: Layout,
        container: Path,
        *,
        read_only: bool = False,
        sync: Sync = Sync.DATA,
        passthrough_above: int | None = None,
        resume: bool = False,
        changed: Callable[[int], None] | None = None,
        durable: Words | None = None,
    ) -> None:
        granted = Granted(layout, container)
        self.lock = threading.RLock()
        self.counters = Counters()
        self._read_only = read_only
        self._view = View(container, layout.templates)
        self._area = PrivateArea(container, self._view, read_only=read_only)
        try:
            if not read_only:
                self._area.clear_stage()
            if not read_only and not resume:
                self._area.clear_orphans()
            self._durable = Durable(durable)
            self._pins = Pins(self._durable)
            if resume:
                count_doubted(granted, container, self._area, self._durable)
            self._templates = TemplatesInUse(
                lambda name: granted.serve(name, self._view),
                granted.os_template,
                set(list_names(self._area.links_fd)),
                passthrough_above,
            )
            self._build(sync, changed)
            if resume:
                Resuming(self._area, self._pins, self._templates, self._table, self._lookup, self._attributes).resume()
        except BaseException:
            self._area.close()
            self._view.close()
            raise

    def _build(self, sync: Sync, changed: Callable[[int], None] | None) -> None:
        """Put the rooms on top of each other, and give their doors the names of the operations."""
        lock, area, pins, durable, templates = self.lock, self._area, self._pins, self._durable, self._templates
        speed = Speed.of(sync)
        table = self._table = Table(area, pins, templates, changed)
        lookup = self._lookup = Lookup(area, pins, templates, table)
        attributes = self._attributes = AttributeReader(area, templates, table, lookup)
        stage = Stage(area, templates, table, lookup)
        records = Records(area, lookup, table, attributes, stage)
        groups = Groups(area, templates, table, lookup, attributes, records)
        protocol = Protocol(area, lock, sync, table, lookup, stage)
        directories = Directories(area, lock, speed, self.counters, table, lookup, protocol)
        copies = self._copies = Copies(
            area, lock, sync, speed, self.counters, table, lookup, attributes, stage, protocol, directories
        )
        orphans = Orphans(area, lock, pins, table, lookup)
        opening = self._opening = OpenFiles(lock, table, lookup, copies, orphans)
        changing = Changing(lock, lookup, attributes, records, directories, copies, opening)
        flags = FileFlags(lock, lookup, directories, copies, opening)
        xattrs = ExtendedAttributes(lock, lookup, attributes, records, directories, copies)
        making = Making(area, lock, pins, table, lookup, attributes, stage, directories, orphans, opening)
        linking = Linking(area, lock, durable, table, lookup, attributes, groups, directories)
        removing = Removing(lock, pins, durable, table, lookup, attributes, groups, directories, orphans)
        renaming = Renaming(lock, durable, table, lookup, records, directories, copies, orphans, removing)
        listings = Listings(lock, table, lookup, attributes)
        ready = Ready(lock, templates, table)

        self.ready_lookup, self.ready_attributes = ready.lookup, ready.attributes
        self.ready_listing, self.ready_xattr = ready.listing, ready.no_xattrs
        self.forget, self.slow_to_forget, self.free = orphans.forget, orphans.slow_to_forget, orphans.free
        self.listing, self.list_real, self.slow_to_list = listings.start, listings.go_on, listings.slow_to_list
        self.open, self.release, self.handle = opening.open, opening.release, opening.handle
        self.data_of, self.keep, self.let_go = opening.data_of, opening.keep, opening.let_go
        self.own_file, self.slow_to_own, self.slow_to_change = copies.own, copies.slow_to_own, copies.slow_to_change
        self.setattr = changing.setattr
        self.file_flags, self.set_file_flags = flags.get, flags.set
        self.getxattr, self.listxattr = xattrs.get, xattrs.list
        self.setxattr, self.removexattr = xattrs.set, xattrs.remove
        self.mkdir, self.mknod, self.symlink = making.mkdir, making.mknod, making.symlink
        self.create, self.tmpfile = making.create, making.tmpfile
        self.link, self.unlink, self.rmdir = linking.link, removing.unlink, removing.rmdir
        self.rename, self.renamed = renaming.rename, renaming.renamed

    def lookup(self, parent: int, name: bytes) -> Entry | None:
        """What ``name`` in directory ``parent`` is, counted as known to the kernel; ``None`` if there is none."""
        with self.lock:
            node, info = self._lookup.find(self._lookup.get(parent), name)
            if node is None:
                return None
            node.lookups += 1
            return self._attributes.entry(node, info)

    def lookup_number(self, number: int) -> Entry:
        """What has the number of a file handle, counted as known to the kernel. Raises ``OSError`` ``ESTALE``."""
        with self.lock:
            node = self._lookup.living(number)
            node.lookups += 1
            return self._attributes.entry(node)

    def lookup_parent(self, number: int) -> Entry:
        """The directory that holds the directory ``number``, counted as known. Raises ``OSError`` ``ESTALE``."""
        with self.lock:
            node = self._lookup.parent(self._lookup.living(number))
            node.lookups += 1
            return self._attributes.entry(node)

    def remember(self, number: int) -> None:
        """Count one more look-up of ``number`` by the kernel (an entry of a listing with attributes)."""
        with self.lock:
            node = self._table.registered(number)
            if node is not None:
                node.lookups += 1

    def getattr(self, number: int) -> Attributes:
        """What stat tells of the node."""
        with self.lock:
            return self._attributes.of(self._lookup.get(number))

    def is_served(self, number: int) -> bool:
        """Whether the node is a small regular file of the template, unchanged: its data is asked for by READ, never
        passed through, so that it never has to be split.
        """
        with self.lock:
            node = self._lookup.get(number)
            if node.kind is not Kind.TEMPLATE and node.kind is not Kind.RECORD:
                return False
            assert node.template is not None
            regular = stat.S_ISREG(node.template.index.mode(node.entry))
            return regular and not self._templates.is_passed(node.template, node.entry)

    def readlink(self, number: int) -> bytes:
        """Text of a symbolic link as the container sees it."""
        with self.lock:
            node = self._lookup.get(number)
            if node.kind is Kind.TEMPLATE or node.kind is Kind.RECORD:
                assert node.template is not None
                if not stat.S_ISLNK(node.template.index.mode(node.entry)):
                    raise OSError(errno.EINVAL, "not a symbolic link")
                return node.template.index.target(node.entry)
            folder, name = (node.pin, b"") if node.pin >= 0 else self._lookup.location(node)
            return read_own_link(folder, name)

    def statfs(self) -> os.statvfs_result:
        """Space of the file system that holds the private area."""
        return os.statvfs(linux.fd_path(self._area.root_fd))

    def sync(self) -> None:
        """syncfs(2) of the file system that holds the private area."""
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._area.root_fd)
        try:
            linux.syncfs(fd)
        finally:
            os.close(fd)

    def birth_time(self, number: int) -> int | None:
        """When the node's own object was made, in ns since 1970; ``None``: unknown, or it is the template's."""
        with self.lock:
            node = self._lookup.get(number)
            if node.kind is not Kind.OWN and (node.kind is not Kind.DIRECTORY or node.dead):
                return None
            return None if node.pin >= 0 else linux.birth_time(self._lookup.path(node))

    @property
    def node_count(self) -> int:
        """How many nodes are kept in memory."""
        return self._table.count

    def close(self) -> None:
        """Close all files and descriptors; unlinked ones are gone."""
        with self.lock:
            for number in list(self._opening.handles):
                self._opening.release(number)
            if not self._read_only:
                self._area.clear_stage()
                self._area.clear_orphans()
            self._pins.close()
            self._templates.close()
            self._area.close()
            self._view.close()

    def sync_directory(self, number: int) -> None:
        """fsync(2) of a directory; a folded one is on the disk already."""
        with self.lock:
            node = self._lookup.directory(number)
            if node.kind is Kind.FOLDED or node.dead:
                return
            fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._lookup.directory_fd(node))
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


__all__ = ["ROOT", "Caller", "Changes", "Tree"]
