"""Turns a measurement into its report."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import msgspec

from trio_edge.profiling.measure.distribution import distribution, line_fit, median_ratio
from trio_edge.profiling.measure.layers.interface import operator_times, slowest_layers
from trio_edge.profiling.measure.machine_info import find_device, find_versions
from trio_edge.profiling.measure.recording import DECODE
from trio_edge.profiling.measure.sensors.sampling_thread import joules, sensor_ranges
from trio_edge.profiling.report.advice import advise
from trio_edge.profiling.report.profile import (
    SCHEMA_VERSION,
    BundleProfile,
    Comparison,
    Conditions,
    DecodeStep,
    GraphProfile,
    Load,
    Memory,
    Report,
    SizePoint,
)
from trio_edge.profiling.report.roofline import judge
from trio_edge.runtime.bundle.manifest import MANIFEST_NAME
from trio_edge.runtime.bundle.reader import sha256_of
from trio_edge.trio.cost.bundle_work import graph_work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.profiling.measure.distribution import Distribution
    from trio_edge.profiling.measure.measuring import Measured, Measurement
    from trio_edge.profiling.report.profile import Ceilings
    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest, Profile


def report_of(measurement: Measurement, conditions: Conditions) -> Report:
    """Return the report of ``measurement``.

    Args:
        measurement: What was seen.
        conditions: How.
    """
    labels = _labels(measurement)
    profiles = [
        _bundle_profile(measured, measurement, label=label)
        for measured, label in zip(measurement.measured, labels)
    ]
    bundles = tuple(msgspec.structs.replace(profile, advice=advise(profile)) for profile in profiles)
    reference = measurement.measured[0]
    return Report(
        schema_version=SCHEMA_VERSION,
        device=find_device(),
        versions=find_versions(),
        conditions=conditions,
        ceilings=measurement.ceilings,
        bundles=bundles,
        comparisons=tuple(
            _comparison(measured, reference, profile=profile, against=bundles[0])
            for measured, profile in zip(measurement.measured[1:], bundles[1:])
        ),
    )


def _labels(measurement: Measurement) -> list[str]:
    """Return the folders' names, numbered where two are alike."""
    names = [measured.subject.bundle.folder.resolve().name for measured in measurement.measured]
    return [name if names.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(names)]


