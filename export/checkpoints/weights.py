"""A checkpoint's safetensors files, and the weight files of a bundle, into which each weight is written once.

Of a checkpoint's file only the header is read, which has the place of each tensor; the values stay on disk. If no tensor
needs a change, files are copied as they are (by reflink if the file system can), and graphs point into them by offset.
Otherwise the used tensors are converted and streamed piece by piece into one new file. A second thread hashes the files while
they are written, as reading 14 GB again would take longer.
"""

from __future__ import annotations

import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from trio_edge.export.checkpoints.hub import first_line
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.manifest import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import FloatType, StoredType

WEIGHTS_FOLDER = "weights"
_FILE_TYPES = {
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int8": "I8",
    "int4": "U8",
    "float8_e4m3fn": "F8_E4M3",
}
"""Safetensors' names; it has no INT4, whose bytes are written as U8."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_READABLE = {**_FLOATS, "I32": torch.int32, "U8": torch.uint8}
_PIECE_BYTES = 8 << 20  # a multiple of all element sizes; limits the memory of an export
_FICLONE = 0x40049409  # Linux: share a whole file's extents


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceTensor:
    """The place of one tensor's raw little-endian values in a checkpoint."""

    file: Path
    dtype: str
    """Safetensors name: "F32", "F16", "BF16", …"""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


def read_safetensors_header(file: Path) -> dict[str, SourceTensor]:
    """Return every tensor of a safetensors file with its absolute offset; the values are not read.

    Raises:
        CheckpointError: If the header is broken or the file is shorter or longer than the header says.
    """
    try:
        with safe_open(file, framework="numpy"):
            pass  # checks the header, each entry and the file's length, but has no offsets
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_bytes))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: expected a complete safetensors file, got a broken one ({first_line(error)}); download it again"
        ) from None
    header.pop("__metadata__", None)
    return {name: _source(file, 8 + header_bytes, **entry) for name, entry in header.items()}


def _source(
    file: Path, start: int, *, dtype: str, shape: list[int], data_offsets: tuple[int, int]
) -> SourceTensor:
    begin, end = data_offsets
    return SourceTensor(
        file=file, dtype=dtype, shape=tuple(shape), offset=start + begin, num_bytes=end - begin
    )


class Change(Enum):
    """A difference between a checkpoint's tensor and a stored array; its value is part of the array's name."""

    ROWS = "rows"
    """A table of rows, which is not transposed; other weights are."""
    SMOOTHED = "smoothed"
    """Multiplied by the factors of a calibration."""
    UNPACKED = "unpacked"
    """Floating point, from the checkpoint's integers."""
    INT4 = "int4"
    INT8 = "int8"
    FP8 = "fp8"
    SCALE = "scale"
    """The scales instead of the values."""
    COLUMNS = "columns"
    """The places of the outliers."""
    OUTLIERS = "outliers"
    """The columns that are not rounded."""


@dataclass(frozen=True, slots=True)
class StoredName:
    """Identifies one array of a bundle, which can store a weight in several forms.

    The weight also has a name in the checkpoint's files and an initializer name in each graph that reads it.
    """

    tensor: str
    """Canonical name in the checkpoint; for a graph's constant, the names of graph and constant."""
    changes: tuple[Change, ...] = ()
    """In the order of ``Change``; empty for the checkpoint's own values."""

    def part(self, change: Change) -> StoredName:
        """Return the name of another array of the same weight."""
        return StoredName(self.tensor, (*self.changes, change))

    @property
    def scales(self) -> StoredName:
        """Name of this array's scales."""
        return self.part(Change.SCALE)

    def __str__(self) -> str:
        """Return the name in the safetensors file."""
        return ".".join([self.tensor, *(change.value for change in self.changes)])


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredWeights:
    """The written arrays, and the hashes of their files."""

    tensors: dict[StoredName, StoredTensor]
    sha256: dict[str, str]
    """SHA-256 of every file, by its path in the bundle."""

    def with_more(self, other: StoredWeights) -> StoredWeights:
        """Return the arrays and files of both."""
        return StoredWeights(tensors=self.tensors | other.tensors, sha256=self.sha256 | other.sha256)


def bytes_to_write(sources: Mapping[str, SourceTensor], *, dtype: FloatType, whole_files: bool = True) -> int:
    """Return the number of bytes that ``store_weights`` writes, for progress and the check of free space."""
    if whole_files and _need_no_change(sources, dtype):
        return sum(file.stat().st_size for file in {source.file for source in sources.values()})
    return sum(np.dtype(dtype).itemsize * math.prod(source.shape) for source in sources.values())


