"""Antialiased resizing with the same 8-bit levels as Hugging Face's default image processors.

These resize with torchvision, whose uint8 kernel first resizes every row, then every column, each with 16-bit weights and a
result rounded to 8 bits. Pillow has the same filters but 22-bit weights, and may take columns first; on noise they differ
by up to 26 levels. The passes below repeat torchvision's numbers exactly. Above ``MAX_EXACT_PIXELS`` Pillow is used, rows
first: on noise it is one level off in 0.5 % of the values.

Source: aten/src/ATen/native/cpu/UpSampleKernel.cpp of torch 2.13, written anew from what it computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from trio_edge.runtime.bundle.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# Very narrow images would need gigabytes on their way to a square.
_MOST_LINES, _MOST_BETWEEN, _MOST_BETWEEN_LARGE = 1 << 21, 1 << 23, 1 << 26
_MOST_SUMS = 1 << 24
Resample = Literal["bilinear", "bicubic", "lanczos"]

MAX_EXACT_PIXELS = 2048 * 2048  # SmolVLM's square images are resized to this size, and then again
"""Images with more pixels are resized by Pillow, which is several times faster and needs less memory."""


def resize(
    image: Image.Image,
    size: tuple[int, int],
    *,
    resample: Resample,
    crop: tuple[int, int, int, int] | None = None,
) -> NDArray[np.uint8]:
    """Return an RGB image at another size, or a part of it: uint8 [height, width, 3].

    Args:
        image: Mode "RGB".
        size: (height, width) in pixels.
        resample: The filter, widened when shrinking.
        crop: (top, left, height, width) in the resized image. Only this part is computed, so an image of
            1 x 4000 pixels can be scaled to a width of 336 without building 336 x 1344000 pixels.

    Raises:
        ImageError: If it is so narrow that resizing it would take gigabytes.
    """
    top, left, crop_height, crop_width = crop or (0, 0, *size)
    rows, columns = range(top, top + crop_height), range(left, left + crop_width)
    is_large = image.width * image.height > MAX_EXACT_PIXELS
    between = image.height * len(columns)  # pixels after the first pass
    if max(size) > _MOST_LINES or between > (_MOST_BETWEEN_LARGE if is_large else _MOST_BETWEEN):
        raise ImageError(
            f"image: expected one that can be resized to {size[1]}x{size[0]} pixels in memory, got"
            f" {image.width}x{image.height}; crop the image so that it is less narrow"
        )
    if is_large:
        return _resized_by_pillow(image, size, rows=rows, columns=columns, resample=resample)
    pixels = np.asarray(image)
    pixels = _resized_axis(pixels.transpose(1, 0, 2), size[1], wanted=columns, resample=resample)
    return _resized_axis(pixels.transpose(1, 0, 2), size[0], wanted=rows, resample=resample)


def _resized_by_pillow(
    image: Image.Image, size: tuple[int, int], *, rows: range, columns: range, resample: Resample
) -> NDArray[np.uint8]:
    method = Image.Resampling[resample.upper()]
    x_scale, y_scale = image.width / size[1], image.height / size[0]
    x_box = (columns.start * x_scale, 0, columns.stop * x_scale, image.height)
    narrow = image.resize((len(columns), image.height), method, box=x_box)
    y_box = (0, rows.start * y_scale, narrow.width, rows.stop * y_scale)
    return np.asarray(narrow.resize((len(columns), len(rows)), method, box=y_box))


def _resized_axis(
    pixels: NDArray[np.uint8], size: int, *, wanted: range, resample: Resample
) -> NDArray[np.uint8]:
    """Return lines ``wanted`` of ``pixels`` [lines, others, 3] resized to ``size`` lines."""
    if len(pixels) == size:
        return pixels[wanted.start : wanted.stop]
    starts, weights, num_bits = _integer_weights(len(pixels), size, wanted=wanted, resample=resample)
    flat = pixels.reshape(len(pixels), -1)
    resized = np.empty((len(wanted), flat.shape[1]), np.uint8)
    # In parts, because a very narrow image would need gigabytes for its sums.
    step = max(1, _MOST_SUMS // max(len(pixels), len(wanted)))
    for first in range(0, flat.shape[1], step):
        part = slice(first, first + step)
        resized[:, part] = _weighted_sums(flat[:, part], starts, weights, num_bits)
    return resized.reshape(len(wanted), *pixels.shape[1:])


def _weighted_sums(
    values: NDArray[np.uint8], starts: list[int], weights: list[NDArray[np.float64]], num_bits: int
) -> Any:
    # float64 holds these integer sums exactly, and numpy computes them with BLAS.
    lines = np.ascontiguousarray(values).astype(np.float64)
    sums = np.empty((len(starts), lines.shape[1]))
    for line, (start, weight) in enumerate(zip(starts, weights)):
        np.dot(weight, lines[start : start + len(weight)], out=sums[line])
    return np.floor((sums + 2 ** (num_bits - 1)) / 2**num_bits).clip(0, 255)


def _integer_weights(
    size_from: int, size_to: int, *, wanted: range, resample: Resample
) -> tuple[list[int], list[NDArray[np.float64]], int]:
    """Return the first input line and the integer weights of each wanted line, and the number of fractional bits."""
    kernel, radius = _FILTERS[resample]
    scale = size_from / size_to
    stretch = max(scale, 1.0)
    centers = scale * (np.arange(size_to) + 0.5)
    firsts = np.maximum((centers - radius * stretch + 0.5).astype(np.int64), 0)
    counts = np.minimum((centers + radius * stretch + 0.5).astype(np.int64), size_from) - firsts
    taps = np.arange(counts.max())
    weights = kernel(np.abs((taps + firsts[:, None] - centers[:, None] + 0.5) / stretch))
    weights[taps >= counts[:, None]] = 0.0
    weights /= weights.sum(axis=1, keepdims=True)
    # As in torchvision: the largest shift for which the largest weight of any line still fits into 16 bits.
    num_bits = 0
    while num_bits < 22 and int(0.5 + weights.max() * 2 ** (num_bits + 1)) < 2**15:
        num_bits += 1
    weights = weights[wanted.start : wanted.stop] * 2**num_bits
    rounded = np.trunc(weights + np.copysign(0.5, weights))
    starts, ends = firsts[wanted.start : wanted.stop], counts[wanted.start : wanted.stop]
    return starts.tolist(), [line[:end] for line, end in zip(rounded, ends)], num_bits


def _cubic(distance: NDArray[np.float64]) -> Any:
    """Keys' cubic filter with a = -0.5."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


# Each filter, the last one Lanczos' windowed sinc with three lobes, and the distance from which it is 0.
_FILTERS: dict[Resample, tuple[Callable[[NDArray[np.float64]], Any], float]] = {
    "bilinear": (lambda distance: np.maximum(1 - distance, 0.0), 1.0),
    "bicubic": (_cubic, 2.0),
    "lanczos": (lambda far: np.where(far < 3, np.sinc(far) * np.sinc(far / 3), 0.0), 3.0),
}
