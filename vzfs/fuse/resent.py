"""Requests that a predecessor had read and not answered when it died, and maybe had carried out.

Rule: the mount is the only writer and the kernel had looked the names up before it asked, so a resent request that
finds its name made, or gone, was carried out; and the last one that was carried out is on record. Everything else is
simply done again, to the same end.
"""

from __future__ import annotations

import errno
import os

from vzfs.fuse import wire
from vzfs.fuse.backing import BackingFiles
from vzfs.fuse.handlers import UNIQUE, Answer, Handler, Handlers, RawHeader
from vzfs.fuse.wire import Opcode
from vzfs.store.sys import RENAME_EXCHANGE
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

    def __init__(self, tree: Tree, files: BackingFiles, handlers: Handlers, last_done: int) -> None:
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
        if header[UNIQUE] & ~wire.UNIQUE_RESEND == self._last_done:
            done = self._on_record(opcode, node, body)
            if done is not None:
                return done
        try:
            return self._again[opcode](node, body, header)
        except OSError as error:
            if _GONE.get(Opcode(opcode)) == error.errno:
                return b""
            if error.errno == errno.EEXIST and opcode in _MADE:
                return self._made(Opcode(opcode), node, body)
            raise

    def _on_record(self, opcode: int, node: int, body: memoryview) -> Answer:
        """The answer that a request had nearly got which must not be carried out twice."""
        if opcode == Opcode.RELEASE:
            return b""
        if opcode == Opcode.RENAME2 and wire.fields(wire.RENAME2_IN, body)[1] & RENAME_EXCHANGE:
            return b""
        if opcode == Opcode.OPEN and not wire.fields(wire.OPEN_IN, body)[0] & os.O_TRUNC:
            backing = self._files.known.get(node)
            return backing.answer if backing is not None and backing.node.held else None
        return None

    def _made(self, opcode: Opcode, parent: int, body: memoryview) -> Answer:
        rest = body[_MADE[opcode] :]
        name = wire.two_names(rest)[0] if opcode is Opcode.SYMLINK else wire.name(rest)
        entry = self._tree.lookup(parent, name)
        if entry is None:
            raise OSError(errno.ENOENT, "made and gone", name)
        answer = wire.entry_out(*entry)
        if opcode is Opcode.CREATE:
            flags = wire.fields(wire.CREATE_IN, body)[0] & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC)
            answer += self._handlers.open_data(entry.number, flags)
        return answer