def _need_no_change(sources: Mapping[str, SourceTensor], dtype: FloatType) -> bool:
    files = {source.file for source in sources.values()}
    has_names = len({file.name for file in files}) == len(files)  # the bundle has one folder for them
    # A piece of a file divides no number whose place is a multiple of its size.
    size = np.dtype(dtype).itemsize
    return has_names and all(
        source.dtype == _FILE_TYPES[dtype] and source.offset % size == 0 for source in sources.values()
    )


def store_weights(
    sources: Mapping[str, SourceTensor],
    bundle: Path,
    *,
    dtype: FloatType,
    whole_files: bool = True,
    on_bytes: Callable[[int], None],
) -> StoredWeights:
    """Write ``sources`` into ``bundle``; memory does not grow with the model.

    A conversion rounds to the nearest value of ``dtype``. Values too small for it become subnormal or zero; values that are
    too large, infinite or NaN are refused.

    Args:
        sources: The tensors that the graphs and the embedding table use, by canonical name.
        bundle: Folder being written.
        dtype: Element type of all weights in the bundle.
        whole_files: Whether files that need no change are copied, including tensors that are not in ``sources``.
        on_bytes: Called with the number of bytes just written and hashed.

    Raises:
        CheckpointError: If a tensor is not floating point, or has values that ``dtype`` cannot hold, or if a file cannot be
            read to its end.
    """
    for name, source in sources.items():
        if source.dtype not in _FLOATS:
            raise CheckpointError(
                f"{source.file} tensor {name!r}: expected floating point weights, got {source.dtype};"
                " export the checkpoint that was not quantized"
            )
    (bundle / WEIGHTS_FOLDER).mkdir(exist_ok=True)
    if whole_files and _need_no_change(sources, dtype):
        return _copy_files(sources, bundle, dtype=dtype, on_bytes=on_bytes)
    return write_arrays(
        bundle / WEIGHTS_FOLDER / "model.safetensors",
        {StoredName(name): (dtype, source.shape) for name, source in sources.items()},
        (
            _converted(piece, name, source, dtype=dtype)
            for name, source in sources.items()
            for piece in _pieces(source.file, offset=source.offset, num_bytes=source.num_bytes)
        ),
        on_bytes=on_bytes,
    )


def _copy_files(
    sources: Mapping[str, SourceTensor], bundle: Path, *, dtype: FloatType, on_bytes: Callable[[int], None]
) -> StoredWeights:
    """Copy the files of ``sources``, by reflink where the file system shares extents."""
    paths = {source.file: f"{WEIGHTS_FOLDER}/{source.file.name}" for source in sources.values()}
    hashes = {}
    for file, path in sorted(paths.items()):
        own = {name: source for name, source in sources.items() if source.file == file}
        pieces = _finite(_pieces(file, offset=0, num_bytes=file.stat().st_size), own)
        is_cloned = _clone(file, bundle / path)
        hashes[path] = _write_hashed(None if is_cloned else bundle / path, pieces, on_bytes=on_bytes)
    tensors = {
        StoredName(name): StoredTensor(
            file=paths[source.file], dtype=dtype, shape=source.shape, offset=source.offset
        )
        for name, source in sources.items()
    }
    return StoredWeights(tensors=tensors, sha256=hashes)


def _finite(pieces: Iterable[memoryview], sources: Mapping[str, SourceTensor]) -> Iterator[memoryview]:
    """Yield the pieces of a whole file after a check of the values of ``sources`` in them."""
    waiting = sorted(sources.items(), key=lambda item: item[1].offset)
    start = 0
    for piece in pieces:
        end = start + len(piece)
        while waiting and waiting[0][1].offset < end:
            name, source = waiting[0]
            last = source.offset + source.num_bytes
            values = piece[max(source.offset - start, 0) : last - start]
            if len(values):
                check_finite(torch.frombuffer(values, dtype=_FLOATS[source.dtype]), source, name=name)
            if last > end:
                break
            waiting.pop(0)
        yield piece
        start = end


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


