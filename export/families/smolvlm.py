"""SmolVLM2: SigLIP tiles with pixel shuffle, each with its place in the prompt, and a Llama decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import msgspec
import torch

from trio_edge.export.checkpoints.text_files import load_tokenizer
from trio_edge.export.families import base
from trio_edge.export.families.base import Family, VisionGraph
from trio_edge.export.graphs.vision.smolvlm import SmolVlmVision, patch_positions
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.manifest import VisionDimensions
from trio_edge.runtime.images.tiles import SmolVlmImages
from trio_edge.runtime.prompts.chat import SMOLVLM_TEMPLATE

if TYPE_CHECKING:
    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.runtime.bundle.manifest import FloatType

# names of the texts around tiles: the processor's, and ours
_MARKS = {"fake_image_token": "image_mark", "global_image_token": "overview_mark"}


@final
class SmolVlm(Family):
    """SmolVLM2. It has no ``image_marks``: the texts around tiles depend on the image, and are in ``ImageLayout.text``."""

    model_type = "smolvlm"
    architecture = "SmolVLMForConditionalGeneration"
    chat_template = SMOLVLM_TEMPLATE
    text_types = ("llama",)
    vision_type = "smolvlm_vision"

    def check_config(self, config: Any, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError unless tiles are square and whole numbers of visual tokens."""
        base.require_square_tiles(config.vision_config, checkpoint.folder)
        if config.scale_factor < 1 or _patches_per_side(config) % config.scale_factor:
            raise CheckpointError(
                f"{checkpoint.folder}: expected a scale_factor that divides {_patches_per_side(config)} (patches along a tile),"
                f" got {config.scale_factor}; this variant cannot be exported"
            )

    def images(self, checkpoint: Checkpoint, config: Any, max_visual: int | None) -> SmolVlmImages:
        """Return the tiling; see ``Family``. ``max_visual`` lowers the number of tiles."""
        vision, tokenizer = config.vision_config, load_tokenizer(checkpoint)
        # the image processing has defaults for texts that the tokenizer does not name
        marks = {ours: getattr(tokenizer, theirs, None) for theirs, ours in _MARKS.items()}
        images = SmolVlmImages.from_preprocessor_config(
            base.read_image_processor(checkpoint),
            token_size=vision.patch_size * config.scale_factor,
            **{name: str(text) for name, text in marks.items() if text is not None},
        )
        base.require_same("max_image_size", checkpoint, tower=vision.image_size, processor=images.tile_size)
        base.require_processor(checkpoint, image_seq_len=images.tokens_per_tile)
        fewer = (count * images.tile_size for count in range(images.most_per_side - 1, 0, -1))
        candidates = (
            msgspec.structs.replace(images, longest_edge=edge) for edge in (images.longest_edge, *fewer)
        )
        return base.first_that_fits(max_visual, candidates, smallest="one tile")

    def vision(
        self, inner: Any, config: Any, *, processing: SmolVlmImages, dtype: FloatType, with_features: bool
    ) -> tuple[VisionGraph, VisionDimensions]:
        """Return the graph of the tiles; see ``Family``."""
        text, vision = config.text_config, config.vision_config
        positions = patch_positions(_patches_per_side(config))
        position_ids = torch.empty(positions.shape, dtype=torch.int64)
        module = SmolVlmVision(inner.vision_model, inner.connector, position_ids=position_ids)
        graph = VisionGraph(
            module=module,
            inputs=base.tile_inputs(vision.image_size),
            outputs=(base.visual_tokens(text.hidden_size, dtype=dtype),),
            linear_groups=module.linear_groups(),
            constants={"position_ids": positions},
        )
        return graph, VisionDimensions(
            num_layers=vision.num_hidden_layers,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            patches_per_tile=_patches_per_side(config) ** 2,
            projector_weights=vision.hidden_size * config.scale_factor**2 * text.hidden_size,
        )


def _patches_per_side(config: Any) -> int:
    return int(config.vision_config.image_size // config.vision_config.patch_size)
