"""One bundle answers questions. Each gives an ``Outcome``, or a ``Failure`` if the question cannot be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import msgspec
import numpy as np

from trio_edge.calibration.evaluate.answer_cost import (
    image_tokens,
    prefill_flops,
    processed_tokens,
    processing_of,
)
from trio_edge.calibration.evaluate.baselines import SMALLER_IMAGE, baseline, smaller_image
from trio_edge.calibration.metrics import METRICS
from trio_edge.runtime.bundle.errors import ImageError, ShapeError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.runtime.images.reading import open_image
from trio_edge.runtime.model.sampling import FirstToken, first_token_kl, summary_of
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

    from trio_edge.calibration.questions import Question
    from trio_edge.runtime.engines.cpu import CpuAccuracy
    from trio_edge.runtime.images.reading import ImageSource

OWN_SELECTION = "bundle"
DEFAULT_ANSWER_TOKENS = 16


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A bundle's answer to one question, with its cost."""

    index: int
    sample_id: str
    kind: str
    picture_id: str
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
    first_token_kl: float | None = None
    """KL to keep-all, in nats; None without a reference."""
    first_token: FirstToken | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A question that cannot be asked: its image cannot be read, or its prompt does not fit the bundle."""

    index: int
    where: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that all runs share."""

    metric: str = "exact"
    answer_tokens: int = DEFAULT_ANSWER_TOKENS
    backend: str = "auto"
    threads: int = 1
    workers: int = 1
    cpu_accuracy: CpuAccuracy = "auto"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """One bundle and its settings; plain values, which worker processes receive."""

    bundle: Path
    selection: str = OWN_SELECTION
    """``OWN_SELECTION`` or one of ``baselines.BASELINES`` at the bundle's schedule."""
    budget_of: Path | None = None
    """With ``smaller-image``, the bundle whose average keep the image gets; ``bundle`` keeps all."""
    is_reference: bool = False
    """Whether outcomes keep their first token, for the others to compare with."""
    settings: Settings = Settings()


@final
class Answerer:
    """An opened bundle that answers questions one by one, greedily."""

    def __init__(self, asking: Asking, pipeline: Pipeline | None = None) -> None:
        """Open the bundle, unless a ``pipeline`` is given."""
        self._asking = asking
        self._metric = METRICS[asking.settings.metric]
        self._pipeline = pipeline or Pipeline.from_bundle(
            asking.bundle,
            backend=asking.settings.backend,
            threads=asking.settings.threads,
            cpu_accuracy=asking.settings.cpu_accuracy,
        )
        self._budget = None if asking.budget_of is None else open_bundle(asking.budget_of).manifest

    def answer(self, question: Question, reference: FirstToken | None = None) -> Outcome | Failure:
        """Ask one question; ``reference`` is keep-all's first token, if there is a reference."""
        try:
            return self._ask(question, reference)
        except (ImageError, ShapeError) as error:
            return Failure(question.index, question.where, str(error))

    def close(self) -> None:
        """Release the graphs."""
        self._pipeline.close()

    def _ask(self, question: Question, reference: FirstToken | None) -> Outcome:
        asking, manifest = self._asking, self._pipeline.manifest
        is_override = asking.selection not in (OWN_SELECTION, SMALLER_IMAGE)
        override = (
            baseline(asking.selection, seed=question.index, is_base=lambda: self._is_base(generation.images))
            if is_override
            else None
        )
        generation = self._pipeline.generate(
            self._shown(question),
            question.question,
            max_new_tokens=min(asking.settings.answer_tokens, manifest.max_new_tokens),
            temperature=0.0,  # sampled answers would differ from run to run
            override=override,
        )
        text, statistics = generation.text, generation.statistics
        counts, kept = image_tokens(self._pipeline.images, generation.images), statistics.kept_tokens
        reading, logits = self._metric.read(text, question), generation.first_logits
        return Outcome(
            index=question.index,
            sample_id=question.sample_id,
            kind=question.kind,
            picture_id=question.image_id,
            answers=question.answers,
            text=text,
            reading=reading,
            score=self._metric.score(reading, question),
            visual_tokens=statistics.visual_tokens,
            processed_tokens=processed_tokens(manifest, image_tokens=counts, kept=kept),
            text_tokens=statistics.text_tokens,
            new_tokens=statistics.new_tokens,
            flops=prefill_flops(
                manifest,
                image_tokens=counts,
                kept=kept,
                num_text=statistics.text_tokens,
                select=not is_override,
            ),
            ttft_ms=statistics.ttft_ms,
            decode_ms=statistics.decode_ms,
            kv_bytes=statistics.kv_bytes,
            repaired_stages=statistics.repaired_stages,
            first_token_kl=None if reference is None else first_token_kl(reference, logits),
            first_token=summary_of(logits) if asking.is_reference else None,
        )

    def _shown(self, question: Question) -> list[ImageSource]:
        """Return the question's images, smaller ones for ``smaller-image``."""
        if self._budget is None:
            return list(question.images)
        images = [open_image(image) for image in question.images]
        counts = image_tokens(self._pipeline.images, images)
        share = self._budget.average_keep_of(sum(counts), num_images=len(counts))
        processing = processing_of(images, self._pipeline.images)
        return [smaller_image(image, processing, share=share) for image in images]

    def _is_base(self, images: Sequence[Image.Image]) -> NDArray[np.bool_]:
        """Return for each visual token of a prompt whether its tile shows the whole image."""
        processing = self._pipeline.images
        # only LLaVA's first tile shows the whole image: InternVL's is its last, Qwen2.5-VL has none
        base = 0
        if isinstance(processing, LlavaImages):
            base = processing.encoder_keep or processing.patches_per_tile
        return np.concatenate([np.arange(count) < base for count in image_tokens(processing, images)])
