"""What all commands share: errors become one line on standard error and exit code 2."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from trio_edge.runtime.errors import TrioEdgeError

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def run(command: click.Command, argv: Sequence[str] | None) -> int:
    """Run a click command and return its exit code; errors of our own and of usage print one line."""
    try:
        result = command.main(
            args=None if argv is None else list(argv), prog_name=command.name, standalone_mode=False
        )
    except click.exceptions.Abort:
        print(f"{command.name}: interrupted", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        return _fail(command, error.format_message())
    except TrioEdgeError as error:
        return _fail(command, str(error))
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone; python would complain at exit
        return 1
    return result if isinstance(result, int) else 0


def _fail(command: click.Command, message: str) -> int:
    line = " ".join(message.split())
    print(f"{command.name}: {line}", file=sys.stderr)  # noqa: T201
    return EXIT_USER_ERROR
