"""From an image to a grid of tiles, row by row, and then one tile with the whole image (InternVL, SmolVLM2).

If the grid is a single tile, no tile with the whole image follows. Every tile has the same number of visual tokens in raster
order, so the vision graph's rows are the visual tokens, and all padding is at the end.

InternVL stretches the image to the grid with the nearest aspect ratio. SmolVLM2 resizes the image so that its longer side has
``longest_edge`` pixels and stretches it to whole numbers of tiles. Its prompt names each tile's row and column before its
visual tokens, so an image has several runs of visual tokens.

Source: GotOcr2ImageProcessor, which InternVLProcessor always calls with ``crop_to_patches``, SmolVLMImageProcessor and
SmolVLMProcessor of transformers 5.23.
Letters: B tiles, N visual tokens, T side of a tile in pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, final

import msgspec
import numpy as np
from PIL import Image

from trio_edge.runtime.bundle.errors import CheckpointError, ManifestError
from trio_edge.runtime.bundle.graph_io import PIXEL_VALUES, TOKEN_INDEX
from trio_edge.runtime.images import processing
from trio_edge.runtime.images.resizing import Resample, resize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_LONGEST = 4096  # pixels; Hugging Face's processor never makes larger images
_HALF = (0.5, 0.5, 0.5)


# Abstract, but no ABC: msgspec's Struct has a metaclass of its own.
class TileImages(processing.ImageConstants, frozen=True, kw_only=True):
    """Image processing with a grid of tiles and a tile with the whole image: the common part of InternVL and SmolVLM2."""

    tile_size: processing.Size
    """T, side of the vision encoder's square input in pixels."""

    @property
    def tokens_per_side(self) -> int:
        """Visual tokens along one side of a tile."""
        raise NotImplementedError

    @property
    def token_share(self) -> float:
        """Side of one visual token's part of a tile, as a fraction of the tile's side."""
        raise NotImplementedError

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile."""
        return self.tokens_per_side**2

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of tiles for an image of this size, without the one with the whole image.

        Raises:
            ImageError: If the image is empty.
        """
        raise NotImplementedError

    def counts(self) -> Sequence[int]:
        """Return all possible numbers of tiles of an image, ascending."""
        raise NotImplementedError

    def stretched(self, image: Image.Image, size: tuple[int, int]) -> tuple[NDArray[np.uint8], Image.Image]:
        """Return the image at (height, width), uint8 [height, width, 3], and the image that the last tile is made of."""
        raise NotImplementedError

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """Return B, the number of tiles including the one with the whole image, and N."""
        tiles = _with_overview(*self.grid(width, height))
        return {"B": tiles, "N": tiles * self.tokens_per_tile}

    def any_image_sizes(self) -> tuple[dict[str, int], ...]:
        """Return the largest N with a few numbers of tiles."""
        counts = self.counts()
        return tuple(
            {"B": count, "N": counts[-1] * self.tokens_per_tile} for count in processing.few_counts(counts)
        )

    def text(self, rows: int, columns: int) -> tuple[str, ...]:
        """Return the prompt's text before each run of visual tokens and after the last; by default there is one run."""
        return "", ""

    def layout(self, width: int, height: int) -> processing.ImageLayout:
        """Return the layout of an image; the overview is the tile with the whole image."""
        (rows, columns), sizes = self.grid(width, height), self.sizes(width, height)
        text = self.text(rows, columns)
        num_runs = len(text) - 1

        def make_boxes() -> NDArray[np.float32]:
            parts = [self._boxes(rows, columns), self._boxes(1, 1)]
            boxes = np.concatenate(parts)[: sizes["N"]] * [width, height, width, height]
            return boxes.astype(np.float32)

        return processing.ImageLayout(
            width=width,
            height=height,
            sizes=sizes,
            make_boxes=make_boxes,
            overview=range(rows * columns * self.tokens_per_tile, sizes["N"]),
            text=text,
            run_lengths=(sizes["N"] // num_runs,) * num_runs,
        )

    def _boxes(self, rows: int, columns: int) -> NDArray[np.float64]:
        """Return the boxes of a grid's tokens as fractions of the image, tile by tile: [N, 4], (x0, y0, x1, y1)."""
        starts = np.arange(self.tokens_per_side) * self.token_share
        x = (np.arange(columns)[:, None] + starts) / columns
        y = (np.arange(rows)[:, None] + starts) / rows
        left, top = np.broadcast_arrays(x[None, :, None, :], y[:, None, :, None])
        corner = np.stack([left, top], axis=-1).reshape(-1, 2)
        return np.concatenate([corner, corner + self.token_share / np.array([columns, rows])], axis=1)

    def prepare(self, image: Image.Image, sizes: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
        """Return ``pixel_values`` float32 [B, 3, T, T], padded with zeros, and ``token_index`` int32 [N], padded with 0.

        Arguments and errors are those of ``ImageProcessing.prepare``.
        """
        own = self.sizes(*image.size)
        room = processing.room_for(own, sizes, image=image)
        (rows, columns), side = self.grid(*image.size), self.tile_size
        levels, whole = self.stretched(image, (rows * side, columns * side))
        tiles = levels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
        tiles = tiles.reshape(-1, side, side, 3)
        if len(tiles) > 1:
            tiles = np.concatenate([tiles, resize(whole, (side, side), resample=self.resample)[None]])
        index = processing.padded_index(np.arange(own["N"]), room["N"])
        return {PIXEL_VALUES: processing.padded_tiles(tiles, room["B"], self), TOKEN_INDEX: index}


@final
class InternVlImages(TileImages, frozen=True, kw_only=True, tag_field="kind", tag="grid_tiles"):
    """Image processing with a grid of tiles, row by row, and then a thumbnail of the whole image."""

    tokens_per_side: processing.Size
    """Visual tokens along one side of a tile."""
    min_tiles: processing.Count = 1
    """Fewest tiles of a grid, without the thumbnail."""
    max_tiles: processing.Count = 12
    """Most tiles of a grid, without the thumbnail."""

    def __post_init__(self) -> None:
        if self.tokens_per_side > self.tile_size:
            limit = f"tile_size {self.tile_size}"
            raise ManifestError(f"tokens_per_side: expected <= {limit}, got {self.tokens_per_side}")
        if self.min_tiles > self.max_tiles:
            raise ManifestError(f"min_tiles: expected <= max_tiles {self.max_tiles}, got {self.min_tiles}")

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any], *, tokens_per_side: int) -> InternVlImages:
        """Return the constants of a ``preprocessor_config.json``; missing keys have the defaults of Hugging Face's class.

        ``tokens_per_side`` comes from the model, because the file lacks it.

        Raises:
            CheckpointError: If the processor is of another class, or a value is not supported.
        """
        _, values = processing.processor_values(config, "GotOcr2ImageProcessor")
        size = values.get("size", {"height": 384, "width": 384})
        with processing.only_checkpoint_errors():
            if (tile_size := processing.square_side(size)) is None:
                expected = "a square 'height' and 'width'"
                raise CheckpointError(f"preprocessor_config size: expected {expected}, got {size}")
            renamed = {"min_patches": "min_tiles", "max_patches": "max_tiles"}
            fields = {name: values[key] for key, name in renamed.items() if key in values}
            fields |= {"tile_size": tile_size, "tokens_per_side": tokens_per_side}
            return cls.from_dict(fields | processing.pixel_fields(values))

    def at_base(self) -> InternVlImages | None:
        """Return the processing that makes only one tile."""
        return msgspec.structs.replace(self, min_tiles=1, max_tiles=1)

    def within(self, width: int, height: int) -> InternVlImages | None:
        """Return the processing with at most as many tiles as lie within this size."""
        tiles = max((width // self.tile_size) * (height // self.tile_size), 1)
        least, most = min(self.min_tiles, tiles), min(self.max_tiles, tiles)
        return msgspec.structs.replace(self, min_tiles=least, max_tiles=most)

    @property
    def token_share(self) -> float:
        """Tokens divide a tile evenly."""
        return 1 / self.tokens_per_side

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the grid with the nearest aspect ratio; arguments and errors are those of ``TileImages.grid``."""
        processing.check_not_empty(width, height)
        return nearest_grid(width, height, grids(self.min_tiles, self.max_tiles), tile_size=self.tile_size)

    def counts(self) -> Sequence[int]:
        """Return all possible numbers of tiles of an image, ascending."""
        return sorted({_with_overview(*grid) for grid in grids(self.min_tiles, self.max_tiles)})

    def stretched(self, image: Image.Image, size: tuple[int, int]) -> tuple[NDArray[np.uint8], Image.Image]:
        """Return the image at (height, width), and the image itself for the last tile."""
        return resize(image, size, resample=self.resample), image


def nearest_grid(
    width: int, height: int, candidates: Sequence[tuple[int, int]], *, tile_size: int
) -> tuple[int, int]:
    """Return the rows and columns of the grid with the nearest aspect ratio; ``candidates`` are (columns, rows).

    Of grids with the same ratio, a larger one is chosen if the image has more than half of its pixels.
    Source: get_optimal_tiled_canvas, and find_closest_aspect_ratio of Lfm2VlImageProcessor.
    """
    best, smallest = (1, 1), float("inf")
    for columns, rows in candidates:
        difference = abs(width / height - columns / rows)
        has_pixels = width * height > 0.5 * tile_size**2 * columns * rows
        if difference < smallest or (difference == smallest and has_pixels):
            best, smallest = (rows, columns), difference
    return best


@lru_cache
def grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Return (columns, rows) of every grid, by number of tiles. Source: get_all_supported_aspect_ratios."""
    found = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(max(1, -(-least // columns)), most // columns + 1)
    ]
    # The sort is stable: grids with equally many tiles keep the original's order, which decides ties.
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


@final
class SmolVlmImages(TileImages, frozen=True, kw_only=True, tag_field="kind", tag="named_tiles"):
    """Image processing with tiles that the prompt names one by one, and a last tile with the whole image."""

    token_size: processing.Size
    """Side in pixels of one visual token's part of a tile; the rest of a tile, at the right and the bottom, is unused."""
    longest_edge: processing.Size = 1456
    """Pixels that the longer side of every image is resized to."""
    do_image_splitting: bool = True
    """Cut images into tiles; otherwise every image is one tile."""
    image_mark: str = "<fake_token_around_image>"
    """Text before each tile and after the last one."""
    overview_mark: str = "<global-img>"
    """Text before the tile with the whole image."""
    resample: Resample = "lanczos"
    image_mean: processing.Colour = _HALF
    image_std: processing.Spread = _HALF

    def __post_init__(self) -> None:
        if self.token_size > self.tile_size:
            raise ManifestError(f"token_size: expected <= tile_size {self.tile_size}, got {self.token_size}")

    @classmethod
    def from_preprocessor_config(
        cls, config: Mapping[str, Any], *, token_size: int, **marks: str
    ) -> SmolVlmImages:
        """Return the constants of a ``preprocessor_config.json``; missing keys have the defaults of Hugging Face's class.

        ``token_size`` comes from the model, because the file lacks it. ``marks`` are ``image_mark`` and ``overview_mark``,
        if the tokenizer names them.

        Raises:
            CheckpointError: If the processor is of another class, or a value is not supported.
        """
        _, values = processing.processor_values(config, "SmolVLMImageProcessor")
        values = {"resample": 1, **values}
        with processing.only_checkpoint_errors():
            fields = {
                "tile_size": longest_edge_of(values, "max_image_size", 364),
                "longest_edge": longest_edge_of(values, "size", 4 * 364),
                "token_size": token_size,
                **marks,
                **processing.pixel_fields(values, "do_image_splitting"),
            }
            return cls.from_dict(fields)

    @property
    def tokens_per_side(self) -> int:
        """Visual tokens along one side of a tile."""
        return self.tile_size // self.token_size

    @property
    def token_share(self) -> float:
        """``token_size`` as a fraction of ``tile_size``."""
        return self.token_size / self.tile_size

    @property
    def most_per_side(self) -> int:
        """Tiles along the longer side of an image; rounding to even sizes may add one."""
        return _whole_tiles(min(self.longest_edge, _LONGEST), self.tile_size)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of tiles that a resized image is stretched to; errors are those of ``TileImages.grid``.

        Source: resize_for_vision_encoder.
        """
        processing.check_not_empty(width, height)
        if not self.do_image_splitting:
            return 1, 1
        side, (width, height) = self.tile_size, self._resized(width, height)
        width, height = _scaled(width, height, _whole_tiles(max(width, height), side) * side)
        return _whole_tiles(height, side), _whole_tiles(width, side)

    def at_base(self) -> SmolVlmImages | None:
        """Return the processing that makes only one tile."""
        return msgspec.structs.replace(self, do_image_splitting=False)

    def within(self, width: int, height: int) -> SmolVlmImages | None:
        """Return the processing whose longer side is at most that of this size."""
        return msgspec.structs.replace(self, longest_edge=min(self.longest_edge, max(width, height)))

    def counts(self) -> Sequence[int]:
        """Return all possible numbers of tiles of an image, ascending."""
        return _counts(self)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height before stretching to whole tiles. Source: get_resize_output_image_size."""
        width, height = _scaled(width, height, self.longest_edge, to_even=True)
        return _scaled(width, height, _LONGEST) if max(width, height) > _LONGEST else (width, height)

    def stretched(self, image: Image.Image, size: tuple[int, int]) -> tuple[NDArray[np.uint8], Image.Image]:
        """Return the resized image at (height, width), and as the image for the last tile."""
        # Each step rounds to 8-bit levels, as in Hugging Face's processor.
        width, height = self._resized(*image.size)
        levels = resize(image, (height, width), resample=self.resample)
        levels = resize(Image.fromarray(levels), size, resample=self.resample)
        return levels, Image.fromarray(levels)

    def text(self, rows: int, columns: int) -> tuple[str, ...]:
        """Return the prompt's text before each tile's visual tokens and after the last. Source: get_image_prompt_string."""
        mark, overview = self.image_mark, f"{self.image_mark}{self.overview_mark}"
        if (rows, columns) == (1, 1):
            return overview, mark
        tiles = [
            f"{chr(10) if row and not column else ''}{mark}<row_{row + 1}_col_{column + 1}>"
            for row in range(rows)
            for column in range(columns)
        ]
        return (*tiles, f"\n\n{overview}", mark)


def longest_edge_of(values: Mapping[str, Any], name: str, default: int) -> int:
    """Return the number in {"longest_edge": 2048}, the value of ``name`` in a preprocessor file.

    Raises:
        CheckpointError: If there is no such number, or another key.
    """
    size = {key: value for key, value in dict(values.get(name, {"longest_edge": default})).items() if value}
    if set(size) != {"longest_edge"}:
        expected = "a 'longest_edge' and no other"
        raise CheckpointError(f"preprocessor_config {name}: expected {expected}, got {size}")
    return int(size["longest_edge"])


def _scaled(width: int, height: int, longest: int, *, to_even: bool = False) -> tuple[int, int]:
    """Return the width and height of an image whose longer side becomes ``longest``.

    The arithmetic is Hugging Face's, because other orders sometimes round differently. The shorter side may be rounded up
    to an even number, which can make it the longer one.
    """
    ratio = width / height
    shorter = int(longest / ratio if width >= height else longest * ratio)
    shorter = max(shorter + (to_even and shorter % 2), 1)
    return (longest, shorter) if width >= height else (shorter, longest)


def _whole_tiles(pixels: int, side: int) -> int:
    return -(-pixels // side)


@lru_cache
def _counts(images: SmolVlmImages) -> list[int]:
    """Return all possible numbers of tiles of an image, ascending."""
    longest = min(images.longest_edge, _LONGEST)
    sides = range(1, longest + 1)
    grids = {images.grid(longest, side) for side in sides} | {images.grid(side, longest) for side in sides}
    return sorted({_with_overview(*grid) for grid in grids})


def _with_overview(rows: int, columns: int) -> int:
    return 1 if rows * columns == 1 else rows * columns + 1
