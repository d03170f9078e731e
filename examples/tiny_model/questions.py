"""Writes held-out questions about drawn images as the files that `trio-eval --data` and `trio-calibrate --samples` read.

`python examples/tiny_model/questions.py out/shapes` writes `out/shapes/questions.jsonl` and the images that it names. The same
options give the same files. With `--several` the questions are about two images or the frames of a short video.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from shapes.samples import ShapeSample, held_out
from shapes.several import held_out_several


def write_questions(samples: Iterable[ShapeSample], folder: Path) -> Path:
    """Writes the samples and their images, each image once, and returns the file of questions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for sample in samples:
        scene = sample.sample_id.partition("-")[0]
        names = [f"{scene}-{number}.png" for number in range(len(sample.images))]
        for name, image in zip(names, sample.images):
            image.save(folder / name)
        line = {"id": sample.sample_id, "kind": sample.kind, "images": names, "question": sample.question}
        line |= {"answer": sample.answer, "answer_image": sample.answer_image}
        lines.append(json.dumps(line) + "\n")
    path = folder / "questions.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def main() -> None:
    """Parses the arguments and writes the questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=500, help="questions")
    parser.add_argument("--seed", type=int, default=0, help="held-out stream; streams share no image")
    parser.add_argument("--several", action="store_true", help="questions about several images")
    args = parser.parse_args()
    draw = held_out_several if args.several else held_out
    print(write_questions(draw(args.count, seed=args.seed), args.out))


if __name__ == "__main__":
    main()
