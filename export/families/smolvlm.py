"""SmolVLM2: SigLIP tiles with pixel shuffle, each with its place in the prompt, and a Llama decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import msgspec
import torch

from trio_edge.export.checkpoints.checkpoint import read_json
from trio_edge.export.checkpoints.text_files import load_tokenizer
from trio_edge.export.families.base import (
    FamilyModel,
    VisionGraph,
    refuse_encoder_keep,
    refuse_features,
    tile_inputs,
    visual_tokens,
)
from trio_edge.export.families.config_files import read_image_processor
from trio_edge.export.families.decoder import (
    choose_attention,
    family_model,
    read_config,
    require_same,
    require_square_tiles,
)
from trio_edge.export.graphs.attention import TILE_ATTENTION_NAME
from trio_edge.export.graphs.vision.smolvlm import SmolVlmVision, patch_positions
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.manifest import VisionDimensions
from trio_edge.runtime.images.smolvlm import SmolVlmImages
from trio_edge.runtime.prompts.chat import SMOLVLM_TEMPLATE

if TYPE_CHECKING:
    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.runtime.images.interface import ImageProcessing

# names of the texts around tiles: the processor's, and ours
_MARKS = {"fake_image_token": "image_mark", "global_image_token": "overview_mark"}


@final
class SmolVlm:
    """Implements ``Family``."""

    model_type = "smolvlm"
    positions: tuple[Positions, ...] = ("compact", "preserved")
    image_marks = ("", "")  # the texts around tiles depend on the image: ``ImageLayout.text``

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return the template of the released checkpoints."""
        return SMOLVLM_TEMPLATE

    def build(
        self, checkpoint: Checkpoint, *, processing: ImageProcessing, dtype: FloatType, with_features: bool
    ) -> FamilyModel:
        """Return the model's modules; see ``Family``."""
        refuse_features(self.model_type, with_features=with_features)
        from transformers import SmolVLMForConditionalGeneration

        config = _read_config(checkpoint)
        choose_attention(config, vision=TILE_ATTENTION_NAME)
        text, vision = config.text_config, config.vision_config
        root: Any = SmolVLMForConditionalGeneration(config)
        return family_model(
            root,
            vision=_vision_graph(root.model, config, dtype=dtype),
            vision_dimensions=VisionDimensions(
                num_layers=vision.num_hidden_layers,
                hidden_size=vision.hidden_size,
                intermediate_size=vision.intermediate_size,
                patches_per_tile=_patches_per_side(config) ** 2,
                projector_weights=vision.hidden_size * config.scale_factor**2 * text.hidden_size,
            ),
        )

    def image_processing(
        self, checkpoint: Checkpoint, *, encoder_keep: int | None, max_visual: int | None
    ) -> ImageProcessing:
        """Return the tiling; see ``Family``. ``max_visual`` lowers the number of tiles."""
        refuse_encoder_keep(self.model_type, encoder_keep)
        config = _read_config(checkpoint)
        processing = SmolVlmImages.from_preprocessor_config(
            read_image_processor(checkpoint),
            token_size=config.vision_config.patch_size * config.scale_factor,
            **_marks(checkpoint),
        )
        side = config.vision_config.image_size
        require_same("max_image_size", checkpoint, tower=side, processor=processing.tile_size)
        _check_tokens_per_tile(processing.tokens_per_tile, checkpoint)
        return _with_fewer_tiles(processing, max_visual)


def _read_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration, checked."""
    config = read_config(checkpoint, text_types=("llama",), vision_type="smolvlm_vision")
    folder = checkpoint.folder
    require_square_tiles(config.vision_config, folder)
    if config.scale_factor < 1 or _patches_per_side(config) % config.scale_factor:
        raise CheckpointError(
            f"{folder}: expected a scale_factor that divides {_patches_per_side(config)} (patches along a tile), got"
            f" {config.scale_factor}; this variant cannot be exported"
        )
    return config


def _patches_per_side(config: Any) -> int:
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def _marks(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the texts around tiles that the tokenizer names; the image processing has defaults for the others."""
    tokenizer = load_tokenizer(checkpoint)
    named = {ours: getattr(tokenizer, theirs, None) for theirs, ours in _MARKS.items()}
    return {name: str(text) for name, text in named.items() if text is not None}


def _check_tokens_per_tile(tokens: int, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the processor's file has another number of visual tokens per tile than the model."""
    path = checkpoint.folder / "processor_config.json"
    written = (read_json(path) if path.exists() else {}).get("image_seq_len", tokens)
    if written != tokens:
        raise CheckpointError(
            f"{path}: expected image_seq_len {tokens} (config.json), got {written!r}; make them agree"
        )


def _with_fewer_tiles(processing: SmolVlmImages, max_visual: int | None) -> SmolVlmImages:
    """Return the processing with the longest image side that gives at most ``max_visual`` visual tokens."""
    if max_visual is None:
        return processing
    fewer = (count * processing.tile_size for count in range(processing.most_per_side - 1, 0, -1))
    for longest_edge in (processing.longest_edge, *fewer):
        limited = msgspec.structs.replace(processing, longest_edge=longest_edge)
        needed = limited.any_image_sizes()[-1]["N"]
        if needed <= max_visual:
            return limited
    raise ScheduleError(f"--max-visual: expected at least {needed} (one tile), got {max_visual}; raise it")


def _vision_graph(inner: Any, config: Any, *, dtype: FloatType) -> VisionGraph:
    positions = patch_positions(_patches_per_side(config))
    module = SmolVlmVision(
        inner.vision_model, inner.connector, position_ids=torch.empty(positions.shape, dtype=torch.int64)
    )
    return VisionGraph(
        module=module,
        inputs=tile_inputs(config.vision_config.image_size),
        outputs=(visual_tokens(config.text_config.hidden_size, dtype=dtype),),
        linear_groups=module.linear_groups(),
        constants={"position_ids": positions},
    )
