"""A whole calibration, from options to ``calibration.json``'s content and the pictures for the page."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from trio_edge.calibration.model.greedy import greedy_answer
from trio_edge.calibration.model.prompts import make_prompt, read_picture, sample_shape
from trio_edge.calibration.model.selecting import Probes
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.quantize.calibrating import calibrate_quantization
from trio_edge.calibration.quantize.fidelity import measure_quantized
from trio_edge.calibration.quantize.modelopt_search import check_modelopt
from trio_edge.calibration.search.bundle_shape import bundle_shape, memory_warning, prefill_cost
from trio_edge.calibration.search.candidates import Searching
from trio_edge.calibration.search.fixed_shapes import rounds_with_margin
from trio_edge.calibration.search.held_out import accuracy, fidelity
from trio_edge.calibration.search.measure.importance import mean_importance
from trio_edge.calibration.search.measure.measurements import Measurements
from trio_edge.calibration.search.measure.record import RecordKey, open_record
from trio_edge.calibration.search.measure.samples import read_samples, split_samples
from trio_edge.calibration.search.report.calibration_file import (
    SCHEMA_VERSION,
    Calibration,
    Data,
    FrontPoint,
    Options,
    Shapes,
    SingleStage,
)
from trio_edge.calibration.search.search import search
from trio_edge.calibration.search.space import make_space, usual_schedules, with_stages
from trio_edge.calibration.search.wish import DEFAULT_MAX_KL, Wish, average_keep, stages_of
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.profiling.predict.efficiency import fitted_for
from trio_edge.runtime.bundle.errors import DataError, TargetError
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.runtime.images.overlay import draw_kept
from trio_edge.trio.cost.devices import find_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image

    from trio_edge.calibration.evaluate.questions import Question
    from trio_edge.calibration.model.prompts import SampleShape
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.search.candidates import Candidate
    from trio_edge.calibration.search.measure.measuring import Measured
    from trio_edge.calibration.search.measure.samples import Split
    from trio_edge.calibration.search.prefill_cost import PrefillCost
    from trio_edge.calibration.search.report.calibration_file import Fidelity
    from trio_edge.calibration.search.space import Space

NUM_OVERLAYS = 3
"""Held-out pictures that the page shows."""
_PACKAGES = ("trio-edge", "torch", "transformers", "numpy", "pillow", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Callbacks for a progress display."""

    step: Callable[[str, int], None] = lambda _text, _samples: None
    """Called with what begins and how many samples it has."""
    sample: Callable[[], None] = lambda: None
    """Called after each of them."""
    warn: Callable[[str], None] = lambda _text: None
    """Called with one line that the user should read; the calibration goes on."""


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """A held-out picture with what each stage keeps of it."""

    sheet: Image.Image
    question: str
    keep_all: str
    """Answer without reduction."""
    chosen: str
    """Answer with the chosen schedule."""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What a calibration gives."""

    calibration: Calibration
    overlays: list[Overlay]
    scales: CalibratedScales = field(default_factory=CalibratedScales)
    """For the export of quantized layers."""


def calibrate(
    options: Options,
    *,
    work: Path | None = None,
    samples_sha256: str | None = None,
    progress: Progress = Progress(),
) -> Calibrated:
    """Return the calibration that ``options`` describe.

    Args:
        options: What to do.
        work: Folder of measurements, so that an interrupted calibration goes on; none for one that is thrown away.
        samples_sha256: Of the samples that are expected; others are warned of.
        progress: Callbacks for a progress display.

    Raises:
        TargetError: If the target is not known, or has not a format of the plan.
        DataError: If samples are missing, unreadable or do not fit the model.
        CheckpointError: If the checkpoint cannot be read or exported.
        ScheduleError: If no schedule can do what is asked for; the message names the nearest that can.
    """
    plan = parse_plan(options.quantize)
    refusal = find_device(options.target).refusal(plan.formats)
    if refusal is not None:
        raise TargetError(refusal)
    if plan.has_factors:
        check_modelopt()
    progress.step("reading the samples", 0)
    questions = read_samples(options.samples, prompt=options.prompt, count=options.count, seed=options.seed)
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
    wish = wish_of(options)
    wish.check(space, cost)
    kind = wish.kind(options.cost, space, cost)
    if kind == "flops" and options.cost == "auto":
        progress.warn(
            f"no schedule is predicted to be faster than keep-all on {cost.target.name}: what a selection launches takes"
            " longer than the layers save; schedules are compared by FLOPs instead"
        )
    smallest = with_stages(Schedule(), [(space.layers[0], space.keeps[-1])])
    warning = memory_warning(model, shape, smallest, target=options.target, quantize=plan)
    if warning is not None:
        progress.warn(f"even with the smallest schedule: {warning}")

    probes = Probes(model, max_visual=shape.num_visual)
    key = RecordKey(
        model=options.model,
        weights=_weights_digest(model),
        samples_sha256=digest,
        answer_tokens=options.answer_tokens,
        dtype=str(model.dtype),
        max_visual=shape.num_visual,
    )
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trio-calibrate-")))
        record, known = open_record(folder, key)
        stack.callback(record.close)
        measurements = Measurements(
            model,
            probes=probes,
            num_tokens=options.answer_tokens,
            record=record,
            known=known,
            on_sample=progress.sample,
        )
        progress.step("importance of layers", len(split.search))
        layers = mean_importance(measurements.importance(split.search))
        found = search(
            Searching(
                space=space,
                measurements=measurements,
                questions=split.search,
                cost=cost,
                kind=kind,
                positions=model.positions,
                thresholds=options.nms_thresholds,
                evaluations=options.evaluations,
                on_step=lambda text: progress.step(text, len(split.search)),
            ),
            wish,
        )
        chosen = wish.choice(found.candidates, space)
        if chosen is None:
            raise AssertionError(
                "expected a candidate that the wish allows: it was checked before the search"
            )
        reporting = _Reporting(
            space, cost, measurements, split, Schedule(positions=model.positions[0]), progress
        )
        front, chosen_point, usual, held_out = reporting.points(found.front, chosen)
    _warn_above(
        wish, chosen_point.held_out, progress, what="", way_out="give more samples, or a smaller bound"
    )
    progress.step("answering held-out samples", len(split.held_out))
    scores = accuracy(model, split.held_out, chosen.schedule, probes=probes, on_sample=progress.sample)
    rounds = max(result.rounds for result in (*chosen.results, *held_out))
    quantized = calibrate_quantization(
        model,
        split.search,
        chosen.schedule,
        plan,
        dtype=shape.dtype,
        probes=probes,
        num_tokens=options.answer_tokens,
        on_step=progress.step,
        on_one=progress.sample,
    )
    quantized_held_out = None
    if quantized is not None:
        progress.step("measuring the quantized layers", len(split.held_out))
        results = measure_quantized(
            model,
            split.held_out,
            chosen.schedule,
            plan,
            quantized.scales,
            dtype=shape.dtype,
            probes=probes,
            num_tokens=options.answer_tokens,
            on_sample=progress.sample,
        )
        quantized_held_out = fidelity(results, split.held_out)
        _warn_above(
            wish,
            quantized_held_out,
            progress,
            what=f" with --quantize {options.quantize}",
            way_out="quantize fewer parts, or give a smaller bound",
        )
        rounds = max(rounds, *(result.rounds for result in results))
    calibration = Calibration(
        schema_version=SCHEMA_VERSION,
        options=options,
        data=_data(questions, split, samples, digest),
        rule=wish.text(kind),
        schedule=msgspec.structs.replace(chosen.schedule, nms_rounds=rounds_with_margin(rounds)),
        shapes=Shapes(image_sizes=shape.image_sizes, text_buckets=shape.text_buckets, largest_rounds=rounds),
        chosen=chosen_point,
        usual=usual,
        compared_by=kind,
        keep_all_ms=cost.of_stages([]).milliseconds,
        keep_all_flops=cost.of_stages([]).flops,
        prediction=fitted_for(cost.target).sentence(cost.target.name),
        accuracy=scores,
        quantization=None if quantized is None else quantized.report,
        quantized_held_out=quantized_held_out,
        front=front,
        settings=found.tried,
        single_stages=[
            SingleStage(layer=layer, keep=keep, kl=kl) for (layer, keep), kl in found.single.items()
        ],
        importance=layers,
        num_measured=len(found.candidates),
        revision=model.checkpoint.revision,
        compute_dtype=str(model.dtype).removeprefix("torch."),
        versions={"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    )
    progress.step("drawing", 0)
    return Calibrated(
        calibration=calibration,
        overlays=_overlays(model, split.held_out, chosen.schedule, probes),
        scales=CalibratedScales() if quantized is None else quantized.scales,
    )


def wish_of(options: Options) -> Wish:
    """Return the rule that the options choose by."""
    if options.target_ms is not None:
        return Wish(rule="target_ms", bound=options.target_ms)
    if options.keep is not None:
        return Wish(rule="keep", bound=options.keep)
    return Wish(rule="max_kl", bound=DEFAULT_MAX_KL if options.max_kl is None else options.max_kl)


@dataclass(frozen=True)
class _Reporting:
    """Looks at the held-out samples, once."""

    space: Space
    cost: PrefillCost
    measurements: Measurements
    split: Split
    usual_settings: Schedule
    """``trio-export``'s own."""
    progress: Progress

    def points(
        self, front: list[Candidate], chosen: Candidate
    ) -> tuple[list[FrontPoint], FrontPoint, FrontPoint | None, list[Measured]]:
        """Return the front, the chosen point, the usual schedule's, and the chosen one's held-out results."""
        average = average_keep(stages_of(chosen), self.space)
        usual = usual_schedules(self.space, self.usual_settings, [average])
        schedules = [*(candidate.schedule for candidate in front), chosen.schedule, *usual]
        schedules = list(dict.fromkeys(schedules))
        self.progress.step("measuring on held-out samples", len(self.split.held_out))
        held_out = self.measurements.of(schedules, self.split.held_out)
        self.progress.step("comparing with the usual schedule", len(self.split.search))
        searched = self.measurements.of(schedules, self.split.search)

        def point(schedule: Schedule) -> FrontPoint:
            stages = tuple((stage.layer, stage.keep) for stage in schedule.stages)
            cost = self.cost.of(schedule)
            return FrontPoint(
                stages=stages,
                first_token_ms=cost.milliseconds,
                flops=cost.flops,
                average_keep=average_keep(stages, self.space),
                search=fidelity(searched[schedule], self.split.search),
                held_out=fidelity(held_out[schedule], self.split.held_out),
            )

        return (
            [point(candidate.schedule) for candidate in front],
            point(chosen.schedule),
            point(usual[0]) if usual else None,
            held_out[chosen.schedule],
        )


