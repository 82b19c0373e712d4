"""The ``vzfs`` command: commands, progress, tables and exit codes, and nothing that a program could not do itself.

Rule: a command is a thin call of the Python API (``vzfs.api``), imported inside the command, so that starting stays
fast: neither ``vzfs --help`` nor ``vzfs status`` loads rich, trio or pyfuse3. Failures are put into words in one place,
``vzfs.cli.failure``.
"""

from __future__ import annotations

from vzfs.cli.app import main

__all__ = ["main"]
