"""Finds a checkpoint and reads what it holds, without reading its weights.

A checkpoint is a folder as ``save_pretrained`` writes it: ``config.json``, safetensors files (one, or shards with an
index), tokenizer and processor files. ``locate`` turns what a user types into such a folder: a local path, the
packaged model ``tiny``, an alias, or a Hub id (through ``huggingface_hub``, so its cache, token and offline mode hold).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trio_edge.runtime.errors import CheckpointError

ALIASES = {
    "tiny": "the packaged demo model",
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-next-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-next-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava-next-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
}
TINY_FOLDER = Path(__file__).parent / "tiny"

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
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
# Checkpoints name the same tensor in several ways (before and after transformers 4.52); these rules give one name.
_CANONICAL_RULES = (
    (re.compile(r"^(?:model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?language_model\.(?:model\.)?"), "language_model."),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), "vision_tower."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\."), "multi_modal_projector."),
    (re.compile(r"^(?:model\.)?image_newline$"), "image_newline"),
)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A located checkpoint: its folder, its configuration, and every tensor under its canonical name."""

    folder: Path
    name: str
    """What the user asked for."""
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]

    def tensor(self, name: str) -> SourceTensor:
        """Return the tensor with canonical ``name``.

        Raises:
            CheckpointError: If the checkpoint does not have it.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.folder}: expected a tensor {name!r} for this architecture, got none among"
                f" {len(self.tensors)}; download the checkpoint again"
            )
        return self.tensors[name]


def canonical_name(name: str) -> str:
    """Return the one name we use for a tensor that checkpoints and transformers releases call differently."""
    for pattern, replacement in _CANONICAL_RULES:
        renamed, count = pattern.subn(replacement, name, count=1)
        if count:
            return renamed
    return name


def locate(model: str, *, revision: str | None = None) -> Path:
    """Return the folder of ``model``: a local folder, an alias or a Hub id (downloaded into the Hub's cache).

    Raises:
        CheckpointError: If there is no such folder, alias or Hub repository, or the Hub cannot be reached.
    """
    if model == "tiny":
        return TINY_FOLDER
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{model}: expected a checkpoint folder, got a file; name the folder that holds config.json"
        )
    repository = ALIASES.get(model, model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise CheckpointError(
            f"{model}: expected a folder, a Hub id (owner/name) or one of {', '.join(ALIASES)}, got none of them;"
            " check the spelling"
        )
    return _download(repository, revision=revision)


def _download(repository: str, *, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES))
    except HFValidationError:
        raise CheckpointError(
            f"{repository}: expected a Hub id, got a malformed one; check the spelling"
        ) from None
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{repository}: the Hub answered: {reason}; check the name, revision and token"
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, OSError):
        raise CheckpointError(
            f"{repository}: expected the Hub or a cached copy, got no connection and none in the cache;"
            " download it first or name a local folder"
        ) from None


def read_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Return the checkpoint that ``model`` names, with all weight files checked for completeness.

    Raises:
        CheckpointError: If configuration or weights are missing, broken, truncated, or not safetensors.
    """
    folder = locate(model, revision=revision)
    config = read_json(folder / "config.json")
    tensors: dict[str, SourceTensor] = {}
    for file in _weight_files(folder):
        for name, tensor in read_safetensors_header(file).items():
            tensors[canonical_name(name)] = tensor
    return Checkpoint(folder=folder, name=model, revision=revision, config=config, tensors=tensors)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``, or raise CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent}: expected a checkpoint with {path.name}, got none; name the folder that save_pretrained wrote"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected JSON, got something else ({error}); download it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, got {type(value).__name__}; download it again"
        )
    return value


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(
                f"{index}: expected a 'weight_map' of file names, got another form; download it again"
            )
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if file.parent != folder:
                raise CheckpointError(
                    f"{index}: expected plain file names, got {file.name!r} elsewhere; refused"
                )
            if not file.exists():
                raise CheckpointError(
                    f"{file}: expected this shard (named by the index), got no file; download it again"
                )
        return files
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: expected safetensors, got pickled weights, which are never read;"
            " save them with save_pretrained(safe_serialization=True)"
        )
    raise CheckpointError(
        f"{folder}: expected model.safetensors or its index, got neither; download the weights"
    )


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
            begin, stop = entry["data_offsets"]
            shape = tuple(int(axis) for axis in entry["shape"])
            count = _DTYPE_BYTES.get(entry["dtype"], 0)
        except (KeyError, TypeError, ValueError):
            raise broken(f"a broken entry {name!r}") from None
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
