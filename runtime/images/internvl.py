"""From a picture to tiles of a grid and a thumbnail of the whole (InternVL): counts, pixels and boxes.

What a reader needs, in order:

1. ``GridTileProcessing``: a bundle's constants.
2. ``prepare``: picture → the vision graph's inputs by name, padded to the sizes that the graph was built for.
3. ``grid``, ``sizes``, ``any_picture_sizes``: the same counts without pixels.
4. ``token_boxes``, ``thumbnail_tokens``: where in the picture each visual token looks.

The picture is stretched to the grid whose aspect ratio is nearest to its own and cut into tiles, row by row; if there is
more than one, the picture stretched to a single tile follows them. Every tile has the same number of visual tokens, in
raster order, so the vision graph's rows are the visual tokens already, and padding is all at their end.

Source: GotOcr2ImageProcessor of transformers 5.23, which InternVLProcessor always calls with ``crop_to_patches``.
Letters: B tiles, N visual tokens, T side of a tile in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.bundle.errors import CheckpointError, ManifestError
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
    square_side,
)
from trio_edge.runtime.images.resizing import Resample, resize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from PIL import Image

KIND = "grid_tiles"
_PROCESSOR = "GotOcr2ImageProcessor"


@dataclass(frozen=True, kw_only=True, slots=True)
class GridTileProcessing:
    """The image processing constants of a bundle."""

    tile_size: int
    """T, side of the vision encoder's square input in pixels."""
    tokens_per_side: int
    """Visual tokens along one side of a tile."""
    min_tiles: int = 1
    """Fewest tiles of a grid, without the thumbnail."""
    max_tiles: int = 12
    """Most tiles of a grid, without the thumbnail."""
    resample: Resample = "bicubic"
    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        check_whole_numbers(self, "tile_size", "tokens_per_side", "min_tiles", "max_tiles")
        if self.tokens_per_side > self.tile_size:
            raise ManifestError(
                f"image_processing tokens_per_side: expected <= tile_size {self.tile_size}, got {self.tokens_per_side}"
            )
        if self.min_tiles > self.max_tiles:
            raise ManifestError(
                f"image_processing min_tiles: expected <= max_tiles {self.max_tiles}, got {self.min_tiles}"
            )
        check_resample(self)
        check_pixel_constants(self)

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile."""
        return self.tokens_per_side**2

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of tiles of a picture of this size; 1, 1 has no thumbnail.

        Raises:
            ImageError: If the picture is empty.
        """
        check_not_empty(width, height)
        return _best_grid(width, height, self)

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """Return the sizes of the graph's axes B and N that fit a picture of this size exactly."""
        rows, columns = self.grid(width, height)
        tiles = _with_thumbnail(rows * columns)
        return {"B": tiles, "N": tiles * self.tokens_per_tile}

    def any_picture_sizes(self) -> tuple[dict[str, int], ...]:
        """Return sizes that have room for every picture: the largest N with a few numbers of tiles, ascending.

        Each number of tiles is about half of the next one: an engine has few profiles, and no picture pays for much more
        than twice its tiles.
        """
        counts = sorted({_with_thumbnail(columns * rows) for columns, rows in _grids(self)})
        wanted, limit = {counts[0], counts[-1]}, counts[-1]
        while limit > counts[0]:
            limit = (limit + 1) // 2
            wanted.add(max((count for count in counts if count <= limit), default=counts[0]))
        most = counts[-1] * self.tokens_per_tile
        return tuple({"B": count, "N": most} for count in sorted(wanted))

    def prepare(
        self, picture: Image.Image, sizes: Mapping[str, int] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Return the vision graph's inputs for one RGB picture.

        Args:
            picture: An RGB picture, as ``open_picture`` returns it.
            sizes: B and N of the graph; the picture's own for those that are missing.

        Returns:
            ``pixel_values`` float32 [B, 3, T, T], padded with tiles of zeros; ``token_index`` int32 [N], padded with 0.

        Raises:
            ImageError: If the picture is not RGB, is empty, or needs more than ``sizes``.
        """
        check_rgb(picture)
        own = self.sizes(*picture.size)
        padded = {axis: (sizes or own).get(axis, size) for axis, size in own.items()}
        check_room(own, padded, width=picture.width, height=picture.height)
        pixels = np.zeros((padded["B"], 3, self.tile_size, self.tile_size), np.float32)
        pixels[: own["B"]] = normalized(_tiles(picture, self), self).transpose(0, 3, 1, 2)
        index = np.zeros(padded["N"], np.int32)
        index[: own["N"]] = np.arange(own["N"])
        return {"pixel_values": pixels, "token_index": index}

    def token_boxes(self, width: int, height: int) -> NDArray[np.float32]:
        """Return the part of a picture of this size that each visual token covers.

        Returns:
            float32 [N, 4], (x0, y0, x1, y1) in the picture's pixels, ordered as the visual tokens.
        """
        rows, columns = self.grid(width, height)
        x = np.linspace(0, width, columns * self.tokens_per_side + 1)
        y = np.linspace(0, height, rows * self.tokens_per_side + 1)
        by_tile = boxes_between(x, y).reshape(rows, self.tokens_per_side, columns, self.tokens_per_side, 4)
        boxes = by_tile.transpose(0, 2, 1, 3, 4).reshape(-1, 4)
        if rows * columns > 1:
            side = np.linspace(0, 1, self.tokens_per_side + 1)
            boxes = np.concatenate([boxes, boxes_between(side * width, side * height).reshape(-1, 4)])
        return boxes.astype(np.float32)

    def thumbnail_tokens(self, width: int, height: int) -> range:
        """Return which visual tokens are of the thumbnail; none where there is a single tile."""
        num_visual = self.sizes(width, height)["N"]
        first = num_visual if self.grid(width, height) == (1, 1) else num_visual - self.tokens_per_tile
        return range(first, num_visual)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, and "kind": "grid_tiles"."""
        return dict_from_constants(self, kind=KIND)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GridTileProcessing:
        """Return the constants that ``to_dict`` wrote.

        Raises:
            ManifestError: If a key is unknown or missing, or a value breaks a rule.
        """
        return constants_from_dict(cls, values, kind=KIND)

    @classmethod
    def from_preprocessor_config(
        cls, config: Mapping[str, Any], *, tokens_per_side: int
    ) -> GridTileProcessing:
        """Return the constants of a ``preprocessor_config.json``, or of ``image_processor.to_dict()``.

        Args:
            config: Its content. Missing keys mean the defaults of Hugging Face's class.
            tokens_per_side: The model's; the file does not hold it.

        Raises:
            CheckpointError: If the processor is of another kind, or its values cannot be followed.
        """
        return _from_preprocessor_config(config, tokens_per_side=tokens_per_side)


# Counts


@lru_cache
def _grids(processing: GridTileProcessing) -> tuple[tuple[int, int], ...]:
    """Return (columns, rows) of every grid, those of fewer tiles first. Source: get_all_supported_aspect_ratios."""
    least, most = processing.min_tiles, processing.max_tiles
    grids = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if least <= columns * rows <= most
    ]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def _best_grid(width: int, height: int, processing: GridTileProcessing) -> tuple[int, int]:
    """Return (rows, columns) of the grid with the nearest aspect ratio. Source: get_optimal_tiled_canvas.

    Of grids with the same ratio a larger one is taken if the picture has more than half of its pixels.
    """
    best, smallest = (1, 1), float("inf")
    for columns, rows in _grids(processing):
        difference = abs(width / height - columns / rows)
        has_pixels = width * height > 0.5 * processing.tile_size**2 * columns * rows
        if difference < smallest or (difference == smallest and has_pixels):
            best, smallest = (rows, columns), difference
    return best


