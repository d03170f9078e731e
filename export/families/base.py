"""The interface of a model family: its modules, its image processing and its prompt defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.methods import TOKEN_METHODS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.graphs.assembly.copies import LayeredModule
    from trio_edge.export.graphs.linear_groups import LinearGroup
    from trio_edge.runtime.bundle.manifest import FloatType, TensorSpec, VisionDimensions
    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.runtime.videos.interface import VideoProcessing


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionGraph:
    """The ``vision`` graph of a family: a module and its I/O tensors."""

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    """The tensors that ``ImageProcessing.prepare`` fills. One is ``token_index`` [N]."""
    outputs: tuple[TensorSpec, ...]
    """``visual_tokens`` [N, D] first; then what encoder reduction kept, or DeepStack's planes."""
    linear_groups: tuple[LinearGroup, ...]
    """All linear layers that run."""
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Buffers that have no values under FakeTensorMode."""
    layered: LayeredModule | None = None
    """The module as copies of few parts, where its layers are large graphs; None if it is traced as a whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyModel:
    """A checkpoint's architecture, built without weights, taken apart into the modules that the graphs wrap."""

    root: nn.Module
    """The Hugging Face model; its parameter names, made canonical, name the checkpoint's tensors."""
    vision: VisionGraph
    vision_dimensions: VisionDimensions
    """Sizes of the vision tower and its projector."""
    layers: tuple[nn.Module, ...]
    final_norm: nn.Module
    lm_head: nn.Module
    inv_freq: NDArray[np.float32]
    """[A, E/2] inverse rotary frequencies, for ``RotaryTables``; A = 3 with M-RoPE, else 1."""
    attention_scaling: float
    """Factor on the rotary tables (1 without RoPE scaling)."""
    text_config: Any
    """transformers' configuration of the decoder."""
    num_deepstack: int = 0
    """Decoder layers, from the first on, that the vision graph has a plane of DeepStack for."""

    @property
    def position_axes(self) -> Literal[1, 3]:
        """A."""
        return 3 if len(self.inv_freq) == 3 else 1


class Family(Protocol):
    """One architecture that can be exported."""

    @property
    def model_type(self) -> str:
        """``model_type`` in config.json."""

    @property
    def positions(self) -> tuple[Positions, ...]:
        """Position rules that the family can follow; the first one is its default."""

    @property
    def image_marks(self) -> tuple[str, str]:
        """Text that Hugging Face's processor writes before and after an image's tokens, if the chat template does not."""

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return the Jinja template for a checkpoint that brings none."""

    def build(
        self,
        checkpoint: Checkpoint,
        *,
        processing: ImageProcessing,
        dtype: FloatType,
        with_features: bool,
    ) -> FamilyModel:
        """Return the model's modules; called under FakeTensorMode with the wanted default dtype.

        Args:
            checkpoint: Holds the configuration.
            processing: With the encoder reduction that the vision graph shall do.
            dtype: Type of the graph's floating point outputs.
            with_features: Whether the vision graph gives what ``TokenSelector.needs_features`` names.

        Raises:
            CheckpointError: If the configuration describes something that the graphs cannot express.
            ScheduleError: If the family's vision encoder has no class row to give features of.
        """

    def image_processing(
        self, checkpoint: Checkpoint, *, encoder_keep: int | None, max_visual: int | None
    ) -> ImageProcessing:
        """Return the processing of images into the vision graph's inputs.

        Args:
            checkpoint: With its preprocessor's configuration.
            encoder_keep: Patches or tokens that the vision encoder keeps; None for all.
            max_visual: Visual tokens that an image of any size is scaled down to, where the family scales.

        Raises:
            CheckpointError: If the checkpoint's processor cannot be followed.
            ScheduleError: If an option does not fit the family.
        """


@runtime_checkable
class VideoFamily(Family, Protocol):
    """A family whose models take videos, too."""

    def video_processing(self, checkpoint: Checkpoint, processing: ImageProcessing) -> VideoProcessing:
        """Return the processing of videos.

        Args:
            checkpoint: With its video processor's configuration.
            processing: That of images.

        Raises:
            CheckpointError: If the checkpoint's processor cannot be followed.
        """


def refuse_features(model_type: str, *, with_features: bool) -> None:
    """Raise ScheduleError if features are wanted of a family whose vision encoder has no class row."""
    if with_features:
        others = ", ".join(row.name for row in TOKEN_METHODS.values() if not row.load().needs_features)
        raise ScheduleError(
            f"--token-method: expected one that needs no class token for {model_type} ({others}), got one that does;"
            " choose another"
        )


def refuse_encoder_keep(model_type: str, encoder_keep: int | None) -> None:
    """Raise ScheduleError if a family is asked to drop patches in its vision encoder that it cannot rank."""
    if encoder_keep is not None:
        raise ScheduleError(
            f"--encoder-keep: expected none for {model_type}, got {encoder_keep}; use --token-method, or leave it out"
        )
