"""Random pictures for tests."""

from __future__ import annotations

import numpy as np
from PIL import Image


def random_picture(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Return a smooth random RGB picture: noise enlarged, so that resizing has something to do."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
