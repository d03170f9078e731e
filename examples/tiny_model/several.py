"""Teaches a trained checkpoint questions about several images: pairs and short videos, mixed with single images.

`python examples/tiny_model/several.py --out DIR --minutes 20` starts from `export/tiny` and writes the checkpoint folder DIR.
The vision tower does not change; the decoder gets the visual tokens of all images in a row, as in a bundle exported with
`--max-images`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from data import Group, Layout, labels_of, layout_of, make_groups, tiles_of
from model import PAD
from package import package
from shapes.questions import KINDS, matches
from shapes.scene import Scene, render
from shapes.several import (
    NUM_FRAMES,
    PAIR_KINDS,
    SEVERAL_KINDS,
    VIDEO_KINDS,
    Asked,
    ask_several,
    make_pair,
    make_video,
)
from stage_language import Lesson, Recipe, encode, evaluate, make_lessons, train_language
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaNextForConditionalGeneration

TRAIN_SEED = 3_000_000
VALIDATION_SEED = 600_000_000
MAX_TOKENS = 16  # question, "assistant:", answer and one row for the end token
ALL_KINDS = (*KINDS, *SEVERAL_KINDS)


class ImageReader(nn.Module):
    """Training aid: reads from each visual token, after the first layers, the number of its image."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.image = nn.ModuleList(nn.Linear(width, 1 + NUM_FRAMES[1]) for _ in range(2))

    def loss(self, prefixes: list[Tensor], labels: Tensor, opening: int) -> Tensor:
        """Returns the loss after layers 0 and 1, before tokens are dropped; 0 for single images."""
        total = torch.zeros((), device=labels.device)
        if labels.shape[-1] < 7:
            return total
        there = labels[..., 6] > 0
        for reader, hidden in zip(self.image, prefixes):
            if hidden.shape[1] == opening + labels.shape[1]:
                seen = reader(hidden[:, opening:][there])
                total = total + F.cross_entropy(seen, labels[..., 6][there].long())
        return total


def joined_layout(layout: Layout, count: int) -> Layout:
    """Returns the layout of `count` images of one layout in a row."""
    patches = 36 * (1 + (layout.outer[0] // 48) * (layout.outer[1] // 48))
    orders = [
        place if place < 0 else place + number * patches for number in range(count) for place in layout.order
    ]
    return replace(layout, order=tuple(orders))


def joined_labels(scenes: tuple[Scene, ...]) -> np.ndarray:
    """Returns the labels of all images, with consecutive numbers of objects and the image's number from 1 as the seventh label."""
    labels, before = [], 0
    for number, scene in enumerate(scenes, start=1):
        one = labels_of(scene)
        one[:, 5] += before * (one[:, 5] > 0)
        labels.append(np.pad(one, ((0, 0), (0, 1)), constant_values=number))
        before += len(scene.things)
    return np.concatenate(labels)


def bits_about(scenes: tuple[Scene, ...], asked: Asked) -> int:
    """Returns the objects that a question asks about as bits."""
    things = [(thing, index) for index, scene in enumerate(scenes) for thing in scene.things]
    return sum(
        1 << number
        for number, (thing, index) in enumerate(things)
        if index in asked.images and matches((thing,), asked.key)
    )


def questions_about(
    scenes: tuple[Scene, ...], kinds: tuple[str, ...], seed: int, count: int
) -> list[tuple[str, Asked]]:
    """Returns `count` (kind, question) pairs about some images; if there are fewer, they are repeated."""
    rng = random.Random(f"ask several {seed}")
    found: dict[str, tuple[str, Asked]] = {}
    for kind in rng.choices(kinds, k=4 * count):
        asked = ask_several(scenes, kind, rng)
        if asked is not None and len(found) < count:
            found[asked.question] = (kind, asked)
    pairs = list(found.values())
    return [pairs[place % len(pairs)] for place in range(count)]


@torch.no_grad()
def several_lesson(
    model: LlavaNextForConditionalGeneration,
    make: Callable[[int], tuple[Scene, ...]],
    kinds: tuple[str, ...],
    seeds: list[int],
    *,
    questions: int,
) -> Lesson:
    """Returns sets of images of one length, ready for the decoder."""
    sets = {seed: make(seed) for seed in seeds}
    pairs = {seed: questions_about(scenes, kinds, seed, questions) for seed, scenes in sets.items()}
    tiles = [np.concatenate([tiles_of(render(scene)) for scene in scenes]) for scenes in sets.values()]
    labels = np.stack([joined_labels(scenes) for scenes in sets.values()])
    first = next(iter(sets.values()))
    layout = joined_layout(layout_of(first[0].canvas.width, first[0].canvas.height), len(first))
    group = Group(layout, np.stack(tiles), labels, seeds, [0] * len(seeds))
    lesson = make_lessons(model, [group], questions=0)[0]
    ids = np.full((len(seeds), questions, MAX_TOKENS), PAD, np.int64)
    where, kind_numbers, about = (np.zeros((len(seeds), questions), np.int64) for _ in range(3))
    for row, seed in enumerate(seeds):
        for place, (kind, asked) in enumerate(pairs[seed]):
            line = encode(asked.question, asked.answer)
            ids[row, place, : len(line)] = line
            where[row, place] = len(line) - 2
            kind_numbers[row, place] = ALL_KINDS.index(kind)
            about[row, place] = bits_about(sets[seed], asked)
    group.tiles = group.tiles[:0]  # the features are all that training needs
    return replace(lesson, ids=ids, where=where, kind=kind_numbers, about=about)


def several_lessons(
    model: LlavaNextForConditionalGeneration, first_seed: int, count: int, *, questions: int
) -> list[Lesson]:
    """Returns `count` pairs and `count` videos, the latter by number of frames."""
    seeds = list(range(first_seed, first_seed + count))
    lessons = [several_lesson(model, make_pair, PAIR_KINDS, seeds, questions=questions)]
    lengths = {seed: len(make_video(seed)) for seed in seeds}
    for frames in range(NUM_FRAMES[0], NUM_FRAMES[1] + 1):
        members = [seed for seed in seeds if lengths[seed] == frames]
        lessons.append(several_lesson(model, make_video, VIDEO_KINDS, members, questions=questions))
    return lessons


def main() -> None:
    """Parses the arguments, trains and packages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, default=Path("export/tiny"), help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--minutes", type=float, default=20, help="wall-clock minutes of training")
    parser.add_argument("--sets", type=int, default=2500, help="training pairs, and as many videos")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = LlavaNextForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
    singles = make_groups(TRAIN_SEED, args.sets // 4, workers=args.threads)
    lessons = several_lessons(model, TRAIN_SEED, args.sets, questions=16)
    lessons += make_lessons(model, singles, questions=16)
    checked = several_lessons(model, VALIDATION_SEED, 48, questions=8)
    print("before", evaluate(model, checked, kinds=ALL_KINDS), flush=True)
    recipe = Recipe(
        60 * args.minutes, 1e-3, batch=4, questions=12, final_rate=0.02, full_share=0.1, full_share_end=0.3,
        deep=0.2, keep=(32, 48, 64, 96), place=0.3,
    )  # fmt: skip
    train_language(
        model.train(), lessons, ImageReader(), recipe, seed=7, name="several", validation=checked,
        save=lambda part: package(part, args.out), kinds=ALL_KINDS,
    )  # fmt: skip
    package(model.eval(), args.out)


if __name__ == "__main__":
    main()
