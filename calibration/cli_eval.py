"""``trio-eval BUNDLE``: accuracy of a bundle on the synthetic held-out set or on a JSON-lines file of questions."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from trio_edge.calibration.baselines import BASELINES
from trio_edge.calibration.evaluation import Evaluation, evaluate, read_questions
from trio_edge.runtime.command_line import run
from trio_edge.runtime.errors import ShapeError
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trio_edge.calibration.evaluation import Question


@click.command("trio-eval", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--data", default="shapes", show_default=True, help="'shapes' (synthetic, held out) or a JSON-lines file."
)
@click.option("--count", type=click.IntRange(1), default=500, show_default=True, help="Questions at most.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the synthetic set.")
@click.option(
    "--selection",
    type=click.Choice(["bundle", *BASELINES]),
    default="bundle",
    show_default=True,
    help="The bundle's own selection, or a baseline at the same schedule.",
)
@click.option("--backend", default="auto", show_default=True, help="onnxruntime, or auto.")
@click.option(
    "--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads; 0 lets the backend choose."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all outcomes to this file.")
@click.option("--quiet", is_flag=True, help="No progress display.")
def command(
    bundle: Path,
    data: str,
    count: int,
    seed: int,
    selection: str,
    backend: str,
    threads: int,
    json_file: Path | None,
    quiet: bool,
) -> int:
    """Measure the accuracy of BUNDLE."""
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise click.UsageError(f"--json: expected a file in an existing folder, got {json_file}")
    questions = list(islice(_questions(data, count, seed), count))
    if not questions:
        raise ShapeError(f"{data}: expected at least one question, got none; check the file")
    with Pipeline.from_bundle(bundle, backend=backend, threads=threads) as pipeline:
        console = Console(stderr=True, quiet=quiet)
        asked = track(questions, description="answering", console=console, transient=True, disable=quiet)
        result = evaluate(pipeline, asked, selection=selection)
    if json_file is not None:
        partial = json_file.with_name(f".{json_file.name}.partial")
        partial.write_text(json.dumps(result.to_dict(), indent=1), encoding="utf-8")
        partial.replace(json_file)
    _print(result, selection=selection)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _questions(data: str, count: int, seed: int) -> Iterator[Question]:
    if data == "shapes":
        from trio_edge.calibration.shapes import held_out

        return held_out(count, seed=seed)
    return read_questions(Path(data))


def _print(result: Evaluation, *, selection: str) -> None:
    table = Table("questions", "n", "exact match %", "95 % interval")
    for name, part in {**result.by_kind, "all": result.accuracy}.items():
        low, high = part.interval
        table.add_row(name, str(part.total), f"{100 * part.value:.1f}", f"{100 * low:.1f} – {100 * high:.1f}")
    Console().print(table)
    print(f"selection: {selection}; average keep {100 * result.average_keep:.1f} %")
