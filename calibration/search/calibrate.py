"""A whole calibration, from options to the content of ``calibration.json``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch

from trio_edge.calibration.metrics import METRICS, exact_normal
from trio_edge.calibration.model.gradients import agreements, whole_gradient
from trio_edge.calibration.model.greedy import divergence, greedy_answer, keep_all
from trio_edge.calibration.model.prompts import make_prompt, sample_shape
from trio_edge.calibration.model.ranges import float16_warning, listening_to_ranges
from trio_edge.calibration.model.sequence import saliency
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.quantize.calibrating import calibrate_quantization
from trio_edge.calibration.quantize.collecting import answer_samples
from trio_edge.calibration.quantize.quantized_model import measure_quantized
from trio_edge.calibration.quantize.rounding import modelopt
from trio_edge.calibration.search.bundle_shape import (
    bundle_shape,
    memory_warning,
    prefill_cost,
    rounds_with_margin,
)
from trio_edge.calibration.search.calibration_file import (
    SCHEMA_VERSION,
    Accuracy,
    Calibration,
    CalibrationData,
    Fidelity,
    FrontPoint,
    LayerAgreement,
    Measure,
    Shapes,
    SingleStage,
)
from trio_edge.calibration.search.measuring import RecordKey, opened_measurements
from trio_edge.calibration.search.samples import read_samples, split_samples
from trio_edge.calibration.search.schedules.search import Setup, cheapest_within, search
from trio_edge.calibration.search.schedules.space import make_space, stages_of, usual_schedules, with_stages
from trio_edge.export.plan import dimensions_of
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.profiling.measure.machine_info import find_versions
from trio_edge.profiling.predict.speed import fitted_for
from trio_edge.profiling.statistics import bootstrap_interval, paired_interval, score_interval
from trio_edge.runtime.bundle.errors import ScheduleError, TargetError
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost.devices import find_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from trio_edge.calibration.model.greedy import MeasuredSchedule
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.progress import StepProgress
    from trio_edge.calibration.quantize.calibrating import Quantized
    from trio_edge.calibration.questions import Sample
    from trio_edge.calibration.search.measuring import Measurements
    from trio_edge.calibration.search.options import CalibrationOptions
    from trio_edge.export.quantize.plan import QuantizePlan

MAX_ANSWER_TOKENS = 16
"""Tokens of an answer whose exact match is scored."""
_RANGE_SAMPLES = 4
"""Samples whose largest values are looked for: outliers are in the same few places of every prompt."""


class Calibrated(NamedTuple):
    """The result of a calibration, with what the export needs."""

    calibration: Calibration
    scales: CalibratedScales


def calibrate(
    options: CalibrationOptions,
    *,
    work: Path | None = None,
    samples_sha256: str | None = None,
    progress: StepProgress,
) -> Calibrated:
    """Return the calibration that ``options`` describe. Samples with another digest than ``samples_sha256`` give a warning.

    ``work`` is a folder for measurements, from which an interrupted calibration continues.

    Raises:
        TargetError: If the target is unknown, or lacks a format of the plan.
        DataError: If samples are missing, unreadable or do not fit the model.
        CheckpointError: If the checkpoint cannot be read or exported.
        ScheduleError: If no schedule can meet the options.
    """
    setup = _set_up(options, samples_sha256, progress)
    split = setup.split
    with opened_measurements(setup.model, _record_key(setup), work, progress) as measurements:
        found = search(setup, measurements)
        schedule = cheapest_within(found.candidates, options.max_kl).schedule
        # trio-export's default schedule of the same average keep, if there is one
        defaults = Schedule(positions=setup.model.positions[0])
        usual = usual_schedules(setup.space, defaults, [setup.space.average_keep(schedule)])
        points = _points(setup, measurements, [*(one.schedule for one in found.front), schedule, *usual])
        rounds = measurements.most_rounds(schedule)
    held_out = points[schedule].held_out
    _warn_above(options.max_kl, held_out, progress, way_out="give more samples, or a smaller bound")
    progress.step("answering held-out samples", len(split.held_out))
    scores = accuracy(setup.model, split.held_out, schedule, progress)
    quantized, quantized_held_out, quantized_rounds = _quantize(setup, schedule) or (None, None, 0)
    rounds, whole = max(rounds, quantized_rounds), setup.cost.of_stages([])
    gradients, whole_gradient_kl = _gradients(setup, schedule)
    calibration = Calibration(
        schema_version=SCHEMA_VERSION,
        options=options,
        data=setup.data,
        rule=f"the {'fastest' if setup.kind == 'time' else 'cheapest'} whose KL is at most {options.max_kl:g} nats"
        " with 95 % confidence",
        schedule=msgspec.structs.replace(schedule, nms_rounds=rounds_with_margin(rounds)),
        shapes=Shapes(
            image_sizes=setup.shape.image_sizes, text_buckets=setup.shape.text_buckets, largest_rounds=rounds
        ),
        chosen=points[schedule],
        usual=points[usual[0]] if usual else None,
        compared_by=setup.kind,
        keep_all_ms=whole.milliseconds,
        keep_all_flops=whole.flops,
        prediction=fitted_for(setup.cost.target).sentence(setup.cost.target.name),
        accuracy=scores,
        quantization=quantized.report if quantized else None,
        quantized_held_out=quantized_held_out,
        front=[points[one.schedule] for one in found.front],
        settings=found.tried,
        single_stages=[
            SingleStage(layer=layer, keep=keep, kl=kl) for (layer, keep), kl in found.single.items()
        ],
        largest_values=_largest_values(setup),
        gradients=gradients,
        whole_gradient=whole_gradient_kl,
        num_measured=len(found.candidates),
        revision=setup.model.checkpoint.revision,
        compute_dtype=str(setup.model.dtype).removeprefix("torch."),
        versions=find_versions() | {name: version(name) for name in ("torch", "transformers")},
    )
    return Calibrated(calibration, quantized.scales if quantized else CalibratedScales())


def _set_up(options: CalibrationOptions, samples_sha256: str | None, progress: StepProgress) -> Setup:
    plan = _checked_plan(options)
    progress.step("reading the samples", 0)
    questions = read_samples(options.samples, prompt=options.prompt, count=options.count)
    split = split_samples(questions, held_out=options.held_out, seed=options.seed)
    digest = _digest(questions)
    if samples_sha256 is not None and samples_sha256 != digest:
        progress.warn(
            f"--config: expected the samples {samples_sha256[:12]}… of that file, got {digest[:12]}…"
        )
    progress.step("reading the checkpoint", 0)
    model = load_model(
        options.model, revision=options.revision, max_visual=options.max_visual, device=options.device
    )
    progress.step("looking at the samples", len(questions))
    samples = []
    for question in questions:
        samples.append(sample_shape(model, question))
        progress.sample()
    visual, text = [one.sizes["N"] for one in samples], [one.num_text for one in samples]
    shape = bundle_shape(model, samples, dtype=options.dtype, max_new_tokens=options.max_new_tokens)
    linear_layers = dimensions_of(model.parts).linear_layers
    if linear_layers and options.gradients:
        raise ScheduleError(
            f"--gradients: expected a decoder whose layers all have full attention, got {len(linear_layers)} with linear"
            " attention; leave it out"
        )
    space = make_space(
        num_layers=model.num_layers,
        num_visual=shape.num_visual,
        layers=options.layers,
        keeps=options.keeps,
        max_stages=options.max_stages,
        linear_layers=linear_layers,
    )
    cost = prefill_cost(model, shape, samples, target=options.target)
    setup = Setup(
        options=options,
        plan=plan,
        split=split,
        data=CalibrationData(
            sha256=digest,
            samples=len(questions),
            search=len(split.search),
            held_out=len(split.held_out),
            images=len({question.image_id for question in questions}),
            num_visual=(min(visual), max(visual)),
            num_text=(min(text), max(text)),
        ),
        model=replace(model, most_visual=shape.num_visual),
        shape=shape,
        space=space,
        cost=cost,
        kind=cost.kind(options.cost, space),
        progress=progress,
    )
    _warn_before_measuring(setup)
    return setup


def _checked_plan(options: CalibrationOptions) -> QuantizePlan:
    """Return the formats to quantize to, after checking the target and that Model Optimizer is installed if it is needed."""
    plan = parse_plan(options.quantize)
    refusal = find_device(options.target).refusal(plan.formats)
    if refusal is not None:
        raise TargetError(refusal)
    if plan.has_factors:
        modelopt()
    return plan


def _warn_before_measuring(setup: Setup) -> None:
    if setup.kind == "flops" and setup.options.cost == "auto":
        setup.progress.warn(
            f"no schedule is predicted to be faster than keep-all on {setup.cost.target.name}: the selection takes"
            " longer than the layers save; schedules are compared by FLOPs instead"
        )
    smallest = with_stages(Schedule(), [(setup.space.layers[0], setup.space.keeps[-1])])
    warning = memory_warning(
        setup.model, setup.shape, smallest, target=setup.options.target, quantize=setup.plan
    )
    if warning is not None:
        setup.progress.warn(f"even with the smallest schedule: {warning}")


def _record_key(setup: Setup) -> RecordKey:
    return RecordKey(
        model=setup.options.model,
        weights=_weights_digest(setup.model),
        samples_sha256=setup.data.sha256,
        answer_tokens=setup.options.answer_tokens,
        dtype=str(setup.model.dtype),
        max_visual=setup.shape.num_visual,
    )


def _points(
    setup: Setup, measurements: Measurements, schedules: list[Schedule]
) -> dict[Schedule, FrontPoint]:
    """Return the figures of schedules on search and held-out samples."""
    split, schedules = setup.split, list(dict.fromkeys(schedules))
    setup.progress.step("measuring on held-out samples", len(split.held_out))
    held_out = measurements.of(schedules, split.held_out)
    setup.progress.step("comparing with the usual schedule", len(split.search))
    searched = measurements.of(schedules, split.search)
    costs = {schedule: setup.cost.of(schedule) for schedule in schedules}
    return {
        schedule: FrontPoint(
            stages=stages_of(schedule),
            first_token_ms=cost.milliseconds,
            flops=cost.flops,
            average_keep=setup.space.average_keep(schedule),
            search=fidelity(searched[schedule], split.search),
            held_out=fidelity(held_out[schedule], split.held_out),
        )
        for schedule, cost in costs.items()
    }


def _quantize(setup: Setup, schedule: Schedule) -> tuple[Quantized, Fidelity, int] | None:
    """Return the calibrated quantization, its fidelity on held-out samples and most NMS rounds; None if the plan needs none."""
    model, split, plan, progress = setup.model, setup.split, setup.plan, setup.progress
    settings: dict[str, Any] = {"dtype": setup.shape.dtype, "num_tokens": setup.options.answer_tokens}
    found = calibrate_quantization(model, split.search, schedule, plan, progress=progress, **settings)
    if found is None:
        return None
    progress.step("measuring the quantized layers", len(split.held_out))
    results = measure_quantized(
        model, split.held_out, schedule, plan, found.scales, progress=progress, **settings
    )
    held_out = fidelity(results, split.held_out)
    what, way_out = (
        f" with --quantize {setup.options.quantize}",
        "quantize fewer parts, or give a smaller bound",
    )
    _warn_above(setup.options.max_kl, held_out, progress, what=what, way_out=way_out)
    return found, held_out, max(result.rounds for result in results)


def _largest_values(setup: Setup) -> dict[str, float]:
    """Return the largest values on a few samples and warn of those above float16's range; empty if the bundle has another type."""
    if setup.shape.dtype != "float16":
        return {}
    model, samples, progress = setup.model, setup.split.search[:_RANGE_SAMPLES], setup.progress
    progress.step("looking for the largest values", len(samples))
    with listening_to_ranges(model) as largest:
        answer_samples(model, samples, Schedule(), num_tokens=setup.options.answer_tokens, progress=progress)
    if (warning := float16_warning(largest)) is not None:
        progress.warn(warning)
    return largest