def _write_hashed(
    path: Path | None, pieces: Iterable[memoryview], *, header: bytes = b"", on_bytes: Callable[[int], None]
) -> str:
    """Write a new file, if there is a ``path``, and return its SHA-256; each piece is read before the next one is made."""
    digest = sha256(header)
    with (
        Path(os.devnull).open("wb") if path is None else path.open("xb") as stream,
        ThreadPoolExecutor(max_workers=1) as thread,
    ):
        stream.write(header)
        for piece in pieces:
            hashing = thread.submit(digest.update, piece)
            stream.write(piece)
            hashing.result()
            on_bytes(len(piece))
    return digest.hexdigest()


def write_arrays(
    path: Path,
    arrays: Mapping[StoredName, tuple[StoredType, tuple[int, ...]]],
    values: Iterable[torch.Tensor],
    *,
    on_bytes: Callable[[int], None] = lambda _count: None,
) -> StoredWeights:
    """Write ``arrays``, dtype and shape by name, into the new safetensors file ``path``, and return the place of each.

    ``path`` is in the weights' folder of a bundle. ``values`` are all elements in order, in pieces of any size, INT4 two in a
    byte. ``on_bytes`` is called with the number of bytes just written and hashed.
    """
    file = f"{WEIGHTS_FOLDER}/{path.name}"
    entries: dict[str, Any] = {}
    tensors, end = {}, 0
    for name, (dtype, shape) in arrays.items():
        tensors[name] = tensor = StoredTensor(file=file, dtype=dtype, shape=shape, offset=end)
        end += tensor.num_bytes
        entries[str(name)] = {
            "dtype": _FILE_TYPES[dtype],
            "shape": [tensor.num_bytes] if dtype == "int4" else list(shape),
            "data_offsets": [tensor.offset, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    pieces = (piece.contiguous().view(torch.uint8).flatten().numpy().data for piece in values)
    digest = _write_hashed(path, pieces, header=header, on_bytes=on_bytes)
    return StoredWeights(
        tensors={
            name: msgspec.structs.replace(tensor, offset=len(header) + tensor.offset)
            for name, tensor in tensors.items()
        },
        sha256={file: digest},
    )


def store_constants(constants: Mapping[StoredName, NDArray[np.float32]], bundle: Path) -> StoredWeights:
    """Write float32 arrays that the export computed into one file, and return the place of each."""
    return write_arrays(
        bundle / WEIGHTS_FOLDER / "constants.safetensors",
        {name: ("float32", values.shape) for name, values in constants.items()},
        (torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)) for values in constants.values()),
    )


def _pieces(file: Path, *, offset: int, num_bytes: int) -> Iterator[memoryview]:
    """Yield part of a file in pieces; each piece is valid until the next one."""
    buffer = memoryview(bytearray(min(num_bytes, _PIECE_BYTES)))
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            for begin in range(0, num_bytes, _PIECE_BYTES):
                piece = buffer[: num_bytes - begin]
                if (count := stream.readinto(piece)) < len(piece):
                    raise CheckpointError(
                        f"{file}: expected {offset + num_bytes} bytes, got {offset + begin + count}; it changed while it was"
                        " read, export again"
                    )
                yield piece
    except OSError as error:
        raise CheckpointError(
            f"{file}: expected a readable file, got '{error.strerror}'; check the disk"
        ) from None


def _converted(piece: memoryview, name: str, source: SourceTensor, *, dtype: FloatType) -> torch.Tensor:
    """Return the values of ``piece`` in ``dtype``; raise CheckpointError if ``dtype`` cannot hold one of them."""
    raw = torch.frombuffer(piece, dtype=_FLOATS[source.dtype])
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
    """Return whether no value is infinite or NaN, by its bits without the sign; 40 times as fast as ``isfinite().all()``."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    infinite = torch.tensor(math.inf, dtype=values.dtype).view(kind).item()
    bits: NDArray[np.integer] = values.contiguous().view(kind).numpy()
    return bool((bits & np.iinfo(bits.dtype).max).max(initial=0) < infinite)


def read_tensor(source: SourceTensor) -> torch.Tensor:
    """Return a copy of one tensor's values in their stored type.

    Raises:
        CheckpointError: If the file cannot be read, or the type is not supported.
    """
    raw = bytearray()
    for piece in _pieces(source.file, offset=source.offset, num_bytes=source.num_bytes):
        raw += piece
    if source.dtype not in _READABLE:
        raise CheckpointError(
            f"{source.file}: expected tensors of type {', '.join(_READABLE)}, got {source.dtype}; export another checkpoint"
        )
    dtype = _READABLE[source.dtype]
    if not raw:
        return torch.empty(source.shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).reshape(source.shape)
