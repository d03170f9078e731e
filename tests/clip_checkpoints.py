"""Small random CLIP checkpoints, written by save_pretrained, that fit the vision tower of ``tests.checkpoints``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

if TYPE_CHECKING:
    from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 10
"""Tokens of a text; 8 of them are words."""


def save_clip_checkpoint(folder: Path, *, vision_width: int = 32, seed: int = 20) -> Path:
    """Write a random CLIP model with its tokenizer into ``folder`` and return it."""
    import transformers as hf

    torch.manual_seed(seed)
    words = [*(f"w{i}" for i in range(58)), START, END]
    config = hf.CLIPConfig(
        text_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": len(words),
            "max_position_embeddings": LENGTH,
            "bos_token_id": 58,
            "eos_token_id": 59,
        },
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 8,
        },
        projection_dim=20,
    )
    model = hf.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases and norms of one would hide forgotten ones
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    _tokenizer(words).save_pretrained(folder)
    return folder


def _tokenizer(words: list[str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=END))
    # Unlike the decoder's, which reads w1_w2 as one token.
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.CharDelimiterSplit("_")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, words.index(START)), (END, words.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=END, bos_token=START, eos_token=END, pad_token=END
    )
