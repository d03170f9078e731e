"""The CLIP checkpoint of a LLaVA: its text tower, and the projection of its patch features into the text embedding space.

A LLaVA checkpoint holds only CLIP's vision tower. Selectors in CLIP's space also need the text tower, both projections and
the norm after the vision tower, from the CLIP checkpoint that the tower comes from. Their names in the bundle begin with
``clip.``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from trio_edge.export.checkpoints.checkpoint import Checkpoint, read_checkpoint
from trio_edge.export.checkpoints.text_files import load_tokenizer
from trio_edge.export.families.base import load_config
from trio_edge.export.graphs.clip_text import ClipText
from trio_edge.export.graphs.vision.clip import ClipVision
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.graph_io import num_clip_texts
from trio_edge.runtime.bundle.manifest import ClipTextSpec, TensorSpec
from trio_edge.trio.cost.selections import clip_text_flops

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from trio_edge.export.families.base import FamilyModel
    from trio_edge.runtime.bundle.manifest import FloatType

PREFIX = "clip."
TOKENIZER_NAME = "clip_tokenizer.json"
PATCHES = "clip_patches"
_PARTS = ("text_model.", "text_projection.", "visual_projection.", "vision_model.post_layernorm.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A located CLIP checkpoint."""

    checkpoint: Checkpoint
    config: Any
    spec: ClipTextSpec
    tokenizer: str
    """The text of its ``tokenizer.json``."""

    def merged_with(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return ``checkpoint`` with CLIP's tensors that graphs may use."""
        own = self.checkpoint.tensors
        more = {PREFIX + name: tensor for name, tensor in own.items() if name.startswith(_PARTS)}
        return replace(checkpoint, tensors=checkpoint.tensors | more)

    def flops(self, num_text: int) -> float:
        """Return the FLOPs of the text tower for a question of ``num_text`` tokens."""
        text = self.config.text_config
        return num_clip_texts(num_text, length=self.spec.length) * clip_text_flops(
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            projection_size=self.config.projection_dim,
            length=self.spec.length,
        )

    def num_texts(self, max_text: int) -> tuple[int, ...]:
        """Return the exported M: one text, and as many as a question of ``max_text`` tokens needs."""
        return tuple(sorted({1, num_clip_texts(max_text, length=self.spec.length)}))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipGraphs:
    """CLIP's modules, built without weights."""

    text: ClipText
    norm: nn.Module
    projection: nn.Module
    names: Mapping[int, str]
    """``id`` of each parameter -> its name in ``Clip.merged_with``."""
    projection_size: int
    """Z."""


def read_clip(model: str) -> Clip:
    """Return the CLIP checkpoint that ``model`` (a folder or Hub id) names.

    Raises:
        CheckpointError: If it cannot be read or is no CLIP model.
    """
    checkpoint = read_checkpoint(model, check_config=_check_is_clip)
    config = load_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    backend = tokenizer.backend_tokenizer
    rows = config.text_config.vocab_size
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None or largest >= rows:
        raise CheckpointError(
            f"{checkpoint.folder}: expected a tokenizer with start and end tokens and ids below {rows}, got start"
            f" {tokenizer.bos_token!r}, end {tokenizer.eos_token!r} and ids up to {largest}; use the checkpoint's own"
            " tokenizer files"
        )
    return Clip(
        checkpoint=checkpoint,
        config=config,
        spec=ClipTextSpec(
            tokenizer=TOKENIZER_NAME,
            start_id=tokenizer.bos_token_id,
            end_id=tokenizer.eos_token_id,
            length=config.text_config.max_position_embeddings,
        ),
        tokenizer=backend.to_str(),
    )


def build_clip(clip: Clip) -> ClipGraphs:
    """Return CLIP's modules; called under FakeTensorMode with the bundle's type as torch's default.

    Raises:
        CheckpointError: If configuration and weights belong to different models.
    """
    import transformers

    clip.config.text_config._attn_implementation = "eager"
    with clip.checkpoint.guarded():
        root: Any = transformers.CLIPModel(clip.config)
    parts = {name: value for name, value in root.named_parameters() if name.startswith(_PARTS)}
    for name, parameter in parts.items():
        clip.checkpoint.check_shape(name, parameter.shape)
    return ClipGraphs(
        text=ClipText(root),
        norm=root.vision_model.post_layernorm,
        projection=root.visual_projection,
        names={id(parameter): PREFIX + name for name, parameter in parts.items()},
        projection_size=clip.config.projection_dim,
    )


def with_patches(model: FamilyModel, graphs: ClipGraphs, *, dtype: FloatType) -> FamilyModel:
    """Return ``model`` with a vision graph that also returns each token's patch in CLIP's space.

    Raises:
        ScheduleError: If the model's vision encoder is not CLIP's, or has encoder reduction.
        CheckpointError: If the tower's features differ in width from the CLIP model's.
    """
    vision = model.vision.module
    if not isinstance(vision, ClipVision) or len(vision.features.states) != 1:
        raise ScheduleError(
            "--clip: expected a LLaVA with one layer of features and no --encoder-keep, got another vision graph;"
            " leave out --clip"
        )
    width = vision.features.embeddings.embed_dim
    if width != graphs.projection.in_features:
        raise CheckpointError(
            f"--clip: expected the CLIP model that the vision tower was taken from, of width {width}, got one of width"
            f" {graphs.projection.in_features}; name the right one"
        )
    tower = model.vision_dimensions
    patches = TensorSpec(name=PATCHES, dtype=dtype, shape=("N", graphs.projection_size))
    return replace(
        model,
        vision=replace(
            model.vision,
            module=ClipVision(
                vision.features,
                vision.projector,
                vision.newline,
                clip=(graphs.norm, graphs.projection),
            ),
            outputs=(*model.vision.outputs, patches),
        ),
        vision_dimensions=msgspec.structs.replace(
            tower, projector_weights=tower.projector_weights + tower.hidden_size * graphs.projection_size
        ),
    )


def _check_is_clip(folder: Path, config: dict[str, Any]) -> None:
    if config.get("model_type") != "clip":
        raise CheckpointError(
            f"{folder}: expected a CLIP model for --clip, got {config.get('model_type')!r}; name one such as"
            " openai/clip-vit-large-patch14-336"
        )
