"""Small random checkpoints of Qwen2.5-VL and Qwen3-VL, and Hugging Face's inputs for it without its processor.

Hugging Face's processors of both need torchvision (for videos); token ids, patches and grid are put together here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.prompts.chat import build_messages

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

    from trio_edge.runtime.pipeline import Pipeline

MARKS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = ("<unk>", "system", "user", "assistant", *(f"w{index}" for index in range(84)))
VOCABULARY = (*WORDS, *MARKS)
CHARACTERS = [chr(code) for code in (*range(33, 127), *range(0x10A, 0x200)) if not chr(code).isupper()]
CHARACTERS = ["Ċ", "Ġ", *CHARACTERS][: len(WORDS) - 1]
"""Characters in place of words, without capitals: transformers gives each Qwen3.5 checkpoint a byte-level BPE tokenizer."""
IMAGE_ID, END_ID = VOCABULARY.index("<|image_pad|>"), VOCABULARY.index("<|im_end|>")
VIDEO_ID = VOCABULARY.index("<|video_pad|>")
PIXELS = {"min_pixels": 4 * 28 * 28, "max_pixels": 30 * 28 * 28}
CAMERA = (150, 100)
REDUCED = Schedule(
    stages=(Stage(layer=1, keep=9), Stage(layer=2, keep=4)), positions="preserved", probe_rows="answer"
)


def save_qwen_checkpoint(
    folder: Path, *, tie: bool = False, num_layers: int = 4, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a random model with tokenizer and image processor into ``folder`` and return it.

    The chat template is left away: the exporter brings the family's.
    """
    import transformers as hf

    torch.manual_seed(17)
    config = hf.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": num_layers, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": len(VOCABULARY), "max_position_embeddings": 1024,
            "initializer_range": 0.2, "bos_token_id": 90, "eos_token_id": END_ID, "tie_word_embeddings": tie,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
            "window_size": 56, "fullatt_block_indexes": [1, 3], "initializer_range": 0.2,
        },
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VOCABULARY.index("<|vision_start|>"),
        vision_end_token_id=VOCABULARY.index("<|vision_end|>"),
        tie_word_embeddings=tie,
    )  # fmt: skip
    return _save(hf.Qwen2_5_VLForConditionalGeneration(config), folder, dtype=dtype, patch_size=14)


def save_qwen3_vl_checkpoint(
    folder: Path, *, tie: bool = False, num_layers: int = 4, dtype: torch.dtype = torch.float32, **vision: Any
) -> Path:
    """The same of Qwen3-VL; ``vision`` changes its tower.

    A patch has 14 pixels, so that images have the same tokens as Qwen2.5-VL's.
    """
    import transformers as hf

    torch.manual_seed(23)
    config = hf.Qwen3VLConfig(
        text_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": num_layers, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 24, "vocab_size": len(VOCABULARY), "max_position_embeddings": 1024,
            "initializer_range": 0.2, "bos_token_id": 90, "eos_token_id": END_ID, "tie_word_embeddings": tie,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 3, 3], "mrope_interleaved": True
            },
        },
        vision_config={
            "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
            "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1, 3], "initializer_range": 0.2, **vision,
        },
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VOCABULARY.index("<|vision_start|>"),
        vision_end_token_id=VOCABULARY.index("<|vision_end|>"),
        tie_word_embeddings=tie,
    )  # fmt: skip
    return _save(hf.Qwen3VLForConditionalGeneration(config), folder, dtype=dtype, patch_size=14)


def save_qwen3_5_checkpoint(
    folder: Path, *, tie: bool = False, num_layers: int = 8, dtype: torch.dtype = torch.float32
) -> Path:
    """The same of Qwen3.5: every fourth layer has attention, the others have states; all sizes of heads differ.

    With the others' range of weights, transformers' own logits in float32 and float64 differ by 0.002.
    """
    import transformers as hf

    torch.manual_seed(29)
    config = hf.Qwen3_5Config(
        text_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": num_layers, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "vocab_size": len(VOCABULARY), "max_position_embeddings": 1024,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 20,
            "initializer_range": 0.1, "bos_token_id": 90, "eos_token_id": END_ID, "tie_word_embeddings": tie,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
            "num_position_embeddings": 25, "initializer_range": 0.2,
        },
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VOCABULARY.index("<|vision_start|>"),
        vision_end_token_id=VOCABULARY.index("<|vision_end|>"),
        tie_word_embeddings=tie,
    )  # fmt: skip
    _save(hf.Qwen3_5ForConditionalGeneration(config), folder, dtype=dtype, patch_size=14)
    _character_tokenizer().save_pretrained(folder)
    return folder


def _save(model: Any, folder: Path, *, dtype: torch.dtype, patch_size: int) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a forgotten one
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": patch_size,
        "merge_size": 2,
        **PIXELS,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _tokenizer() -> Any:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def _character_tokenizer() -> Any:
    vocabulary = {token: index for index, token in enumerate(("<unk>", *CHARACTERS, *MARKS))}
    assert vocabulary["<|image_pad|>"] == IMAGE_ID
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return Qwen3_5Tokenizer(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def hugging_face_inputs(
    pipeline: Pipeline, picture: Image.Image | None, prompt: str
) -> dict[str, torch.Tensor]:
    """Return what Hugging Face's processor would give: token ids, and patches in its own order.

    The patches' numbers are the runtime's, which has tests of its own against Hugging Face's image processor.
    """
    ids = pipeline._encode(build_messages(prompt, images=[] if picture is None else [picture]))
    if picture is None:
        return {"input_ids": torch.from_numpy(ids.before.astype(np.int64))[None]}
    processing: Any = pipeline.images  # type: ignore[attr-defined]
    inputs = processing.prepare(picture)
    rows, columns = (2 * count for count in processing.token_grid(*picture.size))
    tokens = inputs["token_index"]
    by_token: NDArray[np.float32] = inputs["pixel_values"].reshape(len(tokens), 4, -1)
    input_ids = np.concatenate([ids.before, np.full(len(tokens), IMAGE_ID), ids.after]).astype(np.int64)
    return {
        "input_ids": torch.from_numpy(input_ids)[None],
        "mm_token_type_ids": torch.from_numpy((input_ids == IMAGE_ID).astype(np.int32))[None],
        "pixel_values": torch.from_numpy(by_token[tokens].reshape(len(tokens) * 4, -1)),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }
