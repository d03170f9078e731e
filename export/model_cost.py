"""What a bundle costs, written into its manifest: FLOPs and KV bytes with and without its schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.runtime.manifest import Cost, Dimensions
from trio_edge.runtime.schedule import Schedule
from trio_edge.trio.cost import ModelShape, reduction_cost

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.export.families.base import FamilyModel
    from trio_edge.runtime.manifest import FloatType

COST_TEXT_TOKENS = 40
"""Text tokens of the prompt that costs are given for: LLaVA's system prompt and a short question."""


def cost_of(
    model: FamilyModel,
    dimensions: Dimensions,
    schedule: Schedule,
    *,
    vision_sizes: Mapping[str, int],
    token_keep: int | None,
    dtype: FloatType,
) -> Cost:
    """Return the cost of a prefill with a picture of ``vision_sizes`` and ``COST_TEXT_TOKENS`` text tokens.

    The selection before the decoder and stages of other methods than TRIO are not counted themselves; they cost less.
    """
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
    entering = num_visual if token_keep is None else min(token_keep, num_visual)
    whole = reduction_cost(shape, Schedule(), num_visual=num_visual, num_text=COST_TEXT_TOKENS)
    cost = reduction_cost(shape, schedule, num_visual=entering, num_text=COST_TEXT_TOKENS)
    vision_part = round(whole.vision_flops)
    return Cost(
        num_visual=num_visual,
        num_text=COST_TEXT_TOKENS,
        full_flops={"vision": vision_part, "decoder": round(whole.full_flops) - vision_part},
        reduced_flops={
            "vision": vision_part,
            "decoder": round(cost.decoder_flops),
            "select": round(cost.select_flops) if schedule.method == "trio" else 0,
        },
        full_kv_bytes=whole.full_kv_bytes,
        reduced_kv_bytes=cost.kv_bytes,
    )
