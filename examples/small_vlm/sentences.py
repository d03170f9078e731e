"""Questions about drawn shapes with answers in sentences, and the held-out ones as a file for `trio-eval --data`.

    PYTHONPATH=examples/tiny_model python examples/small_vlm/sentences.py out/sentences

Kinds are colour, shape, digit and existence; no question names a place in the image. ``--decide`` writes questions with a fixed
set of answers: the sentences that differ in the asked word, or yes and no. ``--kinds`` may name count and comparison, too.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from shapes.questions import COUNT_WORDS, ask
from shapes.samples import HELD_OUT_OFFSET, SEEDS_PER_STREAM
from shapes.scene import COLOR_NAMES, DIGITS, SHAPES, make_scene, render

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shapes.scene import Scene

KINDS = ("color", "shape", "digit", "existence")
WORDS = {"color": COLOR_NAMES, "shape": SHAPES, "digit": DIGITS, "count": COUNT_WORDS[:6]}
"""The words that are asked for, by kind of question; the other kinds ask for yes or no."""


def in_words(kind: str, question: str, answer: str) -> tuple[str, str]:
    """Return a question of the tiny model, and its answer, as sentences."""
    words = question.split()
    about = " ".join(words[3:-1] if kind in ("digit", "existence") else words[4:-1])
    if kind == "color":
        sentence = f"The {about} is {answer}."
    elif kind == "shape":
        sentence = f"The {about} is a {answer}."
    elif kind == "digit":
        sentence = f"The digit that is {about} is {answer}."
    elif kind == "count":
        sentence = f"The number of {' '.join(words[2:-3])} is {answer}."
    elif kind == "comparison":
        sentence = f"{answer.capitalize()}."
    else:
        sentence = f"Yes, there is a {about}." if answer == "yes" else f"No, there is no {about}."
    return " ".join(words[:-1]).capitalize() + "?", sentence


def decided_at(kind: str, question: str, answer: str) -> str:
    """Return the sentence up to where it depends on the image."""
    other = {"yes": "no", "no": "yes"}.get(answer, "?")
    one, two = (in_words(kind, question, word)[1] for word in (answer, other))
    return one[: next(i for i, (a, b) in enumerate(zip(one, two)) if a != b)].rstrip()


def questions_of(scene: Scene, rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """Return up to ``count`` (kind, question, one-word answer) of a scene, no question twice."""
    found: dict[str, tuple[str, str, str]] = {}
    for kind in rng.choices(KINDS, (0.32, 0.28, 0.2, 0.2), k=6 * count):
        pair = ask(scene, kind, rng)
        if pair and " in the " not in pair[0] and len(found) < count:
            found.setdefault(pair[0], (kind, *pair))
    return list(found.values())


def held_out(
    count: int, *, seed: int, kinds: Sequence[str] = KINDS
) -> Iterator[tuple[Scene, str, str, str, list[str]]]:
    """Yield (scene, kind, question, sentence, sentences to choose from) of images that were not trained on.

    Two an image, each kind equally often.
    """
    given, number = 0, HELD_OUT_OFFSET + seed * SEEDS_PER_STREAM
    while given < count:
        scene = make_scene(number)
        rng = random.Random(f"sentences {number}")
        for _ in range(min(2, count - given)):
            kind = kinds[given % len(kinds)]
            pairs = (ask(scene, kind, rng) for _ in range(12))
            pair = next((one for one in pairs if one and " in the " not in one[0]), None)
            if pair is None:
                break
            given += 1
            choices = [in_words(kind, pair[0], word)[1].rstrip(".") for word in WORDS.get(kind, ())]
            yield scene, kind, *in_words(kind, *pair), choices
        number += 1


def main() -> None:
    """Write the questions and their images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="streams share no image")
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, "count", "comparison"), default=KINDS)
    parser.add_argument("--decide", action="store_true", help="with the answers to choose from")
    parser.add_argument("--other", action="store_true", help="show the next question's image instead")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = list(held_out(options.count, seed=options.seed, kinds=options.kinds))
    numbers = list(dict.fromkeys(scene.seed for scene, *_ in found))
    after = dict(zip(numbers, numbers[1:] + numbers[:1]))
    lines = []
    for scene, kind, question, sentence, choices in found:
        path = options.out / f"{scene.seed}.png"
        if not path.exists():
            render(scene).save(path)
        shown = after[scene.seed] if options.other else scene.seed
        line = {"id": f"{scene.seed}-{kind}", "kind": kind, "image": f"{shown}.png"}
        line |= {"question": question, "answer": sentence}
        if options.decide and choices:
            # Without the full stop, a choice's last word needs no decode step.
            line |= {"answer": sentence.rstrip("."), "choices": choices}
        elif options.decide:
            line["answer"] = re.split(r"\W", sentence)[0].lower()
        lines.append(json.dumps(line) + "\n")
    name = "other-image.jsonl" if options.other else "questions.jsonl"
    (options.out / name).write_text("".join(lines))
    print(options.out / name)


if __name__ == "__main__":
    main()
