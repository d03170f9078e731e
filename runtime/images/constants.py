"""What the constants of all kinds of picture processing share: their rules, their JSON, and how checkpoints name them.

``PixelConstants`` says which of them ``image_normalize`` calculates with; the rest differs from kind to kind.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_args

import numpy as np

from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.images.resizing import Resample

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray
    from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training pictures, red, green, blue: what Hugging Face's classes take where a file names none."""
_RESAMPLE_OF_ID: dict[object, Resample] = {2: "bilinear", 3: "bicubic"}
_PIXELS = ("do_rescale", "do_normalize", "rescale_factor")
_TUPLES = ("image_mean", "image_std", "grid_pinpoints")
_Constants = TypeVar("_Constants")


def check_whole_numbers(constants: object, *names: str) -> None:
    """Raise ManifestError unless the fields ``names`` are whole numbers from 1."""
    for name in names:
        value = getattr(constants, name)
        if type(value) is not int or value < 1:
            raise ManifestError(f"image_processing {name}: expected a whole number >= 1, got {value!r}")


def check_choice(constants: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise ManifestError unless the field ``name`` is one of ``choices``."""
    if getattr(constants, name) not in choices:
        raise ManifestError(
            f"image_processing {name}: expected one of {choices}, got {getattr(constants, name)!r}"
        )


def check_resample(constants: object) -> None:
    """Raise ManifestError unless the field ``resample`` is a filter of ``image_resize``."""
    check_choice(constants, "resample", get_args(Resample))


def dict_from_constants(constants: Any, *, kind: str | None = None) -> dict[str, Any]:
    """Return the fields of a dataclass as JSON types, with ``kind`` where that is no field."""
    fields = dataclasses.asdict(constants)
    for name in _TUPLES:
        if name in fields:
            fields[name] = [list(item) if isinstance(item, tuple) else item for item in fields[name]]
    return fields if kind is None else {"kind": kind, **fields}


def constants_from_dict(
    made: type[_Constants], values: Mapping[str, Any], *, kind: str | None = None
) -> _Constants:
    """Return what ``dict_from_constants`` wrote of the dataclass ``made``.

    Raises:
        ManifestError: If it is of another ``kind``, a key is unknown or missing, or a value breaks a rule.
    """
    fields = dict(values)
    if kind is not None and fields.pop("kind", None) != kind:
        raise ManifestError(f"image_processing kind: expected {kind!r}, got {values.get('kind')!r}")
    known = {field.name for field in dataclasses.fields(made)}  # type: ignore[arg-type]
    if unknown := sorted(set(fields) - known):
        raise ManifestError(f"image_processing: expected keys among {sorted(known)}, got {unknown}")
    try:
        for name in {*_TUPLES} & set(fields):
            fields[name] = tuple(tuple(item) if isinstance(item, list) else item for item in fields[name])
        return made(**fields)
    except TypeError as error:
        raise ManifestError(f"image_processing: expected all required keys and types, got {error}") from error


def processor_values(
    config: Mapping[str, Any], *, processors: tuple[str, ...], always: tuple[str, ...]
) -> tuple[str, dict[str, Any]]:
    """Return a preprocessor file's class, without "Fast" and "Pil", and those of its values that are not null.

    Args:
        config: The content of ``preprocessor_config.json``.
        processors: Classes of Hugging Face's that can be followed.
        always: Steps that the file may not switch off.

    Raises:
        CheckpointError: If it is of another class, or switches a step off.
    """
    name = str(config.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil")
    if name not in processors:
        *first, last = processors
        expected = f"{', '.join(first)} or {last}" if first else last
        raise CheckpointError(
            f"preprocessor_config image_processor_type: expected {expected}, got"
            f" {config.get('image_processor_type')!r}"
        )
    values = {key: value for key, value in config.items() if value is not None}
    for key in always:
        if not values.get(key, True):
            raise CheckpointError(f"preprocessor_config {key}: expected true, got false")
    return name, values


def pixel_fields(values: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """Return the filter, the pixel constants and the fields ``others``, as far as a preprocessor file names them.

    Raises:
        KeyError: If the filter is none of ours.
        TypeError: If mean or standard deviation are no lists.
    """
    fields = {key: values[key] for key in (*_PIXELS, *others) if key in values}
    fields |= {key: tuple(values[key]) for key in ("image_mean", "image_std") if key in values}
    return {**fields, "resample": _RESAMPLE_OF_ID[values.get("resample", 3)]}


def square_side(size: Any) -> int | None:
    """Return the side of {"height": 336, "width": 336}; None if that is no square.

    Raises:
        TypeError: If ``size`` is no mapping.
    """
    sides = {key: value for key, value in dict(size).items() if value is not None}
    if set(sides) != {"height", "width"} or sides["height"] != sides["width"]:
        return None
    return int(sides["height"])


@contextmanager
def only_checkpoint_errors() -> Iterator[None]:
    """Make a CheckpointError of whatever a preprocessor file's values cause."""
    try:
        yield
    except CheckpointError:
        raise
    except (ManifestError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"preprocessor_config: expected values that trio-edge can follow, got {error}"
        ) from error


# From grey levels to the vision encoder's numbers: the arithmetic and the checks that all kinds of processing share.
#
# Source: TorchvisionBackend.rescale_and_normalize of transformers 5.23, which folds the rescaling into mean and standard
# deviation.


class PixelConstants(Protocol):
    """How levels become numbers."""

    @property
    def do_rescale(self) -> bool:
        """Multiply by ``rescale_factor``."""

    @property
    def do_normalize(self) -> bool:
        """Subtract ``image_mean`` and divide by ``image_std``, per channel."""

    @property
    def rescale_factor(self) -> float:
        """1 / 255 for numbers from 0 to 1."""

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Red, green, blue, after rescaling."""

    @property
    def image_std(self) -> tuple[float, float, float]:
        """Red, green, blue, after rescaling."""


def normalized(levels: NDArray[np.uint8], constants: PixelConstants) -> NDArray[np.float32]:
    """Return the vision encoder's numbers; one subtraction and one division, as torchvision does it.

    Args:
        levels: [..., 3], channels last.
        constants: Of the bundle.

    Returns:
        float32 of the same shape.
    """
    pixels = levels.astype(np.float32)
    factor = constants.rescale_factor if constants.do_rescale else 1.0
    if not constants.do_normalize:
        return pixels * np.float32(factor)
    pixels -= np.asarray(constants.image_mean, np.float32) * np.float32(1.0 / factor)
    pixels /= np.asarray(constants.image_std, np.float32) * np.float32(1.0 / factor)
    return pixels


def check_pixel_constants(constants: PixelConstants) -> None:
    """Raise ManifestError unless the values can be calculated with."""
    for name in ("do_rescale", "do_normalize"):
        if type(getattr(constants, name)) is not bool:
            raise ManifestError(
                f"image_processing {name}: expected true or false, got {getattr(constants, name)!r}"
            )
    for name in ("image_mean", "image_std"):
        values = getattr(constants, name)
        if not isinstance(values, tuple) or len(values) != 3 or not all(map(_is_finite, values)):
            raise ManifestError(f"image_processing {name}: expected three finite numbers, got {values!r}")
    if min(constants.image_std) <= 0:
        raise ManifestError(f"image_processing image_std: expected numbers > 0, got {constants.image_std}")
    if not _is_finite(constants.rescale_factor) or constants.rescale_factor <= 0:
        raise ManifestError(
            f"image_processing rescale_factor: expected a number > 0, got {constants.rescale_factor!r}"
        )


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# What all kinds of picture processing ask of a picture, and the boxes between edges on it.


_WHAT = {"B": "tiles", "N": "visual tokens", "P": "patches", "W": "attention windows"}


def check_rgb(picture: Image.Image) -> None:
    """Raise ImageError unless ``picture`` is RGB."""
    if picture.mode != "RGB":
        raise ImageError(f"picture: expected mode 'RGB', got {picture.mode!r}; read it with open_picture")


def check_not_empty(width: int, height: int) -> None:
    """Raise ImageError unless a picture of this size has pixels."""
    if width < 1 or height < 1:
        raise ImageError(f"picture: expected at least 1x1 pixels, got {width}x{height}")


def check_room(own: Mapping[str, int], room: Mapping[str, int], *, width: int, height: int) -> None:
    """Raise ImageError if a picture of this size needs more than the graph has room for.

    Args:
        own: What the picture needs on each axis (B, N, P or W).
        room: What the graph has.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
    """
    for axis, needed in own.items():
        if needed > room[axis]:
            raise ImageError(
                f"picture: expected at most {room[axis]} {_WHAT[axis]} (the exported shapes), got {needed} for"
                f" {width}x{height} pixels; resize it or export with a larger --image-size"
            )


def boxes_between(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Return the boxes [rows, columns, 4], (x0, y0, x1, y1), between the edges ``x`` [columns + 1] and ``y`` [rows + 1]."""
    left, top = np.meshgrid(x[:-1], y[:-1])
    right, bottom = np.meshgrid(x[1:], y[1:])
    return np.stack([left, top, right, bottom], axis=-1)
