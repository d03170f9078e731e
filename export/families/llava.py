"""LLaVA-1.5: one CLIP crop per picture, Llama (Vicuna) decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from trio_edge.export.families.clip_llama import build, picture_processing, read_config
from trio_edge.runtime.chat import VICUNA_TEMPLATE

if TYPE_CHECKING:
    from trio_edge.export.checkpoint import Checkpoint
    from trio_edge.export.families.base import FamilyModel
    from trio_edge.runtime.manifest import FloatType
    from trio_edge.runtime.schedule import Positions
    from trio_edge.runtime.vision_inputs import PictureProcessing


@final
class Llava:
    """See ``Family``."""

    model_type = "llava"
    positions: tuple[Positions, ...] = ("compact", "preserved")
    image_marks = ("", "")

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return Vicuna's template; every released LLaVA-1.5 is a Vicuna."""
        return VICUNA_TEMPLATE

    def build(
        self,
        checkpoint: Checkpoint,
        *,
        processing: PictureProcessing,
        dtype: FloatType,
        with_features: bool,
    ) -> FamilyModel:
        """See ``Family.build``."""
        from transformers import LlavaForConditionalGeneration

        return build(
            LlavaForConditionalGeneration,
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
            checkpoint, default_type="CLIPImageProcessor", encoder_keep=encoder_keep, max_visual=max_visual
        )