def _with_thumbnail(tiles: int) -> int:
    return tiles if tiles == 1 else tiles + 1


# Pixels and boxes


def _tiles(picture: Image.Image, processing: GridTileProcessing) -> NDArray[np.uint8]:
    """Return the levels of all tiles, [B, T, T, 3]."""
    side = processing.tile_size
    rows, columns = processing.grid(*picture.size)
    levels = resize(picture, (rows * side, columns * side), resample=processing.resample)
    tiles = levels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)
    if len(tiles) == 1:
        return tiles
    return np.concatenate([tiles, resize(picture, (side, side), resample=processing.resample)[None]])


# Checks


def _from_preprocessor_config(config: Mapping[str, Any], *, tokens_per_side: int) -> GridTileProcessing:
    _, values = processor_values(config, processors=(_PROCESSOR,), always=("do_convert_rgb", "do_resize"))
    size = values.get("size", {"height": 384, "width": 384})
    with only_checkpoint_errors():
        tile_size = square_side(size)
        if tile_size is None:
            raise CheckpointError(
                f"preprocessor_config size: expected a square 'height' and 'width', got {size}"
            )
        return GridTileProcessing(
            tile_size=tile_size,
            tokens_per_side=tokens_per_side,
            min_tiles=values.get("min_patches", 1),
            max_tiles=values.get("max_patches", 12),
            **pixel_fields(values),
        )


@final
class GridTilePictures:
    """Tiles of a grid, row by row, and a thumbnail of the whole picture last; as many visual tokens of each."""

    encoder_keep: int | None = None

    def __init__(self, processing: GridTileProcessing) -> None:
        self.processing = processing

    def to_dict(self) -> dict[str, Any]:
        """See ``PictureProcessing.to_dict``."""
        return self.processing.to_dict()

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """See ``PictureProcessing.sizes``; B is the number of tiles, the thumbnail among them."""
        return self.processing.sizes(width, height)

    def any_picture_sizes(self) -> tuple[dict[str, int], ...]:
        """See ``PictureProcessing.any_picture_sizes``: the largest N with a few numbers of tiles."""
        return self.processing.any_picture_sizes()

    def prepare(self, picture: Image.Image, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """See ``PictureProcessing.prepare``."""
        return self.processing.prepare(picture, sizes)

    def boxes(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.float32]:
        """See ``PictureProcessing.boxes``."""
        return self.processing.token_boxes(width, height)

    def overview_tokens(self, width: int, height: int) -> range:
        """See ``PictureProcessing.overview_tokens``: the thumbnail's."""
        return self.processing.thumbnail_tokens(width, height)

    def positions(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.int32]:
        """Raise: models with tiles have ordinary positions."""
        raise ManifestError("position_axes: expected 1 with picture tiles, got 3; export the bundle again")

    def position_span(self, width: int, height: int) -> int:
        """See ``positions``."""
        raise ManifestError("position_axes: expected 1 with picture tiles, got 3; export the bundle again")
