"""A whole calibration, from options to the content of ``calibration.json``."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from trio_edge.calibration.model.prompts import sample_shape
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.quantize.calibrating import calibrate_quantization
from trio_edge.calibration.quantize.quantized_model import measure_quantized
from trio_edge.calibration.quantize.rounding import check_modelopt
from trio_edge.calibration.search.bundle_shape import (
    bundle_shape,
    memory_warning,
    prefill_cost,
    rounds_with_margin,
)
from trio_edge.calibration.search.calibration_file import (
    SCHEMA_VERSION,
    Calibration,
    CalibrationData,
    FrontPoint,
    Shapes,
    SingleStage,
)
from trio_edge.calibration.search.held_out import accuracy, fidelity
from trio_edge.calibration.search.measuring import Measurements, RecordKey, opened_record
from trio_edge.calibration.search.samples import read_samples, split_samples
from trio_edge.calibration.search.schedules.candidates import cheapest_within
from trio_edge.calibration.search.schedules.search import Setup, search
from trio_edge.calibration.search.schedules.space import (
    average_keep,
    make_space,
    stages_of,
    usual_schedules,
    with_stages,
)
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.profiling.predict.speed import fitted_for
from trio_edge.runtime.bundle.errors import DataError, TargetError
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost.devices import find_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trio_edge.calibration.model.prompts import SampleShape
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.progress import StepProgress
    from trio_edge.calibration.quantize.report import QuantizationReport
    from trio_edge.calibration.questions import Question
    from trio_edge.calibration.search.calibration_file import Fidelity
    from trio_edge.calibration.search.options import CalibrationOptions
    from trio_edge.export.quantize.plan import QuantizePlan

_PACKAGES = ("trio-edge", "torch", "transformers", "numpy", "pillow", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """The result of a calibration, with what the export needs."""

    calibration: Calibration
    scales: CalibratedScales = field(default_factory=CalibratedScales)


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
    with _measurements(setup, work) as measurements:
        found = search(setup, measurements)
        schedule = cheapest_within(found.candidates, options.max_kl).schedule
        usual = _usual(setup, schedule)
        points = _points(setup, measurements, [*(one.schedule for one in found.front), schedule, *usual])
        rounds = measurements.most_rounds(schedule)
    held_out = points[schedule].held_out
    _warn_above(options.max_kl, held_out, progress, way_out="give more samples, or a smaller bound")
    progress.step("answering held-out samples", len(split.held_out))
    scores = accuracy(setup.model, split.held_out, schedule, on_sample=progress.sample)
    quantized = _quantize(setup, schedule)
    rounds, whole = max(rounds, quantized.rounds), setup.cost.of_stages([])
    calibration = Calibration(
        schema_version=SCHEMA_VERSION,
        options=options,
        data=_data(setup),
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
        quantization=quantized.report,
        quantized_held_out=quantized.held_out,
        front=[points[one.schedule] for one in found.front],
        settings=found.tried,
        single_stages=[
            SingleStage(layer=layer, keep=keep, kl=kl) for (layer, keep), kl in found.single.items()
        ],
        num_measured=len(found.candidates),
        revision=setup.model.checkpoint.revision,
        compute_dtype=str(setup.model.dtype).removeprefix("torch."),
        versions={"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    )
    return Calibrated(calibration=calibration, scales=quantized.scales)


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
    samples = [_looked_at(model, question, progress) for question in questions]
    shape = bundle_shape(model, samples, dtype=options.dtype, max_new_tokens=options.max_new_tokens)
    space = make_space(
        num_layers=model.num_layers,
        num_visual=shape.num_visual,
        layers=options.layers,
        keeps=options.keeps,
        max_stages=options.max_stages,
    )
    cost = prefill_cost(model, shape, samples, target=options.target)
    setup = Setup(
        options=options,
        plan=plan,
        split=split,
        digest=digest,
        model=replace(model, most_visual=shape.num_visual),
        samples=samples,
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
        check_modelopt()
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


@contextmanager
def _measurements(setup: Setup, work: Path | None) -> Iterator[Measurements]:
    """Yield the measurements, stored in ``work`` or a temporary folder."""
    key = RecordKey(
        model=setup.options.model,
        weights=_weights_digest(setup.model),
        samples_sha256=setup.digest,
        answer_tokens=setup.options.answer_tokens,
        dtype=str(setup.model.dtype),
        max_visual=setup.shape.num_visual,
    )
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trio-calibrate-")))
        record, known = stack.enter_context(opened_record(folder, key))
        yield Measurements(
            setup.model,
            num_tokens=setup.options.answer_tokens,
            record=record,
            known=known,
            on_sample=setup.progress.sample,
        )


def _usual(setup: Setup, schedule: Schedule) -> list[Schedule]:
    """Return ``trio-export``'s default schedule of the same average keep, if there is one."""
    defaults = Schedule(positions=setup.model.positions[0])
    return usual_schedules(setup.space, defaults, [average_keep(stages_of(schedule), setup.space)])


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
            average_keep=average_keep(stages_of(schedule), setup.space),
            search=fidelity(searched[schedule], split.search),
            held_out=fidelity(held_out[schedule], split.held_out),
        )
        for schedule, cost in costs.items()
    }


