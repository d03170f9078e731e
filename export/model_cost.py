"""The cost of a bundle's prefill for its manifest: FLOPs and KV bytes with and without token reduction."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec

from trio_edge.runtime.bundle.manifest import Cost
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost.bundle_work import input_widths
from trio_edge.trio.cost.flops import count_prefill
from trio_edge.trio.cost.selections import TokenSizes
from trio_edge.trio.cost.work import ELEMENT_BYTES, vision_work
from trio_edge.trio.methods import token_method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.export.plan import ExportPlan
    from trio_edge.runtime.bundle.manifest import GraphSpec

COST_TEXT_TOKENS = 40
"""Text tokens of the prompt that the cost is given for: LLaVA's system prompt and a short question."""


def cost_of(plan: ExportPlan, graphs: Sequence[GraphSpec]) -> Cost:
    """Return the cost of the plan's largest prompt with ``COST_TEXT_TOKENS`` text tokens; ``graphs`` are the bundle's."""
    resolved, clip = plan.resolved, plan.source.clip
    images, tower, whole = resolved.images, plan.model.vision_dimensions, resolved.image_tokens
    num_visual = images.num_images * images.largest["N"]
    counted = partial(
        count_prefill,
        plan.dimensions,
        num_text=COST_TEXT_TOKENS,
        one_size=len(plan.layout.visual_sizes) == 1,
        bytes_per_cached=ELEMENT_BYTES["int8" if plan.options.quantize.has_cache else resolved.dtype],
    )
    full = counted(Schedule(), num_visual=images.num_images * whole)
    cost = counted(plan.layout.schedule, num_visual=min(resolved.entering, num_visual))
    reduced = {
        "vision": round(images.num_images * vision_work(tower, images.largest).flops),
        "decoder": round(cost.decoder_flops),
        "select": round(cost.select_flops),
    }
    if clip is not None:
        reduced["clip_text"] = round(clip.flops(COST_TEXT_TOKENS))
    if (method := plan.options.token_method) is not None and resolved.token_keep is not None:
        (graph,) = (graph for graph in graphs if graph.role == "reduce")
        sizes = TokenSizes(images.largest["N"], resolved.token_keep, COST_TEXT_TOKENS, input_widths(graph))
        reduced["reduce"] = round(images.num_images * token_method(method).cost(sizes).flops)
    # Without reduction the encoder merges no tokens either.
    unmerged = msgspec.structs.replace(tower, merged_weights=0)
    return Cost(
        num_visual=num_visual,
        num_images=images.num_images,
        num_text=COST_TEXT_TOKENS,
        full_flops={
            "vision": round(images.num_images * vision_work(unmerged, images.largest).flops),
            "decoder": round(full.decoder_flops),
        },
        reduced_flops=reduced,
        full_kv_bytes=full.kv_bytes,
        reduced_kv_bytes=cost.kv_bytes,
        image_tokens=None if whole == images.largest["N"] else images.num_images * whole,
    )
