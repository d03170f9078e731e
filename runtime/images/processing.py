"""The parts of image processing that all families share: constants, an image's layout, padded inputs, preprocessor files."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias, TypeVar, final

import msgspec
import numpy as np

from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.bundle.limits import typed
from trio_edge.runtime.images.resizing import Resample  # noqa: TC001 -- msgspec reads it

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from PIL import Image

Size: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 28)]
"""Pixels along a side or in all; the bound lies far above any image that fits a machine."""
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=4096)]
"""Tiles of an image. All grids of so many are listed, so the bound keeps that short; released models have at most 40."""
# The bounds refuse infinity and NaN, which Python's JSON files may hold; real values lie far inside.
Level: TypeAlias = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
Factor: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Colour: TypeAlias = tuple[Level, Level, Level]
"""Red, green, blue."""
Spread: TypeAlias = tuple[Factor, Factor, Factor]

_AXES = {"B": "tiles", "N": "visual tokens", "P": "patches", "W": "attention windows"}
_RESAMPLE_OF_ID: dict[object, Resample] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_NOT_FOLLOWED = ("use_square_size", "pad_size")
_PIXELS = ("do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std")
_Processing = TypeVar("_Processing", bound="Processing")
_Images = TypeVar("_Images", bound="ImageConstants")


class Processing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every image and video processing: constants that turn 8-bit levels into the vision encoder's numbers."""

    manifest_key: ClassVar[str] = "image_processing"
    """The manifest's key, for messages."""

    resample: Resample = "bicubic"
    do_rescale: bool = True
    """Multiply by ``rescale_factor``."""
    do_normalize: bool = True
    """Subtract ``image_mean`` and divide by ``image_std``, per channel."""
    rescale_factor: Factor = 1 / 255
    """1 / 255 for numbers from 0 to 1."""
    image_mean: Colour = (0.48145466, 0.4578275, 0.40821073)
    """Mean after rescaling; the defaults of Hugging Face's classes are CLIP's."""
    image_std: Spread = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation after rescaling."""

    def to_dict(self) -> dict[str, Any]:
        """Return the constants as JSON types, with "kind"."""
        values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        values.pop("encoder_keep", None)
        return values

    @classmethod
    def from_dict(cls: type[_Processing], values: Mapping[str, Any], **others: Any) -> _Processing:
        """Return what ``to_dict`` wrote; ``others`` are fields that it leaves out.

        Raises:
            ManifestError: If it is of another kind, a key is unknown or missing, or a value is out of range.
        """
        try:
            return typed({**values, **others}, cls)
        except msgspec.ValidationError as error:
            raise ManifestError(f"{cls.manifest_key}: {error}") from None


class ImageConstants(Processing, frozen=True, kw_only=True):
    """Base of every family's image processing."""

    encoder_keep: int | None = None
    """Patches per tile, or visual tokens per image, that the vision graph keeps; None for all. Not part of the JSON."""

    def of_several(self: _Images) -> _Images:
        """Return the processing for a prompt with several images: by default the same."""
        return self

    def at_base(self: _Images) -> _Images | None:
        """Return the processing that makes only the tile with the whole image; None if there are no other tiles."""
        return None

    def at_low(self: _Images) -> _Images:
        """Return the processing of a quick look: the tile with the whole image, or the same if there are no other tiles."""
        return self.at_base() or self

    def within(self: _Images, width: int, height: int) -> _Images | None:
        """Return the processing that scales images into this size in pixels; None if all images have one size."""
        return None


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageLayout:
    """Facts that follow from an image's size, computed once for each image."""

    width: int
    """In pixels."""
    height: int
    sizes: Mapping[str, int]
    """Sizes of the vision graph's axes: N, the image's visual tokens, and B, or P and W."""
    make_boxes: Callable[[], NDArray[np.float32]]
    """Returns ``boxes``, which few answers need."""
    run_lengths: tuple[int, ...]
    """Visual tokens of each run; at least one run."""
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
    number_marks: tuple[str, str] | None = None
    """Text around the number of the image in the prompt, before ``text``; None for no number."""

    @property
    def boxes(self) -> NDArray[np.float32]:
        """[N, 4], (x0, y0, x1, y1) in image pixels; NaN for tokens that show nothing of the image, such as newlines.

        If the vision graph drops tokens, these are the boxes of all its candidates; ``kept`` gives those of the kept tokens.
        """
        return self.make_boxes()

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
        marks: dict[str, Any] = {"overview": tuple(overview.tolist()), "run_lengths": tuple(runs.tolist())}
        own = indices.copy()  # the caller may read the next image's indices into the same memory
        return replace(self, make_boxes=lambda: self.boxes[own], positions=positions, **marks)


def check_not_empty(width: int, height: int) -> None:
    """Raise ImageError unless an image of this size has pixels."""
    if width < 1 or height < 1:
        raise ImageError(f"image: expected at least 1x1 pixels, got {width}x{height}")


