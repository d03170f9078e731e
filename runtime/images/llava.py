"""From an image to the vision graph's inputs for the LLaVA families: pixel tiles, and the feature row of each visual token.

The vision graph has flat features of ``B * P + 1`` rows: the P patches of each of the B tiles in raster order, tile by
tile, then one row ``image_newline``. LLaVA-NeXT's tiling, unpadding and newlines are one gather of these rows by
``token_index``, which the host computes here. LLaVA-OneVision also shrinks large grids bilinearly: there each token is a
weighted sum of four rows.

Source: LlavaNextImageProcessor, LlavaOnevisionImageProcessor, LlavaImageProcessor, CLIPImageProcessor,
LlavaNextModel.pack_image_features and LlavaOnevisionModel.pack_image_features of transformers 5.23.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

import msgspec
import numpy as np
from PIL import Image

from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.bundle.limits import MAX_IMAGE_PIXELS
from trio_edge.runtime.images import processing
from trio_edge.runtime.images.resizing import resize

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

ResizeMode = Literal["shortest_edge", "stretch"]
_ONEVISION = "LlavaOnevisionImageProcessor"
_PROCESSORS = ("CLIPImageProcessor", "LlavaImageProcessor", "LlavaNextImageProcessor", _ONEVISION)
_PINPOINTS: tuple[tuple[int, int], ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_ONEVISION_SIDES = range(384, 2305, 384)
ONEVISION_PINPOINTS = tuple((height, width) for height in _ONEVISION_SIDES for width in _ONEVISION_SIDES)
"""(height, width) of LLaVA-OneVision's grids of 1 x 1 to 6 x 6 tiles."""
_MOST_EXCESS = 1.1
"""A grid is shrunk if its sides exceed the limit by more than this factor."""


