"""Writes a checkpoint's weights into a bundle, once, and says where each tensor lies.

A file whose tensors need no change is copied as it is (by reflink where the file system can); graphs then point into it
by offset. Otherwise the tensors that the graphs use are converted and streamed, one at a time, into one new file.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trio_edge.runtime.errors import CheckpointError
from trio_edge.runtime.manifest import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from trio_edge.export.checkpoint import Checkpoint, SourceTensor
    from trio_edge.runtime.manifest import FloatType

WEIGHTS_FOLDER = "weights"
_SAFETENSORS_FROM_DTYPE = {"float32": "F32", "float16": "F16"}
_TORCH_FROM_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_COPY_CHUNK_BYTES = 64 << 20


def store_weights(
    checkpoint: Checkpoint,
    names: set[str],
    bundle: Path,
    *,
    dtype: FloatType,
    on_bytes: Callable[[int], None],
) -> dict[str, StoredTensor]:
    """Write the tensors ``names`` of ``checkpoint`` into ``bundle`` and return where each one is.

    Args:
        checkpoint: Source of the weights.
        names: Canonical names that the graphs and the embedding table use.
        bundle: Folder being written.
        dtype: Wanted element type of all weights.
        on_bytes: Called with the number of bytes just written, for progress.

    Raises:
        CheckpointError: If a tensor is missing, is not floating point, or has values that ``dtype`` cannot hold.
    """
    sources = {name: checkpoint.tensor(name) for name in sorted(names)}
    for name, source in sources.items():
        if source.dtype not in _TORCH_FROM_SAFETENSORS:
            raise CheckpointError(
                f"{source.file} tensor {name!r}: expected floating point weights, got {source.dtype};"
                " export the checkpoint that was not quantized"
            )
    (bundle / WEIGHTS_FOLDER).mkdir(exist_ok=True)
    if all(source.dtype == _SAFETENSORS_FROM_DTYPE[dtype] for source in sources.values()):
        return _copy_files(sources, bundle, dtype=dtype, on_bytes=on_bytes)
    return _convert(sources, bundle, dtype=dtype, on_bytes=on_bytes)


def bytes_to_write(checkpoint: Checkpoint, names: set[str], *, dtype: FloatType) -> int:
    """Return how many bytes ``store_weights`` is going to write, for progress and for the check of free space."""
    sources = [checkpoint.tensor(name) for name in names]
    if all(source.dtype == _SAFETENSORS_FROM_DTYPE[dtype] for source in sources):
        return sum(file.stat().st_size for file in {source.file for source in sources})
    size = np.dtype(dtype).itemsize
    return sum(size * int(np.prod(source.shape, dtype=np.int64)) for source in sources)


def _copy_files(
    sources: Mapping[str, SourceTensor], bundle: Path, *, dtype: FloatType, on_bytes: Callable[[int], None]
) -> dict[str, StoredTensor]:
    for file in sorted({source.file for source in sources.values()}):
        _copy(file, bundle / WEIGHTS_FOLDER / file.name, on_bytes=on_bytes)
    return {
        name: StoredTensor(
            file=f"{WEIGHTS_FOLDER}/{source.file.name}", dtype=dtype, shape=source.shape, offset=source.offset
        )
        for name, source in sources.items()
    }


def _copy(source: Path, target: Path, *, on_bytes: Callable[[int], None]) -> None:
    """Copy a file in the kernel (a reflink where the file system shares extents), reporting progress."""
    with source.open("rb") as reader, target.open("xb") as writer:
        remaining = os.fstat(reader.fileno()).st_size
        while remaining:
            try:
                copied = os.copy_file_range(
                    reader.fileno(), writer.fileno(), min(remaining, _COPY_CHUNK_BYTES)
                )
            except (AttributeError, OSError):  # not on this platform, or between these two file systems
                shutil.copyfileobj(reader, writer, _COPY_CHUNK_BYTES)
                on_bytes(remaining)
                return
            remaining -= copied
            on_bytes(copied)


def _convert(
    sources: Mapping[str, SourceTensor], bundle: Path, *, dtype: FloatType, on_bytes: Callable[[int], None]
) -> dict[str, StoredTensor]:
    size = np.dtype(dtype).itemsize
    shapes = {name: source.shape for name, source in sources.items()}
    header, offsets = _safetensors_header(shapes, dtype=dtype, size=size)
    path = f"{WEIGHTS_FOLDER}/model.safetensors"
    with (bundle / path).open("xb") as stream:
        stream.write(header)
        for name, source in sources.items():
            values = _converted(name, source, dtype=dtype)
            stream.write(values.data)
            on_bytes(values.nbytes)
    return {
        name: StoredTensor(file=path, dtype=dtype, shape=shape, offset=offsets[name])
        for name, shape in shapes.items()
    }


def _safetensors_header(
    shapes: Mapping[str, tuple[int, ...]], *, dtype: FloatType, size: int
) -> tuple[bytes, dict[str, int]]:
    """Return a file's header and the absolute offset of each tensor behind it."""
    entries: dict[str, Any] = {}
    begin, begins = 0, {}
    for name, shape in shapes.items():
        end = begin + size * int(np.prod(shape, dtype=np.int64))
        entries[name] = {
            "dtype": _SAFETENSORS_FROM_DTYPE[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begins[name] = begin
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in begins.items()}


def _converted(name: str, source: SourceTensor, *, dtype: FloatType) -> NDArray[Any]:
    wanted = getattr(torch, dtype)
    raw = read_tensor(source)
    values = raw.to(wanted)
    if not torch.isfinite(values).all() and torch.isfinite(raw).all():
        largest = raw.abs().max().item()
        raise CheckpointError(
            f"{source.file} tensor {name!r}: expected values that {dtype} holds, got {largest:.4g};"
            " export with --dtype float32"
        )
    return values.numpy()


def read_tensor(source: SourceTensor) -> torch.Tensor:
    """Return a copy of one tensor's values, in the type in which they are stored."""
    dtype = _TORCH_FROM_SAFETENSORS[source.dtype]
    if source.num_bytes == 0:
        return torch.empty(source.shape, dtype=dtype)
    with source.file.open("rb") as stream:
        stream.seek(source.offset)
        raw = bytearray(stream.read(source.num_bytes))
    return torch.frombuffer(raw, dtype=dtype).reshape(source.shape)


def store_constants(constants: Mapping[str, NDArray[np.float32]], bundle: Path) -> dict[str, StoredTensor]:
    """Write arrays that export computed (float32) into a file of their own and return where each one is."""
    shapes = {name: values.shape for name, values in constants.items()}
    header, offsets = _safetensors_header(shapes, dtype="float32", size=4)
    path = f"{WEIGHTS_FOLDER}/constants.safetensors"
    with (bundle / path).open("xb") as stream:
        stream.write(header)
        for values in constants.values():
            stream.write(np.ascontiguousarray(values, dtype=np.float32).data)
    return {
        name: StoredTensor(file=path, dtype="float32", shape=shape, offset=offsets[name])
        for name, shape in shapes.items()
    }
