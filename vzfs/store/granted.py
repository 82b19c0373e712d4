"""The templates that a container may use: those that its conf names, each with the content that conf says.

Rule: a container's files never come from a template that its conf doesn't name, however a link to one got into the
private area, nor from another template of the same name. Everything that opens templates for a container (mounting,
``diff``, ``check``) does it here.
"""

from __future__ import annotations

import logging
from pathlib import Path

from vzfs.errors import DamagedError, VzfsError
from vzfs.store.conf import OSTEMPLATE, TEMPLATES, Conf
from vzfs.store.layout import CONF, Layout
from vzfs.store.magic import valid_template_name
from vzfs.store.opened import OpenTemplate, template_paths
from vzfs.store.seal import open_sealed
from vzfs.store.view import View

log = logging.getLogger(__name__)


class NotGrantedError(DamagedError):
    """Something in a container's private area names a template that its conf doesn't."""


class Granted:
    """What the conf of the container at ``path`` allows. Raises ``DamagedError``, ``FileNotFoundError`` without one."""

    def __init__(self, layout: Layout, path: Path) -> None:
        self._layout = layout
        self._path = path
        self._conf = Conf.load(path / CONF)
        self._digests = self._conf.digests()
        self._refused: set[str] = set()
        self.names = [name for name in self._conf.templates() if valid_template_name(name)]
        """Names of the templates, that of the root first if it is said."""

    @property
    def os_template(self) -> str:
        """Name of the template of the container's root. Raises ``DamagedError`` when conf says none."""
        name = self._conf.get(OSTEMPLATE)
        if not valid_template_name(name):
            raise DamagedError(
                f"{self._path / CONF} names no template: {OSTEMPLATE} is {name!r}",
                remedy="set it to the one that the container was made from; vzfs template list shows all",
            )
        return name

    def serve(self, name: str, view: View | None = None) -> OpenTemplate:
        """``open`` for who serves the container: a refusal is logged once, however often programs meet such a link."""
        try:
            return self.open(name, view)
        except DamagedError as error:  # of what isn't there, each request tells
            if name not in self._refused:
                self._refused.add(name)
                log.error("template %s is not served: %s", name, error)  # noqa: TRY400
            raise

    def open(self, name: str, view: View | None = None) -> OpenTemplate:
        """The template ``name``. Raises ``NotGrantedError``, ``DamagedError``, ``NotFoundError``."""
        if name not in self.names:
            template_paths(self._layout, name)  # what isn't there isn't forbidden either
            raise NotGrantedError(
                f"links in {self._path} name the template {name}, which its conf doesn't",
                remedy=f"add {name} to {TEMPLATES} in {self._path / CONF} if the container may use it",
            )
        template = OpenTemplate(self._layout, name, view)
        try:
            self._compare(name, template.digest)
        except DamagedError:
            template.close()
            raise
        return template

    def _compare(self, name: str, digest: str) -> None:
        expected = self._digests.get(name, digest)
        if expected != digest:
            raise DamagedError(
                f"the template {name} in {self._layout.root} isn't the one that {self._path} was made from: "
                f"it is {digest}, and the container's conf says {expected}",
                remedy=f"bring that template here (vzfs template show {name} tells its digest), or make the container "
                f"anew from this one; it would get wrong files from it",
            )

    def note_digests(self) -> None:
        """Write into conf the digests that it lacks, as containers made by an earlier vzfs do.

        What can't be opened is left out, and on a full or read-only disk all of it: mounting must be possible there.
        """
        missing = [name for name in self.names if name not in self._digests]
        for name in missing:
            try:
                self._digests[name] = open_sealed(template_paths(self._layout, name)).digest
            except (VzfsError, OSError):
                continue
        if any(name in self._digests for name in missing):
            self._conf.set_digests(self._digests)
            try:
                self._conf.save()
            except OSError as error:
                log.warning("%s doesn't get the digests of its templates: %s", self._path / CONF, error.strerror)
