"""The report of a measurement: figures, comparisons, verdicts and advice."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from trio_edge.profiling.measure.layers import operator_times, slowest_layers
from trio_edge.profiling.measure.machine_info import find_machine, find_versions
from trio_edge.profiling.measure.recording import is_decode
from trio_edge.profiling.measure.sensors.sampling_thread import joules, sensor_ranges
from trio_edge.profiling.report.profile import (
    SCHEMA_VERSION,
    Bound,
    BundleProfile,
    Comparison,
    DecodeStep,
    GraphProfile,
    Load,
    MemoryProfile,
    ProfileReport,
    SizePoint,
)
from trio_edge.profiling.statistics import distribution, distribution_of_runs, line_fit, median_ratio
from trio_edge.runtime.bundle.errors import printable
from trio_edge.runtime.bundle.graph_io import CANDIDATES, is_probe
from trio_edge.runtime.bundle.manifest import MANIFEST_NAME, GraphSpec, Profile
from trio_edge.runtime.bundle.reader import sha256_of
from trio_edge.trio.cost.bundle_work import graph_work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trio_edge.profiling.measure.answers import Answer
    from trio_edge.profiling.measure.ceilings import Ceilings
    from trio_edge.profiling.measure.measuring import MeasuredBundle, Measurement


def report_of(measurement: Measurement) -> ProfileReport:
    """Return the report of ``measurement``."""
    labels = _labels(measurement)
    profiles = [
        _bundle_profile(measured, measurement, label=label)
        for measured, label in zip(measurement.measured, labels)
    ]
    bundles = tuple(msgspec.structs.replace(profile, advice=advise(profile)) for profile in profiles)
    reference = measurement.measured[0]
    return ProfileReport(
        schema_version=SCHEMA_VERSION,
        device=find_machine(),
        versions=find_versions(),
        conditions=measurement.conditions,
        ceilings=measurement.ceilings,
        bundles=bundles,
        comparisons=tuple(
            _comparison(measured, reference, profile=profile, against=bundles[0])
            for measured, profile in zip(measurement.measured[1:], bundles[1:])
        ),
    )


def _labels(measurement: Measurement) -> list[str]:
    """Return the folders' names, numbered if two are equal."""
    names = [printable(one.loaded.bundle.folder.resolve().name) for one in measurement.measured]
    return [name if names.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(names)]


def _bundle_profile(measured: MeasuredBundle, measurement: Measurement, *, label: str) -> BundleProfile:
    answers, bundle = measured.answers, measured.loaded.bundle
    manifest, first = measured.loaded.manifest, measured.answers[0].statistics
    windows = [(answer.start, answer.end) for answer in answers]
    token_ms = [time for answer in answers for time in answer.token_ms]
    energy = joules(measurement.samples, windows)
    return BundleProfile(
        label=label,
        bundle=printable(str(bundle.folder)),
        manifest_sha256=sha256_of(bundle.folder / MANIFEST_NAME),
        model=manifest.model,
        dtype=manifest.dtype,
        formats={} if manifest.quantization is None else dict(manifest.quantization.formats),
        selection=manifest.selection,
        visual_tokens=first.visual_tokens,
        processed_tokens=first.average_keep * first.visual_tokens,
        kept_tokens=first.kept_tokens,
        text_tokens=first.text_tokens,
        load=Load(
            open_ms=measured.loaded.open_ms,
            graphs_ms=measured.loaded.graphs_ms,
            first_answer_ms=measured.first.answer_ms,
            first_ttft_ms=measured.first.ttft_ms,
        ),
        ttft_ms=distribution([answer.ttft_ms for answer in answers]),
        prefill_ms=distribution([answer.statistics.prefill_ms for answer in answers]),
        token_ms=distribution_of_runs([answer.token_ms for answer in answers]) if token_ms else None,
        tokens_per_s=1e3 / statistics.median(token_ms) if token_ms else None,
        answer_ms=distribution([answer.answer_ms for answer in answers]),
        host_first_ms=distribution([answer.host_first_ms for answer in answers]),
        host_token_ms=_host_token_ms(measured),
        graphs=graph_profiles(measured, measurement.ceilings),
        decode=tuple(
            DecodeStep(context=one.context, cached_rows=one.cached_rows, ms=distribution(one.milliseconds))
            for one in measured.contexts
        ),
        decode_fit=line_fit(
            [one.cached_rows for one in measured.contexts], [one.milliseconds for one in measured.contexts]
        ),
        sizes=tuple(
            SizePoint(
                width=size.width,
                height=size.height,
                visual_tokens=size.visual_tokens,
                processed_tokens=manifest.average_keep_of(size.visual_tokens) * size.visual_tokens,
                ttft_ms=distribution([answer.ttft_ms for answer in runs]),
            )
            for size, runs in measured.sizes
        ),
        memory=_memory(measured, before_all=measurement.measured[0].memory.before),
        energy_j={where: total / len(answers) for where, total in energy.items()},
        sensors=sensor_ranges(measurement.samples, start=answers[0].start, end=answers[-1].end),
        operators=operator_times(measured.layers),
        layers=slowest_layers(measured.layers),
    )


