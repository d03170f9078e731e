"""LLaVA-NeXT: a base tile and a grid of CLIP tiles with newline tokens, Llama or Mistral decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from trio_edge.export.families.clip_llama import build, picture_processing, read_config
from trio_edge.runtime.chat import MISTRAL_TEMPLATE, VICUNA_TEMPLATE

if TYPE_CHECKING:
    from trio_edge.export.checkpoint import Checkpoint
    from trio_edge.export.families.base import FamilyModel
    from trio_edge.runtime.manifest import FloatType
    from trio_edge.runtime.schedule import Positions
    from trio_edge.runtime.vision_inputs import PictureProcessing


@final
class LlavaNext:
    """See ``Family``."""

    model_type = "llava_next"
    positions: tuple[Positions, ...] = ("compact", "preserved")
    image_marks = ("", "")

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return the template of the decoder's own family."""
        text_type = checkpoint.config.get("text_config", {}).get("model_type")
        return MISTRAL_TEMPLATE if text_type == "mistral" else VICUNA_TEMPLATE

    def build(
        self,
        checkpoint: Checkpoint,
        *,
        processing: PictureProcessing,
        dtype: FloatType,
        with_features: bool,
    ) -> FamilyModel:
        """See ``Family.build``."""
        from transformers import LlavaNextForConditionalGeneration

        return build(
            LlavaNextForConditionalGeneration,
            read_config(checkpoint),
            processing=processing,
            dtype=dtype,
            with_features=with_features,
        )

    def picture_processing(
        self, checkpoint: Checkpoint, *, encoder_keep: int | None, max_visual: int | None
    ) -> PictureProcessing:
        """See ``Family.picture_processing``."""
        return picture_processing(
            checkpoint,
            default_type="LlavaNextImageProcessor",
            encoder_keep=encoder_keep,
            max_visual=max_visual,
        )
