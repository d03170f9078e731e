"""Prompts with several images, as a product of number, shape and family, and what Hugging Face's processors make of them.

Nothing here comes from the runtime but the chat templates that families without one are exported with.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.checkpoints import save_checkpoint
from tests.internvl_checkpoints import INTERNVL_TEMPLATE, TOKENS_PER_TILE, save_internvl_checkpoint
from tests.lfm2_checkpoints import save_lfm2_vl_checkpoint
from tests.minicpm_checkpoints import save_minicpm_checkpoint
from tests.mistral3_checkpoints import save_mistral3_checkpoint
from tests.onevision_checkpoints import ASPECT_RATIO, save_onevision_checkpoint
from tests.pictures import random_picture
from tests.qwen_checkpoints import save_qwen3_5_checkpoint, save_qwen3_vl_checkpoint, save_qwen_checkpoint
from tests.smolvlm_checkpoints import save_smolvlm_checkpoint
from trio_edge.runtime.bundle.schedule import Stage
from trio_edge.runtime.prompts.chat import (
    LFM2_VL_TEMPLATE,
    MINICPM_TEMPLATE,
    MISTRAL3_TEMPLATE,
    QWEN2_5_VL_TEMPLATE,
    QWEN3_VL_TEMPLATE,
    SMOLVLM_TEMPLATE,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.runtime.prompts.chat import Message


@dataclass(frozen=True)
class Family:
    """A family's small checkpoint."""

    save: Callable[..., Path]
    model_class: str
    positions: Positions = "compact"
    options: tuple[tuple[str, Any], ...] = ()
    layers: tuple[int, ...] = (1,)
    """Of its stages; two where a second one can go wrong in its own way: with one axis of positions, with DeepStack's planes, and
    with states, where all layers before the first stage have some."""
    template: str | None = None
    """Chat template, if the checkpoint has none."""
    processor: tuple[tuple[str, Any], ...] = ()
    """Constants of the processor that the checkpoint lacks."""


FAMILIES = {
    "llava": Family(lambda folder: save_checkpoint(folder, family="llava"), "LlavaForConditionalGeneration"),
    "llava_next": Family(save_checkpoint, "LlavaNextForConditionalGeneration", layers=(1, 2)),
    "llava_onevision": Family(
        save_onevision_checkpoint,
        "LlavaOnevisionForConditionalGeneration",
        processor=(("vision_aspect_ratio", ASPECT_RATIO),),
    ),
    "internvl": Family(
        save_internvl_checkpoint,
        "InternVLForConditionalGeneration",
        template=INTERNVL_TEMPLATE,
        processor=(("image_seq_length", TOKENS_PER_TILE),),
    ),
    "smolvlm": Family(
        save_smolvlm_checkpoint,
        "SmolVLMForConditionalGeneration",
        options=(("max_text", 192),),
        template=SMOLVLM_TEMPLATE,
    ),
    "mistral3": Family(
        save_mistral3_checkpoint,
        "Mistral3ForConditionalGeneration",
        options=(("max_text", 128),),
        layers=(1, 2),
        template=MISTRAL3_TEMPLATE,
    ),
    "lfm2_vl": Family(
        save_lfm2_vl_checkpoint,
        "Lfm2VlForConditionalGeneration",
        options=(("max_text", 192),),
        layers=(2, 4),
        template=LFM2_VL_TEMPLATE,
    ),
    "minicpmv4_6": Family(
        save_minicpm_checkpoint,
        "MiniCPMV4_6ForConditionalGeneration",
        layers=(3, 7),
        options=(("max_text", 192),),
        template=MINICPM_TEMPLATE,
    ),
    "qwen2_5_vl": Family(
        save_qwen_checkpoint,
        "Qwen2_5_VLForConditionalGeneration",
        "preserved",
        template=QWEN2_5_VL_TEMPLATE,
    ),
    "qwen3_vl": Family(
        save_qwen3_vl_checkpoint,
        "Qwen3VLForConditionalGeneration",
        "preserved",
        layers=(1, 2),
        template=QWEN3_VL_TEMPLATE,
    ),
    "qwen3_5": Family(
        save_qwen3_5_checkpoint,
        "Qwen3_5ForConditionalGeneration",
        "preserved",
        layers=(3, 7),
        options=(("max_text", 192),),
        template=QWEN3_VL_TEMPLATE,
    ),
}


def stages_of(family: Family, *keeps: int) -> tuple[Stage, ...]:
    """Return stages that keep these numbers of tokens, at the family's layers."""
    return tuple(Stage(layer=layer, keep=keep) for layer, keep in zip(family.layers, keeps))


MAX_IMAGES = 4
SIZES = [(60, 45), (37, 101), (28, 28), (130, 31)]
SHAPES = {
    "square": (56, 56),
    "wide": (101, 37),
    "tall": (45, 90),
    "thin": (150, 11),
    "small": (9, 7),
}
"""(width, height) in pixels of images that processors treat in different ways."""


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _image(index: int) -> dict[str, Any]:
    return {"type": "image", "image": random_picture(*SIZES[index], seed=index)}


def _user(*content: Any) -> Message:
    return {"role": "user", "content": list(content)}


CONVERSATIONS: dict[str, list[Message]] = {
    "two images": [_user(_image(0), _image(1), _text("w1 w2 w3"))],
    "four images between text": [
        _user(
            _text("w5"), _image(0), _text("w6 w7"), _image(1), _image(2), _text("w8"), _image(3), _text("w9")
        )
    ],
    "an image in each turn": [
        _user(_image(3), _text("w1 w2")),
        {"role": "assistant", "content": [_text("w3 w4")]},
        _user(_text("w4"), _image(2), _text("w5 w6 w7 w8")),
    ],
    "twice the same": [_user(_image(2), _text("w1"), _image(2), _text("w2"))],
}


def _product() -> dict[str, list[Message]]:
    """Return a question about one to four images, all of one shape, and of different shapes that begin with each shape."""
    found, names = {}, list(SHAPES)
    for number, first, step in itertools.product(range(1, MAX_IMAGES + 1), range(len(names)), (0, 1)):
        chosen = [names[(first + place * step) % len(names)] for place in range(number)]
        images = [
            {"type": "image", "image": random_picture(*SHAPES[name], seed=place)}
            for place, name in enumerate(chosen)
        ]
        found[", ".join(chosen)] = [_user(*images, _text("w3 w1 w2"))]
    return found


PRODUCT = _product()


def several_arrays() -> dict[str, Any]:
    """Return what each family's processor gives for all conversations, by name; an error, for one that fails."""
    arrays: dict[str, Any] = {}
    for name, family in FAMILIES.items():
        try:
            arrays |= {f"several/{name}/{key}": value for key, value in _arrays_of(family).items()}
        except Exception as error:  # the processors of other families have tests that read the same file
            arrays[f"several/{name}/error"] = f"{type(error).__name__}: {error}"
    return arrays


def _arrays_of(family: Family) -> dict[str, Any]:
    from transformers import AutoProcessor

    with tempfile.TemporaryDirectory() as temporary:
        folder = family.save(Path(temporary) / "ck")
        processor = AutoProcessor.from_pretrained(folder, **dict(family.processor))
    assert processor.image_processor.backend == "torchvision", processor.image_processor
    arrays: dict[str, Any] = {}
    for conversation, messages in {**CONVERSATIONS, **PRODUCT}.items():
        outputs = processor.apply_chat_template(
            messages,
            family.template,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="np",
        )
        arrays |= {f"{conversation}/{key}": value for key, value in outputs.items()}
    return arrays
