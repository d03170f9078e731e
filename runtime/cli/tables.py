"""Tables on a console: as wide as the terminal, or wide enough for the table in a file or a pipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from trio_edge.runtime.bundle.manifest import GraphSpec

_WIDTH_OF_A_PIPE = 160  # rich takes 80 where there is no terminal, and would fold most rows
_ENDLESS = 10_000


def wide_console() -> Console:
    """Return a console on standard output."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_OF_A_PIPE)


def whole_table(*headers: str, title: str | None = None) -> Table:
    """Return a table whose cells are folded on a narrow terminal, where rich would cut them off."""
    return Table(*(Column(header, overflow="fold") for header in headers), title=title)


def profile_list(graph: GraphSpec) -> str:
    """Return the profiles of a graph with their sizes, such as "decode(S=1 C=96)"."""
    return ", ".join(
        f"{profile.name}({' '.join(f'{symbol}={size}' for symbol, size in profile.sizes.items())})"
        for profile in graph.profiles
    )


def print_table(
    console: Console,
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    less: Collection[str] = (),
) -> None:
    """Print a table of cells in markup; if the console is too narrow, without the columns whose headers are in ``less``.

    Cells at the end of a row may be missing.
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