def _gradients(setup: Setup, schedule: Schedule) -> tuple[list[LayerAgreement], Measure | None]:
    """Return by layer how well its saliency agrees with the whole model's gradient, and the KL of ``schedule`` by this one.

    The first search samples are looked at.
    """
    model, samples = setup.model, setup.split.search[: setup.options.gradients]
    if not samples:
        return [], None
    setup.progress.step("comparing saliency with the whole gradient", len(samples))
    found, changes = [], list[float]()
    for question in samples:
        with torch.no_grad():
            prompt = make_prompt(model, question)
            whole = keep_all(model, prompt, num_tokens=setup.options.answer_tokens)
            own, other = (
                greedy_answer(
                    model,
                    prompt,
                    schedule,
                    max_tokens=len(whole.tokens),
                    given=whole.tokens,
                    score=score,
                ).logits_TV
                for score in (saliency, whole_gradient)
            )
        one, two = (
            divergence(whole.log_probs_TV, whole.tokens, logits_TV, rounds=0) for logits_TV in (own, other)
        )
        changes.append(two.kl - one.kl)
        found.append(agreements(model, prompt, schedule))
        setup.progress.sample()
    images = [question.image_id for question in samples]
    by_layer = [
        LayerAgreement(
            layer=layer,
            spearman=_measure([one.spearman for one in of_layer], images),
            overlap=_measure([one.overlap for one in of_layer], images),
        )
        for layer, of_layer in enumerate(zip(*found))
    ]
    return by_layer, _measure(changes, images)


