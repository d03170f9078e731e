"""Advice on a bundle: one line for each part that takes much time and that an option changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio_edge.profiling.report.profile import BundleProfile

MUCH = {"vision": 0.4, "select": 0.15, "decoder": 0.5, "outside": 0.25, "kv": 0.2}
"""Shares, of the first token and for ``kv`` of a token's bytes, from which a part is worth a change."""
_LITTLE_USED = 0.5
"""Share of the KV buffers that an answer fills, below which their room is worth a change."""
_RANGES = ("prefix", "segment", "suffix")


def advise(bundle: BundleProfile) -> tuple[str, ...]:
    """Return lines that would make ``bundle`` faster; none if no part stands out."""
    return (*_about_the_first_token(bundle), *_about_tokens(bundle))


def _about_the_first_token(bundle: BundleProfile) -> Iterator[str]:
    whole = bundle.ttft_ms.p50
    shares = dict.fromkeys(("vision", "select", "decoder"), 0.0)
    for graph in bundle.graphs:
        if graph.phase == "prefill":
            part = "decoder" if graph.role in _RANGES else graph.role
            shares[part] = shares.get(part, 0.0) + graph.call_ms.p50 * graph.calls_per_answer / whole
    if shares["vision"] >= MUCH["vision"]:
        yield f"vision takes {shares['vision']:.0%} of the first token: a smaller --image-size makes it less"
    if shares["decoder"] >= MUCH["decoder"] and bundle.processed_tokens >= bundle.visual_tokens > 0:
        yield (
            f"the decoder takes {shares['decoder']:.0%} of the first token, with all {bundle.visual_tokens} visual tokens in every"
            " layer: a --keep makes them fewer"
        )
    if shares["select"] >= MUCH["select"]:
        yield f"selections take {shares['select']:.0%} of the first token: fewer stages (--schedule) take less"
    outside = bundle.host_first_ms.p50 / whole
    if outside >= MUCH["outside"]:
        yield (
            f"{outside:.0%} of the first token is outside of graphs: preparing a smaller image takes less, and so do"
            " fewer graphs"
        )


def _about_tokens(bundle: BundleProfile) -> Iterator[str]:
    steps = [graph for graph in bundle.graphs if graph.phase == "decode" and graph.moved_bytes]
    if not steps:
        return
    moved, memory = sum(graph.moved_bytes or 0.0 for graph in steps), bundle.memory
    if memory.kv_allocated >= MUCH["kv"] * moved and memory.kv_used < _LITTLE_USED * memory.kv_allocated:
        yield (
            f"a token reads {memory.kv_allocated / 1e6:.1f} MB of KV buffers whole, and an answer fills"
            f" {memory.kv_used / 1e6:.1f} of them: export with less --max-new-tokens or --max-text"
        )
    slowest = max(steps, key=lambda graph: graph.answer_ms)
    waits = slowest.bound == "memory" and (slowest.of_ceiling or 0.0) <= 1.0  # more comes from caches
    if waits and slowest.role in _RANGES and not bundle.formats:
        yield (
            f"tokens wait for memory ({slowest.name}: {slowest.verdict}): --quantize int4 makes the decoder's weights a"
            " quarter of float16's"
        )