@dataclass(frozen=True, kw_only=True)
class _Quantized:
    """A calibrated quantization; empty if the plan needs none."""

    report: QuantizationReport | None = None
    scales: CalibratedScales = field(default_factory=CalibratedScales)
    held_out: Fidelity | None = None
    rounds: int = 0
    """Most NMS rounds on a held-out sample."""


def _quantize(setup: Setup, schedule: Schedule) -> _Quantized:
    split, progress = setup.split, setup.progress
    found = calibrate_quantization(
        setup.model,
        split.search,
        schedule,
        setup.plan,
        dtype=setup.shape.dtype,
        num_tokens=setup.options.answer_tokens,
        on_step=progress.step,
        on_one=progress.sample,
    )
    if found is None:
        return _Quantized()
    progress.step("measuring the quantized layers", len(split.held_out))
    results = measure_quantized(
        setup.model,
        split.held_out,
        schedule,
        setup.plan,
        found.scales,
        dtype=setup.shape.dtype,
        num_tokens=setup.options.answer_tokens,
        on_sample=progress.sample,
    )
    held_out = fidelity(results, split.held_out)
    _warn_above(
        setup.options.max_kl,
        held_out,
        progress,
        what=f" with --quantize {setup.options.quantize}",
        way_out="quantize fewer parts, or give a smaller bound",
    )
    rounds = max(result.rounds for result in results)
    return _Quantized(report=found.report, scales=found.scales, held_out=held_out, rounds=rounds)


def _warn_above(
    max_kl: float, held_out: Fidelity, progress: StepProgress, *, way_out: str, what: str = ""
) -> None:
    if held_out.kl.value > max_kl:
        progress.warn(
            f"the held-out KL{what} is {held_out.kl.value:.3g}, above --max-kl {max_kl:g}; {way_out}"
        )


def _looked_at(model: TorchModel, question: Question, progress: StepProgress) -> SampleShape:
    shape = sample_shape(model, question)
    if shape.sizes["N"] < 2:
        raise DataError(
            f"{question.where}: expected an image of at least 2 visual tokens, got {shape.sizes['N']}; leave it out"
        )
    progress.sample()
    return shape


def _digest(questions: Sequence[Question]) -> str:
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


def _data(setup: Setup) -> CalibrationData:
    questions = [*setup.split.search, *setup.split.held_out]
    visual = [sample.sizes["N"] for sample in setup.samples]
    text = [sample.num_text for sample in setup.samples]
    return CalibrationData(
        sha256=setup.digest,
        samples=len(questions),
        search=len(setup.split.search),
        held_out=len(setup.split.held_out),
        pictures=len({question.image_id for question in questions}),
        num_visual=(min(visual), max(visual)),
        num_text=(min(text), max(text)),
    )
