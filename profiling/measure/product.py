"""A bundle whose graphs are one matrix product each: any backend can load it, and trio-build can build it, to be timed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from trio_edge.runtime.bundle.manifest import (
    MANIFEST_NAME,
    FileEntry,
    GraphSpec,
    Profile,
    TensorSpec,
    json_from_manifest,
)
from trio_edge.runtime.bundle.reader import Bundle
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import Manifest, Role

PRODUCT_GRAPH, PRODUCT_PROFILE = "head", "matmul"
_FILE, _WEIGHTS_FILE = "matmul.onnx", "weights.bin"
_INPUT, _OUTPUT = "rows", "product"
_ELEMENT_TYPES = {"float32": 1, "float16": 10}
_SEED = 0
# product [S, S] = rows [S, S] x weights of opset 18, as onnx serializes it; %c are rows and columns of the weights, in two bytes
# each, and the element type. It is bytes because machines that bundles are profiled on have no onnx; a test compares them with
# what onnx writes. The weights are constants in a file of their own, as a bundle's, so that backends can lay them out.
_MODEL = (
    b'\x08\x08\x12\x00:\x8f\x01\n \n\x04rows\n\x07weights\x12\x07product"\x06MatMul\x12\x06matmul'
    b"*,\x08%c%c\x08%c%c\x10%cB\x07weightsj\x17\n\x08location\x12\x0bweights.binp\x01"
    b"Z\x18\n\x04rows\x12\x10\n\x0e\x08%c\x12\n\n\x03\x12\x01S\n\x03\x12\x01S"
    b"b\x1b\n\x07product\x12\x10\n\x0e\x08%c\x12\n\n\x03\x12\x01S\n\x03\x12\x01SB\x04\n\x00\x10\x12"
)


def product_model(dtype: str, *, size: int) -> bytes:
    """Return the ONNX model of the product, whose weights [size, size] are in ``weights.bin`` next to it.

    Args:
        dtype: "float32" or "float16".
        size: Rows and columns of the weights; below 16384, as two bytes hold 14 bits of a number.
    """
    rows = (size & 0x7F | 0x80, size >> 7)
    return _MODEL % (*rows, *rows, *(_ELEMENT_TYPES[dtype],) * 3)


def write_product_bundle(folder: Path, manifest: Manifest, *, size: int) -> Bundle:
    """Write the product [size, size] x [size, size] and a manifest into ``folder``, and return the bundle.

    Args:
        folder: An empty folder.
        manifest: Manifest of another bundle; the product has its dtype.
        size: Rows and columns of the matrices.
    """
    contents = {
        _FILE: product_model(manifest.dtype, size=size),
        _WEIGHTS_FILE: _random(manifest, size=size).tobytes(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    entries = [
        FileEntry(path=name, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    ]
    # A manifest must have vision, decoder and head; all of them are the product, and only the head is loaded.
    product = msgspec.structs.replace(
        manifest,
        schedule=Schedule(),
        token_method=None,
        token_keep=None,
        clip_text=None,
        graphs=(
            _graph("vision", manifest, size=size),
            _graph("prefix", manifest, size=size, num_layers=manifest.dimensions.num_layers),
            _graph("head", manifest, size=size),
        ),
        files=(*manifest.files, *entries),
    )
    (folder / MANIFEST_NAME).write_bytes(json_from_manifest(product))
    return Bundle(folder=folder, manifest=product)


def product_inputs(manifest: Manifest, *, size: int) -> dict[str, NDArray[Any]]:
    """Return the input [size, size] of the product by its name."""
    return {_INPUT: _random(manifest, size=size)}


def _random(manifest: Manifest, *, size: int) -> NDArray[Any]:
    """Return normal random numbers [size, size], the same each time."""
    # A GPU multiplies equal numbers with less power than random ones, so at a higher clock.
    values = np.random.default_rng(_SEED).standard_normal((size, size), np.float32)
    return values.astype(manifest.dtype)


def _graph(role: Role, manifest: Manifest, *, size: int, num_layers: int = 0) -> GraphSpec:
    rows, product = (
        TensorSpec(name=name, dtype=manifest.dtype, shape=("S", "S")) for name in (_INPUT, _OUTPUT)
    )
    return GraphSpec(
        name=role,
        role=role,
        file=_FILE,
        inputs=(rows,),
        outputs=(product,),
        profiles=(Profile(name=PRODUCT_PROFILE, sizes={"S": size}),),
        weight_bytes=size * size * (2 if manifest.dtype == "float16" else 4),
        first_layer=0 if num_layers else None,
        num_layers=num_layers,
    )
