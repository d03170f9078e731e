"""``trio-eval BUNDLE …``: accuracy, cost and time of bundles on the same questions, compared with a keep-all bundle."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trio_edge.calibration.evaluate.answering import DEFAULT_ANSWER_TOKENS, OWN_SELECTION
from trio_edge.calibration.evaluate.baselines import BASELINES
from trio_edge.calibration.evaluate.evaluation import DEFAULT_SYNTHETIC_COUNT, EvaluationOptions, evaluate
from trio_edge.calibration.evaluate.report import check_plot, draw_plot, print_report
from trio_edge.calibration.metrics import METRICS
from trio_edge.calibration.questions import SYNTHETIC, SYNTHETIC_SETS
from trio_edge.runtime.bundle.files import check_outputs, write_output
from trio_edge.runtime.cli.console import EXIT_USER_ERROR, backend_options, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from trio_edge.calibration.evaluate.comparison import EvaluationReport

PATH = click.Path(path_type=Path)


@click.command("trio-eval", context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=PATH)
@click.option("--reference", type=PATH, help="Keep-all bundle of the same model, to compare the others with.")
@click.option(
    "--data",
    default=SYNTHETIC,
    help=f"JSON-lines file of questions, or a synthetic held-out set: {', '.join(SYNTHETIC_SETS)}.",
)
@click.option(
    "--metric",
    type=click.Choice(["auto", *METRICS]),
    default="auto",
    help="Score of an answer; auto chooses by the file's fields.",
)
@click.option(
    "--count",
    type=click.IntRange(1, 1_000_000),
    help=f"Most questions to ask. [default: all of a file, {DEFAULT_SYNTHETIC_COUNT} of a synthetic set]",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of a synthetic set.")
@click.option("--split", help="Ask only the file's lines whose 'split' is this.")
@click.option(
    "--suffix",
    default="",
    show_default=False,
    help="Text to append to every prompt, for instance 'Answer the question using a single word or phrase.'",
)
@click.option(
    "--answer-tokens",
    type=click.IntRange(1, 4096),
    default=DEFAULT_ANSWER_TOKENS,
    help="Most new tokens of an answer; fewer if a bundle has room for fewer.",
)
@click.option(
    "--selection",
    "selections",
    multiple=True,
    type=click.Choice([OWN_SELECTION, *BASELINES]),
    default=(OWN_SELECTION,),
    help="The bundle's own selection, or a baseline with the same budget. Repeatable.",
)
@backend_options(threads=1, threads_help="CPU threads of each worker; 0 lets the backend choose.")
@click.option("--workers", type=click.IntRange(1, 1024), default=1, help="Processes that answer in parallel.")
@click.option(
    "--shard", default="1/1", help="Part of the questions to ask, I/N: every N-th from the I-th on."
)
@click.option(
    "--work",
    "--resume",
    type=PATH,
    help="Folder for results. The same command continues an interrupted run from it.",
)
@click.option(
    "--merge", multiple=True, type=PATH, help="Work folder to copy results from. Repeatable; needs --work."
)
@click.option("--json", "json_file", type=PATH, help="Write the report to this JSON file.")
@click.option("--plot", type=PATH, help="Plot accuracy against FLOPs in this .png or .svg file.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(json_file: Path | None, plot: Path | None, quiet: bool, **settings: Any) -> int:
    """Ask all BUNDLEs the same questions and print accuracy, agreement with keep-all, FLOPs and time."""
    if json_file is not None:
        check_outputs({"--json": json_file})
    if plot is not None:
        check_plot(plot)
    with _progress(quiet=quiet) as (on_start, on_answer):
        report = evaluate(EvaluationOptions(**settings), on_start=on_start, on_answer=on_answer)
    if report.runs:
        if json_file is not None:
            write_output("--json", json_file, json.dumps(msgspec.to_builtins(report), indent=1).encode())
        if plot is not None:
            draw_plot(report, plot)
        print_report(report)
    return _fail(report) if report.failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _fail(report: EvaluationReport) -> int:
    first, others = report.failures[0], len(report.failures) - 1
    more = f" (and {others} more)" if others else ""
    click.echo(
        f"trio-eval: {first['where']}: {' '.join(first['reason'].split())}, in {first['run']}{more};"
        " the other questions were answered; correct it and run again with the same --work",
        err=True,
    )
    return EXIT_USER_ERROR


@contextmanager
def _progress(*, quiet: bool) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[], None]]]:
    """Yield the callbacks for the start of a run and for each answer."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as progress:
        bar = progress.add_task("", total=None, speed="")

        def start(label: str, done: int, total: int) -> None:
            progress.reset(bar, total=total, completed=done, description=label, speed="")

        def advance() -> None:
            progress.advance(bar)
            speed = progress.tasks[0].speed
            progress.update(bar, speed="" if speed is None else f"{speed:.1f} answers/s")

        yield start, advance
