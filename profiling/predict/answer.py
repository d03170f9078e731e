"""One answer on a device that is not at hand: time of every graph, to the first token, per token, and memory.

A ``Setting`` is what a bundle would be exported with and asked; ``graph_runs`` lists the graphs that it runs and their
counted work, ``predict`` times them. Rows are those that graphs run at: the text is padded to its bucket.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trio_edge.profiling.predict.efficiency import UNFUSED_SCORE_PASSES, fitted_for, rates_of
from trio_edge.profiling.predict.speed import Formats, GraphTime, graph_time
from trio_edge.runtime.bundle.errors import TargetError
from trio_edge.runtime.bundle.graph_io import CLIP_TEXT
from trio_edge.trio.cost.memory import Tiles, largest_activations
from trio_edge.trio.cost.shapes import layer_weights, tiles_and_patches, tower_weights
from trio_edge.trio.cost.work import (
    Work,
    counted_work,
    head_work,
    range_work,
    repeated_weights,
    select_work,
    vision_work,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.profiling.predict.models import Model
    from trio_edge.runtime.bundle.schedule import Schedule
    from trio_edge.trio.cost.devices import Target
    from trio_edge.trio.cost.work import WeightKind

Precision = Literal["float16", "int8", "fp8", "int4"]
DECODE_POINTS = 6
PRECISIONS: tuple[Precision, ...] = ("float16", "int8", "fp8", "int4")
"""The finest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A model, how it is exported, and what is asked of it."""

    model: Model
    schedule: Schedule
    sizes: Mapping[str, int]
    """Of the vision profile: N visual tokens, and B tiles or P patches."""
    num_text: int
    """Text tokens of the prompt."""
    text_bucket: int
    """Rows that they are padded to."""
    num_new: int
    """Tokens of the answer."""
    precision: Precision
    """Of the decoder's linear weights."""
    head_precision: Precision = "float16"
    vision_precision: Precision = "float16"
    cache_precision: Literal["float16", "int8"] = "float16"
    """Of the KV caches."""
    inputs: frozenset[WeightKind] = frozenset()
    """Weights whose products have their inputs in the same format, INT8 or FP8."""
    one_size: bool = True
    """Whether the first stage's graph is made for one N."""
    entering: int | None = None
    """Visual tokens that enter the decoder where a selection before it leaves fewer than N."""
    vision_flops: float | None = None
    """Counted elsewhere, where the model says nothing of its vision tower."""
    clip_text_flops: float | None = None
    """Of CLIP's text tower, where there is one."""
    clip_text_rows: int = 1
    """Tokens of all its texts, padding too."""
    reduce_flops: float | None = None
    """Of the selection before the decoder."""
    reduce_read_again: float = 0.0
    """Float32 numbers that its greedy steps read."""
    select_flops: tuple[float, ...] | None = None
    """Per stage, where the method is not TRIO."""
    other_weight_bytes: int = 0
    """Of graphs whose sizes the model does not have, as CLIP's text tower."""
    scratch_before: int = 0
    """Bytes of scratch memory of the graphs between vision and decoder, the larger of them."""
    largest_text: int | None = None
    """Text rows of the largest prompt that there are shapes for; None for ``text_bucket``."""
    most_new: int | None = None
    """New tokens that the KV buffers have room for; None for ``num_new``."""

    @property
    def visual_rows(self) -> tuple[int, ...]:
        """Visual rows of each layer range."""
        first = self.sizes["N"] if self.entering is None else self.entering
        rows = [first]
        for stage in self.schedule.stages:
            rows.append(min(stage.keep, rows[-1]))
        return tuple(rows)

    @property
    def text_rows(self) -> int:
        """Text rows of the largest prefill."""
        return max(self.text_bucket, self.largest_text or 0)

    @property
    def room(self) -> int:
        """Rows of every KV buffer beside the visual ones."""
        return self.text_rows + max(self.num_new, self.most_new or 0)

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers of each range."""
        starts = [0, *(stage.layer for stage in self.schedule.stages), self.model.decoder.num_layers]
        return tuple(stop - start for start, stop in zip(starts, starts[1:]))

    @property
    def formats(self) -> Formats:
        """What the numbers are stored as."""
        return Formats(
            layer=self.precision,
            other="float16",
            head=self.head_precision,
            vision=self.vision_precision,
            bytes_per_cached=1 if self.cache_precision == "int8" else 2,
            inputs=self.inputs,
        )

    @property
    def cache_row_bytes(self) -> int:
        """Bytes of one row of one layer's KV cache."""
        decoder = self.model.decoder
        return 2 * decoder.num_kv_heads * decoder.head_size * self.formats.bytes_per_cached


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphRun:
    """One graph that an answer runs."""

    name: str
    phase: Literal["prefill", "decode"]
    work: Work


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedRun:
    """A graph and its predicted time."""

    run: GraphRun
    time: GraphTime


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that must be there at once."""

    weights: int
    kv_caches: int
    activations: int
    usable: int
    """What the device has for them."""

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
    """What one device would do with one setting."""

    target: Target
    setting: Setting
    runs: tuple[TimedRun, ...]
    unfused_seconds: float
    """What the prefill would take more if attention scores went through memory."""
    memory: Memory
    contexts: tuple[DecodePoint, ...]
    """See ``predict_contexts``."""

    @property
    def token_line(self) -> tuple[float, float]:
        """A token's seconds with empty KV buffers, and what each row of them adds."""
        first, last = self.contexts[0], self.contexts[-1]
        per_row = (last.seconds - first.seconds) / (last.cached_rows - first.cached_rows)
        return first.seconds - per_row * first.cached_rows, per_row

    def seconds(self, phase: Literal["prefill", "decode"]) -> float:
        """Return the sum over a phase's graphs: to the first token, or per further token."""
        return sum(timed.time.seconds for timed in self.runs if timed.run.phase == phase)

    @property
    def answer_seconds(self) -> float:
        """Of the whole answer, without the host's work on picture and text."""
        return self.seconds("prefill") + (self.setting.num_new - 1) * self.seconds("decode")


