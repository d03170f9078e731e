"""Measures one or several bundles: loads them, warms them up, lets them answer in turns, and keeps what was seen.

Bundles take turns (A B A B), so whatever disturbs the machine disturbs all of them, and their runs can be paired.
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trio_edge.profiling.measure.answers import Answer, Question, Subject
from trio_edge.profiling.measure.ceilings import measure_ceilings
from trio_edge.profiling.measure.contexts import TimedContext, time_contexts
from trio_edge.profiling.measure.layers.interface import layer_times
from trio_edge.profiling.measure.layers.onnxruntime import runs_of_trace
from trio_edge.profiling.measure.layers.tensorrt import runs_of_engine
from trio_edge.profiling.measure.machine_info import find_device
from trio_edge.profiling.measure.process_memory import peak_bytes, reset_peak, resident_bytes
from trio_edge.profiling.measure.sensors.interface import open_sensors
from trio_edge.profiling.measure.sensors.sampling_thread import Sample, SamplingThread
from trio_edge.profiling.page.pictures import PROMPT, PictureSize, picture_sizes, random_picture
from trio_edge.profiling.statistics import distribution
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.errors import BackendError, ShapeError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.images.reading import open_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from PIL import Image

    from trio_edge.profiling.report.profile import Ceilings, LayerTime

NARROW = 0.02
"""Width of the median's 95 % interval, as a share of the median, at which a time is known well enough."""
NEW_TOKENS = 16
LEAST_RUNS = 10
MOST_RUNS = 500
_SIZE_RUNS = 6
_MOST_SIZES = 5
_STEP_RUNS = 10
_LAYER_RUNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured, and how long."""

    bundles: tuple[Path, ...]
    """The first is the reference of comparisons."""
    backend: str = "auto"
    threads: int = 0
    image: Path | None = None
    """None for random pixels that give as many visual tokens as the first bundle takes."""
    prompt: str | None = None
    new_tokens: int | None = None
    """Of each answer; None for ``NEW_TOKENS``, or fewer where a bundle has no room for as many."""
    runs: int | None = None
    """Of each bundle; None for as many as make the medians narrow."""
    warm_up: int = 3
    seconds: float = 30.0
    """After which no new round begins, unless ``runs`` says how many."""
    layers: bool = True
    """Whether layers are timed too, in runs of their own."""


@dataclass(slots=True, kw_only=True)
class MeasuredMemory:
    """Of the process and of the GPU, while one bundle was loaded and answered its first questions; in bytes."""

    planned: dict[str, int] = field(default_factory=dict)
    """What the backend says that its memory is for."""
    before: int | None = None
    loaded: int | None = None
    peak: int | None = None
    device_free: int | None = None


@dataclass(slots=True, kw_only=True)
class Measured:
    """What was seen of one bundle."""

    subject: Subject
    first: Answer
    """Before any warm-up."""
    memory: MeasuredMemory
    answers: list[Answer] = field(default_factory=list)
    sizes: list[tuple[PictureSize, list[Answer]]] = field(default_factory=list)
    contexts: list[TimedContext] = field(default_factory=list)
    steps: list[Answer] = field(default_factory=list)
    """Runs without capture, where decode steps are captured otherwise."""
    layers: list[LayerTime] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was seen of all bundles."""

    question: Question
    picture: str
    """In words."""
    backend_name: str
    clock: str
    """What graphs were timed with."""
    measured: tuple[Measured, ...]
    ceilings: Ceilings | None
    samples: list[Sample]
    sensors: tuple[str, ...]
    missing: tuple[str, ...]
    stopped: str


def measure(options: Options, *, on_step: Callable[[str], None] = lambda _step: None) -> Measurement:
    """Measure all bundles of ``options``.

    Args:
        options: What to measure.
        on_step: Told what is done next.

    Raises:
        TrioEdgeError: If a bundle cannot be opened, loaded or asked.
    """
    num_new, missing = _num_new(options), list[str]()
    if options.image is not None:
        open_image(options.image)
    with ExitStack() as stack:
        sensors, lacking = open_sensors()
        missing += lacking
        sampling = stack.enter_context(SamplingThread(sensors))
        on_step("measuring what the machine reaches")
        ceilings = _ceilings(options, missing)
        measured: list[Measured] = []
        question, picture = None, ""
        for folder in options.bundles:
            on_step(f"loading {folder}")
            subject, memory = _load(folder, options, stack)
            if question is None:
                question, picture = _question(options, subject, num_new=num_new)
            measured.append(_begin(subject, memory, question, options))
        assert question is not None  # there is at least one bundle
        stopped = _rounds(measured, question, options, on_step)
        if options.image is None:
            on_step("pictures of other sizes")
            _measure_sizes(measured, question)
        if question.new_tokens > 1:
            on_step("tokens at contexts of all lengths")
            timed = time_contexts([one.subject for one in measured], question, seconds=options.seconds)
            for one, contexts in zip(measured, timed):
                one.contexts = contexts
    missing += sampling.lost
    for one in measured:
        if options.layers:
            on_step(f"layers: {one.subject.bundle.folder}")
            one.layers = _measure_layers(one, question, options)
        if one.subject.recording.captured:
            on_step(f"decode steps one by one: {one.subject.bundle.folder}")
            _measure_steps(one, question, options)
    return Measurement(
        question=question,
        picture=picture,
        backend_name=measured[0].subject.pipeline.backend_name,
        clock="the host" if measured[0].memory.device_free is None else "events of the GPU",
        measured=tuple(measured),
        ceilings=ceilings,
        samples=sampling.samples,
        sensors=tuple(sensor.name for sensor in sensors),
        missing=tuple(missing),
        stopped=stopped,
    )


