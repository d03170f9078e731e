"""Predicts one answer on a device that is not at hand: time of every graph, to the first token, per token, and memory.

A ``Setting`` is what a bundle would be exported with and asked; ``graph_runs`` lists the graphs that it runs and their
counted work, ``predict`` times them. Rows are those that graphs run at: the text is padded to its bucket.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from trio_edge.profiling.predict.speed import (
    UNFUSED_SCORE_PASSES,
    Formats,
    GraphTime,
    fitted_for,
    graph_time,
    rates_of,
)
from trio_edge.runtime.bundle.errors import TargetError
from trio_edge.runtime.bundle.graph_io import CLIP_TEXT
from trio_edge.trio.cost.flops import kv_row_bytes, stage_work
from trio_edge.trio.cost.memory import (
    kv_cache_bytes,
    largest_activations,
    layers_and_rows,
    repeated_weights,
    tiles_of,
)
from trio_edge.trio.cost.selections import StageSizes, TokenCost
from trio_edge.trio.cost.work import (
    Work,
    counted_work,
    head_work,
    layer_weights,
    range_work,
    sum_of,
    tower_weights,
    vision_work,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.profiling.predict.models import Model
    from trio_edge.runtime.bundle.schedule import Schedule
    from trio_edge.trio.cost.devices import DeviceSpec

Precision = Literal["float16", "int8", "fp8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("float16", "int8", "fp8", "int4")
"""The finest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A model, how it is exported, and what is asked of it."""

    model: Model
    schedule: Schedule
    sizes: Mapping[str, int]
    """Sizes of the vision profile for one image: N visual tokens, and B tiles or P patches."""
    num_images: int = 1
    """Images of this size, or pairs of a video's frames."""
    num_text: int
    """Text tokens of the prompt."""
    text_bucket: int
    """Rows that they are padded to."""
    num_new: int
    formats: Formats = field(default_factory=Formats)
    one_size: bool = True
    """Whether the first stage's graph is made for one N."""
    entering: int | None = None
    """Visual tokens of an image that enter the decoder where a selection before it leaves fewer than N."""
    vision_flops: float | None = None
    """Counted elsewhere, where the model says nothing of its vision tower."""
    clip_text_flops: float | None = None
    clip_text_rows: int = 1
    """Tokens of all its texts, padding too."""
    reduce_cost: TokenCost | None = None
    """Cost of the selection before the decoder."""
    other_weight_bytes: int = 0
    """Weights of graphs whose sizes the model does not have, such as CLIP's text tower."""
    scratch_before: int = 0
    """Bytes of scratch memory of the graphs between vision and decoder, the larger of them."""
    largest_text: int | None = None
    """Text rows of the largest prompt that there are shapes for; None for ``text_bucket``."""
    most_new: int | None = None
    """New tokens that the KV buffers have room for; None for ``num_new``."""

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Layers and visual rows of each layer range."""
        entering = self.sizes["N"] if self.entering is None else self.entering
        return layers_and_rows(
            self.schedule, num_layers=self.model.decoder.num_layers, entering=self.num_images * entering
        )

    @property
    def visual_rows(self) -> tuple[int, ...]:
        """Visual rows of each layer range."""
        return tuple(rows for _, rows in self.ranges)

    @property
    def text_rows(self) -> int:
        """Text rows of the largest prefill."""
        return max(self.text_bucket, self.largest_text or 0)

    @property
    def room(self) -> int:
        """Rows of every KV buffer besides the visual ones."""
        return self.text_rows + max(self.num_new, self.most_new or 0)

    @property
    def cache_row_bytes(self) -> int:
        """Bytes of one row of one layer's KV cache."""
        return kv_row_bytes(self.model.decoder, bytes_per_cached=self.formats.bytes_per_cached)


@dataclass(frozen=True, kw_only=True, slots=True)
class CountedGraph:
    """One graph that an answer runs."""

    name: str
    phase: Literal["prefill", "decode"]
    work: Work


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedGraph:
    """A graph and its predicted time."""

    run: CountedGraph
    time: GraphTime


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeed:
    """Bytes that must be there at once."""

    weights: int
    kv_caches: int
    activations: int
    usable: int
    """Bytes that the device has for them."""

    @property
    def total(self) -> int:
        """Sum of the three."""
        return self.weights + self.kv_caches + self.activations

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.total <= self.usable


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Predicted times and memory of one setting on one device."""

    device: DeviceSpec
    setting: Setting
    runs: tuple[TimedGraph, ...]
    unfused_seconds: float
    """Seconds that the prefill takes more if attention scores go through memory."""
    memory: MemoryNeed

    def seconds(self, phase: Literal["prefill", "decode"]) -> float:
        """Return the sum over a phase's graphs: to the first token, or per further token."""
        return sum(timed.time.seconds for timed in self.runs if timed.run.phase == phase)

    @property
    def answer_seconds(self) -> float:
        """Seconds of the whole answer, without the host's work on image and text."""
        return self.seconds("prefill") + (self.setting.num_new - 1) * self.seconds("decode")


