"""Reads the header of a safetensors file, which has the place of each tensor; the values stay on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from trio_edge.export.checkpoints.hub import first_line
from trio_edge.runtime.bundle.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


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
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = SourceTensor(
            file=file,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + header_bytes + begin,
            num_bytes=end - begin,
        )
    return tensors
