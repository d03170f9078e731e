"""The base of all model families, and what they share: reading and checking configurations, and the decoder's modules.

Graphs replace a decoder's rotary tables and attention masks. Everything else comes with transformers' own layers, which the
graphs wrap: biases, head sizes that differ from ``hidden_size / num_attention_heads``, tied embeddings. Rotary frequencies are
constants of a graph, so RoPE types whose frequencies depend on the sequence length are exported only for lengths at which they
are constant. The graphs' causal mask has no window, so a model with a sliding window is exported only for sequences that fit
the window.

| RoPE type                  | exported                                                                |
|----------------------------|-------------------------------------------------------------------------|
| default, linear, llama3    | yes                                                                     |
| yarn                       | yes, with its factor on the tables                                      |
| dynamic                    | up to ``max_position_embeddings``, where it equals the default type     |
| longrope                   | up to ``original_max_position_embeddings``, with its short factors      |
| partial                    | Qwen3.5                                                                 |
| others, per layer          | no                                                                      |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from trio_edge.export.checkpoints.checkpoint import HEAD_NAME, read_json, settings_of
from trio_edge.export.graphs.attention import ATTENTION_NAME, TILE_ATTENTION_NAME, register_attention
from trio_edge.export.graphs.state_layers import is_linear, state_layer
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.manifest import TensorSpec
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.decoder_layers import name_as_llama
from trio_edge.trio.methods import TokenMethod, all_methods

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.graphs.assembly.copies import LayeredModule
    from trio_edge.export.graphs.linear_groups import LinearGroup
    from trio_edge.runtime.bundle.manifest import FloatType, VisionDimensions
    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.runtime.videos.qwen import VideoProcessing

    _Images = TypeVar("_Images", bound=ImageProcessing)

_PROCESSOR_NAME = "processor_config.json"
_A = {"image_processor": "an image processor", "video_processor": "a video processor"}
_FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_GROWING_ROPE_TYPES = ("dynamic", "longrope")
_WINDOWED = "sliding_attention"
_LAYER_TYPES = ("full_attention", _WINDOWED)
_LINEAR = ("linear_attention", "conv")


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
    num_deepstack: int = 0
    """Number of DeepStack planes among the outputs; plane i is added after decoder layer i."""


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
    position_axes: Literal[1, 3]
    """A: 3 with M-RoPE, else 1."""


class Family(ABC):
    """A model architecture that can be exported. Subclasses set the attributes and make the vision graph and its inputs."""

    model_type: str
    """``model_type`` in config.json."""
    architecture: str
    """transformers' class of the model."""
    chat_template: str
    """Jinja template for a checkpoint without one."""
    positions: tuple[Positions, ...] = ("compact", "preserved")
    """Rules for position ids that the family supports, the default first."""
    image_marks: tuple[str, str] = ("", "")
    """Text that Hugging Face's processor adds before and after an image's tokens, and the chat template does not."""
    text_types: tuple[str, ...] = ()
    """Types of decoder that the family supports; empty if its model class has one type."""
    vision_type: str | None = None
    """Type of vision tower that the family supports; None if its model class has one type."""
    required: tuple[tuple[str, object], ...] = ()
    """Settings of config.json that must have one value, with this value."""
    vision_attention: str | None = TILE_ATTENTION_NAME
    """Name of the vision tower's attention; None for transformers' choice."""
    has_class_row: bool = False
    """Whether the vision graph can return the features that selectors with ``needs_features`` read."""
    has_mrope: bool = False
    """Whether positions have three axes: time, row and column."""
    is_hybrid: bool = False
    """Whether decoder layers may have linear attention, and rotate a part of each head."""

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return the Jinja template for a checkpoint without one."""
        return self.chat_template

    def read_config(self, checkpoint: Checkpoint) -> Any:
        """Return transformers' configuration of ``checkpoint``, checked; a head in the checkpoint is untied.

        Raises:
            CheckpointError: If it cannot be read or is not supported.
        """
        config, folder = load_config(checkpoint), checkpoint.folder
        text = config.text_config
        if self.text_types and text.model_type not in self.text_types:
            raise CheckpointError(
                f"{folder}: expected a decoder of type {', '.join(self.text_types)}, got {text.model_type!r};"
                " this architecture cannot be exported"
            )
        if self.vision_type is not None and config.vision_config.model_type != self.vision_type:
            raise CheckpointError(
                f"{folder}: expected a vision tower {self.vision_type!r}, got {config.vision_config.model_type!r};"
                " this architecture cannot be exported"
            )
        check_decoder(text, folder=folder, is_hybrid=self.is_hybrid)
        # Without an entry about tying, transformers 5 ties the head, and older releases did not. Fine-tuned checkpoints may
        # claim tied embeddings and hold a head that differs; transformers then uses this head.
        config.tie_word_embeddings = config.tie_word_embeddings and HEAD_NAME not in checkpoint.tensors
        for name, value in self.required:
            if (got := getattr(config, name)) != value:
                raise CheckpointError(
                    f"{folder}: expected {name} {value!r}, got {got!r}; this variant cannot be exported"
                )
        self.check_config(config, checkpoint)
        return config

    def check_config(self, config: Any, checkpoint: Checkpoint) -> None:  # noqa: B027
        """Raise CheckpointError if a setting of the family's own is not supported."""

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
        config = self.read_config(checkpoint)
        images: Any = self.images(checkpoint, config, max_visual)
        if encoder_keep is not None:
            self.check_encoder_keep(encoder_keep, images, config)
        reduced: ImageProcessing = msgspec.structs.replace(images, encoder_keep=encoder_keep)
        return reduced

    @abstractmethod
    def images(self, checkpoint: Checkpoint, config: Any, max_visual: int | None) -> ImageProcessing:
        """Return the processing of images without encoder reduction; see ``image_processing``."""

    def check_encoder_keep(self, encoder_keep: int, images: Any, config: Any) -> None:
        """Raise ScheduleError unless the vision encoder can keep ``encoder_keep`` patches or tokens; most keep all."""
        raise ScheduleError(
            f"--encoder-keep: expected none for {self.model_type}, got {encoder_keep}; use --token-method instead"
        )

    def video_processing(self, checkpoint: Checkpoint, processing: ImageProcessing) -> VideoProcessing | None:
        """Return the processing of videos, None if the models take none; ``processing`` is that of images.

        Raises:
            CheckpointError: If the checkpoint's processor is not supported.
        """
        return None

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
        if with_features and not self.has_class_row:
            others = ", ".join(row.name for row in all_methods(TokenMethod) if not row.reads_features)
            raise ScheduleError(
                f"--token-method: expected one that needs no class token for {self.model_type} ({others}), got one that does;"
                " choose another"
            )
        config = self.read_config(checkpoint)
        register_attention()
        config.text_config._attn_implementation = ATTENTION_NAME
        if self.vision_attention is not None:
            config.vision_config._attn_implementation = self.vision_attention
        # there are no values to initialize; SigLIP's initialization would read them
        with no_init_weights():
            root: Any = getattr(transformers, self.architecture)(config)
        root.tie_weights()  # no_init_weights skips it
        vision, vision_dimensions = self.vision(
            root.model, config, processing=processing, dtype=dtype, with_features=with_features
        )
        decoder = root.get_decoder()
        name_as_llama(decoder)
        for layer in filter(is_linear, decoder.layers):
            layer.forward = MethodType(state_layer, layer)
        with unset_fake_temporarily():  # the graphs hold the frequencies, so they need values
            rotary: Any = type(decoder.rotary_emb)(decoder.config)
            inv_freq = rotary.inv_freq.to(torch.float32).numpy()
            inv_freq = _by_axis(rotary, inv_freq) if self.has_mrope else inv_freq[None]
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
            position_axes=3 if self.has_mrope else 1,
        )

    @abstractmethod
    def vision(
        self, inner: Any, config: Any, *, processing: Any, dtype: FloatType, with_features: bool
    ) -> tuple[VisionGraph, VisionDimensions]:
        """Return the vision graph, and the sizes that its cost follows from; ``inner`` is the model without its head."""


def load_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration of ``checkpoint``.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many types for a broken config.json
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: expected a valid configuration, got '{error!s:.300}'; download it again"
        ) from None
    for name, value in settings_of(checkpoint.config):
        if name.endswith("hidden_act") and value not in ACT2FN:
            raise CheckpointError(
                f"{checkpoint.folder}/config.json {name}: expected an activation of transformers, got {value!r:.100}; use the"
                " checkpoint's own file"
            )
    _forget_dtype(config)
    return config


def _forget_dtype(config: Any) -> None:
    """Clear the element type of ``config`` and its parts, because the exporter chooses one for all.

    transformers would build each part in its own type. In a released Qwen2.5-VL the type holds for the decoder only.
    """
    config.dtype = None
    for name in getattr(config, "sub_configs", ()):
        if (part := getattr(config, name, None)) is not None:
            _forget_dtype(part)


def read_image_processor(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the image processor's constants, from ``preprocessor_config.json`` or transformers 5's ``processor_config.json``.

    Raises:
        CheckpointError: If neither is there.
    """
    return _processor(checkpoint.folder, "image_processor", "preprocessor_config.json")


def read_video_processor(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the video processor's constants, or the image processor's if there are none.

    They are in ``video_preprocessor_config.json`` or transformers 5's ``processor_config.json``.

    Raises:
        CheckpointError: If all files are missing.
    """
    names = "video_preprocessor_config.json", "preprocessor_config.json"
    return _processor(checkpoint.folder, "video_processor", *names)


def _processor(folder: Path, part: str, *names: str) -> dict[str, Any]:
    # as transformers, reads the newer file first: saving again does not delete the older ones
    values: Any = read_processor(folder).get(part)
    for name in names:
        if values is None and (folder / name).exists():
            values = read_json(folder / name)
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{folder}: expected {names[-1]} or {_PROCESSOR_NAME} with {_A[part]}, got none; download it with the weights"
        )
    return values


