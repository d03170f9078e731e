"""Ministral 3 and Mistral Small 3.1: a Pixtral tower for images of any size, and a Mistral decoder.

Ministral 3's decoder scales each query by its position. transformers' layer does so in the graphs, and ``trio/saliency.py``
does the same in probes. The prompt has a text token after each row of visual tokens (``ImageLayout.text``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import msgspec
import torch

from trio_edge.export.families import base
from trio_edge.export.families.base import Family, VisionGraph
from trio_edge.export.graphs.vision import deepstack, pixtral
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.manifest import VisionDimensions
from trio_edge.runtime.images.pixtral import PixtralImages
from trio_edge.runtime.prompts.chat import MISTRAL3_TEMPLATE

if TYPE_CHECKING:
    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType

# names of the texts after rows of visual tokens: the processor's, and ours
_MARKS = {"image_break_token": "break_mark", "image_end_token": "end_mark"}


@final
class Mistral3(Family):
    """Ministral 3 and Mistral Small 3.1. It has no ``image_marks``: the texts after rows are in ``ImageLayout.text``."""

    model_type = "mistral3"
    architecture = "Mistral3ForConditionalGeneration"
    chat_template = MISTRAL3_TEMPLATE
    text_types = ("mistral", "ministral3")
    vision_type = "pixtral"
    vision_attention = None
    required = (("vision_feature_layer", -1),)

    def check_config(self, config: Any, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError unless patches are square and queries have a scale that can be computed."""
        vision, rope = config.vision_config, config.text_config.rope_parameters
        beta, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
        is_scaled = config.text_config.model_type == "ministral3"
        # Layers derive the size of a head; head_dim is that of the frequencies.
        head = vision.hidden_size // vision.num_attention_heads
        for name, is_supported, expected, got in (
            ("spatial_merge_size", config.spatial_merge_size in (1, 2), "1 or 2", config.spatial_merge_size),
            ("vision patch_size", isinstance(vision.patch_size, int), "one number", vision.patch_size),
            ("vision num_channels", vision.num_channels == 3, "3", vision.num_channels),
            ("vision head_dim", head % 4 == 0 and head == vision.head_dim, f"{head}, a multiple of 4", vision.head_dim),
            ("vision rope_type", vision.rope_parameters["rope_type"] == "axial", "'axial'", vision.rope_parameters),
            ("llama_4_scaling_beta", not is_scaled or isinstance(beta, (int, float)), "a number", beta),
            ("original_max_position_embeddings", not is_scaled or bool(length), "a length", length),
        ):  # fmt: skip
            if not is_supported:
                raise CheckpointError(
                    f"{checkpoint.folder}: expected {name} {expected}, got {got}; this variant cannot be exported"
                )

    def images(self, checkpoint: Checkpoint, config: Any, max_visual: int | None) -> PixtralImages:
        """Return scaling and patches; see ``Family``. ``max_visual`` lowers the longest side."""
        patch, merge = config.vision_config.patch_size, config.spatial_merge_size
        base.require_processor(checkpoint, patch_size=patch, spatial_merge_size=merge)
        processor = base.read_processor(checkpoint.folder)
        marks = {ours: processor[theirs] for theirs, ours in _MARKS.items() if processor.get(theirs)}
        images = PixtralImages.from_preprocessor_config(
            base.read_image_processor(checkpoint), patch_size=patch, merge_size=merge, **marks
        )
        size = images.token_size
        fewer = range((images.longest_edge - 1) // size * size, 0, -size)
        candidates = (
            msgspec.structs.replace(images, longest_edge=edge) for edge in (images.longest_edge, *fewer)
        )
        return base.first_that_fits(max_visual, candidates, smallest="one token")

    def vision(
        self, inner: Any, config: Any, *, processing: PixtralImages, dtype: FloatType, with_features: bool
    ) -> tuple[VisionGraph, VisionDimensions]:
        """Return the graph of the tower; see ``Family``."""
        vision, width = config.vision_config, config.text_config.hidden_size
        values = pixtral.inverse_frequencies(inner.vision_tower)
        module = pixtral.PixtralVision(
            inner.vision_tower,
            inner.multi_modal_projector,
            inv_freq=torch.empty(values.shape, dtype=torch.float32),
            max_patches=processing.any_image_sizes()[-1]["P"],
        )
        graph = VisionGraph(
            module=module,
            inputs=module.inputs(),
            outputs=(base.visual_tokens(width, dtype=dtype),),
            linear_groups=module.linear_groups(),
            constants={deepstack.INV_FREQ_NAME: values},
            layered=module.layered(width=width, dtype=dtype),
        )
        merged = config.spatial_merge_size**2
        return graph, VisionDimensions(
            num_layers=vision.num_hidden_layers,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            patches_per_tile=None,
            mlp_matrices=3,
            projector_weights=merged * vision.hidden_size**2 + (vision.hidden_size + width) * width,
            patches_per_token=merged,
        )
