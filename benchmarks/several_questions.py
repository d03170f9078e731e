"""Processor time of 1, 4 and 16 questions about one image, with a selection for each question or one for all.

    python benchmarks/several_questions.py BUNDLE …

Each round asks about a new image of random pixels in memory; ways and numbers alternate. Times are processor milliseconds, medians
over the rounds, on one thread of ONNX Runtime. "joint" needs bundles exported with --follow-ups.
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
from parts.tables import markdown
from PIL import Image

from trio_edge.profiling.predict.plan import parse_size
from trio_edge.runtime.decisions.questions import Question
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from trio_edge.runtime.decisions.wording import Sharing

NUMBERS = (1, 4, 16)
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
    options = parser.parse_args()
    rows = []
    with errors_in_one_line(parser):
        for bundle in options.bundles:
            with Pipeline.from_bundle(bundle, threads=1) as pipeline:
                times = measure(pipeline, image_size=options.image_size, rounds=options.rounds)
            for way in ("each", "joint"):
                one, *more = (statistics.median(times[way, number]) for number in NUMBERS)
                ratios = (f"{taken:.0f} ({taken / one:.2f}×)" for taken in more)
                rows.append((bundle.name, way, f"{one:.0f}", *ratios))
    print(markdown(("bundle", "selection", *(f"{number}, ms" for number in NUMBERS)), rows))


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


if __name__ == "__main__":
    main()
