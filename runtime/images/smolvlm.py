"""From an image to tiles with text between them, and a last tile with the whole image (SmolVLM2).

The image is resized so that its longer side has ``longest_edge`` pixels, stretched to whole numbers of tiles, and cut row by
row. If there are several tiles, the whole image as a single tile follows. The prompt names each tile's row and column before
its visual tokens, so an image has several runs of visual tokens.

Source: SmolVLMImageProcessor and SmolVLMProcessor of transformers 5.23.
Letters: B tiles, N visual tokens, T side of a tile in pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, final

import numpy as np
from PIL import Image

from trio_edge.runtime.bundle.errors import CheckpointError, ManifestError
from trio_edge.runtime.images.constants import (
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

KIND = "named_tiles"
_PROCESSOR = "SmolVLMImageProcessor"
_LONGEST = 4096  # pixels; Hugging Face's processor never makes larger images
_HALF = (0.5, 0.5, 0.5)


@final
class SmolVlmImages(ImageConstants, frozen=True, kw_only=True, tag_field="kind", tag=KIND):
    """Image processing with tiles that the prompt names one by one, and a last tile with the whole image."""

    tile_size: Size
    """T, side of the vision encoder's square input in pixels."""
    token_size: Size
    """Side in pixels of one visual token's part of a tile; the rest of a tile, at the right and the bottom, is unused."""
    longest_edge: Size = 1456
    """Pixels that the longer side of every image is resized to."""
    do_image_splitting: bool = True
    """Cut images into tiles; otherwise every image is one tile."""
    image_mark: str = "<fake_token_around_image>"
    """Text before each tile and after the last one."""
    overview_mark: str = "<global-img>"
    """Text before the tile with the whole image."""
    resample: Resample = "lanczos"
    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: Factor = 1 / 255
    image_mean: Colour = _HALF
    image_std: Spread = _HALF

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
        always = ("do_convert_rgb", "do_resize")
        _, values = processor_values(config, processors=(_PROCESSOR,), always=always)
        values = {"resample": 1, **values}
        with only_checkpoint_errors():
            fields = {
                "tile_size": _longest_edge(values, "max_image_size", 364),
                "longest_edge": _longest_edge(values, "size", 4 * 364),
                "token_size": token_size,
                **marks,
                **pixel_fields(values, "do_image_splitting"),
            }
            return cls.from_dict(fields)

    @property
    def tokens_per_side(self) -> int:
        """Visual tokens along one side of a tile."""
        return self.tile_size // self.token_size

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile."""
        return self.tokens_per_side**2

    @property
    def most_per_side(self) -> int:
        """Tiles along the longer side of an image; rounding to even sizes may add one."""
        return _whole_tiles(min(self.longest_edge, _LONGEST), self.tile_size)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of tiles for an image of this size; a single tile has no overview tile.

        Raises:
            ImageError: If the image is empty.
        """
        check_not_empty(width, height)
        return _grid(*_resized(width, height, self.longest_edge), self)

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """Return B, the number of tiles including the one with the whole image, and N."""
        tiles = _with_overview(*self.grid(width, height))
        return {"B": tiles, "N": tiles * self.tokens_per_tile}

    def any_image_sizes(self) -> tuple[dict[str, int], ...]:
        """Return the largest N with a few numbers of tiles."""
        counts = _counts(self)
        most = counts[-1] * self.tokens_per_tile
        return tuple({"B": count, "N": most} for count in few_counts(counts))

    def layout(self, width: int, height: int) -> ImageLayout:
        """Return the layout of an image, with one run per tile. The overview is the tile with the whole image."""
        rows, columns = self.grid(width, height)
        sizes = self.sizes(width, height)
        boxes = _boxes(self, rows, columns)
        overview = range(len(boxes), sizes["N"])
        if overview:
            boxes = np.concatenate([boxes, _boxes(self, 1, 1)])
        return ImageLayout(
            width=width,
            height=height,
            sizes=sizes,
            boxes=(boxes * [width, height, width, height]).astype(np.float32),
            overview=overview,
            text=self.text(rows, columns),
            runs=(self.tokens_per_tile,) * sizes["B"],
        )

    def text(self, rows: int, columns: int) -> tuple[str, ...]:
        """Return the prompt's text before each tile's visual tokens and after the last. Source: get_image_prompt_string."""
        mark, overview = self.image_mark, f"{self.image_mark}{self.overview_mark}"
        if (rows, columns) == (1, 1):
            return overview, mark
        tiles = [
            f"{_row_break(row, column)}{mark}<row_{row + 1}_col_{column + 1}>"
            for row in range(rows)
            for column in range(columns)
        ]
        return (*tiles, f"\n\n{overview}", mark)

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


