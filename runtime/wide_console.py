"""A console for tables: as wide as the terminal, and wide enough for a table where the output is a file or a pipe."""

from __future__ import annotations

from rich.console import Console

_WIDTH_OF_A_PIPE = 130


def wide_console() -> Console:
    """Return a console on standard output."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_OF_A_PIPE)
