"""Checkpoints with the names, shapes, shards and files of released models, and random weights.

Weights are written piece by piece, so 14 GB need little memory.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from trio_edge.runtime.prompts.chat import (
    INTERNVL_TEMPLATE,
    LFM2_VL_TEMPLATE,
    LLAVA_ONEVISION_TEMPLATE,
    MINICPM_TEMPLATE,
    MISTRAL3_TEMPLATE,
    MISTRAL_TEMPLATE,
    SMOLVLM_TEMPLATE,
    VICUNA_TEMPLATE,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAFETENSORS_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
PIECE = (4 << 20) + 3  # repeated random values: the disk limits writing, not the generator
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A released checkpoint without its weights."""

    config: Callable[[], Any]
    model: str
    """Class in transformers."""
    renames: tuple[tuple[str, str], ...]
    """Patterns that turn names in transformers' model into those in released files."""
    preprocessor: dict[str, Any]
    chat_template: str
    special_tokens: dict[int, str]
    end_token: int = 151645
    begin_token: int | None = None
    """Token before every prompt, unless the chat template writes it."""


def clip_large(**changes: Any) -> Any:
    sizes = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    return hf.CLIPVisionConfig(**{**sizes, **changes})


def vicuna_7b(**changes: Any) -> Any:
    sizes = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return hf.LlamaConfig(**{**sizes, **changes})


def mistral_7b() -> Any:
    return hf.MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32064, max_position_embeddings=32768, rms_norm_eps=1e-5,
        sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def llava_next(text: Any, vision: Any, pinpoints: list[list[int]]) -> Any:
    return hf.LlavaNextConfig(
        text_config=text, vision_config=vision, image_grid_pinpoints=pinpoints, image_token_index=32000
    )


def tiny() -> Any:
    text = vicuna_7b(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = clip_large(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, projection_dim=32
    )
    return llava_next(text, vision, PINPOINTS)


def llava_onevision(**text: Any) -> Any:
    """Return LLaVA-OneVision's configuration; ``text`` has the decoder's sizes, those of 0.5B by default."""
    sizes = {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 152000, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    # the vision tower and the grids are transformers' defaults
    return hf.LlavaOnevisionConfig(
        text_config={**sizes, **text}, tie_word_embeddings={**sizes, **text}["tie_word_embeddings"]
    )


def llava_onevision_7b() -> Any:
    return llava_onevision(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152128, tie_word_embeddings=False,
    )  # fmt: skip


def qwen2_5_vl(*, text: dict[str, Any], vision: dict[str, Any], tie: bool) -> Any:
    """Return Qwen2.5-VL's configuration; ``text`` and ``vision`` have the sizes, those of 3B by default."""
    text_sizes = {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "max_window_layers": 70, "use_sliding_window": False, "sliding_window": 32768, "tie_word_embeddings": tie,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    vision_sizes = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "in_channels": 3,
    }  # fmt: skip
    return hf.Qwen2_5_VLConfig(
        text_config={**text_sizes, **text}, vision_config={**vision_sizes, **vision}, tie_word_embeddings=tie,
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653,
    )  # fmt: skip


def qwen2_5_vl_3b() -> Any:
    return qwen2_5_vl(text={}, vision={}, tie=True)


def qwen2_5_vl_7b() -> Any:
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_window_layers": 28,
    }  # fmt: skip
    return qwen2_5_vl(text=text, vision={"out_hidden_size": 3584}, tie=False)


def qwen3_vl(*, text: dict[str, Any], out_hidden_size: int) -> Any:
    """Return the configuration of Qwen3-VL-2B or -4B, which have the same vision tower."""
    text_sizes = {
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True
        },
    }  # fmt: skip
    vision = {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": out_hidden_size,
        "patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
    }  # fmt: skip
    return hf.Qwen3VLConfig(
        text_config={**text_sizes, **text}, vision_config=vision, tie_word_embeddings=True,
        image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653,
    )  # fmt: skip


def qwen3_vl_2b() -> Any:
    text = {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    }  # fmt: skip
    return qwen3_vl(text=text, out_hidden_size=2048)


def qwen3_vl_4b() -> Any:
    text = {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    }  # fmt: skip
    return qwen3_vl(text=text, out_hidden_size=2560)


