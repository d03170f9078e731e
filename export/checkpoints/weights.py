"""Writes a checkpoint's weights into a bundle once, and returns the place of each tensor.

If no tensor needs a change, files are copied as they are (by reflink if the file system can), and graphs point into them by
offset. Otherwise the used tensors are converted and streamed piece by piece into one new file. A second thread hashes the
files while they are written, as reading 14 GB again would take longer.
"""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trio_edge.export.checkpoints.stored import StoredName, StoredWeights
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.manifest import StoredTensor
from trio_edge.runtime.bundle.reader import sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.checkpoints.safetensors import SourceTensor
    from trio_edge.runtime.bundle.manifest import FloatType

WEIGHTS_FOLDER = "weights"
SAFETENSORS_FROM_DTYPE = {"float32": "F32", "float16": "F16"}
_ELEMENT_BYTES = {"F32": 4, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}
_TORCH_FROM_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_TORCH_FROM_INTEGERS = {"I32": torch.int32, "U8": torch.uint8}
_PIECE_BYTES = 8 << 20  # a multiple of all element sizes; limits the memory of an export
_FICLONE = 0x40049409  # Linux: share a whole file's extents


def store_weights(
    checkpoint: Checkpoint,
    names: set[str],
    bundle: Path,
    *,
    dtype: FloatType,
    whole_files: bool = True,
    on_bytes: Callable[[int], None],
) -> StoredWeights:
    """Write the tensors ``names`` of ``checkpoint`` into ``bundle``; memory does not grow with the model.

    A conversion rounds to the nearest value of ``dtype``. Values too small for it become subnormal or zero; values that are
    too large, infinite or NaN are refused. The values of copied files are not read.

    Args:
        checkpoint: Source of the weights.
        names: Canonical names that the graphs and the embedding table use.
        bundle: Folder being written.
        dtype: Element type of all weights in the bundle.
        whole_files: Whether files that need no change are copied, including tensors that are not in ``names``.
        on_bytes: Called with the number of bytes just written and hashed.

    Raises:
        CheckpointError: If a tensor is missing, is not floating point, or has values that ``dtype`` cannot hold, or if a
            file cannot be read to its end.
    """
    sources = {name: checkpoint.tensor(name) for name in sorted(names)}
    for name, source in sources.items():
        if source.dtype not in _TORCH_FROM_SAFETENSORS:
            raise CheckpointError(
                f"{source.file} tensor {name!r}: expected floating point weights, got {source.dtype};"
                " export the checkpoint that was not quantized"
            )
    (bundle / WEIGHTS_FOLDER).mkdir(exist_ok=True)
    if whole_files and all(source.dtype == SAFETENSORS_FROM_DTYPE[dtype] for source in sources.values()):
        return _copy_files(sources, bundle, dtype=dtype, on_bytes=on_bytes)
    return _convert(sources, bundle, dtype=dtype, on_bytes=on_bytes)


def bytes_to_write(
    checkpoint: Checkpoint, names: set[str], *, dtype: FloatType, whole_files: bool = True
) -> int:
    """Return the number of bytes that ``store_weights`` writes, for progress and the check of free space."""
    sources = [checkpoint.tensor(name) for name in names]
    if whole_files and all(source.dtype == SAFETENSORS_FROM_DTYPE[dtype] for source in sources):
        return sum(file.stat().st_size for file in {source.file for source in sources})
    size = np.dtype(dtype).itemsize
    return sum(size * math.prod(source.shape) for source in sources)


def _copy_files(
    sources: Mapping[str, SourceTensor], bundle: Path, *, dtype: FloatType, on_bytes: Callable[[int], None]
) -> StoredWeights:
    hashes = {}
    for file in sorted({source.file for source in sources.values()}):
        path = f"{WEIGHTS_FOLDER}/{file.name}"
        hashes[path] = _copy(file, bundle / path, on_bytes=on_bytes)
    tensors = {
        StoredName(name): StoredTensor(
            file=f"{WEIGHTS_FOLDER}/{source.file.name}", dtype=dtype, shape=source.shape, offset=source.offset
        )
        for name, source in sources.items()
    }
    return StoredWeights(tensors=tensors, sha256=hashes)


def _copy(source: Path, target: Path, *, on_bytes: Callable[[int], None]) -> str:
    """Copy a file, by reflink where the file system shares extents, and return its SHA-256."""
    if _clone(source, target):
        return sha256_of(target, on_bytes=on_bytes)
    with HashedFile(target) as writer:
        for piece in _pieces(source, offset=0, num_bytes=source.stat().st_size):
            writer.write(piece)
            on_bytes(len(piece))
        return writer.hexdigest()


def _clone(source: Path, target: Path) -> bool:
    """Make ``target`` share the extents of ``source``; return False if the file system cannot."""
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer, _FICLONE, reader.fileno())
        except OSError:  # another file system, or one without reflinks
            target.unlink()
            return False
    return True


