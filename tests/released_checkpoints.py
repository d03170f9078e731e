"""Checkpoints with the configuration files of released models, in ``tests/released``, and random or no weights.

A file there holds the keys and values of one family that matter, where each was seen, and what was not. Tokenizers have the
released class and special tokens at their released ids, and else a word for each byte.
"""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from trio_edge.runtime.prompts.chat import (
    INTERNVL_TEMPLATE,
    LFM2_VL_TEMPLATE,
    LLAVA_ONEVISION_TEMPLATE,
    MINICPM_TEMPLATE,
    MISTRAL3_TEMPLATE,
    MISTRAL_TEMPLATE,
    QWEN2_5_VL_TEMPLATE,
    QWEN3_VL_TEMPLATE,
    SMOLVLM_TEMPLATE,
    VICUNA_TEMPLATE,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

RELEASED = Path(__file__).parent / "released"
_ANSWER = "{% if add_generation_prompt %}"
# The released ones mark answers for training, which plain Jinja does not know.
_TEMPLATES = {
    "vicuna": VICUNA_TEMPLATE.replace(_ANSWER, "{% generation %}{% endgeneration %}" + _ANSWER),
    "mistral": MISTRAL_TEMPLATE,
    "qwen2_5_vl": QWEN2_5_VL_TEMPLATE,
    "qwen3_vl": QWEN3_VL_TEMPLATE,
    "llava_onevision": LLAVA_ONEVISION_TEMPLATE,
    "internvl": INTERNVL_TEMPLATE,
    "smolvlm": SMOLVLM_TEMPLATE,
    "mistral3": MISTRAL3_TEMPLATE,
    "lfm2_vl": LFM2_VL_TEMPLATE,
    "minicpm": MINICPM_TEMPLATE,
}
# From a parameter of transformers' model to the name in released files, which are older than these classes.
_LLAVA_NAMES = (
    (r"^model\.vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)
_OLD_NAMES = {
    "llava": _LLAVA_NAMES,
    "llava_next": _LLAVA_NAMES,
    "llava_onevision": _LLAVA_NAMES,
    "qwen2_5_vl": ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),
    "qwen3_vl": (),
    "cosmos3_omni": ((r"^model\.visual\.", ""), (r"^model\.language_model\.", "")),
    "qwen3_5": (),
    "internvl": _LLAVA_NAMES[1:],
    "smolvlm": (),
    "mistral3": _LLAVA_NAMES[1:],
    "lfm2_vl": ((r"^model\.vision_tower\.", "model.vision_tower.vision_model."),),
    "minicpmv4_6": (),
}
_DTYPES = {
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "float32": ("F32", torch.float32),
}


@cache
def _families() -> dict[str, dict[str, Any]]:
    """Return the content of each file by its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RELEASED.glob("*.json"))}


def released_aliases() -> list[str]:
    """Return all aliases that have a description."""
    return [alias for family in _families().values() for alias in family["aliases"]]


def released(alias: str) -> dict[str, Any]:
    """Return what is known of ``alias``: ``files`` by name, ``chat_template`` and ``tokens``; may be changed."""
    family = next(family for family in _families().values() if alias in family["aliases"])
    own = family["aliases"][alias]
    return {
        "files": {name: merged(values, own.get(name, {})) for name, values in family["files"].items()},
        "chat_template": merged(family["chat_template"], own.get("chat_template", {})),
        "tokens": dict(family["tokens"]),
    }


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of ``values`` with ``changes``, key by key in every object."""
    result = copy.deepcopy(values)
    for key, value in changes.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


def write_files(folder: Path, description: dict[str, Any]) -> Path:
    """Write everything but the weights into ``folder`` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in description["files"].items():
        (folder / name).write_text(json.dumps(values))
    special = {int(index): token for index, token in description["tokens"].items()}
    _tokenizer(special).save(str(folder / "tokenizer.json"))
    template = description["chat_template"]
    text = _TEMPLATES[template["form"]]
    is_json = template["file"].endswith(".json")
    (folder / template["file"]).write_text(json.dumps({"chat_template": text}) if is_json else text)
    return folder


def _tokenizer(special: dict[int, str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer, or one like Llama's where there is an ``<s>``.

    Mistral's has both, and a thousand special tokens before the first letter; LFM2's has hundreds.
    """
    is_tekken, adds_begin = special.get(10) == "[IMG]", special.get(1) == "<s>"
    begin, first = adds_begin and not is_tekken, 1000 if is_tekken or 396 in special else 3 * (1 in special)
    letters = [f"<0x{byte:02X}>" for byte in range(256)] if begin else pre_tokenizers.ByteLevel.alphabet()
    words = {word: index + first for index, word in enumerate([*sorted(letters), *["▁"] * begin])}
    tokenizer = Tokenizer(
        models.BPE(words | {token: index for index, token in special.items()}, [], byte_fallback=begin)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special.values()])
    if begin:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if adds_begin:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_empty_weights(folder: Path) -> None:
    """Write a weight file with names, types and shapes that takes no room: its values are a hole."""
    config = json.loads((folder / "config.json").read_text())
    dtype, element = _DTYPES[config.get("torch_dtype", "bfloat16")]
    with torch.device("meta"):
        shapes = {name: list(parameter.shape) for name, parameter in _parameters(folder)}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + element.itemsize * int(torch.Size(shape).numel())
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def write_random_weights(folder: Path) -> None:
    """Write weights that are large enough for logits that differ clearly from token to token."""
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    _, dtype = _DTYPES[config.get("torch_dtype", "bfloat16")]
    torch.manual_seed(0)
    tensors = {}
    with torch.device("meta"):
        parameters = dict(_parameters(folder))
    for name, parameter in parameters.items():
        values = torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.3)
        if parameter.dim() == 1 and name.endswith("weight"):
            values += 1  # a norm
        tensors[name] = values.to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _parameters(folder: Path) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield each parameter of transformers' model of ``folder`` by its name in released files."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    # InternVL3's files say that the head is tied, and hold one all the same
    config.tie_word_embeddings &= getattr(config.text_config, "tie_word_embeddings", True)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        for pattern, replacement in _OLD_NAMES[config.model_type]:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        yield name, parameter
