"""Requests that a predecessor had read and not answered when it died, and maybe had carried out.

Rule: the mount is the only writer and the kernel had looked the names up before it asked, so a resent request that
finds its name made, or gone, was carried out; and the last one that was carried out is on record. Everything else is
simply done again, to the same end.
"""

from __future__ import annotations

import errno
import os

from vzfs.fuse import wire
from vzfs.fuse.handlers import PID, UNIQUE, Answer, Handler, Handlers, RawHeader
from vzfs.fuse.openfiles import OpenFiles
from vzfs.fuse.wire import Opcode
from vzfs.tree.tree import Tree

_GONE = {
    Opcode.UNLINK: errno.ENOENT,
    Opcode.RMDIR: errno.ENOENT,
    Opcode.RENAME: errno.ENOENT,
    Opcode.RENAME2: errno.ENOENT,
    Opcode.REMOVEXATTR: errno.ENODATA,
}
_MADE = {
    Opcode.MKNOD: wire.MKNOD_IN.size,
    Opcode.MKDIR: wire.MKDIR_IN.size,
    Opcode.SYMLINK: 0,
    Opcode.LINK: wire.LINK_IN.size,
    Opcode.CREATE: wire.CREATE_IN.size,
}
"""What makes a name, and where in the body that begins."""


class Resent:
    """Answers resent requests. ``handlers`` do everything at once; ``last_done`` is the request on record."""

    def __init__(self, tree: Tree, files: OpenFiles, handlers: Handlers, last_done: int) -> None:
        self._tree = tree
        self._files = files
        self._handlers = handlers
        self._again = handlers.table()
        self._last_done = last_done & ~wire.UNIQUE_RESEND

    def table(self, usual: list[Handler]) -> list[Handler]:
        """The handlers that answer resent requests here and all others as ``usual``."""
        return [self._either(opcode, handler) for opcode, handler in enumerate(usual)]

    def _either(self, opcode: int, usual: Handler) -> Handler:
        def answer(node: int, body: memoryview, header: RawHeader) -> Answer:
            if header[UNIQUE] & wire.UNIQUE_RESEND:
                return self._answer(opcode, node, body, header)
            return usual(node, body, header)

        return answer

    def _answer(self, opcode: int, node: int, body: memoryview, header: RawHeader) -> Answer:
        request = header[UNIQUE] & ~wire.UNIQUE_RESEND
        done = self._carried_out(opcode, node, body, request)
        if done is not None:
            return done
        try:
            return self._again[opcode](node, body, header)
        except OSError as error:
            if _GONE.get(Opcode(opcode)) == error.errno:
                return b""
            if error.errno != errno.EEXIST:
                raise
            if opcode in _MADE:
                return self._made(Opcode(opcode), node, body, header)
            if opcode == Opcode.SETXATTR and self._is_set(node, body):
                return b""
            raise

    def _carried_out(self, opcode: int, node: int, body: memoryview, request: int) -> Answer:
        """The answer that a request had nearly got which must not be carried out twice; ``None``: do it again."""
        if opcode == Opcode.OPEN:
            file = self._files.counted(node, request)
            return self._files.answer(file, wire.fields(wire.OPEN_IN, body)[0], request) if file else None
        if opcode == Opcode.RENAME2:
            old = wire.two_names(body[wire.RENAME2_IN.size :])[0]
            return b"" if self._tree.renamed(request, node, old) else None
        if request != self._last_done:
            return None
        if opcode == Opcode.SETATTR:  # others may have written since it cut the file short
            return wire.attr_out(self._tree.getattr(node), self._handlers.lifetime(node))
        if opcode == Opcode.WRITE:
            return wire.WRITE_OUT.pack(wire.fields(wire.WRITE_IN, body)[2], 0)
        return None

    def _made(self, opcode: Opcode, parent: int, body: memoryview, header: RawHeader) -> Answer:
        rest = body[_MADE[opcode] :]
        name = wire.two_names(rest)[0] if opcode is Opcode.SYMLINK else wire.name(rest)
        entry = self._tree.lookup(parent, name)
        if entry is None:
            raise OSError(errno.ENOENT, "made and gone", name)
        answer = self._handlers.entry_out(entry)
        if opcode is Opcode.CREATE:
            flags = wire.fields(wire.CREATE_IN, body)[0] & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC)
            request = header[UNIQUE]
            file = self._files.counted(entry.number, request)
            if file is not None:
                return answer + self._files.answer(file, flags, request)
            answer += self._handlers.open_data(entry.number, flags, request, header[PID])
        return answer

    def _is_set(self, node: int, body: memoryview) -> bool:
        """Whether an attribute that was to be new has the value that it was to get."""
        size = wire.fields(wire.SETXATTR_IN, body)[0]
        name, value = wire.name_and_value(body[wire.SETXATTR_IN.size :], size)
        return self._tree.getxattr(node, name) == value
