"""A small random SmolVLM2 checkpoint with SigLIP and Llama, and Hugging Face's processor for it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trio_edge.runtime.prompts.chat import SMOLVLM_TEMPLATE

if TYPE_CHECKING:
    from pathlib import Path

MOST_TILES = 3
"""Tiles along the longer side of an image."""
NAMES = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
MARKS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<global-img>", *NAMES, "<fake_token_around_image>", "<image>",
    "<end_of_utterance>",
)  # fmt: skip
# a row of tiles ends with one line break, the last row with two, which are one token as in the released models
WORDS = ("<unk>", "User:", "Assistant:", "System:", "\n", "\n\n", *(f"w{index}" for index in range(80)))
VOCABULARY = (*WORDS, *MARKS)
IMAGE_ID, END_ID = VOCABULARY.index("<image>"), VOCABULARY.index("<end_of_utterance>")
TILE_SIZE, PATCH_SIZE, SCALE = 26, 4, 2  # as in the largest released model, patches do not fill a tile
TOKENS_PER_TILE = (TILE_SIZE // PATCH_SIZE // SCALE) ** 2


def save_smolvlm_checkpoint(
    folder: Path,
    *,
    tie: bool = False,
    num_layers: int = 4,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """Write a random model and its processor's files into ``folder`` and return it; ``settings`` are the configuration's."""
    import transformers as hf

    torch.manual_seed(31)
    values = {
        "text_config": {
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": num_layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(VOCABULARY),
            "max_position_embeddings": 1024, "initializer_range": 0.2, "eos_token_id": END_ID,
            "pad_token_id": VOCABULARY.index("<|im_end|>"), "tie_word_embeddings": tie,
        },
        "vision_config": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
            "image_size": TILE_SIZE, "patch_size": PATCH_SIZE, "initializer_range": 0.2,
        },
        "image_token_id": IMAGE_ID,
        "scale_factor": SCALE,
        "tie_word_embeddings": tie,
    }  # fmt: skip
    model = hf.SmolVLMForConditionalGeneration(hf.SmolVLMConfig(**{**values, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # zeros and ones would hide a forgotten norm or bias
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    _write_processor(folder)
    return folder


def _write_processor(folder: Path) -> None:
    """Write the files of a released checkpoint, which are from before transformers 5; the chat template is the exporter's."""
    image_processor().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    released = {"image_seq_len": TOKENS_PER_TILE, "processor_class": "SmolVLMProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(released))


def image_processor(*, longest_edge: int = MOST_TILES * TILE_SIZE, **settings: Any) -> Any:
    """Return the image processor of the checkpoint; ``settings`` change it."""
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    return SmolVLMImageProcessorPil(
        size={"longest_edge": longest_edge}, max_image_size={"longest_edge": TILE_SIZE}, **settings
    )


def processor(**images: Any) -> Any:
    """Return Hugging Face's SmolVLMProcessor, without its part for videos, which needs torchvision.

    Args:
        images: Settings of the image processor.
    """
    from transformers import SmolVLMProcessor

    class ImagesOnly(SmolVLMProcessor):
        def check_argument_for_proper_class(self, _name: str, argument: Any) -> type:
            return type(argument)

    no_videos = SimpleNamespace(num_frames=None, fps=None)
    return ImagesOnly(
        image_processor(**images),
        tokenizer(),
        no_videos,
        image_seq_len=TOKENS_PER_TILE,
        chat_template=SMOLVLM_TEMPLATE,
    )


def tokenizer() -> Any:
    """Return the checkpoint's tokenizer: a token for each word, and one for one or two line breaks."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex(r"\n+|\w+:"), "isolated")]
    )
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        extra_special_tokens={
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
    )
