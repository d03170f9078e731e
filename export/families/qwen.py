"""Qwen2.5-VL, Qwen3-VL with Cosmos-Reason2, and Qwen3.5: dynamic resolution, videos, and decoder layers with M-RoPE.

Qwen2.5-VL has an encoder with window attention, and Qwen2 decoder layers with biases. As for LLaVA, TRIO probes the next
layer with the model's own head. The reference's Qwen code has two defects here: it probes the layer that has just run, and may
use the input embeddings as the head. Kept tokens keep their M-RoPE positions, as in the reference.

Qwen3-VL has interleaved M-RoPE, Qwen3 decoder layers with QK-norm, and DeepStack: features of inner vision layers are added to
the visual rows after the first decoder layers, one plane of rows per layer. A stage drops its tokens from the remaining planes,
too.

Qwen3.5 has no DeepStack. Three of four decoder layers have linear attention (``export/graphs/state_layers.py``); the others gate
their attention and rotate a quarter of each head. Stages stand before layers with attention, where a probe has a closed form.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar, final

import msgspec
import torch

from trio_edge.export.families import base
from trio_edge.export.families.base import Family, VisionGraph
from trio_edge.export.graphs.vision import deepstack, windowed
from trio_edge.export.graphs.vision.patches import inverse_frequencies
from trio_edge.runtime.bundle.errors import ManifestError, ScheduleError
from trio_edge.runtime.bundle.graph_io import DEEPSTACK_TOKENS, KEPT_TOKENS
from trio_edge.runtime.bundle.manifest import TensorSpec, VisionDimensions
from trio_edge.runtime.images.qwen import PatchImages, Qwen3Images, QwenImages
from trio_edge.runtime.prompts.chat import QWEN2_5_VL_TEMPLATE, QWEN3_VL_TEMPLATE
from trio_edge.runtime.videos.qwen import Qwen3Videos, Qwen25Videos, VideoProcessing, video_processing

if TYPE_CHECKING:
    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.runtime.images.interface import ImageProcessing

    _PatchImages = TypeVar("_PatchImages", bound=PatchImages)

DEFAULT_MAX_VISUAL = 1280
"""Default for the most visual tokens of an image: a megapixel; the model allows 16384."""


class _QwenVl(Family):
    """Settings of all Qwen-VL models."""

    positions: tuple[Positions, ...] = ("preserved",)
    vision_attention = None
    has_mrope = True


@final
class Qwen25Vl(_QwenVl):
    """Qwen2.5-VL."""

    model_type = "qwen2_5_vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"
    chat_template = QWEN2_5_VL_TEMPLATE

    def images(self, checkpoint: Checkpoint, config: Any, max_visual: int | None) -> QwenImages:
        """Return scaling and patches; see ``Family``."""
        size = config.vision_config.window_size
        return _images(QwenImages, checkpoint, config.vision_config, max_visual, window_size=size)

    def check_encoder_keep(self, encoder_keep: int, images: QwenImages, config: Any) -> None:
        """Raise ScheduleError unless an image can keep ``encoder_keep`` tokens."""
        most = images.any_image_sizes()[-1]["N"]
        windowed.check_windowed_keep(encoder_keep, max_visual=most, vision_config=config.vision_config)

    def video_processing(self, checkpoint: Checkpoint, processing: ImageProcessing) -> VideoProcessing:
        """Return sampling and scaling; see ``Family``."""
        rate = float(self.read_config(checkpoint).vision_config.tokens_per_second)
        return _videos(Qwen25Videos, checkpoint, processing, tokens_per_second=rate)

    def vision(
        self, inner: Any, config: Any, *, processing: QwenImages, dtype: FloatType, with_features: bool
    ) -> tuple[VisionGraph, VisionDimensions]:
        """Return the graph of the windowed encoder; see ``Family``."""
        vision, keep = config.vision_config, processing.encoder_keep
        values = inverse_frequencies(inner.visual)
        inv_freq = torch.empty(len(values), dtype=torch.float32)
        most, merge = processing.any_image_sizes()[-1]["P"], vision.spatial_merge_size
        slots = (vision.window_size // vision.patch_size // merge) ** 2 * merge**2
        outputs = [base.visual_tokens(vision.out_hidden_size, dtype=dtype)]
        module = windowed.WindowedVision(inner.visual, inv_freq=inv_freq, max_patches=most, num_keep=keep)
        if keep is not None:
            outputs.append(TensorSpec(name=KEPT_TOKENS, dtype="int32", shape=(keep,)))
        patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        graph = VisionGraph(
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
            linear_groups=windowed.windowed_groups(inner.visual),
            constants={windowed.INV_FREQ_NAME: values},
        )
        return graph, VisionDimensions(
            num_layers=vision.depth,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            patches_per_tile=None,
            mlp_matrices=3,
            patches_per_window=(vision.window_size // vision.patch_size) ** 2,
            num_full_layers=len(vision.fullatt_block_indexes),
            projector_weights=_merger_weights(vision),
            patches_per_token=merge**2,
            merged_weights=2 * (keep or 0) * config.text_config.hidden_size,
        )


class Qwen3Vl(_QwenVl):
    """Qwen3-VL."""

    model_type = "qwen3_vl"
    architecture = "Qwen3VLForConditionalGeneration"
    chat_template = QWEN3_VL_TEMPLATE

    def images(self, checkpoint: Checkpoint, config: Any, max_visual: int | None) -> Qwen3Images:
        """Return scaling and patches; see ``Family``."""
        # transformers takes the largest square table
        side = math.isqrt(config.vision_config.num_position_embeddings)
        return _images(Qwen3Images, checkpoint, config.vision_config, max_visual, table_size=side)

    def video_processing(self, checkpoint: Checkpoint, processing: ImageProcessing) -> VideoProcessing:
        """Return sampling, scaling and timestamps; see ``Family``."""
        return _videos(Qwen3Videos, checkpoint, processing)

    def vision(
        self, inner: Any, config: Any, *, processing: Qwen3Images, dtype: FloatType, with_features: bool
    ) -> tuple[VisionGraph, VisionDimensions]:
        """Return the graph with DeepStack's planes; see ``Family``."""
        visual, vision, width = inner.visual, config.vision_config, config.vision_config.out_hidden_size
        # as transformers, adds no plane that has no decoder layer
        num_planes = len(deepstack.plane_mergers(visual, config.text_config.num_hidden_layers))
        values = inverse_frequencies(visual)
        module = deepstack.DeepstackVision(
            visual,
            inv_freq=torch.empty(len(values), dtype=torch.float32),
            max_patches=processing.any_image_sizes()[-1]["P"],
            num_planes=num_planes,
        )
        graph = VisionGraph(
            module=module,
            inputs=deepstack.vision_inputs(module.embedding.patch_values),
            outputs=(
                base.visual_tokens(width, dtype=dtype),
                *(
                    TensorSpec(name=f"{DEEPSTACK_TOKENS}{plane}", dtype=dtype, shape=("N", width))
                    for plane in range(num_planes)
                ),
            ),
            linear_groups=deepstack.deepstack_groups(visual, num_planes=num_planes),
            constants={deepstack.INV_FREQ_NAME: values},
            layered=module.layered(width=width, dtype=dtype),
            num_deepstack=num_planes,
        )
        return graph, VisionDimensions(
            num_layers=vision.depth,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            patches_per_tile=None,
            projector_weights=(1 + num_planes) * _merger_weights(vision),
            patches_per_token=vision.spatial_merge_size**2,
        )


