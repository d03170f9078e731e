"""The parts of image processing that all families share: JSON, pixel arithmetic, and keys of checkpoints' files."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeAlias, TypeVar

import msgspec
import numpy as np

from trio_edge.runtime.bundle.errors import CheckpointError, ManifestError
from trio_edge.runtime.bundle.limits import typed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.images.resizing import Resample

Size: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 28)]
"""Pixels along a side or in all; the bound lies far above any image that fits a machine."""
# The bounds refuse infinity and NaN, which Python's JSON files may hold; real values lie far inside.
Level: TypeAlias = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
Factor: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Colour: TypeAlias = tuple[Level, Level, Level]
"""Red, green, blue."""
Spread: TypeAlias = tuple[Factor, Factor, Factor]

# CLIP's mean and deviation, which are the defaults of Hugging Face's classes.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_RESAMPLE_OF_ID: dict[object, Resample] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_NOT_FOLLOWED = ("use_square_size", "pad_size")
_PIXELS = ("do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std")
_Constants = TypeVar("_Constants", bound="ImageConstants")


class ImageConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every family's image processing: the constants of the manifest's ``image_processing``, in this order."""

    encoder_keep: int | None = None
    """Patches per tile, or visual tokens per image, that the vision graph keeps; None for all. Not part of the JSON."""

    def of_several(self: _Constants) -> _Constants:
        """Return the processing for a prompt with several images: by default the same."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the constants as JSON types, with "kind"."""
        values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        del values["encoder_keep"]
        return values

    @classmethod
    def from_dict(
        cls: type[_Constants], values: Mapping[str, Any], *, encoder_keep: int | None = None
    ) -> _Constants:
        """Return what ``to_dict`` wrote.

        Raises:
            ManifestError: If it is of another kind, a key is unknown or missing, or a value is out of range.
        """
        try:
            return typed({**values, "encoder_keep": encoder_keep}, cls)
        except msgspec.ValidationError as error:
            raise ManifestError(f"image_processing: {error}") from None


class PixelConstants(Protocol):
    """Constants that turn 8-bit levels into the vision encoder's numbers."""

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
    def image_mean(self) -> Colour:
        """Mean after rescaling."""

    @property
    def image_std(self) -> Colour:
        """Standard deviation after rescaling."""


def normalized(levels: NDArray[np.uint8], constants: PixelConstants) -> NDArray[np.float32]:
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
    config: Mapping[str, Any], *, processors: tuple[str, ...], always: tuple[str, ...]
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
        expected = f"{', '.join(first)} or {last}" if first else last
        raise CheckpointError(
            f"preprocessor_config image_processor_type: expected {expected}, got"
            f" {config.get('image_processor_type')!r}"
        )
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
