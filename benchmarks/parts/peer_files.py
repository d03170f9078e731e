"""Files for all runtimes in ``benchmarks/peers.py``: a random Qwen2.5-VL checkpoint that converters accept, and an image."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Template
from parts.released_shapes import QWEN_TEMPLATE, QWEN_TOKENS, _qwen_family, make_checkpoint, qwen2_5_vl
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from pathlib import Path

QUESTION = (
    "Which of the colours in this picture covers the largest part of it, and what lies below that part?"
)
SENTENCES = (QUESTION, "system\nYou are a helpful assistant.", "user\n", "assistant\n")
MERGES = 160


def make_qwen(folder: Path, *, layers: int, vision_layers: int) -> None:
    """Write a random checkpoint with the widths of Qwen2.5-VL-3B and all files of the release that converters read."""
    text = {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    full = [index for index in range(vision_layers) if index % 4 == 3]
    vision = {"depth": vision_layers, "fullatt_block_indexes": full}
    family = _qwen_family(partial(qwen2_5_vl, text=text, vision=vision, tie=True))
    make_checkpoint(folder, family=family, num_layers=layers, dtype="bfloat16", shard_bytes=int(5e9))
    _write_config(folder)
    write_tokenizer(folder)


def make_text_only(folder: Path, checkpoint: Path) -> None:
    """Write a checkpoint of the decoder alone, as Qwen2, whose weight files are links to those of ``checkpoint``."""
    config = json.loads((checkpoint / "config.json").read_text())
    config = {
        name: value for name, value in config.items() if not name.startswith(("vision", "image", "video"))
    }
    changes = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_scaling": None}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | changes, indent=1))
    for file in checkpoint.iterdir():
        if file.name not in ("config.json", "preprocessor_config.json"):
            (folder / file.name).symlink_to(file.resolve())


def make_image(file: Path, side: int) -> None:
    """Write a square image of coloured blocks, which compresses like a photograph with few details."""
    blocks = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((side, side), Image.Resampling.BICUBIC).save(file)


def num_text_tokens(checkpoint: Path) -> int:
    """Return the tokens of a prompt with ``QUESTION`` and an image, without the image's own."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    image, text = {"type": "image"}, {"type": "text", "text": QUESTION}
    message = {"role": "user", "content": [image, text]}
    prompt = Template(QWEN_TEMPLATE).render(messages=[message], add_generation_prompt=True)
    return len(tokenizer.encode(prompt).ids) - 1


def _write_config(folder: Path) -> None:
    """Write ``config.json`` in the release's flat form, which transformers 4 and 5 read; 5 writes one that 4 misreads."""
    nested = json.loads((folder / "config.json").read_text())
    text, vision = nested.pop("text_config"), nested.pop("vision_config")
    rope = text.pop("rope_parameters")
    unwanted = ("layer_types", "model_type", "dtype")
    flat = {name: value for name, value in (text | nested).items() if name not in unwanted}
    flat["model_type"] = nested["model_type"]
    flat |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_config": {k: v for k, v in vision.items() if k != "rope_parameters"} | {"in_chans": vision["in_channels"]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(flat, indent=1))


def write_tokenizer(folder: Path) -> None:
    """Replace the checkpoint's word tokenizer, which converters refuse, by a byte-level one with the same special ids.

    Ids between the trained vocabulary and the special tokens get unused words, so that every answer of the random model has
    a text.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + MERGES, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(SENTENCES, trainer)
    model = json.loads(trained.to_str())["model"]
    words, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    for index in range(len(words), max(QWEN_TOKENS) + 1):
        words[QWEN_TOKENS.get(index, f"w{index}")] = index
    tokenizer = Tokenizer(models.BPE(words, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = trained.pre_tokenizer, decoders.ByteLevel()
    specials = [AddedToken(word, special=True, normalized=False) for word in QWEN_TOKENS.values()]
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(words, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "model_max_length": 131072, "clean_up_tokenization_spaces": False, "errors": "replace",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
