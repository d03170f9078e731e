"""What the constants of all kinds of picture processing share: their rules, their JSON, and how checkpoints name them.

``PixelConstants`` says which of them ``image_normalize`` calculates with; the rest differs from kind to kind.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from trio_edge.runtime.errors import CheckpointError, ManifestError
from trio_edge.runtime.image_resize import Resample

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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
