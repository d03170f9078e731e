"""From an image to patches at its own aspect ratio, for Qwen2.5-VL (windows of patches) and Qwen3-VL (a table of positions).

An image is scaled to a grid of patches; ``merge_size``² neighbouring patches are one visual token. Qwen2.5-VL's graph reads
patches in window order: windows in raster order, the tokens of each window in raster order, and the patches of each token in
raster order. ``token_index`` restores the image's raster order. Qwen3-VL's graph reads tokens in raster order, and for each
patch the four nearest entries of the trained table of positions.

Source: Qwen2VLImageProcessor, get_vision_position_ids, get_vision_window_index and
get_vision_interpolation_indices_and_weights of transformers 5.23.
Letters: P patches, W windows, Q slots (patches of a full window), N visual tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, final

import msgspec
import numpy as np

from trio_edge.runtime.bundle import graph_io as io
from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.images import processing
from trio_edge.runtime.images.resizing import resize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from PIL import Image

MAX_ASPECT_RATIO = 200
"""Hugging Face's processor refuses thinner images."""
_SLACK = 1 + 1e-9  # the bounds must hold for Hugging Face's results in float64
_Images = TypeVar("_Images", bound="PatchImages")


class Patches(NamedTuple):
    """The patches of an image as the vision graph reads them."""

    grid: tuple[int, int]
    """Rows and columns of visual tokens."""
    order: NDArray[np.int64]
    """[N], their raster indices."""
    positions: NDArray[np.int32]
    """[P, 2], row and column of each patch, padded."""