def _longest_edge(values: Mapping[str, Any], name: str, default: int) -> int:
    """Return the number in {"longest_edge": 2048}, the value of ``name`` in a preprocessor file.

    Raises:
        CheckpointError: If there is no such number, or another key.
    """
    size = {key: value for key, value in dict(values.get(name, {"longest_edge": default})).items() if value}
    if set(size) != {"longest_edge"}:
        raise CheckpointError(
            f"preprocessor_config {name}: expected a 'longest_edge' and no other, got {size}"
        )
    return int(size["longest_edge"])


def _resized(width: int, height: int, longest_edge: int) -> tuple[int, int]:
    """Return the width and height before stretching to whole tiles. Source: get_resize_output_image_size."""
    width, height = _scaled(width, height, longest_edge, to_even=True)
    return _scaled(width, height, _LONGEST) if max(width, height) > _LONGEST else (width, height)


def _scaled(width: int, height: int, longest: int, *, to_even: bool = False) -> tuple[int, int]:
    """Return the width and height of an image whose longer side becomes ``longest``.

    The arithmetic is Hugging Face's, because other orders sometimes round differently. The shorter side may be rounded up
    to an even number, which can make it the longer one.
    """
    ratio = width / height
    shorter = int(longest / ratio if width >= height else longest * ratio)
    shorter = max(shorter + (to_even and shorter % 2), 1)
    return (longest, shorter) if width >= height else (shorter, longest)


def _grid(width: int, height: int, images: SmolVlmImages) -> tuple[int, int]:
    """Return the rows and columns of tiles that a resized image is stretched to. Source: resize_for_vision_encoder."""
    if not images.do_image_splitting:
        return 1, 1
    side = images.tile_size
    width, height = _scaled(width, height, _whole_tiles(max(width, height), side) * side)
    return _whole_tiles(height, side), _whole_tiles(width, side)


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


def _row_break(row: int, column: int) -> str:
    return "\n" if row and not column else ""


def _boxes(images: SmolVlmImages, rows: int, columns: int) -> NDArray[np.float64]:
    """Return the boxes of a grid's tokens as fractions of the image, tile by tile: [N, 4], (x0, y0, x1, y1)."""
    starts = np.arange(images.tokens_per_side) * images.token_size
    x = (np.arange(columns)[:, None] * images.tile_size + starts) / (columns * images.tile_size)
    y = (np.arange(rows)[:, None] * images.tile_size + starts) / (rows * images.tile_size)
    left, top = np.broadcast_arrays(x[None, :, None, :], y[:, None, :, None])
    corner = np.stack([left, top], axis=-1).reshape(-1, 2)
    size = images.token_size / images.tile_size / np.array([columns, rows])
    return np.concatenate([corner, corner + size], axis=1)


def _tiles(image: Image.Image, images: SmolVlmImages) -> NDArray[np.uint8]:
    """Return the pixels of all tiles, [B, T, T, 3]."""
    side = images.tile_size
    rows, columns = images.grid(*image.size)
    width, height = _resized(*image.size, images.longest_edge)
    # Each step rounds to 8-bit levels, as in Hugging Face's processor.
    levels = resize(image, (height, width), resample=images.resample)
    levels = resize(Image.fromarray(levels), (rows * side, columns * side), resample=images.resample)
    tiles = levels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)
    if len(tiles) == 1:
        return tiles
    whole = resize(Image.fromarray(levels), (side, side), resample=images.resample)
    return np.concatenate([tiles, whole[None]])
