"""What the LLaVA families share: a CLIP vision tower, an MLP projector, a Llama-like decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from trio_edge.export.checkpoint import read_json
from trio_edge.export.families.base import FamilyModel
from trio_edge.export.graphs.attention import ATTENTION_NAME, register_attention
from trio_edge.export.graphs.vision import ClipFeatures, Vision
from trio_edge.export.graphs.vision_reduced import ReducedVision
from trio_edge.runtime.errors import CheckpointError
from trio_edge.runtime.image_processing import ImageProcessing

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from trio_edge.export.checkpoint import Checkpoint

_TEXT_TYPES = ("llama", "mistral", "qwen2")


def read_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration of ``checkpoint``, checked for what the graphs can express.

    Raises:
        CheckpointError: If it cannot be read, needs remote code, or names another decoder or vision tower.
    """
    if "auto_map" in checkpoint.config:
        raise CheckpointError(
            f"{checkpoint.folder}: expected an architecture of transformers, got one with remote code, which is never"
            " run; use a checkpoint in the transformers format (names ending in -hf)"
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a broken config.json
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: expected a valid configuration, got: {reason}"
        ) from None
    text, vision = config.text_config, config.vision_config
    if text.model_type not in _TEXT_TYPES:
        raise CheckpointError(
            f"{checkpoint.folder}: expected a decoder of type {', '.join(_TEXT_TYPES)}, got {text.model_type!r};"
            " this architecture cannot be exported"
        )
    if vision.model_type != "clip_vision_model":
        raise CheckpointError(
            f"{checkpoint.folder}: expected a CLIP vision tower, got {vision.model_type!r};"
            " this architecture cannot be exported"
        )
    if config.vision_feature_select_strategy != "default":
        raise CheckpointError(
            f"{checkpoint.folder}: expected vision_feature_select_strategy 'default', got"
            f" {config.vision_feature_select_strategy!r}; this variant cannot be exported"
        )
    if "quantization_config" in checkpoint.config:
        raise CheckpointError(
            f"{checkpoint.folder}: expected floating point weights, got a quantized checkpoint; export the original"
        )
    return config


def build(model_class: Callable[[Any], nn.Module], config: Any, *, encoder_keep: int | None) -> FamilyModel:
    """Return the parts of ``model_class(config)``; under FakeTensorMode this takes no memory."""
    register_attention()
    text, vision = config.text_config, config.vision_config
    text._attn_implementation = ATTENTION_NAME
    vision._attn_implementation = "eager"
    root: Any = model_class(config)
    inner = root.model
    with unset_fake_temporarily():
        rotary = LlamaRotaryEmbedding(text)
        inv_freq = rotary.inv_freq.to(torch.float32).numpy()
    layer = config.vision_feature_layer
    feature_layers = (layer,) if isinstance(layer, int) else tuple(layer)
    if encoder_keep is None:
        features = ClipFeatures(inner.vision_tower, feature_layers=feature_layers)
        vision_layers = features.layers
        vision_graph: Vision | ReducedVision = Vision(
            features, inner.multi_modal_projector, getattr(inner, "image_newline", None)
        )
    else:
        vision_graph = ReducedVision(
            inner.vision_tower,
            inner.multi_modal_projector,
            feature_layers=feature_layers,
            num_keep=encoder_keep,
        )
        vision_layers = vision_graph.layers
    return FamilyModel(
        root=root,
        vision=vision_graph,
        layers=tuple(inner.language_model.layers),
        final_norm=inner.language_model.norm,
        lm_head=root.lm_head,
        inv_freq=inv_freq,
        attention_scaling=float(rotary.attention_scaling),
        text_config=text,
        vision_config=vision,
        num_vision_layers=len(vision_layers),
    )


def image_processing(checkpoint: Checkpoint, *, default_type: str) -> ImageProcessing:
    """Return the constants of the checkpoint's image processor.

    Args:
        checkpoint: With ``preprocessor_config.json``, or ``processor_config.json`` as transformers 5 writes it.
        default_type: Hugging Face's class for files that do not name one.
    """
    folder = checkpoint.folder
    values: dict[str, Any] | None = None
    if (folder / "preprocessor_config.json").exists():
        values = read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").exists():
        values = read_json(folder / "processor_config.json").get("image_processor")
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{folder}: expected preprocessor_config.json or processor_config.json with an image processor, got none;"
            " download it with the weights"
        )
    config = read_config(checkpoint)
    processing = ImageProcessing.from_preprocessor_config(
        {"image_processor_type": default_type, **values}, patch_size=config.vision_config.patch_size
    )
    if processing.tile_size != config.vision_config.image_size:
        raise CheckpointError(
            f"{folder}: expected crop_size {config.vision_config.image_size} (the vision tower's), got"
            f" {processing.tile_size}; preprocessor and weights belong to different models"
        )
    theirs = [list(pinpoint) for pinpoint in checkpoint.config.get("image_grid_pinpoints") or []]
    ours = [list(pinpoint) for pinpoint in processing.grid_pinpoints]
    if processing.kind == "anyres" and theirs and ours != theirs:
        raise CheckpointError(
            f"{folder}: expected the same image_grid_pinpoints in config.json and preprocessor, got {theirs} and"
            f" {ours}; make them agree"
        )
    return processing
