"""Predicts one answer on another device: time of every graph, to the first token and per token, and memory.

A ``Setting`` describes the bundle and the question; ``graph_runs`` lists the graphs that it runs, with their counted work, and
``predict`` times them. The text is padded to its bucket, as in graphs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from trio_edge.profiling.predict import speed
from trio_edge.runtime.bundle.errors import TargetError
from trio_edge.trio.cost import memory
from trio_edge.trio.cost.flops import stage_work
from trio_edge.trio.cost.selections import StageSizes
from trio_edge.trio.cost.work import Work, head_work, range_work, sum_of, tower_weights, vision_work

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.profiling.predict.models import Model
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.bundle.schedule import Schedule
    from trio_edge.trio.cost.devices import DeviceSpec

Precision = Literal["float16", "int8", "fp8", "int4"]
PRECISIONS: dict[str, Precision] = {"none": "float16", "int8": "int8", "fp8": "fp8", "int4": "int4"}
"""Formats of the decoder's weights, by ``--quantize``."""
"""The most exact one first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A model, its export settings, and the question."""

    model: Model
    keep: str | None = None
    """Average keep as ``11.1%``; None for the bundle's own schedule."""
    image_size: tuple[int, int] | None = None
    """Width and height; None for the bundle's largest shapes."""
    schedule: Schedule
    sizes: Mapping[str, int]
    """Sizes of the vision profile for one image: N visual tokens, and B tiles or P patches."""
    num_images: int = 1
    """Images of this size, or pairs of a video's frames."""
    num_text: int
    """Text tokens of the prompt."""
    text_bucket: int
    """Text rows after padding."""
    num_new: int
    formats: speed.Formats = field(default_factory=speed.Formats)
    manifest: Manifest | None = None
    """The bundle's; None for a released model."""
    entering: int | None = None
    """Visual tokens of an image that enter the decoder; None for N."""
    vision: Work | None = None
    """Work of the vision graph for one image, if the model does not describe its vision tower."""
    before: tuple[tuple[str, Work], ...] = ()
    """Names and work of the graphs between vision and decoder, for all images."""
    memory: Mapping[str, int] | None = None
    """Bytes for loading the bundle by purpose, the runtime's ``estimate``; None without a bundle that has this setting."""

    @property
    def ranges(self) -> tuple[tuple[range, int], ...]:
        """Layers and visual rows of each layer range."""
        entering = self.sizes["N"] if self.entering is None else self.entering
        return memory.layers_and_rows(
            self.schedule, num_layers=self.model.decoder.num_layers, entering=self.num_images * entering
        )

    @property
    def visual_rows(self) -> tuple[int, ...]:
        """Visual rows of each layer range."""
        return tuple(rows for _, rows in self.ranges)

    @property
    def text_rows(self) -> int:
        """Text rows of the largest prefill."""
        largest = 0 if self.manifest is None else self.manifest.text_buckets[-1]
        return max(self.text_bucket, largest)

    @property
    def room(self) -> int:
        """Rows of every KV buffer without the visual ones."""
        most_new = 0 if self.manifest is None else self.manifest.max_new_tokens
        return self.text_rows + max(self.num_new, most_new)


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
    time: speed.GraphTime


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeed:
    """Bytes that must be in memory at once."""

    weights: int
    kv_caches: int
    buffers: int
    workspace: int
    usable: int
    """Bytes that the device offers."""

    @property
    def total(self) -> int:
        """Sum of the four."""
        return self.weights + self.kv_caches + self.buffers + self.workspace

    @property
    def fits(self) -> bool:
        """Whether the device has enough."""
        return self.total <= self.usable


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Predicted times and memory of one setting on one device."""

    device: DeviceSpec
    setting: Setting
    runs: tuple[TimedGraph, ...]
    unfused_seconds: float
    """Extra seconds of the prefill if attention scores go through memory."""
    memory: MemoryNeed

    def seconds(self, phase: Literal["prefill", "decode"]) -> float:
        """Return the sum over a phase's graphs: to the first token, or per further token."""
        return sum(timed.time.seconds for timed in self.runs if timed.run.phase == phase)

    @property
    def answer_seconds(self) -> float:
        """Seconds of the whole answer, without the host's work."""
        return self.seconds("prefill") + (self.setting.num_new - 1) * self.seconds("decode")


