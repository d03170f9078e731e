"""Held-out images with what each stage of a schedule keeps of them, for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trio_edge.calibration.model.greedy import answers_with_and_without
from trio_edge.calibration.model.prompts import read_image
from trio_edge.runtime.images.overlay import draw_kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from trio_edge.calibration.model.selecting import Probes
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.questions import Question
    from trio_edge.runtime.bundle.schedule import Schedule

NUM_OVERLAYS = 3
_ANSWER_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """An image with what each stage keeps of it."""

    sheet: Image.Image
    question: str
    keep_all: str
    """Answer without reduction."""
    chosen: str
    """Answer with the chosen schedule."""


def overlays_of(
    model: TorchModel, questions: Sequence[Question], schedule: Schedule, probes: Probes
) -> list[Overlay]:
    """Return overlays of the first ``NUM_OVERLAYS`` images, each with its first question."""
    first_of_image = {question.image_id: question for question in reversed(questions)}
    chosen = sorted(first_of_image.values(), key=lambda question: question.index)[:NUM_OVERLAYS]
    return [_overlay(model, question, schedule, probes) for question in chosen]


def _overlay(model: TorchModel, question: Question, schedule: Schedule, probes: Probes) -> Overlay:
    image = read_image(question)
    whole, reduced = answers_with_and_without(
        model, question, schedule, probes=probes, max_tokens=_ANSWER_TOKENS
    )
    layout = model.images.layout(*image.size)
    sheet = draw_kept(
        image,
        layout.boxes,
        [kept.cpu().numpy() for kept in reduced.kept],
        captions=[f"layer {stage.layer}" for stage in schedule.stages],
        overview=layout.overview,
    )
    return Overlay(
        sheet=sheet,
        question=question.question,
        keep_all=model.tokenizer.decode(whole.tokens),
        chosen=model.tokenizer.decode(reduced.tokens),
    )
