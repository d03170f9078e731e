"""The frame of all commands: errors become one line on standard error and exit code 2."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trio_edge.runtime.bundle.errors import TrioEdgeError

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the user's quota


def run(command: click.Command, argv: Sequence[str] | None) -> int:
    """Run a click command and return its exit code; errors of our own and of usage print one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
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
