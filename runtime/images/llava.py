"""From a picture to the vision graph's inputs: pixel tiles, and which feature row each visual token is.

What a reader needs, in order:

1. ``ImageProcessing``: a bundle's image processing constants.
2. ``prepare``: picture → ``PreparedPicture`` (``pixel_values``, ``token_index``).
3. ``num_visual_tokens``, ``num_tiles``, ``max_visual_tokens``, ``max_tiles``: the same counts without pixels.
4. ``token_boxes``: where in the picture each visual token looks.

The vision graph outputs flat features of ``B * P + 1`` rows: the P patches of each of the B tiles in raster
order, tile after tile, then one row ``image_newline``. All of LLaVA-NeXT's tiling, unpadding and newlines is
one gather of these rows by ``token_index``, which is computed here, on the host.

Source: LlavaNextImageProcessor, LlavaImageProcessor, CLIPImageProcessor and
LlavaNextModel.pack_image_features of transformers 5.23.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final, get_args

import numpy as np
from PIL import Image

from trio_edge.runtime.bundle.errors import CheckpointError, ManifestError
from trio_edge.runtime.images.constants import (
    CLIP_MEAN,
    CLIP_STD,
    boxes_between,
    check_choice,
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

Kind = Literal["single", "anyres"]
ResizeMode = Literal["shortest_edge", "stretch"]
_PROCESSORS = ("CLIPImageProcessor", "LlavaImageProcessor", "LlavaNextImageProcessor")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageProcessing:
    """The image processing constants of a bundle. Sizes are in pixels."""

    kind: Kind
    """"single": one crop (LLaVA-1.5). "anyres": a base tile and a grid of tiles (LLaVA-NeXT)."""
    tile_size: int
    """T, side of the vision encoder's square input."""
    patch_size: int
    """Side of one of its patches; a tile has P = (T // patch_size)² visual tokens."""
    resize_size: int
    """Side to resize to before cropping to ``tile_size``; Hugging Face's ``size``."""
    resize_mode: ResizeMode = "shortest_edge"
    """"shortest_edge" keeps the aspect ratio, "stretch" makes a square."""
    resample: Resample = "bicubic"
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    """(height, width) of every grid of "anyres", in multiples of ``tile_size``; empty for "single"."""
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    do_pad: bool = False
    """Pad to a square of the mean colour before resizing: LlavaImageProcessor's; "single" only."""
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        check_choice(self, "kind", get_args(Kind))
        check_choice(self, "resize_mode", get_args(ResizeMode))
        check_resample(self)
        check_whole_numbers(self, "tile_size", "patch_size", "resize_size")
        if self.patch_size > self.tile_size:
            raise ManifestError(
                f"image_processing patch_size: expected <= tile_size {self.tile_size}, got {self.patch_size}"
            )
        for name in ("do_resize", "do_center_crop", "do_pad"):
            if type(getattr(self, name)) is not bool:
                raise ManifestError(
                    f"image_processing {name}: expected true or false, got {getattr(self, name)!r}"
                )
        check_pixel_constants(self)
        self._check_pinpoints()
        self._check_tiles_come_out_square()

    def _check_pinpoints(self) -> None:
        if (self.kind == "anyres") != bool(self.grid_pinpoints):
            raise ManifestError(
                f"image_processing grid_pinpoints: expected some for kind 'anyres' and none for 'single',"
                f" got {len(self.grid_pinpoints)} for {self.kind!r}"
            )
        for pinpoint in self.grid_pinpoints:
            whole = (
                isinstance(pinpoint, tuple)
                and len(pinpoint) == 2
                and all(type(side) is int for side in pinpoint)
            )
            if not whole or any(side < 1 or side % self.tile_size for side in pinpoint):
                raise ManifestError(
                    f"image_processing grid_pinpoints: expected (height, width) in multiples of tile_size"
                    f" {self.tile_size}, got {pinpoint!r}"
                )
        if self.kind == "anyres" and self.do_pad:
            raise ManifestError("image_processing do_pad: expected false for kind 'anyres', got true")

    def _check_tiles_come_out_square(self) -> None:
        if self.do_center_crop:
            return
        keeps_size = self.resize_size == self.tile_size
        squares = self.kind == "anyres" or (self.do_resize and (self.resize_mode == "stretch" or self.do_pad))
        if not (keeps_size and squares):
            raise ManifestError(
                "image_processing do_center_crop: expected true unless resizing gives squares of tile_size"
                f" {self.tile_size}, got false with resize_size {self.resize_size} ({self.resize_mode})"
            )

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        """P, visual tokens of one tile."""
        return self.patches_per_side**2

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return dict_from_constants(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageProcessing:
        """Return the constants that ``to_dict`` wrote.

        Raises:
            ManifestError: If a key is unknown or missing, or a value breaks a rule.
        """
        return constants_from_dict(cls, values)

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any], *, patch_size: int) -> ImageProcessing:
        """Return the constants of a ``preprocessor_config.json``, or of ``image_processor.to_dict()``.

        Args:
            config: Its content. Missing keys mean the defaults of Hugging Face's class.
            patch_size: The vision encoder's; the file does not hold it.

        Raises:
            CheckpointError: If the processor is of another kind, or its values cannot be followed.
        """
        return _from_preprocessor_config(config, patch_size=patch_size)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedPicture:
    """One picture, ready for the vision graph."""

    pixel_values: NDArray[np.float32]
    """[B, 3, T, T], tiles; for "anyres" the base tile first."""
    token_index: NDArray[np.int32]
    """[N], row of the vision graph's flat features for each visual token."""
    width: int
    """Of the picture, in pixels."""
    height: int
    num_tiles: int
    """Tiles that hold the picture; further ones are zeros."""

    @property
    def num_visual_tokens(self) -> int:
        """N."""
        return len(self.token_index)


