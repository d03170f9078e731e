"""An image as patches at its own aspect ratio: the common part of Qwen2.5-VL and Qwen3-VL, see ``qwen.py``.

An image is scaled to a grid of patches; ``merge_size``² neighbouring patches are one visual token.

Source: Qwen2VLImageProcessor and get_vision_position_ids of transformers 5.23.
Letters: P patches, N visual tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.images.constants import (
    CLIP_MEAN,
    CLIP_STD,
    Colour,
    Factor,
    ImageConstants,
    Size,
    Spread,
    normalized,
    only_checkpoint_errors,
    pixel_fields,
    processor_values,
)
from trio_edge.runtime.images.layout import ImageLayout, boxes_between, check_not_empty
from trio_edge.runtime.images.resizing import Resample, resize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from PIL import Image

MAX_ASPECT_RATIO = 200
"""Hugging Face's processor refuses thinner images."""
_SLACK = 1 + 1e-9  # the bounds must hold for Hugging Face's results in float64
_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")
_Images = TypeVar("_Images", bound="PatchImages")


class PatchImages(ImageConstants, frozen=True, kw_only=True):
    """Image processing with an image scaled to whole patches. Sizes are in pixels of the scaled image."""

    patch_size: Size
    """Side of a patch."""
    temporal_patch_size: Size = 2
    """Frames per patch; an image is repeated."""
    merge_size: Size = 2
    """``merge_size``² patches are one visual token."""
    min_pixels: Size = 56 * 56
    """Smaller images are enlarged."""
    max_pixels: Size = 28 * 28 * 1280
    """Larger images are reduced."""
    resample: Resample = "bicubic"
    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: Factor = 1 / 255
    image_mean: Colour = CLIP_MEAN
    image_std: Spread = CLIP_STD

    def __post_init__(self) -> None:
        if self.min_pixels > self.max_pixels:
            raise ManifestError(
                f"min_pixels: expected <= max_pixels {self.max_pixels}, got {self.min_pixels}"
            )

    @classmethod
    def from_preprocessor_config(cls: type[_Images], config: Mapping[str, Any], **tower: int) -> _Images:
        """Return the constants of a ``preprocessor_config.json``; missing keys have the defaults of Hugging Face's class.

        ``tower`` are fields that only the vision encoder's configuration has.

        Raises:
            CheckpointError: If the processor is of another class, or a value is not supported.
        """
        _, values = processor_values(config, processors=_PROCESSORS, always=("do_convert_rgb", "do_resize"))
        with only_checkpoint_errors():
            fields = pixel_fields(values, "patch_size", "temporal_patch_size", "merge_size")
            areas = dict(zip(("min_pixels", "max_pixels"), _pixel_range(values)))
            return cls.from_dict({"patch_size": 14, **tower, **areas, **fields})

    @property
    def token_size(self) -> int:
        """Side of a visual token in pixels of the scaled image."""
        return self.patch_size * self.merge_size

    @property
    def patch_values(self) -> int:
        """Values per patch: 3 colours of ``temporal_patch_size`` frames."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def token_grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of visual tokens of an image of this size.

        Raises:
            ImageError: If the image is empty or too thin.
        """
        check_not_empty(width, height)
        check_aspect_ratio(width, height)
        return scaled_grid(width, height, size=self.token_size, least=self.min_pixels, most=self.max_pixels)

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """Return P, the number of patches, N, and the family's own axes."""
        return self._reduced(self.whole_sizes(*self.token_grid(width, height)))

    def any_image_sizes(self) -> tuple[dict[str, int], ...]:
        """Return one size that is enough for every image.

        N can exceed ``max_pixels`` in tokens: a small image is enlarged to at least ``min_pixels`` with both sides rounded
        up, and a thin image that is reduced keeps at least one row. Other axes can be largest for another image.
        """
        bounds = [self.whole_sizes(rows, columns) for rows, columns in _largest_grids(self)]
        return (self._reduced({axis: max(bound[axis] for bound in bounds) for axis in bounds[0]}),)

    def whole_sizes(self, rows: int, columns: int) -> dict[str, int]:
        """Return the sizes for a grid of visual tokens, without the encoder's reduction."""
        return {"P": rows * columns * self.merge_size**2, "N": rows * columns}

    def _reduced(self, sizes: dict[str, int]) -> dict[str, int]:
        """Return the sizes with the encoder's reduction, which needs at least as many patches as it keeps."""
        keep = self.encoder_keep
        if keep is None:
            return sizes
        return {**sizes, "P": max(sizes["P"], keep * self.merge_size**2), "N": min(sizes["N"], keep)}

    def layout(self, width: int, height: int) -> ImageLayout:
        """Return the layout of an image; tokens are in raster order."""
        return self.grid_layout(width, height, self.token_grid(width, height))

    def grid_layout(self, width: int, height: int, grid: tuple[int, int]) -> ImageLayout:
        """Return the layout of an image, or a pair of frames, with ``grid`` rows and columns of visual tokens."""
        rows, columns = grid
        x, y = np.linspace(0, width, columns + 1), np.linspace(0, height, rows + 1)
        row, column = np.indices((rows, columns), dtype=np.int32)
        return ImageLayout(
            width=width,
            height=height,
            sizes=self._reduced(self.whole_sizes(rows, columns)),
            boxes=boxes_between(x, y).reshape(-1, 4).astype(np.float32),
            positions=np.stack([np.zeros_like(row), row, column]).reshape(3, -1),
            position_span=max(rows, columns),
        )


