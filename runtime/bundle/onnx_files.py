"""Checks where a graph's weights lie, without the onnx package, which a target does not have.

An ONNX file is a protobuf message. Only ``ModelProto.graph.initializer`` is read: dims, data_type, name, external_data and
data_location. Backends follow these entries, and a wrong one would silently give other weights, or those of another file.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

from trio_edge.runtime.bundle.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    _Value: TypeAlias = "int | bytes"

MOST_BYTES = (1 << 31) - 1
"""Size of the largest protobuf message."""
# Field numbers of onnx.proto.
_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 13, 14
_KEY, _VALUE = 1, 2
_EXTERNAL = 1
_VARINT, _LENGTH = 0, 2
_FIXED = {1: 8, 5: 4}
"""Bytes of a value by the number of its type."""
# Bits of an element by TensorProto.DataType.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16}
_BITS |= dict.fromkeys((17, 18, 19, 20), 8) | {21: 4, 22: 4, 23: 4}


def check_weight_places(model: bytes, sizes: Mapping[str, int], *, where: Path) -> None:
    """Raise BundleError unless all weights of a graph, the bytes of ``where``, lie inside the bundle with their shape's size.

    ``sizes`` are the bytes of each file of the bundle, by its name.
    """
    try:
        for tensor in _initializers(model):
            _check(tensor, sizes, where=where)
    except (ValueError, IndexError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{where}: expected an ONNX graph, got {error}; export the bundle again") from None


def _initializers(model: bytes) -> Iterator[bytes]:
    for number, graph in _fields(model):
        if number == _MODEL_GRAPH and not isinstance(graph, int):
            for inner, tensor in _fields(graph):
                if inner == _GRAPH_INITIALIZER and not isinstance(tensor, int):
                    yield tensor


def _check(tensor: bytes, sizes: Mapping[str, int], *, where: Path) -> None:
    dims: list[int] = []
    places: dict[str, str] = {}
    name, data_type, is_external = "", 0, False
    for number, value in _fields(tensor):
        if number == _DIMS:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif number == _DATA_TYPE and isinstance(value, int):
            data_type = value
        elif number == _NAME and not isinstance(value, int):
            name = value.decode()
        elif number == _EXTERNAL_DATA and not isinstance(value, int):
            entry = {key: text.decode() for key, text in _fields(value) if not isinstance(text, int)}
            places[entry.get(_KEY, "")] = entry.get(_VALUE, "")
        elif number == _DATA_LOCATION:
            is_external = value == _EXTERNAL
    if not is_external and not places:
        return
    wanted = -(-math.prod(dims) * _BITS.get(data_type, 0) // 8)
    file = places.get("location", "")
    offset, length = int(places.get("offset", 0)), int(places.get("length", -1))
    if length != wanted or offset < 0 or offset + length > sizes.get(file, -1):
        raise BundleError(
            f"{where}: expected {wanted} bytes of {name[:80]!r} inside a file of the bundle, got {length} from byte {offset} of"
            f" {file[:80]!r}; export the bundle again"
        )


def _fields(message: bytes) -> Iterator[tuple[int, _Value]]:
    """Yield the number and the value of each field, an int or bytes; raise ValueError or IndexError for a broken message."""
    place, end = 0, len(message)
    while place < end:
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == _VARINT:
            value, place = _varint(message, place)
            yield tag >> 3, value
            continue
        if kind == _LENGTH:
            length, place = _varint(message, place)
        elif (length := _FIXED.get(kind, 0)) == 0:
            raise ValueError("a field of unknown type")
        if length > end - place:
            raise IndexError("a field that is cut short")
        yield tag >> 3, message[place : place + length]
        place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Return a whole number and the place after it."""
    value = message[place]
    if value < 0x80:  # nearly all of them
        return value, place + 1
    value = 0
    for shift in range(0, 70, 7):
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number with too many bytes")


def _varints(packed: bytes) -> list[int]:
    place, values = 0, []
    while place < len(packed):
        value, place = _varint(packed, place)
        values.append(value)
    return values
