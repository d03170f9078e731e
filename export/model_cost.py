"""What a bundle costs, written into its manifest: FLOPs and KV bytes with and without its schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.runtime.manifest import Cost, Dimensions
from trio_edge.trio.cost import ModelShape, reduction_cost

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.export.families.base import FamilyModel
    from trio_edge.runtime.manifest import FloatType
    from trio_edge.runtime.schedule import Schedule

COST_TEXT_TOKENS = 40
"""Text tokens of the prompt that costs are given for: LLaVA's system prompt and a short question."""


def cost_of(
    model: FamilyModel,
    dimensions: Dimensions,
    schedule: Schedule,
    *,
    vision_sizes: Mapping[str, int],
    dtype: FloatType,
) -> Cost:
    """Return the cost of a prefill with a picture of ``vision_sizes`` and ``COST_TEXT_TOKENS`` text tokens."""
    num_visual = vision_sizes["N"]
    shape = ModelShape(
        num_layers=dimensions.num_layers,
        hidden_size=dimensions.hidden_size,
        num_heads=dimensions.num_heads,
        num_kv_heads=dimensions.num_kv_heads,
        head_size=dimensions.head_size,
        intermediate_size=dimensions.intermediate_size,
        vocab_size=dimensions.vocab_size,
        bytes_per_element=2 if dtype == "float16" else 4,
        vision=model.vision_shape(vision_sizes),
    )
    cost = reduction_cost(shape, schedule, num_visual=num_visual, num_text=COST_TEXT_TOKENS)
    vision_part = round(cost.vision_flops)
    return Cost(
        num_visual=num_visual,
        num_text=COST_TEXT_TOKENS,
        full_flops={"vision": vision_part, "decoder": round(cost.full_flops) - vision_part},
        reduced_flops={
            "vision": vision_part,
            "decoder": round(cost.decoder_flops),
            "select": round(cost.select_flops),
        },
        full_kv_bytes=cost.full_kv_bytes,
        reduced_kv_bytes=cost.kv_bytes,
    )
