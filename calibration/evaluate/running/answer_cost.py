"""FLOPs of one answer's prefill, at the image's own tokens and the prompt's own length.

The decoder is counted layer by layer from the visual tokens that it really processed, selections by their methods'
formulas. The vision tower's FLOPs are in the manifest for one image size, and scaled by visual tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.runtime.bundle.graph_io import num_clip_texts
from trio_edge.trio.cost.bundle_work import clip_text_flops, reduce_cost
from trio_edge.trio.cost.flops import count_prefill, decoder_flops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.bundle.manifest import Manifest


def tokens_per_layer(manifest: Manifest, *, num_visual: int, kept: Sequence[int]) -> list[int]:
    """Return the visual tokens that each decoder layer processed.

    Args:
        manifest: The bundle's.
        num_visual: Visual tokens of the image.
        kept: Per stage what was left.
    """
    return [
        count
        for graph, count in zip(manifest.ranges, (_entering(manifest, num_visual), *kept), strict=True)
        for _ in range(graph.num_layers)
    ]


def processed_tokens(manifest: Manifest, *, num_visual: int, kept: Sequence[int]) -> float:
    """Return the mean over decoder layers of the visual tokens processed."""
    return sum(tokens_per_layer(manifest, num_visual=num_visual, kept=kept)) / manifest.dimensions.num_layers


def prefill_flops(
    manifest: Manifest, *, num_visual: int, kept: Sequence[int], num_text: int, select: bool = True
) -> float:
    """Return the FLOPs of one prefill: vision tower, selection before the decoder, decoder, head, stages if ``select``.

    Args:
        manifest: The bundle's.
        num_visual: Visual tokens of the image.
        kept: Per stage what was left.
        num_text: Text tokens of the prompt.
        select: False for stages that compute nothing.
    """
    rows = [count + num_text for count in tokens_per_layer(manifest, num_visual=num_visual, kept=kept)]
    decoder = decoder_flops(manifest.dimensions, rows)
    vision = manifest.cost.reduced_flops["vision"] * num_visual / manifest.cost.num_visual
    if not num_visual:
        return decoder
    stages = _select_flops(manifest, num_visual=num_visual, num_text=num_text) if select else 0.0
    return decoder + vision + stages + _before_decoder(manifest, num_visual=num_visual, num_text=num_text)


def _entering(manifest: Manifest, num_visual: int) -> int:
    """Return the visual tokens that enter the decoder."""
    return num_visual if manifest.token_keep is None else min(manifest.token_keep, num_visual)


def _select_flops(manifest: Manifest, *, num_visual: int, num_text: int) -> float:
    return count_prefill(
        manifest.dimensions,
        manifest.schedule,
        num_visual=_entering(manifest, num_visual),
        num_text=num_text,
        one_size=len(manifest.visual_sizes) == 1,
    ).select_flops


def _before_decoder(manifest: Manifest, *, num_visual: int, num_text: int) -> float:
    """Return the FLOPs of the selection before the decoder, and of the text tower that it needs."""
    if manifest.token_method is None:
        return 0.0
    tower = 0.0
    if manifest.clip_text is not None:
        texts = num_clip_texts(num_text, length=manifest.clip_text.length)
        tower = clip_text_flops(manifest, num_texts=texts)
    return tower + reduce_cost(manifest, num_visual=num_visual, num_text=num_text).flops
