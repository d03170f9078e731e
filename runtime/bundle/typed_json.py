"""JSON values to typed objects, from any thread."""

from __future__ import annotations

import threading
from typing import TypeVar

import msgspec

_T = TypeVar("_T")
_LOCK = threading.Lock()


def typed(value: object, kind: type[_T]) -> _T:
    """Return ``value``, decoded JSON, as an instance of ``kind``, a ``msgspec.Struct``.

    Raises:
        msgspec.ValidationError: If a key is unknown or missing, or a value does not fit.
    """
    # msgspec 0.22 crashes if two threads use a class for the first time at once, as when two pipelines are loaded.
    with _LOCK:
        return msgspec.convert(value, kind, strict=True)
