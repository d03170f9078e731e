"""SmolVLM2: SigLIP tiles with pixel shuffle, which the prompt names one by one, and a Llama decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import msgspec
import torch

from trio_edge.export.checkpoints.checkpoint import read_json
from trio_edge.export.checkpoints.text_files import load_tokenizer
from trio_edge.export.families.base import FamilyModel, VisionGraph, refuse_encoder_keep, refuse_features
from trio_edge.export.families.config_files import read_image_processor
from trio_edge.export.families.decoder import family_model, read_config
from trio_edge.export.graphs.attention import ATTENTION_NAME, register_attention
from trio_edge.export.graphs.vision.smolvlm import SmolVlmVision, patch_positions
from trio_edge.export.graphs.vision.tile_attention import TILE_ATTENTION_NAME, register_tile_attention
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.manifest import TensorSpec, VisionDimensions
from trio_edge.runtime.images.smolvlm import SmolVlmImages
from trio_edge.runtime.prompts.chat import SMOLVLM_TEMPLATE

if TYPE_CHECKING:
    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.runtime.images.interface import ImageProcessing

# The processor's names of them, and ours.
_MARKS = {"fake_image_token": "image_mark", "global_image_token": "overview_mark"}


@final
class SmolVlm:
    """Implements ``Family``."""

    model_type = "smolvlm"
    positions: tuple[Positions, ...] = ("compact", "preserved")
    image_marks = ("", "")  # what stands around the tiles depends on the image: ``ImageLayout.text``

    def default_chat_template(self, checkpoint: Checkpoint) -> str:
        """Return the released checkpoints' form."""
        return SMOLVLM_TEMPLATE

    def build(
        self,
        checkpoint: Checkpoint,
        *,
        processing: ImageProcessing,
        dtype: FloatType,
        with_features: bool,
    ) -> FamilyModel:
        """Build the model; documented in ``Family``."""
        refuse_features(self.model_type, with_features=with_features)
        from transformers import SmolVLMForConditionalGeneration

        register_attention()
        register_tile_attention()
        config = _read_config(checkpoint)
        text, vision = config.text_config, config.vision_config
        text._attn_implementation = ATTENTION_NAME
        vision._attn_implementation = TILE_ATTENTION_NAME
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
        """Return the tiling, documented in ``Family``; ``max_visual`` lowers the number of tiles."""
        refuse_encoder_keep(self.model_type, encoder_keep)
        config = _read_config(checkpoint)
        processing = SmolVlmImages.from_preprocessor_config(
            read_image_processor(checkpoint),
            token_size=config.vision_config.patch_size * config.scale_factor,
            **_marks(checkpoint),
        )
        if processing.tile_size != config.vision_config.image_size:
            raise CheckpointError(
                f"{checkpoint.folder}: expected max_image_size {config.vision_config.image_size} (the vision tower's), got"
                f" {processing.tile_size}; preprocessor and weights belong to different models"
            )
        _check_tokens_per_tile(processing.tokens_per_tile, checkpoint)
        return _with_fewer_tiles(processing, max_visual)


def _read_config(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration, checked for what the graphs can express."""
    config = read_config(checkpoint, text_types=("llama",))
    folder, vision = checkpoint.folder, config.vision_config
    if vision.model_type != "smolvlm_vision":
        raise CheckpointError(
            f"{folder}: expected a vision tower 'smolvlm_vision', got {vision.model_type!r};"
            " this architecture cannot be exported"
        )
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise CheckpointError(
                f"{folder}: expected one number as vision {name}, got {getattr(vision, name)}; this variant cannot be"
                " exported"
            )
    if config.scale_factor < 1 or _patches_per_side(config) % config.scale_factor:
        raise CheckpointError(
            f"{folder}: expected a scale_factor that divides {_patches_per_side(config)} (patches along a tile), got"
            f" {config.scale_factor}; this variant cannot be exported"
        )
    return config


def _patches_per_side(config: Any) -> int:
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def _marks(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the texts around tiles, as far as the tokenizer names them: where it does not, the processor has its own."""
    tokenizer = load_tokenizer(checkpoint)
    named = {ours: getattr(tokenizer, theirs, None) for theirs, ours in _MARKS.items()}
    return {name: str(text) for name, text in named.items() if text is not None}


def _check_tokens_per_tile(tokens: int, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the processor's file counts a tile's visual tokens in another way than the model makes them."""
    path = checkpoint.folder / "processor_config.json"
    written = (read_json(path) if path.exists() else {}).get("image_seq_len", tokens)
    if written != tokens:
        raise CheckpointError(
            f"{path}: expected image_seq_len {tokens} (config.json), got {written!r}; make them agree"
        )


def _with_fewer_tiles(processing: SmolVlmImages, max_visual: int | None) -> SmolVlmImages:
    """Return the processing with the longest side that gives at most ``max_visual`` visual tokens an image."""
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
    side = config.vision_config.image_size
    return VisionGraph(
        module=module,
        inputs=(
            TensorSpec(name="pixel_values", dtype="float32", shape=("B", 3, side, side)),
            TensorSpec(name="token_index", dtype="int32", shape=("N",)),
        ),
        outputs=(TensorSpec(name="visual_tokens", dtype=dtype, shape=("N", config.text_config.hidden_size)),),
        linear_groups=module.linear_groups(),
        constants={"position_ids": positions},
    )
