"""Measures one or several bundles: loads them, warms them up, and lets them answer in turns.

Bundles take turns (A B A B), so that disturbances affect all of them alike and their runs can be paired.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
from PIL import Image

from trio_edge.profiling.measure import machine_info
from trio_edge.profiling.measure.answers import Answer, LoadedBundle, RunQuestion
from trio_edge.profiling.measure.ceilings import Ceilings, measure_ceilings
from trio_edge.profiling.measure.layers import LayerTime, layer_runs, layer_times
from trio_edge.profiling.measure.sensors.sampling_thread import SamplingThread, SensorSample, open_sensors
from trio_edge.profiling.statistics import LEAST_FOR_INTERVAL, distribution
from trio_edge.runtime.backends.registry import make_backend, with_accuracy
from trio_edge.runtime.bundle.errors import BackendError, ShapeError, TrioEdgeError, printable
from trio_edge.runtime.bundle.reader import Bundle, open_bundle
from trio_edge.runtime.devices.machine import process_bytes
from trio_edge.runtime.images.reading import open_image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trio_edge.runtime.backends.interface import Backend
    from trio_edge.runtime.engines.cpu import CpuAccuracy
    from trio_edge.runtime.pipeline import Pipeline


NARROW = 0.02
"""Width of the median's 95 % interval, as a share of the median, at which measuring may stop."""
NEW_TOKENS = 16
LEAST_RUNS = 10  # with fewer, a narrow interval is luck
MOST_RUNS = 500
_SIZE_RUNS = LEAST_FOR_INTERVAL
_MOST_SIZES = 5
_STEP_RUNS = 10
_LAYER_RUNS = 3  # each run already has many calls of a layer
ROUNDS = 8
_LEAST_ROUNDS = 2
POINTS = 6
"""Contexts after the question with its image."""
_TOKENS = 4
_SETTLING = 12
"""Tokens after a prefill that are not timed: its data fills the processor's caches, which makes them slower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """Settings of a measurement."""

    bundles: tuple[Path, ...]
    """The first is the reference of comparisons."""
    backend: str = "auto"
    threads: int = 0
    cpu_accuracy: CpuAccuracy = "auto"
    image: Path | None = None
    """None for random pixels with the most visual tokens of the first bundle."""
    prompt: str | None = None
    level: str | None = None
    new_tokens: int | None = None
    """Tokens per answer; None for ``NEW_TOKENS``, or fewer if a bundle has less room."""
    runs: int | None = None
    """Answers per bundle; None for as many as the medians need."""
    warm_up: int = 3
    seconds: float = 30.0
    """No new round starts after this time, unless ``runs`` is given."""
    layers: bool = True
    on_step: Callable[[str], None] = lambda _step: None
    """Called with the name of each step."""

    def make_backend(
        self, bundle: Bundle, *, name: str | None = None, layer_times: Path | None = None
    ) -> Backend:
        """Return the backend ``name`` for ``bundle``; without a name, that of the options."""
        return make_backend(
            name or self.backend,
            bundle=bundle,
            threads=self.threads,
            cpu_accuracy=self.cpu_accuracy,
            layer_times=layer_times,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedContext:
    """The decode step at one context length."""

    context: int
    """Rows before it, without token reduction."""
    cached_rows: float
    """Rows before it in the KV caches, mean over layers."""
    milliseconds: list[float] = field(default_factory=list)
    """One value per round: the median of a few tokens."""


@dataclass(slots=True, kw_only=True)
class MeasuredBundle:
    """One bundle and its answers."""

    loaded: LoadedBundle
    memory: MeasuredMemory
    first: Answer
    answers: list[Answer] = field(default_factory=list)
    sizes: list[tuple[MeasuredSize, list[Answer]]] = field(default_factory=list)
    contexts: list[TimedContext] = field(default_factory=list)
    steps: list[Answer] = field(default_factory=list)
    """Runs without capture, if decode steps are captured in ``answers``."""
    layers: list[LayerTime] = field(default_factory=list)


class ProfileConditions(msgspec.Struct, frozen=True, kw_only=True):
    """Settings and state of the machine during the measurement."""

    started: str
    backend: str
    threads: int
    """0 is the backend's choice."""
    clock: str
    """The clock that timed the graphs: "the host", or "events of the GPU"."""
    power_mode: str | None
    """From nvpmodel."""
    cpu_governor: str | None
    load_average: float | None
    """Mean of the last minute before the first run."""
    image: str
    prompt: str
    new_tokens: int
    warm_up: int
    runs: int
    stopped: str
    sensors: tuple[str, ...]
    missing: tuple[str, ...]
    """One line for each thing that could not be measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """All results."""

    conditions: ProfileConditions
    measured: tuple[MeasuredBundle, ...]
    ceilings: Ceilings | None
    samples: list[SensorSample]


def measure(options: MeasureOptions) -> Measurement:
    """Measure all bundles of ``options``.

    Raises:
        TrioEdgeError: If a bundle cannot be opened, loaded or asked.
    """
    num_new = _num_new(options)
    if options.image is not None:
        open_image(options.image)  # a damaged image must raise before minutes of measuring
    # before the first run, after which the load is this program's own
    started, busy = datetime.datetime.now(datetime.timezone.utc), machine_info.load_average()
    sensors, missing = open_sensors()
    with ExitStack() as stack:
        sampling = stack.enter_context(SamplingThread(sensors))
        options.on_step("measuring the machine's peak rates")
        # before any bundle takes memory and caches
        ceilings = _ceilings(options, missing)
        measured, question = _first_answers(options, stack, num_new=num_new)
        stopped = _rounds(measured, question, options)
        _further_rounds(measured, question, options)
    # the bundles are closed now, because there may be memory for only one at a time
    for one in measured:
        _separate_runs(one, question, options)
    conditions = ProfileConditions(
        started=started.isoformat(timespec="seconds"),
        backend=with_accuracy(measured[0].loaded.pipeline.backend_name, options.cpu_accuracy),
        threads=options.threads,
        clock="the host" if measured[0].memory.device_free is None else "events of the GPU",
        power_mode=machine_info.find_power_mode(),
        cpu_governor=machine_info.find_governor(),
        load_average=busy,
        image=question.image_words,
        prompt=question.prompt,
        new_tokens=question.new_tokens,
        warm_up=options.warm_up,
        runs=len(measured[0].answers),
        stopped=stopped,
        sensors=tuple(sensor.name for sensor in sensors),
        missing=(*missing, *sampling.lost),
    )
    return Measurement(
        conditions=conditions, measured=tuple(measured), ceilings=ceilings, samples=sampling.samples
    )


def _num_new(options: MeasureOptions) -> int:
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


def _ceilings(options: MeasureOptions, missing: list[str]) -> Ceilings | None:
    bundle = open_bundle(options.bundles[0])
    backend = options.make_backend(bundle)
    try:
        cores = options.threads or machine_info.find_machine().cores
        return measure_ceilings(backend, bundle.manifest, cores=cores)
    except BackendError as error:
        missing.append(f"roofline: {error}")
        return None


def _first_answers(
    options: MeasureOptions, stack: ExitStack, *, num_new: int
) -> tuple[list[MeasuredBundle], RunQuestion]:
    """Load each bundle and let it answer before the next one is loaded, so that the added memory is its own."""
    measured: list[MeasuredBundle] = []
    question = None
    for folder in options.bundles:
        options.on_step(f"loading {printable(str(folder))}")
        memory = MeasuredMemory(before=process_bytes("VmRSS"))
        loaded = LoadedBundle(folder, options.make_backend(open_bundle(folder)), level=options.level)
        stack.callback(loaded.close)
        memory.loaded = process_bytes("VmRSS")
        memory.planned = dict(loaded.recording.memory)
        question = question or _question(options, loaded, num_new=num_new)
        first = _warm_up(loaded, memory, question, options)
        measured.append(MeasuredBundle(loaded=loaded, memory=memory, first=first))
    assert question is not None  # there is at least one bundle
    return measured, question


def _question(options: MeasureOptions, loaded: LoadedBundle, *, num_new: int) -> RunQuestion:
    image: Path | Image.Image
    if options.image is not None:
        image, text = options.image, printable(options.image.name)
    else:
        size = measured_sizes(loaded.pipeline, loaded.level)[0]
        image, text = random_image(size), f"{size.width}x{size.height} random pixels"
    prompt = PROMPT if options.prompt is None else options.prompt
    return RunQuestion(image=image, prompt=prompt, new_tokens=num_new, image_words=text)


def _warm_up(
    loaded: LoadedBundle, memory: MeasuredMemory, question: RunQuestion, options: MeasureOptions
) -> Answer:
    """Run the first answers, measure their memory, and return the first answer."""
    reset_peak()
    try:
        first = loaded.answer(question)
    except ShapeError as error:  # names the bundle, as several get the same question
        raise ShapeError(f"{loaded.bundle.folder}: {error}") from None
    for _ in range(options.warm_up):
        loaded.answer(question)
    memory.peak = process_bytes("VmHWM")
    memory.device_free = loaded.recording.free_bytes()
    return first


def _rounds(measured: Sequence[MeasuredBundle], question: RunQuestion, options: MeasureOptions) -> str:
    """Let all bundles answer in turns until their medians are known, and return the reason for stopping."""
    end = time.perf_counter() + options.seconds
    most = MOST_RUNS if options.runs is None else options.runs
    for number in range(most):
        if options.runs is None and number >= LEAST_RUNS:
            if all(_is_narrow(one.answers) for one in measured):
                return f"medians known to {100 * NARROW:.0f} %"
            if time.perf_counter() > end:
                return f"{options.seconds:.0f} s were over"
        options.on_step(f"run {number + 1}")
        for one in measured:
            one.answers.append(one.loaded.answer(question))
    return f"{most} runs"


def _is_narrow(answers: Sequence[Answer]) -> bool:
    first = distribution([answer.ttft_ms for answer in answers])
    whole = distribution([answer.answer_ms for answer in answers])
    return max(first.relative_width, whole.relative_width) <= NARROW


def _further_rounds(
    measured: Sequence[MeasuredBundle], question: RunQuestion, options: MeasureOptions
) -> None:
    """Measure images of other sizes, and decode steps at other contexts; bundles take turns."""
    if options.image is None:
        options.on_step("images of other sizes")
        _measure_sizes(measured, question)
    if question.new_tokens > 1:
        options.on_step("tokens at other context lengths")
        timed = time_contexts([one.loaded for one in measured], question, seconds=options.seconds)
        for one, contexts in zip(measured, timed):
            one.contexts = contexts


def _measure_sizes(measured: Sequence[MeasuredBundle], question: RunQuestion) -> None:
    """Measure the time to the first token at up to ``_MOST_SIZES`` image sizes of each bundle."""
    turns: list[tuple[LoadedBundle, RunQuestion, list[Answer]]] = []
    for one in measured:
        sizes = measured_sizes(one.loaded.pipeline, one.loaded.level)
        step = max(1, -(-len(sizes) // _MOST_SIZES))
        for size in sizes[::step]:
            one.sizes.append((size, []))
            asked = RunQuestion(image=random_image(size), prompt=question.prompt, new_tokens=1)
            turns.append((one.loaded, asked, one.sizes[-1][1]))
    for loaded, asked, _ in turns:  # the first answer at a new shape allocates
        loaded.answer(asked)
    for _ in range(_SIZE_RUNS):
        for loaded, asked, answers in turns:
            answers.append(loaded.answer(asked))


def _separate_runs(one: MeasuredBundle, question: RunQuestion, options: MeasureOptions) -> None:
    """Time layers, and graphs of captured decode steps, in runs that are slower than the others."""
    folder = one.loaded.bundle.folder
    if options.layers:
        options.on_step(f"layers: {printable(str(folder))}")
        one.layers = _measure_layers(one.loaded, question, options)
    if one.loaded.recording.captured:
        options.on_step(f"decode steps one by one: {printable(str(folder))}")
        backend = options.make_backend(one.loaded.bundle)
        with closing(LoadedBundle(folder, backend, capture=False, level=options.level)) as again:
            again.answer(question)
            one.steps = [again.answer(question) for _ in range(_STEP_RUNS)]


def _measure_layers(loaded: LoadedBundle, question: RunQuestion, options: MeasureOptions) -> list[LayerTime]:
    """Time the layers of every graph under the backend's profiler."""
    bundle, name = loaded.bundle, loaded.pipeline.backend_name
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        backend = options.make_backend(bundle, name=name, layer_times=folder)
        with closing(LoadedBundle(bundle.folder, backend, capture=False, level=options.level)) as again:
            warm_up = again.answer(question).calls
            calls = [call for _ in range(_LAYER_RUNS) for call in again.answer(question).calls]
        layers = []
        for spec in bundle.manifest.graphs:
            # there is one file per session, and a graph's pieces may be sessions
            whole = (folder / f"{spec.name}.json").exists()
            for part in (spec,) if whole else spec.split():
                names = {(spec.name, profile.name) for profile in part.profiles}
                profiles = [call.profile for call in calls if (call.graph, call.profile) in names]
                # the profiler runs from the start, so the warm-up's runs come first in its file
                skipped = sum((call.graph, call.profile) in names for call in warm_up)
                if profiles:
                    runs = layer_runs(json.loads((folder / f"{part.name}.json").read_bytes()))
                    layers += layer_times(
                        runs[skipped:], graph=spec.name, profiles=profiles, num_answers=_LAYER_RUNS
                    )
    return layers


