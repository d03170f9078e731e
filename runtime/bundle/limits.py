"""Typed reading of a bundle's JSON files, and bounds of the numbers and texts in them and in the user's input.

A manifest may come from anybody. A value outside its bound is refused with the name of its key before anything is
allocated. The bounds lie far above any model's numbers, and far below what would fill a machine.
"""

from __future__ import annotations

import threading
from numbers import Integral, Real
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec

MOST_TOKENS = 1 << 20
"""Longest prompt or answer in tokens that can be chosen. A mistyped number fails here, not when memory is full."""
MOST_TENSOR_BYTES = 1 << 44
"""Bytes of the largest tensor of a graph at any profile."""
MAX_JSON_BYTES = 64 << 20
"""Size of the largest JSON file that is read; a large model's manifest has less than 1 MB."""

MAX_IMAGE_PIXELS = 1 << 26
"""Pixels above which an image is refused before decoding, unless the user allows more: 8192 x 8192."""
MOST_IMAGE_PIXELS = 1 << 31
"""Largest limit that a user can set."""

Tokens: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)]
Axis: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
"""Length of an axis of a tensor."""
Extent: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
"""Value of a symbol at a profile."""
Layer: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
Bytes: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Work: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""FLOPs, or a product of sizes."""
TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
# No control characters and no bidirectional marks, because commands print these names.
Name: TypeAlias = Annotated[
    str,
    msgspec.Meta(
        min_length=1,
        max_length=200,
        pattern=r"^[^\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]+\Z",
    ),
]
Symbol: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{1,8}\Z")]
"""Axis whose size depends on the profile."""
Digest: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""SHA-256 in hexadecimal."""


def is_number(value: object) -> bool:
    """Return whether ``value`` is a number; True is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Return whether ``value`` is a whole number; True and 2.0 are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


_T = TypeVar("_T")
_LOCK = threading.Lock()
_DECODERS: dict[Any, Any] = {}


def typed(value: object, kind: type[_T]) -> _T:
    """Return ``value``, decoded JSON, as an instance of ``kind``, a ``msgspec.Struct``; any thread may call this.

    Raises:
        msgspec.ValidationError: If a key is unknown or missing, or a value does not fit.
    """
    # msgspec 0.22 crashes if two threads use a class for the first time at once, as when two pipelines are loaded.
    with _LOCK:
        return msgspec.convert(value, kind, strict=True)


def typed_json(content: bytes | bytearray, kind: type[_T]) -> _T:
    """Return the JSON in ``content`` as a ``kind``; any thread may call this.

    Raises:
        msgspec.DecodeError: If it is no JSON; a ValidationError, if it does not fit.
        RecursionError: If it has too many nested levels.
        UnicodeDecodeError: If it is not UTF-8.
    """
    with _LOCK:  # as above: a decoder sets its classes up
        if kind not in _DECODERS:
            _DECODERS[kind] = msgspec.json.Decoder(kind)
    found: _T = _DECODERS[kind].decode(content)
    return found
