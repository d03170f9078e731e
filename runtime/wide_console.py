"""A console for tables: as wide as the terminal, and wide enough for a table where the output is a file or a pipe."""

from __future__ import annotations

import shutil

from rich.console import Console

_LEAST_WIDTH = 130


def wide_console() -> Console:
    """Return a console on standard output."""
    return Console(width=max(shutil.get_terminal_size().columns, _LEAST_WIDTH))
