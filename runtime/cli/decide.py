"""``trio-run --yes-no``, ``--choices`` and ``--levels``: prints the probabilities of a question's answers."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from trio_edge.runtime.bundle.errors import printable
from trio_edge.runtime.decisions.questions import Question

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from PIL import Image

    from trio_edge.runtime.answer import Statistics
    from trio_edge.runtime.decisions.questions import Decision
    from trio_edge.runtime.pipeline import Pipeline

OPTIONS: tuple[Callable[..., Any], ...] = (
    click.option(
        "--yes-no", is_flag=True, help="Print the probabilities of yes and no instead of an answer."
    ),
    click.option(
        "--choices", metavar="A,B,…", help="Print the probability of each of these answers instead."
    ),
    click.option(
        "--levels", metavar="A,B,…", help="Print the probability of each level, lowest first, instead."
    ),
    click.option(
        "--both-orders", is_flag=True, help="Read choices or levels in both orders; print the mean."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the probabilities as one line of JSON."),
)
NAMES = ("yes_no", "choices", "levels", "both_orders", "as_json")
_SHOWN = ("video", "fps", "num_frames", "source_fps", "system", "level")


def question_of(prompt: str, *, yes_no: bool, choices: str | None, levels: str | None) -> Question:
    """Return the question that the options describe.

    Raises:
        UsageError: If they describe none, or several.
    """
    if (yes_no, choices is not None, levels is not None).count(True) != 1:
        raise click.UsageError(
            "expected one of --yes-no, --choices and --levels, got none or several; give one"
        )
    if yes_no:
        return Question.yes_no(prompt)
    make = Question.choice if levels is None else Question.score
    names = (levels if choices is None else choices) or ""
    return make(prompt, [name.strip() for name in names.split(",")])


def decide(
    pipeline: Pipeline,
    images: Sequence[Path],
    question: Question,
    *,
    both_orders: bool,
    as_json: bool,
    max_pixels: int,
    **settings: Any,
) -> tuple[Decision, list[Image.Image]]:
    """Ask ``question``, print its probabilities, and return them and the images.

    Raises:
        ImageError: If an image cannot be read.
        UsageError: If ``settings`` has an option of generated answers.
    """
    from trio_edge.runtime.cli.tables import print_table, wide_console
    from trio_edge.runtime.images.reading import open_image  # slow to import, and --help needs neither

    if given := [name for name, value in settings.items() if name not in _SHOWN and value is not None]:
        option = f"--{given[0].replace('_', '-')}"
        raise click.UsageError(f"{option}: expected none with --yes-no, --choices or --levels; leave it out")
    shown = {name: settings[name] for name in _SHOWN}
    opened = [open_image(path, max_pixels=max_pixels) for path in images]
    (decision,) = pipeline.decide(opened, question, both_orders=both_orders, **shown)
    if as_json:
        print(json.dumps(decision.to_dict(), ensure_ascii=False))
    else:
        rows = [(printable(name), f"{100 * share:.1f} %") for name, share in decision.by_name().items()]
        console = wide_console()
        print_table(console, ("answer", "probability"), rows)
        if question.kind == "score":
            print(f"score: {decision.score:.2f} of {len(question.options) - 1}")
        print(f"answers among all that the model could say: {100 * decision.label_mass:.1f} %")
    statistics = decision.statistics
    kept = f"kept per stage {list(statistics.kept_tokens)}"
    level = f", {described_level(statistics)}" if pipeline.manifest.levels else ""
    print(f"{pipeline.backend_name}: {statistics.ttft_ms:.1f} ms, {kept}{level}", file=sys.stderr)
    return decision, opened


def described_level(statistics: Statistics) -> str:
    """Return the answer's level, and those that ran before it."""
    below = f" after {', '.join(statistics.levels_below)}" if statistics.levels_below else ""
    return f"level {statistics.level}{below}"
