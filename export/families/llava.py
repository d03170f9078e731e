"""LLaVA-1.5 and LLaVA-NeXT: a CLIP vision tower, an MLP projector, a Llama-like decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import msgspec
import numpy as np

from trio_edge.export.families.base import FamilyModel, VisionGraph, tile_inputs, visual_tokens
from trio_edge.export.families.config_files import read_image_processor
from trio_edge.export.families.decoder import (
    choose_attention,
    family_model,
    read_config,
    require,
    require_same,
)
from trio_edge.export.graphs.reduce import FEATURE_NAMES
from trio_edge.export.graphs.vision.clip import (
    ClipFeatures,
    ClipVision,
    ReducedVision,
    check_encoder_keep,
    clip_groups,
)
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.graph_io import KEPT_PATCHES
from trio_edge.runtime.bundle.manifest import TensorSpec, VisionDimensions
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.runtime.prompts.chat import VICUNA_TEMPLATE

if TYPE_CHECKING:
    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.runtime.images.interface import ImageProcessing

TEXT_TYPES = ("llama", "mistral", "qwen2")


@final
@dataclass(frozen=True, kw_only=True)
class Llava:
    """Implements ``Family`` for one model type of LLaVA."""

    model_type: str
    architecture: str
    image_processor: str
    """Hugging Face's class of the image processor, if the checkpoint's file names none."""
    mistral_template: str = VICUNA_TEMPLATE
    positions: tuple[Positions, ...] = ("compact", "preserved")
    image_marks: tuple[str, str] = ("", "")

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return Vicuna's template, or for a Mistral decoder the family's template for it."""
        text_type = checkpoint.config.get("text_config", {}).get("model_type")
        return self.mistral_template if text_type == "mistral" else VICUNA_TEMPLATE

    def build(
        self, checkpoint: Checkpoint, *, processing: ImageProcessing, dtype: FloatType, with_features: bool
    ) -> FamilyModel:
        """Return the model's modules; see ``Family``."""
        import transformers

        assert isinstance(processing, LlavaImages)  # as the families' image_processing makes it
        config = _read_config(checkpoint)
        choose_attention(config, vision="eager")
        text, vision = config.text_config, config.vision_config
        root: Any = getattr(transformers, self.architecture)(config)
        graph, num_layers = _vision_graph(
            root.model,
            feature_layers_of(config),
            processing=processing,
            dtype=dtype,
            with_features=with_features,
        )
        return family_model(
            root,
            vision=graph,
            vision_dimensions=VisionDimensions(
                num_layers=num_layers,
                hidden_size=vision.hidden_size,
                intermediate_size=vision.intermediate_size,
                patches_per_tile=processing.patches_per_tile + 1,
                projector_weights=(vision.hidden_size + text.hidden_size) * text.hidden_size,
                projected_per_tile=processing.patches_per_tile,
                merged_weights=2 * (processing.encoder_keep or 0) * text.hidden_size,
            ),
        )

    def image_processing(
        self, checkpoint: Checkpoint, *, encoder_keep: int | None, max_visual: int | None
    ) -> ImageProcessing:
        """Return the tiling; see ``Family``. There is no ``max_visual``."""
        if max_visual is not None:
            raise ScheduleError(
                f"--max-visual: expected none for {self.model_type}, which does not scale images to a number of tokens, got"
                f" {max_visual}; use --image-size"
            )
        processing = read_llava_images(checkpoint, default_type=self.image_processor)
        if encoder_keep is not None:
            check_encoder_keep(encoder_keep, patches_per_side=processing.patches_per_side)
        return msgspec.structs.replace(processing, encoder_keep=encoder_keep)


def _read_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration, checked."""
    config = read_config(checkpoint, text_types=TEXT_TYPES, vision_type="clip_vision_model")
    require(config, checkpoint.folder, vision_feature_select_strategy="default")
    return config


def feature_layers_of(config: Any) -> tuple[int, ...]:
    """Return the indices of the vision tower's hidden states that the projector reads."""
    layer = config.vision_feature_layer
    return (layer,) if isinstance(layer, int) else tuple(layer)


def _vision_graph(
    inner: Any,
    feature_layers: tuple[int, ...],
    *,
    processing: LlavaImages,
    dtype: FloatType,
    with_features: bool,
) -> tuple[VisionGraph, int]:
    """Return the graph, and the number of the vision tower's layers that run."""
    module, more_outputs = _vision_module(
        inner, feature_layers, keep=processing.encoder_keep, dtype=dtype, with_features=with_features
    )
    layers = module.layers if isinstance(module, ReducedVision) else module.features.layers
    graph = VisionGraph(
        module=module,
        inputs=tile_inputs(processing.tile_size),
        outputs=(visual_tokens(inner.language_model.config.hidden_size, dtype=dtype), *more_outputs),
        linear_groups=clip_groups(layers, inner.multi_modal_projector),
        constants={
            name: np.arange(processing.patches_per_tile + 1, dtype=np.int64)[None]
            for name, _ in module.named_buffers()
            if name.endswith("position_ids")
        },
    )
    return graph, len(layers)


def _vision_module(
    inner: Any, feature_layers: tuple[int, ...], *, keep: int | None, dtype: FloatType, with_features: bool
) -> tuple[ClipVision | ReducedVision, list[TensorSpec]]:
    """Return the module, and its outputs besides the visual tokens."""
    tower, projector = inner.vision_tower, inner.multi_modal_projector
    if keep is not None:
        if with_features:
            raise ScheduleError(
                "--token-method: expected one that needs no class token with --encoder-keep, got one that does; leave out"
                " --encoder-keep"
            )
        reduced = ReducedVision(tower, projector, feature_layers=feature_layers, num_keep=keep)
        return reduced, [TensorSpec(name=KEPT_PATCHES, dtype="int32", shape=("B", keep))]
    features = ClipFeatures(tower, feature_layers=feature_layers)
    newline, vision = getattr(inner, "image_newline", None), tower.config
    if not with_features:
        return ClipVision(features, projector, newline), []
    module = ClipVision(features, projector, newline, observed=vision.num_hidden_layers - 2)
    widths = (vision.hidden_size * len(feature_layers), vision.hidden_size // vision.num_attention_heads)
    outputs = [
        TensorSpec(name=name, dtype=dtype, shape=("N", width)) for name, width in zip(FEATURE_NAMES, widths)
    ]
    return module, [*outputs, TensorSpec(name=FEATURE_NAMES[2], dtype="float32", shape=("N",))]


def read_llava_images(checkpoint: Checkpoint, *, default_type: str) -> LlavaImages:
    """Return the constants of the checkpoint's image processor, of class ``default_type`` if its file names none.

    Raises:
        CheckpointError: If it is not supported, or does not fit the model's configuration.
    """
    folder, values = checkpoint.folder, read_image_processor(checkpoint)
    config = read_config(checkpoint)
    processing = LlavaImages.from_preprocessor_config(
        {"image_processor_type": default_type, **values}, patch_size=config.vision_config.patch_size
    )
    side = config.vision_config.image_size
    require_same("tiles of", checkpoint, tower=side, processor=processing.tile_size)
    theirs = [list(pinpoint) for pinpoint in getattr(config, "image_grid_pinpoints", None) or []]
    ours = [list(pinpoint) for pinpoint in processing.grid_pinpoints]
    if processing.kind == "anyres" and theirs and ours != theirs:
        raise CheckpointError(
            f"{folder}: expected the same image_grid_pinpoints in config.json and preprocessor, got {theirs} and"
            f" {ours}; make them agree"
        )
    return processing