def room_for(own: dict[str, int], sizes: Mapping[str, int] | None, *, image: Image.Image) -> dict[str, int]:
    """Return the sizes that the inputs are padded to: the graph's ``sizes``, or the image's ``own`` for missing axes.

    Raises:
        ImageError: If the image is not RGB, or larger than the graph on an axis (B, N, P or W).
    """
    if image.mode != "RGB":
        raise ImageError(f"image: expected mode 'RGB', got {image.mode!r}; read it with open_image")
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


def padded_tiles(tiles: NDArray[np.uint8], count: int, constants: Processing) -> NDArray[np.float32]:
    """Return the encoder's numbers for ``tiles`` [B, T, T, 3], padded with zeros: float32 [count, 3, T, T]."""
    pixels = np.zeros((count, 3, *tiles.shape[1:3]), np.float32)
    pixels[: len(tiles)] = normalized(tiles, constants).transpose(0, 3, 1, 2)
    return pixels


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


def tile_boxes(
    width: int, height: int, tiles: tuple[int, int], tokens: tuple[int, int]
) -> NDArray[np.float32]:
    """Return the boxes [N, 4] of an image's visual tokens, tile by tile.

    ``tiles`` are rows and columns of tiles, and ``tokens`` those of visual tokens in each.
    """
    (rows, columns), (tall, wide) = tiles, tokens
    x, y = (
        np.arange(count + 1) * side / count
        for count, side in ((columns * wide, width), (rows * tall, height))
    )
    boxes = boxes_between(x, y).reshape(rows, tall, columns, wide, 4).transpose(0, 2, 1, 3, 4)
    return boxes.reshape(-1, 4).astype(np.float32)


def normalized(levels: NDArray[np.uint8], constants: Processing) -> NDArray[np.float32]:
    """Return the vision encoder's numbers for ``levels`` [..., 3], channels last, as float32 of the same shape.

    Source: TorchvisionBackend.rescale_and_normalize of transformers 5.23.
    """
    pixels = levels.astype(np.float32)
    factor = constants.rescale_factor if constants.do_rescale else 1.0
    if not constants.do_normalize:
        return pixels * np.float32(factor)
    # The factor is folded into mean and deviation, as in torchvision, because other orders round differently.
    pixels -= np.asarray(constants.image_mean, np.float32) * np.float32(1.0 / factor)
    pixels /= np.asarray(constants.image_std, np.float32) * np.float32(1.0 / factor)
    return pixels


def processor_values(
    config: Mapping[str, Any], *processors: str, always: tuple[str, ...] = ("do_convert_rgb", "do_resize")
) -> tuple[str, dict[str, Any]]:
    """Return the class of a ``preprocessor_config.json``, without "Fast" and "Pil", and its values except null.

    Args:
        config: The content of the file.
        processors: Supported classes of Hugging Face.
        always: Steps that the file may not switch off.

    Raises:
        CheckpointError: If it has another class, switches a step off, or needs a step that is not supported.
    """
    name = str(config.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
    if name not in processors:
        *first, last = processors
        expected = " or ".join([", ".join(first), last] if first else [last])
        got = repr(config.get("image_processor_type"))
        raise CheckpointError(f"preprocessor_config image_processor_type: expected {expected}, got {got}")
    values = {key: value for key, value in config.items() if value is not None}
    for key in always:
        if not values.get(key, True):
            raise CheckpointError(f"preprocessor_config {key}: expected true, got false")
    for key in _NOT_FOLLOWED:
        if values.get(key):
            raise CheckpointError(
                f"preprocessor_config {key}: expected none, got {values[key]}; this image processor cannot be followed"
            )
    return name, values


def pixel_fields(values: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """Return the filter, the pixel constants and the fields ``others`` that a preprocessor file contains.

    Raises:
        CheckpointError: If the filter is not supported.
    """
    fields = {key: values[key] for key in (*_PIXELS, *others) if key in values}
    number = values.get("resample", 3)
    if not isinstance(number, int) or number not in _RESAMPLE_OF_ID:
        known = ", ".join(f"{key} ({name})" for key, name in _RESAMPLE_OF_ID.items())
        raise CheckpointError(
            f"preprocessor_config resample: expected one of Pillow's filters {known}, got {number!r:.80};"
            " this image processor cannot be followed"
        )
    return {**fields, "resample": _RESAMPLE_OF_ID[number]}


def square_side(size: Any) -> int | None:
    """Return the side of {"height": 336, "width": 336}; None if the sizes are no square.

    Raises:
        TypeError: If ``size`` is no mapping.
    """
    sides = {key: value for key, value in dict(size).items() if value is not None}
    if set(sides) != {"height", "width"} or sides["height"] != sides["width"]:
        return None
    return int(sides["height"])


@contextmanager
def only_checkpoint_errors(file: str = "preprocessor_config") -> Iterator[None]:
    """Turn errors that the values of ``file`` cause into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: expected values that trio-edge can follow, got {error}") from error
