"""The cost of a bundle's prefill for its manifest: FLOPs and KV bytes with and without token reduction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from trio_edge.runtime.bundle.manifest import Cost
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost.bundle_work import input_widths
from trio_edge.trio.cost.flops import count_prefill
from trio_edge.trio.cost.selections import TokenSizes
from trio_edge.trio.cost.work import ELEMENT_BYTES, vision_work
from trio_edge.trio.methods import token_method as method_row

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio_edge.runtime.bundle.manifest import CacheType, Dimensions, GraphSpec, VisionDimensions


COST_TEXT_TOKENS = 40
"""Text tokens of the prompt that the cost is given for: LLaVA's system prompt and a short question."""


def cost_of(
    tower: VisionDimensions,
    dimensions: Dimensions,
    schedule: Schedule,
    *,
    vision_sizes: Mapping[str, int],
    picture_tokens: int,
    num_images: int,
    num_visual_sizes: int,
    token_method: str | None,
    token_keep: int | None,
    graphs: Sequence[GraphSpec],
    kv_dtype: CacheType,
    clip_text_flops: float | None = None,
) -> Cost:
    """Return the cost of a prefill with images of ``vision_sizes`` and ``COST_TEXT_TOKENS`` text tokens.

    Args:
        tower: Sizes of the vision tower.
        dimensions: Sizes of the decoder.
        schedule: Its stages.
        vision_sizes: Sizes of the vision graph's axes for each image.
        picture_tokens: Visual tokens of each image before any reduction.
        num_images: Number of images.
        num_visual_sizes: Number of different N of the prefix graph.
        token_method: Selector before the decoder, or None.
        token_keep: Tokens of each image that it keeps.
        graphs: Graphs of the bundle; the ``reduce`` graph's inputs give the widths of its rows.
        kv_dtype: Type of the KV caches.
        clip_text_flops: FLOPs of CLIP's text tower for this text, or None.
    """
    num_visual = num_images * vision_sizes["N"]
    cached = ELEMENT_BYTES[kv_dtype]
    # The full cost has no merging in the encoder either.
    unmerged = msgspec.structs.replace(tower, merged_weights=0)
    whole = count_prefill(
        dimensions,
        Schedule(),
        num_visual=num_images * picture_tokens,
        num_text=COST_TEXT_TOKENS,
        bytes_per_cached=cached,
    )
    cost = count_prefill(
        dimensions,
        schedule,
        num_visual=num_visual if token_keep is None else min(num_images * token_keep, num_visual),
        num_text=COST_TEXT_TOKENS,
        one_size=num_visual_sizes == 1,
        bytes_per_cached=cached,
    )
    reduced = {
        "vision": round(num_images * vision_work(tower, vision_sizes).flops),
        "decoder": round(cost.decoder_flops),
        "select": round(cost.select_flops),
    }
    if clip_text_flops is not None:
        reduced["clip_text"] = round(clip_text_flops)
    if token_method is not None and token_keep is not None:
        (graph,) = (graph for graph in graphs if graph.role == "reduce")
        sizes = TokenSizes(vision_sizes["N"], token_keep, COST_TEXT_TOKENS, input_widths(graph))
        reduced["reduce"] = round(num_images * method_row(token_method).cost(sizes).flops)
    return Cost(
        num_visual=num_visual,
        num_images=num_images,
        num_text=COST_TEXT_TOKENS,
        full_flops={
            "vision": round(num_images * vision_work(unmerged, vision_sizes).flops),
            "decoder": round(whole.decoder_flops),
        },
        reduced_flops=reduced,
        full_kv_bytes=whole.kv_bytes,
        reduced_kv_bytes=cost.kv_bytes,
        picture_tokens=None if picture_tokens == vision_sizes["N"] else num_images * picture_tokens,
    )