def _host_token_ms(measured: MeasuredBundle) -> float | None:
    found = [time for answer in measured.answers if (time := answer.host_token_ms) is not None]
    return statistics.median(found) if found else None


def _memory(measured: MeasuredBundle, *, before_all: int | None) -> MemoryProfile:
    """Return one bundle's memory without the other bundles'; ``before_all`` is the process before the first one was loaded."""
    seen, manifest = measured.memory, measured.loaded.bundle.manifest
    added = _growth(seen.before, seen.peak)
    peak = None if added is None or before_all is None else before_all + added
    weights = seen.planned.get("weights", sum(graph.weight_bytes for graph in manifest.graphs))
    buffers, workspace = (seen.planned.get(name, 0) for name in ("buffers", "workspace"))
    on_device = weights + manifest.kv_bytes + buffers + workspace
    other = peak  # on a GPU the graphs are not in the process's memory
    if peak is not None and seen.device_free is None:
        other = max(0, peak - on_device)
    return MemoryProfile(
        weights=weights,
        kv_allocated=manifest.kv_bytes,
        kv_used=measured.answers[-1].statistics.kv_bytes,
        buffers=buffers,
        workspace=workspace,
        other=other,
        peak_rss=peak,
        loading_rss=_growth(seen.before, seen.loaded),
        answering_rss=_growth(seen.loaded, seen.peak),
        device_free=seen.device_free,
    )