def read_processor(folder: Path) -> dict[str, Any]:
    """Return the content of ``processor_config.json``, nothing if there is none."""
    return read_json(folder / _PROCESSOR_NAME) if (folder / _PROCESSOR_NAME).exists() else {}


def require_processor(checkpoint: Checkpoint, **wanted: object) -> None:
    """Raise CheckpointError if ``processor_config.json`` disagrees with the model on one of the ``wanted`` values."""
    path, written = checkpoint.folder / _PROCESSOR_NAME, read_processor(checkpoint.folder)
    for name, value in wanted.items():
        if written.get(name, value) not in (value, None):
            raise CheckpointError(
                f"{path}: expected {name} {value!r} (config.json), got {written[name]!r}; make them agree"
            )


def check_decoder(text_config: Any, *, folder: Path, is_hybrid: bool = False) -> None:
    """Raise CheckpointError if the decoder that ``text_config`` describes is not supported at any length.

    ``is_hybrid`` is that of ``Family``.
    """
    layer_types = (*_LAYER_TYPES, *_LINEAR) if is_hybrid else _LAYER_TYPES
    rope, known = _rope(text_config), (*_FIXED_ROPE_TYPES, *_GROWING_ROPE_TYPES)
    theta = rope.get("rope_theta", 1.0)
    rope_type, rotary = rope.get("rope_type"), rope.get("partial_rotary_factor", 1.0)
    unknown = set(getattr(text_config, "layer_types", None) or ()) - set(layer_types)
    for name, is_supported, expected, got in (
        ("rope_type", rope_type in known, f"one for all layers, of {', '.join(known)}", repr(rope_type)),
        ("rope_theta", isinstance(theta, (int, float)) and 0 < theta < 1e18, "0..1e18", f"{theta!r:.100}"),
        ("partial_rotary_factor", rotary == 1.0 or is_hybrid, "1", str(rotary)),
        ("layer_types", not unknown, " or ".join(layer_types), ", ".join(sorted(unknown))),
    ):
        if not is_supported:
            raise CheckpointError(
                f"{folder}/config.json {name}: expected {expected}, got {got}; this decoder cannot be exported"
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


def first_that_fits(max_visual: int | None, candidates: Iterable[_Images], *, smallest: str) -> _Images:
    """Return the first of ``candidates``, from large to small, with at most ``max_visual`` visual tokens for any image.

    Raises:
        ScheduleError: If there is none; the message describes the ``smallest``.
    """
    for images in candidates:
        needed = images.any_image_sizes()[-1]["N"]
        if max_visual is None or needed <= max_visual:
            return images
    raise ScheduleError(f"--max-visual: expected at least {needed} ({smallest}), got {max_visual}; raise it")


def tile_inputs(side: int) -> tuple[TensorSpec, TensorSpec]:
    """Return the inputs of a vision graph that runs on tiles of ``side`` pixels."""
    return (
        TensorSpec(name="pixel_values", dtype="float32", shape=("B", 3, side, side)),
        TensorSpec(name="token_index", dtype="int32", shape=("N",)),
    )


def visual_tokens(width: int, *, dtype: FloatType) -> TensorSpec:
    """Return the first output of every vision graph; ``width`` is D."""
    return TensorSpec(name="visual_tokens", dtype=dtype, shape=("N", width))


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


def max_positions(text_config: Any) -> int:
    """Return the number of positions that the decoder supports.

    It is ``max_position_embeddings``, or the RoPE scaling's factor times its original length if that is more, since only
    some checkpoints raise the former with the latter.
    """
    limit, rope = int(text_config.max_position_embeddings), _rope(text_config)
    if rope["rope_type"] == "longrope":
        return int(rope["original_max_position_embeddings"])
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if rope["rope_type"] in ("yarn", "llama3") and original and factor:
        return max(limit, int(original * factor))
    return limit


def sliding_window(text_config: Any) -> tuple[int, int] | None:
    """Return the first layer with a sliding window and the window in rows; None if there is none."""
    layer_types = getattr(text_config, "layer_types", None)
    window = getattr(text_config, "sliding_window", None)
    if window is None and not layer_types:  # transformers' cache drops the keys of earlier chunks, too
        window = getattr(text_config, "attention_chunk_size", None)
    if window is None:
        return None
    if layer_types:
        return (layer_types.index(_WINDOWED), int(window)) if _WINDOWED in layer_types else None
    # Without layer types the window holds for all layers: Mistral's mask has it, and transformers' cache for any decoder.
    return 0, int(window)


def check_positions(
    text_config: Any,
    *,
    num_visual: int,
    max_text: int,
    max_new_tokens: int,
    schedule: Schedule = Schedule(),  # noqa: B008
    way_out: str = "lower --max-text or --max-new-tokens",
) -> None:
    """Raise ScheduleError if the longest sequence does not fit a decoder that ``check_decoder`` accepts.

    ``num_visual``, ``max_text`` and ``max_new_tokens`` are its tokens. ``schedule`` determines the rows that reach layers with
    a window, which counts rows and not positions; a stage probes such a layer with the rows before the stage. ``way_out`` is
    the advice at the end of a message.
    """
    limit, rope_type = max_positions(text_config), _rope(text_config)["rope_type"]
    if (needed := num_visual + max_text + max_new_tokens) > limit:
        grows = f"beyond it RoPE type {rope_type!r} depends on the length"
        reason = grows if rope_type in _GROWING_ROPE_TYPES else "the model's limit"
        raise ScheduleError(
            f"sequence: expected at most {limit} positions ({reason}), got {needed} = {num_visual} visual + {max_text} text +"
            f" {max_new_tokens} new; {way_out}"
        )
    if (windowed := sliding_window(text_config)) is not None:
        layers = schedule.tokens_per_layer(
            num_layers=int(text_config.num_hidden_layers), num_visual=num_visual
        )
        _check_window(*windowed, layers, max_text, max_new_tokens, way_out)


def _check_window(
    layer: int, window: int, visual: Sequence[int], max_text: int, max_new_tokens: int, way_out: str
) -> None:
    """Raise ScheduleError if what enters the first ``layer`` with a window exceeds it; ``visual`` are tokens by layer."""
    rows = visual[max(layer - 1, 0)]
    if (needed := rows + max_text + max_new_tokens) > window:
        raise ScheduleError(
            f"sequence: expected at most {window} positions (the model's sliding window), got"
            f" {needed} = {rows} visual + {max_text} text + {max_new_tokens} new before layer {layer};"
            f" {way_out}, or reduce earlier"
        )


def _rope(text_config: Any) -> dict[str, Any]:
    """Return the RoPE parameters; transformers converts older forms (``rope_theta``, ``rope_scaling``) to this one."""
    return getattr(text_config, "rope_parameters", None) or {"rope_type": "default"}
