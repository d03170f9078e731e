"""LLaVA-1.5: one CLIP crop per picture, Llama (Vicuna) decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from trio_edge.export.families.clip_llama import build, image_processing, read_config
from trio_edge.runtime.chat import VICUNA_TEMPLATE

if TYPE_CHECKING:
    from trio_edge.export.checkpoint import Checkpoint
    from trio_edge.export.families.base import FamilyModel
    from trio_edge.runtime.image_processing import ImageProcessing


@final
class Llava:
    """See ``Family``."""

    model_type = "llava"

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return Vicuna's template; every released LLaVA-1.5 is a Vicuna."""
        return VICUNA_TEMPLATE

    def build(self, checkpoint: Checkpoint, *, encoder_keep: int | None) -> FamilyModel:
        """See ``Family.build``."""
        from transformers import LlavaForConditionalGeneration

        return build(LlavaForConditionalGeneration, read_config(checkpoint), encoder_keep=encoder_keep)

    def image_processing(self, checkpoint: Checkpoint) -> ImageProcessing:
        """See ``Family.image_processing``."""
        return image_processing(checkpoint, default_type="CLIPImageProcessor")
