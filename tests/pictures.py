"""Random pictures for tests."""

from __future__ import annotations

import numpy as np
from PIL import Image


def random_picture(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Return a smooth random RGB picture: noise enlarged, so that resizing has something to do."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def noise_picture(width: int, height: int, *, mode: str = "RGB") -> Image.Image:
    """Return a picture of independent random pixels, always the same one for these arguments."""
    generator = np.random.default_rng(width + height)
    if mode == "I;16":
        return Image.fromarray(generator.integers(0, 600, (height, width), dtype=np.uint16))
    channels = 4 if mode in ("RGBA", "LA") else 3
    pixels = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)