def prepare(
    picture: Image.Image, processing: ImageProcessing, *, pad_to_tiles: int | None = None
) -> PreparedPicture:
    """Return the vision graph's inputs for one RGB picture.

    Args:
        picture: An RGB picture, as ``open_picture`` returns it.
        processing: The bundle's constants.
        pad_to_tiles: B of the graph, when it is fixed: tiles of zeros are appended up to it.

    Raises:
        ImageError: If the picture is not RGB, is empty, or needs more than ``pad_to_tiles`` tiles.
    """
    check_rgb(picture)
    width, height = picture.size
    used = num_tiles(width, height, processing)
    total = used if pad_to_tiles is None else pad_to_tiles
    check_room({"B": used}, {"B": total}, width=width, height=height)
    tiles = (
        [_single_tile(picture, processing)]
        if processing.kind == "single"
        else _anyres_tiles(picture, processing)
    )
    pixels = np.zeros((total, 3, processing.tile_size, processing.tile_size), dtype=np.float32)
    pixels[:used] = normalized(np.stack(tiles), processing).transpose(0, 3, 1, 2)
    return PreparedPicture(
        pixel_values=pixels,
        token_index=token_index(width, height, processing, pad_to_tiles=total),
        width=width,
        height=height,
        num_tiles=used,
    )


