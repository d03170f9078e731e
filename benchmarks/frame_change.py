"""Differences between frames: of noise, compression and light, and of objects that appear.

    python benchmarks/frame_change.py photo.jpg examples/pictures/shapes-200x150.png

trio-watch's threshold lies between them. Each image is scaled to 640x480 and changed. Printed are the differences of gray levels at
32x32: their mean, the root mean square that trio-watch compares, and the largest one. Medians and extremes of 20 draws.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from parts.arguments import errors_in_one_line, parser_for
from parts.tables import markdown
from PIL import Image, ImageDraw, ImageFont

from trio_edge.runtime.decisions.watcher import difference, small_gray
from trio_edge.runtime.images.reading import open_image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Change = Callable[[NDArray[np.float64], np.random.Generator], NDArray[np.float64]]

_SIZE, _DRAWS = (640, 480), 20


def _noisy(sigma: float) -> Change:
    return lambda scene, rng: scene + rng.normal(0, sigma, scene.shape)


def _jpeg(scene: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """A noisy frame of an MJPEG camera."""
    buffer = io.BytesIO()
    _image(scene + rng.normal(0, 5, scene.shape)).save(buffer, "JPEG", quality=int(rng.integers(40, 80)))
    return np.asarray(Image.open(buffer), np.float64)


def _brighter(share: float) -> Change:
    return lambda scene, rng: _noisy(5)(scene * (1 + share), rng)


def _shaken(scene: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """A pole in the wind: one or two pixels."""
    return _noisy(5)(np.roll(scene, rng.integers(1, 3, 2), (0, 1)), rng)


def _with_object(share: float, *, contrast: float) -> Change:
    """An upright object that covers a share of the frame, twice as high as wide, brighter or darker than what it hides."""

    def changed(scene: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        width = round((share * scene.shape[0] * scene.shape[1] / 2) ** 0.5)
        y, x = rng.integers(scene.shape[0] - 2 * width), rng.integers(scene.shape[1] - width)
        there = np.s_[y : y + 2 * width, x : x + width]
        scene = scene.copy()
        level = scene[there].mean()
        scene[there] = level + (contrast if level < 128 else -contrast)
        return _noisy(5)(scene, rng)

    return changed


def _clock(scene: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """The seconds that many cameras write into a corner."""
    frame = _image(scene)
    ImageDraw.Draw(frame).text(
        (8, 8), f"2026-11-24 12:00:{rng.integers(60):02}", font=ImageFont.load_default(16)
    )
    return _noisy(5)(np.asarray(frame, np.float64), rng)


_CHANGES: dict[str, Change] = {
    "noise, sigma 2": _noisy(2),
    "noise, sigma 5": _noisy(5),
    "noise, sigma 15": _noisy(15),
    "noise and JPEG": _jpeg,
    "light + 0.5 %": _brighter(0.005),
    "light + 3 %": _brighter(0.03),
    "clock in the corner": _clock,
    "shaken by 1 or 2 pixels": _shaken,
    "object of 0.5 %": _with_object(0.005, contrast=80),
    "object of 2 %": _with_object(0.02, contrast=80),
    "object of 5 %": _with_object(0.05, contrast=80),
    "object of 5 %, faint": _with_object(0.05, contrast=30),
    "light + 15 %": _brighter(0.15),
}


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("images", type=Path, nargs="+")
    options = parser.parse_args()
    with errors_in_one_line(parser):
        for path in options.images:
            scene = np.asarray(open_image(path).resize(_SIZE), np.float64)
            rows = [(name, *_differences(scene, change)) for name, change in _CHANGES.items()]
            print(
                path.name,
                "",
                markdown(("change", "mean", "root mean square", "largest cell"), rows),
                "",
                sep="\n",
            )


def _differences(scene: NDArray[np.float64], change: Change) -> Sequence[str]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(_DRAWS):
        start = _clock(scene, rng) if change is _clock else _noisy(2)(scene, rng)
        before, after = (small_gray(_image(one)) for one in (start, change(scene, rng)))
        cells = np.abs(after - before)
        found.append((cells.mean(), difference(before, after), cells.max()))
    return [f"{np.median(one):.2f} ({min(one):.2f}-{max(one):.2f})" for one in zip(*found)]


def _image(scene: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.rint(scene).clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
