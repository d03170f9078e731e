"""The random image and prompt that all ways share: token ids, the image's place, positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trio_edge.runtime.images.interface import ImageProcessing
from trio_edge.runtime.prompts.tokenizer import (
    PromptPositions,
    RunPositions,
    mrope_positions,
    plain_positions,
)

_NUM_BEFORE = 35
"""Most text tokens before the image: those of LLaVA's system prompt."""


def random_picture(size: tuple[int, int], *, seed: int = 0) -> Image.Image:
    """Return an image of random colours; ``size`` is width and height."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def prompt_ids(vocab_size: int, *, num_text: int, seed: int) -> NDArray[np.int64]:
    """Return random token ids [T]."""
    return np.random.default_rng(seed).integers(0, vocab_size, num_text)


def num_before(num_text: int) -> int:
    """Return the number of text tokens before the image."""
    return min(_NUM_BEFORE, num_text // 2)


def prompt_positions(
    processing: ImageProcessing, picture: Image.Image, *, mrope: bool, num_text: int, num_rows: int
) -> PromptPositions:
    """Return the positions of a prompt around ``picture``, padded to ``num_rows``."""
    if not mrope:
        length = processing.sizes(*picture.size)["N"] + num_text
        return plain_positions(num_rows=num_rows, length=length)
    before = num_before(num_text)
    layout = processing.layout(*picture.size)
    assert layout.positions is not None  # models with M-RoPE have them
    run = RunPositions(layout.positions, layout.position_span, before)
    return mrope_positions([run], num_text=num_text, num_rows=num_rows)
