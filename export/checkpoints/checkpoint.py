"""Finds a checkpoint and reads its configuration and tensor headers, not its weights.

A checkpoint is a folder as ``save_pretrained`` writes it: ``config.json``, safetensors files (one, or shards with an
index), tokenizer and processor files. ``locate`` finds this folder for a local path, the packaged model ``tiny``, an alias,
or a Hub id (``export/checkpoints/hub.py``). Only safetensors are read, and no code of a checkpoint runs.
"""

from __future__ import annotations

import json
import re
import stat
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from trio_edge.export.checkpoints.hub import SAFETENSORS_WAY_OUT, download_description, download_weights
from trio_edge.export.checkpoints.packed import PACKING, PackedWeight, packed_format, with_packed
from trio_edge.export.checkpoints.weights import SourceTensor, read_safetensors_header
from trio_edge.runtime.bundle.errors import CheckpointError, TrioEdgeError, did_you_mean
from trio_edge.runtime.bundle.limits import MAX_JSON_BYTES
from trio_edge.runtime.bundle.reader import read_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn


@dataclass(frozen=True, slots=True)
class Alias:
    """The checkpoint that a short name stands for."""

    repository: str | None
    """Hub id; None for the packaged model."""
    family: str


ALIASES = {
    "tiny": Alias(None, "LLaVA-NeXT, Llama (demo)"),
    "llava-1.5-7b": Alias("llava-hf/llava-1.5-7b-hf", "LLaVA-1.5, Vicuna"),
    "llava-1.5-13b": Alias("llava-hf/llava-1.5-13b-hf", "LLaVA-1.5, Vicuna"),
    "llava-next-7b": Alias("llava-hf/llava-v1.6-vicuna-7b-hf", "LLaVA-NeXT, Vicuna"),
    "llava-next-mistral-7b": Alias("llava-hf/llava-v1.6-mistral-7b-hf", "LLaVA-NeXT, Mistral"),
    "llava-next-13b": Alias("llava-hf/llava-v1.6-vicuna-13b-hf", "LLaVA-NeXT, Vicuna"),
    "llava-onevision-0.5b": Alias("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "LLaVA-OneVision"),
    "llava-onevision-7b": Alias("llava-hf/llava-onevision-qwen2-7b-ov-hf", "LLaVA-OneVision"),
    "qwen2.5-vl-3b": Alias("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL"),
    "qwen2.5-vl-7b": Alias("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL"),
    "qwen3-vl-2b": Alias("Qwen/Qwen3-VL-2B-Instruct", "Qwen3-VL"),
    "qwen3-vl-4b": Alias("Qwen/Qwen3-VL-4B-Instruct", "Qwen3-VL"),
    "qwen3-vl-8b": Alias("Qwen/Qwen3-VL-8B-Instruct", "Qwen3-VL"),
    "qwen3.5-9b": Alias("Qwen/Qwen3.5-9B", "Qwen3.5"),
    "cosmos-reason2-2b": Alias("nvidia/Cosmos-Reason2-2B", "Qwen3-VL, Cosmos-Reason2"),
    "cosmos-reason2-8b": Alias("nvidia/Cosmos-Reason2-8B", "Qwen3-VL, Cosmos-Reason2"),
    "cosmos3-nano": Alias("nvidia/Cosmos3-Nano", "Cosmos3, its reasoner"),
    "internvl3-1b": Alias("OpenGVLab/InternVL3-1B-hf", "InternVL3"),
    "internvl3-2b": Alias("OpenGVLab/InternVL3-2B-hf", "InternVL3"),
    "internvl3-8b": Alias("OpenGVLab/InternVL3-8B-hf", "InternVL3"),
    "internvl3.5-1b": Alias("OpenGVLab/InternVL3_5-1B-HF", "InternVL3.5"),
    "internvl3.5-2b": Alias("OpenGVLab/InternVL3_5-2B-HF", "InternVL3.5"),
    "internvl3.5-4b": Alias("OpenGVLab/InternVL3_5-4B-HF", "InternVL3.5"),
    "internvl3.5-8b": Alias("OpenGVLab/InternVL3_5-8B-HF", "InternVL3.5"),
    # the repositories without "BF16" hold FP8 weights
    "ministral-3-3b": Alias("mistralai/Ministral-3-3B-Instruct-2512-BF16", "Ministral 3"),
    "ministral-3-8b": Alias("mistralai/Ministral-3-8B-Instruct-2512-BF16", "Ministral 3"),
    "ministral-3-14b": Alias("mistralai/Ministral-3-14B-Instruct-2512-BF16", "Ministral 3"),
    "mistral-small-3.1-24b": Alias("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "Mistral Small 3.1"),
    "lfm2.5-vl-450m": Alias("LiquidAI/LFM2.5-VL-450M", "LFM2.5-VL"),
    "lfm2.5-vl-1.6b": Alias("LiquidAI/LFM2.5-VL-1.6B", "LFM2.5-VL"),
    "minicpm-v-4.6": Alias("openbmb/MiniCPM-V-4.6", "MiniCPM-V 4.6"),
    "smolvlm2-256m": Alias("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", "SmolVLM2"),
    "smolvlm2-500m": Alias("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "SmolVLM2"),
    "smolvlm2-2.2b": Alias("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "SmolVLM2"),
}
TINY_FOLDER = Path(__file__).parents[1] / "tiny"
EMBEDDING_NAME = "language_model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"
"""Canonical name of the head; checkpoints with tied embeddings leave it out."""

_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_READ_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".safetensors")
"""Ends of the names of all files that this package or transformers reads."""
_LAYERS = re.compile(r"num_hidden_layers|depth")
_AXES = re.compile(
    r"(hidden|intermediate|out_hidden|vocab)_size|head_dim|num_(attention_|key_value_)?heads|num_position_embeddings"
)
"""Settings that are not larger than the longest axis of all tensors."""
_PIXELS = re.compile(r"(image|window)_size")
_PATCHES = re.compile(r"(temporal_)?patch_size|spatial_merge_size|scale_factor")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "pytorch_model.bin.index.json")
# Tensor names differ between checkpoints (before and after transformers 4.52); these rules make them the same.
_CANONICAL_RULES = (
    (re.compile(r"^(?:model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?language_model\.(?:model\.)?"), "language_model."),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), "vision_tower."),
    # names of SmolVLM; CLIP's checkpoints have them without "model."
    (re.compile(r"^model\.text_model\."), "language_model."),
    (re.compile(r"^model\.vision_model\."), "vision_tower."),
    (re.compile(r"^model\.connector\."), "connector."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\."), "multi_modal_projector."),
    (re.compile(r"^(?:model\.)?image_newline$"), "image_newline"),
    (re.compile(r"^(?:model\.)?visual\."), "visual."),
    # Cosmos3's checkpoints have them without "model.", and its tower's without a prefix
    (re.compile(r"^(?:model\.)?(?=layers\.|embed_tokens\.|norm\.)"), "language_model."),
    (re.compile(r"^(?=(?:blocks|merger|patch_embed|pos_embed|deepstack_merger_list)\.)"), "visual."),
)
_DIFFUSERS_NAMES = {
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out": "o_proj",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
"""Names in attention as Cosmos3's newer checkpoints have them."""
_DIFFUSERS = re.compile(rf"(?<=\.self_attn\.)({'|'.join(_DIFFUSERS_NAMES)})(?=\.)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint's folder, configuration, and tensors by canonical name."""

    folder: Path
    revision: str | None
    """Commit of a Hub repository; None for a local folder."""
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    """The tensors that are stored as integers with scales."""

    def tensor(self, name: str) -> SourceTensor:
        """Return the tensor with canonical ``name``.

        Raises:
            CheckpointError: If the checkpoint does not have it.
        """
        if name not in self.tensors:
            way_out = "download the checkpoint again"
            if name == HEAD_NAME:
                way_out = "if the head is the embedding table, set tie_word_embeddings in config.json to true"
            raise CheckpointError(
                f"{self.folder}: expected a tensor {name!r} for this architecture, got {len(self.tensors)} tensors without"
                f" it; {way_out}"
            )
        return self.tensors[name]

    def check_sizes(self) -> None:
        """Raise CheckpointError unless config.json has sizes that its tensors can have: others may take hours to build."""
        longest = max((size for tensor in self.tensors.values() for size in tensor.shape), default=0)
        bounds = ((_LAYERS, len(self.tensors)), (_AXES, longest), (_PIXELS, 4096), (_PATCHES, 512))
        for name, value in settings_of(self.config):
            most = next((number for pattern, number in bounds if pattern.fullmatch(name)), None)
            # None stands for a size that follows from others
            if not (most is None or value is None or (type(value) is int and 1 <= value <= most)):
                raise CheckpointError(
                    f"{self.folder}/config.json {name}: expected a number in 1..{most}, got {value!r:.100}; configuration and"
                    " weights belong to different models"
                )

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn what bad settings make transformers and torch raise into one line; their warnings are not shown."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            except (TrioEdgeError, MemoryError):
                raise
            except Exception as error:  # any type: these libraries do not check all of a configuration
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise CheckpointError(
                    f"{self.folder}: expected settings in config.json that make a model, got"
                    f" '{type(error).__name__}: {error!s:.300}'; use the checkpoint's own files"
                ) from error

    def check_parameters(self, root: nn.Module) -> None:
        """Raise CheckpointError unless there are tensors for all parameters of the model ``root``, in their shapes."""
        for name, parameter in root.named_parameters():
            wanted = canonical_name(name)
            if wanted.startswith("vision_tower.") and wanted not in self.tensors:
                continue  # unused layers may be left out; a used one that is missing is found before anything is written
            self.check_shape(wanted, parameter.shape)

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Raise CheckpointError unless there is a tensor ``name`` with ``shape``."""
        if (got := self.tensor(name).shape) != tuple(shape):
            raise CheckpointError(
                f"{self.folder} tensor {name!r}: expected shape {list(shape)} (config.json), got {list(got)}; configuration"
                " and weights belong to different models"
            )


def settings_of(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all values in JSON that are neither objects nor lists, with the key that they are under."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from settings_of(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from settings_of(inner, name)
    else:
        yield name, value


def canonical_name(name: str) -> str:
    """Return the common name of a tensor that checkpoints and transformers releases name differently."""
    name = _DIFFUSERS.sub(lambda found: _DIFFUSERS_NAMES[found[0]], name)
    for pattern, replacement in _CANONICAL_RULES:
        renamed, count = pattern.subn(replacement, name, count=1)
        if count:
            return renamed
    return name


def locate(model: str, *, revision: str | None = None) -> tuple[Path, str | None]:
    """Return the folder of ``model``: a local folder, an alias or a Hub id. It downloads all files but the weights.

    The second value is the Hub id if the folder is a snapshot in the Hub's cache, whose weights may still be missing.

    Raises:
        CheckpointError: If there is no such folder, alias or Hub repository, or the Hub cannot be reached.
    """
    path = TINY_FOLDER if model == "tiny" else Path(model).expanduser()
    if not path.is_dir():
        repository = _repository(model, path)
        return download_description(repository, revision=revision), repository
    if revision is not None:
        raise CheckpointError(
            f"--revision: expected a model on the Hub, got {revision!r} of {model}, which is a local folder; leave it out"
        )
    return path, None


def _repository(model: str, path: Path) -> str:
    """Return the Hub id of ``model``, whose ``path`` is no folder."""
    if path.exists():
        raise CheckpointError(
            f"{model}: expected a checkpoint folder, got a file; name the folder that holds config.json"
        )
    repository = ALIASES[model].repository if model in ALIASES else model
    if repository is None or model.startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: expected a checkpoint folder, got nothing there; check the path")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        advice = did_you_mean(model, ALIASES, otherwise="check the spelling")
        raise CheckpointError(
            f"{model}: expected a folder, a Hub id (owner/name) or one of {', '.join(ALIASES)}, got none of them; {advice}"
        )
    return repository


def read_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    check_config: Callable[[Path, dict[str, Any]], object] = lambda _folder, _config: None,
) -> Checkpoint:
    """Return the checkpoint that ``model`` names; all weight files are there and complete.

    Args:
        model: Local folder, alias or Hub id.
        revision: Branch, tag or commit on the Hub.
        check_config: Called with folder and configuration before weights are downloaded or read; raises CheckpointError
            if the model cannot be exported.

    Raises:
        CheckpointError: If configuration or weights are missing, broken, truncated, or not safetensors.
    """
    folder, repository = locate(model, revision=revision)
    check_places([*folder.iterdir(), *folder.glob("chat_templates/*")], folder)
    config = read_json(folder / "config.json")
    check_config(folder, config)
    if repository is not None:
        download_weights(repository, _weight_names(folder), snapshot=folder)
        revision = folder.name
    files = _weight_files(folder)
    check_places(files, folder)
    tensors = {
        canonical_name(name): tensor
        for file in files
        for name, tensor in read_safetensors_header(file).items()
    }
    packed: dict[str, PackedWeight] = {}
    if PACKING in config:
        tensors, packed = with_packed(folder, tensors, packed_format(folder, config[PACKING]))
    checkpoint = Checkpoint(folder=folder, revision=revision, config=config, tensors=tensors, packed=packed)
    checkpoint.check_sizes()
    return checkpoint


def check_places(files: Iterable[Path], folder: Path) -> None:
    """Raise CheckpointError if one that may be read is a pipe or a device, or a link that leaves ``folder``.

    Links may lead into the Hub's cache, in which a snapshot's files lie in ``blobs`` next to ``snapshots``.
    """
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        roots.append(folder.resolve().parents[1] / "blobs")
    for file in files:
        if file.suffix not in _READ_SUFFIXES:
            continue
        try:
            place = file.resolve(strict=True)
            is_regular = stat.S_ISREG(place.stat().st_mode)
        except (OSError, RuntimeError) as error:  # a link to nothing, or to itself
            raise CheckpointError(f"{file}: expected a file, got {error}; copy the file here") from None
        if not is_regular:
            raise CheckpointError(f"{file}: expected a file, got a folder, a pipe or a device; remove it")
        if not any(place.is_relative_to(root) for root in roots):
            raise CheckpointError(
                f"{file}: expected a file of the checkpoint, got a link to {place}; copy the file here"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``, or raise CheckpointError."""
    try:
        value = json.loads(read_regular(path, max_bytes=MAX_JSON_BYTES))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent}: expected a checkpoint with {path.name}, got no such file; name the folder that save_pretrained wrote"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected readable JSON, got {error}; download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, got {type(value).__name__}; download it again"
        )
    return value


def _weight_names(folder: Path) -> list[str]:
    """Return the names of the weight files: those in the index, or the single file without an index."""
    index = folder / _WEIGHTS_INDEX
    return _names_of_shards(index) if index.exists() else [_WEIGHTS]


def _names_of_shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: expected a 'weight_map' of file names, got none; download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        path = PurePosixPath(name)
        is_inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name
        if not is_inside or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: expected safetensors files inside the checkpoint, got {name!r}; download it again"
            )
    return names


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files, all of which exist. In the Hub's cache they may be links; export copies their content."""
    files = [folder / name for name in _weight_names(folder)]
    if missing := [file for file in files if not file.exists()]:
        raise _without(missing[0], folder)
    return files


def _without(missing: Path, folder: Path) -> CheckpointError:
    if (folder / _WEIGHTS_INDEX).exists():
        text = f"{missing}: expected this shard, which the index names, got no file; download it again"
    elif any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        pickled = "expected safetensors, got pickled weights, which are never read"
        text = f"{folder}: {pickled}; {SAFETENSORS_WAY_OUT}"
    else:
        text = f"{folder}: expected {_WEIGHTS} or its index, got neither; download the weights"
    return CheckpointError(text)
