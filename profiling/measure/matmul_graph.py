"""Writes the smallest ONNX model: one product with a constant matrix, to measure what a backend's products reach.

The runtime has no onnx to write it with; five messages of a stable format are enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import FloatType

INPUT, OUTPUT, WEIGHTS = "rows", "product", "weights"
_IR_VERSION = 8
_ELEMENT_TYPES = {"float32": 1, "float16": 10}
_LENGTH_DELIMITED = 2
_SEED = 0


def matmul_model(*, rows: int, size: int, dtype: FloatType, opset: int) -> bytes:
    """Return the model [rows, size] x [size, size], whose weights are random numbers.

    Args:
        rows: Of the input.
        size: Of the square matrix.
        dtype: Of input, weights and output.
        opset: Of the standard operators.
    """
    weights = random_matrix(rows=size, columns=size, dtype=dtype)
    kind = _ELEMENT_TYPES[dtype]
    node = _text(1, INPUT) + _text(1, WEIGHTS) + _text(2, OUTPUT) + _text(4, "MatMul")
    tensor = _number(1, size) * 2 + _number(2, kind) + _text(8, WEIGHTS) + _bytes(9, weights.tobytes())
    graph = (
        _bytes(1, node)
        + _text(2, "matmul")
        + _bytes(5, tensor)
        + _bytes(11, _value(INPUT, (rows, size), kind))
        + _bytes(12, _value(OUTPUT, (rows, size), kind))
    )
    return _number(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, _number(2, opset))


def random_matrix(*, rows: int, columns: int, dtype: FloatType) -> NDArray[Any]:
    """Return [rows, columns] normal random numbers, the same each time."""
    return np.random.default_rng(_SEED).standard_normal((rows, columns), np.float32).astype(dtype)


def _value(name: str, shape: tuple[int, ...], kind: int) -> bytes:
    dimensions = b"".join(_bytes(1, _number(1, size)) for size in shape)
    return _text(1, name) + _bytes(2, _bytes(1, _number(1, kind) + _bytes(2, dimensions)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
