"""A small random LLaVA-OneVision checkpoint with SigLIP and Qwen2, and Hugging Face's processor for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pathlib import Path

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
WORDS = ("<unk>", "system", "user", "assistant", *(f"w{index}" for index in range(86)))
VOCABULARY = (*WORDS, *MARKS)
IMAGE_ID, END_ID = VOCABULARY.index("<image>"), VOCABULARY.index("<|im_end|>")
TILE_SIZE, PATCH_SIZE = 26, 4  # as in the released models, patches do not fill a tile
TOKENS_PER_TILE = (TILE_SIZE // PATCH_SIZE) ** 2
ASPECT_RATIO = "anyres_max_2"
"""A grid of 2 x 2 tiles is made smaller already."""
SIDES = (TILE_SIZE, 2 * TILE_SIZE, 3 * TILE_SIZE)
PINPOINTS = [[height, width] for height in SIDES for width in SIDES]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ '\n' + part['text'] }}{% endgeneration %}"
    "{% else %}{{ '\n' + part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Gives the same text as the released files: images first, a line break before each text, none after a message."""


def save_onevision_checkpoint(
    folder: Path,
    *,
    tie: bool = False,
    num_layers: int = 4,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """Write a random model and its processor's files into ``folder`` and return it; ``settings`` are the configuration's."""
    import transformers as hf

    torch.manual_seed(29)
    values = {
        "text_config": {
            "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": num_layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(VOCABULARY),
            "max_position_embeddings": 1024, "initializer_range": 0.2, "eos_token_id": END_ID,
            "tie_word_embeddings": tie,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 48, "image_size": TILE_SIZE, "patch_size": PATCH_SIZE, "vision_use_head": False,
        },
        "image_token_index": IMAGE_ID,
        "video_token_index": VOCABULARY.index("<video>"),
        "image_grid_pinpoints": PINPOINTS,
        "vision_aspect_ratio": ASPECT_RATIO,
        "tie_word_embeddings": tie,
    }  # fmt: skip
    model = hf.LlavaOnevisionForConditionalGeneration(hf.LlavaOnevisionConfig(**{**values, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # zeros and ones would hide a forgotten norm or bias
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    _write_processor(folder)
    return folder


def _write_processor(folder: Path) -> None:
    """Write the files of a released checkpoint, which are from before transformers 5."""
    theirs = processor()
    theirs.image_processor.save_pretrained(folder)
    theirs.tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    released = {
        "num_image_tokens": TOKENS_PER_TILE,
        "vision_feature_select_strategy": "full",
        "processor_class": "LlavaOnevisionProcessor",
    }
    (folder / "processor_config.json").write_text(json.dumps(released))


def processor(pinpoints: list[list[int]] = PINPOINTS) -> Any:
    """Return Hugging Face's LlavaOnevisionProcessor, without its part for videos, which needs torchvision."""
    import transformers as hf

    class ImagesOnly(hf.LlavaOnevisionProcessor):
        def check_argument_for_proper_class(self, _name: str, argument: Any) -> type:
            return type(argument)

    images = hf.LlavaOnevisionImageProcessorPil(
        size={"height": TILE_SIZE, "width": TILE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        image_grid_pinpoints=pinpoints,
    )
    return ImagesOnly(
        images,
        _tokenizer(),
        num_image_tokens=TOKENS_PER_TILE,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=ASPECT_RATIO,
        chat_template=TEMPLATE,
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
    )
