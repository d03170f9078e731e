"""From an image to a grid of full tiles and one tile with the whole image at its own shape (LFM2-VL).

An image that is not much larger than a tile is one tile, scaled to whole visual tokens of about its own shape. A larger one is
stretched to the grid with the nearest aspect ratio, and the whole image follows as one more tile, the thumbnail. The vision
encoder reads patches: each tile has room for the most patches, and later ones are padding. The prompt names each tile's row
and column before its visual tokens, so an image has several runs of visual tokens.

Source: Lfm2VlImageProcessor and Lfm2VlProcessor of transformers 5.24.
Letters: B tiles, P patches of a tile with padding, F numbers of a patch, N visual tokens, M patches of a token.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import msgspec
import numpy as np

from trio_edge.runtime.bundle.errors import ImageError, ManifestError
from trio_edge.runtime.bundle.graph_io import PIXEL_VALUES, SPATIAL_SHAPES, TOKEN_INDEX
from trio_edge.runtime.images import processing
from trio_edge.runtime.images.resizing import Resample, resize
from trio_edge.runtime.images.tiles import grids, nearest_grid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from PIL import Image

_HALF = (0.5, 0.5, 0.5)
_NAMES = {
    "encoder_patch_size": "patch_size",
    "downsample_factor": "merge_size",
    "min_image_tokens": "min_tokens",
    "max_image_tokens": "max_tokens",
}


@final
class NaflexImages(
    processing.ImageConstants, frozen=True, kw_only=True, tag_field="kind", tag="naflex_tiles"
):
    """Image processing with named tiles, and a tile with the whole image at its own shape."""

    patch_size: processing.Size = 16
    merge_size: processing.Size = 2
    """Patches along a side of a visual token."""
    tile_size: processing.Size = 512
    min_tiles: processing.Count = 2
    max_tiles: processing.Count = 10
    """Most tiles of a grid; 1 if images are not cut."""
    use_thumbnail: bool = True
    """Whether the whole image follows the tiles of a grid."""
    min_tokens: processing.Size = 64
    max_tokens: processing.Size = 256
    """Most visual tokens of the tile with the whole image."""
    max_pixels_tolerance: processing.Factor = 2.0
    """An image with so many times the pixels of ``max_tokens`` is cut."""
    start_mark: str = "<|image_start|>"
    thumbnail_mark: str = "<|img_thumbnail|>"
    end_mark: str = "<|image_end|>"
    resample: Resample = "bilinear"
    image_mean: processing.Colour = _HALF
    image_std: processing.Spread = _HALF

    def __post_init__(self) -> None:
        if self.tile_size % self.token_size:
            raise ManifestError(
                f"tile_size: expected a multiple of {self.token_size} (a visual token), got {self.tile_size}"
            )
        if self.max_tiles > 1 and not 2 <= self.min_tiles <= self.max_tiles:
            raise ManifestError(f"min_tiles: expected 2..max_tiles {self.max_tiles}, got {self.min_tiles}")

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any], **marks: str) -> NaflexImages:
        """Return the constants of a ``preprocessor_config.json``; missing keys have the defaults of Hugging Face's class.

        ``marks`` are the texts that the tokenizer names.

        Raises:
            CheckpointError: If the processor is of another class, or a value is not supported.
        """
        always = ("do_convert_rgb", "do_pad")
        _, values = processing.processor_values(config, "Lfm2VlImageProcessor", always=always)
        values = {"resample": 2, **values}
        if not values.get("do_image_splitting", True):
            values |= {"min_tiles": 1, "max_tiles": 1}
        own = "tile_size", "min_tiles", "max_tiles", "use_thumbnail", "max_pixels_tolerance"
        with processing.only_checkpoint_errors():
            fields = {name: values[key] for key, name in _NAMES.items() if key in values}
            return cls.from_dict(fields | processing.pixel_fields(values, *own) | marks)

    @property
    def token_size(self) -> int:
        """Side of a visual token in pixels."""
        return self.patch_size * self.merge_size

    @property
    def tokens_per_side(self) -> int:
        """Visual tokens along a side of a full tile."""
        return self.tile_size // self.token_size

    @property
    def patches_per_tile(self) -> int:
        """P."""
        return self.merge_size**2 * max(self.max_tokens, self.tokens_per_side**2)

    def at_base(self) -> NaflexImages | None:
        """Return the processing that makes only the tile with the whole image."""
        return msgspec.structs.replace(self, min_tiles=1, max_tiles=1) if self.max_tiles > 1 else None

    def within(self, width: int, height: int) -> NaflexImages | None:
        """Return the processing with at most as many tiles as lie within this size."""
        tiles = (width // self.tile_size) * (height // self.tile_size)
        most = min(self.max_tiles, tiles) if tiles >= self.min_tiles else 1
        return msgspec.structs.replace(self, min_tiles=min(self.min_tiles, most), max_tiles=most)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of tiles, (1, 1) without a grid; raise ImageError if the image is empty."""
        processing.check_not_empty(width, height)
        rounded = (max(self.patch_size, self._rounded(side)) for side in (width, height))
        limit = self.max_tokens * self.token_size**2 * self.max_pixels_tolerance
        if self.max_tiles == 1 or math.prod(rounded) <= limit:
            return 1, 1
        candidates = grids(self.min_tiles, self.max_tiles)
        return nearest_grid(width, height, candidates, tile_size=self.tile_size)

    def _rounded(self, side: float) -> int:
        return round(side / self.token_size) * self.token_size

    def whole(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of visual tokens of the tile with the whole image.

        Source: smart_resize.

        Raises:
            ImageError: If the image is so long that transformers gives it more tokens than a tile has.
        """
        size, area = self.token_size, self.token_size**2
        tall, wide = (max(size, self._rounded(side)) for side in (height, width))
        if tall * wide > self.max_tokens * area:
            scale = math.sqrt((height * width) / (self.max_tokens * area))
            tall, wide = (max(size, math.floor(side / scale / size) * size) for side in (height, width))
        elif tall * wide < self.min_tokens * area:
            scale = math.sqrt(self.min_tokens * area / (height * width))
            tall, wide = (math.ceil(side * scale / size) * size for side in (height, width))
        rows, columns = tall // size, wide // size
        if rows * columns > self.max_tokens:
            raise ImageError(
                f"image: expected sides that leave at most {self.max_tokens} visual tokens of {size}x{size} pixels, got"
                f" {width}x{height} pixels with {rows * columns}; crop it"
            )
        return rows, columns

    def token_grids(self, width: int, height: int) -> list[tuple[int, int]]:
        """Return the rows and columns of visual tokens of each tile."""
        tiles = math.prod(self.grid(width, height))
        full = [(self.tokens_per_side, self.tokens_per_side)] * tiles if tiles > 1 else []
        return [*full, self.whole(width, height)] if tiles == 1 or self.use_thumbnail else full

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """Return B, the number of tiles including the one with the whole image, and N."""
        tiles = self.token_grids(width, height)
        return {"B": len(tiles), "N": sum(map(math.prod, tiles))}

    def any_image_sizes(self) -> tuple[dict[str, int], ...]:
        """Return the largest N with a few numbers of tiles."""
        several = {math.prod(grid) for grid in grids(self.min_tiles, self.max_tiles)} - {1}
        counts = sorted({1, *(tiles + self.use_thumbnail for tiles in several)})
        most = max(several, default=0) * self.tokens_per_side**2
        most = max(self.max_tokens, most + self.use_thumbnail * self.max_tokens * bool(several))
        return tuple({"B": count, "N": most} for count in processing.few_counts(counts))

    def layout(self, width: int, height: int) -> processing.ImageLayout:
        """Return the layout of an image; the overview is the thumbnail."""
        (rows, columns), tiles = self.grid(width, height), self.token_grids(width, height)
        named = [(row, column) for row in range(1, rows + 1) for column in range(1, columns + 1)]
        runs, num_tiled = tuple(map(math.prod, tiles)), 0
        text = [f"<|img_row_{row}_col_{column}|>" for row, column in named]
        if len(named) == 1:
            text = [""]
        else:
            num_tiled = len(named) * self.tokens_per_side**2
            text += [self.thumbnail_mark] * self.use_thumbnail
        text[0] = self.start_mark + text[0]

        def make_boxes() -> NDArray[np.float32]:
            side, parts = self.tokens_per_side, []
            if num_tiled:
                parts.append(processing.tile_boxes(width, height, (rows, columns), (side, side)))
            if len(tiles) != len(named) or not num_tiled:
                parts.append(processing.tile_boxes(width, height, (1, 1), tiles[-1]))
            return np.concatenate(parts)

        return processing.ImageLayout(
            width=width,
            height=height,
            sizes=self.sizes(width, height),
            make_boxes=make_boxes,
            overview=range(num_tiled, sum(runs)) if num_tiled else range(0),
            text=(*text, self.end_mark),
            run_lengths=runs,
        )

    def prepare(self, image: Image.Image, sizes: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
        """Return ``pixel_values`` float32 [B, P, F], ``spatial_shapes`` int32 [B, 2] and ``token_index`` int32 [N, M].

        They are the patches, padded with 0, the rows and columns of patches in each tile, padded with 1, and the patches of each
        token, padded with 0. Arguments and errors are those of ``ImageProcessing.prepare``.
        """
        own = self.sizes(*image.size)
        room = processing.room_for(own, sizes, image=image)
        (rows, columns), side, merge = self.grid(*image.size), self.tile_size, self.merge_size
        levels = []
        if rows * columns > 1:
            stretched = resize(image, (rows * side, columns * side), resample=self.resample)
            tiles = stretched.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
            levels += [*tiles.reshape(-1, side, side, 3)]
        if len(levels) < own["B"]:
            size = tuple(tokens * self.token_size for tokens in self.whole(*image.size))
            levels.append(resize(image, (size[0], size[1]), resample=self.resample))
        patch, most = self.patch_size, self.patches_per_tile
        pixels = np.zeros((room["B"], most, 3 * patch**2), np.float32)
        shapes, index = np.ones((room["B"], 2), np.int32), []
        for number, tile in enumerate(levels):
            tall, wide = tile.shape[0] // patch, tile.shape[1] // patch
            numbers = processing.normalized(tile, self).reshape(tall, patch, wide, patch, 3)
            pixels[number, : tall * wide] = numbers.transpose(0, 2, 1, 3, 4).reshape(tall * wide, -1)
            shapes[number] = tall, wide
            patches = number * most + np.arange(tall * wide)
            by_token = patches.reshape(tall // merge, merge, wide // merge, merge).transpose(0, 2, 1, 3)
            index.append(by_token.reshape(-1, merge**2))
        return {
            PIXEL_VALUES: pixels,
            SPATIAL_SHAPES: shapes,
            TOKEN_INDEX: processing.padded_index(np.concatenate(index), room["N"]),
        }
