"""From an image to the vision graph's inputs for Qwen2.5-VL (windows of patches) and Qwen3-VL (a table of positions).

Qwen2.5-VL's graph reads patches in window order: windows in raster order, the tokens of each window in raster order, and
the patches of each token in raster order. ``token_index`` restores the image's raster order. Qwen3-VL's graph reads tokens
in raster order, and for each patch the four nearest entries of the trained table of positions.

Source: Qwen2VLImageProcessor, get_vision_window_index and get_vision_interpolation_indices_and_weights of transformers 5.23.
Letters: P patches, W windows, Q slots (patches of a full window), N visual tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.bundle.errors import ManifestError
from trio_edge.runtime.images.constants import Size  # noqa: TC001 -- msgspec reads it
from trio_edge.runtime.images.layout import check_rgb, padded_index, room_for
from trio_edge.runtime.images.patches import PatchImages, padded_rows, patch_positions, patches

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from PIL import Image

KIND, TABLE_KIND = "patches", "patches_with_table"


@final
class QwenImages(PatchImages, frozen=True, kw_only=True, tag_field="kind", tag=KIND):
    """Image processing of Qwen2.5-VL, whose encoder has attention windows."""

    window_size: Size
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

    def prepare(self, image: Image.Image, sizes: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
        """Return the vision graph's inputs; arguments and errors are those of ``ImageProcessing.prepare``.

        Padding is finite: patches from ``num_patches`` on and further tokens repeat the first one, further windows are empty.

        Returns:
            ``pixel_values`` float32 [P, ``patch_values``] in window order; ``patch_positions`` int32 [2, P], row and
            column of each patch; ``window_slots`` int32 [W, Q], a patch or -1; ``patch_slot`` int32 [P], the place of
            each patch in the flattened ``window_slots``; ``num_patches`` int32 [1]; ``token_index`` int32 [N], the index
            in window order of each visual token in raster order.
        """
        return self.prepare_frames((image,), self.token_grid(*image.size), sizes)

    def prepare_frames(
        self,
        frames: Sequence[Image.Image],
        grid: tuple[int, int],
        sizes: Mapping[str, int] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Return the same of the frames of one temporal patch, scaled to ``grid`` rows and columns of visual tokens."""
        check_rgb(frames[0])
        rows, columns = grid
        whole = self.whole_sizes(rows, columns)
        room = room_for(self._reduced(whole), sizes, image=frames[0])
        token_order, window_of_token = _window_order(rows, columns, side=self.tokens_per_window_side)
        slots, patch_slot = _slots(window_of_token, self, num_windows=room["W"])
        positions = patch_positions(token_order, columns, self)
        return {
            "pixel_values": padded_rows(patches(frames, self, grid=grid, token_order=token_order), room["P"]),
            "patch_positions": padded_rows(positions, room["P"]).T.copy(),
            "window_slots": slots,
            "patch_slot": padded_rows(patch_slot, room["P"]),
            "num_patches": np.array([whole["P"]], np.int32),
            "token_index": self._token_index(token_order, room["N"]),
        }

    def _token_index(self, token_order: NDArray[np.int64], count: int) -> NDArray[np.int32]:
        if self.encoder_keep is not None:  # the graph's rows are the kept tokens, in raster order
            return padded_index(np.arange(min(len(token_order), self.encoder_keep)), count)
        return padded_rows(np.argsort(token_order).astype(np.int32), count)


@final
class Qwen3Images(PatchImages, frozen=True, kw_only=True, tag_field="kind", tag=TABLE_KIND):
    """Image processing of Qwen3-VL, whose encoder interpolates a trained table of positions."""

    table_size: Size
    """Entries along each side of the table."""

    def prepare(self, image: Image.Image, sizes: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
        """Return the vision graph's inputs; arguments and errors are those of ``ImageProcessing.prepare``.

        Padding repeats the first patch and the first token.

        Returns:
            ``pixel_values`` float32 [P, ``patch_values``]; ``patch_positions`` int32 [2, P], row and column of each patch;
            ``table_index`` int32 [4, P] and ``table_weights`` float32 [4, P], the nearest entries of the table and their
            weights; ``num_patches`` int32 [1]; ``token_index`` int32 [N].
        """
        return self.prepare_frames((image,), self.token_grid(*image.size), sizes)

    def prepare_frames(
        self,
        frames: Sequence[Image.Image],
        grid: tuple[int, int],
        sizes: Mapping[str, int] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Return the same of the frames of one temporal patch, scaled to ``grid`` rows and columns of visual tokens."""
        check_rgb(frames[0])
        rows, columns = grid
        whole = self.whole_sizes(rows, columns)
        room = room_for(whole, sizes, image=frames[0])
        order = np.arange(whole["N"])
        positions = padded_rows(patch_positions(order, columns, self), room["P"])
        index, weights = _around(
            positions, (rows * self.merge_size, columns * self.merge_size), self.table_size
        )
        return {
            "pixel_values": padded_rows(patches(frames, self, grid=grid, token_order=order), room["P"]),
            "patch_positions": positions.T.copy(),
            "table_index": index,
            "table_weights": weights,
            "num_patches": np.array([whole["P"]], np.int32),
            "token_index": padded_index(order, room["N"]),
        }


def _around(
    positions: NDArray[np.int32], grid: tuple[int, int], side: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the four nearest entries of a table [side * side] for each patch and their bilinear weights, [4, P] each.

    The image's corners lie on the table's corners. ``positions`` [P, 2] are row and column of each patch, ``grid`` has the
    rows and columns of patches.
    """
    last = np.maximum(np.array(grid) - 1, 1).astype(np.float32)
    place = positions.astype(np.float32) * np.float32(side - 1) / last
    low = np.floor(place).astype(np.int32)
    share = place - low.astype(np.float32)
    index, weights = [], []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = np.minimum(low + np.array([down, right]), side - 1).T
        index.append(row * side + column)
        parts = np.where((down, right), share, 1 - share)
        weights.append(parts[:, 0] * parts[:, 1])
    return np.stack(index).astype(np.int32), np.stack(weights).astype(np.float32)


def _window_order(rows: int, columns: int, *, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the raster indices of the visual tokens in window order, [N], and the window of each, [N]."""
    windows = (np.arange(rows) // side)[:, None] * math.ceil(columns / side) + np.arange(columns) // side
    order = np.argsort(windows.ravel(), kind="stable")  # stable: raster order inside a window
    return order, windows.ravel()[order]


def _slots(
    window_of_token: NDArray[np.int64], images: QwenImages, *, num_windows: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the patch in each slot of each window, [W, Q], or -1, and each patch's slot, [P]."""
    window_of_patch = np.repeat(window_of_token, images.merge_size**2)
    counts = np.bincount(window_of_patch, minlength=num_windows)
    starts = np.cumsum(counts) - counts
    slot = np.arange(images.slots_per_window)
    slots = np.where(slot < counts[:, None], starts[:, None] + slot, -1)
    slot_of_patch = np.arange(len(window_of_patch)) - starts[window_of_patch]
    patch_slot = window_of_patch * images.slots_per_window + slot_of_patch
    return slots.astype(np.int32), patch_slot.astype(np.int32)
