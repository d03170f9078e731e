"""Random pictures for tests, and photographs from packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

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


_PHOTOGRAPHS = {
    "china": ("sklearn", "datasets/images/china.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "astronaut": ("skimage", "data/astronaut.png"),
    "page": ("skimage", "data/page.png"),
}
PHOTOGRAPHS = tuple(_PHOTOGRAPHS)
"""Two JPEG and two PNG files, the last one grey and of a printed page. china: Daniel Buechele, CC BY 2.0."""


def photograph(name: str) -> Path:
    """Return the file of a photograph, in the package that it comes with."""
    package, path = _PHOTOGRAPHS[name]
    spec = find_spec(package)  # importing these packages takes seconds
    assert spec is not None and spec.origin is not None, f"{package} belongs to the development packages"
    return Path(spec.origin).parent / path
