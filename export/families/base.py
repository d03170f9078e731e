"""What a model family gives the exporter: its modules, its picture processing and its prompt defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from trio_edge.export.checkpoint import Checkpoint
    from trio_edge.runtime.image_processing import ImageProcessing


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyModel:
    """A checkpoint's architecture, built without weights, taken apart into what the graphs wrap."""

    root: nn.Module
    """The Hugging Face model; its parameter names, made canonical, name the checkpoint's tensors."""
    vision: nn.Module
    """Graph module: pixel_values, token_index -> visual tokens (see ``export/graphs/vision.py``)."""
    layers: tuple[nn.Module, ...]
    final_norm: nn.Module
    lm_head: nn.Module
    inv_freq: NDArray[np.float32]
    """[E/2] inverse rotary frequencies."""
    attention_scaling: float
    """Factor on the rotary tables (1 without RoPE scaling)."""
    text_config: Any
    """transformers' configuration of the decoder."""
    vision_config: Any
    num_vision_layers: int
    """Vision layers that run."""


class Family(Protocol):
    """One architecture that can be exported."""

    @property
    def model_type(self) -> str:
        """``model_type`` in config.json."""

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return the Jinja template for a checkpoint that brings none."""

    def build(self, checkpoint: Checkpoint, *, encoder_keep: int | None) -> FamilyModel:
        """Return the model's modules; called under FakeTensorMode with the wanted default dtype.

        Args:
            checkpoint: Where the configuration is.
            encoder_keep: Patches per tile that the vision encoder keeps, or None for all.

        Raises:
            CheckpointError: If the configuration describes something that the graphs cannot express.
        """

    def image_processing(self, checkpoint: Checkpoint) -> ImageProcessing:
        """Return the constants of the checkpoint's image processor."""