def num_tiles(width: int, height: int, processing: ImageProcessing) -> int:
    """Return B, the tiles of a picture of this size."""
    check_not_empty(width, height)
    if processing.kind == "single":
        return 1
    best_height, best_width = _best_pinpoint(width, height, processing)
    return 1 + (best_height // processing.tile_size) * (best_width // processing.tile_size)


def num_visual_tokens(width: int, height: int, processing: ImageProcessing) -> int:
    """Return N, the visual tokens of a picture of this size, newlines included."""
    check_not_empty(width, height)
    if processing.kind == "single":
        return processing.patches_per_tile
    rows, columns = _unpadded_grid(width, height, processing)
    return processing.patches_per_tile + len(rows) * (len(columns) + 1)


def max_tiles(processing: ImageProcessing) -> int:
    """Return the largest B over all picture sizes: that of the largest grid."""
    return max(
        (num_tiles(width, height, processing) for height, width in processing.grid_pinpoints), default=1
    )


def max_visual_tokens(processing: ImageProcessing) -> int:
    """Return the largest N over all picture sizes.

    A grid of R x C patches gives P + R(C + 1) tokens less what unpadding removes. A picture of exactly the
    grid's size selects that grid (no grid shows more of it, none wastes less) and loses nothing, so the
    bound is reached.
    """
    return max(
        (num_visual_tokens(width, height, processing) for height, width in processing.grid_pinpoints),
        default=processing.patches_per_tile,
    )


def token_index(
    width: int, height: int, processing: ImageProcessing, *, pad_to_tiles: int | None = None
) -> NDArray[np.int32]:
    """Return, for each visual token of a picture of this size, its row in the vision graph's flat features.

    Order of the result: the base tile's patches, then the grid's rows, each followed by a newline.

    Args:
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        processing: The bundle's constants.
        pad_to_tiles: B of the graph, if larger than needed; the newline is row ``pad_to_tiles * P``.

    Returns:
        int32 [N].
    """
    used = num_tiles(width, height, processing)
    num_patches, per_side = processing.patches_per_tile, processing.patches_per_side
    base = np.arange(num_patches, dtype=np.int32)
    if processing.kind == "single":
        return base
    newline = (used if pad_to_tiles is None else pad_to_tiles) * num_patches
    grid_columns = _best_pinpoint(width, height, processing)[1] // processing.tile_size
    row_range, column_range = _unpadded_grid(width, height, processing)
    rows, columns = (
        np.arange(row_range.start, row_range.stop),
        np.arange(column_range.start, column_range.stop),
    )
    tiles = 1 + (rows // per_side)[:, None] * grid_columns + (columns // per_side)[None, :]
    patches = (rows % per_side)[:, None] * per_side + (columns % per_side)[None, :]
    grid = tiles * num_patches + patches
    lines = np.concatenate([grid, np.full((len(rows), 1), newline)], axis=1)
    return np.concatenate([base, lines.ravel().astype(np.int32)])


def token_boxes(width: int, height: int, processing: ImageProcessing) -> NDArray[np.float32]:
    """Return the part of the picture that each visual token's patch covers.

    Returns:
        float32 [N, 4], (x0, y0, x1, y1) in the picture's pixels, clipped to it, ordered as ``token_index``.
        Newlines are NaN. A patch of nothing but padding has no area.
    """
    check_not_empty(width, height)
    edges = np.arange(processing.patches_per_side + 1) * processing.patch_size
    if processing.kind == "single":
        return _clipped(boxes_between(*_single_edges(edges, width, height, processing)), width, height)
    # base tile, and where tiles are resized again, the same part of each tile of the grid
    unit = _cropped_fraction(edges, processing)
    base = boxes_between(unit * width, unit * height).reshape(-1, 4)
    best_height, best_width = _best_pinpoint(width, height, processing)
    new_height, new_width = _fitted_size(width, height, (best_height, best_width))
    x_scale, y_scale = width / new_width, height / new_height
    rows, columns = _unpadded_grid(width, height, processing)
    x = (_grid_edges(unit, columns, processing) - (best_width - new_width) // 2) * x_scale
    y = (_grid_edges(unit, rows, processing) - (best_height - new_height) // 2) * y_scale
    grid = np.full((len(rows), len(columns) + 1, 4), np.nan)
    grid[:, :-1, 0], grid[:, :-1, 2] = x[None, :, 0], x[None, :, 1]
    grid[:, :-1, 1], grid[:, :-1, 3] = y[:, None, 0], y[:, None, 1]
    return _clipped(np.concatenate([base, grid.reshape(-1, 4)]), width, height)


# LLaVA-NeXT's choice of a grid


def _best_pinpoint(width: int, height: int, processing: ImageProcessing) -> tuple[int, int]:
    """Return the (height, width) that shows most of the picture's pixels, and of these wastes least.

    Source: select_best_resolution. A picture so thin that no grid shows a pixel of it gets the smallest grid.
    """
    best, best_effective, best_wasted = processing.grid_pinpoints[0], -1, 0
    for pinpoint in processing.grid_pinpoints:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = pinpoint[0] * pinpoint[1] - effective
        if effective > best_effective or (effective == best_effective and wasted < best_wasted):
            best, best_effective, best_wasted = pinpoint, effective, wasted
    return best


def _fitted_size(width: int, height: int, pinpoint: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of the picture scaled into the grid. Source: get_patch_output_size."""
    scale_x, scale_y = pinpoint[1] / width, pinpoint[0] / height
    if scale_x < scale_y:
        return min(math.ceil(height * scale_x), pinpoint[0]), pinpoint[1]
    return pinpoint[0], min(math.ceil(width * scale_y), pinpoint[1])


def _unpadded_grid(width: int, height: int, processing: ImageProcessing) -> tuple[range, range]:
    """Return the rows and columns of the grid's patches that are left without padding. Source: unpad_image.

    A very thin picture can be left without rows (only the base tile's tokens) or columns (and newlines).
    """
    pinpoint = _best_pinpoint(width, height, processing)
    num_rows, num_columns = (side // processing.tile_size * processing.patches_per_side for side in pinpoint)
    if width / height > num_columns / num_rows:
        padding = (num_rows - int(round(height * (num_columns / width), 7))) // 2
        return range(padding, num_rows - padding), range(num_columns)
    padding = (num_columns - int(round(width * (num_rows / height), 7))) // 2
    return range(num_rows), range(padding, num_columns - padding)


# Pixels


def _resized(picture: Image.Image, size: tuple[int, int], processing: ImageProcessing) -> Image.Image:
    """Return the picture at (height, width)."""
    if size == (picture.height, picture.width):
        return picture
    return Image.fromarray(resize(picture, size, resample=processing.resample))


def _single_tile(picture: Image.Image, processing: ImageProcessing) -> NDArray[np.uint8]:
    if processing.do_pad and picture.width != picture.height:
        side = max(picture.size)
        square = Image.new("RGB", (side, side), _background(processing))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    if not processing.do_resize:
        return _cropped(picture, processing)
    height, width = _single_resized_size(picture.width, picture.height, processing)
    tile = processing.tile_size
    if not processing.do_center_crop or min(height, width) < tile:
        return _cropped(_resized(picture, (height, width), processing), processing)
    crop = ((height - tile) // 2, (width - tile) // 2, tile, tile)
    return resize(picture, (height, width), resample=processing.resample, crop=crop)


def _anyres_tiles(picture: Image.Image, processing: ImageProcessing) -> list[NDArray[np.uint8]]:
    side, tile = processing.resize_size, processing.tile_size
    best_height, best_width = pinpoint = _best_pinpoint(picture.width, picture.height, processing)
    fitted = _resized(picture, _fitted_size(picture.width, picture.height, pinpoint), processing)
    grid = Image.new("RGB", (best_width, best_height))
    grid.paste(fitted, ((best_width - fitted.width) // 2, (best_height - fitted.height) // 2))
    tiles = [_resized(picture, (side, side), processing)]
    tiles += [
        grid.crop((x, y, x + tile, y + tile))
        for y in range(0, best_height, tile)
        for x in range(0, best_width, tile)
    ]
    if processing.do_resize:
        tiles = [_resized(piece, (side, side), processing) for piece in tiles]
    return [_cropped(piece, processing) for piece in tiles]


def _cropped(picture: Image.Image, processing: ImageProcessing) -> NDArray[np.uint8]:
    """Return the middle [T, T, 3], with black around it where the picture is smaller."""
    tile = processing.tile_size
    if not processing.do_center_crop or picture.size == (tile, tile):
        return np.asarray(picture)
    left, top = _crop_offset(picture.width, tile), _crop_offset(picture.height, tile)
    return np.asarray(picture.crop((left, top, left + tile, top + tile)))


def _crop_offset(size: int, tile: int) -> int:
    """Return where the crop starts; negative where the picture is smaller, as torchvision pads."""
    return (size - tile) // 2 if size >= tile else -((tile - size) // 2)


def _background(processing: ImageProcessing) -> tuple[int, int, int]:
    red, green, blue = (int(value * 255) for value in processing.image_mean)
    return red, green, blue


def _single_resized_size(width: int, height: int, processing: ImageProcessing) -> tuple[int, int]:
    """Return the (height, width) to resize to. Source: get_resize_output_image_size."""
    size = processing.resize_size
    if processing.resize_mode == "stretch":
        return size, size
    long_side = int(size * max(width, height) / min(width, height))
    return (long_side, size) if width <= height else (size, long_side)


# Boxes


def _single_edges(
    edges: NDArray[Any], width: int, height: int, processing: ImageProcessing
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the x and y of the patches' edges in the picture's pixels, from those in the tile's."""
    side = max(width, height)
    padded_width, padded_height = (side, side) if processing.do_pad else (width, height)
    resized_height, resized_width = padded_height, padded_width
    if processing.do_resize:
        resized_height, resized_width = _single_resized_size(padded_width, padded_height, processing)
    x = (edges + _crop_offset(resized_width, processing.tile_size)) * (padded_width / resized_width)
    y = (edges + _crop_offset(resized_height, processing.tile_size)) * (padded_height / resized_height)
    return x - (padded_width - width) // 2, y - (padded_height - height) // 2


def _cropped_fraction(edges: NDArray[Any], processing: ImageProcessing) -> NDArray[Any]:
    """Return tile pixels as a fraction of what was resized to ``resize_size`` and then cropped."""
    return (edges + _crop_offset(processing.resize_size, processing.tile_size)) / processing.resize_size


def _grid_edges(unit: NDArray[Any], patches: range, processing: ImageProcessing) -> NDArray[Any]:
    """Return [len(patches), 2]: start and end of each patch along one axis, in the grid's pixels."""
    if not processing.do_resize:  # the grid's tiles are not resized, only the base tile is
        unit = np.arange(processing.patches_per_side + 1) * processing.patch_size / processing.tile_size
    index = np.arange(patches.start, patches.stop)
    tiles, inside = index // processing.patches_per_side, index % processing.patches_per_side
    return np.stack([tiles + unit[inside], tiles + unit[inside + 1]], axis=-1) * processing.tile_size


def _clipped(boxes: NDArray[Any], width: int, height: int) -> NDArray[np.float32]:
    """Return the boxes [..., 4] on a picture of this size, as [N, 4]."""
    clipped: NDArray[np.float32] = np.clip(boxes.reshape(-1, 4), 0, [width, height, width, height])
    return clipped.astype(np.float32)


# Checks


def _from_preprocessor_config(config: Mapping[str, Any], *, patch_size: int) -> ImageProcessing:
    name, values = processor_values(config, processors=_PROCESSORS, always=("do_convert_rgb",))
    is_anyres = name == "LlavaNextImageProcessor"
    with only_checkpoint_errors():
        resize_size, resize_mode = _side(values.get("size", {"shortest_edge": 224}), name="size")
        tile_size, _ = _side(values.get("crop_size", {"height": 224, "width": 224}), name="crop_size")
        default_pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        pinpoints = values.get("image_grid_pinpoints", default_pinpoints) if is_anyres else []
        return ImageProcessing(
            kind="anyres" if is_anyres else "single",
            tile_size=tile_size,
            patch_size=patch_size,
            resize_size=resize_size,
            resize_mode=resize_mode,
            grid_pinpoints=tuple((int(height), int(width)) for height, width in pinpoints),
            # of the others, CLIP's pads nothing by default and LLaVA-NeXT's do_pad is about batches
            do_pad=name == "LlavaImageProcessor" and bool(values.get("do_pad", False)),
            **pixel_fields(values, "do_resize", "do_center_crop"),
        )


def _side(size: Any, *, name: str) -> tuple[int, ResizeMode]:
    """Return the side and how to reach it, from {"shortest_edge": 336} or {"height": 336, "width": 336}."""
    if isinstance(size, int):
        return size, "shortest_edge"
    sides = {key: value for key, value in dict(size).items() if value is not None}
    if set(sides) == {"shortest_edge"}:
        return int(sides["shortest_edge"]), "shortest_edge"
    side = square_side(sides)
    if side is None:
        raise CheckpointError(
            f"preprocessor_config {name}: expected a square or a shortest edge, got {sides}"
        )
    return side, "stretch"


@final
class TilePictures:
    """Square tiles with a token per patch, and newlines between rows of a grid."""

    def __init__(self, processing: ImageProcessing, *, encoder_keep: int | None) -> None:
        self.processing = processing
        self.encoder_keep = encoder_keep

    def to_dict(self) -> dict[str, Any]:
        """See ``PictureProcessing.to_dict``."""
        return self.processing.to_dict()

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """See ``PictureProcessing.sizes``; B is the number of tiles."""
        tiles = num_tiles(width, height, self.processing)
        if self.encoder_keep is not None:
            return {"B": tiles, "N": tiles * self.encoder_keep}
        return {"B": tiles, "N": num_visual_tokens(width, height, self.processing)}

    def any_picture_sizes(self) -> tuple[dict[str, int], ...]:
        """See ``PictureProcessing.any_picture_sizes``: the largest N with every possible number of tiles."""
        processing, side = self.processing, self.processing.tile_size
        largest = max_tiles(processing)
        rows = max_visual_tokens(processing) if self.encoder_keep is None else largest * self.encoder_keep
        counts = {1 + (height // side) * (width // side) for height, width in processing.grid_pinpoints} or {
            1
        }
        return tuple({"B": count, "N": rows} for count in sorted(counts))

    def prepare(self, picture: Image.Image, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """See ``PictureProcessing.prepare``."""
        prepared = prepare(picture, self.processing, pad_to_tiles=sizes["B"])
        used = prepared.token_index
        if self.encoder_keep is not None:  # the graph has rows of kept patches only, no newline
            used = np.arange(prepared.num_tiles * self.encoder_keep, dtype=np.int32)
        index = np.zeros(sizes["N"], np.int32)
        index[: len(used)] = used
        return {"pixel_values": prepared.pixel_values, "token_index": index}

    def boxes(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.float32]:
        """See ``PictureProcessing.boxes``."""
        boxes = token_boxes(width, height, self.processing)
        if kept is None:
            return boxes
        tiles, num_patches = num_tiles(width, height, self.processing), self.processing.patches_per_tile
        box_of_patch = np.full((tiles * num_patches + 1, 4), np.nan, np.float32)
        box_of_patch[token_index(width, height, self.processing)] = boxes
        tile_start = np.arange(tiles)[:, None] * num_patches
        box_of_token: NDArray[np.float32] = box_of_patch[(tile_start + kept[:tiles]).ravel()]
        return box_of_token

    def overview_tokens(self, width: int, height: int) -> range:
        """See ``PictureProcessing.overview_tokens``: the base tile's, which come first."""
        if self.processing.kind == "single":
            return range(0)
        return range(self.processing.patches_per_tile if self.encoder_keep is None else self.encoder_keep)

    def positions(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.int32]:
        """Raise: models with tiles have ordinary positions."""
        raise ManifestError("position_axes: expected 1 with picture tiles, got 3; export the bundle again")

    def position_span(self, width: int, height: int) -> int:
        """See ``positions``."""
        raise ManifestError("position_axes: expected 1 with picture tiles, got 3; export the bundle again")