def _warn_above(wish: Wish, held_out: Fidelity, progress: Progress, *, what: str, way_out: str) -> None:
    if wish.rule == "max_kl" and held_out.kl.value > wish.bound:
        progress.warn(
            f"the held-out KL{what} is {held_out.kl.value:.3g}, above --max-kl {wish.bound:g}; {way_out}"
        )


def _looked_at(model: TorchModel, question: Question, progress: Progress) -> SampleShape:
    shape = sample_shape(model, question)
    if shape.sizes["N"] < 2:
        raise DataError(
            f"{question.where}: expected a picture of 2 or more visual tokens, got {shape.sizes['N']}; leave it out"
        )
    progress.sample()
    return shape


def _digest(questions: Sequence[Question]) -> str:
    """Return the SHA-256 of what is asked about which pictures."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.picture_id, question.question, question.answers]).encode())
    return digest.hexdigest()


def _weights_digest(model: TorchModel) -> str:
    """Return a digest that other weights of the same name would change; contents are not read."""
    digest = hashlib.sha256()
    for file in sorted({tensor.file for tensor in model.checkpoint.tensors.values()}):
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()


def _data(questions: Sequence[Question], split: Split, samples: Sequence[SampleShape], digest: str) -> Data:
    visual = [sample.sizes["N"] for sample in samples]
    text = [sample.num_text for sample in samples]
    return Data(
        sha256=digest,
        samples=len(questions),
        search=len(split.search),
        held_out=len(split.held_out),
        pictures=len({question.picture_id for question in questions}),
        num_visual=(min(visual), max(visual)),
        num_text=(min(text), max(text)),
    )


def _overlays(
    model: TorchModel, questions: Sequence[Question], schedule: Schedule, probes: Probes
) -> list[Overlay]:
    overlays = []
    first_of_picture = {question.picture_id: question for question in reversed(questions)}
    for question in sorted(first_of_picture.values(), key=lambda item: item.index)[:NUM_OVERLAYS]:
        picture = read_picture(question)
        with torch.inference_mode():
            prompt = make_prompt(model, question)
            whole, reduced = (
                greedy_answer(model, prompt, each, probes=probes, max_tokens=16)
                for each in (Schedule(positions=schedule.positions), schedule)
            )
        sheet = draw_kept(
            picture,
            model.pictures.boxes(*picture.size, None),
            [kept.cpu().numpy() for kept in reduced.kept],
            captions=[f"layer {stage.layer}" for stage in schedule.stages],
            overview=model.pictures.overview_tokens(*picture.size),
        )
        overlays.append(
            Overlay(
                sheet=sheet,
                question=question.question,
                keep_all=model.tokenizer.decode(whole.tokens),
                chosen=model.tokenizer.decode(reduced.tokens),
            )
        )
    return overlays
