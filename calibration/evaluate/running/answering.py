"""One bundle answers questions: each becomes an ``Outcome`` or, where the question itself is at fault, a ``Failure``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import msgspec

from trio_edge.calibration.evaluate.running.answer_cost import prefill_flops, processed_tokens
from trio_edge.calibration.evaluate.running.baselines import baseline
from trio_edge.calibration.metrics import METRICS
from trio_edge.runtime.bundle.errors import ImageError, ShapeError
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.sampling import FirstToken, first_token_kl, summary_of

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.calibration.questions import Question
    from trio_edge.runtime.backends.interface import CpuAccuracy
    from trio_edge.runtime.images.interface import ImageProcessing

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
    """The answer as it came."""
    reading: str
    """The part of it that the metric compared."""
    score: float
    visual_tokens: int
    """Visual tokens of the image, before any selection that is a graph of its own."""
    processed_tokens: float
    """Mean over decoder layers of the visual tokens processed."""
    text_tokens: int
    new_tokens: int
    flops: float
    """FLOPs of the prefill."""
    ttft_ms: float
    decode_ms: float
    kv_bytes: int
    repaired_stages: int = 0
    first_token_kl: float | None = None
    """In nats, against keep-all; None without a reference."""
    first_token: FirstToken | None = None
    """The reference's own."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A question that cannot be asked: its image cannot be read, or its prompt does not fit the bundle."""

    index: int
    where: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings for asking all bundles."""

    metric: str = "exact"
    answer_tokens: int = DEFAULT_ANSWER_TOKENS
    backend: str = "auto"
    threads: int = 1
    workers: int = 1
    cpu_accuracy: CpuAccuracy = "auto"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """One bundle and how it is asked; plain values that travel to worker processes."""

    bundle: Path
    selection: str = OWN_SELECTION
    """``OWN_SELECTION`` or one of ``baselines.BASELINES`` at the bundle's schedule."""
    is_reference: bool = False
    """Whether first tokens are summed up for the others."""
    settings: Settings = Settings()


@dataclass(frozen=True, slots=True)
class Task:
    """A question, with keep-all's first token where there is one."""

    question: Question
    reference: FirstToken | None = None


@final
class Answerer:
    """An opened bundle that answers one question after the other, greedily."""

    def __init__(self, asking: Asking, pipeline: Pipeline | None = None) -> None:
        """Open the bundle, unless ``pipeline`` has it opened already."""
        self._asking = asking
        self._metric = METRICS[asking.settings.metric]
        self._pipeline = pipeline or Pipeline.from_bundle(
            asking.bundle,
            backend=asking.settings.backend,
            threads=asking.settings.threads,
            cpu_accuracy=asking.settings.cpu_accuracy,
        )
        self._base_tokens = _base_tokens(self._pipeline.images)

    def answer(self, task: Task) -> Outcome | Failure:
        """Ask one question."""
        question = task.question
        try:
            return self._ask(question, task.reference)
        except (ImageError, ShapeError) as error:
            return Failure(question.index, question.where, str(error))

    def close(self) -> None:
        """Release the graphs."""
        self._pipeline.close()

    def _ask(self, question: Question, reference: FirstToken | None) -> Outcome:
        asking, manifest = self._asking, self._pipeline.manifest
        own = asking.selection == OWN_SELECTION
        override = (
            None if own else baseline(asking.selection, seed=question.index, base_tokens=self._base_tokens)
        )
        generation = self._pipeline.generate(
            question.image,
            question.question,
            max_new_tokens=min(asking.settings.answer_tokens, manifest.max_new_tokens),
            temperature=0.0,  # a drawn answer is another one each time
            override=override,
        )
        text, statistics = generation.text, generation.statistics
        num_visual, kept, num_text = statistics.visual_tokens, statistics.kept_tokens, statistics.text_tokens
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
            visual_tokens=num_visual,
            processed_tokens=processed_tokens(manifest, num_visual=num_visual, kept=kept),
            text_tokens=num_text,
            new_tokens=statistics.new_tokens,
            flops=prefill_flops(manifest, num_visual=num_visual, kept=kept, num_text=num_text, select=own),
            ttft_ms=statistics.ttft_ms,
            decode_ms=statistics.decode_ms,
            kv_bytes=statistics.kv_bytes,
            repaired_stages=statistics.repaired_stages,
            first_token_kl=None if reference is None else first_token_kl(reference, logits),
            first_token=summary_of(logits) if asking.is_reference else None,
        )


def _base_tokens(images: ImageProcessing) -> int:
    """Return the visual tokens of the tile that shows the whole image and comes first; 0 without one."""
    # LLaVA's first tile shows the whole image; InternVL's comes last, Qwen2.5-VL has none
    if not isinstance(images, LlavaImages):
        return 0
    return images.encoder_keep or images.patches_per_tile
