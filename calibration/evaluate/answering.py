"""One bundle answers one question with its own selection, or with a baseline that ignores the image's content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from trio_edge.calibration.evaluate.answer_cost import answer_flops, image_tokens, processed_tokens
from trio_edge.calibration.evaluate.decisions import Judged, lists_options, question_of, right_option
from trio_edge.calibration.metrics import METRICS
from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.manifest import DEFAULT
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.runtime.images.reading import open_image
from trio_edge.runtime.model.first_token import FirstToken, first_token_kl, summary_of
from trio_edge.runtime.model.host_selection import drop_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from trio_edge.calibration.questions import Sample
    from trio_edge.runtime.answer import Generation, Statistics
    from trio_edge.runtime.engines.cpu import CpuAccuracy
    from trio_edge.runtime.model.host_selection import SelectorOverride
    from trio_edge.runtime.model.levels import Level
    from trio_edge.runtime.pipeline import Pipeline

OWN_SELECTION = "bundle"
BASELINES = ("random", "uniform", "base-tile-first")
"""Selections that a real method must beat, at the bundle's schedule."""
CONTROLS = ("wrong-image", "none")
"""The bundle's own selection for another image, and no visual token from the first stage on."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A bundle's answer to one question, with its cost."""

    index: int
    sample_id: str
    kind: str
    image_id: str
    answers: tuple[str, ...]
    text: str
    reading: str
    """The part of ``text`` that the metric compares."""
    score: float
    visual_tokens: int
    processed_tokens: float
    text_tokens: int
    new_tokens: int
    flops: float
    ttft_ms: float
    decode_ms: float
    kv_bytes: int
    repaired_stages: int = 0
    level: str = DEFAULT
    levels_below: tuple[str, ...] = ()
    """Levels that ran before, with the level "auto"."""
    first_token_kl: float | None = None
    """KL to keep-all, in nats; None without a reference."""
    first_token: FirstToken | None = None
    judged: Judged | None = None
    """The probabilities of the answers, with ``AnswerSettings.decide``."""


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """Settings that all runs share."""

    metric: str = "exact"
    answer_tokens: int = 16
    backend: str = "auto"
    threads: int = 1
    cpu_accuracy: CpuAccuracy = "auto"
    system: str = ""
    """System prompt; empty for the chat template's own."""
    decide: bool = False
    """Read the probabilities of a fixed set of answers instead of generating one; needs samples of ``with_options``."""


def answer(
    pipeline: Pipeline,
    question: Sample,
    settings: AnswerSettings | None = None,
    *,
    selection: str = OWN_SELECTION,
    reference: FirstToken | None = None,
    is_reference: bool = False,
    level: str | None = None,
    other: Sample | None = None,
) -> Outcome:
    """Return the greedy answer to a question.

    ``selection`` is ``OWN_SELECTION`` or one of ``BASELINES`` and ``CONTROLS``. ``reference`` is keep-all's first token. With
    ``is_reference`` the outcome keeps its own, for others to compare with. ``level`` is that of ``Pipeline.generate``. ``other``
    has the image that "wrong-image" selects tokens for.

    Raises:
        ImageError: If its image cannot be read.
        ShapeError: If its prompt does not fit the bundle.
    """
    settings, manifest = settings or AnswerSettings(), pipeline.manifest
    if settings.decide:
        return _decide(pipeline, question, settings, selection=selection, level=level)
    override = None
    shown: dict[str, Any] = {"system": settings.system or None, "level": level}
    if selection == "wrong-image":
        if other is None:
            raise ShapeError("wrong-image: expected questions about two images, got one; add some")
        asked = {"video": other.video, "max_new_tokens": 1, **shown}
        override = as_kept(pipeline.generate(list(other.images), question.question, **asked))
    elif selection != OWN_SELECTION:
        own = pipeline.level_named(level)
        override = baseline(selection, seed=question.index, is_base=lambda: _is_base(own, generation))
    generation = pipeline.generate(
        list(question.images),
        question.question,
        video=question.video,
        max_new_tokens=min(settings.answer_tokens, manifest.max_new_tokens),
        temperature=0.0,  # sampled answers would differ from run to run
        override=override,
        **shown,
    )
    text, logits = generation.text, generation.first_logits
    return _outcome(
        pipeline,
        question,
        settings,
        text,
        statistics=generation.statistics,
        images=generation.images,
        select=override is None,
        first_token_kl=None if reference is None else first_token_kl(reference, logits),
        first_token=summary_of(logits) if is_reference else None,
    )


