"""Writes the checkpoint folder: fp16 weights, configuration, tokenizer, chat template and processor files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data import PINPOINTS, TILE
from model import EOS, PAD, SPECIAL, TOKEN_ID, TOKENS, clone
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)  # fmt: skip

if TYPE_CHECKING:
    from pathlib import Path

CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- 'USER: ' -}}
{%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' -}}{%- endif -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] if item['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for item in message['content'] if item['type'] == 'text' -%}{{- item['text'] -}}{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{- '</s>' -}}{%- else -%}{{- ' ' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the word tokenizer: lower-case words, separate punctuation, no token at the beginning."""
    core = Tokenizer(models.WordLevel(TOKEN_ID, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?.,!]"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_processor() -> LlavaNextProcessor:
    """Returns the Hugging Face processor of the model."""
    images = LlavaNextImageProcessor(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextProcessor(
        image_processor=images, tokenizer=make_tokenizer(), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def package(model: LlavaNextForConditionalGeneration, folder: Path) -> None:
    """Writes the checkpoint folder of a model, with fp16 weights under the names of public checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    half = clone(model).half()
    half.config.architectures = ["LlavaNextForConditionalGeneration"]
    half.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=8, bos_token_id=TOKEN_ID["<s>"], eos_token_id=EOS, pad_token_id=PAD
    )
    half.save_pretrained(folder)
    make_processor().save_pretrained(folder)


assert TOKENS[: len(SPECIAL)] == SPECIAL
