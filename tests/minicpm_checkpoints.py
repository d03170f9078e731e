"""A small random MiniCPM-V 4.6 checkpoint, with slices of nine tokens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pathlib import Path

NAMED = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
    "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
}  # fmt: skip
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED.values())
CHARACTERS = ["Ċ", "Ġ", *(chr(code) for code in range(33, 127) if not chr(code).isupper())]
"""A token for each character, the line's end and the space among them: both stand between slices and words."""
VOCABULARY = ("<unk>", *CHARACTERS, *MARKS)
IMAGE_ID, VIDEO_ID, END_ID = (
    VOCABULARY.index(name) for name in ("<|image_pad|>", "<|video_pad|>", "<|im_end|>")
)
PIXELS = {"scale_resolution": 36, "patch_size": 3, "max_slice_nums": 4}


def save_minicpm_checkpoint(
    folder: Path,
    *,
    tie: bool = True,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 8,
    **settings: Any,
) -> Path:
    """Write a random model and its processor's files into ``folder`` and return it; ``settings`` are those of the model.

    The chat template is left away: the exporter brings the family's.
    """
    import transformers as hf

    torch.manual_seed(47)
    config = hf.AutoConfig.for_model(
        "minicpmv4_6",
        text_config={
            "model_type": "qwen3_5_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": num_layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": len(VOCABULARY),
            "max_position_embeddings": 1024, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 12, "linear_value_head_dim": 20, "initializer_range": 0.1,
            "eos_token_id": END_ID, "tie_word_embeddings": tie,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        },
        vision_config={
            "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 21,
            "patch_size": 3,
        },
        insert_layer_id=1,
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        tie_word_embeddings=tie,
        **settings,
    )  # fmt: skip
    model = hf.MiniCPMV4_6ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a forgotten one
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "vision_tower" in name or "merger" in name:
                parameter.normal_(std=0.2)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    write_processor(folder)
    return folder


def write_processor(folder: Path, **settings: Any) -> None:
    """Write the image processor's file; ``settings`` change it."""
    values = {"image_processor_type": "MiniCPMV4_6ImageProcessor", **PIXELS, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    video = {**values, "video_processor_type": "MiniCPMV4_6VideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "MiniCPMV4_6Processor"}))


def tokenizer() -> Any:
    """Return the checkpoint's tokenizer: a token for each character."""
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=NAMED,
    )


def their_inputs(pipeline: Any, messages: Any) -> dict[str, torch.Tensor]:
    """Return Hugging Face's inputs of the model with the runtime's ids and pixels, which have tests of their own."""
    from trio_edge.runtime.prompts.chat import visual_parts
    from trio_edge.runtime.prompts.tokenizer import Inset

    pictures = [part["image"] for part in visual_parts(messages)]
    images = pipeline.images
    layouts = [images.layout(*picture.size) for picture in pictures]
    insets = [Inset(layout.text, number_marks=layout.number_marks) for layout in layouts]
    runs = [length for layout in layouts for length in layout.run_lengths]
    ids = pipeline._encode(messages, insets).all_ids(runs)
    inputs = {"input_ids": torch.tensor([ids.tolist()])}
    if not pictures:
        return inputs
    packed, sizes = [], []
    for picture in pictures:
        (rows, columns), (whole, part) = images.grid(*picture.size), images.token_grids(*picture.size)
        pixels = images.prepare(picture)["pixel_values"]
        for patches, grid in zip(pixels, [whole, *[part] * (rows * columns * (part is not None))]):
            tall, wide = (side * images.merge_size for side in grid)
            raster = torch.empty(tall * wide, patches.shape[1])
            raster[torch.from_numpy(images._order(tall, wide))] = torch.from_numpy(patches[: tall * wide])
            side = images.patch_size
            packed.append(raster.reshape(-1, 3, side, side).permute(1, 2, 0, 3).reshape(3, side, -1))
            sizes.append([tall, wide])
    return inputs | {
        "pixel_values": torch.cat(packed, dim=-1)[None],
        "target_sizes": torch.tensor(sizes, dtype=torch.int32),
    }
