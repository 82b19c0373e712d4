"""A container's NAME is its own: two with one name can't be told apart by it, and commands refuse it."""

from __future__ import annotations

from vzfs.errors import DamagedError
from vzfs.store.check.finding import Report
from vzfs.store.check.ground import Ground
from vzfs.store.conf import NAME, Conf
from vzfs.store.container import named_containers
from vzfs.store.layout import CONF, Layout


def check_name(layout: Layout, ground: Ground, report: Report) -> None:
    """No other container that the store knows has the NAME."""
    try:
        name = Conf.load(ground.path / CONF).get(NAME)
    except (DamagedError, OSError):  # told by ``check_conf``
        return
    twins = [path for path in named_containers(layout, name) if path != ground.path] if name else []
    if twins:
        report(CONF, "name", f"NAME {name!r} is also that of {', '.join(map(str, twins))}", None)
