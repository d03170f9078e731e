"""Finds a checkpoint and reads what it holds, without reading its weights.

A checkpoint is a folder as ``save_pretrained`` writes it: ``config.json``, safetensors files (one, or shards with an
index), tokenizer and processor files. ``locate`` turns what a user types into such a folder: a local path, the
packaged model ``tiny``, an alias, or a Hub id (``export/checkpoints/hub.py``). Only safetensors are read, and no code is run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trio_edge.runtime.bundle.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

_MAX_HEADER_BYTES = 100_000_000


_DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceTensor:
    """One tensor of a checkpoint: where its raw little-endian values lie."""

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

    def broken(reason: str) -> CheckpointError:
        return CheckpointError(
            f"{file}: expected a complete safetensors file, got {reason}; download it again"
        )

    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
                raise broken(f"{size} bytes and a header of {header_bytes}")
            header = json.loads(stream.read(header_bytes))
    except OSError as error:
        raise broken(error.strerror or "an unreadable file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise broken("a broken header") from None
    if not isinstance(header, dict):
        raise broken("a broken header")
    header.pop("__metadata__", None)
    start, tensors, end = 8 + header_bytes, {}, 8 + header_bytes
    for name, entry in header.items():
        try:
            begin, stop = (int(offset) for offset in entry["data_offsets"])
            shape = tuple(int(axis) for axis in entry["shape"])
            count = _DTYPE_BYTES.get(entry["dtype"], 0)
        except (KeyError, TypeError, ValueError):
            raise broken(f"a broken entry {name!r}") from None
        if not 0 <= begin <= stop:
            raise broken(f"offsets {begin}..{stop} for {name!r}")
        for axis in shape:
            count *= axis
        if entry["dtype"] in _DTYPE_BYTES and count != stop - begin:
            raise broken(f"{stop - begin} bytes for {name!r} of shape {list(shape)}")
        end = max(end, start + stop)
        tensors[name] = SourceTensor(
            file=file, dtype=entry["dtype"], shape=shape, offset=start + begin, num_bytes=stop - begin
        )
    if end != size:
        raise broken(f"{size} bytes where its header says {end}")
    return tensors
