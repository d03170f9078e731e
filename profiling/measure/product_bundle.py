"""A bundle whose graphs are one matrix product each: what any backend can load, and trio-build can build, to be timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from trio_edge.profiling.measure.matmul_graph import INPUT, OUTPUT, matmul_model
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

    from trio_edge.runtime.bundle.manifest import Manifest, Role

PRODUCT_GRAPH, PRODUCT_PROFILE = "head", "matmul"
_FILE = "matmul.onnx"


def write_product_bundle(folder: Path, manifest: Manifest, *, size: int) -> Bundle:
    """Write the product [size, size] x [size, size] and a manifest into ``folder``, and return the bundle.

    Args:
        folder: An empty folder.
        manifest: Of another bundle; its type and opset are taken.
        size: Of the matrices.
    """
    model = matmul_model(rows=size, size=size, dtype=manifest.dtype, opset=manifest.opset)
    (folder / _FILE).write_bytes(model)
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
        files=(*manifest.files, FileEntry(path=_FILE, num_bytes=len(model), sha256="")),
    )
    (folder / MANIFEST_NAME).write_bytes(json_from_manifest(product))
    return Bundle(folder=folder, manifest=product)


def _graph(role: Role, manifest: Manifest, *, size: int, num_layers: int = 0) -> GraphSpec:
    rows, product = (
        TensorSpec(name=name, dtype=manifest.dtype, shape=(size, size)) for name in (INPUT, OUTPUT)
    )
    return GraphSpec(
        name=role,
        role=role,
        file=_FILE,
        inputs=(rows,),
        outputs=(product,),
        profiles=(Profile(name=PRODUCT_PROFILE, sizes={}),),
        weight_bytes=size * size * (2 if manifest.dtype == "float16" else 4),
        first_layer=0 if num_layers else None,
        num_layers=num_layers,
    )
