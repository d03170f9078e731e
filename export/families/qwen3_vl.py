"""Qwen3-VL, including Cosmos-Reason2: DeepStack, interleaved M-RoPE, and Qwen3 decoder layers with QK-norm.

DeepStack adds features of inner vision layers to the visual rows after the first decoder layers, one plane of rows per
layer. A stage drops its tokens from the remaining planes, too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from trio_edge.export.families.base import (
    FamilyModel,
    VisionGraph,
    refuse_encoder_keep,
    refuse_features,
    visual_tokens,
)
from trio_edge.export.families.decoder import choose_attention, family_model, read_config
from trio_edge.export.families.qwen2_5_vl import patch_images, patch_videos
from trio_edge.export.graphs.vision.deepstack import (
    INV_FREQ_NAME,
    DeepstackVision,
    deepstack_groups,
    plane_mergers,
    vision_inputs,
)
from trio_edge.runtime.bundle.graph_io import DEEPSTACK_TOKENS
from trio_edge.runtime.bundle.manifest import TensorSpec, VisionDimensions
from trio_edge.runtime.images.qwen import Qwen3Images
from trio_edge.runtime.prompts.chat import QWEN3_VL_TEMPLATE
from trio_edge.runtime.videos.qwen import Qwen3Videos

if TYPE_CHECKING:
    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.runtime.videos.interface import VideoProcessing


@final
class Qwen3Vl:
    """Implements ``Family``."""

    model_type = "qwen3_vl"
    positions: tuple[Positions, ...] = ("preserved",)
    image_marks = ("", "")

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return ChatML with the vision marks and no default system message."""
        return QWEN3_VL_TEMPLATE

    def build(
        self, checkpoint: Checkpoint, *, processing: ImageProcessing, dtype: FloatType, with_features: bool
    ) -> FamilyModel:
        """Return the model's modules; see ``Family``."""
        refuse_features(self.model_type, with_features=with_features)
        from transformers import Qwen3VLForConditionalGeneration

        config = read_config(checkpoint)
        choose_attention(config)
        text, vision = config.text_config, config.vision_config
        root: Any = Qwen3VLForConditionalGeneration(config)
        # as transformers, adds no plane that has no decoder layer
        num_planes = len(plane_mergers(root.model.visual, text.num_hidden_layers))
        merged = vision.hidden_size * vision.spatial_merge_size**2
        return family_model(
            root,
            vision=_vision_graph(
                root.model.visual, vision, processing=processing, dtype=dtype, num_planes=num_planes
            ),
            vision_dimensions=VisionDimensions(
                num_layers=vision.depth,
                hidden_size=vision.hidden_size,
                intermediate_size=vision.intermediate_size,
                patches_per_tile=None,
                projector_weights=(1 + num_planes) * merged * (merged + vision.out_hidden_size),
                patches_per_token=vision.spatial_merge_size**2,
            ),
            has_mrope=True,
            num_deepstack=num_planes,
        )

    def image_processing(
        self, checkpoint: Checkpoint, *, encoder_keep: int | None, max_visual: int | None
    ) -> ImageProcessing:
        """Return scaling and patches; see ``Family``."""
        vision = read_config(checkpoint).vision_config
        refuse_encoder_keep(self.model_type, encoder_keep)
        # transformers takes the largest square table
        side = math.isqrt(vision.num_position_embeddings)
        return patch_images(Qwen3Images, checkpoint, vision, max_visual=max_visual, table_size=side)

    def video_processing(self, checkpoint: Checkpoint, processing: ImageProcessing) -> VideoProcessing:
        """Return sampling, scaling and timestamps; see ``VideoFamily``."""
        return patch_videos(Qwen3Videos, checkpoint, processing)


def _vision_graph(
    visual: Any, vision: Any, *, processing: ImageProcessing, dtype: FloatType, num_planes: int
) -> VisionGraph:
    with unset_fake_temporarily():  # the graph holds the frequencies, so they need values
        inv_freq, _ = type(visual.rotary_pos_emb).compute_axial_rope_parameters(vision)
        values = inv_freq.to(torch.float32).numpy()
    module = DeepstackVision(
        visual,
        inv_freq=torch.empty(len(values), dtype=torch.float32),
        max_patches=processing.any_image_sizes()[-1]["P"],
        num_planes=num_planes,
    )
    width = vision.out_hidden_size
    return VisionGraph(
        module=module,
        inputs=vision_inputs(module.embedding.patch_values),
        outputs=(
            visual_tokens(width, dtype=dtype),
            *(
                TensorSpec(name=f"{DEEPSTACK_TOKENS}{plane}", dtype=dtype, shape=("N", width))
                for plane in range(num_planes)
            ),
        ),
        linear_groups=deepstack_groups(visual, num_planes=num_planes),
        constants={INV_FREQ_NAME: values},
        layered=module.layered(width=width, dtype=dtype),
    )
