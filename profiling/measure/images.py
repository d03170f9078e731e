"""Images for a profile: one that gives as many visual tokens as the bundle takes, and one of each size that costs less."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from trio_edge.runtime.bundle.errors import TrioEdgeError

if TYPE_CHECKING:
    from trio_edge.runtime.pipeline import Pipeline

PROMPT = "What is in the picture?"
_SIDES = (48, 96, 144, 336, 448, 672, 896, 1008, 1344)
_SEED = 0


class MeasuredSize(NamedTuple):
    """Pixels of an image, and the visual tokens they become."""

    width: int
    height: int
    visual_tokens: int


def measured_sizes(pipeline: Pipeline) -> list[MeasuredSize]:
    """Return one size for each number of visual tokens that fits the bundle's shapes, most tokens first."""
    manifest = pipeline.manifest
    exact = [(size.width, size.height) for size in manifest.image_sizes]
    sides = [(width, height) for width in _SIDES for height in _SIDES]
    # Exact shapes first, then small images: of those with as many tokens the first one is kept.
    candidates = [*exact, *sorted(sides, key=lambda size: size[0] * size[1])]
    profiles = [profile.sizes for profile in manifest.graph("vision").profiles]
    found: dict[int, MeasuredSize] = {}
    for width, height in candidates:
        try:
            sizes = pipeline.images.sizes(width, height)
        except TrioEdgeError:
            continue
        if any(all(profile[name] >= size for name, size in sizes.items()) for profile in profiles):
            found.setdefault(sizes["N"], MeasuredSize(width, height, sizes["N"]))
    return [found[count] for count in sorted(found, reverse=True)]


def random_image(size: MeasuredSize) -> Image.Image:
    """Return an image of random pixels, the same each time; no selection finds anything special in it."""
    pixels = np.random.default_rng(_SEED).integers(0, 256, (size.height, size.width, 3), np.uint8)
    return Image.fromarray(pixels)
