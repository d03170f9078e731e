"""Model families: one module each, with the interface in ``base``. To add one, write it and list it here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trio_edge.export.checkpoints.packed import packed_format
from trio_edge.export.families.internvl import InternVl
from trio_edge.export.families.llava import Llava
from trio_edge.export.families.llava_onevision import LlavaOnevision
from trio_edge.export.families.qwen2_5_vl import Qwen25Vl
from trio_edge.export.families.qwen3_vl import Qwen3Vl
from trio_edge.export.families.smolvlm import SmolVlm
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.prompts.chat import MISTRAL_TEMPLATE

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.families.base import Family

__all__ = ["FAMILIES", "check_architecture", "family_of"]

FAMILIES: tuple[Family, ...] = (
    # one CLIP crop per image
    Llava(
        model_type="llava", architecture="LlavaForConditionalGeneration", image_processor="CLIPImageProcessor"
    ),
    # a base tile and a grid of CLIP tiles with newline tokens
    Llava(
        model_type="llava_next",
        architecture="LlavaNextForConditionalGeneration",
        image_processor="LlavaNextImageProcessor",
        mistral_template=MISTRAL_TEMPLATE,
    ),
    LlavaOnevision(),
    Qwen25Vl(),
    Qwen3Vl(),
    InternVl(),
    SmolVlm(),
)


def check_architecture(folder: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError if ``config`` (the content of config.json) has remote code, an unknown family or packing.

    Weights are not read, as they may not be downloaded yet.
    """
    if "auto_map" in config:
        raise CheckpointError(
            f"{folder}: expected an architecture of transformers, got one with remote code, which is never run; use a"
            " checkpoint in the transformers format (names ending in -hf)"
        )
    packed_format(folder, config)
    _family(folder, config)


def family_of(checkpoint: Checkpoint) -> Family:
    """Return the family of ``checkpoint``; raise CheckpointError if there is none."""
    return _family(checkpoint.folder, checkpoint.config)


def _family(folder: Path, config: dict[str, Any]) -> Family:
    model_type = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise CheckpointError(
        f"{folder}: expected model_type {known}, got {model_type!r}; this architecture cannot be exported"
    )
