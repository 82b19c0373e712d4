"""``python -m vzfs`` is the ``vzfs`` command."""

from __future__ import annotations

from vzfs.cli import main

if __name__ == "__main__":
    main()
