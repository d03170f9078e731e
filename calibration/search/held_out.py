"""Results on held-out samples: agreement with keep-all, and accuracy where they have answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trio_edge.calibration.metrics import METRICS, exact_normal
from trio_edge.calibration.model.greedy import greedy_answer
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.search.calibration_file import Accuracy, Fidelity, Measure
from trio_edge.profiling.statistics import bootstrap_interval, paired_interval, score_interval
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.calibration.model.greedy import MeasuredSchedule
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.progress import StepProgress
    from trio_edge.calibration.questions import Question

MAX_ANSWER_TOKENS = 16
"""Tokens of an answer whose exact match is scored."""


def fidelity(results: Sequence[MeasuredSchedule], questions: Sequence[Question]) -> Fidelity:
    """Return mean divergence and agreement with their intervals, by bootstrap over images."""
    images = [question.image_id for question in questions]
    kls = [result.kl for result in results]
    agreements = [float(result.agrees) for result in results]
    return Fidelity(
        samples=len(results),
        kl=Measure(value=_mean(kls), interval_95=bootstrap_interval(kls, images)),
        agreement=_measure(agreements, images),
    )


def accuracy(
    model: TorchModel, questions: Sequence[Question], schedule: Schedule, progress: StepProgress
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
        keep_all=_measure(whole_scores, images),
        chosen=_measure(scores_of_chosen, images),
        difference=Measure(
            value=_mean(scores_of_chosen) - _mean(whole_scores),
            interval_95=paired_interval(scores_of_chosen, whole_scores, images),
        ),
    )


def _measure(scores: list[float], images: list[str]) -> Measure:
    return Measure(value=_mean(scores), interval_95=score_interval(scores, images))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
