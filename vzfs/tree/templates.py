"""The templates that one mount uses, each opened once, and what is known of their entries in this container.

Rule: node numbers of template entries are made here and nowhere else: ``base + leader``, 1 for the root.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter
from collections.abc import Callable

from vzfs.errors import VzfsError
from vzfs.store.identify import parse_origin
from vzfs.store.opened import OpenTemplate
from vzfs.tree.node import ROOT_NUMBER

log = logging.getLogger(__name__)


class TemplatesInUse:
    """By ``load``, which opens one by its name; ``recorded`` are the keys of the link groups that have a record.

    ``passthrough_above``: bytes from which on the kernel reads a template's file by itself; ``None``: never.
    """

    def __init__(
        self, load: Callable[[str], OpenTemplate], os_template: str, recorded: set[bytes], passthrough_above: int | None
    ) -> None:
        self._load = load
        self._recorded = recorded  # of templates that are not open yet
        self.passthrough_above = passthrough_above
        self._open: dict[str, OpenTemplate] = {}
        self._unsure: dict[str, list[int]] = {}
        self.groups: set[int] = set()  # numbers of link groups that have a record
        self.uneven: Counter[int] = (
            Counter()
        )  # directories whose listing in the index is wrong of a link group's member
        self.root_number = -1
        self.root = self._add(os_template)
        self.root_number = self.root.base

    def get(self, name: str) -> OpenTemplate:
        """The template ``name``, opened once. Raises ``OSError`` ``EIO`` when it isn't there."""
        known = self._open.get(name)
        if known is None:
            try:
                known = self._add(name)
            except VzfsError as error:
                raise OSError(errno.EIO, str(error)) from error
        return known

    def _add(self, name: str) -> OpenTemplate:
        template = self._open[name] = self._load(name)
        prefix = name.encode() + b":"
        for key in [key for key in self._recorded if key.startswith(prefix)]:
            entry = key.removeprefix(prefix)
            if entry.isdigit() and int(entry) < template.index.count and template.group_key(int(entry)) == key:
                self.add_group(template, int(entry))
        return template

    def close(self) -> None:
        """Close the templates."""
        for template in self._open.values():
            template.close()

    def of(self, number: int) -> OpenTemplate | None:
        for template in self._open.values():
            if template.base <= number < template.end:
                return template
        return None

    def find_origin(self, data: bytes) -> tuple[OpenTemplate, int] | None:
        origin = parse_origin(data)
        if origin is None:
            return None
        try:
            template = self.get(origin[0])
        except OSError:
            return None  # what was copied is the container's own also where the original is missing
        return (template, origin[1]) if origin[1] < template.index.count else None

    def add_group(self, template: OpenTemplate, entry: int) -> None:
        """Say that the link group of ``entry`` has a record now."""
        number = template.base + template.index.leader[entry]
        if number not in self.groups:
            self.groups.add(number)
            self.uneven.update(self._holders(template, entry))

    def end_group(self, template: OpenTemplate, entry: int) -> None:
        """Say that the link group of ``entry`` has no record any more."""
        number = template.base + template.index.leader[entry]
        if number in self.groups:
            self.groups.remove(number)
            self.uneven.subtract(self._holders(template, entry))

    @staticmethod
    def _holders(template: OpenTemplate, entry: int) -> list[int]:
        index = template.index
        return [template.base + index.parent[member] for member in index.members(entry)]

    def in_group(self, template: OpenTemplate, entry: int) -> bool:
        """Whether the entry has several names in the template or this container, or had."""
        return template.index.next_link[entry] != entry or template.base + entry in self.groups

    def number_of(self, template: OpenTemplate, entry: int) -> int:
        """Node number of a template's entry."""
        number: int = template.base + template.index.leader[entry]
        return ROOT_NUMBER if number == self.root_number else number

    def unsure_names(self, template: OpenTemplate) -> list[int]:
        """Entries, ascending, of which another name may lead to another node from one moment to the next: see
        ``may_split``. Their names must not be kept by the kernel."""
        unsure = self._unsure.get(template.name)
        if unsure is None:
            links = enumerate(template.index.next_link)
            unsure = [entry for entry, link in links if link != entry and self.is_passed(template, entry)]
            self._unsure[template.name] = unsure
        return unsure

    def is_passed(self, template: OpenTemplate, entry: int) -> bool:
        """Whether the kernel shall read the regular file ``entry`` of a template by itself, being large."""
        above = self.passthrough_above
        return above is not None and template.index.attributes(entry).size > above

    def get_or_none(self, name: str) -> OpenTemplate | None:
        """The same for who follows a link that may be damaged: ``None`` instead of an error."""
        try:
            return self.get(name)
        except OSError as error:
            log.error("a magic link can't be followed: %s", error.strerror)  # noqa: TRY400
            return None