def qwen3_5_9b() -> Any:
    """Return the configuration of Qwen3.5-9B, as far as transformers' classes tell it."""
    text = {
        "head_dim": 256, "max_position_embeddings": 262144, "eos_token_id": 151645,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
    }  # fmt: skip
    return hf.Qwen3_5Config(
        text_config=text, vision_config={"out_hidden_size": 4096}, image_token_id=151655, video_token_id=151656,
        vision_start_token_id=151652, vision_end_token_id=151653,
    )  # fmt: skip


def internvl3_5_2b() -> Any:
    text = {
        "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "eos_token_id": 151645,
    }  # fmt: skip
    vision = {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "attention_bias": True, "image_size": [448, 448], "patch_size": [14, 14],
    }  # fmt: skip
    return hf.InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=151671, image_seq_length=256, tie_word_embeddings=True
    )  # fmt: skip


def ministral_3_3b() -> Any:
    text = {
        "model_type": "ministral3", "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return hf.Mistral3Config(
        text_config=text, vision_config={"model_type": "pixtral", "patch_size": 14, "image_size": 1540, "hidden_act": "silu"},
        tie_word_embeddings=True,
    )  # fmt: skip


def lfm2_5_vl(*, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """Return the configuration of one LFM2.5-VL; only six of 16 decoder layers have attention."""
    text_sizes = {
        "model_type": "lfm2", "num_hidden_layers": 16, "num_key_value_heads": 8, "vocab_size": 65536, "eos_token_id": 7,
        "layer_types": ["full_attention" if layer in (2, 5, 8, 10, 12, 14) else "conv" for layer in range(16)],
    }  # fmt: skip
    vision_sizes = {"model_type": "siglip2_vision_model", "vision_use_head": False}
    return hf.Lfm2VlConfig(
        text_config={**text_sizes, **text}, vision_config={**vision_sizes, **vision}, projector_hidden_size=2048,
        projector_use_layernorm=False,
    )  # fmt: skip


def lfm2_5_vl_450m() -> Any:
    """The vision tower is transformers' default."""
    return lfm2_5_vl(
        text={"hidden_size": 1024, "intermediate_size": 6656, "num_attention_heads": 16}, vision={}
    )


def lfm2_5_vl_1_6b() -> Any:
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    }  # fmt: skip
    return lfm2_5_vl(
        text={"hidden_size": 2048, "intermediate_size": 12288, "num_attention_heads": 32}, vision=vision
    )


def smolvlm2(*, text: dict[str, Any], vision: dict[str, Any] | None = None, scale_factor: int = 4) -> Any:
    """Return the configuration of one SmolVLM2; the two smaller models have the same vision tower."""
    text_sizes = {
        "model_type": "llama", "head_dim": 64, "vocab_size": 49280, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 49279, "pad_token_id": 2,
    }  # fmt: skip
    vision_sizes = {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "image_size": 512, "patch_size": 16,
    }  # fmt: skip
    return hf.SmolVLMConfig(
        text_config={**text_sizes, **text}, vision_config={**vision_sizes, **(vision or {})}, image_token_id=49190,
        scale_factor=scale_factor, tie_word_embeddings=False,
    )  # fmt: skip


def smolvlm2_256m() -> Any:
    return smolvlm2(
        text={
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3,
        }
    )  # fmt: skip


def smolvlm2_500m() -> Any:
    return smolvlm2(
        text={
            "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
            "num_key_value_heads": 5,
        }
    )  # fmt: skip


def smolvlm2_2_2b() -> Any:
    text = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1.3e5},
    }  # fmt: skip
    vision = {
        "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304,
        "image_size": 384, "patch_size": 14,
    }  # fmt: skip
    return smolvlm2(text=text, vision=vision, scale_factor=3)


