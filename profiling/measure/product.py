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
_FILE = "matmul.onnx"
_ELEMENT_TYPES = {"float32": 1, "float16": 10}
_INPUTS, _OUTPUT = ("rows", "weights"), "product"
_SEED = 0
# product [S, S] = rows [S, S] x weights [S, S] of opset 18, as onnx serializes it; %c is the type of their elements.
# The bytes are here because the onnx package is not where bundles are profiled; a test writes them with it and compares.
_MODEL = (
    b'\x08\x08\x12\x00:~\n \n\x04rows\n\x07weights\x12\x07product"\x06MatMul\x12\x06matmul'
    b"Z\x18\n\x04rows\x12\x10\n\x0e\x08%c\x12\n\n\x03\x12\x01S\n\x03\x12\x01S"
    b"Z\x1b\n\x07weights\x12\x10\n\x0e\x08%c\x12\n\n\x03\x12\x01S\n\x03\x12\x01S"
    b"b\x1b\n\x07product\x12\x10\n\x0e\x08%c\x12\n\n\x03\x12\x01S\n\x03\x12\x01SB\x04\n\x00\x10\x12"
)


def product_model(dtype: str) -> bytes:
    """Return the ONNX model of the product in ``dtype``, "float32" or "float16"."""
    return _MODEL % ((_ELEMENT_TYPES[dtype],) * 3)


def write_product_bundle(folder: Path, manifest: Manifest, *, size: int) -> Bundle:
    """Write the product [size, size] x [size, size] and a manifest into ``folder``, and return the bundle.

    Args:
        folder: An empty folder.
        manifest: Manifest of another bundle; the product has its dtype.
        size: Rows and columns of the matrices.
    """
    model = product_model(manifest.dtype)
    (folder / _FILE).write_bytes(model)
    entry = FileEntry(path=_FILE, num_bytes=len(model), sha256=hashlib.sha256(model).hexdigest())
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
        files=(*manifest.files, entry),
    )
    (folder / MANIFEST_NAME).write_bytes(json_from_manifest(product))
    return Bundle(folder=folder, manifest=product)


def product_inputs(manifest: Manifest, *, size: int) -> dict[str, NDArray[Any]]:
    """Return normal random numbers [size, size] for each input, the same each time."""
    # Random, for a GPU multiplies matrices of equal numbers with less power, so at a higher clock.
    generator = np.random.default_rng(_SEED)
    return {
        name: generator.standard_normal((size, size), np.float32).astype(manifest.dtype) for name in _INPUTS
    }


def _graph(role: Role, manifest: Manifest, *, size: int, num_layers: int = 0) -> GraphSpec:
    *inputs, output = (
        TensorSpec(name=name, dtype=manifest.dtype, shape=("S", "S")) for name in (*_INPUTS, _OUTPUT)
    )
    return GraphSpec(
        name=role,
        role=role,
        file=_FILE,
        inputs=tuple(inputs),
        outputs=(output,),
        profiles=(Profile(name=PRODUCT_PROFILE, sizes={"S": size}),),
        weight_bytes=0,
        first_layer=0 if num_layers else None,
        num_layers=num_layers,
    )
