"""A small random Ministral 3 checkpoint, or one with Mistral Small's decoder, and Hugging Face's processor for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.runtime.images.pixtral import PixtralImages

MARKS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
)  # fmt: skip
VOCABULARY = (*MARKS, *(f"w{index}" for index in range(84)))
IMAGE_ID, END_ID = VOCABULARY.index("[IMG]"), VOCABULARY.index("</s>")
PATCH_SIZE, MERGE, LONGEST_EDGE = (
    4,
    2,
    52,
)  # seven tokens along the longest side, the last of which is enlarged
ORIGINAL_LENGTH = 16
"""Positions below it have the scale 1; prompts are several times as long."""
ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 64.0, "original_max_position_embeddings": ORIGINAL_LENGTH,
    "max_position_embeddings": 1024, "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5,
    "llama_4_scaling_beta": 0.4,
}  # fmt: skip
"""As in the released models, but with a factor on the tables that is not 1."""


def save_mistral3_checkpoint(
    folder: Path,
    *,
    tie: bool = False,
    num_layers: int = 4,
    dtype: torch.dtype = torch.float32,
    text_type: str = "ministral3",
    **settings: Any,
) -> Path:
    """Write a random model and its processor's files into ``folder`` and return it; ``settings`` are the configuration's.

    The chat template is left away: the exporter brings the family's.
    """
    import transformers as hf

    torch.manual_seed(41)
    rope = ROPE if text_type == "ministral3" else {"rope_type": "default", "rope_theta": 10000.0}
    values = {
        "text_config": {
            "model_type": text_type, "hidden_size": 64, "head_dim": 24, "intermediate_size": 96,
            "num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None,
            "vocab_size": len(VOCABULARY), "max_position_embeddings": 1024, "initializer_range": 0.2,
            "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": END_ID, "pad_token_id": 6,
            "tie_word_embeddings": tie,
        },
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 48, "image_size": LONGEST_EDGE, "patch_size": PATCH_SIZE, "hidden_act": "silu",
            "initializer_range": 0.2, "rope_parameters": {"rope_type": "axial", "rope_theta": 10.0},
        },
        "image_token_index": IMAGE_ID,
        "spatial_merge_size": MERGE,
        "tie_word_embeddings": tie,
    }  # fmt: skip
    model = hf.Mistral3ForConditionalGeneration(hf.Mistral3Config(**{**values, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # ones would hide a forgotten norm
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "vision_tower" in name or "projector" in name:  # too small by default for tokens that differ
                parameter.mul_(2)
    model.to(dtype).save_pretrained(folder)
    _write_processor(folder)
    return folder


def _write_processor(folder: Path) -> None:
    """Write the files of a released checkpoint, which are from before transformers 5."""
    image_processor().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    (folder / "processor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "PixtralProcessor",
                "image_token": "[IMG]",
                "image_break_token": "[IMG_BREAK]",
                "image_end_token": "[IMG_END]",
                "patch_size": PATCH_SIZE,
                "spatial_merge_size": MERGE,
            }
        )
    )


def image_processor(*, longest_edge: int = LONGEST_EDGE, **settings: Any) -> Any:
    """Return the image processor of the checkpoint; ``settings`` change it."""
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    return PixtralImageProcessorPil(
        size={"longest_edge": longest_edge},
        patch_size={"height": PATCH_SIZE, "width": PATCH_SIZE},
        **settings,
    )


def their_inputs(picture: Any, prompt: str, images: PixtralImages) -> dict[str, torch.Tensor]:
    """Return Hugging Face's inputs of the model for one image, or none, with the runtime's pixels, which have their own tests.

    PixtralProcessor cannot be imported without torchvision, so its rows of tokens are written here;
    ``tests/several_images.py`` has what the original gives.
    """
    rows, inputs = "", {}
    if picture is not None:
        pixels = whole_image(images, picture)
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([pixels.shape[2:]])}
        height, width = (side // (PATCH_SIZE * MERGE) for side in pixels.shape[2:])
        rows = "[IMG_BREAK]".join(["[IMG]" * width] * height) + "[IMG_END]"
    ids = _tokenizer()(f"[INST]{rows}{prompt}[/INST]", return_tensors="pt")["input_ids"]
    return {"input_ids": ids, **inputs}


def whole_image(images: PixtralImages, picture: Any) -> torch.Tensor:
    """Return the runtime's patches of an image as [1, 3, height, width]."""
    rows, columns = images.token_grid(*picture.size)
    merge, side = images.merge_size, images.patch_size
    patches = images.prepare(picture)["pixel_values"].reshape(rows, columns, merge, merge, 3, side, side)
    pixels = patches.transpose(4, 0, 2, 5, 1, 3, 6)
    return torch.from_numpy(pixels.reshape(1, 3, rows * merge * side, columns * merge * side).copy())


def _tokenizer() -> Any:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
