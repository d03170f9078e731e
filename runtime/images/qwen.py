"""From a picture to the windowed vision graph's inputs: patches at the picture's own aspect ratio (Qwen2.5-VL).

What a reader needs, in order:

1. ``PatchProcessing``: a bundle's constants.
2. ``prepare``: picture → the graph's inputs by name, padded to the sizes that the graph was built for.
3. ``grid``, ``token_grid``, ``num_visual_tokens``, ``sizes``: the same counts without pixels.
4. ``max_visual_tokens``, ``max_sizes``: their bounds over all pictures.
5. ``token_boxes``: where in the picture each visual token looks.

A picture becomes a grid of patches, and ``merge_size``² neighbouring patches one visual token. The graph wants the
patches of one attention window side by side ("window order"): windows in raster order, in them tokens in raster order,
in them patches in raster order. ``token_index`` brings the tokens back into the picture's raster order.

Source: Qwen2VLImageProcessor, get_vision_position_ids and get_vision_window_index of transformers 5.23.
Letters: P patches, W windows, Q slots (patches of a full window), N visual tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.images.constants import (
    CLIP_MEAN,
    CLIP_STD,
    boxes_between,
    check_not_empty,
    check_pixel_constants,
    check_resample,
    check_rgb,
    check_room,
    check_whole_numbers,
    constants_from_dict,
    dict_from_constants,
    normalized,
    only_checkpoint_errors,
    pixel_fields,
    processor_values,
)
from trio_edge.runtime.images.resizing import Resample, resize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from PIL import Image

KIND = "patches"
MAX_ASPECT_RATIO = 200
"""Hugging Face's processor refuses pictures that are thinner."""
_SLACK = 1 + 1e-9  # of bounds that are compared with what Hugging Face calculates in float64
_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchProcessing:
    """The image processing constants of a bundle. Sizes are in pixels of the resized picture."""

    patch_size: int
    """Side of a patch."""
    window_size: int
    """Side of an attention window; a part of it that holds no whole visual token is not used."""
    temporal_patch_size: int = 2
    """Frames of a patch; a picture is repeated."""
    merge_size: int = 2
    """A visual token is made of ``merge_size``² patches."""
    min_pixels: int = 56 * 56
    """Smaller pictures are enlarged."""
    max_pixels: int = 28 * 28 * 1280
    """Larger pictures are reduced."""
    resample: Resample = "bicubic"
    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        check_whole_numbers(self, "patch_size", "window_size", "temporal_patch_size", "merge_size")
        check_whole_numbers(self, "min_pixels", "max_pixels")
        if self.window_size < self.token_size:
            raise ManifestError(
                f"image_processing window_size: expected >= {self.token_size} (patch_size * merge_size),"
                f" got {self.window_size}"
            )
        if self.min_pixels > self.max_pixels:
            raise ManifestError(
                f"image_processing min_pixels: expected <= max_pixels {self.max_pixels}, got {self.min_pixels}"
            )
        check_resample(self)
        check_pixel_constants(self)

    @property
    def token_size(self) -> int:
        """Side of a visual token in pixels of the resized picture."""
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

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of patches of a picture of this size.

        Raises:
            ImageError: If the picture is empty or too thin.
        """
        rows, columns = self.token_grid(width, height)
        return rows * self.merge_size, columns * self.merge_size

    def token_grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of visual tokens of a picture of this size.

        Raises:
            ImageError: If the picture is empty or too thin.
        """
        _check_picture_size(width, height)
        return _token_grid(width, height, self)

    def num_visual_tokens(self, width: int, height: int) -> int:
        """Return N for a picture of this size."""
        rows, columns = self.token_grid(width, height)
        return rows * columns

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """Return the sizes of the graph's axes P, W and N that fit a picture of this size exactly."""
        return self._sizes(*self.token_grid(width, height))

    def max_visual_tokens(self) -> int:
        """Return an upper bound of N over all pictures; see ``max_sizes``."""
        return self.max_sizes()["N"]

    def max_sizes(self) -> dict[str, int]:
        """Return sizes that are enough for every picture.

        N is not just ``max_pixels`` in tokens: a small picture is enlarged to at least ``min_pixels`` with both sides
        rounded up, and a thin one that is reduced still has one row. Thin grids have the most windows for their
        tokens, so W comes from another picture than N does.
        """
        bounds = [self._sizes(row, column) for row, column in _largest_grids(self)]
        return {axis: max(bound[axis] for bound in bounds) for axis in ("P", "W", "N")}

    def _sizes(self, rows: int, columns: int) -> dict[str, int]:
        side, tokens = self.tokens_per_window_side, rows * columns
        windows = math.ceil(rows / side) * math.ceil(columns / side)
        return {"P": tokens * self.merge_size**2, "W": windows, "N": tokens}

    def prepare(
        self, picture: Image.Image, sizes: Mapping[str, int] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Return the vision graph's inputs for one RGB picture.

        Padding is harmless and finite: patches from ``num_patches`` on repeat the first one, further windows are
        empty, further tokens repeat the first one.

        Args:
            picture: An RGB picture, as ``open_picture`` returns it.
            sizes: P, W and N of the graph; the picture's own for those that are missing.

        Returns:
            ``pixel_values`` float32 [P, ``patch_values``] in window order; ``patch_positions`` int32 [2, P], row and
            column of each; ``window_slots`` int32 [W, Q], a patch or -1; ``patch_slot`` int32 [P], where each patch is
            in the flattened ``window_slots``; ``num_patches`` int32 [1]; ``token_index`` int32 [N], in raster order the
            visual token in window order.

        Raises:
            ImageError: If the picture is not RGB, is empty or too thin, or needs more than ``sizes``.
        """
        check_rgb(picture)
        rows, columns = self.token_grid(*picture.size)
        own = self._sizes(rows, columns)
        padded = {axis: (sizes or own).get(axis, size) for axis, size in own.items()}
        check_room(own, padded, width=picture.width, height=picture.height)
        token_order, window_of_token = _window_order(rows, columns, side=self.tokens_per_window_side)
        slots, patch_slot = _slots(window_of_token, self, num_windows=padded["W"])
        return {
            "pixel_values": _padded_rows(_patches(picture, self, token_order), padded["P"]),
            "patch_positions": _padded_rows(
                _patch_positions(token_order, columns, self), padded["P"]
            ).T.copy(),
            "window_slots": slots,
            "patch_slot": _padded_rows(patch_slot, padded["P"]),
            "num_patches": np.array([own["P"]], np.int32),
            "token_index": _padded_rows(np.argsort(token_order).astype(np.int32), padded["N"]),
        }

    def token_boxes(self, width: int, height: int) -> NDArray[np.float32]:
        """Return the part of a picture of this size that each visual token covers.

        Returns:
            float32 [N, 4], (x0, y0, x1, y1) in the picture's pixels, in raster order.
        """
        rows, columns = self.token_grid(width, height)
        x, y = np.linspace(0, width, columns + 1), np.linspace(0, height, rows + 1)
        boxes: NDArray[np.float32] = boxes_between(x, y).reshape(-1, 4).astype(np.float32)
        return boxes

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, and "kind": "patches"."""
        return dict_from_constants(self, kind=KIND)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PatchProcessing:
        """Return the constants that ``to_dict`` wrote.

        Raises:
            ManifestError: If a key is unknown or missing, or a value breaks a rule.
        """
        return constants_from_dict(cls, values, kind=KIND)

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any], *, window_size: int) -> PatchProcessing:
        """Return the constants of a ``preprocessor_config.json``, or of ``image_processor.to_dict()``.

        Args:
            config: Its content. Missing keys mean the defaults of Hugging Face's class.
            window_size: The vision encoder's; the file does not hold it.

        Raises:
            CheckpointError: If the processor is of another kind, or its values cannot be followed.
        """
        return _from_preprocessor_config(config, window_size=window_size)


