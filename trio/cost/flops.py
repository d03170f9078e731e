"""FLOPs and KV bytes of a whole prefill, with and without token reduction, summed from ``trio_edge.trio.cost.work``.

    decoder layer   2 S (D H E + 2 D G E + H E D + 3 D I) + 4 S² H E
    vision tower    per tile of P patches: L (2 P (4 D² + m D I) + 4 P A D), with m matrices in the MLP; each patch
                    attends to A patches: all P, or those of its window
    projector       2 N weights, for each of the tower's N tokens
    merging         2 N weights, with encoder reduction: similarity to the kept tokens, and sums
    head            2 D V for one row
    KV cache        2 G E bytes_per_cached per layer and row; layers with linear attention have none

Letters as in ``saliency``; S rows (text and visual), I intermediate size, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trio_edge.trio.cost.selections import StageSizes
from trio_edge.trio.cost.work import counted_work, head_work, range_work
from trio_edge.trio.methods import stage_method

if TYPE_CHECKING:
    from trio_edge.runtime.bundle.manifest import Dimensions
    from trio_edge.runtime.bundle.schedule import Schedule
    from trio_edge.trio.cost.work import WeightKind, Work


@dataclass(frozen=True, kw_only=True, slots=True)
class CountedPrefill:
    """The decoder's cost of one prefill under a schedule."""

    decoder_flops: float
    select_flops: float
    """FLOPs of all stages' selections."""
    kv_bytes: int
    """Bytes of the KV rows after the prefill."""

    @property
    def flops(self) -> float:
        """FLOPs of decoder, head and selections."""
        return self.decoder_flops + self.select_flops


def count_prefill(
    decoder: Dimensions,
    schedule: Schedule,
    *,
    num_visual: int,
    num_text: int,
    one_size: bool = True,
    bytes_per_cached: int = 2,
) -> CountedPrefill:
    """Return the cost of one prefill of the decoder.

    Args:
        decoder: The decoder's sizes.
        schedule: The stages; none for a prefill with all tokens.
        num_visual: Visual tokens that enter the decoder.
        num_text: Text tokens of the prompt.
        one_size: Whether the first stage's graph has one fixed number of visual tokens; it computes less then.
        bytes_per_cached: Bytes per element of the KV caches.
    """
    kept = schedule.tokens_per_layer(num_layers=decoder.num_layers, num_visual=num_visual)
    rows = [count + num_text for count in kept]
    row_bytes = kv_row_bytes(decoder, bytes_per_cached=bytes_per_cached)
    layers, select = decoder_flops(decoder, rows), 0.0
    for place, stage in enumerate(schedule.stages):
        entering = kept[stage.layer - 1]
        sizes = StageSizes(entering, stage.keep, num_text, num_visual, one_size or place > 0)
        select += stage_method(schedule.method).flops(decoder, schedule, sizes)
    cached = sum(count for layer, count in enumerate(rows) if layer not in decoder.linear_layers)
    return CountedPrefill(decoder_flops=layers, select_flops=select, kv_bytes=row_bytes * cached)


def decoder_flops(decoder: Dimensions, rows_per_layer: list[int]) -> float:
    """Return the FLOPs of the decoder layers, given the rows of each, and of the head."""
    layers = sum(
        range_work(decoder, layers=(layer,), rows=rows).flops for layer, rows in enumerate(rows_per_layer)
    )
    return layers + head_work(decoder).flops


def kv_row_bytes(decoder: Dimensions, *, bytes_per_cached: int) -> int:
    """Return the KV cache's bytes per row and layer."""
    return 2 * decoder.num_kv_heads * decoder.head_size * bytes_per_cached


def stage_work(
    decoder: Dimensions, schedule: Schedule, sizes: StageSizes, *, weights: WeightKind = "none"
) -> Work:
    """Return the work of one stage's selection; where only FLOPs are known, as one product with ``weights``."""
    row = stage_method(schedule.method)
    if row.work is not None:
        return row.work(decoder, schedule, sizes)
    return counted_work(row.flops(decoder, schedule, sizes), rows=sizes.num_visual, weights=weights)
