"""Processor time of 1, 4 and 16 questions about one image, with a selection for each question or one for all.

    python benchmarks/several_questions.py BUNDLE …
    python benchmarks/several_questions.py BUNDLE … --accuracy 400      # --questions FILE: others than the packaged model's
    python benchmarks/several_questions.py --predict jetson-agx-orin-64,orin-nx-16 --model qwen3-vl-4b --quantize int4

Each round asks about a new image of random pixels in memory; ways and numbers alternate. Times are processor milliseconds, medians
over the rounds, on one thread of ONNX Runtime. "joint" needs bundles exported with --follow-ups.

With ``--accuracy`` a model answers that many held-out questions about drawn images, two for each image, with further questions in
view while tokens are selected.

``--predict`` measures nothing: it counts the graphs' work for questions of 24 text tokens, and times it as
``trio-profile --predict`` does.
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
from trio_edge.profiling.predict.answer import PRECISIONS, predict
from trio_edge.profiling.predict.plan import parse_size, plan_for
from trio_edge.profiling.predict.speed import fitted_for, graph_time, rates_of
from trio_edge.runtime.bundle.graph_io import bucket_of
from trio_edge.runtime.decisions.questions import Question
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.trio.cost.devices import find_device
from trio_edge.trio.cost.work import range_work

if TYPE_CHECKING:
    from trio_edge.profiling.predict.answer import Precision
    from trio_edge.runtime.decisions.wording import Sharing

NUMBERS = (1, 4, 16)
IN_VIEW = (2, 4, 16)
NUM_TEXT = 24
"""Text tokens of a predicted question with its template."""
THINGS = itertools.product(("circles", "squares", "stars", "crosses"), ("red", "green", "blue", "white"))
QUESTIONS = [
    Question.choice(f"how many {colour} {shape} are there ?", ["one", "two", "three"])
    for shape, colour in THINGS
]


def main() -> None:
    """Print a line for each bundle and way."""
    parser = parser_for(__doc__)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--image-size", type=parse_size, default=(96, 96), metavar="WxH")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument(
        "--accuracy", type=positive, metavar="COUNT", help="answer questions instead of timing"
    )
    parser.add_argument("--questions", type=Path, metavar="FILE", help="of trio-eval, with options")
    parser.add_argument("--predict", metavar="DEVICE,…")
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--quantize", choices=PRECISIONS, default="int4")
    parser.add_argument("--keep", default="11.1%", help="average keep of the reduced bundle")
    options = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    with errors_in_one_line(parser):
        if options.predict is not None:
            for name, keep in itertools.product(options.predict.split(","), ("all", options.keep)):
                rows += predicted(name, options.model, keep, PRECISIONS[options.quantize])
            print(markdown(("device", "keep", "selection", *(f"{number}, ms" for number in NUMBERS)), rows))
            return
        for bundle in options.bundles:
            with Pipeline.from_bundle(bundle, threads=1) as pipeline:
                if options.accuracy is not None:
                    questions = options.questions or drawn_questions(options.accuracy)
                    rows.append((bundle.name, *accuracies(pipeline, questions, options.accuracy)))
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


def predicted(device: str, model: str, keep: str, precision: Precision) -> list[tuple[str, ...]]:
    """Return a line for each way on a device."""
    spec = find_device(device)

    def seconds(text: int, *, rows: int = 0) -> tuple[float, float]:
        """Return those of a prefill with ``text`` tokens without the vision graph, or of ``rows`` rows after it; and of vision."""
        setting = plan_for(
            model=model, keep=None if keep == "all" else keep, precision=precision, num_text=text
        )
        times = {
            run.run.name: run.time.seconds
            for run in predict(setting, spec).runs
            if run.run.phase == "prefill"
        }
        vision = times.pop("vision")
        if not rows:
            return sum(times.values()), vision
        decoder, total = setting.model.decoder, times["head"]
        for layers, visual in setting.ranges:
            work = range_work(decoder, layers=layers, rows=rows, past=visual + setting.room)
            efficiency, rates = fitted_for(spec).efficiency, rates_of(spec)
            total += graph_time(work, formats=setting.formats, rates=rates, efficiency=efficiency).seconds
        return total, vision

    alone, vision = seconds(NUM_TEXT)
    row, _ = seconds(NUM_TEXT, rows=bucket_of(NUM_TEXT, (8, 16, 32)))
    each = [vision + number * alone for number in NUMBERS]
    joint = [
        vision + (alone if number == 1 or keep == "all" else seconds(number * NUM_TEXT)[0])
        + row * (0 if number == 1 else number - (keep == "all"))
        for number in NUMBERS
    ]  # fmt: skip
    return [
        (device, keep, way, *(f"{1e3 * taken:.0f} ({taken / times[0]:.2f}×)" for taken in times))
        for way, times in (("each", each), ("joint", joint))
    ]


def accuracies(pipeline: Pipeline, questions: Path, count: int) -> list[str]:
    """Return the share of right answers with a selection for each question, and with ``IN_VIEW`` questions in view."""
    samples = with_options(read_questions(questions, count=count))
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