# Counts


def _token_grid(width: int, height: int, processing: PatchProcessing) -> tuple[int, int]:
    """Return the rows and columns of visual tokens. Source: smart_resize."""
    size, least, most = processing.token_size, processing.min_pixels, processing.max_pixels
    rows, columns = round(height / size), round(width / size)
    if rows * columns * size**2 > most:
        shrink = math.sqrt((height * width) / most)
        return max(1, math.floor(height / shrink / size)), max(1, math.floor(width / shrink / size))
    if rows * columns * size**2 < least:
        enlarge = math.sqrt(least / (height * width))
        return math.ceil(height * enlarge / size), math.ceil(width * enlarge / size)
    return rows, columns


def _largest_grids(processing: PatchProcessing) -> list[tuple[int, int]]:
    """Return for each number of rows the largest number of columns that a picture can have, rows <= columns.

    With the areas a (``min_pixels``) and b (``max_pixels``) in tokens and the largest aspect ratio ρ:

    1. Sizes that are only rounded: r c <= b, and c - 1/2 <= ρ (r + 1/2).
    2. Reduced pictures cover at most b before rounding down: r c <= b, and c <= sqrt(ρ b). One row can stand for
       less than one, so there r c <= b says nothing.
    3. Enlarged pictures cover a before rounding up: (r - 1)(c - 1) <= a, and c - 1 <= sqrt(ρ a).

    Transposed grids have the same counts.
    """
    area = processing.token_size**2
    least, most = processing.min_pixels / area * _SLACK, processing.max_pixels / area * _SLACK
    grids = []
    for rows in range(1, math.isqrt(int(max(least, most))) + 3):
        rounded = min(most / rows, MAX_ASPECT_RATIO * (rows + 0.5) + 0.5)
        reduced = min(most / rows if rows > 1 else math.inf, math.sqrt(MAX_ASPECT_RATIO * most))
        enlarged = 1 + min(least / (rows - 1) if rows > 1 else math.inf, math.sqrt(MAX_ASPECT_RATIO * least))
        grids.append((rows, max(1, int(max(rounded, reduced, enlarged)))))
    return [(rows, columns) for rows, columns in grids if rows <= columns]


