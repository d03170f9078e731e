"""What a bundle costs, written into its manifest: FLOPs and KV bytes with and without its schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from trio_edge.runtime.bundle.manifest import Cost, Dimensions, VisionDimensions
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost.flops import ModelShape, reduction_cost
from trio_edge.trio.cost.work import reduce_flops

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio_edge.export.families.base import FamilyModel
    from trio_edge.runtime.bundle.manifest import CacheType, GraphSpec, TokenMethod


COST_TEXT_TOKENS = 40
"""Text tokens of the prompt that costs are given for: LLaVA's system prompt and a short question."""


def cost_of(
    model: FamilyModel,
    dimensions: Dimensions,
    schedule: Schedule,
    *,
    vision_sizes: Mapping[str, int],
    picture_tokens: int,
    num_visual_sizes: int,
    token_method: TokenMethod | None,
    token_keep: int | None,
    graphs: Sequence[GraphSpec],
    kv_dtype: CacheType,
    clip_text_flops: float | None = None,
) -> Cost:
    """Return the cost of a prefill with a picture of ``vision_sizes`` and ``COST_TEXT_TOKENS`` text tokens.

    Args:
        model: The family's.
        dimensions: Of the decoder.
        schedule: Its stages.
        vision_sizes: Of the picture.
        picture_tokens: Its visual tokens before any reduction.
        num_visual_sizes: How many N the prefix has.
        token_method: Of the selection before the decoder.
        token_keep: What that passes on.
        graphs: Of the bundle; the ``reduce`` graph's inputs tell its widths.
        kv_dtype: Of the KV caches.
        clip_text_flops: Of CLIP's text tower for this text, if there is one.
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
        bytes_per_element=np.dtype(kv_dtype).itemsize,
        vision=model.vision_shape(vision_sizes),
    )
    entering = num_visual if token_keep is None else min(token_keep, num_visual)
    unmerged = replace(shape, vision=replace(model.vision_shape(vision_sizes), merged_into=0))
    whole = reduction_cost(unmerged, Schedule(), num_visual=picture_tokens, num_text=COST_TEXT_TOKENS)
    cost = reduction_cost(
        shape,
        schedule,
        num_visual=entering,
        num_text=COST_TEXT_TOKENS,
        one_size=num_visual_sizes == 1,
    )
    vision_part = round(whole.vision_flops)
    reduced = {
        "vision": round(cost.vision_flops),
        "decoder": round(cost.decoder_flops),
        "select": round(cost.select_flops),
    }
    if clip_text_flops is not None:
        reduced["clip_text"] = round(clip_text_flops)
    if token_method is not None and token_keep is not None:
        (graph,) = (graph for graph in graphs if graph.role == "reduce")
        reduced["reduce"] = round(
            reduce_flops(
                graph,
                token_method,
                num_visual=num_visual,
                num_keep=token_keep,
                num_text=COST_TEXT_TOKENS,
            )
        )
    return Cost(
        num_visual=num_visual,
        num_text=COST_TEXT_TOKENS,
        full_flops={"vision": vision_part, "decoder": round(whole.full_flops) - vision_part},
        reduced_flops=reduced,
        full_kv_bytes=whole.full_kv_bytes,
        reduced_kv_bytes=cost.kv_bytes,
        picture_tokens=None if picture_tokens == num_visual else picture_tokens,
    )


# A family's vision sizes as the manifest holds them: without the numbers that differ from picture to picture.


def vision_dimensions(model: FamilyModel, *, sizes: Mapping[str, int], hidden_size: int) -> VisionDimensions:
    """Return the sizes of ``model``'s vision tower and projector.

    Args:
        model: The family's.
        sizes: Of any profile of the vision graph.
        hidden_size: D, of the decoder.
    """
    shape, patches = model.vision_shape(sizes), "P" in sizes
    projected, projector = shape.projected_tokens, shape.projector_weights
    if projector is None:
        projector = (shape.hidden_size + hidden_size) * hidden_size
    return VisionDimensions(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        patches_per_tile=None if patches else shape.patches_per_tile,
        projector_weights=projector,
        mlp_matrices=shape.mlp_matrices,
        patches_per_window=shape.patches_per_window,
        num_full_layers=shape.num_full_layers,
        projected_per_tile=None if patches or projected is None else projected // shape.num_tiles,
        patches_per_token=sizes["P"] // projected if patches and projected is not None else None,
        merged_weights=2 * shape.merged_into * hidden_size,
    )
