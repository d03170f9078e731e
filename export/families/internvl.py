"""InternVL3, 3.5 and 2.5 (transformers format): InternViT tiles with pixel shuffle, and a Qwen2, Qwen3 or Llama decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import msgspec

from trio_edge.export.families.base import (
    FamilyModel,
    VisionGraph,
    refuse_encoder_keep,
    refuse_features,
    tile_inputs,
    visual_tokens,
)
from trio_edge.export.families.config_files import read_image_processor
from trio_edge.export.families.decoder import (
    choose_attention,
    family_model,
    read_config,
    require,
    require_same,
)
from trio_edge.export.graphs.attention import TILE_ATTENTION_NAME
from trio_edge.export.graphs.vision.internvl import TileVision
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.manifest import VisionDimensions
from trio_edge.runtime.images.internvl import InternVlImages
from trio_edge.runtime.prompts.chat import INTERNVL_TEMPLATE

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.runtime.images.interface import ImageProcessing

_TEXT_TYPES = ("qwen2", "qwen3", "llama")


@final
class InternVl:
    """Implements ``Family``."""

    model_type = "internvl"
    positions: tuple[Positions, ...] = ("compact", "preserved")
    image_marks = ("<img>", "</img>")

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return ChatML; ``image_marks`` adds the marks around the image."""
        return INTERNVL_TEMPLATE

    def build(
        self, checkpoint: Checkpoint, *, processing: ImageProcessing, dtype: FloatType, with_features: bool
    ) -> FamilyModel:
        """Return the model's modules; see ``Family``."""
        refuse_features(self.model_type, with_features=with_features)
        from transformers import InternVLForConditionalGeneration

        config = _read_config(checkpoint)
        choose_attention(config, vision=TILE_ATTENTION_NAME)
        text, vision = config.text_config, config.vision_config
        root: Any = InternVLForConditionalGeneration(config)
        merged = vision.hidden_size * _merge(config) ** 2
        return family_model(
            root,
            vision=_vision_graph(root.model, config, dtype=dtype),
            vision_dimensions=VisionDimensions(
                num_layers=vision.num_hidden_layers,
                hidden_size=vision.hidden_size,
                intermediate_size=vision.intermediate_size,
                patches_per_tile=_patches_per_side(config) ** 2 + 1,
                projector_weights=(merged + text.hidden_size) * text.hidden_size,
            ),
        )

    def image_processing(
        self, checkpoint: Checkpoint, *, encoder_keep: int | None, max_visual: int | None
    ) -> ImageProcessing:
        """Return the tiling; see ``Family``. ``max_visual`` lowers the number of tiles."""
        refuse_encoder_keep(self.model_type, encoder_keep)
        config = _read_config(checkpoint)
        processing = InternVlImages.from_preprocessor_config(
            {"image_processor_type": "GotOcr2ImageProcessor", **read_image_processor(checkpoint)},
            tokens_per_side=_patches_per_side(config) // _merge(config),
        )
        side = config.vision_config.image_size[0]
        require_same("size", checkpoint, tower=side, processor=processing.tile_size)
        return _with_fewer_tiles(processing, max_visual)


def _read_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration, checked."""
    config = read_config(checkpoint, text_types=_TEXT_TYPES, vision_type="internvl_vision")
    require(config, checkpoint.folder, vision_feature_layer=-1, vision_feature_select_strategy="default")
    _check_sides(config, checkpoint.folder)
    return config


def _check_sides(config: Any, folder: Path) -> None:
    vision = config.vision_config
    for name in ("image_size", "patch_size"):
        height, width = getattr(vision, name)
        if height != width:
            raise CheckpointError(
                f"{folder}: expected a square vision {name}, got {height}x{width}; this variant cannot be exported"
            )
    merge = _merge(config)
    if merge * config.downsample_ratio != 1 or _patches_per_side(config) % merge:
        raise CheckpointError(
            f"{folder}: expected downsample_ratio 1 / n with n dividing {_patches_per_side(config)} (patches along a"
            f" tile), got {config.downsample_ratio}; this variant cannot be exported"
        )


def _merge(config: Any) -> int:
    """Return the patches along one side of a visual token."""
    return int(1 / config.downsample_ratio)


def _patches_per_side(config: Any) -> int:
    return int(config.vision_config.image_size[0] // config.vision_config.patch_size[0])


def _with_fewer_tiles(processing: InternVlImages, max_visual: int | None) -> InternVlImages:
    """Return the processing with at most ``max_visual`` visual tokens per image."""
    if max_visual is None:
        return processing
    tiles = max_visual // processing.tokens_per_tile
    most = min(processing.max_tiles, max(tiles - 1, 1))  # the thumbnail is one more tile
    if tiles < 1 or most < processing.min_tiles:
        fewest = processing.min_tiles + (processing.min_tiles > 1)
        raise ScheduleError(
            f"--max-visual: expected at least {fewest * processing.tokens_per_tile} ({fewest} tiles of"
            f" {processing.tokens_per_tile}), got {max_visual}; raise it"
        )
    return msgspec.structs.replace(processing, max_tiles=most)


def _vision_graph(inner: Any, config: Any, *, dtype: FloatType) -> VisionGraph:
    module = TileVision(inner.vision_tower, inner.multi_modal_projector, merge=_merge(config))
    return VisionGraph(
        module=module,
        inputs=tile_inputs(config.vision_config.image_size[0]),
        outputs=(visual_tokens(config.text_config.hidden_size, dtype=dtype),),
        linear_groups=module.linear_groups(),
    )
