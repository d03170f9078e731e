"""Time to the first token of a first and of a second question about an image whose visual tokens were kept.

    python benchmarks/second_question.py BUNDLE --keep-images 1

Each round asks two questions about a new image of random pixels in memory. Times are processor milliseconds, medians over the
rounds, on one thread of ONNX Runtime.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
from parts.arguments import errors_in_one_line, parser_for, positive
from parts.tables import markdown
from PIL import Image

from trio_edge.profiling.predict.plan import parse_size
from trio_edge.runtime.pipeline import Pipeline

QUESTIONS = ("What is in the image?", "Which colour is it?")


def first_token_ms(pipeline: Pipeline, image: Image.Image, question: str) -> tuple[float, bool]:
    """Return the processor time to the first token, and whether the image's tokens had been kept."""
    start = time.process_time()
    answer = pipeline.generate(image, question, max_new_tokens=1)
    assert answer.text is not None
    return 1e3 * (time.process_time() - start), answer.statistics.image_was_kept


def main() -> None:
    """Print a line for each bundle."""
    parser = parser_for(__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--keep-images", type=positive, default=1)
    parser.add_argument("--image-size", type=parse_size, default=(640, 480), metavar="WxH")
    parser.add_argument("--rounds", type=positive, default=11)
    options = parser.parse_args()
    width, height = options.image_size
    random, rows = np.random.default_rng(0), []
    with errors_in_one_line(parser):
        for bundle in options.bundles:
            with Pipeline.from_bundle(bundle, threads=1, keep_images=options.keep_images) as pipeline:
                times: list[list[float]] = [[], []]
                for _ in range(options.rounds):
                    image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
                    for place, question in enumerate(QUESTIONS):
                        taken, was_kept = first_token_ms(pipeline, image, question)
                        assert was_kept == (place == 1)
                        times[place].append(taken)
            first, second = map(statistics.median, times)
            rows.append((bundle.name, f"{first:.1f}", f"{second:.1f}", f"{second / first:.2f}×"))
    print(markdown(("bundle", "first question, ms", "second, ms", "ratio"), rows))


if __name__ == "__main__":
    main()
