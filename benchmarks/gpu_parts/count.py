"""Counts what each graph must at least compute and move, before anything is measured.

FLOPs are those of ``trio_edge.trio.cost.flops``. Bytes are the least that must cross the memory bus: the graph's weights, the
rows that enter and leave, new KV rows, and in decode all KV rows that are there. A probe's rows pass its layer and the
head forwards and backwards, so these weights are read twice, but for those of queries and keys. Nothing between two
operations of a graph counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from trio_edge.profiling.predict.answer import range_name
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost.flops import (
    ModelShape,
    StageSizes,
    decoder_layer_flops,
    head_flops,
    layer_weights,
    selection_flops,
    vision_flops,
)

DECODE = "decode"


class Rates(Protocol):
    """Highest rates of a device."""

    @property
    def flops_per_s(self) -> float:
        """In matrix products."""

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second of its memory."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Least work of a graph."""

    flops: float
    causal_flops: float
    """Without the half of the attention's products that the causal mask throws away."""
    num_bytes: float

    def seconds(self, rates: Rates) -> float:
        """Return the least time at these rates."""
        return max(self.causal_flops / rates.flops_per_s, self.num_bytes / rates.bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One prefill and one decode step with a schedule."""

    graphs: dict[str, Work]
    """By the bundle's names, in the order of a prefill; ``decode`` last."""
    kv_bytes: int
    """Bytes of the rows that the prefill leaves."""

    def prefill(self) -> list[Work]:
        """Return all graphs of a prefill."""
        return [work for name, work in self.graphs.items() if name != DECODE]

    def decoder(self) -> list[Work]:
        """Return the prefill without vision."""
        return [work for name, work in self.graphs.items() if name not in ("vision", DECODE)]

    def selects(self) -> list[Work]:
        """Return all stages."""
        return [work for name, work in self.graphs.items() if name.startswith("select")]

    @property
    def decode(self) -> Work:
        """One token."""
        return self.graphs[DECODE]


def count(
    shape: ModelShape, schedule: Schedule, *, num_visual: int, num_text: int, vision_weights: int
) -> Counted:
    """Return the work of a prefill and of the first decode step.

    Args:
        shape: Of the model, with its vision tower.
        schedule: TRIO's.
        num_visual: N.
        num_text: T; a prefill has N + T rows.
        vision_weights: Elements of the vision graph's weights.
    """
    size = shape.bytes_per_element
    row_bytes = shape.hidden_size * size
    kv_row_bytes = 2 * shape.num_kv_heads * shape.head_size * size
    head_bytes = shape.vocab_size * row_bytes
    flops = vision_flops(shape, num_visual=num_visual)
    graphs = {"vision": _work(flops, num_bytes=vision_weights * size + num_visual * row_bytes)}
    starts = [0, *(stage.layer for stage in schedule.stages)]
    visual = [num_visual, *(stage.keep for stage in schedule.stages)]
    decode_flops = head_flops(shape)
    decode_bytes, kv_bytes = float(head_bytes), 0
    for index, (first, last) in enumerate(zip(starts, [*starts[1:], shape.num_layers])):
        if index:
            graphs[f"select_{index}"] = _stage(shape, schedule, visual[index - 1], visual[index], num_text)
        rows, layers = visual[index] + num_text, last - first
        weight_bytes = layers * layer_weights(shape) * size
        graphs[range_name(index, len(starts))] = _work(
            layers * decoder_layer_flops(shape, num_rows=rows),
            masked=layers * _attention_flops(shape, rows) / 2,
            num_bytes=weight_bytes + rows * (2 * row_bytes + layers * kv_row_bytes),
        )
        decode_flops += layers * (2 * layer_weights(shape) + _attention_flops(shape, rows) / rows)
        decode_bytes += weight_bytes + layers * rows * kv_row_bytes
        kv_bytes += layers * rows * kv_row_bytes
    graphs["head"] = _work(head_flops(shape), num_bytes=head_bytes)
    graphs[DECODE] = _work(decode_flops, num_bytes=decode_bytes)
    return Counted(graphs=graphs, kv_bytes=kv_bytes)


def _stage(shape: ModelShape, schedule: Schedule, entering: int, keep: int, num_text: int) -> Work:
    rows = entering + num_text
    flops = selection_flops(shape, schedule, StageSizes(entering, keep, num_text, entering))
    once = shape.hidden_size * (shape.num_heads + shape.num_kv_heads) * shape.head_size
    weights = 2 * (layer_weights(shape) + shape.vocab_size * shape.hidden_size) - once
    moved = rows + keep + num_text
    return _work(
        flops, num_bytes=shape.bytes_per_element * (weights + moved * shape.hidden_size) + 4 * entering
    )


def _attention_flops(shape: ModelShape, rows: int) -> float:
    return 4.0 * rows**2 * shape.num_heads * shape.head_size


def _work(flops: float, *, num_bytes: float, masked: float = 0.0) -> Work:
    return Work(flops=flops, causal_flops=flops - masked, num_bytes=num_bytes)


def flops(works: Iterable[Work]) -> float:
    """Return all FLOPs, masked ones too."""
    return sum(work.flops for work in works)


def seconds(works: Iterable[Work], rates: Rates) -> float:
    """Return the least time of graphs that run one after the other."""
    return sum(work.seconds(rates) for work in works)
