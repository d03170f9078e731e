"""The schema of ``trio-profile --json``; docs/profile.md describes it.

Times are milliseconds, sizes bytes, rates per second. None: this machine or this backend does not tell.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from trio_edge.profiling.measure.ceilings import Ceilings
from trio_edge.profiling.measure.layers import LayerTime, OperatorTime, Phase
from trio_edge.profiling.measure.machine_info import MachineReport
from trio_edge.profiling.measure.sensors.sampling_thread import SensorRange
from trio_edge.profiling.statistics import Distribution, LineFit, Ratio

SCHEMA_VERSION = 1
Bound = Literal["compute", "memory", "neither"]


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the report's values."""


class ProfileConditions(_Part, frozen=True):
    """Settings and state of the machine during the measurement."""

    started: str
    backend: str
    threads: int
    """0 is the backend's choice."""
    clock: str
    """The clock that graphs were timed with: "the host", or "events of the GPU"."""
    power_mode: str | None
    """As nvpmodel says it."""
    cpu_governor: str | None
    load_average: float | None
    """Mean of the last minute, before the first run."""
    picture: str
    prompt: str
    new_tokens: int
    warm_up: int
    runs: int
    stopped: str
    sensors: tuple[str, ...]
    missing: tuple[str, ...]
    """One line for each thing that could not be measured."""


class Load(_Part, frozen=True):
    """Opening the bundle and loading its graphs, once; the system's file cache was as it was."""

    open_ms: float
    graphs_ms: float
    first_answer_ms: float
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
    flops: float | None
    moved_bytes: float | None
    """Bytes of one call at least: weights, and what products, attention and element-wise kernels read and write, once each."""
    flops_per_s: float | None
    bytes_per_s: float | None
    intensity: float | None
    bound: Bound | None
    of_ceiling: float | None
    """Share of the ceiling that bounds it."""
    verdict: str | None


class DecodeStep(_Part, frozen=True):
    """The time of a token after so many rows of text and visual tokens."""

    context: int
    """Rows before it, visual tokens not reduced."""
    cached_rows: float
    """Rows before it in the KV caches, mean over the decoder's layers."""
    ms: Distribution
    """One value for each round: the median of a few forced tokens."""


class MemoryProfile(_Part, frozen=True):
    """Bytes by purpose."""

    weights: int
    kv_allocated: int
    kv_used: int
    """At the end of an answer."""
    buffers: int
    """Inputs, results, and what lies between the graphs."""
    workspace: int
    """Activations inside a graph, as the backend reports or estimates them."""
    other: int | None
    """The rest of the process at its peak: Python, libraries, tokenizer, second copies of weights. Where the graphs lie
    on a GPU, all of the process."""
    peak_rss: int | None
    """Peak of the process with this bundle alone, while it was loaded and answered its first questions."""
    loading_rss: int | None
    answering_rss: int | None
    """Growth of the process during the first answers, at their peak."""
    device_free: int | None


class SizePoint(_Part, frozen=True):
    """Time to the first token at one size of image."""

    width: int
    height: int
    visual_tokens: int
    processed_tokens: float
    ttft_ms: Distribution


class BundleProfile(_Part, frozen=True):
    """One bundle."""

    label: str
    bundle: str
    manifest_sha256: str
    model: str
    dtype: str
    formats: dict[str, str]
    """Formats of the weights that have another one than ``dtype``, by part of the model."""
    selection: str
    visual_tokens: int
    processed_tokens: float
    """Mean over the decoder's layers."""
    kept_tokens: tuple[int, ...]
    text_tokens: int
    load: Load
    ttft_ms: Distribution
    """Image and prompt to first token: reading, preparing, vision, prefill, sampling."""
    prefill_ms: Distribution
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
    """Contexts from a question without an image to the end of the KV caches."""
    decode_fit: LineFit | None
    sizes: tuple[SizePoint, ...]
    memory: MemoryProfile
    energy_j: dict[str, float]
    """Energy of one answer, the idle share included, by the place where it was measured."""
    sensors: dict[str, SensorRange]
    operators: tuple[OperatorTime, ...]
    layers: tuple[LayerTime, ...]
    """The slowest of each graph in each phase."""
    advice: tuple[str, ...] = ()

    @property
    def numbers(self) -> str:
        """Formats of activations and weights in words: ``float16, int4 in prefix, suffix``."""
        parts: dict[str, list[str]] = {}
        for part, kind in self.formats.items():
            parts.setdefault(kind, []).append(part)
        return ", ".join([self.dtype, *(f"{kind} in {', '.join(names)}" for kind, names in parts.items())])


class Comparison(_Part, frozen=True):
    """One bundle compared with the first one, run in turns."""

    label: str
    reference: str
    ratios: dict[str, Ratio]
    """This bundle's median over the reference's, by quantity: above 1 is slower or larger."""
    sizes: dict[str, float]
    """The same for what does not vary from run to run."""


class ProfileReport(_Part, frozen=True):
    """The whole profile."""

    schema_version: int
    device: MachineReport
    versions: dict[str, str]
    conditions: ProfileConditions
    ceilings: Ceilings | None
    bundles: tuple[BundleProfile, ...]
    comparisons: tuple[Comparison, ...]
