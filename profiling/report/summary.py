"""Turns a measurement into its report."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import msgspec

from trio_edge.profiling.measure.layers import operator_times, slowest_layers
from trio_edge.profiling.measure.machine_info import find_machine, find_versions
from trio_edge.profiling.measure.sensors.sampling_thread import joules, sensor_ranges
from trio_edge.profiling.report.advice import advise
from trio_edge.profiling.report.graphs import graph_profiles
from trio_edge.profiling.report.profile import (
    SCHEMA_VERSION,
    BundleProfile,
    Comparison,
    DecodeStep,
    Load,
    MemoryProfile,
    ProfileConditions,
    ProfileReport,
    SizePoint,
)
from trio_edge.profiling.statistics import distribution, distribution_of_runs, line_fit, median_ratio
from trio_edge.runtime.bundle.manifest import MANIFEST_NAME
from trio_edge.runtime.bundle.reader import sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_edge.profiling.measure.answers import Answer
    from trio_edge.profiling.measure.measuring import MeasuredBundle, Measurement
    from trio_edge.runtime.bundle.manifest import Manifest


def report_of(measurement: Measurement, conditions: ProfileConditions) -> ProfileReport:
    """Return the report of ``measurement``.

    Args:
        measurement: All that was measured.
        conditions: How it was measured.
    """
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
    names = [measured.loaded.bundle.folder.resolve().name for measured in measurement.measured]
    return [name if names.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(names)]


def _bundle_profile(measured: MeasuredBundle, measurement: Measurement, *, label: str) -> BundleProfile:
    answers, bundle = measured.answers, measured.loaded.bundle
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


def _host_token_ms(measured: MeasuredBundle) -> float | None:
    found = [time for answer in measured.answers if (time := answer.host_token_ms) is not None]
    return statistics.median(found) if found else None


def _memory(measured: MeasuredBundle, *, before_all: int | None) -> MemoryProfile:
    """Return the memory of one bundle, as if no other were loaded.

    Args:
        measured: The bundle.
        before_all: Bytes of the process before the first bundle was loaded.
    """
    seen, manifest = measured.memory, measured.loaded.bundle.manifest
    added = _growth(seen.before, seen.peak)
    peak = None if added is None or before_all is None else before_all + added
    weights = seen.planned.get("weights", sum(graph.weight_bytes for graph in manifest.graphs))
    buffers, workspace = (seen.planned.get(name, 0) for name in ("buffers", "workspace"))
    on_device = weights + manifest.kv_bytes + buffers + workspace
    other = peak  # on a GPU nothing of the graphs lies in the process
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
