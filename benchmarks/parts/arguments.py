"""Command lines of the scripts here: parser, numbers of at least 1, and one line for a user's error."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from trio_edge.runtime.bundle.errors import TrioEdgeError


def parser_for(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the script's docstring, unchanged."""
    return argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def positive(text: str) -> int:
    """Return a number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


@contextmanager
def errors_in_one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn a user's error into one line and exit code 2."""
    try:
        yield
    except TrioEdgeError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