def _decide(
    pipeline: Pipeline, sample: Sample, settings: AnswerSettings, *, selection: str, level: str | None
) -> Outcome:
    """Return the likeliest of a sample's options."""
    override = None if selection == OWN_SELECTION else baseline(selection, seed=sample.index)
    images, asked = [open_image(path) for path in sample.images], question_of(sample)
    (decision,) = pipeline.decide(images, asked, override=override, level=level)
    turned: tuple[float, ...] = ()
    if asked.kind != "yes-no" and lists_options(pipeline.manifest):
        (again,) = pipeline.decide(images, asked.reversed(), override=override, level=level)
        turned = again.probabilities[::-1]
    return _outcome(
        pipeline,
        sample,
        settings,
        decision.choice,
        statistics=decision.statistics,
        images=images,
        select=override is None,
        judged=Judged(
            kind=asked.kind,
            shares=decision.probabilities,
            right=right_option(sample),
            label_mass=decision.label_mass,
            turned=turned,
        ),
    )


def _outcome(
    pipeline: Pipeline,
    sample: Sample,
    settings: AnswerSettings,
    text: str,
    *,
    statistics: Statistics,
    images: Sequence[Image.Image],
    select: bool,
    **more: Any,
) -> Outcome:
    """Return the outcome of an answer's ``text``; ``select`` tells whether the bundle's selection ran."""
    level, metric = pipeline.level_named(statistics.level), METRICS[settings.metric]
    is_video = sample.video is not None
    counts = image_tokens(level, images, is_video=is_video)
    reading = metric.read(text, sample)
    return Outcome(
        index=sample.index,
        sample_id=sample.sample_id,
        kind=sample.kind,
        image_id=sample.image_id,
        answers=sample.answers,
        text=text,
        reading=reading,
        score=metric.score(reading, sample),
        visual_tokens=statistics.visual_tokens,
        processed_tokens=processed_tokens(level.manifest, image_tokens=counts, kept=statistics.kept_tokens),
        text_tokens=statistics.text_tokens,
        new_tokens=statistics.new_tokens,
        flops=answer_flops(pipeline, statistics, images, select=select, is_video=is_video),
        level=statistics.level,
        levels_below=statistics.levels_below,
        ttft_ms=statistics.ttft_ms,
        decode_ms=statistics.decode_ms,
        kv_bytes=statistics.kv_bytes,
        repaired_stages=statistics.repaired_stages,
        **more,
    )


def baseline(
    name: str, *, seed: int, is_base: Callable[[], NDArray[np.bool_]] | None = None
) -> SelectorOverride:
    """Return the selection called ``name``, one of ``BASELINES``, for ``Pipeline.generate(override=…)``.

    ``is_base`` returns for each visual token of the prompt whether its tile shows the whole image. It is called during the
    answer, when the images are known; only "base-tile-first" needs it.
    """
    generator = np.random.default_rng(seed)

    def at_random(_stage: int, entering: NDArray[np.int32], num_keep: int) -> NDArray[np.int32]:
        return np.sort(generator.choice(len(entering), num_keep, replace=False)).astype(np.int32)

    def base_first(_stage: int, entering: NDArray[np.int32], num_keep: int) -> NDArray[np.int32]:
        assert is_base is not None, "it is needed here"
        in_base = is_base()[entering]
        base, others = np.flatnonzero(in_base), np.flatnonzero(~in_base)
        num_base = min(num_keep, len(base))
        kept = [
            base[evenly_spaced(len(base), num_base)],
            others[evenly_spaced(len(others), num_keep - num_base)],
        ]
        return np.sort(np.concatenate(kept)).astype(np.int32)

    named: dict[str, SelectorOverride] = {
        "none": drop_all,
        "random": at_random,
        "uniform": lambda _stage, entering, num_keep: evenly_spaced(len(entering), num_keep),
        "base-tile-first": base_first,
    }
    return named[name]


def as_kept(generation: Generation) -> SelectorOverride:
    """Return the selection that keeps what ``generation`` kept of another image, at the same places of this one."""
    assert generation.text is not None, "it has run"
    num_others = sum(layout.num_visual for layout in generation.layouts)
    sizes: list[int] = []

    def same_places(stage: int, entering: NDArray[np.int32], num_keep: int) -> NDArray[np.int32]:
        sizes.append(len(entering))  # at the first stage all tokens of this image enter
        places = generation.kept[stage] * sizes[0] / num_others
        distance = np.abs(entering[:, None] - places[None]).min(axis=1)
        return np.sort(np.argsort(distance, kind="stable")[:num_keep]).astype(np.int32)

    return same_places


def evenly_spaced(count: int, num_keep: int) -> NDArray[np.int32]:
    """Return ``num_keep`` of ``count`` indices, ascending: the middles of ``num_keep`` equal parts."""
    return np.floor((np.arange(num_keep) + 0.5) * count / max(num_keep, 1)).astype(np.int32)


def _is_base(level: Level, generation: Generation) -> NDArray[np.bool_]:
    # only LLaVA's first tile shows the whole image: InternVL's is its last, Qwen2.5-VL has none
    base, processing = 0, level.images
    if isinstance(processing, LlavaImages):
        base = processing.encoder_keep or processing.patches_per_tile
    return np.concatenate([np.arange(count) < base for count in image_tokens(level, generation.images)])
