"""What a profile says: the structs are the schema of ``trio-profile --json``; docs/profile.md describes it.

Times are milliseconds, sizes bytes, rates per second. None means: this machine or this backend does not tell.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from trio_edge.profiling.measure.sensors.sampling_thread import SensorRange
from trio_edge.profiling.statistics import Distribution, LineFit, Ratio

SCHEMA_VERSION = 1
Phase = Literal["prefill", "decode"]
Bound = Literal["compute", "memory", "neither"]


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the report's values."""


class Device(_Part, frozen=True):
    """The machine."""

    name: str
    """The module's name on a Jetson, else the processor's."""
    machine: str
    system: str
    cores: int
    memory_bytes: int | None
    gpu: str | None
    gpu_compute_capability: int | None
    gpu_memory_bytes: int | None
    gpu_driver: str | None


class Conditions(_Part, frozen=True):
    """How it was measured."""

    started: str
    """UTC."""
    backend: str
    threads: int
    """0 is the backend's choice."""
    clock: str
    """What graphs were timed with: "the host", or "events of the GPU"."""
    power_mode: str | None
    """What nvpmodel says."""
    cpu_governor: str | None
    load_average: float | None
    """Of the last minute, before the first run."""
    picture: str
    prompt: str
    new_tokens: int
    warm_up: int
    runs: int
    """Of each bundle."""
    stopped: str
    """Why there were no more."""
    sensors: tuple[str, ...]
    missing: tuple[str, ...]
    """One line for each thing that could not be measured."""


class Ceilings(_Part, frozen=True):
    """What the machine reached on the spot, through the same backend."""

    flops_per_s: float
    matmul: str
    bytes_per_s: float
    """Read and written."""
    copy: str


class Load(_Part, frozen=True):
    """Opening the bundle and loading its graphs, once; the system's file cache was as it was."""

    open_ms: float
    """Reading the manifest, checking files."""
    graphs_ms: float
    first_answer_ms: float
    """The first answer, before any warm-up."""
    first_ttft_ms: float


class GraphProfile(_Part, frozen=True):
    """One graph in one profile."""

    name: str
    role: str
    phase: Phase
    profile: str
    calls_per_answer: float
    call_ms: Distribution
    answer_ms: float
    """Median of its time in a whole answer."""
    share: float
    """Of the answer."""
    flops: float | None
    """Of one call: matrix products."""
    moved_bytes: float | None
    """Of one call at least: weights, and what products, attention and element-wise kernels read and write, each once."""
    flops_per_s: float | None
    bytes_per_s: float | None
    intensity: float | None
    """FLOPs per byte."""
    bound: Bound | None
    of_ceiling: float | None
    """Share of the ceiling that bounds it."""
    verdict: str | None


class LayerTime(_Part, frozen=True):
    """One layer or node of a graph, as the backend names it."""

    graph: str
    phase: Phase
    name: str
    kind: str
    """Operator."""
    answer_ms: float
    """Median time of a run in a whole answer's runs, under the backend's own profiler."""
    calls_per_answer: float
    shapes: str


class OperatorTime(_Part, frozen=True):
    """All layers of one kind in a graph."""

    graph: str
    phase: Phase
    kind: str
    layers: int
    answer_ms: float


class DecodeStep(_Part, frozen=True):
    """A token behind so many rows of text and visual tokens."""

    context: int
    """Rows before it, visual tokens not reduced."""
    cached_rows: float
    """Rows before it in the KV caches, mean over the decoder's layers."""
    ms: Distribution
    """One value for each round: the median of a few forced tokens."""


class Memory(_Part, frozen=True):
    """Bytes, and what they are for."""

    weights: int
    """Of all graphs."""
    kv_allocated: int
    kv_used: int
    """At the end of an answer."""
    buffers: int
    """Inputs, results, and what lies between the graphs."""
    workspace: int
    """Activations inside a graph, as the backend reports or estimates them."""
    other: int | None
    """What the process has beside these at its peak: Python, libraries, tokenizer, second copies of weights. Where the
    graphs lie on a GPU, all of the process."""
    peak_rss: int | None
    """Of the process with this bundle alone, while it was loaded and answered its first questions."""
    loading_rss: int | None
    """What loading added to the process."""
    answering_rss: int | None
    """What the first answers added at their peak."""
    device_free: int | None
    """On the GPU after the first answers; None on a CPU."""


class SizePoint(_Part, frozen=True):
    """Time to the first token at one size of picture."""

    width: int
    height: int
    visual_tokens: int
    processed_tokens: float
    """Mean over the decoder's layers."""
    ttft_ms: Distribution


class BundleProfile(_Part, frozen=True):
    """One bundle."""

    label: str
    bundle: str
    manifest_sha256: str
    model: str
    dtype: str
    formats: dict[str, str]
    """Of weights in another format than ``dtype``, by part of the model."""
    selection: str
    visual_tokens: int
    processed_tokens: float
    """Mean over the decoder's layers."""
    kept_tokens: tuple[int, ...]
    text_tokens: int
    load: Load
    ttft_ms: Distribution
    """Picture and prompt to first token: reading, preparing, vision, prefill, sampling."""
    prefill_ms: Distribution
    """The decoder's part of it."""
    token_ms: Distribution | None
    """Each token after the first; None if there was none."""
    tokens_per_s: float | None
    answer_ms: Distribution
    host_first_ms: Distribution
    """Time to the first token outside of graphs."""
    host_token_ms: float | None
    """Median time of a later token outside of graphs."""
    graphs: tuple[GraphProfile, ...]
    decode: tuple[DecodeStep, ...]
    """From a question without a picture to the end of the KV caches."""
    decode_fit: LineFit | None
    """Of ``decode`` over ``cached_rows``."""
    sizes: tuple[SizePoint, ...]
    memory: Memory
    energy_j: dict[str, float]
    """Of one answer, the idle share included, by where it was measured."""
    sensors: dict[str, SensorRange]
    """During all runs."""
    operators: tuple[OperatorTime, ...]
    """Every kind of layer, where the backend tells its layers apart."""
    layers: tuple[LayerTime, ...]
    """The slowest of each graph in each phase."""
    advice: tuple[str, ...] = ()
    """What to change, from where its time went."""

    @property
    def numbers(self) -> str:
        """What activations and weights are stored as: ``float16, int4 in prefix, suffix``."""
        parts: dict[str, list[str]] = {}
        for part, kind in self.formats.items():
            parts.setdefault(kind, []).append(part)
        return ", ".join([self.dtype, *(f"{kind} in {', '.join(names)}" for kind, names in parts.items())])


class Comparison(_Part, frozen=True):
    """One bundle beside the first one, run in turns."""

    label: str
    reference: str
    ratios: dict[str, Ratio]
    """This bundle's median over the reference's, by quantity: above 1 is slower or larger."""
    sizes: dict[str, float]
    """The same for what does not vary from run to run."""


class Report(_Part, frozen=True):
    """All that was measured."""

    schema_version: int
    device: Device
    versions: dict[str, str]
    conditions: Conditions
    ceilings: Ceilings | None
    bundles: tuple[BundleProfile, ...]
    comparisons: tuple[Comparison, ...]
