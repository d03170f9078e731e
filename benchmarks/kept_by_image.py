"""Share of a bundle's kept tokens in the image that has the answer, for questions about several images or frames.

    python benchmarks/kept_by_image.py BUNDLE --count 160

Asks questions about several drawn images. For each kind of question whose answer is in one image it prints that image's
share of all visual tokens, its share of the tokens that each stage kept, and the number of questions that kept none of it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from parts.arguments import parser_for, positive
from parts.drawn_questions import drawn_questions

from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from numpy.typing import NDArray


def shares_of(pipeline: Pipeline, folder: Path, line: dict[str, Any]) -> list[float]:
    """Return the answer image's share of all visual tokens, then of each stage's kept tokens."""
    images = [folder / name for name in line["images"]]
    generation = pipeline.generate(images, line["question"], max_new_tokens=1)
    assert generation.text is not None
    lengths = [layout.num_visual for layout in generation.layouts]
    image_of: NDArray[np.int64] = np.repeat(np.arange(len(lengths)), lengths)
    stages = [image_of, *(image_of[kept] for kept in generation.kept)]
    return [float((stage == line["answer_image"]).mean()) for stage in stages]


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=positive, default=160)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    path = drawn_questions(arguments.count, seed=arguments.seed, several=True)
    shares: dict[str, list[list[float]]] = defaultdict(list)
    with Pipeline.from_bundle(arguments.bundle, threads=1) as pipeline:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if line["answer_image"] is not None:
                shares[line["kind"]].append(shares_of(pipeline, path.parent, line))
    for kind, rows in sorted(shares.items()):
        whole, *stages = 100 * np.mean(rows, axis=0)
        lost = sum(row[-1] == 0.0 for row in rows)
        kept = ", ".join(f"{stage:.0f}" for stage in stages)
        print(f"{kind:12} all {whole:3.0f} %  kept {kept} %  none kept {lost} of {len(rows)}")


if __name__ == "__main__":
    main()