@final
class Cosmos3(Qwen3Vl):
    """The reasoner of Cosmos3, which is a Qwen3-VL; the generator's tensors in the same files are left out."""

    model_type = "cosmos3_omni"
    architecture = "Cosmos3OmniForConditionalGeneration"


@final
class Qwen35(Qwen3Vl):
    """Qwen3.5, dense sizes: Qwen3-VL's tower without DeepStack, and a decoder with linear attention in most layers."""

    model_type = "qwen3_5"
    architecture = "Qwen3_5ForConditionalGeneration"
    is_hybrid = True


def _merger_weights(vision: Any) -> int:
    merged = vision.hidden_size * vision.spatial_merge_size**2
    return int(merged * (merged + vision.out_hidden_size))


def _images(
    kind: type[_PatchImages], checkpoint: Checkpoint, vision_config: Any, max_visual: int | None, **tower: int
) -> _PatchImages:
    """Return the image processing of ``checkpoint``, of class ``kind``, with at most ``max_visual`` visual tokens per image.

    ``max_visual`` None stands for ``DEFAULT_MAX_VISUAL``; ``tower`` has fields of ``kind`` that the processor's file lacks.

    Raises:
        CheckpointError: If the processor is not supported, or belongs to another vision tower.
        ScheduleError: If the processor does not scale images down to ``max_visual``.
    """
    images = kind.from_preprocessor_config(
        {"image_processor_type": "Qwen2VLImageProcessor", **base.read_image_processor(checkpoint)}, **tower
    )
    names = ("patch_size", "temporal_patch_size", "spatial_merge_size")
    theirs = tuple(getattr(vision_config, name) for name in names)
    ours = (images.patch_size, images.temporal_patch_size, images.merge_size)
    base.require_same("patch sizes", checkpoint, tower=theirs, processor=ours)
    wanted = DEFAULT_MAX_VISUAL if max_visual is None else max_visual
    most = min(images.max_pixels, wanted * images.token_size**2)
    # only a number from the user may be below the processor's minimum, not the default
    least = min(images.min_pixels, most) if max_visual is None else images.min_pixels
    try:
        return msgspec.structs.replace(images, max_pixels=most, min_pixels=least)
    except ManifestError:
        fewest = -(-images.min_pixels // images.token_size**2)
        raise ScheduleError(
            f"--max-visual: expected at least {fewest} (the processor's min_pixels), got {max_visual}; raise it"
        ) from None


def _videos(
    kind: type[Qwen25Videos | Qwen3Videos], checkpoint: Checkpoint, images: ImageProcessing, **tower: float
) -> VideoProcessing:
    """Return the video processing of ``checkpoint``, of class ``kind``; raise CheckpointError if it is not supported.

    ``images`` is the processing of images; ``tower`` has fields of ``kind`` that the processor's file lacks.
    """
    assert isinstance(images, PatchImages)  # as ``Family.images`` makes it
    values = kind.from_preprocessor_config(base.read_video_processor(checkpoint), images=images, **tower)
    return video_processing(values.to_dict(), images=images)
