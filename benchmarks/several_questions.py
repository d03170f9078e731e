"""Processor time of 1, 4 and 16 questions about one image, with a selection for each question or one for all.

    python benchmarks/several_questions.py BUNDLE …
    python benchmarks/several_questions.py BUNDLE … --accuracy 400

Each round asks about a new image of random pixels in memory; ways and numbers alternate. Times are processor milliseconds, medians
over the rounds, on one thread of ONNX Runtime. "joint" needs bundles exported with --follow-ups.

With ``--accuracy`` the packaged model answers that many held-out questions about drawn images, two for each image, with further
questions in view while tokens are selected.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from parts.arguments import errors_in_one_line, parser_for, positive
from parts.drawn_questions import drawn_questions
from parts.tables import markdown
from PIL import Image

from trio_edge.calibration.evaluate.decisions import question_of, right_option, with_options
from trio_edge.calibration.questions import read_questions
from trio_edge.profiling.predict.plan import parse_size
from trio_edge.runtime.decisions.questions import Question
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from trio_edge.runtime.decisions.wording import Sharing

NUMBERS = (1, 4, 16)
IN_VIEW = (2, 4, 16)
THINGS = itertools.product(("circles", "squares", "stars", "crosses"), ("red", "green", "blue", "white"))
QUESTIONS = [
    Question.choice(f"how many {colour} {shape} are there ?", ["one", "two", "three"])
    for shape, colour in THINGS
]


def main() -> None:
    """Print a line for each bundle and way."""
    parser = parser_for(__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--image-size", type=parse_size, default=(96, 96), metavar="WxH")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument(
        "--accuracy", type=positive, metavar="COUNT", help="answer questions instead of timing"
    )
    options = parser.parse_args()
    rows = []
    with errors_in_one_line(parser):
        for bundle in options.bundles:
            with Pipeline.from_bundle(bundle, threads=1) as pipeline:
                if options.accuracy is not None:
                    rows.append((bundle.name, *accuracies(pipeline, count=options.accuracy)))
                    continue
                times = measure(pipeline, image_size=options.image_size, rounds=options.rounds)
            for way in ("each", "joint"):
                one, *more = (statistics.median(times[way, number]) for number in NUMBERS)
                ratios = (f"{taken:.0f} ({taken / one:.2f}×)" for taken in more)
                rows.append((bundle.name, way, f"{one:.0f}", *ratios))
    timed = ("bundle", "selection", *(f"{number}, ms" for number in NUMBERS))
    judged = ("bundle", "each alone, %", *(f"{number} in view, %" for number in IN_VIEW))
    print(markdown(timed if options.accuracy is None else judged, rows))


def measure(
    pipeline: Pipeline, *, image_size: tuple[int, int], rounds: int
) -> dict[tuple[Sharing, int], list[float]]:
    """Return the processor milliseconds by way and number of questions; the first round warms up and is left out."""
    random, (width, height) = np.random.default_rng(0), image_size
    times = defaultdict(list)
    ways: tuple[Sharing, ...] = ("each", "joint")
    for turn in range(rounds + 1):
        for number, way in itertools.product(NUMBERS, ways):
            image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
            start = time.process_time()
            # One question shares with none: both ways are the same.
            pipeline.decide(image, QUESTIONS[:number], sharing="each" if number == 1 else way)
            if turn:
                times[way, number].append(1e3 * (time.process_time() - start))
    return times


def accuracies(pipeline: Pipeline, *, count: int) -> list[str]:
    """Return the share of right answers with a selection for each question, and with ``IN_VIEW`` questions in view."""
    samples = with_options(read_questions(drawn_questions(count)))
    right: dict[int, list[bool]] = defaultdict(list)
    for _, group in itertools.groupby(samples, key=lambda sample: sample.image_id):
        asked = list(group)
        for number in (1, *IN_VIEW):
            more = QUESTIONS[: max(number - len(asked), 0)]
            decisions = pipeline.decide(
                list(asked[0].images),
                [*map(question_of, asked), *more],
                sharing="each" if number == 1 else "joint",
            )
            right[number] += [
                decision.choice == one.options[right_option(one)] for one, decision in zip(asked, decisions)
            ]
    return [f"{100 * statistics.fmean(found):.1f}" for found in right.values()]


if __name__ == "__main__":
    main()
