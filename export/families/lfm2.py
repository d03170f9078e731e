"""LFM2-VL and LFM2.5-VL: SigLIP2 tiles of any shape, and a decoder with short convolutions in most layers.

A short convolution keeps its last rows in place of keys and values (``export/graphs/state_layers.py``). Stages stand before
layers with attention, where a probe has a closed form. The prompt names each tile's row and column (``ImageLayout.text``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import msgspec

from trio_edge.export.checkpoints.text_files import load_tokenizer
from trio_edge.export.families import base
from trio_edge.export.families.base import Family, VisionGraph
from trio_edge.export.graphs.vision.naflex import NaflexVision
from trio_edge.runtime.bundle import graph_io as io
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.manifest import TensorSpec, VisionDimensions
from trio_edge.runtime.images.naflex import NaflexImages
from trio_edge.runtime.prompts.chat import LFM2_VL_TEMPLATE

if TYPE_CHECKING:
    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType

# names of the texts around tiles: the tokenizer's, and ours
_MARKS = {
    "image_start_token": "start_mark",
    "image_thumbnail_token": "thumbnail_mark",
    "image_end_token": "end_mark",
}


@final
class Lfm2Vl(Family):
    """LFM2-VL. It has no ``image_marks``: the texts around tiles depend on the image, and are in ``ImageLayout.text``."""

    model_type = "lfm2_vl"
    architecture = "Lfm2VlForConditionalGeneration"
    chat_template = LFM2_VL_TEMPLATE
    text_types = ("lfm2",)
    vision_type = "siglip2_vision_model"
    is_hybrid = True

    def check_config(self, config: Any, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError unless convolutions have no bias, and patches are square and coloured."""
        text, vision = config.text_config, config.vision_config
        for name, is_supported, expected, got in (
            ("conv_bias", not text.conv_bias, "false", text.conv_bias),
            ("conv_L_cache", text.conv_L_cache > 1, "at least 2", text.conv_L_cache),
            ("vision patch_size", isinstance(vision.patch_size, int), "one number", vision.patch_size),
            ("vision num_channels", vision.num_channels == 3, "3", vision.num_channels),
        ):
            if not is_supported:
                raise CheckpointError(
                    f"{checkpoint.folder}: expected {name} {expected}, got {got}; this variant cannot be exported"
                )

    def images(self, checkpoint: Checkpoint, config: Any, max_visual: int | None) -> NaflexImages:
        """Return the tiling; see ``Family``. ``max_visual`` lowers the number of tiles."""
        tokenizer = load_tokenizer(checkpoint)
        marks = {ours: getattr(tokenizer, theirs, None) for theirs, ours in _MARKS.items()}
        images = NaflexImages.from_preprocessor_config(
            base.read_image_processor(checkpoint),
            **{name: str(text) for name, text in marks.items() if text is not None},
        )
        base.require_processor(checkpoint, use_image_special_tokens=True)
        theirs, ours = (
            (config.vision_config.patch_size, config.downsample_factor),
            (images.patch_size, images.merge_size),
        )
        base.require_same("patch size and downsample_factor", checkpoint, tower=theirs, processor=ours)
        fewer = (
            msgspec.structs.replace(images, max_tiles=most)
            for most in range(images.max_tiles - 1, images.min_tiles - 1, -1)
        )
        candidates = filter(None, (images, *fewer, images.at_base()))
        return base.first_that_fits(max_visual, candidates, smallest="one tile")

    def vision(
        self, inner: Any, config: Any, *, processing: NaflexImages, dtype: FloatType, with_features: bool
    ) -> tuple[VisionGraph, VisionDimensions]:
        """Return the graph of the tiles; see ``Family``."""
        vision, width, most = (
            config.vision_config,
            config.text_config.hidden_size,
            processing.patches_per_tile,
        )
        module, merged = (
            NaflexVision(inner.vision_tower, inner.multi_modal_projector),
            config.downsample_factor**2,
        )
        patch_values = vision.num_channels * vision.patch_size**2
        graph = VisionGraph(
            module=module,
            inputs=(
                TensorSpec(name=io.PIXEL_VALUES, dtype="float32", shape=("B", most, patch_values)),
                TensorSpec(name=io.SPATIAL_SHAPES, dtype="int32", shape=("B", 2)),
                TensorSpec(name=io.TOKEN_INDEX, dtype="int32", shape=("N", merged)),
            ),
            outputs=(base.visual_tokens(width, dtype=dtype),),
            linear_groups=module.linear_groups(),
        )
        return graph, VisionDimensions(
            num_layers=vision.num_hidden_layers,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            patches_per_tile=most,
            projector_weights=(merged * vision.hidden_size + width) * config.projector_hidden_size,
        )
