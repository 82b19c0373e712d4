"""A tar archive as the source of a template: members are read by ``tar`` and written by ``sink``, and nothing else is.

Rule: what the archive says about an entry is kept exactly or the whole archive is refused; ids are numeric, names of
users matter only inside ACL text.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import stat
from collections.abc import Iterator

from vzfs.errors import SourceError
from vzfs.store.acl import is_minimal
from vzfs.store.progress import Progress
from vzfs.store.sources import acl, mistaken
from vzfs.store.sources.attributes import ACL_ACCESS, ACL_DEFAULT, Attributes, is_known, is_reserved
from vzfs.store.sources.budget import Budget
from vzfs.store.sources.compression import decompressed
from vzfs.store.sources.errors import entry_error, refused, shown
from vzfs.store.sources.options import SourceOptions
from vzfs.store.sources.sink import Sink, split
from vzfs.store.sources.tar import Kind, Member, TarReader

_log = logging.getLogger(__name__)

_PIECE = 256 << 10
_XATTR = b"SCHILY.xattr."
_SELINUX = b"RHT.security.selinux"
_ACL_TEXTS = {b"SCHILY.acl.access": ACL_ACCESS, b"SCHILY.acl.default": ACL_DEFAULT}
_MAX_NAMES = 10_000
_MAX_NAME = 256


class Owners:
    """Which number a user's or group's name has: as the archive's own members say, else as this machine says."""

    def __init__(self) -> None:
        self._uids: dict[bytes, int] = {}
        self._gids: dict[bytes, int] = {}

    def learn(self, member: Member) -> None:
        """Remember the names and numbers of a member's owner."""
        _learn(self._uids, member.user, member.uid)
        _learn(self._gids, member.group, member.gid)

    def uid(self, name: bytes) -> int | None:
        """The number of a user."""
        if name in self._uids:
            return self._uids[name]
        try:
            return pwd.getpwnam(os.fsdecode(name)).pw_uid
        except (KeyError, ValueError):
            return None

    def gid(self, name: bytes) -> int | None:
        """The number of a group."""
        if name in self._gids:
            return self._gids[name]
        try:
            return grp.getgrnam(os.fsdecode(name)).gr_gid
        except (KeyError, ValueError):
            return None


def _learn(known: dict[bytes, int], name: bytes, number: int) -> None:
    if name and len(name) <= _MAX_NAME and len(known) < _MAX_NAMES:
        known.setdefault(name, number)


def unpack(source_fd: int, target_fd: int, options: SourceOptions, budget: Budget, progress: Progress) -> None:
    """Write the entries of the archive that ``source_fd`` gives, read forwards only, below the empty ``target_fd``.

    Progress counts bytes read, of the file's size if it is one. Raises ``SourceError``, ``FullError``, and
    ``UnsupportedError`` for zstd without its Python package.
    """
    reader = TarReader(decompressed(_pieces(source_fd, progress)))
    owners = Owners()
    sink = Sink(target_fd, allow_devices=options.allow_devices)
    try:
        for member in reader:
            owners.learn(member)
            try:
                _write(member, reader, sink, owners, budget)
            except OSError as error:
                raise entry_error(error, member.name, target_fd) from error
        mistaken.refuse_unpacked(target_fd)
        sink.finish()
    finally:
        sink.close()
    if beyond := reader.drain():
        _log.warning("%d bytes after the end of the archive were ignored", beyond)


def _pieces(source_fd: int, progress: Progress) -> Iterator[bytes]:
    info = os.fstat(source_fd)
    total = info.st_size if stat.S_ISREG(info.st_mode) else None
    done = 0
    while True:
        progress("unpacking", done, total)
        try:
            piece = os.read(source_fd, _PIECE)
        except OSError as error:
            raise SourceError(f"the archive can't be read: {error.strerror}") from error
        if not piece:
            return
        done += len(piece)
        yield piece


def _write(member: Member, reader: TarReader, sink: Sink, owners: Owners, budget: Budget) -> None:
    parts = split(member.name, member.name)
    if member.kind is Kind.LINK:
        sink.link(parts, split(member.link, member.name))
        return
    attributes = Attributes(
        mode=member.mode,
        uid=member.uid,
        gid=member.gid,
        atime_ns=member.atime_ns,
        mtime_ns=member.mtime_ns,
        xattrs=_xattrs(member, owners),
    )
    if member.kind is Kind.FILE:
        sink.file(parts, attributes, lambda fd: reader.copy_data(member, fd, budget))
    elif member.kind is Kind.DIRECTORY:
        sink.directory(parts, attributes)
    elif member.kind is Kind.SYMLINK:
        sink.symlink(parts, member.link, attributes)
    elif member.kind is Kind.FIFO:
        sink.fifo(parts, attributes)
    else:
        sink.device(parts, stat.S_IFCHR if member.kind is Kind.CHAR else stat.S_IFBLK, member.device, attributes)


def _xattrs(member: Member, owners: Owners) -> dict[bytes, bytes]:
    """The extended attributes among a member's PAX records, ACLs made binary; those in binary form win."""
    xattrs: dict[bytes, bytes] = {}
    for keyword, value in member.extensions.items():
        if keyword in _ACL_TEXTS:
            binary = _acl(member, value, owners)
            if binary and not (keyword == b"SCHILY.acl.access" and is_minimal(binary)):
                xattrs.setdefault(_ACL_TEXTS[keyword], binary)
        elif keyword == _SELINUX:
            xattrs.setdefault(b"security.selinux", value.rstrip(b"\0") + b"\0")  # the kernel's form ends with NUL
        elif keyword.startswith(_XATTR):
            name = _unescaped(keyword[len(_XATTR) :])
            if not is_known(name):
                raise refused(member.name, f"an extended attribute of the unknown kind {shown(name)}")
            if is_reserved(name):
                _log.info("left out extended attribute %r of %r", name, member.name)
            else:
                xattrs[name] = value
    return xattrs


def _unescaped(name: bytes) -> bytes:
    """GNU tar writes ``=`` and ``%`` in the name of an extended attribute, and only these, as ``%3D`` and ``%25``."""
    return name.replace(b"%3D", b"=").replace(b"%25", b"%")


def _acl(member: Member, text: bytes, owners: Owners) -> bytes:
    try:
        return acl.parse(text, owners.uid, owners.gid)
    except ValueError as error:
        raise refused(member.name, str(error), remedy="make the archive with tar --numeric-owner") from error