def _bundle_profile(measured: Measured, measurement: Measurement, *, label: str) -> BundleProfile:
    answers, bundle = measured.answers, measured.subject.bundle
    manifest, first = bundle.manifest, measured.answers[0].statistics
    windows = [(answer.start, answer.end) for answer in answers]
    token_ms = [time for answer in answers for time in answer.token_ms]
    energy = joules(measurement.samples, windows)
    return BundleProfile(
        label=label,
        bundle=str(bundle.folder),
        manifest_sha256=sha256_of(bundle.folder / MANIFEST_NAME),
        model=manifest.model,
        dtype=manifest.dtype,
        formats={} if manifest.quantization is None else dict(manifest.quantization.formats),
        selection=_selection(manifest),
        visual_tokens=first.visual_tokens,
        processed_tokens=first.average_keep * first.visual_tokens,
        kept_tokens=first.kept_tokens,
        text_tokens=first.text_tokens,
        load=Load(
            open_ms=measured.subject.open_ms,
            graphs_ms=measured.subject.graphs_ms,
            first_answer_ms=measured.first.answer_ms,
            first_ttft_ms=measured.first.ttft_ms,
        ),
        ttft_ms=distribution([answer.ttft_ms for answer in answers]),
        prefill_ms=distribution([answer.statistics.prefill_ms for answer in answers]),
        token_ms=_of_runs([answer.token_ms for answer in answers]) if token_ms else None,
        tokens_per_s=1e3 / statistics.median(token_ms) if token_ms else None,
        answer_ms=distribution([answer.answer_ms for answer in answers]),
        host_first_ms=distribution([answer.host_first_ms for answer in answers]),
        host_token_ms=_host_token_ms(measured),
        graphs=_graph_profiles(measured, measurement.ceilings),
        decode=tuple(
            DecodeStep(context=one.context, cached_rows=one.cached_rows, ms=distribution(one.milliseconds))
            for one in measured.contexts
        ),
        decode_fit=line_fit(
            [one.cached_rows for one in measured.contexts],
            [one.milliseconds for one in measured.contexts],
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


def _selection(manifest: Manifest) -> str:
    """Return what is removed where, in words."""
    parts = []
    if manifest.encoder_keep is not None:
        parts.append(f"vision graph keeps {manifest.encoder_keep}")
    if manifest.token_method is not None:
        parts.append(f"{manifest.token_method} keeps {manifest.token_keep} before the decoder")
    if manifest.schedule.stages:
        stages = ", ".join(f"{stage.keep} at layer {stage.layer}" for stage in manifest.schedule.stages)
        parts.append(f"{manifest.schedule.method} keeps {stages}")
    return "; ".join(parts) or "keeps all visual tokens"


def _of_runs(runs: Sequence[Sequence[float]]) -> Distribution:
    """Return the distribution of what was timed several times in each run, equally often or each on its own account."""
    counts = {len(times) for times in runs}
    return distribution(
        [time for times in runs for time in times], per_run=counts.pop() if len(counts) == 1 else 1
    )


def _host_token_ms(measured: Measured) -> float | None:
    found = [time for answer in measured.answers if (time := answer.host_token_ms) is not None]
    return statistics.median(found) if found else None


def _graph_profiles(measured: Measured, ceilings: Ceilings | None) -> tuple[GraphProfile, ...]:
    """Return each graph in each profile that ran, in the order of the manifest, prefill first."""
    manifest = measured.subject.bundle.manifest
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


def _answers_with(measured: Measured, graph: str, profile: str) -> list[list[float]]:
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
    call_ms = _of_runs(answers)
    in_answer = statistics.median(sum(calls) for calls in answers)
    work = graph_work(manifest, spec, profile)
    flops, moved = work.flops, work.moved_bytes
    verdict = None
    if ceilings is not None and call_ms.p50 > 0:
        verdict = judge(flops=flops, moved_bytes=moved, milliseconds=call_ms.p50, ceilings=ceilings)
    return GraphProfile(
        name=spec.name,
        role=spec.role,
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


def _memory(measured: Measured, *, before_all: int | None) -> Memory:
    """Return the memory of one bundle, as if no other were loaded.

    Args:
        measured: The bundle.
        before_all: Of the process before the first bundle was loaded.
    """
    seen, manifest = measured.memory, measured.subject.bundle.manifest
    added = _growth(seen.before, seen.peak)
    peak = None if added is None or before_all is None else before_all + added
    weights = seen.planned.get("weights", sum(graph.weight_bytes for graph in manifest.graphs))
    buffers, workspace = (seen.planned.get(name, 0) for name in ("buffers", "workspace"))
    on_device = weights + manifest.kv_bytes + buffers + workspace
    other = peak
    if peak is not None and seen.device_free is None:
        other = max(0, peak - on_device)
    return Memory(
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
    measured: Measured, reference: Measured, *, profile: BundleProfile, against: BundleProfile
) -> Comparison:
    pairs = {
        "ttft_ms": [[answer.ttft_ms for answer in one.answers] for one in (measured, reference)],
        "prefill_ms": [
            [answer.statistics.prefill_ms for answer in one.answers] for one in (measured, reference)
        ],
        "answer_ms": [[answer.answer_ms for answer in one.answers] for one in (measured, reference)],
    }
    if profile.token_ms is not None and against.token_ms is not None:
        pairs["token_ms"] = [
            [statistics.fmean(answer.token_ms) for answer in one.answers] for one in (measured, reference)
        ]
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
        ratios={name: median_ratio(values, base) for name, (values, base) in pairs.items()},
        sizes=sizes,
    )
