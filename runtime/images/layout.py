"""The layout of one image: the number of its visual tokens, the box of each, and the sizes of the vision graph's axes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.bundle.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from PIL import Image

_AXES = {"B": "tiles", "N": "visual tokens", "P": "patches", "W": "attention windows"}


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageLayout:
    """Facts that follow from an image's size, computed once for each image."""

    width: int
    """In pixels."""
    height: int
    sizes: Mapping[str, int]
    """Sizes of the vision graph's axes: N, the image's visual tokens, and B, or P and W."""
    boxes: NDArray[np.float32]
    """[N, 4], (x0, y0, x1, y1) in image pixels; NaN for tokens that show nothing of the image, such as newlines. If the
    vision graph drops tokens, these are the boxes of all its candidates; ``kept`` gives those of the kept tokens."""
    positions: NDArray[np.int32] | None = None
    """[3, N]: time, row and column of each token for M-RoPE, from 0; None for plain positions."""
    position_span: int = 0
    """Positions that the image takes with M-RoPE: the larger of its rows and columns."""
    overview: Sequence[int] = range(0)
    """Visual tokens of a tile that shows the whole image next to finer tiles: indices into ``boxes``, for drawing."""
    patches_per_tile: int = 0
    """Patches of a tile, if the vision graph drops some of each tile."""
    text: tuple[str, ...] = ("", "")
    """Text of the prompt before each run of visual tokens, and after the last run."""
    runs: tuple[int, ...] = ()
    """Visual tokens of each run; empty if there is only one run."""

    @property
    def run_lengths(self) -> tuple[int, ...]:
        """Visual tokens of each run; at least one run."""
        return self.runs or (len(self.boxes),)

    @property
    def num_visual(self) -> int:
        """N, visual tokens that the vision graph returns."""
        return self.sizes["N"]

    def kept(self, kept: NDArray[np.int32]) -> ImageLayout:
        """Return the layout of the tokens that the vision graph kept.

        ``kept`` is the graph's second output with padding: visual tokens [K] of the image, or patches [B, K] of each tile.
        """
        if kept.ndim == 2:  # indices start again in each tile
            kept = (np.arange(len(kept))[:, None] * self.patches_per_tile + kept).ravel()
        return self.taken(kept[: self.num_visual])

    def taken(self, indices: NDArray[Any]) -> ImageLayout:
        """Return the layout of only the tokens at ``indices``."""
        positions = None if self.positions is None else self.positions[:, indices]
        ends = np.cumsum(self.run_lengths)
        runs = np.bincount(np.searchsorted(ends, indices, side="right"), minlength=len(ends))
        overview = np.flatnonzero(np.isin(indices, self.overview))
        return replace(
            self,
            boxes=self.boxes[indices],
            positions=positions,
            overview=tuple(overview.tolist()),
            runs=tuple(runs.tolist()),
        )


def check_rgb(image: Image.Image) -> None:
    """Raise ImageError unless ``image`` is RGB."""
    if image.mode != "RGB":
        raise ImageError(f"image: expected mode 'RGB', got {image.mode!r}; read it with open_image")


def check_not_empty(width: int, height: int) -> None:
    """Raise ImageError unless an image of this size has pixels."""
    if width < 1 or height < 1:
        raise ImageError(f"image: expected at least 1x1 pixels, got {width}x{height}")


def room_for(
    own: Mapping[str, int], sizes: Mapping[str, int] | None, *, image: Image.Image
) -> dict[str, int]:
    """Return the sizes that the inputs are padded to: the graph's ``sizes``, or the image's ``own`` for missing axes.

    Raises:
        ImageError: If the image is larger than the graph on an axis (B, N, P or W).
    """
    room = {axis: (sizes or own).get(axis, size) for axis, size in own.items()}
    for axis, needed in own.items():
        if needed > room[axis]:
            raise ImageError(
                f"image: expected at most {room[axis]} {_AXES[axis]} (the exported shapes), got {needed} for"
                f" {image.width}x{image.height} pixels; resize it or export with a larger --image-size"
            )
    return room


def padded_index(used: NDArray[Any], size: int) -> NDArray[np.int32]:
    """Return ``used`` as int32, padded to ``size`` rows with 0, the index of a row that every graph has."""
    index = np.zeros((size, *used.shape[1:]), np.int32)
    index[: len(used)] = used
    return index


def few_counts(counts: Sequence[int]) -> list[int]:
    """Return a few of ``counts``, all possible numbers of tiles, ascending, including the smallest and the largest.

    Each is about half of the next. So an engine has few profiles, and no image pays for much more than twice its tiles.
    """
    wanted, limit = {counts[0], counts[-1]}, counts[-1]
    while limit > counts[0]:
        limit = (limit + 1) // 2
        wanted.add(max((count for count in counts if count <= limit), default=counts[0]))
    return sorted(wanted)


def boxes_between(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Return the boxes [rows, columns, 4], (x0, y0, x1, y1), between the edges ``x`` [columns + 1] and ``y`` [rows + 1]."""
    left, top = np.meshgrid(x[:-1], y[:-1])
    right, bottom = np.meshgrid(x[1:], y[1:])
    return np.stack([left, top, right, bottom], axis=-1)