def _warn_above(
    max_kl: float, held_out: Fidelity, progress: StepProgress, *, way_out: str, what: str = ""
) -> None:
    kl = held_out.kl.value
    if kl > max_kl:
        progress.warn(f"the held-out KL{what} is {kl:.3g}, above --max-kl {max_kl:g}; {way_out}")


def _digest(questions: Sequence[Sample]) -> str:
    """Return the SHA-256 of all questions, images and answers."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.image_id, question.question, question.answers]).encode())
    return digest.hexdigest()


def _weights_digest(model: TorchModel) -> str:
    """Return a digest of the weight files' names, sizes and times."""
    digest = hashlib.sha256()
    for file in sorted({tensor.file for tensor in model.checkpoint.tensors.values()}):
        state = file.stat()  # reading 14 GB would take longer than a short calibration
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()


def fidelity(results: Sequence[MeasuredSchedule], questions: Sequence[Sample]) -> Fidelity:
    """Return mean divergence and agreement with their intervals, by bootstrap over images."""
    images = [question.image_id for question in questions]
    kls = [result.kl for result in results]
    return Fidelity(
        samples=len(results),
        kl=_measure(kls, images),
        agreement=_measure([float(result.agrees) for result in results], images, score_interval),
    )


def accuracy(
    model: TorchModel, questions: Sequence[Sample], schedule: Schedule, progress: StepProgress
) -> Accuracy | None:
    """Return the exact matches of keep-all and of ``schedule``; None if no sample has an answer."""
    with_answers = [question for question in questions if question.answers]
    if not with_answers:
        return None
    whole_scores, scores_of_chosen = list[float](), list[float]()
    for question in with_answers:
        with torch.inference_mode():
            prompt = make_prompt(model, question)
            for each, scores in ((Schedule(), whole_scores), (schedule, scores_of_chosen)):
                answer = greedy_answer(model, prompt, each, max_tokens=MAX_ANSWER_TOKENS)
                reading = exact_normal(model.tokenizer.decode(answer.tokens))
                scores.append(METRICS["exact"].score(reading, question))
        progress.sample()
    images = [question.image_id for question in with_answers]
    return Accuracy(
        samples=len(with_answers),
        keep_all=_measure(whole_scores, images, score_interval),
        chosen=_measure(scores_of_chosen, images, score_interval),
        difference=Measure(
            value=(sum(scores_of_chosen) - sum(whole_scores)) / len(images),
            interval_95=paired_interval(scores_of_chosen, whole_scores, images),
        ),
    )


def _measure(
    values: list[float],
    images: list[str],
    interval: Callable[[list[float], list[str]], tuple[float, float]] = bootstrap_interval,
) -> Measure:
    return Measure(value=sum(values) / len(values), interval_95=interval(values, images))