class GridImages(processing.ImageConstants, frozen=True, kw_only=True):
    """Image processing with an image scaled to a grid of whole patches. Sizes are in pixels of the scaled image."""

    patch_size: processing.Size
    """Side of a patch."""
    temporal_patch_size: processing.Size = 2
    """Frames per patch; an image is repeated."""
    merge_size: processing.Size = 2
    """``merge_size``² patches are one visual token."""

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
        raise NotImplementedError  # abstract, but no ABC: msgspec's Struct has a metaclass of its own

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """Return P, the number of patches, N, and the family's own axes."""
        return self._reduced(self.whole_sizes(*self.token_grid(width, height)))

    def whole_sizes(self, rows: int, columns: int) -> dict[str, int]:
        """Return the sizes for a grid of visual tokens, without the encoder's reduction."""
        return {"P": rows * columns * self.merge_size**2, "N": rows * columns}

    def _reduced(self, sizes: dict[str, int]) -> dict[str, int]:
        """Return the sizes with the encoder's reduction, which needs at least as many patches as it keeps."""
        keep = self.encoder_keep
        if keep is None:
            return sizes
        return {**sizes, "P": max(sizes["P"], keep * self.merge_size**2), "N": min(sizes["N"], keep)}

    def token_order(self, rows: int, columns: int) -> NDArray[np.int64]:
        """Return the raster index of each visual token in the order in which the vision graph reads them, [N]."""
        return np.arange(rows * columns)

    def family_inputs(self, patches: Patches, room: dict[str, int]) -> dict[str, NDArray[Any]]:
        """Return ``token_index`` and the inputs that only this family's vision graph has; ``room`` are the sizes to pad to."""
        raise NotImplementedError  # as above

    def grid_layout(self, width: int, height: int, grid: tuple[int, int]) -> processing.ImageLayout:
        """Return the layout of an image, or a pair of frames, with ``grid`` rows and columns of visual tokens."""
        rows, columns = grid
        x, y = np.linspace(0, width, columns + 1), np.linspace(0, height, rows + 1)
        row, column = np.indices((rows, columns), dtype=np.int32)
        return processing.ImageLayout(
            width=width,
            height=height,
            sizes=self._reduced(self.whole_sizes(rows, columns)),
            make_boxes=lambda: processing.boxes_between(x, y).reshape(-1, 4).astype(np.float32),
            run_lengths=(rows * columns,),
            positions=np.stack([np.zeros_like(row), row, column]).reshape(3, -1),
            position_span=max(rows, columns),
        )

    def prepare(self, image: Image.Image, sizes: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
        """Return the vision graph's inputs; arguments and errors are those of ``ImageProcessing.prepare``.

        Padding is finite: patches from ``num_patches`` on and further tokens repeat the first one, further windows are empty.

        Returns:
            ``pixel_values`` float32 [P, ``patch_values``]; ``patch_positions`` int32 [2, P], row and column of each patch;
            ``num_patches`` int32 [1]; ``token_index`` int32 [N], the index in the graph's order of each visual token in raster
            order; and the family's own inputs, see ``family_inputs``.
        """
        return self.prepare_frames((image,), self.token_grid(*image.size), sizes)

    def prepare_frames(
        self, frames: Sequence[Image.Image], grid: tuple[int, int], sizes: Mapping[str, int] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Return the same of the frames of one temporal patch, scaled to ``grid`` rows and columns of visual tokens."""
        whole, order = self.whole_sizes(*grid), self.token_order(*grid)
        room = processing.room_for(self._reduced(whole), sizes, image=frames[0])
        positions = padded_rows(patch_positions(order, grid[1], self), room["P"])
        return {
            io.PIXEL_VALUES: padded_rows(patches(frames, self, grid=grid, token_order=order), room["P"]),
            io.PATCH_POSITIONS: positions.T.copy(),
            io.NUM_PATCHES: np.array([whole["P"]], np.int32),
            **self.family_inputs(Patches(grid, order, positions), room),
        }


class PatchImages(GridImages, frozen=True, kw_only=True):
    """Image processing of the Qwen-VL models: an image keeps its area within bounds."""

    min_pixels: processing.Size = 56 * 56
    """Smaller images are enlarged."""
    max_pixels: processing.Size = 28 * 28 * 1280
    """Larger images are reduced."""

    def __post_init__(self) -> None:
        least, most = self.min_pixels, self.max_pixels
        if least > most:
            raise ManifestError(f"min_pixels: expected <= max_pixels {most}, got {least}")

    @classmethod
    def from_preprocessor_config(cls: type[_Images], config: Mapping[str, Any], **tower: int) -> _Images:
        """Return the constants of a ``preprocessor_config.json``; missing keys have the defaults of Hugging Face's class.

        ``tower`` are fields that only the vision encoder's configuration has.

        Raises:
            CheckpointError: If the processor is of another class, or a value is not supported.
        """
        _, values = processing.processor_values(config, "Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")
        with processing.only_checkpoint_errors():
            fields = processing.pixel_fields(values, "patch_size", "temporal_patch_size", "merge_size")
            return cls.from_dict({"patch_size": 14, **tower, **areas(values), **fields})

    def at_low(self: _Images) -> _Images:
        """Return the processing that reduces images to at most a quarter of the most pixels."""
        return self.within(self.max_pixels // 4, 1) or self

    def within(self: _Images, width: int, height: int) -> _Images | None:
        """Return the processing that reduces images to at most as many pixels."""
        most = min(self.max_pixels, width * height)
        return msgspec.structs.replace(self, max_pixels=most, min_pixels=min(self.min_pixels, most))

    def token_grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of visual tokens of an image of this size.

        Raises:
            ImageError: If the image is empty or too thin.
        """
        processing.check_not_empty(width, height)
        check_aspect_ratio(width, height)
        return scaled_grid(width, height, size=self.token_size, least=self.min_pixels, most=self.max_pixels)

    def any_image_sizes(self) -> tuple[dict[str, int], ...]:
        """Return one size that is enough for every image.

        N can exceed ``max_pixels`` in tokens: a small image is enlarged to at least ``min_pixels`` with both sides rounded
        up, and a thin image that is reduced keeps at least one row. Other axes can be largest for another image.
        """
        bounds = [self.whole_sizes(rows, columns) for rows, columns in _largest_grids(self)]
        return (self._reduced({axis: max(bound[axis] for bound in bounds) for axis in bounds[0]}),)

    def layout(self, width: int, height: int) -> processing.ImageLayout:
        """Return the layout of an image; tokens are in raster order."""
        return self.grid_layout(width, height, self.token_grid(width, height))


@final
class QwenImages(PatchImages, frozen=True, kw_only=True, tag_field="kind", tag="patches"):
    """Image processing of Qwen2.5-VL, whose encoder has attention windows."""

    window_size: processing.Size
    """Side of an attention window, rounded down to whole visual tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_size < self.token_size:
            raise ManifestError(
                f"window_size: expected >= {self.token_size} (patch_size * merge_size), got {self.window_size}"
            )

    @property
    def tokens_per_window_side(self) -> int:
        """Visual tokens along one side of a full window."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def slots_per_window(self) -> int:
        """Q, patches of a full window."""
        return (self.tokens_per_window_side * self.merge_size) ** 2

    def whole_sizes(self, rows: int, columns: int) -> dict[str, int]:
        """Return the sizes for a grid of visual tokens, including W windows, of which thin grids have the most."""
        side = self.tokens_per_window_side
        return {**super().whole_sizes(rows, columns), "W": math.ceil(rows / side) * math.ceil(columns / side)}

    def token_order(self, rows: int, columns: int) -> NDArray[np.int64]:
        """Return the raster indices of the visual tokens in window order, [N]."""
        return np.argsort(self._windows(rows, columns), kind="stable")  # stable: raster order inside a window

    def _windows(self, rows: int, columns: int) -> NDArray[np.int64]:
        """Return the window of each visual token in raster order, [N]."""
        side = self.tokens_per_window_side
        windows = (np.arange(rows) // side)[:, None] * math.ceil(columns / side) + np.arange(columns) // side
        return windows.ravel()

    def family_inputs(self, patches: Patches, room: dict[str, int]) -> dict[str, NDArray[Any]]:
        """Return the windows of the patches; arguments are those of ``PatchImages.family_inputs``.

        Returns:
            ``window_slots`` int32 [W, Q], a patch or -1; ``patch_slot`` int32 [P], the place of each patch in the flattened
            ``window_slots``; ``token_index``.
        """
        order = patches.order
        window_of_patch = np.repeat(self._windows(*patches.grid)[order], self.merge_size**2)
        counts = np.bincount(window_of_patch, minlength=room["W"])
        starts = np.cumsum(counts) - counts
        slot = np.arange(self.slots_per_window)
        slots = np.where(slot < counts[:, None], starts[:, None] + slot, -1)
        slot_of_patch = np.arange(len(window_of_patch)) - starts[window_of_patch]
        patch_slot = window_of_patch * self.slots_per_window + slot_of_patch
        if self.encoder_keep is None:
            token_index = padded_rows(np.argsort(order).astype(np.int32), room["N"])
        else:  # the graph's rows are the kept tokens, in raster order
            token_index = processing.padded_index(np.arange(min(len(order), self.encoder_keep)), room["N"])
        return {
            io.WINDOW_SLOTS: slots.astype(np.int32),
            io.PATCH_SLOT: padded_rows(patch_slot.astype(np.int32), room["P"]),
            io.TOKEN_INDEX: token_index,
        }


@final
class Qwen3Images(PatchImages, frozen=True, kw_only=True, tag_field="kind", tag="patches_with_table"):
    """Image processing of Qwen3-VL, whose encoder interpolates a trained table of positions."""

    table_size: processing.Size
    """Entries along each side of the table."""

    def family_inputs(self, patches: Patches, room: dict[str, int]) -> dict[str, NDArray[Any]]:
        """Return the entries of the table around each patch; arguments are those of ``PatchImages.family_inputs``.

        The image's corners lie on the table's corners.

        Returns:
            ``table_index`` int32 [4, P] and ``table_weights`` float32 [4, P], the nearest entries of the table [side * side]
            and their bilinear weights; ``token_index``.
        """
        last = np.maximum(np.array(patches.grid) * self.merge_size - 1, 1).astype(np.float32)
        side = self.table_size
        place = patches.positions.astype(np.float32) * np.float32(side - 1) / last
        low = np.floor(place).astype(np.int32)
        share = place - low.astype(np.float32)
        index, weights = [], []
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            row, column = np.minimum(low + np.array([down, right]), side - 1).T
            index.append(row * side + column)
            parts = np.where((down, right), share, 1 - share)
            weights.append(parts[:, 0] * parts[:, 1])
        return {
            io.TABLE_INDEX: np.stack(index).astype(np.int32),
            io.TABLE_WEIGHTS: np.stack(weights).astype(np.float32),
            io.TOKEN_INDEX: processing.padded_index(patches.order, room["N"]),
        }


def scaled_grid(
    width: int, height: int, *, size: int, least: int, most: int, num_frames: int = 1
) -> tuple[int, int]:
    """Return the rows and columns of visual tokens of an image, or of each frame, of ``width`` x ``height`` pixels.

    The scaled image, or all scaled frames together, have ``least`` to ``most`` pixels; ``size`` is the side of a visual token
    in their pixels. Source: smart_resize, and Qwen3-VL's for videos.
    """
    # Like the original, Python's round takes halves to even numbers.
    rows, columns = round(height / size), round(width / size)
    pixels = max(1, round(num_frames / 2) * 2) * rows * columns * size**2
    if pixels > most:
        shrink = math.sqrt((num_frames * height * width) / most)
        return max(1, math.floor(height / shrink / size)), max(1, math.floor(width / shrink / size))
    if pixels < least:
        enlarge = math.sqrt(least / (num_frames * height * width))
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


def patch_positions(token_order: NDArray[np.int64], columns: int, images: GridImages) -> NDArray[np.int32]:
    """Return the row and column of each patch, [P, 2], for visual tokens in the order ``token_order`` [N]."""
    token = np.stack([token_order // columns, token_order % columns], axis=-1) * images.merge_size
    inside = np.indices((images.merge_size, images.merge_size)).reshape(2, -1).T
    positions: NDArray[np.int32] = (token[:, None] + inside).reshape(-1, 2).astype(np.int32)
    return positions


def patches(
    frames: Sequence[Image.Image],
    images: GridImages,
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
    pixels = processing.normalized(levels, images).reshape(-1, rows, merge, side, columns, merge, side, 3)
    tokens = pixels.transpose(1, 4, 2, 5, 7, 0, 3, 6)
    patches = tokens.reshape(rows * columns, merge**2, 3, len(frames), side, side)[token_order]
    frame_of_patch = np.minimum(np.arange(images.temporal_patch_size), len(frames) - 1)
    return np.take(patches, frame_of_patch, axis=3).reshape(-1, images.patch_values)


def padded_rows(rows: NDArray[Any], count: int) -> NDArray[Any]:
    """Return ``rows``, padded to ``count`` with copies of the first row."""
    return np.concatenate([rows, np.repeat(rows[:1], count - len(rows), axis=0)])


def areas(
    values: Mapping[str, Any], *, file: str = "preprocessor_config", old_keys: bool = True
) -> dict[str, int]:
    """Return the smallest and largest area of a preprocessor file, if it has them.

    With ``old_keys``, ``min_pixels`` and ``max_pixels`` of older files precede ``size``.

    Raises:
        CheckpointError: If an area is missing or no whole number.
    """
    size = {key: value for key, value in dict(values.get("size", {})).items() if value is not None}
    found: dict[str, Any] = {}
    for name, key in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        area = size.get(key, size.get(name) if old_keys else None)
        found[name] = values.get(name, area) if old_keys else area
    if "size" not in values:
        found = {name: area for name, area in found.items() if area is not None}
    if not all(type(area) is int for area in found.values()):
        raise CheckpointError(
            f"{file} size: expected areas 'shortest_edge' and 'longest_edge' in pixels, got {size or found}"
        )
    return found
