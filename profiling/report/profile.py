"""The schema of ``trio-profile --json``, described in docs/profile.md.

Times are in milliseconds, sizes in bytes, rates per second. None means that the machine or the backend does not tell.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from trio_edge.profiling.measure.ceilings import Ceilings
from trio_edge.profiling.measure.layers import LayerTime, OperatorTime, Phase
from trio_edge.profiling.measure.machine_info import MachineReport
from trio_edge.profiling.measure.measuring import ProfileConditions
from trio_edge.profiling.measure.sensors.sampling_thread import SensorRange
from trio_edge.profiling.statistics import Distribution, LineFit, Ratio

SCHEMA_VERSION = 2
Bound = Literal["compute", "memory", "neither"]


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the report's values."""


class Load(_Part, frozen=True):
    """Times to open the bundle and load its graphs once, with the system's file cache as it was."""

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
    """Median of the graph's time per answer."""
    share: float
    """``answer_ms`` divided by the median time of an answer."""
    flops: float | None
    moved_bytes: float | None
    """Least bytes of one call: weights, and inputs and results of products, attention and element-wise kernels, once each."""
    flops_per_s: float | None
    bytes_per_s: float | None
    intensity: float | None
    bound: Bound | None
    of_ceiling: float | None
    """Share of the peak rate that bounds the graph."""
    verdict: str | None


class DecodeStep(_Part, frozen=True):
    """The time of a token at one context length."""

    context: int
    """Rows before it, without token reduction."""
    cached_rows: float
    """Rows before it in the KV caches, mean over layers."""
    ms: Distribution
    """One value per round: the median of a few tokens."""


class MemoryProfile(_Part, frozen=True):
    """Bytes by purpose."""

    weights: int
    kv_allocated: int
    kv_used: int
    """At the end of an answer."""
    buffers: int
    """Inputs and results of the graphs."""
    workspace: int
    """Activations inside a graph, as the backend reports or estimates them."""
    other: int | None
    """The rest of the process at its peak: Python, libraries, tokenizer, second copies of weights. With graphs on a GPU,
    the whole process."""
    peak_rss: int | None
    """Peak of the process with this bundle alone, during loading and the first answers."""
    loading_rss: int | None
    """Growth of the process while loading."""
    answering_rss: int | None
    """Growth of the process at the peak of the first answers."""
    device_free: int | None

    @property
    def parts(self) -> dict[str, int | None]:
        """The bytes by purpose in words; on a CPU their sum is the process's peak."""
        return {
            "weights": self.weights,
            "KV caches": self.kv_allocated,
            "buffers": self.buffers,
            "workspace": self.workspace,
            "other": self.other,
        }


class SizePoint(_Part, frozen=True):
    """Time to the first token at one image size."""

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
    """Formats of quantized weights by part of the model."""
    selection: str
    visual_tokens: int
    processed_tokens: float
    """Visual tokens per decoder layer, mean over layers."""
    kept_tokens: tuple[int, ...]
    text_tokens: int
    load: Load
    ttft_ms: Distribution
    """Time from image and prompt to the first token: reading, preparing, vision, prefill, sampling."""
    prefill_ms: Distribution
    token_ms: Distribution | None
    """Time of a token after the first; None if there was none."""
    tokens_per_s: float | None
    answer_ms: Distribution
    host_first_ms: Distribution
    """Time to the first token outside of graphs."""
    host_token_ms: float | None
    """Median time of a later token outside of graphs."""
    graphs: tuple[GraphProfile, ...]
    decode: tuple[DecodeStep, ...]
    """At contexts from a question without an image to the end of the KV caches."""
    decode_fit: LineFit | None
    sizes: tuple[SizePoint, ...]
    memory: MemoryProfile
    energy_j: dict[str, float]
    """Energy of one answer with the idle power, by the place of its sensor."""
    sensors: dict[str, SensorRange]
    operators: tuple[OperatorTime, ...]
    layers: tuple[LayerTime, ...]
    """The slowest ones of each graph and phase."""
    advice: tuple[str, ...] = ()

    @property
    def numbers(self) -> str:
        """Formats of activations and weights, as ``float16, int4 in prefix, suffix``."""
        parts: dict[str, list[str]] = {}
        for part, kind in self.formats.items():
            parts.setdefault(kind, []).append(part)
        return ", ".join([self.dtype, *(f"{kind} in {', '.join(names)}" for kind, names in parts.items())])


class Comparison(_Part, frozen=True):
    """One bundle compared with the first one."""

    label: str
    reference: str
    ratios: dict[str, Ratio]
    """This bundle's median divided by the reference's, by quantity; above 1 is slower."""
    sizes: dict[str, float]
    """The same ratio for quantities that do not vary from run to run."""


class ProfileReport(_Part, frozen=True):
    """The whole profile."""

    schema_version: int
    device: MachineReport
    versions: dict[str, str]
    conditions: ProfileConditions
    ceilings: Ceilings | None
    bundles: tuple[BundleProfile, ...]
    comparisons: tuple[Comparison, ...]