def predict(setting: Setting, device: DeviceSpec) -> Prediction:
    """Return the prediction of ``setting`` on ``device``, by the fitted efficiencies of its kind.

    Raises:
        TargetError: If the device lacks one of the setting's formats.
    """
    numbers = setting.formats
    parts = {"decoder": numbers.layer, "head": numbers.head, "vision": numbers.vision}
    refusal = device.refusal(parts, option="--predict")
    if refusal is not None:
        raise TargetError(refusal)
    efficiency, rates = speed.fitted_for(device).efficiency, speed.rates_of(device)
    unfused = dataclasses.replace(efficiency, score_passes=speed.UNFUSED_SCORE_PASSES)
    runs, more = [], 0.0
    for run in graph_runs(setting):
        inputs = frozenset() if run.name.startswith("select") else numbers.inputs  # probes round no inputs
        formats = dataclasses.replace(numbers, inputs=inputs)
        time = speed.graph_time(run.work, formats=formats, rates=rates, efficiency=efficiency)
        runs.append(TimedGraph(run=run, time=time))
        if run.phase == "prefill":
            slower = speed.graph_time(run.work, formats=formats, rates=rates, efficiency=unfused)
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
    vision = setting.vision
    if vision is None:
        assert setting.model.vision is not None
        vision = vision_work(setting.model.vision, setting.sizes)
    works, steps = [("vision", sum_of([vision] * setting.num_images)), *setting.before], []
    for index, (layers, rows) in enumerate(setting.ranges):
        if index:
            works.append((f"select_{index}", _select(setting, index - 1)))
        name = range_name(index, len(setting.ranges))
        works.append((name, range_work(decoder, layers=layers, rows=rows + setting.text_bucket)))
        steps.append((name, range_work(decoder, layers=layers, rows=1, past=rows + setting.room)))
    head = ("head", head_work(decoder))
    return [
        *(CountedGraph(name=name, phase="prefill", work=work) for name, work in (*works, head)),
        *(CountedGraph(name=name, phase="decode", work=work) for name, work in (*steps, head)),
    ]


def range_name(index: int, count: int) -> str:
    """Return the exporter's name of layer range ``index`` of ``count``."""
    if index == 0:
        return "prefix"
    return "suffix" if index == count - 1 else f"segment_{index}"


def memory_of(setting: Setting, *, usable: int) -> MemoryNeed:
    """Return the memory for loading a bundle, or by ``bundle_bytes`` that of a bundle which does not exist."""
    if setting.memory is not None:
        parts = {name.lower().replace(" ", "_"): count for name, count in setting.memory.items()}
        return MemoryNeed(**parts, usable=usable)
    decoder, tower, formats = setting.model.decoder, setting.model.vision, setting.formats
    layer, head, vision = map(formats.bytes_of, (formats.layer, formats.head, formats.vision))
    count = setting.sizes.get("P", setting.sizes.get("B", 1))
    in_tower = 0 if tower is None else tower.workspace_bytes(count, element_bytes=2)
    bundle = memory.BundleSizes(
        decoder,
        setting.schedule,
        ranges=setting.ranges,
        text_rows=setting.text_rows,
        new_rows=setting.room - setting.text_rows,
        num_visual=setting.sizes["N"] + (setting.visual_rows[0] if setting.num_images > 1 else 0),
        pixel_bytes=memory.pixel_bytes_of(setting.model.images.to_dict(), setting.sizes),
        bytes_per_cached=setting.formats.bytes_per_cached,
        element_bytes=2,
    )
    weights = memory.WeightBytes([layer] * decoder.num_layers, head, vision, layer)
    found = memory.bundle_bytes(bundle, weights, vision_params=0 if tower is None else tower_weights(tower))
    return MemoryNeed(
        weights=round(found.layers + found.head_and_vision + found.repeated)
        + _other_weight_bytes(setting.manifest),
        kv_caches=found.kv_caches,
        buffers=found.buffers,
        workspace=max(found.workspace, in_tower),
        usable=usable,
    )


def _other_weight_bytes(manifest: Manifest | None) -> int:
    """Return the bytes of graphs that ``Model`` does not describe, such as CLIP's text tower, in half precision."""
    if manifest is None:
        return 0
    described = {"prefix", "segment", "suffix", "probe", "select", "head"}
    if manifest.vision is not None:
        described.add("vision")
    stored = sum(graph.weight_bytes for graph in manifest.graphs if graph.role not in described)
    return stored // 2 if manifest.dtype == "float32" else stored


def _select(setting: Setting, stage: int) -> Work:
    rows = setting.visual_rows
    sizes = StageSizes(
        num_visual=rows[stage],
        num_keep=setting.schedule.stages[stage].keep,
        num_text=setting.text_bucket,
        prompt_visual=rows[0],
        one_size=stage > 0 or setting.manifest is None or len(setting.manifest.visual_sizes) == 1,
    )
    return stage_work(setting.model.decoder, setting.schedule, sizes)