def time_contexts(
    bundles: Sequence[LoadedBundle], question: RunQuestion, *, seconds: float
) -> list[list[TimedContext]]:
    """Return each bundle's times at ascending contexts of ``question``; bundles take turns.

    After ``_LEAST_ROUNDS``, no round starts after ``seconds``. Rows of the caches are skipped to reach a context; their
    contents do not matter, because graphs read whole buffers.
    """
    found: list[dict[int, TimedContext]] = [{} for _ in bundles]
    end = time.perf_counter() + seconds
    for number in range(ROUNDS):
        if number >= _LEAST_ROUNDS and number % 2 == 0 and time.perf_counter() > end:
            break  # only after an even number, so that as many rounds descend as ascend
        for loaded, contexts in zip(bundles, found):
            for image in (None, question.image):
                asked = RunQuestion(image=image, prompt=question.prompt, new_tokens=1)
                _time_round(loaded, asked, contexts, is_downward=number % 2 == 1)
    return [[contexts[rows] for rows in sorted(contexts)] for contexts in found]


def _time_round(
    loaded: LoadedBundle, question: RunQuestion, contexts: dict[int, TimedContext], *, is_downward: bool
) -> None:
    """Time tokens at all ``contexts`` of a question, without the first ones after the prefill.

    With ``is_downward`` the longest context comes first, so that a drift does not look like a slope.
    """
    manifest, seen = loaded.bundle.manifest, loaded.answer(question).statistics
    prompt = seen.visual_tokens + seen.text_tokens
    cached = seen.average_keep * seen.visual_tokens + seen.text_tokens
    room = manifest.text_buckets[-1] + manifest.max_new_tokens - seen.text_tokens
    num_tokens = min(_TOKENS, room)
    points = _points(room - num_tokens, count=1 if question.image is None else POINTS)
    done = min(_SETTLING, room)
    loaded.pipeline.time_tokens(done)
    for rows in reversed(points) if is_downward else points:
        times = loaded.pipeline.time_tokens(num_tokens, skip=rows - done)
        done = rows + num_tokens
        known = TimedContext(context=prompt + rows, cached_rows=cached + rows)
        contexts.setdefault(known.context, known).milliseconds.append(statistics.median(times))


