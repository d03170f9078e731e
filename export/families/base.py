"""The interface of a model family: modules, image processing and prompt defaults; and I/O tensors of several families."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.manifest import TensorSpec
from trio_edge.trio.methods import TokenMethod, all_methods

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.graphs.assembly.copies import LayeredModule
    from trio_edge.export.graphs.linear_groups import LinearGroup
    from trio_edge.runtime.bundle.manifest import FloatType, VisionDimensions
    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.runtime.videos.interface import VideoProcessing


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionGraph:
    """The ``vision`` graph of a family: a module and its I/O tensors."""

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    """The tensors that ``ImageProcessing.prepare`` fills; one is ``token_index`` [N]."""
    outputs: tuple[TensorSpec, ...]
    """``visual_tokens`` [N, D] first; then the kept patches of encoder reduction, features, or DeepStack's planes."""
    linear_groups: tuple[LinearGroup, ...]
    """All linear layers that run."""
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Values of buffers, which have none under FakeTensorMode."""
    layered: LayeredModule | None = None
    """The module as copies of a few parts, which are traced once each; None if it is traced as a whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyModel:
    """The modules of a checkpoint's model, built without weights, as the graphs wrap them."""

    root: nn.Module
    """The Hugging Face model; its parameters' canonical names are those of the checkpoint's tensors."""
    vision: VisionGraph
    vision_dimensions: VisionDimensions
    layers: tuple[nn.Module, ...]
    final_norm: nn.Module
    lm_head: nn.Module
    inv_freq: NDArray[np.float32]
    """[A, E/2] inverse rotary frequencies for ``RotaryTables``; A = 3 with M-RoPE, else 1."""
    attention_scaling: float
    """Factor on the rotary tables (1 without RoPE scaling)."""
    text_config: Any
    num_deepstack: int = 0
    """Number of DeepStack planes; plane i is added after decoder layer i."""

    @property
    def position_axes(self) -> Literal[1, 3]:
        """A: 3 with M-RoPE, else 1."""
        return 3 if len(self.inv_freq) == 3 else 1


class Family(Protocol):
    """A model architecture that can be exported."""

    @property
    def model_type(self) -> str:
        """``model_type`` in config.json."""

    @property
    def positions(self) -> tuple[Positions, ...]:
        """Rules for position ids that the family supports, the default first."""

    @property
    def image_marks(self) -> tuple[str, str]:
        """Text that Hugging Face's processor adds before and after an image's tokens, and the chat template does not."""

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return the Jinja template for a checkpoint without one."""

    def build(
        self, checkpoint: Checkpoint, *, processing: ImageProcessing, dtype: FloatType, with_features: bool
    ) -> FamilyModel:
        """Return the model's modules; called under FakeTensorMode with ``dtype`` as torch's default.

        Args:
            checkpoint: Holds the configuration.
            processing: Holds the number of patches or tokens that encoder reduction keeps.
            dtype: Type of the graph's floating-point outputs.
            with_features: Whether the vision graph also returns what selectors with ``reads_features`` read.

        Raises:
            CheckpointError: If the configuration is not supported.
            ScheduleError: If features are wanted and the family's vision encoder has no class row.
        """

    def image_processing(
        self, checkpoint: Checkpoint, *, encoder_keep: int | None, max_visual: int | None
    ) -> ImageProcessing:
        """Return the processing of images into the vision graph's inputs.

        Args:
            checkpoint: Holds the configuration of its image processor.
            encoder_keep: Patches or tokens that the vision encoder keeps; None for all.
            max_visual: Most visual tokens of an image, if the family can reduce their number; None for its default.

        Raises:
            CheckpointError: If the checkpoint's processor is not supported.
            ScheduleError: If the family does not support an option.
        """


@runtime_checkable
class VideoFamily(Family, Protocol):
    """A family whose models also take videos."""

    def video_processing(self, checkpoint: Checkpoint, processing: ImageProcessing) -> VideoProcessing:
        """Return the processing of videos; raise CheckpointError if the checkpoint's is not supported."""


def tile_inputs(side: int) -> tuple[TensorSpec, TensorSpec]:
    """Return the inputs of a vision graph that runs on tiles of ``side`` pixels."""
    return (
        TensorSpec(name="pixel_values", dtype="float32", shape=("B", 3, side, side)),
        TensorSpec(name="token_index", dtype="int32", shape=("N",)),
    )


def visual_tokens(width: int, *, dtype: FloatType) -> TensorSpec:
    """Return the first output of every vision graph; ``width`` is D."""
    return TensorSpec(name="visual_tokens", dtype=dtype, shape=("N", width))


def refuse_features(model_type: str, *, with_features: bool) -> None:
    """Raise ScheduleError if features are wanted of a family whose vision encoder has no class row."""
    if with_features:
        others = ", ".join(row.name for row in all_methods(TokenMethod) if not row.reads_features)
        raise ScheduleError(
            f"--token-method: expected one that needs no class token for {model_type} ({others}), got one that does;"
            " choose another"
        )


def refuse_encoder_keep(model_type: str, encoder_keep: int | None) -> None:
    """Raise ScheduleError if encoder reduction is wanted of a family that does not support it."""
    if encoder_keep is not None:
        raise ScheduleError(
            f"--encoder-keep: expected none for {model_type}, got {encoder_keep}; use --token-method instead"
        )