LLAVA_RENAMES = (
    (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)
QWEN_RENAMES = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
CLIP_PREPROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 336}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 336, "width": 336}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "do_convert_rgb": True,
}  # fmt: skip
ANYRES_PREPROCESSOR = {
    **CLIP_PREPROCESSOR, "image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor",
    "image_grid_pinpoints": PINPOINTS,
}  # fmt: skip
ONEVISION_PREPROCESSOR = {
    "do_resize": True, "size": {"height": 384, "width": 384}, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True, "do_pad": True,
    "image_processor_type": "LlavaOnevisionImageProcessor", "processor_class": "LlavaOnevisionProcessor",
}  # fmt: skip
QWEN_PREPROCESSOR = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}  # fmt: skip
QWEN3_PREPROCESSOR = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor",
}  # fmt: skip
INTERN_PREPROCESSOR = {
    "image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 448, "width": 448},
    "min_patches": 1, "max_patches": 12, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
PIXTRAL_PREPROCESSOR = {
    "image_processor_type": "PixtralImageProcessorFast", "processor_class": "PixtralProcessor", "size": {"longest_edge": 1540},
    "patch_size": {"height": 14, "width": 14}, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
}  # fmt: skip
SMOLVLM_PREPROCESSOR = {
    "image_processor_type": "SmolVLMImageProcessor", "processor_class": "SmolVLMProcessor", "do_convert_rgb": True,
    "do_image_splitting": True, "do_resize": True, "size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512},
    "resample": 1, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}  # fmt: skip
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_TOKENS = {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<image>", 32001: "<pad>"}
QWEN_TOKENS = {
    151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151652: "<|vision_start|>",
    151653: "<|vision_end|>", 151654: "<|vision_pad|>", 151655: "<|image_pad|>", 151656: "<|video_pad|>",
}  # fmt: skip


ONEVISION_TOKENS = {
    151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151646: "<image>", 151647: "<video>",
}  # fmt: skip
INTERN_TOKENS = {
    151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151669: "<img>", 151670: "</img>",
    151671: "<IMG_CONTEXT>",
}  # fmt: skip
MISTRAL_TOKENS = {
    0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 10: "[IMG]", 11: "<pad>", 12: "[IMG_BREAK]", 13: "[IMG_END]",
}  # fmt: skip
LFM2_TOKENS = {
    0: "<|pad|>", 1: "<|startoftext|>", 2: "<|endoftext|>", 6: "<|im_start|>", 7: "<|im_end|>", 396: "<image>",
    **{397 + 10 * row + column: f"<|img_row_{row + 1}_col_{column + 1}|>" for row in range(10) for column in range(10)},
    497: "<|img_thumbnail|>", 498: "<|image_start|>", 499: "<|image_end|>",
}  # fmt: skip
SMOLVLM_TOKENS = {
    0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>", 49152: "<global-img>",
    **{49153 + 6 * row + column: f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)},
    49189: "<fake_token_around_image>", 49190: "<image>", 49279: "<end_of_utterance>",
}  # fmt: skip


MINICPM = json.loads((Path(__file__).parents[2] / "tests/released/minicpm_v_4_6.json").read_text())


def _llava_next_family(config: Callable[[], Any], template: str = VICUNA_TEMPLATE) -> Family:
    return Family(
        config=config, model="LlavaNextForConditionalGeneration", renames=LLAVA_RENAMES,
        preprocessor=ANYRES_PREPROCESSOR, chat_template=template, special_tokens=LLAMA_TOKENS, end_token=2,
        begin_token=1,
    )  # fmt: skip


def _qwen3_family(config: Callable[[], Any], model: str = "Qwen3VLForConditionalGeneration") -> Family:
    return Family(
        config=config, model=model, renames=(), preprocessor=QWEN3_PREPROCESSOR,
        chat_template=QWEN_TEMPLATE, special_tokens=QWEN_TOKENS,
    )  # fmt: skip


def _onevision_family(config: Callable[[], Any]) -> Family:
    return Family(
        config=config, model="LlavaOnevisionForConditionalGeneration", renames=LLAVA_RENAMES,
        preprocessor=ONEVISION_PREPROCESSOR, chat_template=LLAVA_ONEVISION_TEMPLATE, special_tokens=ONEVISION_TOKENS,
    )  # fmt: skip


def _qwen_family(config: Callable[[], Any]) -> Family:
    return Family(
        config=config, model="Qwen2_5_VLForConditionalGeneration", renames=QWEN_RENAMES,
        preprocessor=QWEN_PREPROCESSOR, chat_template=QWEN_TEMPLATE, special_tokens=QWEN_TOKENS,
    )  # fmt: skip


def _smolvlm_family(config: Callable[[], Any], preprocessor: dict[str, Any] = SMOLVLM_PREPROCESSOR) -> Family:
    return Family(
        config=config, model="SmolVLMForConditionalGeneration", renames=(), preprocessor=preprocessor,
        chat_template=SMOLVLM_TEMPLATE, special_tokens=SMOLVLM_TOKENS, end_token=49279,
    )  # fmt: skip


def _lfm2_family(config: Callable[[], Any]) -> Family:
    return Family(
        config=config, model="Lfm2VlForConditionalGeneration", chat_template=LFM2_VL_TEMPLATE, special_tokens=LFM2_TOKENS,
        renames=((r"^model\.vision_tower\.", "model.vision_tower.vision_model."),), end_token=7,
        # all else is transformers' default
        preprocessor={"image_processor_type": "Lfm2VlImageProcessorFast", "processor_class": "Lfm2VlProcessor"},
    )  # fmt: skip


FAMILIES = {
    "llava-next-7b": _llava_next_family(lambda: llava_next(vicuna_7b(), clip_large(), PINPOINTS)),
    "llava-next-mistral-7b": _llava_next_family(
        lambda: llava_next(mistral_7b(), clip_large(), PINPOINTS), MISTRAL_TEMPLATE
    ),
    "llava-1.5-7b": Family(
        config=lambda: hf.LlavaConfig(
            text_config=vicuna_7b(), vision_config=clip_large(), image_token_index=32000
        ),
        model="LlavaForConditionalGeneration",
        renames=LLAVA_RENAMES,
        preprocessor={**CLIP_PREPROCESSOR, "image_processor_type": "CLIPImageProcessor"},
        chat_template=VICUNA_TEMPLATE,
        special_tokens=LLAMA_TOKENS,
        end_token=2,
        begin_token=1,
    ),
    "llava-onevision-0.5b": _onevision_family(llava_onevision),
    "llava-onevision-7b": _onevision_family(llava_onevision_7b),
    "qwen2.5-vl-3b": _qwen_family(qwen2_5_vl_3b),
    "qwen2.5-vl-7b": _qwen_family(qwen2_5_vl_7b),
    "qwen3-vl-2b": _qwen3_family(qwen3_vl_2b),
    "qwen3-vl-4b": _qwen3_family(qwen3_vl_4b),
    "qwen3.5-9b": _qwen3_family(qwen3_5_9b, "Qwen3_5ForConditionalGeneration"),
    "internvl3.5-2b": Family(
        config=internvl3_5_2b,
        model="InternVLForConditionalGeneration",
        renames=(),
        preprocessor=INTERN_PREPROCESSOR,
        chat_template=INTERNVL_TEMPLATE,
        special_tokens=INTERN_TOKENS,
    ),
    "ministral-3-3b": Family(
        config=ministral_3_3b,
        model="Mistral3ForConditionalGeneration",
        renames=(),
        preprocessor=PIXTRAL_PREPROCESSOR,
        chat_template=MISTRAL3_TEMPLATE,
        special_tokens=MISTRAL_TOKENS,
        end_token=2,
        begin_token=1,
    ),
    "lfm2.5-vl-450m": _lfm2_family(lfm2_5_vl_450m),
    "lfm2.5-vl-1.6b": _lfm2_family(lfm2_5_vl_1_6b),
    "minicpm-v-4.6": Family(
        config=lambda: hf.AutoConfig.for_model(**MINICPM["files"]["config.json"]),
        model="MiniCPMV4_6ForConditionalGeneration",
        renames=(),
        preprocessor={
            "image_processor_type": "MiniCPMV4_6ImageProcessor"
        },  # all else is transformers' default
        chat_template=MINICPM_TEMPLATE,
        special_tokens={int(number): token for number, token in MINICPM["tokens"].items()},
        end_token=248046,
    ),
    "smolvlm2-256m": _smolvlm_family(smolvlm2_256m),
    "smolvlm2-500m": _smolvlm_family(smolvlm2_500m),
    "smolvlm2-2.2b": _smolvlm_family(
        smolvlm2_2_2b,
        {**SMOLVLM_PREPROCESSOR, "size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}},
    ),
    "tiny": _llava_next_family(tiny),
}


def make_checkpoint(
    folder: Path, *, family: Family, num_layers: int | None, dtype: str, shard_bytes: int
) -> int:
    """Write a random checkpoint into ``folder`` and return the number of its decoder layers."""
    config = family.config()
    if num_layers is not None:
        config.text_config.num_hidden_layers = num_layers
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[:1] * num_layers
    config.architectures, config.dtype = [family.model], dtype
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    _write_weights(folder, _shapes(config, family), dtype=dtype, shard_bytes=shard_bytes)
    _write_processor(folder, family)
    return int(config.text_config.num_hidden_layers)


def _shapes(config: Any, family: Family) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape under its released name; the model is built without memory."""
    with torch.device("meta"):
        state = getattr(hf, family.model)(config).state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {_released_name(name, family): tuple(t.shape) for name, t in state.items() if name not in tied}


def _released_name(name: str, family: Family) -> str:
    for pattern, replacement in family.renames:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def _write_weights(folder: Path, shapes: dict[str, tuple[int, ...]], *, dtype: str, shard_bytes: int) -> None:
    size = getattr(torch, dtype).itemsize
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        used += math.prod(shape) * size
        if used > shard_bytes and shards[-1]:
            shards.append({})
            used = math.prod(shape) * size
        shards[-1][name] = shape
    generator = np.random.default_rng(0)
    piece = torch.from_numpy(generator.standard_normal(PIECE, dtype=np.float32)).mul(0.02)
    raw = memoryview(piece.to(getattr(torch, dtype)).view(torch.uint8).numpy())
    one = torch.ones(1, dtype=getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()
    weight_map = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (folder / file).open("wb") as stream:
            stream.write(_header(shard, dtype=dtype, size=size))
            for name, shape in shard.items():
                if len(shape) == 1 and name.endswith("weight"):  # a norm
                    stream.write(one * shape[0])
                    continue
                start = size * int(generator.integers(PIECE))
                for part in _cyclic(raw, start, math.prod(shape) * size):
                    stream.write(part)
    total = size * sum(math.prod(shape) for shape in shapes.values())
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    (folder / "model.safetensors.index.json").write_text(index_text)


def _cyclic(raw: memoryview, start: int, count: int) -> Iterator[memoryview]:
    while count:
        part = raw[start : start + count]
        yield part
        count -= len(part)
        start = 0


def _header(shapes: dict[str, tuple[int, ...]], *, dtype: str, size: int) -> bytes:
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * size
        entries[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_processor(folder: Path, family: Family) -> None:
    special = family.special_tokens
    words = [special.get(index, f"w{index}") for index in range(max(special) + 1)]
    unknown = special.get(0, words[0])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special.values()])
    begin, end = None, family.end_token
    if family.begin_token is not None:
        begin = special[family.begin_token]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, family.begin_token)]
        )
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=special[end]
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(family.preprocessor, indent=1))
    (folder / "chat_template.jinja").write_text(family.chat_template)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))


# Options of the scripts that measure at full size.


def add_options(parser: argparse.ArgumentParser, *, family: str, folder: str) -> None:
    """Add the options that ``checkpoint_of`` reads."""
    parser.add_argument("--family", choices=list(FAMILIES), default=family)
    parser.add_argument("--layers", type=int, help="decoder layers [default: the family's]")
    parser.add_argument(
        "--dtype", choices=list(SAFETENSORS_DTYPES), default="float16", help="type of the checkpoint"
    )
    parser.add_argument("--shard-gb", type=float, default=5.0, help="size of a weight file, in GB")
    parser.add_argument("--folder", type=Path, default=Path(folder), help="new folder for all files")
    parser.add_argument("--keep-files", action="store_true", help="keep all files, and reuse them next time")


@contextmanager
def checkpoint_of(options: argparse.Namespace, *others: Path) -> Iterator[Path]:
    """Yield a checkpoint in the options' folder. Without --keep-files it and ``others`` are deleted at the end."""
    checkpoint = options.folder / "checkpoint"
    if not checkpoint.exists():
        make_checkpoint(
            checkpoint,
            family=FAMILIES[options.family],
            num_layers=options.layers,
            dtype=options.dtype,
            shard_bytes=int(1e9 * options.shard_gb),
        )
    try:
        yield checkpoint
    finally:
        if not options.keep_files:
            for folder in (*others, checkpoint):
                shutil.rmtree(folder, ignore_errors=True)
