"""JSON values to typed objects, from any thread."""

from __future__ import annotations

import threading
from typing import TypeVar

import msgspec

_T = TypeVar("_T")
_LOCK = threading.Lock()


def typed(value: object, kind: type[_T]) -> _T:
    """Return a decoded JSON value as a ``kind``.

    Args:
        value: Of ``msgspec.json.decode``.
        kind: A ``msgspec.Struct``.

    Raises:
        msgspec.ValidationError: If a key is unknown or missing, or a value does not fit.
    """
    # msgspec 0.22 ends the process if two threads use a class for the first time at once: two pipelines being loaded did.
    with _LOCK:
        return msgspec.convert(value, kind, strict=True)
