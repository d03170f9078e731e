"""``trio-eval BUNDLE …``: accuracy, cost and time of bundles on the same questions, compared with a keep-all bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from trio_edge.calibration.evaluate.answering import BASELINES, CONTROLS, OWN_SELECTION, AnswerSettings
from trio_edge.calibration.evaluate.evaluation import EvaluationOptions, evaluate
from trio_edge.calibration.evaluate.report import print_report
from trio_edge.calibration.metrics import METRICS
from trio_edge.calibration.progress import progress_bars
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.files import check_outputs, write_output
from trio_edge.runtime.cli.console import backend_options, run
from trio_edge.runtime.cli.interruption import interruptible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.calibration.evaluate.comparison import EvaluationReport

PATH = click.Path(path_type=Path)


@click.command("trio-eval", context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=PATH)
@click.option("--reference", type=PATH, help="Keep-all bundle of the same model, to compare the others with.")
@click.option("--data", required=True, type=PATH, help="JSON-lines file of questions.")
@click.option(
    "--metric",
    type=click.Choice(["auto", *METRICS]),
    default="auto",
    help="Score of an answer; auto chooses by the file's fields.",
)
@click.option("--count", type=click.IntRange(1, 1_000_000), help="Most questions to ask. [default: all]")
@click.option("--split", help="Ask only the file's lines whose 'split' is this.")
@click.option(
    "--suffix",
    default="",
    show_default=False,
    help="Text to append to every prompt, for instance 'Answer the question using a single word or phrase.'",
)
@click.option("--system", default="", show_default=False, help="System prompt. [default: the template's own]")
@click.option(
    "--answer-tokens",
    type=click.IntRange(1, 4096),
    default=AnswerSettings.answer_tokens,
    help="Most new tokens of an answer; fewer if a bundle has room for fewer.",
)
@click.option(
    "--selection",
    "selections",
    multiple=True,
    type=click.Choice([OWN_SELECTION, *BASELINES, *CONTROLS]),
    default=(OWN_SELECTION,),
    help="The bundle's own selection, a baseline with the same budget, the selection for another question's image, or none of"
    " the visual tokens from the first stage on. Repeatable.",
)
@click.option(
    "--decide",
    is_flag=True,
    help="Read probabilities of a fixed set of answers instead of generating one; docs/decisions.md says more.",
)
@backend_options(threads=1, threads_help="CPU threads; 0 lets the backend choose.")
@click.option(
    "--work", "--resume", type=PATH, help="Folder for results; an interrupted run continues from it."
)
@click.option("--json", "json_file", type=PATH, help="Write the report to this JSON file.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(json_file: Path | None, quiet: bool, **settings: Any) -> int:
    """Ask all BUNDLEs the same questions and print accuracy, agreement with keep-all, FLOPs and time."""
    if json_file is not None:
        check_outputs({"--json": json_file})
    with interruptible(), progress_bars("trio-eval", quiet=quiet) as progress:
        report = evaluate(EvaluationOptions(**settings), progress)
    if report.runs:
        if json_file is not None:
            write_output("--json", json_file, json.dumps(msgspec.to_builtins(report), indent=1).encode())
        print_report(report)
    if report.failures:
        raise DataError(_failure(report))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _failure(report: EvaluationReport) -> str:
    first, others = report.failures[0], len(report.failures) - 1
    more = f" (and {others} more)" if others else ""
    return (
        f"{first['where']}: {first['reason']}, in {first['run']}{more};"
        " the other questions were answered; correct it and run again with the same --work"
    )