def _points(last: int, *, count: int) -> list[int]:
    """Return at most ``count`` numbers of rows after a prompt, evenly spread from 0 to ``last``."""
    count = min(count, last + 1)
    return [0] if count < 2 else [index * last // (count - 1) for index in range(count)]


PROMPT = "What is in the image?"
_SIDES = (48, 96, 144, 336, 448, 672, 896, 1008, 1344)
_SEED = 0


class MeasuredSize(NamedTuple):
    """Size of an image in pixels, and its visual tokens."""

    width: int
    height: int
    visual_tokens: int


def measured_sizes(pipeline: Pipeline, level: str | None = None) -> list[MeasuredSize]:
    """Return one image size for each number of visual tokens that the level has shapes for, most tokens first."""
    own = pipeline.level_named(level)
    manifest = own.manifest
    exact = [(size.width, size.height) for size in manifest.image_sizes]
    sides = [(width, height) for width in _SIDES for height in _SIDES]
    # exact shapes first, then small images: the first size of each number of tokens is taken
    candidates = [*exact, *sorted(sides, key=lambda size: size[0] * size[1])]
    profiles = [profile.sizes for profile in manifest.graph("vision").profiles]
    found: dict[int, MeasuredSize] = {}
    for width, height in candidates:
        try:
            sizes = own.images.sizes(width, height)
        except TrioEdgeError:
            continue
        if any(all(profile[name] >= size for name, size in sizes.items()) for profile in profiles):
            found.setdefault(sizes["N"], MeasuredSize(width, height, sizes["N"]))
    return [found[count] for count in sorted(found, reverse=True)]


def random_image(size: MeasuredSize) -> Image.Image:
    """Return an image of random pixels, the same ones each time."""
    pixels = np.random.default_rng(_SEED).integers(0, 256, (size.height, size.width, 3), np.uint8)
    return Image.fromarray(pixels)


_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5): sets the peak to what is resident now


@dataclass(slots=True, kw_only=True)
class MeasuredMemory:
    """Memory in bytes; None if the system does not tell."""

    planned: dict[str, int] = field(default_factory=dict)
    """The backend's own figures, by purpose."""
    before: int | None = None
    loaded: int | None = None
    peak: int | None = None
    device_free: int | None = None
    """Free on the GPU after the first answers; None on a CPU."""


def reset_peak() -> None:
    """Reset the peak of resident memory, if the system can."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)
