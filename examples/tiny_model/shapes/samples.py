"""The demo task: images of coloured shapes and digits with questions that have one certain answer.

``held_out`` yields samples for measuring accuracy, the same ones on every run. Its images have seeds from ``HELD_OUT_OFFSET`` on;
training uses smaller ones. ``scene`` draws the images, ``questions`` asks the questions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .questions import KINDS, ask
from .scene import Scene, make_scene, render

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

HELD_OUT_OFFSET = 900_000_000
SEEDS_PER_STREAM = 1_000_000
QUESTIONS_PER_PICTURE = 2


@dataclass(frozen=True)
class ShapeSample:
    """One question about one image or several."""

    images: tuple[Image.Image, ...]
    """RGB, in the order of the prompt; samples that share an image share the object."""
    question: str
    """Words separated by blanks, the last one ``?``."""
    answer: str
    """One word of ``VOCABULARY``."""
    kind: str
    sample_id: str
    """``<scene seed>-<kind>``, unique within a stream."""
    answer_image: int | None = None
    """Index of the image that has the answer, if one of several has it."""


def held_out(count: int, *, seed: int = 0) -> Iterator[ShapeSample]:
    """Yield ``count`` samples with about two questions per image; each kind occurs equally often, give or take one.

    Streams of different seeds share no image.
    """
    given, scene_seed = 0, HELD_OUT_OFFSET + seed * SEEDS_PER_STREAM
    while given < count:
        wanted = [KINDS[(given + i) % len(KINDS)] for i in range(min(QUESTIONS_PER_PICTURE, count - given))]
        for sample in samples_of(make_scene(scene_seed), wanted):
            if sample.kind != KINDS[given % len(KINDS)]:
                break
            given += 1
            yield sample
        scene_seed += 1


def samples_of(scene: Scene, kinds: list[str]) -> list[ShapeSample]:
    """Return one sample of each kind that the scene allows, in the order of ``kinds``."""
    rng = random.Random(f"held out {scene.seed}")
    image = render(scene)
    samples = []
    for kind in kinds:
        pair = next((found for found in (ask(scene, kind, rng) for _ in range(4)) if found), None)
        if pair is not None:
            samples.append(ShapeSample((image,), *pair, kind=kind, sample_id=f"{scene.seed}-{kind}"))
    return samples
