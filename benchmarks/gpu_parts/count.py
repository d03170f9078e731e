"""The least FLOPs and bytes of each graph, by count.

FLOPs are those of ``trio_edge.trio.cost``. Bytes are the graph's weights, the rows that enter and leave, new KV rows, and in decode
all present KV rows. A probe's rows pass its layer and the head forwards and backwards, so these weights are read twice, except
those of queries and keys. Results between two operations of a graph do not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from trio_edge.profiling.predict.answer import range_name
from trio_edge.runtime.bundle.manifest import Dimensions, VisionDimensions
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost.flops import kv_row_bytes
from trio_edge.trio.cost.memory import layers_and_rows
from trio_edge.trio.cost.selections import StageSizes
from trio_edge.trio.cost.work import head_work, layer_weights, range_work, vision_work
from trio_edge.trio.methods import stage_method

DECODE = "decode"


class Rates(Protocol):
    """Highest rates of a device."""

    @property
    def flops_per_s(self) -> float:
        """In matrix products."""

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second of its memory."""


class CountedModel(Protocol):
    """Sizes of a model and its image, as in ``gpu_parts.subjects.Sizes``."""

    @property
    def decoder(self) -> Dimensions:
        """Sizes of the decoder."""

    @property
    def tower(self) -> VisionDimensions:
        """Sizes of the vision tower."""

    @property
    def vision_sizes(self) -> dict[str, int]:
        """Sizes of the picture's vision profile."""

    @property
    def element_bytes(self) -> int:
        """Bytes of weights, activations and KV caches."""

    @property
    def num_visual(self) -> int:
        """N."""

    @property
    def vision_weights(self) -> int:
        """Elements of the vision graph's weights."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Least work of a graph."""

    flops: float
    causal_flops: float
    """Without the half of the attention's products that the causal mask discards."""
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


def count(model: CountedModel, schedule: Schedule, *, num_text: int) -> Counted:
    """Return the work of a prefill and of the first decode step.

    Args:
        model: Its sizes, and those of its picture.
        schedule: TRIO's.
        num_text: T; a prefill has N + T rows.
    """
    decoder, size, num_visual = model.decoder, model.element_bytes, model.num_visual
    row_bytes = decoder.hidden_size * size
    kv_bytes_of_row = kv_row_bytes(decoder, bytes_per_cached=size)
    head_bytes = decoder.vocab_size * row_bytes
    flops = vision_work(model.tower, model.vision_sizes).flops
    graphs = {"vision": _work(flops, num_bytes=model.vision_weights * size + num_visual * row_bytes)}
    ranges = layers_and_rows(schedule, num_layers=decoder.num_layers, entering=num_visual)
    decode_flops = head_work(decoder).flops
    decode_bytes, kv_bytes = float(head_bytes), 0
    for index, (layers, visual) in enumerate(ranges):
        if index:
            graphs[f"select_{index}"] = _stage(model, schedule, ranges[index - 1][1], visual, num_text)
        rows = visual + num_text
        work = range_work(decoder, layers=layers, rows=rows)
        attention = sum(part.flops for part in work.attention)
        num_layers = len(layers)
        weight_bytes = num_layers * layer_weights(decoder) * size
        graphs[range_name(index, len(ranges))] = _work(
            work.flops,
            masked=attention / 2,
            num_bytes=weight_bytes + rows * (2 * row_bytes + num_layers * kv_bytes_of_row),
        )
        decode_flops += num_layers * 2 * layer_weights(decoder) + attention / rows
        decode_bytes += weight_bytes + num_layers * rows * kv_bytes_of_row
        kv_bytes += num_layers * rows * kv_bytes_of_row
    graphs["head"] = _work(head_work(decoder).flops, num_bytes=head_bytes)
    graphs[DECODE] = _work(decode_flops, num_bytes=decode_bytes)
    return Counted(graphs=graphs, kv_bytes=kv_bytes)


def _stage(model: CountedModel, schedule: Schedule, entering: int, keep: int, num_text: int) -> Work:
    decoder, rows = model.decoder, entering + num_text
    flops = stage_method(schedule.method).flops(
        decoder, schedule, StageSizes(entering, keep, num_text, entering)
    )
    once = decoder.hidden_size * (decoder.num_heads + decoder.num_kv_heads) * decoder.head_size
    weights = 2 * (layer_weights(decoder) + decoder.vocab_size * decoder.hidden_size) - once
    moved = rows + keep + num_text
    return _work(
        flops, num_bytes=model.element_bytes * (weights + moved * decoder.hidden_size) + 4 * entering
    )


def _work(flops: float, *, num_bytes: float, masked: float = 0.0) -> Work:
    return Work(flops=flops, causal_flops=flops - masked, num_bytes=num_bytes)


def flops(works: Iterable[Work]) -> float:
    """Return all FLOPs, masked ones too."""
    return sum(work.flops for work in works)


def seconds(works: Iterable[Work], rates: Rates) -> float:
    """Return the least time of graphs that run one after the other."""
    return sum(work.seconds(rates) for work in works)
