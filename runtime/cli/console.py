"""What all commands share: errors become one line on standard error and exit code 2."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Column, Table

from trio_edge.runtime.bundle.errors import TrioEdgeError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT)


def run(command: click.Command, argv: Sequence[str] | None) -> int:
    """Run a click command and return its exit code; errors of our own and of usage print one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a sign gets a question mark
    try:
        result = command.main(
            args=None if argv is None else list(argv), prog_name=command.name, standalone_mode=False
        )
        sys.stdout.flush()
    except click.exceptions.Abort:
        print(f"{command.name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        return _fail(command, error.format_message())
    except TrioEdgeError as error:
        return _fail(command, str(error))
    except BrokenPipeError:  # the reader has gone
        _print_nowhere()
        return 1
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        _print_nowhere()
        return _fail(
            command, f"expected room for what is written, got: {error.strerror}; free some disk space"
        )
    return result if isinstance(result, int) else 0


def _print_nowhere() -> None:
    """Send standard output, which failed, nowhere: at exit Python writes what is left of it, and would complain."""
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _fail(command: click.Command, message: str) -> int:
    line = " ".join(message.split())
    print(f"{command.name}: {line}", file=sys.stderr)
    return EXIT_USER_ERROR


# Tables on a console: as wide as the terminal, and wide enough for a table where the output is a file or a pipe.


_WIDTH_OF_A_PIPE = 160
_ENDLESS = 10_000


def wide_console() -> Console:
    """Return a console on standard output."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_OF_A_PIPE)


def whole_table(*headers: str, title: str | None = None) -> Table:
    """Return a table that folds what a narrow terminal has no room for, where rich would cut it off.

    Args:
        *headers: Of its columns.
        title: Above it, as markup.
    """
    return Table(*(Column(header, overflow="fold") for header in headers), title=title)


def print_table(
    console: Console,
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    less: Collection[str] = (),
) -> None:
    """Print a table, without its columns ``less`` if the console has no room for all of them.

    Args:
        console: Where to.
        headers: Of its columns.
        rows: Cells as markup; those at a row's end may be missing.
        title: Above it, as markup.
        less: Headers of columns that matter less.
    """
    entries, endless = list(rows), console.options.update(max_width=_ENDLESS)
    for left_out in ((), less):
        shown = [index for index, header in enumerate(headers) if header not in left_out]
        table = whole_table(*(headers[index] for index in shown), title=title)
        for row in entries:
            table.add_row(*(row[index] for index in shown if index < len(row)))
        if console.measure(table, options=endless).maximum <= console.width:
            break
    console.print(table)
