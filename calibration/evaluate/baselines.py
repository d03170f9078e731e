"""Baselines that a real method must beat: selections that ignore the image's content, and a smaller image.

A selection is a function for ``Pipeline.generate(override=…)``. A smaller image goes through a keep-all bundle, as in a runtime
without token reduction.
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
"""Number of candidate sizes for a smaller image, in equal steps."""


def baseline(name: str, *, seed: int, is_base: Callable[[], NDArray[np.bool_]]) -> SelectorOverride:
    """Return the baseline called ``name``, one of ``SELECTIONS``.

    ``is_base`` returns for each visual token of the prompt whether its tile shows the whole image. It is called during the
    answer, when the images are known.
    """
    if name == "random":
        return _random(seed)
    if name == "uniform":
        return lambda _stage, entering, num_keep: evenly_spaced(len(entering), num_keep)
    return lambda _stage, entering, num_keep: _base_first(is_base()[entering], num_keep)


def evenly_spaced(count: int, num_keep: int) -> NDArray[np.int32]:
    """Return ``num_keep`` of ``count`` indices, ascending: the middles of ``num_keep`` equal parts."""
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
    """Return the image at the largest size that has at most ``share`` of its visual tokens.

    Where no size has so few tokens, it is the largest with the fewest.
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
