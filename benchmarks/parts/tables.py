"""Markdown tables, whole or row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join([*head(heads), *map(row, rows)])


def head(heads: Sequence[str]) -> tuple[str, str]:
    """Return the first two lines of a table."""
    return row(heads), "|---" * len(heads) + "|"


def row(cells: Sequence[str]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(cells)} |"


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.1f} %"
