"""Time, rates and the roofline's verdict of each graph.

A graph that makes fewer FLOPs for each byte than the machine can is bounded by memory, else by arithmetic. One that
reaches little of its bound waits for something else: launches, short loops, few rows.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from trio_edge.profiling.measure.recording import DECODE
from trio_edge.profiling.report.profile import GraphProfile
from trio_edge.profiling.statistics import distribution_of_runs
from trio_edge.runtime.bundle.graph_io import is_probe
from trio_edge.trio.cost.bundle_work import graph_work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.profiling.measure.ceilings import Ceilings
    from trio_edge.profiling.measure.measuring import MeasuredBundle
    from trio_edge.profiling.report.profile import Bound
    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest, Profile

NEAR = 0.15
"""Share of a ceiling below which it does not bound a graph."""


class Verdict(NamedTuple):
    """The limit that bounds a graph, and how near it is."""

    bound: Bound
    of_ceiling: float
    text: str


def graph_profiles(measured: MeasuredBundle, ceilings: Ceilings | None) -> tuple[GraphProfile, ...]:
    """Return each graph in each profile that ran, in the order of the manifest, prefill first."""
    manifest = measured.loaded.bundle.manifest
    answer_ms = statistics.median(answer.answer_ms for answer in measured.answers)
    found = []
    for decodes in (False, True):
        for spec in manifest.graphs:
            for profile in spec.profiles:
                if (profile.name == DECODE) == decodes:
                    answers = _answers_with(measured, spec.name, profile.name)
                    if answers:
                        found.append(_graph_profile(manifest, spec, profile, answers, answer_ms, ceilings))
    return tuple(found)


def _answers_with(measured: MeasuredBundle, graph: str, profile: str) -> list[list[float]]:
    """Return per answer the times of a graph's calls; from the runs without capture where the others have none."""
    for answers in (measured.answers, measured.steps):
        found = [
            [call.milliseconds for call in answer.calls if (call.graph, call.profile) == (graph, profile)]
            for answer in answers
        ]
        if any(found):
            return found
    return []


def _graph_profile(
    manifest: Manifest,
    spec: GraphSpec,
    profile: Profile,
    answers: Sequence[Sequence[float]],
    answer_ms: float,
    ceilings: Ceilings | None,
) -> GraphProfile:
    call_ms = distribution_of_runs(answers)
    in_answer = statistics.median(sum(calls) for calls in answers)
    work = graph_work(manifest, spec, profile)
    flops, moved = work.flops, work.moved_bytes
    verdict = None
    if ceilings is not None and call_ms.p50 > 0:
        verdict = judge(flops=flops, moved_bytes=moved, milliseconds=call_ms.p50, ceilings=ceilings)
    return GraphProfile(
        name=spec.name,
        role="select" if is_probe(spec.part_at(profile)) else spec.role,
        phase="decode" if profile.name == DECODE else "prefill",
        profile=profile.name,
        calls_per_answer=sum(map(len, answers)) / len(answers),
        call_ms=call_ms,
        answer_ms=in_answer,
        share=in_answer / answer_ms,
        flops=flops,
        moved_bytes=moved,
        flops_per_s=1e3 * flops / call_ms.p50 if call_ms.p50 > 0 else None,
        bytes_per_s=1e3 * moved / call_ms.p50 if call_ms.p50 > 0 else None,
        intensity=flops / moved,
        bound=None if verdict is None else verdict.bound,
        of_ceiling=None if verdict is None else verdict.of_ceiling,
        verdict=None if verdict is None else verdict.text,
    )


def judge(*, flops: float, moved_bytes: float, milliseconds: float, ceilings: Ceilings) -> Verdict:
    """Return the verdict on one call.

    Args:
        flops: Its FLOPs.
        moved_bytes: Bytes that it reads and writes at least; above 0.
        milliseconds: Its time; above 0.
        ceilings: Ceilings of this machine.
    """
    of_compute = 1e3 * flops / milliseconds / ceilings.flops_per_s
    of_memory = 1e3 * moved_bytes / milliseconds / ceilings.bytes_per_s
    memory_bound = flops / moved_bytes < ceilings.flops_per_s / ceilings.bytes_per_s
    share, ceiling = (of_memory, "bandwidth") if memory_bound else (of_compute, "the matmul rate")
    if share < NEAR:
        return Verdict("neither", share, f"bound by neither: {100 * share:.2g} % of {ceiling}")
    bound: Bound = "memory" if memory_bound else "compute"
    text = f"{bound}-bound, {100 * share:.0f} % of {ceiling}"
    if share > 1:
        text += ": its data stays in caches" if memory_bound else ": repeat on an idle machine"
    return Verdict(bound, share, text)
