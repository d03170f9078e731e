"""Qwen2.5-VL: dynamic-resolution encoder with window attention, M-RoPE, and Qwen2 decoder layers with biases.

As for LLaVA, TRIO probes the next layer with the model's own head. The reference's Qwen code has two defects here: it
probes the layer that has just run, and may use the input embeddings as the head. Kept tokens keep their M-RoPE positions,
as in the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, final

import msgspec
import torch

from trio_edge.export.families.base import FamilyModel, VisionGraph, refuse_features, visual_tokens
from trio_edge.export.families.config_files import read_image_processor, read_video_processor
from trio_edge.export.families.decoder import choose_attention, family_model, read_config, require_same
from trio_edge.export.graphs.vision.windowed import (
    INV_FREQ_NAME,
    WindowedVision,
    check_windowed_keep,
    inverse_frequencies,
    windowed_groups,
)
from trio_edge.runtime.bundle.errors import ManifestError, ScheduleError
from trio_edge.runtime.bundle.graph_io import KEPT_TOKENS
from trio_edge.runtime.bundle.manifest import TensorSpec, VisionDimensions
from trio_edge.runtime.images.patches import PatchImages
from trio_edge.runtime.images.qwen import QwenImages
from trio_edge.runtime.prompts.chat import QWEN2_5_VL_TEMPLATE
from trio_edge.runtime.videos.interface import VideoProcessing, video_processing
from trio_edge.runtime.videos.qwen import Qwen3Videos, Qwen25Videos

if TYPE_CHECKING:
    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.runtime.images.interface import ImageProcessing

    _Images = TypeVar("_Images", bound=PatchImages)

DEFAULT_MAX_VISUAL = 1280
"""Default for the most visual tokens of an image: a megapixel; the model allows 16384."""


@final
class Qwen25Vl:
    """Implements ``Family``."""

    model_type = "qwen2_5_vl"
    positions: tuple[Positions, ...] = ("preserved",)
    image_marks = ("", "")

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return ChatML with the vision marks."""
        return QWEN2_5_VL_TEMPLATE

    def build(
        self, checkpoint: Checkpoint, *, processing: ImageProcessing, dtype: FloatType, with_features: bool
    ) -> FamilyModel:
        """Return the model's modules; see ``Family``."""
        refuse_features(self.model_type, with_features=with_features)
        from transformers import Qwen2_5_VLForConditionalGeneration

        config = read_config(checkpoint)
        choose_attention(config)
        text, vision = config.text_config, config.vision_config
        root: Any = Qwen2_5_VLForConditionalGeneration(config)
        return family_model(
            root,
            vision=_vision_graph(root.model, vision, processing=processing, dtype=dtype),
            vision_dimensions=VisionDimensions(
                num_layers=vision.depth,
                hidden_size=vision.hidden_size,
                intermediate_size=vision.intermediate_size,
                patches_per_tile=None,
                mlp_matrices=3,
                patches_per_window=(vision.window_size // vision.patch_size) ** 2,
                num_full_layers=len(vision.fullatt_block_indexes),
                projector_weights=_merger_weights(vision),
                patches_per_token=vision.spatial_merge_size**2,
                merged_weights=2 * (processing.encoder_keep or 0) * text.hidden_size,
            ),
            has_mrope=True,
        )

    def image_processing(
        self, checkpoint: Checkpoint, *, encoder_keep: int | None, max_visual: int | None
    ) -> ImageProcessing:
        """Return scaling and patches; see ``Family``."""
        vision = read_config(checkpoint).vision_config
        processing = patch_images(
            QwenImages, checkpoint, vision, max_visual=max_visual, window_size=vision.window_size
        )
        if encoder_keep is not None:
            most = processing.any_image_sizes()[-1]["N"]
            check_windowed_keep(encoder_keep, max_visual=most, vision_config=vision)
        return msgspec.structs.replace(processing, encoder_keep=encoder_keep)

    def video_processing(self, checkpoint: Checkpoint, processing: ImageProcessing) -> VideoProcessing:
        """Return sampling and scaling; see ``VideoFamily``."""
        vision = read_config(checkpoint).vision_config
        return patch_videos(
            Qwen25Videos, checkpoint, processing, tokens_per_second=float(vision.tokens_per_second)
        )


def patch_videos(
    kind: type[Qwen25Videos | Qwen3Videos],
    checkpoint: Checkpoint,
    processing: ImageProcessing,
    **tower: float,
) -> VideoProcessing:
    """Return the video processing of ``checkpoint``, of class ``kind``; raise CheckpointError if it is not supported.

    ``processing`` is that of images; ``tower`` has fields of ``kind`` that the processor's file lacks.
    """
    assert isinstance(processing, PatchImages)  # as the families' image_processing makes it
    values = kind.from_preprocessor_config(read_video_processor(checkpoint), images=processing, **tower)
    return video_processing(values.to_dict(), images=processing)


def patch_images(
    kind: type[_Images], checkpoint: Checkpoint, vision_config: Any, *, max_visual: int | None, **tower: int
) -> _Images:
    """Return the image processing of ``checkpoint``, of class ``kind``, with at most ``max_visual`` visual tokens per image.

    ``max_visual`` None stands for ``DEFAULT_MAX_VISUAL``; ``tower`` has fields of ``kind`` that the processor's file lacks.

    Raises:
        CheckpointError: If the processor is not supported, or belongs to another vision tower.
        ScheduleError: If the processor does not scale images down to ``max_visual``.
    """
    processing = kind.from_preprocessor_config(
        {"image_processor_type": "Qwen2VLImageProcessor", **read_image_processor(checkpoint)}, **tower
    )
    names = ("patch_size", "temporal_patch_size", "spatial_merge_size")
    theirs = tuple(getattr(vision_config, name) for name in names)
    ours = (processing.patch_size, processing.temporal_patch_size, processing.merge_size)
    require_same("patch sizes", checkpoint, tower=theirs, processor=ours)
    wanted = DEFAULT_MAX_VISUAL if max_visual is None else max_visual
    most = min(processing.max_pixels, wanted * processing.token_size**2)
    # only a number from the user may be below the processor's minimum, not the default
    least = min(processing.min_pixels, most) if max_visual is None else processing.min_pixels
    try:
        return msgspec.structs.replace(processing, max_pixels=most, min_pixels=least)
    except ManifestError:
        fewest = -(-processing.min_pixels // processing.token_size**2)
        raise ScheduleError(
            f"--max-visual: expected at least {fewest} (the processor's min_pixels), got {max_visual}; raise it"
        ) from None


def _vision_graph(inner: Any, vision: Any, *, processing: ImageProcessing, dtype: FloatType) -> VisionGraph:
    values = inverse_frequencies(vision)
    patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    slots = (vision.window_size // vision.patch_size // vision.spatial_merge_size) ** 2
    slots *= vision.spatial_merge_size**2
    inv_freq, keep = torch.empty(len(values), dtype=torch.float32), processing.encoder_keep
    outputs = [visual_tokens(vision.out_hidden_size, dtype=dtype)]
    most = processing.any_image_sizes()[-1]["P"]
    module = WindowedVision(inner.visual, inv_freq=inv_freq, max_patches=most, num_keep=keep)
    if keep is not None:
        outputs.append(TensorSpec(name=KEPT_TOKENS, dtype="int32", shape=(keep,)))
    return VisionGraph(
        module=module,
        inputs=(
            TensorSpec(name="pixel_values", dtype="float32", shape=("P", patch_values)),
            TensorSpec(name="patch_positions", dtype="int32", shape=(2, "P")),
            TensorSpec(name="window_slots", dtype="int32", shape=("W", slots)),
            TensorSpec(name="patch_slot", dtype="int32", shape=("P",)),
            TensorSpec(name="num_patches", dtype="int32", shape=(1,)),
            TensorSpec(name="token_index", dtype="int32", shape=("N",)),
        ),
        outputs=tuple(outputs),
        linear_groups=windowed_groups(inner.visual),
        constants={INV_FREQ_NAME: values},
    )


def _merger_weights(vision: Any) -> int:
    merged = vision.hidden_size * vision.spatial_merge_size**2
    return int(merged * merged + merged * vision.out_hidden_size)
