"""A small random InternVL3 (qwen2) or InternVL3.5 (qwen3) checkpoint, and Hugging Face's processor for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trio_edge.runtime.prompts.chat import INTERNVL_TEMPLATE

if TYPE_CHECKING:
    from pathlib import Path

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
WORDS = ("<unk>", "system", "user", "assistant", *(f"w{index}" for index in range(84)))
VOCABULARY = (*WORDS, *MARKS)
IMAGE_ID, END_ID = VOCABULARY.index("<IMG_CONTEXT>"), VOCABULARY.index("<|im_end|>")
TILE_SIZE, PATCH_SIZE = 32, 4
TOKENS_PER_TILE = (TILE_SIZE // PATCH_SIZE // 2) ** 2
MAX_TILES = 4


def save_internvl_checkpoint(
    folder: Path,
    *,
    tie: bool = False,
    num_layers: int = 4,
    dtype: torch.dtype = torch.float32,
    text_type: str = "qwen2",
) -> Path:
    """Write a random model with tokenizer and image processor into ``folder`` and return it.

    Like the released checkpoints, config.json says nothing of tied embeddings, and the image processor's file does not
    cut tiles, which InternVLProcessor does all the same. The chat template is left away: the exporter brings the family's.
    """
    import transformers as hf

    torch.manual_seed(23)
    config = hf.InternVLConfig(
        text_config={
            "model_type": text_type, "hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "num_hidden_layers": num_layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(VOCABULARY),
            "max_position_embeddings": 1024, "initializer_range": 0.2, "eos_token_id": END_ID,
            "tie_word_embeddings": tie,
        },
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
            "attention_bias": True, "image_size": [TILE_SIZE] * 2, "patch_size": [PATCH_SIZE] * 2,
            "initializer_range": 0.2,
        },
        image_token_id=IMAGE_ID,
        image_seq_length=TOKENS_PER_TILE,
        tie_word_embeddings=tie,
    )  # fmt: skip
    model = hf.InternVLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # zeros, ones and 0.1 would hide a forgotten norm, bias, scale, class token or position
            if parameter.dim() == 1 or name.endswith(("cls_token", "position_embeddings")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    del written["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(written))
    _tokenizer().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def image_processor() -> Any:
    """Return the image processor of the checkpoint; as a file it does not cut tiles."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(size={"height": TILE_SIZE, "width": TILE_SIZE}, max_patches=MAX_TILES)


def processor() -> Any:
    """Return Hugging Face's InternVLProcessor, without its part for videos, which needs torchvision."""
    from transformers import InternVLProcessor

    class ImagesOnly(InternVLProcessor):
        def check_argument_for_proper_class(self, _name: str, argument: Any) -> type:
            return type(argument)

    return ImagesOnly(
        image_processor(), _tokenizer(), image_seq_length=TOKENS_PER_TILE, chat_template=INTERNVL_TEMPLATE
    )


def _tokenizer() -> Any:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
