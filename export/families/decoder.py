"""Code that all families share: reading and checking a configuration, and the decoder's modules of a built model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from trio_edge.export.families.base import FamilyModel, VisionGraph
from trio_edge.export.families.config_files import load_config
from trio_edge.export.families.decoder_config import check_decoder, untie_stored_head
from trio_edge.export.graphs.attention import ATTENTION_NAME, register_attention
from trio_edge.runtime.bundle.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import VisionDimensions


def read_config(
    checkpoint: Checkpoint, *, text_types: tuple[str, ...] = (), vision_type: str | None = None
) -> Any:
    """Return transformers' configuration of ``checkpoint``, checked; a head in the checkpoint is untied.

    Args:
        checkpoint: Holds the configuration.
        text_types: Types of decoder that the family supports; empty if its model class has one type.
        vision_type: Type of vision tower that the family supports; None if its model class has one type.

    Raises:
        CheckpointError: If it cannot be read, or decoder or vision tower are not supported.
    """
    config = load_config(checkpoint)
    text = config.text_config
    if text_types and text.model_type not in text_types:
        raise CheckpointError(
            f"{checkpoint.folder}: expected a decoder of type {', '.join(text_types)}, got {text.model_type!r};"
            " this architecture cannot be exported"
        )
    if vision_type is not None and config.vision_config.model_type != vision_type:
        raise CheckpointError(
            f"{checkpoint.folder}: expected a vision tower {vision_type!r}, got {config.vision_config.model_type!r};"
            " this architecture cannot be exported"
        )
    check_decoder(text, folder=checkpoint.folder)
    # without an entry about tying, transformers 5 ties the head, and older releases did not
    untie_stored_head(config, checkpoint)
    return config


def require(config: Any, folder: Path, **wanted: object) -> None:
    """Raise CheckpointError unless ``config`` has the ``wanted`` values."""
    for name, value in wanted.items():
        if (got := getattr(config, name)) != value:
            raise CheckpointError(
                f"{folder}: expected {name} {value!r}, got {got!r}; this variant cannot be exported"
            )


def require_square_tiles(vision_config: Any, folder: Path) -> None:
    """Raise CheckpointError unless ``vision_config`` has one number each for the sides of tiles and patches."""
    for name in ("image_size", "patch_size"):
        if not isinstance(got := getattr(vision_config, name), int):
            raise CheckpointError(
                f"{folder}: expected one number as vision {name}, got {got}; this variant cannot be exported"
            )


def require_same(what: str, checkpoint: Checkpoint, *, tower: object, processor: object) -> None:
    """Raise CheckpointError unless the vision tower and the checkpoint's image processor agree on ``what``."""
    if tower != processor:
        raise CheckpointError(
            f"{checkpoint.folder}: expected {what} {tower} (the vision tower's), got {processor}; preprocessor and weights"
            " belong to different models"
        )


def choose_attention(config: Any, *, vision: str | None = None) -> None:
    """Make the decoder of ``config`` use two-part attention, and its vision tower the attention called ``vision``."""
    register_attention()
    config.text_config._attn_implementation = ATTENTION_NAME
    if vision is not None:
        config.vision_config._attn_implementation = vision


def family_model(
    root: Any,
    *,
    vision: VisionGraph,
    vision_dimensions: VisionDimensions,
    has_mrope: bool = False,
    num_deepstack: int = 0,
) -> FamilyModel:
    """Return the modules of Hugging Face's model ``root``, built without weights; called under FakeTensorMode.

    With ``has_mrope`` positions have three axes: time, row and column.
    """
    decoder = root.get_decoder()
    with unset_fake_temporarily():  # the graphs hold the frequencies, so they need values
        rotary: Any = type(decoder.rotary_emb)(decoder.config)
        inv_freq = rotary.inv_freq.to(torch.float32).numpy()
        inv_freq = _by_axis(rotary, inv_freq) if has_mrope else inv_freq[None]
    return FamilyModel(
        root=root,
        vision=vision,
        vision_dimensions=vision_dimensions,
        layers=tuple(decoder.layers),
        final_norm=decoder.norm,
        lm_head=root.lm_head,
        inv_freq=inv_freq,
        attention_scaling=float(rotary.attention_scaling),
        text_config=decoder.config,
        num_deepstack=num_deepstack,
    )


def _by_axis(rotary: Any, inv_freq: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return M-RoPE's frequencies by axis, [3, E/2]; each belongs to time, row or column and is 0 at the other axes.

    transformers' own tables show the axis: at position 1 on one axis and 0 on the others, only its angles are not 0.

    Raises:
        CheckpointError: If the configuration does not divide the frequencies among the axes.
    """
    one_axis_3BS = torch.eye(3, dtype=torch.int64)[..., None]
    try:
        _, sin_BSE = rotary(torch.zeros(1), one_axis_3BS)
    except (RuntimeError, TypeError, ValueError, IndexError):
        sections = rotary.config.rope_parameters.get("mrope_section")
        raise CheckpointError(
            f"config.json mrope_section: expected three numbers with the sum {len(inv_freq)} (half a head), got {sections};"
            " this decoder cannot be exported"
        ) from None
    turns_BF = sin_BSE[:, 0, : len(inv_freq)].numpy() != 0
    return np.where(turns_BF, inv_freq, np.float32(0))