def scaled_grid(width: int, height: int, *, size: int, least: int, most: int) -> tuple[int, int]:
    """Return the rows and columns of visual tokens of an image of ``width`` x ``height`` pixels.

    The scaled image has ``least`` to ``most`` pixels; ``size`` is the side of a visual token in its pixels.
    Source: smart_resize.
    """
    # Like the original, Python's round takes halves to even numbers.
    rows, columns = round(height / size), round(width / size)
    if rows * columns * size**2 > most:
        shrink = math.sqrt((height * width) / most)
        return max(1, math.floor(height / shrink / size)), max(1, math.floor(width / shrink / size))
    if rows * columns * size**2 < least:
        enlarge = math.sqrt(least / (height * width))
        return math.ceil(height * enlarge / size), math.ceil(width * enlarge / size)
    return rows, columns


def check_aspect_ratio(width: int, height: int) -> None:
    """Raise ImageError if an image or a frame is too thin for Hugging Face's processors."""
    if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"image: expected an aspect ratio of at most {MAX_ASPECT_RATIO}, got {width}x{height} pixels; crop it"
        )


def _largest_grids(images: PatchImages) -> list[tuple[int, int]]:
    """Return, for each number of rows, the largest possible number of columns with rows <= columns.

    With the areas a (``min_pixels``) and b (``max_pixels``) in tokens and the largest aspect ratio ρ:

    1. Sizes that are only rounded: r c <= b, and c - 1/2 <= ρ (r + 1/2).
    2. Reduced images cover at most b before rounding down: r c <= b, and c <= sqrt(ρ b). A single row may have been
       rounded up, so there r c <= b does not hold.
    3. Enlarged images cover a before rounding up: (r - 1)(c - 1) <= a, and c - 1 <= sqrt(ρ a).

    Transposed grids have the same counts.
    """
    area = images.token_size**2
    least, most = images.min_pixels / area * _SLACK, images.max_pixels / area * _SLACK
    grids = []
    for rows in range(1, math.isqrt(int(max(least, most))) + 3):
        rounded = min(most / rows, MAX_ASPECT_RATIO * (rows + 0.5) + 0.5)
        reduced = min(most / rows if rows > 1 else math.inf, math.sqrt(MAX_ASPECT_RATIO * most))
        enlarged = 1 + min(least / (rows - 1) if rows > 1 else math.inf, math.sqrt(MAX_ASPECT_RATIO * least))
        grids.append((rows, max(1, int(max(rounded, reduced, enlarged)))))
    return [(rows, columns) for rows, columns in grids if rows <= columns]


def patch_positions(token_order: NDArray[np.int64], columns: int, images: PatchImages) -> NDArray[np.int32]:
    """Return the row and column of each patch, [P, 2], for visual tokens in the order ``token_order`` [N]."""
    token = np.stack([token_order // columns, token_order % columns], axis=-1) * images.merge_size
    inside = np.indices((images.merge_size, images.merge_size)).reshape(2, -1).T
    positions: NDArray[np.int32] = (token[:, None] + inside).reshape(-1, 2).astype(np.int32)
    return positions


def patches(
    frames: Sequence[Image.Image],
    images: PatchImages,
    *,
    grid: tuple[int, int],
    token_order: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Return the patches of an image or of up to ``temporal_patch_size`` frames, the last of which is repeated.

    Args:
        frames: The image, or frames of one size.
        images: The constants.
        grid: Rows and columns of visual tokens.
        token_order: [N], order of the visual tokens.

    Returns:
        float32 [P, ``patch_values``], for each patch ordered by colour, frame, row and column.
    """
    merge, side, (rows, columns) = images.merge_size, images.patch_size, grid
    size = (rows * images.token_size, columns * images.token_size)
    levels = np.stack([resize(frame, size, resample=images.resample) for frame in frames])
    pixels = normalized(levels, images).reshape(-1, rows, merge, side, columns, merge, side, 3)
    tokens = pixels.transpose(1, 4, 2, 5, 7, 0, 3, 6)
    patches = tokens.reshape(rows * columns, merge**2, 3, len(frames), side, side)[token_order]
    frame_of_patch = np.minimum(np.arange(images.temporal_patch_size), len(frames) - 1)
    return np.take(patches, frame_of_patch, axis=3).reshape(-1, images.patch_values)


def padded_rows(rows: NDArray[Any], count: int) -> NDArray[Any]:
    """Return ``rows``, padded to ``count`` with copies of the first row."""
    return np.concatenate([rows, np.repeat(rows[:1], count - len(rows), axis=0)])


def _pixel_range(values: Mapping[str, Any]) -> tuple[int, int]:
    """Return the smallest and largest area. Older files have ``min_pixels`` and ``max_pixels``, which precede ``size``."""
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    if "size" in values:
        size = {key: value for key, value in dict(values["size"]).items() if value is not None}
    areas = []
    for old_key, key in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        area = values.get(old_key, size.get(key, size.get(old_key)))
        if type(area) is not int:
            raise CheckpointError(
                f"preprocessor_config size: expected areas 'shortest_edge' and 'longest_edge' in pixels, got {size}"
            )
        areas.append(area)
    return areas[0], areas[1]
