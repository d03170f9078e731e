"""What a bundle costs, written into its manifest: FLOPs and KV bytes with and without its schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.runtime.image_processing import max_tiles
from trio_edge.runtime.manifest import Cost, Dimensions
from trio_edge.runtime.schedule import Schedule
from trio_edge.trio.cost import (
    DecoderShape,
    VisionShape,
    decoder_flops,
    head_flops,
    kv_bytes,
    select_flops,
    vision_flops,
)

if TYPE_CHECKING:
    from trio_edge.export.families.base import FamilyModel
    from trio_edge.runtime.image_processing import ImageProcessing
    from trio_edge.runtime.manifest import DType

COST_TEXT_TOKENS = 40
"""Text tokens of the prompt that costs are given for: LLaVA's system prompt and a short question."""
_ELEMENT_BYTES = {"float32": 4, "float16": 2, "int32": 4, "int64": 8}


def cost_of(
    model: FamilyModel, dimensions: Dimensions, schedule: Schedule, *, processing: ImageProcessing, max_visual: int,
    dtype: DType,
) -> Cost:
    """Return the cost of a prefill with ``max_visual`` visual tokens and ``COST_TEXT_TOKENS`` text tokens."""
    shape = DecoderShape(
        num_layers=dimensions.num_layers, hidden=dimensions.hidden_size, num_heads=dimensions.num_heads,
        num_kv_heads=dimensions.num_kv_heads, head_size=dimensions.head_size,
        intermediate=dimensions.intermediate_size, vocab=dimensions.vocab_size,
    )
    sizes = {"num_visual": max_visual, "num_text": COST_TEXT_TOKENS}
    vision = vision_flops(_vision_shape(model, processing), shape, num_tiles=max_tiles(processing))
    head = head_flops(shape)
    keep_all = Schedule()
    element = _ELEMENT_BYTES[dtype]
    return Cost(
        **sizes,
        full_flops={"vision": vision, "decoder": decoder_flops(shape, keep_all, **sizes), "head": head},
        reduced_flops={
            "vision": vision,
            "decoder": decoder_flops(shape, schedule, **sizes),
            "select": select_flops(shape, schedule, **sizes),
            "head": head,
        },
        full_kv_bytes=kv_bytes(shape, keep_all, element_bytes=element, **sizes),
        reduced_kv_bytes=kv_bytes(shape, schedule, element_bytes=element, **sizes),
    )


def _vision_shape(model: FamilyModel, processing: ImageProcessing) -> VisionShape:
    vision = model.vision_config
    return VisionShape(
        num_layers=model.num_vision_layers, hidden=vision.hidden_size, intermediate=vision.intermediate_size,
        patch_size=vision.patch_size, rows=processing.patches_per_tile + 1, features=model.vision_features,
    )