class HashedFile:
    """A new file that a second thread hashes while it is written."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("xb")
        self._digest = sha256()
        self._thread = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        self._stream.close()

    def write(self, piece: bytes | memoryview) -> None:
        """Write and hash ``piece``, which the caller may reuse afterwards."""
        hashing = self._thread.submit(self._digest.update, piece)
        self._stream.write(piece)
        hashing.result()

    def hexdigest(self) -> str:
        """Return the SHA-256 of all written bytes."""
        return self._digest.hexdigest()


def _pieces(file: Path, *, offset: int, num_bytes: int) -> Iterator[memoryview]:
    """Yield part of a file in pieces; each piece is valid until the next one."""
    buffer = memoryview(bytearray(min(num_bytes, _PIECE_BYTES)))
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            remaining = num_bytes
            while remaining:
                piece = buffer[:remaining]
                filled = 0
                while filled < len(piece) and (count := stream.readinto(piece[filled:])):
                    filled += count
                if filled < len(piece):
                    raise CheckpointError(
                        f"{file}: expected {offset + num_bytes} bytes, got"
                        f" {offset + num_bytes - remaining + filled}; it changed while it was read, export again"
                    )
                yield piece
                remaining -= filled
    except OSError as error:
        raise CheckpointError(
            f"{file}: expected a readable file, got '{error.strerror}'; check the disk"
        ) from None


def _convert(
    sources: Mapping[str, SourceTensor], bundle: Path, *, dtype: FloatType, on_bytes: Callable[[int], None]
) -> StoredWeights:
    kind = SAFETENSORS_FROM_DTYPE[dtype]
    shapes = {name: source.shape for name, source in sources.items()}
    header, offsets = safetensors_header({name: (kind, shape) for name, shape in shapes.items()})
    path = f"{WEIGHTS_FOLDER}/model.safetensors"
    with HashedFile(bundle / path) as writer:
        writer.write(header)
        for name, source in sources.items():
            for piece in _pieces(source.file, offset=source.offset, num_bytes=source.num_bytes):
                values = _converted(piece, name, source, dtype=dtype)
                writer.write(values.view(torch.uint8).numpy().data)
                on_bytes(values.nbytes)
        digest = writer.hexdigest()
    tensors = {
        StoredName(name): StoredTensor(file=path, dtype=dtype, shape=shape, offset=offsets[name])
        for name, shape in shapes.items()
    }
    return StoredWeights(tensors=tensors, sha256={path: digest})


def safetensors_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """Return a file's header, and the absolute offset of each tensor.

    ``tensors`` are dtype and shape by name, in the order of their values in the file.
    """
    entries: dict[str, Any] = {}
    begin, begins = 0, {}
    for name, (dtype, shape) in tensors.items():
        end = begin + _ELEMENT_BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begins[name] = begin
        begin = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in begins.items()}


def _converted(piece: memoryview, name: str, source: SourceTensor, *, dtype: FloatType) -> torch.Tensor:
    """Return the values of ``piece`` in ``dtype``; raise CheckpointError if ``dtype`` cannot hold one of them."""
    raw = torch.frombuffer(piece, dtype=_TORCH_FROM_SAFETENSORS[source.dtype])
    values = raw.to(getattr(torch, dtype))
    if _all_finite(values):
        return values
    check_finite(raw, source, name=name)
    bad = raw[~torch.isfinite(values)][0].item()
    raise CheckpointError(
        f"{source.file} tensor {name!r}: expected values that {dtype} holds (at most"
        f" {torch.finfo(values.dtype).max:.6g}), got {bad:.6g}; export with --dtype float32"
    )


def check_finite(values: torch.Tensor, source: SourceTensor, *, name: str) -> None:
    """Raise CheckpointError if one of the ``values`` of tensor ``name`` is infinite or NaN."""
    if not _all_finite(values):
        bad = values[~torch.isfinite(values)][0].item()
        raise CheckpointError(
            f"{source.file} tensor {name!r}: expected finite weights, got {bad}; download the checkpoint again"
        )


def _all_finite(values: torch.Tensor) -> bool:
    """Return whether no value is infinite or NaN; 20 times as fast as ``isfinite().all()``."""
    return all(math.isfinite(bound.item()) for bound in torch.aminmax(values))


def read_tensor(source: SourceTensor) -> torch.Tensor:
    """Return a copy of one tensor's values in their stored type.

    Raises:
        CheckpointError: If the file cannot be read, or the type is not supported.
    """
    raw = bytearray(source.num_bytes)
    filled = 0
    for piece in _pieces(source.file, offset=source.offset, num_bytes=source.num_bytes):
        raw[filled : filled + len(piece)] = piece
        filled += len(piece)
    known = _TORCH_FROM_SAFETENSORS | _TORCH_FROM_INTEGERS
    if source.dtype not in known:
        raise CheckpointError(
            f"{source.file}: expected tensors of type {', '.join(known)}, got {source.dtype}; export another checkpoint"
        )
    dtype = known[source.dtype]
    if not raw:
        return torch.empty(source.shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).reshape(source.shape)


def store_constants(
    constants: Mapping[StoredName, NDArray[np.float32]], bundle: Path
) -> dict[StoredName, StoredTensor]:
    """Write float32 arrays that the export computed into one file, and return the place of each."""
    shapes = {name: values.shape for name, values in constants.items()}
    header, offsets = safetensors_header({str(name): ("F32", shape) for name, shape in shapes.items()})
    path = f"{WEIGHTS_FOLDER}/constants.safetensors"
    with (bundle / path).open("xb") as stream:
        stream.write(header)
        for values in constants.values():
            stream.write(np.ascontiguousarray(values, dtype=np.float32).data)
    return {
        name: StoredTensor(file=path, dtype="float32", shape=shape, offset=offsets[str(name)])
        for name, shape in shapes.items()
    }