def _growth(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _comparison(
    measured: MeasuredBundle, reference: MeasuredBundle, *, profile: BundleProfile, against: BundleProfile
) -> Comparison:
    times: dict[str, Callable[[Answer], float]] = {
        "ttft_ms": lambda answer: answer.ttft_ms,
        "prefill_ms": lambda answer: answer.statistics.prefill_ms,
        "answer_ms": lambda answer: answer.answer_ms,
    }
    if profile.token_ms is not None and against.token_ms is not None:
        times["token_ms"] = lambda answer: statistics.fmean(answer.token_ms)
    ours, theirs = profile.memory, against.memory
    sizes = {
        "kv_used": ours.kv_used / theirs.kv_used,
        "kv_allocated": ours.kv_allocated / theirs.kv_allocated,
        "weights": ours.weights / theirs.weights,
        "processed_tokens": profile.processed_tokens / against.processed_tokens,
    }
    sizes |= {
        f"energy_j.{where}": value / against.energy_j[where]
        for where, value in profile.energy_j.items()
        if against.energy_j.get(where)
    }
    return Comparison(
        label=profile.label,
        reference=against.label,
        ratios={
            name: median_ratio(list(map(time, measured.answers)), list(map(time, reference.answers)))
            for name, time in times.items()
        },
        sizes=sizes,
    )


NEAR = 0.15
"""Share of a peak rate below which it does not bound a graph."""


class Verdict(NamedTuple):
    """The peak rate that bounds a graph, and the graph's share of it."""

    bound: Bound
    of_ceiling: float
    text: str


def graph_profiles(measured: MeasuredBundle, ceilings: Ceilings | None) -> tuple[GraphProfile, ...]:
    """Return all graphs and profiles that ran, in the manifest's order, prefill first."""
    manifest = measured.loaded.manifest
    launches = [(spec, profile) for spec in manifest.graphs for profile in spec.profiles]
    launches.sort(key=lambda launch: is_decode(launch[1].name))
    found = (_graph_profile(measured, spec, profile, ceilings) for spec, profile in launches)
    return tuple(graph for graph in found if graph is not None)


def _answers_with(measured: MeasuredBundle, graph: str, profile: str) -> list[list[float]]:
    """Return per answer the times of a graph's calls, from the runs without capture if the others have none."""
    for answers in (measured.answers, measured.steps):
        found = [
            [call.milliseconds for call in answer.calls if (call.graph, call.profile) == (graph, profile)]
            for answer in answers
        ]
        if any(found):
            return found
    return []


def _graph_profile(
    measured: MeasuredBundle, spec: GraphSpec, profile: Profile, ceilings: Ceilings | None
) -> GraphProfile | None:
    answers = _answers_with(measured, spec.name, profile.name)
    if not answers:
        return None
    call_ms = distribution_of_runs(answers)
    in_answer = statistics.median(sum(calls) for calls in answers)
    work = graph_work(measured.loaded.manifest, spec, profile)
    flops, moved = work.flops, work.moved_bytes
    judged: Verdict | tuple[None, None, None] = (None, None, None)
    if ceilings is not None and call_ms.p50 > 0:
        judged = judge(flops=flops, moved_bytes=moved, milliseconds=call_ms.p50, ceilings=ceilings)
    bound, of_ceiling, verdict = judged
    return GraphProfile(
        name=spec.name,
        role="select" if is_probe(spec.part_at(profile)) or profile.name == CANDIDATES else spec.role,
        phase="decode" if is_decode(profile.name) else "prefill",
        profile=profile.name,
        calls_per_answer=sum(map(len, answers)) / len(answers),
        call_ms=call_ms,
        answer_ms=in_answer,
        share=in_answer / statistics.median(answer.answer_ms for answer in measured.answers),
        flops=flops,
        moved_bytes=moved,
        flops_per_s=1e3 * flops / call_ms.p50 if call_ms.p50 > 0 else None,
        bytes_per_s=1e3 * moved / call_ms.p50 if call_ms.p50 > 0 else None,
        intensity=flops / moved,
        bound=bound,
        of_ceiling=of_ceiling,
        verdict=verdict,
    )


def judge(*, flops: float, moved_bytes: float, milliseconds: float, ceilings: Ceilings) -> Verdict:
    """Return the verdict on one call; bytes and milliseconds are above 0.

    A graph with fewer FLOPs per byte than the machine's peak rates is bound by memory, otherwise by arithmetic. If it reaches
    little of that rate, something else takes the time: launches, short loops, few rows.
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


MUCH = {"vision": 0.4, "select": 0.15, "decoder": 0.5, "outside": 0.25, "kv": 0.2}
"""Shares from which a part is worth a change: of the time to the first token, and for ``kv`` of a token's bytes."""
_LITTLE_USED = 0.5
"""Share of the KV buffers in use, below which their size is worth a change."""
_RANGES = ("prefix", "segment", "suffix")


def advise(bundle: BundleProfile) -> tuple[str, ...]:
    """Return changes that would make ``bundle`` faster, one line each; none if no part stands out."""
    return (*_about_the_first_token(bundle), *_about_tokens(bundle))


def _about_the_first_token(bundle: BundleProfile) -> Iterator[str]:
    whole = bundle.ttft_ms.p50
    shares = dict.fromkeys(("vision", "select", "decoder"), 0.0)
    for graph in bundle.graphs:
        if graph.phase == "prefill":
            part = "decoder" if graph.role in _RANGES else graph.role
            shares[part] = shares.get(part, 0.0) + graph.call_ms.p50 * graph.calls_per_answer / whole
    if shares["vision"] >= MUCH["vision"]:
        yield f"vision takes {shares['vision']:.0%} of the first token: export a smaller --image-size"
    if shares["decoder"] >= MUCH["decoder"] and bundle.processed_tokens >= bundle.visual_tokens > 0:
        yield (
            f"the decoder takes {shares['decoder']:.0%} of the first token, with all {bundle.visual_tokens} visual tokens in every"
            " layer: export with a smaller --keep"
        )
    if shares["select"] >= MUCH["select"]:
        yield f"selections take {shares['select']:.0%} of the first token: export fewer stages (--schedule)"
    outside = bundle.host_first_ms.p50 / whole
    if outside >= MUCH["outside"]:
        yield f"{outside:.0%} of the first token is outside of graphs: use a smaller image, or fewer stages"


def _about_tokens(bundle: BundleProfile) -> Iterator[str]:
    steps = [graph for graph in bundle.graphs if graph.phase == "decode" and graph.moved_bytes]
    if not steps:
        return
    moved, memory = sum(graph.moved_bytes or 0.0 for graph in steps), bundle.memory
    if memory.kv_allocated >= MUCH["kv"] * moved and memory.kv_used < _LITTLE_USED * memory.kv_allocated:
        yield (
            f"a token reads all {memory.kv_allocated / 1e6:.1f} MB of KV buffers, and an answer fills"
            f" {memory.kv_used / 1e6:.1f} MB: export with a smaller --max-new-tokens or --max-text"
        )
    slowest = max(steps, key=lambda graph: graph.answer_ms)
    # above 1, data comes from caches
    waits = slowest.bound == "memory" and (slowest.of_ceiling or 0.0) <= 1.0
    if waits and slowest.role in _RANGES and not bundle.formats:
        yield (
            f"tokens wait for memory ({slowest.name}: {slowest.verdict}): export with --quantize int4, a quarter of float16's"
            " bytes"
        )