# Order


def _window_order(rows: int, columns: int, *, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the visual tokens in window order, [N] raster indices, and the window of each of these, [N]."""
    windows = (np.arange(rows) // side)[:, None] * math.ceil(columns / side) + np.arange(columns) // side
    order = np.argsort(windows.ravel(), kind="stable")
    return order, windows.ravel()[order]


def _slots(
    window_of_token: NDArray[np.int64], processing: PatchProcessing, *, num_windows: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the patch in each slot of each window, [W, Q], and each patch's slot, [P]; a window's first slots are used."""
    window_of_patch = np.repeat(window_of_token, processing.merge_size**2)
    counts = np.bincount(window_of_patch, minlength=num_windows)
    starts = np.cumsum(counts) - counts
    slot = np.arange(processing.slots_per_window)
    slots = np.where(slot < counts[:, None], starts[:, None] + slot, -1)
    slot_of_patch = np.arange(len(window_of_patch)) - starts[window_of_patch]
    patch_slot = window_of_patch * processing.slots_per_window + slot_of_patch
    return slots.astype(np.int32), patch_slot.astype(np.int32)


def _patch_positions(
    token_order: NDArray[np.int64], columns: int, processing: PatchProcessing
) -> NDArray[np.int32]:
    """Return row and column of each patch in window order, [P, 2]."""
    token = np.stack([token_order // columns, token_order % columns], axis=-1) * processing.merge_size
    inside = np.indices((processing.merge_size, processing.merge_size)).reshape(2, -1).T
    positions: NDArray[np.int32] = (token[:, None] + inside).reshape(-1, 2).astype(np.int32)
    return positions


# Pixels


def _patches(
    picture: Image.Image, processing: PatchProcessing, token_order: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the patches in window order, [P, C * frames * side * side]."""
    merge, side, frames = processing.merge_size, processing.patch_size, processing.temporal_patch_size
    rows, columns = processing.token_grid(*picture.size)
    size = (rows * processing.token_size, columns * processing.token_size)
    pixels = normalized(resize(picture, size, resample=processing.resample), processing)
    tokens = pixels.reshape(rows, merge, side, columns, merge, side, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    patches = tokens.reshape(rows * columns, merge**2, 3, 1, side, side)[token_order]
    return np.repeat(patches, frames, axis=3).reshape(-1, processing.patch_values)


def _padded_rows(rows: NDArray[Any], count: int) -> NDArray[Any]:
    """Return ``count`` rows: those given, then the first one again and again."""
    return np.concatenate([rows, np.repeat(rows[:1], count - len(rows), axis=0)])


# Checks


def _check_picture_size(width: int, height: int) -> None:
    check_not_empty(width, height)
    if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise ImageError(
            f"picture: expected an aspect ratio of at most {MAX_ASPECT_RATIO}, got {width}x{height} pixels; crop it"
        )


def _from_preprocessor_config(config: Mapping[str, Any], *, window_size: int) -> PatchProcessing:
    _, values = processor_values(config, processors=_PROCESSORS, always=("do_convert_rgb", "do_resize"))
    with only_checkpoint_errors():
        min_pixels, max_pixels = _pixel_range(values)
        fields = pixel_fields(values, "patch_size", "temporal_patch_size", "merge_size")
        return PatchProcessing(
            window_size=window_size,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            **{"patch_size": 14, **fields},
        )


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


@final
class PatchPictures:
    """Patches of a picture scaled to whole patches, in the order of the vision encoder's windows."""

    def __init__(self, processing: PatchProcessing, *, encoder_keep: int | None) -> None:
        self.processing = processing
        self.encoder_keep = encoder_keep

    def to_dict(self) -> dict[str, Any]:
        """See ``PictureProcessing.to_dict``."""
        return self.processing.to_dict()

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """See ``PictureProcessing.sizes``; P is the number of patches, W that of windows."""
        return self._reduced(self.processing.sizes(width, height))

    def any_picture_sizes(self) -> tuple[dict[str, int], ...]:
        """See ``PictureProcessing.any_picture_sizes``: one size, that of the largest pictures."""
        return (self._reduced(self.processing.max_sizes()),)

    def prepare(self, picture: Image.Image, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """See ``PictureProcessing.prepare``."""
        if self.encoder_keep is None:
            return self.processing.prepare(picture, sizes)
        inputs = self.processing.prepare(picture, {name: sizes[name] for name in ("P", "W")})
        index = np.zeros(sizes["N"], np.int32)  # the graph's rows are the kept tokens
        num_kept = self.sizes(*picture.size)["N"]
        index[:num_kept] = np.arange(num_kept)
        return {**inputs, "token_index": index}

    def boxes(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.float32]:
        """See ``PictureProcessing.boxes``."""
        boxes = self.processing.token_boxes(width, height)
        return boxes if kept is None else boxes[self._real(kept, width, height)]

    def overview_tokens(self, width: int, height: int) -> range:
        """See ``PictureProcessing.overview_tokens``: none."""
        return range(0)

    def positions(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.int32]:
        """See ``PictureProcessing.positions``."""
        rows, columns = np.indices(self.processing.token_grid(width, height), dtype=np.int32)
        positions = np.stack([np.zeros_like(rows), rows, columns]).reshape(3, -1)
        return positions if kept is None else positions[:, self._real(kept, width, height)]

    def position_span(self, width: int, height: int) -> int:
        """See ``PictureProcessing.position_span``."""
        return max(self.processing.token_grid(width, height))

    def _real(self, kept: NDArray[np.int32], width: int, height: int) -> NDArray[np.int32]:
        return kept[: self.sizes(width, height)["N"]]

    def _reduced(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the sizes with the encoder's reduction, whose selection needs room for all that it keeps."""
        keep = self.encoder_keep
        if keep is None:
            return dict(sizes)
        return {
            **sizes,
            "P": max(sizes["P"], keep * self.processing.merge_size**2),
            "N": min(sizes["N"], keep),
        }
