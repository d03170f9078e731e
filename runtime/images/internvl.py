"""From an image to a grid of tiles and a thumbnail of the whole image (InternVL).

The image is stretched to the grid with the nearest aspect ratio and cut into tiles, row by row. If there are several
tiles, the whole image, stretched to one tile, follows as a thumbnail. Every tile has the same number of visual tokens in
raster order, so the vision graph's rows are the visual tokens, and all padding is at the end.

Source: GotOcr2ImageProcessor of transformers 5.23, which InternVLProcessor always calls with ``crop_to_patches``.
Letters: B tiles, N visual tokens, T side of a tile in pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.bundle.errors import CheckpointError, ManifestError
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
    square_side,
)
from trio_edge.runtime.images.layout import (
    ImageLayout,
    boxes_between,
    check_not_empty,
    check_rgb,
    few_counts,
    padded_index,
    room_for,
)
from trio_edge.runtime.images.resizing import Resample, resize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from PIL import Image

KIND = "grid_tiles"
_PROCESSOR = "GotOcr2ImageProcessor"


@final
class InternVlImages(ImageConstants, frozen=True, kw_only=True, tag_field="kind", tag=KIND):
    """Image processing with a grid of tiles, row by row, and then a thumbnail of the whole image."""

    tile_size: Size
    """T, side of the vision encoder's square input in pixels."""
    tokens_per_side: Size
    """Visual tokens along one side of a tile."""
    min_tiles: Size = 1
    """Fewest tiles of a grid, without the thumbnail."""
    max_tiles: Size = 12
    """Most tiles of a grid, without the thumbnail."""
    resample: Resample = "bicubic"
    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: Factor = 1 / 255
    image_mean: Colour = CLIP_MEAN
    image_std: Spread = CLIP_STD

    def __post_init__(self) -> None:
        if self.tokens_per_side > self.tile_size:
            raise ManifestError(
                f"tokens_per_side: expected <= tile_size {self.tile_size}, got {self.tokens_per_side}"
            )
        if self.min_tiles > self.max_tiles:
            raise ManifestError(f"min_tiles: expected <= max_tiles {self.max_tiles}, got {self.min_tiles}")

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any], *, tokens_per_side: int) -> InternVlImages:
        """Return the constants of a ``preprocessor_config.json``; missing keys have the defaults of Hugging Face's class.

        ``tokens_per_side`` comes from the model, because the file lacks it.

        Raises:
            CheckpointError: If the processor is of another class, or a value is not supported.
        """
        always = ("do_convert_rgb", "do_resize")
        _, values = processor_values(config, processors=(_PROCESSOR,), always=always)
        size = values.get("size", {"height": 384, "width": 384})
        with only_checkpoint_errors():
            tile_size = square_side(size)
            if tile_size is None:
                raise CheckpointError(
                    f"preprocessor_config size: expected a square 'height' and 'width', got {size}"
                )
            fields = {"tile_size": tile_size, "tokens_per_side": tokens_per_side, **pixel_fields(values)}
            fields["min_tiles"] = values.get("min_patches", 1)
            fields["max_tiles"] = values.get("max_patches", 12)
            return cls.from_dict(fields)

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile."""
        return self.tokens_per_side**2

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of tiles for an image of this size; a single tile has no thumbnail.

        Raises:
            ImageError: If the image is empty.
        """
        check_not_empty(width, height)
        return _best_grid(width, height, self)

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """Return B, the number of tiles including the thumbnail, and N."""
        rows, columns = self.grid(width, height)
        tiles = _with_thumbnail(rows * columns)
        return {"B": tiles, "N": tiles * self.tokens_per_tile}

    def any_image_sizes(self) -> tuple[dict[str, int], ...]:
        """Return the largest N with a few numbers of tiles."""
        counts = sorted({_with_thumbnail(columns * rows) for columns, rows in _grids(self)})
        most = counts[-1] * self.tokens_per_tile
        return tuple({"B": count, "N": most} for count in few_counts(counts))

    def layout(self, width: int, height: int) -> ImageLayout:
        """Return the layout of an image; the overview is the thumbnail."""
        rows, columns = self.grid(width, height)
        side, sizes = self.tokens_per_side, self.sizes(width, height)
        x, y = np.linspace(0, width, columns * side + 1), np.linspace(0, height, rows * side + 1)
        by_tile = boxes_between(x, y).reshape(rows, side, columns, side, 4)
        boxes = by_tile.transpose(0, 2, 1, 3, 4).reshape(-1, 4)
        overview = range(len(boxes), sizes["N"])
        if overview:
            edges = np.linspace(0, 1, side + 1)
            boxes = np.concatenate([boxes, boxes_between(edges * width, edges * height).reshape(-1, 4)])
        boxes = boxes.astype(np.float32)
        return ImageLayout(width=width, height=height, sizes=sizes, boxes=boxes, overview=overview)

    def prepare(self, image: Image.Image, sizes: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
        """Return ``pixel_values`` float32 [B, 3, T, T], padded with zeros, and ``token_index`` int32 [N], padded with 0.

        Arguments and errors are those of ``ImageProcessing.prepare``.
        """
        check_rgb(image)
        own = self.sizes(*image.size)
        room = room_for(own, sizes, image=image)
        pixels = np.zeros((room["B"], 3, self.tile_size, self.tile_size), np.float32)
        pixels[: own["B"]] = normalized(_tiles(image, self), self).transpose(0, 3, 1, 2)
        return {"pixel_values": pixels, "token_index": padded_index(np.arange(own["N"]), room["N"])}


@lru_cache
def _grids(images: InternVlImages) -> tuple[tuple[int, int], ...]:
    """Return (columns, rows) of every grid, by number of tiles. Source: get_all_supported_aspect_ratios."""
    least, most = images.min_tiles, images.max_tiles
    grids = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if least <= columns * rows <= most
    ]
    # The sort is stable: grids with equally many tiles keep the original's order, which decides ties.
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def _best_grid(width: int, height: int, images: InternVlImages) -> tuple[int, int]:
    """Return (rows, columns) of the grid with the nearest aspect ratio. Source: get_optimal_tiled_canvas.

    Of grids with the same ratio, a larger one is chosen if the image has more than half of its pixels.
    """
    best, smallest = (1, 1), float("inf")
    for columns, rows in _grids(images):
        difference = abs(width / height - columns / rows)
        has_pixels = width * height > 0.5 * images.tile_size**2 * columns * rows
        if difference < smallest or (difference == smallest and has_pixels):
            best, smallest = (rows, columns), difference
    return best


def _with_thumbnail(tiles: int) -> int:
    return tiles if tiles == 1 else tiles + 1


def _tiles(image: Image.Image, images: InternVlImages) -> NDArray[np.uint8]:
    """Return the pixels of all tiles, [B, T, T, 3]."""
    side = images.tile_size
    rows, columns = images.grid(*image.size)
    levels = resize(image, (rows * side, columns * side), resample=images.resample)
    tiles = levels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)
    if len(tiles) == 1:
        return tiles
    return np.concatenate([tiles, resize(image, (side, side), resample=images.resample)[None]])