@final
class LlavaImages(processing.ImageConstants, frozen=True, kw_only=True):
    """Image processing with square tiles, one token per patch, and a newline after each row of a grid. Sizes are in pixels."""

    kind: Literal["single", "anyres"]
    """"single": one crop (LLaVA-1.5). "anyres": a base tile and a grid of tiles (LLaVA-NeXT)."""
    tile_size: processing.Size
    """T, side of the vision encoder's square input."""
    patch_size: processing.Size
    """Side of one of its patches; a tile has P = (T // patch_size)² visual tokens."""
    resize_size: processing.Size
    """Side to resize to before cropping to ``tile_size``; Hugging Face's ``size``."""
    resize_mode: ResizeMode = "shortest_edge"
    """"shortest_edge" keeps the aspect ratio, "stretch" makes a square."""
    grid_pinpoints: tuple[tuple[processing.Size, processing.Size], ...] = ()
    """(height, width) of every grid of "anyres", in multiples of ``tile_size``; empty for "single"."""
    max_grid_tiles: processing.Size | None = None
    """Limit of a grid's tokens, in tiles; a grid with clearly more tokens is shrunk bilinearly (LLaVA-OneVision). None for
    no limit."""
    is_one_of_several: bool = False
    """Use one tile and a newline: the padded image, as LLaVA-OneVision does for several images in a prompt, or the base tile."""
    do_resize: bool = True
    do_center_crop: bool = True
    do_pad: bool = False
    """Pad to a square with the mean colour before resizing (LlavaImageProcessor); never for a grid."""

    def __post_init__(self) -> None:
        tile = self.tile_size
        if self.patch_size > tile:
            raise ManifestError(f"patch_size: expected <= tile_size {tile}, got {self.patch_size}")
        if (self.kind == "anyres") != bool(self.grid_pinpoints):
            raise ManifestError(
                f"grid_pinpoints: expected some for kind 'anyres' and none for 'single', got {len(self.grid_pinpoints)}"
                f" for {self.kind!r}"
            )
        for pinpoint in self.grid_pinpoints:
            if any(side % tile for side in pinpoint):
                raise ManifestError(
                    f"grid_pinpoints: expected (height, width) in multiples of tile_size {tile}, got {pinpoint!r}"
                )
        if self.max_grid_tiles is not None and (self.kind == "single" or self.encoder_keep is not None):
            raise ManifestError(
                f"max_grid_tiles: expected none for kind 'single' or with an encoder_keep, got {self.max_grid_tiles}"
            )
        if self.has_grid and self.do_pad:
            raise ManifestError("do_pad: expected false for kind 'anyres', got true")
        # Without a crop, only these settings give tiles of the encoder's size.
        squares = self.has_grid or (self.do_resize and (self.resize_mode == "stretch" or self.do_pad))
        if not self.do_center_crop and not (squares and self.resize_size == tile):
            raise ManifestError(
                f"do_center_crop: expected true unless resizing gives squares of tile_size {tile}, got false with"
                f" resize_size {self.resize_size} ({self.resize_mode})"
            )

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any], *, patch_size: int) -> LlavaImages:
        """Return the constants of a ``preprocessor_config.json``; missing keys have the defaults of Hugging Face's class.

        ``patch_size`` comes from the vision encoder, because the file lacks it.

        Raises:
            CheckpointError: If the processor is of another class, or a value is not supported.
        """
        name, values = processing.processor_values(config, *_PROCESSORS, always=("do_convert_rgb",))
        is_anyres, pinpoints = name in ("LlavaNextImageProcessor", _ONEVISION), _PINPOINTS
        with processing.only_checkpoint_errors():
            # This class has other defaults; without a crop, tiles have the size ``size``.
            if name == _ONEVISION:
                pinpoints, size = ONEVISION_PINPOINTS, values.get("size", {"height": 384, "width": 384})
                values = {"size": size, "crop_size": size, "do_center_crop": False} | values
            resize_size, resize_mode = _side(values.get("size", {"shortest_edge": 224}), name="size")
            tile_size, _ = _side(values.get("crop_size", {"height": 224, "width": 224}), name="crop_size")
            fields = {
                "kind": "anyres" if is_anyres else "single",
                "tile_size": tile_size,
                "patch_size": patch_size,
                "resize_size": resize_size,
                "resize_mode": resize_mode,
                "grid_pinpoints": values.get("image_grid_pinpoints", pinpoints) if is_anyres else (),
                # CLIP's class does not pad by default, and LLaVA-NeXT's do_pad concerns batches.
                "do_pad": name == "LlavaImageProcessor" and bool(values.get("do_pad", False)),
            }
            return cls.from_dict({**fields, **processing.pixel_fields(values, "do_resize", "do_center_crop")})

    @property
    def has_grid(self) -> bool:
        """Whether a grid of tiles follows the base tile; otherwise there is one tile."""
        return self.kind == "anyres" and not self.is_one_of_several

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        """P, visual tokens of one tile."""
        return self.patches_per_side**2

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """Return B, the number of tiles, and N, including newlines."""
        processing.check_not_empty(width, height)
        tiles, tokens = 1, self.patches_per_tile
        if self.kind == "anyres":
            grid = _grid(width, height, self)
            tiles += grid.num_tiles
            tokens += grid.lines * (grid.line_tokens + 1)
        return {"B": tiles, "N": tokens if self.encoder_keep is None else tiles * self.encoder_keep}

    def of_several(self) -> LlavaImages:
        """Return the processing for a prompt with several images."""
        if self.max_grid_tiles is None:
            return self
        return msgspec.structs.replace(self, is_one_of_several=True, do_pad=True)

    def at_base(self) -> LlavaImages | None:
        """Return the processing that makes only the base tile; None for "single"."""
        if not self.has_grid:
            return None
        return msgspec.structs.replace(self, is_one_of_several=True, resize_mode="stretch", do_resize=True)

    def within(self, width: int, height: int) -> LlavaImages | None:
        """Return the processing with the grids that lie within this size; None if there are none."""
        inside = tuple(
            pinpoint for pinpoint in self.grid_pinpoints if pinpoint[0] <= height and pinpoint[1] <= width
        )
        return msgspec.structs.replace(self, grid_pinpoints=inside) if inside else None

    def any_image_sizes(self) -> tuple[dict[str, int], ...]:
        """Return the largest N with every possible number of tiles.

        A grid of R x C patches has P + R(C + 1) tokens minus those that unpadding removes. An image of exactly the grid's
        size selects this grid (no grid shows more of it or wastes less) and loses nothing, so the bound is reached. Where
        large grids are shrunk, a few of the numbers of tiles are enough: LLaVA-OneVision has 18.
        """
        pinpoints = self.grid_pinpoints or ((self.tile_size, self.tile_size),)
        found = [self.sizes(width, height) for height, width in pinpoints]
        counts, most = sorted({sizes["B"] for sizes in found}), max(sizes["N"] for sizes in found)
        if self.max_grid_tiles is not None and not self.is_one_of_several:
            counts, most = processing.few_counts(counts), self.patches_per_tile + _most_limited(self)
        return tuple({"B": count, "N": most} for count in counts)

    def layout(self, width: int, height: int) -> processing.ImageLayout:
        """Return the layout of an image. The overview is the base tile; a patch of padding has a box without area."""
        sizes = self.sizes(width, height)
        # An encoder that drops patches chooses among all patches of all tiles, including padding.
        count = sizes["N"] if self.encoder_keep is None else sizes["B"] * self.patches_per_tile
        return processing.ImageLayout(
            width=width,
            height=height,
            sizes=sizes,
            make_boxes=partial(_boxes, width, height, self),
            run_lengths=(count,),
            overview=range(self.patches_per_tile if self.has_grid else 0),
            patches_per_tile=self.patches_per_tile,
        )

    def prepare(self, image: Image.Image, sizes: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
        """Return ``pixel_values`` float32 [B, 3, T, T] and ``token_index`` int32 [N], both padded with 0.

        With "anyres" the base tile is first. With ``max_grid_tiles``, ``token_index`` is [N, 4], and there are
        ``token_weights`` float32 [N, 4]. Arguments and errors are those of ``ImageProcessing.prepare``.
        """
        own = self.sizes(*image.size)
        room = processing.room_for(own, sizes, image=image)
        tiles = _anyres_tiles(image, self) if self.has_grid else [_single_tile(image, self)]
        inputs: dict[str, NDArray[Any]] = {}
        if self.max_grid_tiles is not None:
            used, weights = self.weighted_index(*image.size, num_tiles=room["B"])
            inputs["token_weights"] = np.pad(weights, ((0, room["N"] - own["N"]), (0, 0)))
        else:  # with an encoder_keep, the graph's rows are only kept patches, without newlines
            whole = self.token_index(*image.size, num_tiles=room["B"])
            used = whole if self.encoder_keep is None else np.arange(own["N"], dtype=np.int32)
        pixels = processing.padded_tiles(np.stack(tiles), room["B"], self)
        return {"pixel_values": pixels, "token_index": processing.padded_index(used, room["N"]), **inputs}

    def token_index(self, width: int, height: int, *, num_tiles: int | None = None) -> NDArray[np.int32]:
        """Return the row of each visual token of an image in the vision graph's flat features, int32 [N].

        The order is: the base tile's patches, then the grid's rows, each with a newline at its end. ``num_tiles`` is the
        graph's B if it is larger than needed; the newline is row ``num_tiles * P``.
        """
        num_patches = self.patches_per_tile
        base = np.arange(num_patches, dtype=np.int32)
        if self.kind == "single":
            return base
        on_grid = _grid(width, height, self)
        newline = (1 + on_grid.num_tiles if num_tiles is None else num_tiles) * num_patches
        grid = _feature_rows(on_grid, self)
        lines = np.concatenate([grid, np.full((len(grid), 1), newline)], axis=1)
        return np.concatenate([base, lines.ravel().astype(np.int32)])

    def weighted_index(
        self, width: int, height: int, *, num_tiles: int | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return four rows of the flat features for each visual token, int32 [N, 4], and their weights, float32 [N, 4].

        Tokens of a shrunk grid are sums of the four patches around their centre; for other tokens the first row has all the
        weight. Arguments and order are those of ``token_index``; the kind must be "anyres".

        Source: torch's interpolate with mode "bilinear", which pack_image_features calls.
        """
        on_grid = _grid(width, height, self)
        lines, tokens, num_patches = on_grid.lines, on_grid.line_tokens, self.patches_per_tile
        newline = (1 + on_grid.num_tiles if num_tiles is None else num_tiles) * num_patches
        y, y_shares = _between(len(on_grid.rows), lines if tokens else 0)
        x, x_shares = _between(len(on_grid.columns), tokens)
        grid = _feature_rows(on_grid, self)[y[:, None, :, None], x[None, :, None, :]]
        shares = y_shares[:, None, :, None] * x_shares[None, :, None, :]
        rows = np.full((lines, tokens + 1, 4), newline, np.int32)
        weights = np.zeros((lines, tokens + 1, 4), np.float32)
        rows[:, :-1], weights[:, :-1] = (part.reshape(lines, tokens, 4) for part in (grid, shares))
        weights[:, -1, 0] = 1.0
        base = np.repeat(np.arange(num_patches, dtype=np.int32)[:, None], 4, axis=1)
        first = np.array([1.0, 0.0, 0.0, 0.0], np.float32)
        return (
            np.concatenate([base, rows.reshape(-1, 4)]),
            np.concatenate([np.tile(first, (num_patches, 1)), weights.reshape(-1, 4)]),
        )


# LLaVA-NeXT's choice of a grid, and LLaVA-OneVision's limit


class _Grid(NamedTuple):
    """An image on LLaVA-NeXT's grid of tiles."""

    height: int
    """Height of the grid in pixels."""
    width: int
    fitted_height: int
    """Height of the image scaled into the middle of the grid."""
    fitted_width: int
    num_columns: int
    """Columns of tiles."""
    num_tiles: int
    rows: range
    """Rows of the grid's patches without padding. A very thin image may have none, and then only the base tile's tokens."""
    columns: range
    lines: int
    """Lines of tokens: as many as rows, unless the grid is shrunk."""
    line_tokens: int
    """Tokens per line, without the newline."""


def _grid(width: int, height: int, images: LlavaImages) -> _Grid:
    """Return the grid for an image of this size; if only the base tile is used, an empty grid with one newline."""
    if images.is_one_of_several:
        return _Grid(0, 0, 1, 1, 0, 0, range(0), range(0), lines=1, line_tokens=0)
    pinpoint = _best_pinpoint(width, height, images)
    # Source: get_patch_output_size. Scaling the other side by the same number gives the grid's, but for rounding.
    scale = min(pinpoint[1] / width, pinpoint[0] / height)
    fit_y, fit_x = (min(math.ceil(side * scale), most) for side, most in zip((height, width), pinpoint))
    tile_rows, tile_columns = (side // images.tile_size for side in pinpoint)
    rows, columns = tile_rows * images.patches_per_side, tile_columns * images.patches_per_side
    # Source: unpad_image. It works on patches, and rounds so that 0.99999999 counts as 1.
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    kept_rows, kept_columns = range(top, rows - top), range(left, columns - left)
    num_tiles, limited = tile_rows * tile_columns, _limited(len(kept_rows), len(kept_columns), images)
    return _Grid(*pinpoint, fit_y, fit_x, tile_columns, num_tiles, kept_rows, kept_columns, *limited)


def _limited(rows: int, columns: int, images: LlavaImages) -> tuple[int, int]:
    """Return the rows and columns to which a grid of patches is shrunk. Source: pack_image_features."""
    if images.max_grid_tiles is None:
        return rows, columns
    excess = math.sqrt(rows * columns / (images.max_grid_tiles * images.patches_per_tile))
    return (int(rows // excess), int(columns // excess)) if excess > _MOST_EXCESS else (rows, columns)


def _most_limited(images: LlavaImages) -> int:
    """Return the most tokens of a grid that may be shrunk, with newlines."""
    sizes = (size for pinpoint in images.grid_pinpoints for size in _unpadded_sizes(pinpoint, images))
    return max(lines * (tokens + 1) for lines, tokens in (_limited(*size, images) for size in sizes))


def _unpadded_sizes(pinpoint: tuple[int, int], images: LlavaImages) -> Iterator[tuple[int, int]]:
    """Yield the possible rows and columns of patches without padding on the grid ``pinpoint``.

    An image leaves padding at two opposite sides only. If it fitted a smaller grid at the same scale, that grid would be used.
    """
    tile, per_side = images.tile_size, images.patches_per_side
    height, width = pinpoint
    rows, columns = height // tile * per_side, width // tile * per_side
    lower = [other for other, same in images.grid_pinpoints if same == width and other < height]
    narrower = [other for same, other in images.grid_pinpoints if same == height and other < width]
    yield from ((left, columns) for left in range(rows, max(lower, default=0) // tile * per_side - 1, -2))
    yield from ((rows, left) for left in range(columns, max(narrower, default=0) // tile * per_side - 1, -2))


def _feature_rows(on_grid: _Grid, images: LlavaImages) -> NDArray[np.int64]:
    """Return the row in the flat features of each patch of the grid: [rows, columns]."""
    per_side = images.patches_per_side
    rows, columns = np.array(on_grid.rows, np.int64), np.array(on_grid.columns, np.int64)
    tiles = 1 + (rows // per_side)[:, None] * on_grid.num_columns + (columns // per_side)[None, :]
    patches = (rows % per_side)[:, None] * per_side + (columns % per_side)[None, :]
    return tiles * images.patches_per_tile + patches


def _between(size: int, wanted: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the two of ``size`` points around each of ``wanted`` points, and their shares: [wanted, 2] each.

    Source: aten/src/ATen/native/UpSample.h of torch 2.13. Product and difference are rounded to float32 once, as on GPUs and
    on CPUs with AVX2; other CPUs round twice.
    """
    scale = float(np.float32(size) / np.float32(max(wanted, 1)))
    places = np.maximum(scale * (np.arange(wanted) + 0.5) - 0.5, 0).astype(np.float32)
    first = places.astype(np.int64)
    share = places - first.astype(np.float32)
    return np.stack([first, np.minimum(first + 1, size - 1)], axis=-1), np.stack([1 - share, share], axis=-1)


def _best_pinpoint(width: int, height: int, images: LlavaImages) -> tuple[int, int]:
    """Return the (height, width) of the grid that shows most of the image and wastes least. Source: select_best_resolution."""

    def shown_and_wasted(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - pinpoint[0] * pinpoint[1]

    return max(
        images.grid_pinpoints, key=shown_and_wasted
    )  # of equal grids the first, as for an image too thin to be shown


# Pixels


def _resized(image: Image.Image, size: tuple[int, int], images: LlavaImages) -> Image.Image:
    return Image.fromarray(resize(image, size, resample=images.resample))


def _single_tile(image: Image.Image, images: LlavaImages) -> NDArray[np.uint8]:
    if images.do_pad and image.width != image.height:
        side = max(image.size)
        if side**2 > max(MAX_IMAGE_PIXELS, 4 * image.width * image.height):
            raise ImageError(
                f"image: expected one that can be padded to {side}x{side} pixels in memory, got {image.width}x{image.height};"
                " crop the image so that it is less narrow"
            )
        square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in images.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if not images.do_resize:
        return _cropped(image, images)
    height, width = _single_resized_size(image.width, image.height, images)
    tile = images.tile_size
    if not images.do_center_crop or min(height, width) < tile:
        return _cropped(_resized(image, (height, width), images), images)
    # Only the crop is computed, because the rest of a thin image may be a thousand times larger.
    crop = ((height - tile) // 2, (width - tile) // 2, tile, tile)
    return resize(image, (height, width), resample=images.resample, crop=crop)


def _anyres_tiles(image: Image.Image, images: LlavaImages) -> list[NDArray[np.uint8]]:
    side, tile = images.resize_size, images.tile_size
    on_grid = _grid(image.width, image.height, images)
    fitted = _resized(image, (on_grid.fitted_height, on_grid.fitted_width), images)
    # Padding is black before normalizing, as in Hugging Face. The encoder sees it; only its tokens are dropped.
    canvas = Image.new("RGB", (on_grid.width, on_grid.height))
    canvas.paste(fitted, ((on_grid.width - fitted.width) // 2, (on_grid.height - fitted.height) // 2))
    tiles = [_resized(image, (side, side), images)]
    tiles += [
        canvas.crop((x, y, x + tile, y + tile))
        for y in range(0, on_grid.height, tile)
        for x in range(0, on_grid.width, tile)
    ]
    if images.do_resize:
        tiles = [_resized(piece, (side, side), images) for piece in tiles]
    return [_cropped(piece, images) for piece in tiles]


def _cropped(image: Image.Image, images: LlavaImages) -> NDArray[np.uint8]:
    """Return the middle of the image, [T, T, 3]; a smaller image is padded with black."""
    tile = images.tile_size
    if not images.do_center_crop or image.size == (tile, tile):
        return np.asarray(image)
    left, top = _crop_offset(image.width, tile), _crop_offset(image.height, tile)
    return np.asarray(image.crop((left, top, left + tile, top + tile)))


def _crop_offset(size: int, tile: int) -> int:
    """Return the start of the crop; negative if the image is smaller, as torchvision pads."""
    return (size - tile) // 2 if size >= tile else -((tile - size) // 2)


def _single_resized_size(width: int, height: int, images: LlavaImages) -> tuple[int, int]:
    """Return the (height, width) to resize to. Source: get_resize_output_image_size."""
    size = images.resize_size
    if images.resize_mode == "stretch":
        return size, size
    long_side = int(size * max(width, height) / min(width, height))
    return (long_side, size) if width <= height else (size, long_side)


# Boxes


def _boxes(width: int, height: int, images: LlavaImages) -> NDArray[np.float32]:
    """Return the boxes of all visual tokens or, if the encoder drops patches, of all patches."""
    boxes = _token_boxes(width, height, images)
    if images.encoder_keep is None:
        return boxes
    num_patches = images.sizes(width, height)["B"] * images.patches_per_tile
    box_of_patch = np.full((num_patches + 1, 4), np.nan, np.float32)
    box_of_patch[images.token_index(width, height)] = boxes
    return box_of_patch[:-1]


def _token_boxes(width: int, height: int, images: LlavaImages) -> NDArray[np.float32]:
    """Return the box of each visual token's patch in image pixels: float32 [N, 4]. Newlines are NaN; padding has no area."""
    edges = np.arange(images.patches_per_side + 1) * images.patch_size
    if not images.has_grid:
        boxes = _clipped(
            processing.boxes_between(*_single_edges(edges, width, height, images)), width, height
        )
        newlines = np.full((int(images.is_one_of_several), 4), np.nan, np.float32)
        return np.concatenate([boxes, newlines])
    # For the base tile, and for each tile of the grid if tiles are resized again.
    unit = (edges + _crop_offset(images.resize_size, images.tile_size)) / images.resize_size
    base = processing.boxes_between(unit * width, unit * height).reshape(-1, 4)
    on_grid = _grid(width, height, images)
    left, top = (on_grid.width - on_grid.fitted_width) // 2, (on_grid.height - on_grid.fitted_height) // 2
    x_edges, y_edges = (_grid_edges(unit, patches, images) for patches in (on_grid.columns, on_grid.rows))
    x = (_shared_edges(x_edges, on_grid.line_tokens) - left) * (width / on_grid.fitted_width)
    y = (_shared_edges(y_edges, on_grid.lines) - top) * (height / on_grid.fitted_height)
    grid = np.full((len(y), len(x) + 1, 4), np.nan)
    grid[:, :-1, 0], grid[:, :-1, 2] = x[None, :, 0], x[None, :, 1]
    grid[:, :-1, 1], grid[:, :-1, 3] = y[:, None, 0], y[:, None, 1]
    return _clipped(np.concatenate([base, grid.reshape(-1, 4)]), width, height)


def _single_edges(
    edges: NDArray[Any], width: int, height: int, images: LlavaImages
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the x and y of the patches' edges in image pixels, from ``edges`` in the tile's pixels."""
    side = max(width, height)
    padded_width, padded_height = (side, side) if images.do_pad else (width, height)
    resized_height, resized_width = padded_height, padded_width
    if images.do_resize:
        resized_height, resized_width = _single_resized_size(padded_width, padded_height, images)
    x = (edges + _crop_offset(resized_width, images.tile_size)) * (padded_width / resized_width)
    y = (edges + _crop_offset(resized_height, images.tile_size)) * (padded_height / resized_height)
    return x - (padded_width - width) // 2, y - (padded_height - height) // 2


def _grid_edges(unit: NDArray[Any], patches: range, images: LlavaImages) -> NDArray[Any]:
    """Return [len(patches), 2]: start and end of each patch along one axis, in the grid's pixels."""
    if not images.do_resize:  # only the base tile is resized, not the grid's tiles
        unit = np.arange(images.patches_per_side + 1) * images.patch_size / images.tile_size
    index = np.arange(patches.start, patches.stop)
    tiles, inside = index // images.patches_per_side, index % images.patches_per_side
    return np.stack([tiles + unit[inside], tiles + unit[inside + 1]], axis=-1) * images.tile_size


def _shared_edges(edges: NDArray[Any], count: int) -> NDArray[Any]:
    """Return [count, 2]: start and end of each of ``count`` tokens that share the patches of ``edges`` evenly."""
    places = np.linspace(0, len(edges), count + 1)
    first, last = np.floor(places[:-1]).astype(int), np.ceil(places[1:]).astype(int) - 1
    sizes = edges[:, 1] - edges[:, 0]
    starts = edges[first, 0] + (places[:-1] - first) * sizes[first]
    return np.stack([starts, edges[last, 0] + (places[1:] - last) * sizes[last]], axis=-1)


def _clipped(boxes: NDArray[Any], width: int, height: int) -> NDArray[np.float32]:
    """Return boxes [..., 4], clipped to an image of this size, as [N, 4]."""
    clipped: NDArray[np.float32] = np.clip(boxes.reshape(-1, 4), 0, [width, height, width, height])
    return clipped.astype(np.float32)


# Preprocessor files


def _side(size: Any, *, name: str) -> tuple[int, ResizeMode]:
    """Return the side and the resize mode from {"shortest_edge": 336} or {"height": 336, "width": 336}."""
    if isinstance(size, int):
        return size, "shortest_edge"
    sides = {key: value for key, value in dict(size).items() if value is not None}
    if set(sides) == {"shortest_edge"}:
        return int(sides["shortest_edge"]), "shortest_edge"
    if (side := processing.square_side(sides)) is not None:
        return side, "stretch"
    expected = "a square or a shortest edge"
    raise CheckpointError(f"preprocessor_config {name}: expected {expected}, got {sides}")
