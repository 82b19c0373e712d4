"""The store's own extended attributes: each name, on what it stands, and what is in it.

Rule: no other module writes such a name. A container neither sees nor sets what begins with ``RESERVED_PREFIX``.
"""

from __future__ import annotations

RESERVED_PREFIX = "trusted.vzfs."
"""All of them."""
ORIGIN_XATTR = "trusted.vzfs.origin"
"""On what was copied up or unfolded: ``<template>/<entry number>``, see ``OpenTemplate.origin``."""
ATTR_XATTR = "trusted.vzfs.attr"
"""On a magic link of the container's own: the attributes that differ from the template's, see ``vzfs.store.record``."""
XATTR_PREFIX = "trusted.vzfs.x."
"""On the same, followed by a name: an extended attribute that the file has instead of the template's."""
NLINK_XATTR = "trusted.vzfs.nlink"
"""On a link group's record: how many names it has, in decimal digits."""
FOLDS_XATTR = "trusted.vzfs.folds"
"""On a real directory that may hold folded ones although its own template directory, if any, has no subdirectories."""
SPLIT_XATTR = "trusted.vzfs.split"
"""On a copied-up file whose readers kept the template's data under the old node number: it has another one since."""
TAIL_XATTR = "trusted.vzfs.tail"
"""On a symbolic link of the container's own whose text, made unlike a magic link, became too long: what didn't fit."""
TIMES_XATTR = "trusted.vzfs.times"
"""On a directory in which something is just being replaced: its modification time, ``i64`` ns since 1970.

Binary, so that it fits into an inode of 256 bytes beside ``ORIGIN_XATTR``: 7 µs on ext4, 120 in a block of its own.
"""
