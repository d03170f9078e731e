"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: a vision tower, an MLP projector, and a Llama-like decoder.

The first two have CLIP tiles. LLaVA-OneVision has SigLIP tiles in LLaVA-NeXT's order, and reduces large grids bilinearly.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, final

import msgspec
import numpy as np

from trio_edge.export.families import base
from trio_edge.export.families.base import Family, VisionGraph
from trio_edge.export.graphs.reduce import FEATURE_NAMES
from trio_edge.export.graphs.vision import clip
from trio_edge.export.graphs.vision.siglip import SiglipVision
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.graph_io import KEPT_PATCHES
from trio_edge.runtime.bundle.manifest import TensorSpec, VisionDimensions
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.runtime.prompts.chat import LLAVA_ONEVISION_TEMPLATE, MISTRAL_TEMPLATE, VICUNA_TEMPLATE

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType

_TEXT_TYPES = ("llama", "mistral", "qwen2")


class Llava(Family):
    """LLaVA-1.5: one CLIP crop per image."""

    model_type = "llava"
    architecture = "LlavaForConditionalGeneration"
    image_processor = "CLIPImageProcessor"
    """Hugging Face's class of the image processor, if the checkpoint's file names none."""
    chat_template = VICUNA_TEMPLATE
    text_types = _TEXT_TYPES
    vision_type = "clip_vision_model"
    vision_attention = "eager"
    required = (("vision_feature_select_strategy", "default"),)
    has_class_row = True

    def images(self, checkpoint: Checkpoint, config: Any, max_visual: int | None) -> LlavaImages:
        """Return the tiling; see ``Family``. There is no ``max_visual``."""
        if max_visual is not None:
            raise ScheduleError(
                f"--max-visual: expected none for {self.model_type}, which does not scale images to a number of tokens, got"
                f" {max_visual}; use --image-size"
            )
        return _images(checkpoint, config, default_type=self.image_processor)

    def check_encoder_keep(self, encoder_keep: int, images: LlavaImages, config: Any) -> None:
        """Raise ScheduleError unless a tile can keep ``encoder_keep`` patches."""
        clip.check_encoder_keep(encoder_keep, patches_per_side=images.patches_per_side)

    def vision(
        self, inner: Any, config: Any, *, processing: LlavaImages, dtype: FloatType, with_features: bool
    ) -> tuple[VisionGraph, VisionDimensions]:
        """Return the graph of CLIP's tower; see ``Family``."""
        text, vision, keep = config.text_config, config.vision_config, processing.encoder_keep
        states, projector = feature_layers_of(config), inner.multi_modal_projector
        tokens, inputs = (
            base.visual_tokens(text.hidden_size, dtype=dtype),
            base.tile_inputs(processing.tile_size),
        )
        module: clip.ClipVision | clip.ReducedVision
        if keep is not None:
            module, more_outputs = _reduced(inner, states, keep, with_features=with_features)
            layers = module.layers
        else:
            features = clip.ClipFeatures(inner.vision_tower, feature_layers=states)
            observed = vision.num_hidden_layers - 2 if with_features else None
            newline, layers = getattr(inner, "image_newline", None), features.layers
            module = clip.ClipVision(features, projector, newline, observed=observed)
            more_outputs = _feature_tensors(vision, len(states), dtype=dtype) if with_features else []
        graph = VisionGraph(
            module=module,
            inputs=inputs,
            outputs=(tokens, *more_outputs),
            linear_groups=clip.clip_groups(layers, projector),
            constants=_position_ids(module, processing.patches_per_tile + 1),
        )
        return graph, VisionDimensions(
            num_layers=len(layers),
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            patches_per_tile=processing.patches_per_tile + 1,
            projector_weights=(vision.hidden_size + text.hidden_size) * text.hidden_size,
            projected_per_tile=processing.patches_per_tile,
            merged_weights=2 * (keep or 0) * text.hidden_size,
        )


@final
class LlavaNext(Llava):
    """LLaVA-NeXT: a base tile and a grid of CLIP tiles with newline tokens."""

    model_type = "llava_next"
    architecture = "LlavaNextForConditionalGeneration"
    image_processor = "LlavaNextImageProcessor"

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return Vicuna's template, or Mistral's for its decoder; LLaVA-1.5 was trained with Vicuna's alone."""
        text_type = checkpoint.config.get("text_config", {}).get("model_type")
        return MISTRAL_TEMPLATE if text_type == "mistral" else VICUNA_TEMPLATE


def _reduced(
    inner: Any, states: tuple[int, ...], keep: int, *, with_features: bool
) -> tuple[clip.ReducedVision, list[TensorSpec]]:
    """Return the tower that keeps ``keep`` patches of each tile, and its output besides the visual tokens."""
    if with_features:
        raise ScheduleError(
            "--token-method: expected one that needs no class token with --encoder-keep, got one that does; leave out"
            " --encoder-keep"
        )
    module = clip.ReducedVision(
        inner.vision_tower, inner.multi_modal_projector, feature_layers=states, num_keep=keep
    )
    return module, [TensorSpec(name=KEPT_PATCHES, dtype="int32", shape=("B", keep))]


