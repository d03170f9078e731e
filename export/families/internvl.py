"""InternVL3, 3.5 and 2.5 (transformers format): InternViT tiles with pixel shuffle, and a Qwen2, Qwen3 or Llama decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import msgspec

from trio_edge.export.families import base
from trio_edge.export.families.base import Family, VisionGraph
from trio_edge.export.graphs.vision.internvl import TileVision
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.manifest import VisionDimensions
from trio_edge.runtime.images.tiles import InternVlImages
from trio_edge.runtime.prompts.chat import INTERNVL_TEMPLATE

if TYPE_CHECKING:
    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType


@final
class InternVl(Family):
    """InternVL."""

    model_type = "internvl"
    architecture = "InternVLForConditionalGeneration"
    chat_template = INTERNVL_TEMPLATE  # without the marks
    image_marks = ("<img>", "</img>")
    text_types = ("qwen2", "qwen3", "llama")
    vision_type = "internvl_vision"
    required = (("vision_feature_layer", -1), ("vision_feature_select_strategy", "default"))

    def check_config(self, config: Any, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError unless tiles are square and whole numbers of visual tokens."""
        folder, vision, merge = checkpoint.folder, config.vision_config, _merge(config)
        for name in ("image_size", "patch_size"):
            height, width = getattr(vision, name)
            if height != width:
                raise CheckpointError(
                    f"{folder}: expected a square vision {name}, got {height}x{width}; this variant cannot be exported"
                )
        if merge * config.downsample_ratio != 1 or _patches_per_side(config) % merge:
            raise CheckpointError(
                f"{folder}: expected downsample_ratio 1 / n with n dividing {_patches_per_side(config)} (patches along a"
                f" tile), got {config.downsample_ratio}; this variant cannot be exported"
            )

    def images(self, checkpoint: Checkpoint, config: Any, max_visual: int | None) -> InternVlImages:
        """Return the tiling; see ``Family``. ``max_visual`` lowers the number of tiles."""
        images = InternVlImages.from_preprocessor_config(
            {"image_processor_type": "GotOcr2ImageProcessor", **base.read_image_processor(checkpoint)},
            tokens_per_side=_patches_per_side(config) // _merge(config),
        )
        side = config.vision_config.image_size[0]
        base.require_same("size", checkpoint, tower=side, processor=images.tile_size)
        candidates = (
            msgspec.structs.replace(images, max_tiles=most)
            for most in range(images.max_tiles, images.min_tiles - 1, -1)
        )
        fewest = images.min_tiles + (images.min_tiles > 1)  # the thumbnail is one more tile
        smallest = f"{fewest} tiles of {images.tokens_per_tile}"
        return base.first_that_fits(max_visual, candidates, smallest=smallest)

    def vision(
        self, inner: Any, config: Any, *, processing: InternVlImages, dtype: FloatType, with_features: bool
    ) -> tuple[VisionGraph, VisionDimensions]:
        """Return the graph of the tiles; see ``Family``."""
        text, vision, merge = config.text_config, config.vision_config, _merge(config)
        module = TileVision(inner.vision_tower, inner.multi_modal_projector, merge=merge)
        graph = VisionGraph(
            module=module,
            inputs=base.tile_inputs(vision.image_size[0]),
            outputs=(base.visual_tokens(text.hidden_size, dtype=dtype),),
            linear_groups=module.linear_groups(),
        )
        return graph, VisionDimensions(
            num_layers=vision.num_hidden_layers,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            patches_per_tile=_patches_per_side(config) ** 2 + 1,
            projector_weights=(vision.hidden_size * merge**2 + text.hidden_size) * text.hidden_size,
        )


def _merge(config: Any) -> int:
    """Return the patches along one side of a visual token, 0 for an impossible ratio."""
    return int(1 / config.downsample_ratio) if config.downsample_ratio > 1e-3 else 0


def _patches_per_side(config: Any) -> int:
    return int(config.vision_config.image_size[0] // config.vision_config.patch_size[0])