def predict(setting: Setting, target: Target) -> Prediction:
    """Return what ``target`` would take for ``setting``, by the fitted efficiencies of its kind.

    Raises:
        TargetError: If it has not one of the setting's formats.
    """
    formats = {
        "decoder": setting.precision,
        "head": setting.head_precision,
        "vision": setting.vision_precision,
    }
    refusal = target.refusal(formats, option="--predict")
    if refusal is not None:
        raise TargetError(refusal)
    efficiency, rates = fitted_for(target).efficiency, rates_of(target)
    unfused = dataclasses.replace(efficiency, score_passes=UNFUSED_SCORE_PASSES)
    runs, more = [], 0.0
    for run in graph_runs(setting):
        numbers = setting.formats
        if run.name.startswith("select"):  # probes round no inputs
            numbers = dataclasses.replace(numbers, inputs=frozenset())
        time = graph_time(run.work, formats=numbers, rates=rates, efficiency=efficiency)
        runs.append(TimedRun(run=run, time=time))
        if run.phase == "prefill":
            slower = graph_time(run.work, formats=numbers, rates=rates, efficiency=unfused)
            more += slower.seconds - time.seconds
    return Prediction(
        target=target,
        setting=setting,
        runs=tuple(runs),
        unfused_seconds=more,
        memory=memory_of(setting, usable=target.usable_bytes),
        contexts=tuple(predict_contexts(setting, target)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePoint:
    """A token of a bundle whose KV buffers end right behind its context."""

    context: int
    """Rows before it, visual tokens not reduced."""
    cached_rows: float
    """Rows of the KV buffers, mean over layers."""
    seconds: float


def predict_contexts(setting: Setting, target: Target) -> list[DecodePoint]:
    """Return a token's time from the prompt's end to the end of the room, at up to ``DECODE_POINTS`` contexts.

    The graphs read whole buffers, so a bundle takes the last of these times at every context; the others are of bundles with
    less room.
    """
    efficiency, rates = fitted_for(target).efficiency, rates_of(target)
    last, count = setting.room - setting.num_text, min(DECODE_POINTS, setting.room - setting.num_text + 1)
    visual = sum(layers * rows for layers, rows in zip(setting.layers, setting.visual_rows))
    points = []
    for index in range(count):
        room = setting.num_text + index * last // (count - 1)
        works = [run.work for run in _step_runs(setting, room=room)]
        times = [
            graph_time(work, formats=setting.formats, rates=rates, efficiency=efficiency) for work in works
        ]
        points.append(
            DecodePoint(
                context=setting.sizes["N"] + room,
                cached_rows=visual / setting.model.decoder.num_layers + room,
                seconds=sum(time.seconds for time in times),
            )
        )
    return points


def graph_runs(setting: Setting) -> list[GraphRun]:
    """Return the graphs of a prefill in order, and those of one decode step with every KV buffer at its capacity."""
    decoder, rows = setting.model.decoder, setting.visual_rows
    works: list[tuple[str, Work]] = [("vision", _vision(setting))]
    if setting.clip_text_flops is not None:
        works.append((CLIP_TEXT, counted_work(setting.clip_text_flops, rows=setting.clip_text_rows)))
    if setting.reduce_flops is not None:
        again = setting.reduce_read_again * 4 / setting.formats.bytes_per_element
        works.append(("reduce", counted_work(setting.reduce_flops, rows=setting.sizes["N"], other=again)))
    for index, layers in enumerate(setting.layers):
        if index:
            works.append((f"select_{index}", _select(setting, index - 1)))
        work = range_work(decoder, num_layers=layers, rows=rows[index] + setting.text_bucket, past=0)
        works.append((range_name(index, len(rows)), work))
    works.append(("head", head_work(decoder)))
    prefill = [GraphRun(name=name, phase="prefill", work=work) for name, work in works]
    return [*prefill, *_step_runs(setting, room=setting.room)]


def _step_runs(setting: Setting, *, room: int) -> list[GraphRun]:
    """Return the graphs of one decode step where every KV buffer has ``room`` rows beside the visual ones."""
    decoder, rows, runs = setting.model.decoder, setting.visual_rows, []
    for index, layers in enumerate(setting.layers):
        work = range_work(decoder, num_layers=layers, rows=1, past=rows[index] + room)
        runs.append(GraphRun(name=range_name(index, len(rows)), phase="decode", work=work))
    runs.append(GraphRun(name="head", phase="decode", work=head_work(decoder)))
    return runs


def range_name(index: int, count: int) -> str:
    """Return the name of layer range ``index`` of ``count``, as the exporter gives it."""
    if index == 0:
        return "prefix"
    return "suffix" if index == count - 1 else f"segment_{index}"


def memory_of(setting: Setting, *, usable: int) -> Memory:
    """Return the memory of weights, of KV caches at full capacity and of the largest graph's activations.

    The formulas are those of ``trio-export --target``: weights that the stages repeat count, and attention scores are
    taken to be in memory, in float32 and once more in float16.
    """
    decoder, rows, sizes = setting.model.decoder, setting.visual_rows, setting.formats.bytes_per_weight()
    head = decoder.vocab_size * decoder.hidden_size
    vision = 0 if setting.model.vision is None else tower_weights(setting.model.vision)
    repeated = repeated_weights(setting.schedule.method, decoder)
    stages = len(setting.schedule.stages)
    weights = (
        (decoder.num_layers * layer_weights(decoder) + stages * repeated.layer) * sizes["layer"]
        + (head + stages * repeated.head) * sizes["head"]
        + vision * sizes["vision"]
    )
    return Memory(
        weights=round(weights) + setting.other_weight_bytes,
        kv_caches=setting.cache_row_bytes
        * sum(layers * (count + setting.room) for layers, count in zip(setting.layers, rows)),
        activations=largest_activations(
            setting.model.decoder,
            layers_and_rows=list(zip(setting.layers, rows)),
            text_rows=setting.text_rows,
            probe_rows=setting.schedule.num_probe_rows,
            cache_row_bytes=setting.cache_row_bytes,
            tiles=_tiles(setting),
            before=setting.scratch_before,
            element_bytes=2,
        ),
        usable=usable,
    )


def _tiles(setting: Setting) -> Tiles | None:
    tower = setting.model.vision
    if tower is None:
        return None
    return Tiles(*tiles_and_patches(tower, setting.sizes), tower.hidden_size, tower.intermediate_size)


def _vision(setting: Setting) -> Work:
    if setting.vision_flops is not None:
        return counted_work(setting.vision_flops, rows=setting.sizes["N"])
    assert setting.model.vision is not None
    return vision_work(setting.model.vision, setting.sizes)


def _select(setting: Setting, stage: int) -> Work:
    entering = setting.visual_rows[stage]
    if setting.select_flops is not None:
        return counted_work(setting.select_flops[stage], rows=entering)
    return select_work(
        setting.model.decoder,
        setting.schedule,
        rows=entering + setting.text_bucket,
        num_visual=entering,
        one_size=stage > 0 or setting.one_size,
    )
