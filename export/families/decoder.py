"""Code that all families share: reading a checked configuration, and taking the decoder of a built model apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from trio_edge.export.families.base import FamilyModel, VisionGraph
from trio_edge.export.families.config_files import load_config
from trio_edge.export.families.decoder_config import check_decoder, untie_stored_head
from trio_edge.runtime.bundle.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import VisionDimensions


def read_config(checkpoint: Checkpoint, *, text_types: tuple[str, ...] = ()) -> Any:
    """Return transformers' configuration of ``checkpoint``; its decoder is checked, a head in the checkpoint untied.

    Args:
        checkpoint: Holds the configuration.
        text_types: Decoders that the family's language model may be; empty where it can be one only.

    Raises:
        CheckpointError: If it cannot be read, or describes a decoder that the graphs cannot express.
    """
    config = load_config(checkpoint)
    text = config.text_config
    if text_types and text.model_type not in text_types:
        raise CheckpointError(
            f"{checkpoint.folder}: expected a decoder of type {', '.join(text_types)}, got {text.model_type!r};"
            " this architecture cannot be exported"
        )
    check_decoder(text, folder=checkpoint.folder)
    # transformers 5 takes a configuration that says nothing of tying for tied, older releases wrote such for untied ones
    untie_stored_head(config, checkpoint)
    return config


def family_model(
    root: Any,
    *,
    vision: VisionGraph,
    vision_dimensions: VisionDimensions,
    has_mrope: bool = False,
    num_deepstack: int = 0,
) -> FamilyModel:
    """Return Hugging Face's model ``root``, built without weights, taken apart; called under FakeTensorMode.

    Args:
        root: The model.
        vision: Its vision graph.
        vision_dimensions: Its sizes.
        has_mrope: Whether positions have three axes: time, row and column.
        num_deepstack: Planes of DeepStack that the vision graph gives.
    """
    decoder = root.get_decoder()
    with unset_fake_temporarily():  # the frequencies are written into the graphs, so they need values
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
    """Return M-RoPE's frequencies by axis, [3, E/2]: each turns with one of time, row and column and is 0 at the others.

    transformers itself is asked: where one axis is at position 1 and the others at 0, only that axis' angles are not 0.

    Raises:
        CheckpointError: If the axes do not share out the frequencies.
    """
    one_axis_3BS = torch.eye(3, dtype=torch.int64)[..., None]
    try:
        _, sin_BSE = rotary(torch.zeros(1), one_axis_3BS)
    except (RuntimeError, TypeError, ValueError, IndexError):
        sections = rotary.config.rope_parameters.get("mrope_section")
        raise CheckpointError(
            f"config.json mrope_section: expected three numbers with the sum {len(inv_freq)}, half of a head, got {sections};"
            " this decoder cannot be exported"
        ) from None
    turns_BF = sin_BSE[:, 0, : len(inv_freq)].numpy() != 0
    return np.where(turns_BF, inv_freq, np.float32(0))
