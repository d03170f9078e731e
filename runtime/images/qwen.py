"""From an image to the windowed vision graph's inputs: patches at the image's own aspect ratio (Qwen2.5-VL).

An image becomes a grid of patches, and ``merge_size``² neighbouring patches one visual token. The graph wants the
patches of one attention window next to each other ("window order"): windows in raster order, in them tokens in raster order,
in them patches in raster order. ``token_index`` brings the tokens back into the image's raster order.

Source: Qwen2VLImageProcessor, get_vision_position_ids and get_vision_window_index of transformers 5.23.
Letters: P patches, W windows, Q slots (patches of a full window), N visual tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

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
from trio_edge.runtime.images.layout import (
    ImageLayout,
    boxes_between,
    check_not_empty,
    check_rgb,
    padded_index,
    room_for,
)
from trio_edge.runtime.images.resizing import Resample, resize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from PIL import Image

KIND = "patches"
MAX_ASPECT_RATIO = 200
"""Hugging Face's processor refuses images that are thinner."""
_SLACK = 1 + 1e-9  # the bounds must hold for what Hugging Face calculates in float64
_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")


@final
class QwenImages(ImageConstants, frozen=True, kw_only=True, tag_field="kind", tag=KIND):
    """Image processing with an image scaled to whole patches. Sizes are in pixels of the scaled image."""

    patch_size: Size
    """Side of a patch."""
    window_size: Size
    """Side of an attention window; a part of it that holds no whole visual token is not used."""
    temporal_patch_size: Size = 2
    """Frames of a patch; an image is repeated."""
    merge_size: Size = 2
    """A visual token is made of ``merge_size``² patches."""
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
        if self.window_size < self.token_size:
            raise ManifestError(
                f"window_size: expected >= {self.token_size} (patch_size * merge_size), got {self.window_size}"
            )
        if self.min_pixels > self.max_pixels:
            raise ManifestError(
                f"min_pixels: expected <= max_pixels {self.max_pixels}, got {self.min_pixels}"
            )

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any], *, window_size: int) -> QwenImages:
        """Return the constants of a ``preprocessor_config.json``, or of ``image_processor.to_dict()``.

        Args:
            config: Its content. Missing keys mean the defaults of Hugging Face's class.
            window_size: The vision encoder's; the file does not hold it.

        Raises:
            CheckpointError: If the processor is of another kind, or its values cannot be followed.
        """
        _, values = processor_values(config, processors=_PROCESSORS, always=("do_convert_rgb", "do_resize"))
        with only_checkpoint_errors():
            fields = pixel_fields(values, "patch_size", "temporal_patch_size", "merge_size")
            areas = dict(zip(("min_pixels", "max_pixels"), _pixel_range(values)))
            return cls.from_dict({"patch_size": 14, "window_size": window_size, **areas, **fields})

    @property
    def token_size(self) -> int:
        """Side of a visual token in pixels of the scaled image."""
        return self.patch_size * self.merge_size

    @property
    def tokens_per_window_side(self) -> int:
        """Visual tokens along one side of a full window."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def slots_per_window(self) -> int:
        """Q, patches of a full window."""
        return (self.tokens_per_window_side * self.merge_size) ** 2

    @property
    def patch_values(self) -> int:
        """Numbers of one patch: 3 colours of ``temporal_patch_size`` frames."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def token_grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of visual tokens of an image of this size.

        Raises:
            ImageError: If the image is empty or too thin.
        """
        check_not_empty(width, height)
        if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
            raise ImageError(
                f"image: expected an aspect ratio of at most {MAX_ASPECT_RATIO}, got {width}x{height} pixels; crop it"
            )
        return _token_grid(width, height, self)

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """Return P, the number of patches, W, that of windows, and N."""
        return self._reduced(self._whole_sizes(*self.token_grid(width, height)))

    def any_image_sizes(self) -> tuple[dict[str, int], ...]:
        """Return one size that is enough for every image.

        N is not just ``max_pixels`` in tokens: a small image is enlarged to at least ``min_pixels`` with both sides
        rounded up, and a thin one that is reduced still has one row. Thin grids have the most windows for their
        tokens, so W comes from another image than N does.
        """
        bounds = [self._whole_sizes(rows, columns) for rows, columns in _largest_grids(self)]
        return (self._reduced({axis: max(bound[axis] for bound in bounds) for axis in ("P", "W", "N")}),)

    def _whole_sizes(self, rows: int, columns: int) -> dict[str, int]:
        """Return the sizes of a grid of visual tokens of which the encoder drops none."""
        side, tokens = self.tokens_per_window_side, rows * columns
        windows = math.ceil(rows / side) * math.ceil(columns / side)
        return {"P": tokens * self.merge_size**2, "W": windows, "N": tokens}

    def _reduced(self, sizes: dict[str, int]) -> dict[str, int]:
        """Return the sizes with the encoder's reduction, whose selection needs room for all that it keeps."""
        keep = self.encoder_keep
        if keep is None:
            return sizes
        return {**sizes, "P": max(sizes["P"], keep * self.merge_size**2), "N": min(sizes["N"], keep)}

    def layout(self, width: int, height: int) -> ImageLayout:
        """Return the layout of an image; tokens are in raster order."""
        rows, columns = self.token_grid(width, height)
        x, y = np.linspace(0, width, columns + 1), np.linspace(0, height, rows + 1)
        row, column = np.indices((rows, columns), dtype=np.int32)
        return ImageLayout(
            width=width,
            height=height,
            sizes=self.sizes(width, height),
            boxes=boxes_between(x, y).reshape(-1, 4).astype(np.float32),
            positions=np.stack([np.zeros_like(row), row, column]).reshape(3, -1),
            position_span=max(rows, columns),
        )

    def prepare(self, image: Image.Image, sizes: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
        """Return the vision graph's inputs; arguments and errors are those of ``ImageProcessing.prepare``.

        Padding is harmless and finite: patches from ``num_patches`` on repeat the first one, further windows are
        empty, further tokens repeat the first one.

        Returns:
            ``pixel_values`` float32 [P, ``patch_values``] in window order; ``patch_positions`` int32 [2, P], row and
            column of each; ``window_slots`` int32 [W, Q], a patch or -1; ``patch_slot`` int32 [P], where each patch is
            in the flattened ``window_slots``; ``num_patches`` int32 [1]; ``token_index`` int32 [N], in raster order the
            visual token in window order.
        """
        check_rgb(image)
        rows, columns = self.token_grid(*image.size)
        whole = self._whole_sizes(rows, columns)
        room = room_for(self._reduced(whole), sizes, image=image)
        token_order, window_of_token = _window_order(rows, columns, side=self.tokens_per_window_side)
        slots, patch_slot = _slots(window_of_token, self, num_windows=room["W"])
        positions = _patch_positions(token_order, columns, self)
        return {
            "pixel_values": _padded_rows(_patches(image, self, token_order), room["P"]),
            "patch_positions": _padded_rows(positions, room["P"]).T.copy(),
            "window_slots": slots,
            "patch_slot": _padded_rows(patch_slot, room["P"]),
            "num_patches": np.array([whole["P"]], np.int32),
            "token_index": self._token_index(token_order, room["N"]),
        }

    def _token_index(self, token_order: NDArray[np.int64], count: int) -> NDArray[np.int32]:
        if self.encoder_keep is not None:  # the graph's rows are the kept tokens, in raster order
            return padded_index(np.arange(min(len(token_order), self.encoder_keep)), count)
        return _padded_rows(np.argsort(token_order).astype(np.int32), count)


def _token_grid(width: int, height: int, images: QwenImages) -> tuple[int, int]:
    """Return the rows and columns of visual tokens. Source: smart_resize."""
    size, least, most = images.token_size, images.min_pixels, images.max_pixels
    # Python's round takes halves to even numbers; so does the original.
    rows, columns = round(height / size), round(width / size)
    if rows * columns * size**2 > most:
        shrink = math.sqrt((height * width) / most)
        return max(1, math.floor(height / shrink / size)), max(1, math.floor(width / shrink / size))
    if rows * columns * size**2 < least:
        enlarge = math.sqrt(least / (height * width))
        return math.ceil(height * enlarge / size), math.ceil(width * enlarge / size)
    return rows, columns


def _largest_grids(images: QwenImages) -> list[tuple[int, int]]:
    """Return for each number of rows the largest number of columns that an image can have, rows <= columns.

    With the areas a (``min_pixels``) and b (``max_pixels``) in tokens and the largest aspect ratio ρ:

    1. Sizes that are only rounded: r c <= b, and c - 1/2 <= ρ (r + 1/2).
    2. Reduced images cover at most b before rounding down: r c <= b, and c <= sqrt(ρ b). One row can stand for
       less than one, so there r c <= b says nothing.
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


def _window_order(rows: int, columns: int, *, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the visual tokens in window order, [N] raster indices, and the window of each of these, [N]."""
    windows = (np.arange(rows) // side)[:, None] * math.ceil(columns / side) + np.arange(columns) // side
    order = np.argsort(windows.ravel(), kind="stable")  # stable: raster order inside a window
    return order, windows.ravel()[order]


def _slots(
    window_of_token: NDArray[np.int64], images: QwenImages, *, num_windows: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the patch in each slot of each window, [W, Q], and each patch's slot, [P]; a window's first slots are used."""
    window_of_patch = np.repeat(window_of_token, images.merge_size**2)
    counts = np.bincount(window_of_patch, minlength=num_windows)
    starts = np.cumsum(counts) - counts
    slot = np.arange(images.slots_per_window)
    slots = np.where(slot < counts[:, None], starts[:, None] + slot, -1)
    slot_of_patch = np.arange(len(window_of_patch)) - starts[window_of_patch]
    patch_slot = window_of_patch * images.slots_per_window + slot_of_patch
    return slots.astype(np.int32), patch_slot.astype(np.int32)


def _patch_positions(token_order: NDArray[np.int64], columns: int, images: QwenImages) -> NDArray[np.int32]:
    """Return row and column of each patch in window order, [P, 2]."""
    token = np.stack([token_order // columns, token_order % columns], axis=-1) * images.merge_size
    inside = np.indices((images.merge_size, images.merge_size)).reshape(2, -1).T
    positions: NDArray[np.int32] = (token[:, None] + inside).reshape(-1, 2).astype(np.int32)
    return positions


def _patches(image: Image.Image, images: QwenImages, token_order: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the patches in window order, [P, C * frames * side * side]."""
    merge, side, frames = images.merge_size, images.patch_size, images.temporal_patch_size
    rows, columns = images.token_grid(*image.size)
    size = (rows * images.token_size, columns * images.token_size)
    pixels = normalized(resize(image, size, resample=images.resample), images)
    tokens = pixels.reshape(rows, merge, side, columns, merge, side, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    patches = tokens.reshape(rows * columns, merge**2, 3, 1, side, side)[token_order]
    # The encoder's patches span several frames of a video; an image is the same frame each time.
    return np.repeat(patches, frames, axis=3).reshape(-1, images.patch_values)


def _padded_rows(rows: NDArray[Any], count: int) -> NDArray[Any]:
    """Return ``count`` rows: those given, then the first one again and again."""
    return np.concatenate([rows, np.repeat(rows[:1], count - len(rows), axis=0)])


def _pixel_range(values: Mapping[str, Any]) -> tuple[int, int]:
    """Return the smallest and largest area; older files have ``min_pixels`` and ``max_pixels``, which win over ``size``."""
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