def _ceilings(options: Options, missing: list[str]) -> Ceilings | None:
    bundle = open_bundle(options.bundles[0])
    backend = make_backend(options.backend, bundle=bundle, threads=options.threads)
    try:
        return measure_ceilings(backend, bundle.manifest, cores=options.threads or find_device().cores)
    except BackendError as error:
        missing.append(f"roofline: {error}")
        return None


def _load(folder: Path, options: Options, stack: ExitStack) -> tuple[Subject, MeasuredMemory]:
    memory = MeasuredMemory(before=resident_bytes())
    backend = make_backend(options.backend, bundle=open_bundle(folder), threads=options.threads)
    subject = Subject(folder, backend)
    stack.callback(subject.close)
    memory.loaded = resident_bytes()
    memory.planned = dict(subject.recording.memory)
    return subject, memory


def _question(options: Options, subject: Subject, *, num_new: int) -> tuple[Question, str]:
    picture: Path | Image.Image
    if options.image is not None:
        picture, text = options.image, options.image.name
    else:
        size = picture_sizes(subject.pipeline)[0]
        picture, text = random_picture(size), f"{size.width}x{size.height} random pixels"
    prompt = PROMPT if options.prompt is None else options.prompt
    return Question(picture=picture, prompt=prompt, new_tokens=num_new), text


def _num_new(options: Options) -> int:
    room = {folder: open_bundle(folder).manifest.max_new_tokens for folder in options.bundles}
    least = min(room, key=lambda folder: room[folder])
    if options.new_tokens is None:
        return min(NEW_TOKENS, room[least])
    if options.new_tokens > room[least]:
        raise ShapeError(
            f"--new-tokens: expected at most {room[least]}, the room of {least}, got {options.new_tokens};"
            " ask for fewer or export with a larger --max-new-tokens"
        )
    return options.new_tokens


def _begin(subject: Subject, memory: MeasuredMemory, question: Question, options: Options) -> Measured:
    """Ask for the first answers; what they take of memory is this bundle's, for no other has run since its loading."""
    reset_peak()
    try:
        first = subject.answer(question)
    except ShapeError as error:  # several bundles are asked the same
        raise ShapeError(f"{subject.bundle.folder}: {error}") from None
    for _ in range(options.warm_up):
        subject.answer(question)
    memory.peak = peak_bytes()
    memory.device_free = subject.recording.free_bytes()
    return Measured(subject=subject, first=first, memory=memory)


def _rounds(
    measured: Sequence[Measured], question: Question, options: Options, on_step: Callable[[str], None]
) -> str:
    """Let all bundles answer in turns until their medians are known, and return why it ended."""
    end = time.perf_counter() + options.seconds
    most = MOST_RUNS if options.runs is None else options.runs
    for number in range(most):
        if options.runs is None and number >= LEAST_RUNS:
            if all(_is_narrow(one.answers) for one in measured):
                return f"medians known to {100 * NARROW:.0f} %"
            if time.perf_counter() > end:
                return f"{options.seconds:.0f} s were over"
        on_step(f"run {number + 1}")
        for one in measured:
            one.answers.append(one.subject.answer(question))
    return f"{most} runs"


def _is_narrow(answers: Sequence[Answer]) -> bool:
    first = distribution([answer.ttft_ms for answer in answers])
    whole = distribution([answer.answer_ms for answer in answers])
    return max(first.relative_width, whole.relative_width) <= NARROW


def _measure_sizes(measured: Sequence[Measured], question: Question) -> None:
    """Measure the time to the first token of smaller pictures too, where a bundle has shapes for them, all in turns."""
    turns: list[tuple[Subject, Question, list[Answer]]] = []
    for one in measured:
        sizes = picture_sizes(one.subject.pipeline)
        step = max(1, -(-len(sizes) // _MOST_SIZES))
        for size in sizes[::step]:
            one.sizes.append((size, []))
            asked = Question(picture=random_picture(size), prompt=question.prompt, new_tokens=1)
            turns.append((one.subject, asked, one.sizes[-1][1]))
    for subject, asked, _ in turns:
        subject.answer(asked)
    for _ in range(_SIZE_RUNS):
        for subject, asked, answers in turns:
            answers.append(subject.answer(asked))


def _measure_layers(measured: Measured, question: Question, options: Options) -> list[LayerTime]:
    """Time the layers of every graph in runs of their own: the backend's profiler slows them down."""
    bundle, name = measured.subject.bundle, measured.subject.pipeline.backend_name
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        backend = make_backend(name, bundle=bundle, threads=options.threads, layer_times=folder)
        with _closing(Subject(bundle.folder, backend, capture=False)) as subject:
            warm_up = subject.answer(question).calls
            calls = [call for _ in range(_LAYER_RUNS) for call in subject.answer(question).calls]
        layers = []
        for graph in dict.fromkeys(call.graph for call in calls):
            written = json.loads((folder / f"{graph}.json").read_bytes())
            runs = runs_of_trace(written) if isinstance(written, list) else runs_of_engine(written)
            profiles = [call.profile for call in calls if call.graph == graph]
            skipped = sum(call.graph == graph for call in warm_up)
            layers += layer_times(runs[skipped:], graph=graph, profiles=profiles, num_answers=_LAYER_RUNS)
    return layers


def _measure_steps(measured: Measured, question: Question, options: Options) -> None:
    """Time the graphs of decode steps that are captured as a whole otherwise."""
    folder = measured.subject.bundle.folder
    backend = make_backend(options.backend, bundle=measured.subject.bundle, threads=options.threads)
    with _closing(Subject(folder, backend, capture=False)) as subject:
        subject.answer(question)
        measured.steps = [subject.answer(question) for _ in range(_STEP_RUNS)]


@contextmanager
def _closing(subject: Subject) -> Iterator[Subject]:
    try:
        yield subject
    finally:
        subject.close()