def predict(setting: Setting, device: DeviceSpec) -> Prediction:
    """Return what ``device`` would take for ``setting``, by the fitted efficiencies of its kind.

    Raises:
        TargetError: If it has not one of the setting's formats.
    """
    numbers = setting.formats
    parts = {"decoder": numbers.layer, "head": numbers.head, "vision": numbers.vision}
    refusal = device.refusal(parts, option="--predict")
    if refusal is not None:
        raise TargetError(refusal)
    efficiency, rates = fitted_for(device).efficiency, rates_of(device)
    unfused = dataclasses.replace(efficiency, score_passes=UNFUSED_SCORE_PASSES)
    runs, more = [], 0.0
    for run in graph_runs(setting):
        inputs = frozenset() if run.name.startswith("select") else numbers.inputs  # probes round none
        formats = dataclasses.replace(numbers, inputs=inputs)
        time = graph_time(run.work, formats=formats, rates=rates, efficiency=efficiency)
        runs.append(TimedGraph(run=run, time=time))
        if run.phase == "prefill":
            slower = graph_time(run.work, formats=formats, rates=rates, efficiency=unfused)
            more += slower.seconds - time.seconds
    return Prediction(
        device=device,
        setting=setting,
        runs=tuple(runs),
        unfused_seconds=more,
        memory=memory_of(setting, usable=device.usable_bytes),
    )


def graph_runs(setting: Setting) -> list[CountedGraph]:
    """Return the graphs of a prefill in order, and those of one decode step with every KV buffer at its capacity."""
    decoder = setting.model.decoder
    works: list[tuple[str, Work]] = [("vision", sum_of([_vision(setting)] * setting.num_images))]
    if setting.clip_text_flops is not None:
        works.append((CLIP_TEXT, counted_work(setting.clip_text_flops, rows=setting.clip_text_rows)))
    if setting.reduce_cost is not None:
        # The greedy loop is float32 whatever the other numbers are.
        again = setting.reduce_cost.read_again * 4 / setting.formats.bytes_per_element
        work = counted_work(setting.reduce_cost.flops, rows=setting.sizes["N"], other=again)
        works.append(("reduce", sum_of([work] * setting.num_images)))
    steps: list[tuple[str, Work]] = []
    for index, (layers, rows) in enumerate(setting.ranges):
        if index:
            works.append((f"select_{index}", _select(setting, index - 1)))
        name = range_name(index, len(setting.ranges))
        works.append((name, range_work(decoder, num_layers=layers, rows=rows + setting.text_bucket)))
        steps.append((name, range_work(decoder, num_layers=layers, rows=1, past=rows + setting.room)))
    head = ("head", head_work(decoder))
    return [
        *(CountedGraph(name=name, phase="prefill", work=work) for name, work in (*works, head)),
        *(CountedGraph(name=name, phase="decode", work=work) for name, work in (*steps, head)),
    ]


def range_name(index: int, count: int) -> str:
    """Return the name of layer range ``index`` of ``count``, as the exporter gives it."""
    if index == 0:
        return "prefix"
    return "suffix" if index == count - 1 else f"segment_{index}"


def memory_of(setting: Setting, *, usable: int) -> MemoryNeed:
    """Return the memory of weights, of KV caches at full capacity and of the largest graph's activations.

    The formulas are those of ``trio-export --target``: weights that the stages repeat count, and attention scores are
    taken to be in memory, in float32 and once more in float16.
    """
    decoder, tower, sizes = setting.model.decoder, setting.model.vision, setting.formats.bytes_per_weight()
    head = decoder.vocab_size * decoder.hidden_size
    vision = 0 if tower is None else tower_weights(tower)
    repeated = repeated_weights(
        setting.schedule,
        decoder,
        layers_quantized=setting.formats.layer != "float16",
        head_quantized=setting.formats.head != "float16",
    )
    weights = (
        (decoder.num_layers * layer_weights(decoder) + repeated.layers) * sizes["layer"]
        + (head + repeated.head) * sizes["head"]
        + vision * sizes["vision"]
    )
    return MemoryNeed(
        weights=round(weights) + setting.other_weight_bytes,
        kv_caches=kv_cache_bytes(setting.ranges, other_rows=setting.room, row_bytes=setting.cache_row_bytes),
        activations=largest_activations(
            decoder,
            ranges=setting.ranges,
            text_rows=setting.text_rows,
            probe_rows=setting.schedule.num_probe_rows,
            cache_row_bytes=setting.cache_row_bytes,
            tiles=None if tower is None else tiles_of(tower, setting.sizes),
            before=setting.scratch_before,
            element_bytes=2,
        ),
        usable=usable,
    )


def _vision(setting: Setting) -> Work:
    if setting.vision_flops is not None:
        return counted_work(setting.vision_flops, rows=setting.sizes["N"])
    assert setting.model.vision is not None
    return vision_work(setting.model.vision, setting.sizes)


def _select(setting: Setting, stage: int) -> Work:
    rows = setting.visual_rows
    sizes = StageSizes(
        num_visual=rows[stage],
        num_keep=setting.schedule.stages[stage].keep,
        num_text=setting.text_bucket,
        prompt_visual=rows[0],
        one_size=stage > 0 or setting.one_size,
    )
    return stage_work(setting.model.decoder, setting.schedule, sizes)
