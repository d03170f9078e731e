"""The demo task: images of coloured shapes and digits with questions that have one certain answer.

`held_out` yields samples for measuring accuracy. It is the same on every run for the same arguments, and its images
come from seeds from `HELD_OUT_OFFSET` on, which training never touches (training uses seeds below it).

The image generator is in `scene`, the questions are in `questions`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trio_edge.calibration.shapes.questions import KINDS, VOCABULARY, ask
from trio_edge.calibration.shapes.scene import Scene, make_scene, render

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

__all__ = [
    "HELD_OUT_OFFSET",
    "KINDS",
    "SEEDS_PER_STREAM",
    "VOCABULARY",
    "ShapeSample",
    "held_out",
    "samples_of",
]

HELD_OUT_OFFSET = 900_000_000
SEEDS_PER_STREAM = 1_000_000
QUESTIONS_PER_PICTURE = 2


@dataclass(frozen=True)
class ShapeSample:
    """One question about one image.

    Attributes:
        image: RGB image; samples that share an image share the object.
        question: words separated by blanks, ending in ` ?`.
        answer: one word of `VOCABULARY`.
        kind: one of `KINDS`.
        sample_id: `<scene seed>-<kind>`, unique within a stream.
    """

    image: Image.Image
    question: str
    answer: str
    kind: str
    sample_id: str

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The image, as samples of several have them."""
        return (self.image,)


def held_out(count: int, *, seed: int = 0) -> Iterator[ShapeSample]:
    """Yields `count` samples, every kind equally often (up to one), about two questions per image.

    Args:
        count: number of samples.
        seed: stream; two streams share no image.

    Raises:
        ValueError: `count` or `seed` is negative.
    """
    if count < 0 or seed < 0:
        raise ValueError(f"held_out: expected count >= 0 and seed >= 0, got {count} and {seed}")
    given = 0
    scene_seed = HELD_OUT_OFFSET + seed * SEEDS_PER_STREAM
    while given < count:
        wanted = [KINDS[(given + i) % len(KINDS)] for i in range(min(QUESTIONS_PER_PICTURE, count - given))]
        for sample in samples_of(make_scene(scene_seed), wanted):
            if sample.kind != KINDS[given % len(KINDS)]:
                break
            given += 1
            yield sample
        scene_seed += 1


def samples_of(scene: Scene, kinds: list[str]) -> list[ShapeSample]:
    """Returns one sample of each kind that the scene allows, in the order of `kinds`."""
    rng = random.Random(f"held out {scene.seed}")
    image = render(scene)
    samples = []
    for kind in kinds:
        pair = next((found for found in (ask(scene, kind, rng) for _ in range(4)) if found), None)
        if pair is not None:
            samples.append(ShapeSample(image, *pair, kind=kind, sample_id=f"{scene.seed}-{kind}"))
    return samples
