"""``optimum-cli export trio --model MODEL OUT``: the options of ``trio-export``, with optimum's way of naming in and out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from trio_edge.export.cli import command as trio_export
from trio_edge.runtime.cli.console import run

if TYPE_CHECKING:
    from collections.abc import Sequence

_OPTIMUM_STYLE: dict[str, click.Parameter] = {
    "model": click.Option(["-m", "--model"], help="An alias, a Hub id or a checkpoint folder; see --list."),
    "out": click.Argument(["out"], required=False, type=click.Path(path_type=Path)),
}

command = click.Command(
    "optimum-cli export trio",
    params=[_OPTIMUM_STYLE.get(parameter.name or "", parameter) for parameter in trio_export.params],
    callback=trio_export.callback,
    help=(trio_export.help or "")
    .replace("Export MODEL", "Export --model")
    .replace("a bundle", "the bundle OUT"),
    context_settings=trio_export.context_settings,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)
