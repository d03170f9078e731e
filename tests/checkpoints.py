"""Small random checkpoints, written by save_pretrained, for tests that export."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from trio_edge.runtime.prompts.chat import VICUNA_TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "USER", ":", "ASSISTANT", *(f"w{i}" for i in range(92))]


def make_tokenizer(vocab_size: int = len(WORDS)) -> Any:
    """Return a word-level tokenizer with a leading <s>, like Llama's."""
    from transformers import PreTrainedTokenizerFast

    words = WORDS + [f"w{i}" for i in range(len(WORDS) - 8, vocab_size - 8)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def write_processor(
    folder: Path,
    *,
    family: Literal["llava", "llava_next"],
    tile_size: int,
    patch_size: int,
    vocab_size: int = len(WORDS),
) -> None:
    """Write tokenizer, image processor and chat template of a checkpoint."""
    import transformers as hf

    tiles: dict[str, Any] = {
        "size": {"shortest_edge": tile_size},
        "crop_size": {"height": tile_size, "width": tile_size},
    }
    shared: dict[str, Any] = {
        "patch_size": patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    tokenizer = make_tokenizer(vocab_size)
    if family == "llava_next":
        images = hf.LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **tiles)
        processor = hf.LlavaNextProcessor(images, tokenizer, **shared)
    else:
        processor = hf.LlavaProcessor(hf.CLIPImageProcessorPil(**tiles), tokenizer, **shared)
    processor.chat_template = VICUNA_TEMPLATE
    processor.save_pretrained(folder)


def save_checkpoint(
    folder: Path,
    *,
    family: Literal["llava", "llava_next"] = "llava_next",
    text: Literal["llama", "mistral", "qwen2"] = "llama",
    num_layers: int = 4,
    num_kv_heads: int = 2,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    patch_size: int = 8,
    seed: int = 0,
    text_settings: Mapping[str, Any] = MappingProxyType({}),
    random_biases: bool = False,
) -> Path:
    """Write a random model with its processor into ``folder`` and return it.

    The weights are large enough for logits that differ clearly from token to token. ``text_settings`` go into the
    decoder's configuration; biases are zero, as transformers makes them, unless ``random_biases``.
    """
    import transformers as hf

    torch.manual_seed(seed)
    vision = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=24,
        patch_size=patch_size,
        projection_dim=32,
    )
    text_class = {"llama": hf.LlamaConfig, "mistral": hf.MistralConfig, "qwen2": hf.Qwen2Config}[text]
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": tie,
        **({"sliding_window": None} if text == "mistral" else {}),
    }
    decoder = text_class(**{**settings, **text_settings})
    if family == "llava_next":
        config = hf.LlavaNextConfig(
            vision_config=vision,
            text_config=decoder,
            image_grid_pinpoints=PINPOINTS,
            image_token_index=4,
            tie_word_embeddings=tie,
        )
        model = hf.LlavaNextForConditionalGeneration(config)
    else:
        config = hf.LlavaConfig(
            vision_config=vision, text_config=decoder, image_token_index=4, tie_word_embeddings=tie
        )
        model = hf.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # ones and zeros would hide a forgotten norm weight or bias
            if "norm" in name or (random_biases and name.endswith("bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    write_processor(folder, family=family, tile_size=24, patch_size=patch_size)
    return folder
