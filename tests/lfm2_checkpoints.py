"""A small random LFM2-VL checkpoint, with an odd grid of positions and tiles of nine tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)]
MARKS = (
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<|image_start|>",
    "<|image_end|>", "<|img_thumbnail|>", *NAMES,
)  # fmt: skip
VOCABULARY = (*MARKS, "<unk>", "user", "assistant", "system", *(f"w{index}" for index in range(80)))
IMAGE_ID, END_ID = VOCABULARY.index("<image>"), VOCABULARY.index("<|im_end|>")
LAYERS = ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]
PATCH_SIZE, MERGE, TILE_SIZE = 4, 2, 24
PIXELS = {
    "tile_size": TILE_SIZE, "encoder_patch_size": PATCH_SIZE, "downsample_factor": MERGE, "min_image_tokens": 4,
    "max_image_tokens": 12, "max_tiles": 4,
}  # fmt: skip
"""The whole image may have more tokens than a tile."""


def save_lfm2_vl_checkpoint(
    folder: Path, *, tie: bool = True, dtype: torch.dtype = torch.float32, num_layers: int = 6, **text: Any
) -> Path:
    """Write a random model and its processor's files into ``folder`` and return it; ``text`` are the decoder's settings.

    The chat template is left away: the exporter brings the family's.
    """
    import transformers as hf

    torch.manual_seed(43)
    config = hf.Lfm2VlConfig(
        text_config={
            "model_type": "lfm2", "hidden_size": 64, "intermediate_size": 140, "block_multiple_of": 8,
            "num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "layer_types": LAYERS[-num_layers:], "vocab_size": len(VOCABULARY), "max_position_embeddings": 1024,
            "initializer_range": 0.2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "bos_token_id": 1, "eos_token_id": END_ID, "pad_token_id": 0, "tie_word_embeddings": tie, **text,
        },
        vision_config={
            "model_type": "siglip2_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 48, "patch_size": PATCH_SIZE, "num_patches": 25, "vision_use_head": False,
            "initializer_range": 0.2,
        },
        image_token_id=IMAGE_ID,
        projector_hidden_size=40,
        downsample_factor=MERGE,
        tie_word_embeddings=tie,
    )  # fmt: skip
    model = hf.Lfm2VlForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a forgotten one
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif ".conv.conv." in name:  # too small by default to matter
                parameter.mul_(3)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    write_processor(folder)
    return folder


def write_processor(folder: Path, **settings: Any) -> None:
    """Write the image processor's file; ``settings`` change it. Its class needs torchvision."""
    import json

    values = {"image_processor_type": "Lfm2VlImageProcessorFast", **PIXELS, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Lfm2VlProcessor"}))


def tokenizer() -> Any:
    """Return the checkpoint's tokenizer: a token for each word."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens={
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
    )


def their_inputs(pipeline: Any, messages: Any) -> dict[str, torch.Tensor]:
    """Return Hugging Face's inputs of the model with the runtime's ids and pixels, which have tests of their own."""
    from trio_edge.runtime.prompts.chat import visual_parts
    from trio_edge.runtime.prompts.tokenizer import Inset

    pictures = [part["image"] for part in visual_parts(messages)]
    images = pipeline.images
    layouts = [images.layout(*picture.size) for picture in pictures]
    ids = pipeline._encode(messages, [Inset(layout.text) for layout in layouts])
    runs = [length for layout in layouts for length in layout.run_lengths]
    inputs = {"input_ids": torch.tensor([ids.all_ids(runs).tolist()])}
    if pictures:
        made = [images.prepare(picture) for picture in pictures]
        pixels, shapes = (
            torch.cat([torch.from_numpy(one[name]) for one in made])
            for name in ("pixel_values", "spatial_shapes")
        )
        count = shapes.prod(-1, keepdim=True)
        mask = (torch.arange(pixels.shape[1])[None] < count).to(torch.int32)
        inputs |= {
            "pixel_values": pixels,
            "spatial_shapes": shapes.to(torch.int64),
            "pixel_attention_mask": mask,
        }
    return inputs
