"""Baselines that a real method must beat: selections that look at nothing but positions, and a smaller image.

A selection is a function for ``Pipeline.generate(override=…)``; its kept tokens are nested from stage to stage. A smaller image
goes through a keep-all bundle: it is what a runtime without token reduction can do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.runtime.model.host_selection import SelectorOverride

SMALLER_IMAGE = "smaller-image"
SELECTIONS = ("random", "uniform", "base-tile-first")
BASELINES = (*SELECTIONS, SMALLER_IMAGE)
_SCALES = 128
"""Sizes that a smaller image is chosen from, in equal steps."""


def baseline(name: str, *, seed: int, is_base: Callable[[], NDArray[np.bool_]]) -> SelectorOverride:
    """Return the baseline called ``name``, one of ``SELECTIONS``.

    ``is_base`` says for each visual token of the prompt whether it is of a tile that shows a whole image. It is called while
    the answer is streamed.
    """
    if name == "random":
        return _random(seed)
    if name == "uniform":
        return lambda _stage, entering, num_keep: evenly_spaced(len(entering), num_keep)
    return lambda _stage, entering, num_keep: _base_first(is_base()[entering], num_keep)


def evenly_spaced(count: int, num_keep: int) -> NDArray[np.int32]:
    """Return ``num_keep`` of ``count`` indices, each in the middle of its equal share, ascending."""
    return np.floor((np.arange(num_keep) + 0.5) * count / max(num_keep, 1)).astype(np.int32)


def _random(seed: int) -> SelectorOverride:
    generator = np.random.default_rng(seed)

    def choose(_stage: int, entering: NDArray[np.int32], num_keep: int) -> NDArray[np.int32]:
        return np.sort(generator.choice(len(entering), num_keep, replace=False)).astype(np.int32)

    return choose


def _base_first(is_base: NDArray[np.bool_], num_keep: int) -> NDArray[np.int32]:
    base, others = np.flatnonzero(is_base), np.flatnonzero(~is_base)
    num_base = min(num_keep, len(base))
    kept = [base[evenly_spaced(len(base), num_base)], others[evenly_spaced(len(others), num_keep - num_base)]]
    return np.sort(np.concatenate(kept)).astype(np.int32)


def smaller_image(image: Image.Image, processing: ImageProcessing, *, share: float) -> Image.Image:
    """Return the image scaled down until it has at most ``share`` of its visual tokens.

    It is as large as it can be. Tiles are not cut smaller: where no size has so few tokens, it is the largest of those with
    the fewest.
    """
    width, height = image.size
    sizes = [
        (max(1, round(width * step / _SCALES)), max(1, round(height * step / _SCALES)))
        for step in range(_SCALES, 0, -1)
    ]
    counts = [processing.sizes(*size)["N"] for size in sizes]
    wanted = max(share * counts[0], min(counts))
    size = next(size for size, count in zip(sizes, counts) if count <= wanted)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
