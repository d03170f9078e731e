"""LLaVA-OneVision: SigLIP tiles in LLaVA-NeXT's order, bilinear reduction of large grids, and a Qwen2 decoder."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, final

import msgspec
import numpy as np

from trio_edge.export.checkpoints.checkpoint import read_json
from trio_edge.export.families.base import (
    FamilyModel,
    VisionGraph,
    refuse_encoder_keep,
    refuse_features,
    visual_tokens,
)
from trio_edge.export.families.decoder import (
    choose_attention,
    family_model,
    read_config,
    require,
    require_square_tiles,
)
from trio_edge.export.families.llava import TEXT_TYPES, feature_layers_of, read_llava_images
from trio_edge.export.graphs.attention import TILE_ATTENTION_NAME
from trio_edge.export.graphs.vision.clip import clip_groups
from trio_edge.export.graphs.vision.siglip import SiglipVision
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.manifest import TensorSpec, VisionDimensions
from trio_edge.runtime.prompts.chat import LLAVA_ONEVISION_TEMPLATE

if TYPE_CHECKING:
    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.runtime.images.llava import LlavaImages


@final
class LlavaOnevision:
    """Implements ``Family``."""

    model_type = "llava_onevision"
    positions: tuple[Positions, ...] = ("compact", "preserved")
    image_marks = ("", "")

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return ChatML."""
        return LLAVA_ONEVISION_TEMPLATE

    def build(
        self, checkpoint: Checkpoint, *, processing: ImageProcessing, dtype: FloatType, with_features: bool
    ) -> FamilyModel:
        """Return the model's modules; see ``Family``."""
        refuse_features(self.model_type, with_features=with_features)
        from transformers import LlavaOnevisionForConditionalGeneration
        from transformers.initialization import no_init_weights

        config = _read_config(checkpoint)
        choose_attention(config, vision=TILE_ATTENTION_NAME)
        text, vision = config.text_config, config.vision_config
        # SigLIP's random initialization reads values, which tensors lack under FakeTensorMode
        with no_init_weights():
            root: Any = LlavaOnevisionForConditionalGeneration(config)
        root.tie_weights()  # no_init_weights skips it
        inner, layers = root.model, feature_layers_of(config)
        module = SiglipVision(
            inner.vision_tower, inner.multi_modal_projector, inner.image_newline, feature_layers=layers
        )
        num_patches = _num_patches(config)
        return family_model(
            root,
            vision=_vision_graph(module, config, dtype=dtype),
            vision_dimensions=VisionDimensions(
                num_layers=len(module.layers),
                hidden_size=vision.hidden_size,
                intermediate_size=vision.intermediate_size,
                patches_per_tile=num_patches,
                projector_weights=(len(layers) * vision.hidden_size + text.hidden_size) * text.hidden_size,
                projected_per_tile=num_patches,
            ),
        )

    def image_processing(
        self, checkpoint: Checkpoint, *, encoder_keep: int | None, max_visual: int | None
    ) -> ImageProcessing:
        """Return the tiling; see ``Family``. ``max_visual`` leaves out the larger grids."""
        refuse_encoder_keep(self.model_type, encoder_keep)
        config = _read_config(checkpoint)
        processing = read_llava_images(checkpoint, default_type="LlavaOnevisionImageProcessor")
        return _with_smaller_grids(
            msgspec.structs.replace(processing, max_grid_tiles=_max_grid_tiles(config, checkpoint)),
            max_visual,
        )


def _read_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration, checked."""
    config = read_config(checkpoint, text_types=TEXT_TYPES, vision_type="siglip_vision_model")
    require_square_tiles(config.vision_config, checkpoint.folder)
    require(config, checkpoint.folder, vision_feature_select_strategy="full")  # SigLIP has no class token
    _check_processor(config, checkpoint)
    return config


def _check_processor(config: Any, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the processor's file disagrees with the model on the number of visual tokens."""
    path = checkpoint.folder / "processor_config.json"
    written = read_json(path) if path.exists() else {}
    wanted = {
        "vision_aspect_ratio": config.vision_aspect_ratio,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_image_tokens": _num_patches(config),
    }
    for name, value in wanted.items():
        if written.get(name, value) not in (value, None):
            raise CheckpointError(
                f"{path}: expected {name} {value!r} (config.json), got {written[name]!r}; make them agree"
            )


def _num_patches(config: Any) -> int:
    """Return P, visual tokens of one tile."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size) ** 2


def _max_grid_tiles(config: Any, checkpoint: Checkpoint) -> int:
    """Return the number in "anyres_max_9"."""
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", config.vision_aspect_ratio)
    if found is None:
        raise CheckpointError(
            f"{checkpoint.folder}: expected a vision_aspect_ratio such as 'anyres_max_9', got"
            f" {config.vision_aspect_ratio!r}; this variant cannot be exported"
        )
    return int(found[1])


def _with_smaller_grids(processing: LlavaImages, max_visual: int | None) -> LlavaImages:
    """Return the processing without the grids that give more than ``max_visual`` visual tokens."""
    if max_visual is None:
        return processing
    pinpoints = processing.grid_pinpoints
    for most in sorted({height * width for height, width in pinpoints}, reverse=True):
        smaller = tuple((height, width) for height, width in pinpoints if height * width <= most)
        limited = msgspec.structs.replace(processing, grid_pinpoints=smaller)
        needed = limited.any_image_sizes()[-1]["N"]
        if needed <= max_visual:
            return limited
    raise ScheduleError(
        f"--max-visual: expected at least {needed} (the smallest grid and the base tile), got {max_visual}; raise it"
    )


def _vision_graph(module: SiglipVision, config: Any, *, dtype: FloatType) -> VisionGraph:
    side = config.vision_config.image_size
    return VisionGraph(
        module=module,
        inputs=(
            TensorSpec(name="pixel_values", dtype="float32", shape=("B", 3, side, side)),
            TensorSpec(name="token_index", dtype="int32", shape=("N", 4)),
            TensorSpec(name="token_weights", dtype="float32", shape=("N", 4)),
        ),
        outputs=(visual_tokens(config.text_config.hidden_size, dtype=dtype),),
        linear_groups=clip_groups(module.layers, module.projector),
        constants={
            name: np.arange(_num_patches(config), dtype=np.int64)[None]
            for name, _ in module.named_buffers()
            if name.endswith("position_ids")
        },
    )