def _feature_tensors(vision: Any, num_states: int, *, dtype: FloatType) -> list[TensorSpec]:
    """Return the outputs that selectors with ``needs_features`` read."""
    features, keys, attention = FEATURE_NAMES
    width, head_size = vision.hidden_size * num_states, vision.hidden_size // vision.num_attention_heads
    return [
        TensorSpec(name=features, dtype=dtype, shape=("N", width)),
        TensorSpec(name=keys, dtype=dtype, shape=("N", head_size)),
        TensorSpec(name=attention, dtype="float32", shape=("N",)),
    ]


def feature_layers_of(config: Any) -> tuple[int, ...]:
    """Return the indices of the vision tower's hidden states that the projector reads."""
    layer, num_layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    if not layers or any(not -num_layers <= one + (one < 0) <= num_layers for one in layers):
        raise CheckpointError(
            f"config.json vision_feature_layer: expected indices of the tower's {num_layers + 1} hidden states, got {layer!r:.100};"
            " use the checkpoint's own file"
        )
    return layers


def _position_ids(module: nn.Module, count: int) -> dict[str, NDArray[np.int64]]:
    """Return the values of the tower's position ids, which have none under FakeTensorMode."""
    names = (name for name, _ in module.named_buffers() if name.endswith("position_ids"))
    return {name: np.arange(count, dtype=np.int64)[None] for name in names}


def _images(checkpoint: Checkpoint, config: Any, *, default_type: str) -> LlavaImages:
    """Return the constants of the checkpoint's image processor, of class ``default_type`` if its file names none."""
    images = LlavaImages.from_preprocessor_config(
        {"image_processor_type": default_type, **base.read_image_processor(checkpoint)},
        patch_size=config.vision_config.patch_size,
    )
    side = config.vision_config.image_size
    base.require_same("tiles of", checkpoint, tower=side, processor=images.tile_size)
    theirs = [list(pinpoint) for pinpoint in getattr(config, "image_grid_pinpoints", None) or []]
    ours = [list(pinpoint) for pinpoint in images.grid_pinpoints]
    if images.kind == "anyres" and theirs and ours != theirs:
        raise CheckpointError(
            f"{checkpoint.folder}: expected the same image_grid_pinpoints in config.json and preprocessor, got {theirs} and"
            f" {ours}; make them agree"
        )
    return images


@final
class LlavaOnevision(Family):
    """LLaVA-OneVision."""

    model_type = "llava_onevision"
    architecture = "LlavaOnevisionForConditionalGeneration"
    chat_template = LLAVA_ONEVISION_TEMPLATE
    text_types = _TEXT_TYPES
    vision_type = "siglip_vision_model"
    required = (("vision_feature_select_strategy", "full"),)  # SigLIP has no class token

    def check_config(self, config: Any, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError unless tiles are square and the processor's file agrees on the number of visual tokens."""
        base.require_square_tiles(config.vision_config, checkpoint.folder)
        base.require_processor(
            checkpoint,
            vision_aspect_ratio=config.vision_aspect_ratio,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_image_tokens=_num_patches(config),
        )

    def images(self, checkpoint: Checkpoint, config: Any, max_visual: int | None) -> LlavaImages:
        """Return the tiling; see ``Family``. ``max_visual`` leaves out the larger grids."""
        images = _images(checkpoint, config, default_type="LlavaOnevisionImageProcessor")
        found = re.fullmatch(r"anyres_max_([1-9]\d*)", config.vision_aspect_ratio)
        if found is None:
            raise CheckpointError(
                f"{checkpoint.folder}: expected a vision_aspect_ratio such as 'anyres_max_9', got"
                f" {config.vision_aspect_ratio!r}; this variant cannot be exported"
            )
        images = msgspec.structs.replace(images, max_grid_tiles=int(found[1]))
        pinpoints = images.grid_pinpoints
        smaller = (
            tuple(pinpoint for pinpoint in pinpoints if math.prod(pinpoint) <= area)
            for area in sorted({height * width for height, width in pinpoints}, reverse=True)
        )
        candidates = (images, *(msgspec.structs.replace(images, grid_pinpoints=grids) for grids in smaller))
        return base.first_that_fits(max_visual, candidates, smallest="the smallest grid and the base tile")

    def vision(
        self, inner: Any, config: Any, *, processing: LlavaImages, dtype: FloatType, with_features: bool
    ) -> tuple[VisionGraph, VisionDimensions]:
        """Return the graph of SigLIP's tower; see ``Family``."""
        text, vision, states = config.text_config, config.vision_config, feature_layers_of(config)
        pixel_values, _ = base.tile_inputs(vision.image_size)
        module = SiglipVision(
            inner.vision_tower, inner.multi_modal_projector, inner.image_newline, feature_layers=states
        )
        num_patches = _num_patches(config)
        graph = VisionGraph(
            module=module,
            inputs=(
                pixel_values,
                TensorSpec(name="token_index", dtype="int32", shape=("N", 4)),
                TensorSpec(name="token_weights", dtype="float32", shape=("N", 4)),
            ),
            outputs=(base.visual_tokens(text.hidden_size, dtype=dtype),),
            linear_groups=clip.clip_groups(module.layers, module.projector),
            constants=_position_ids(module, num_patches),
        )
        return graph, VisionDimensions(
            num_layers=len(module.layers),
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            patches_per_tile=num_patches,
            projector_weights=(len(states) * vision.hidden_size + text.hidden_size) * text.hidden_size,
            projected_per_tile=num_patches,
        )


def _num_patches(config: Any) -> int:
    """Return P, visual tokens of one tile."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size) ** 2
