"""Probabilities of answers: those of Hugging Face's logits at keep-all, and of the reduced bundle's own for every family."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.several_images import PRODUCT
from tests.spec.whole_answers import generate
from trio_edge.runtime.decisions.questions import Question

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from tests.spec.conftest import Subject
    from trio_edge.runtime.pipeline import Pipeline

SHOWN = ("wide", "square, square", "tall, thin, small, square")
TEXT = "w3 w1 w2"  # the text of all conversations in PRODUCT; the wording asks it as it is
ONE_TOKEN = Question.choice(TEXT, ["w4", "w7", "w11"])
WORDS = Question.choice(TEXT, ["w4", "w5 w6", "w5 w8", "w9 w4 w4"])
BEGINNINGS = Question.choice(TEXT, ["w5", "w5 w6"])
LEVELS = Question.score(TEXT, ["w9", "w8", "w7", "w6"])
LOG_PROBABILITY = {"rtol": 1e-4, "atol": 3e-4}
"""Of answers in float32, whose logits are a few units apart. Most of it is float32's own rounding: with Ministral 3, Hugging
Face's float32 is as far from its float64 as ours is."""


class Forced:
    """Lets one answer come only."""

    def __init__(self, tokens: Sequence[int], num_tokens: int) -> None:
        self.tokens, self.num_tokens = list(tokens), num_tokens

    def allowed(self) -> NDArray[np.bool_]:
        allowed_V = np.zeros(self.num_tokens, np.bool_)
        allowed_V[self.tokens[0]] = True
        return allowed_V

    def add(self, token: int) -> None:
        assert token == self.tokens.pop(0)


def evidence(name: str) -> list[dict[str, Any]]:
    """Return the images of a conversation without its text."""
    (turn,) = PRODUCT[name]
    return [{**turn, "content": [part for part in turn["content"] if part["type"] != "text"]}]


def ways_of(pipeline: Pipeline, words: str) -> list[list[int]]:
    """Return the tokens of an answer, and, if they differ, of one after a blank."""
    ways = {tuple(map(int, pipeline.tokenizer.plain_ids(blank + words))) for blank in ("", " ")}
    return [list(tokens) for tokens in ways]


def forced_log(pipeline: Pipeline, ask: Callable[..., Any], words: str) -> tuple[float, Any]:
    """Return the logarithm of the probability of an answer, and one that was forced to be it; ``ask`` asks the question."""
    logs = []
    for ids in ways_of(pipeline, words):
        forced = Forced(ids, pipeline.manifest.dimensions.vocab_size)
        how: dict[str, Any] = {"max_new_tokens": len(ids), "num_logprobs": 0, "temperature": 0}
        answer = ask(constraint=forced, **how)
        assert answer.text is not None
        logs.append(sum(token.chosen for token in answer.logprobs))
    return float(np.logaddexp.reduce(logs)), answer


def shares(logs: Sequence[float]) -> NDArray[np.float64]:
    """Return the logarithms of the shares of answers with these logarithms of probabilities."""
    return np.array(logs) - np.logaddexp.reduce(logs)


def continued(inputs: dict[str, torch.Tensor], tokens: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return inputs of the model with an answer's first tokens."""
    more = torch.tensor([list(tokens)], dtype=torch.long)
    shape = inputs["input_ids"].shape
    return {
        name: torch.cat([value, more if name == "input_ids" else torch.zeros_like(more)], dim=1)
        if value.shape == shape
        else value
        for name, value in inputs.items()
    }


def log_probability(
    model: Any, inputs: dict[str, torch.Tensor], tokens: Sequence[int], *, ends_with: Sequence[int] = ()
) -> float:
    """Return the logarithm of Hugging Face's probability that the answer begins with ``tokens``, and then ends."""
    total = 0.0
    for place in range(len(tokens) + (len(ends_with) > 0)):
        _, logits = generate(model, continued(inputs, tokens[:place]), num_steps=1)
        logs = torch.log_softmax(torch.from_numpy(logits[0]).double(), dim=-1)
        wanted = tokens[place : place + 1] or ends_with
        total += float(torch.logsumexp(logs[list(wanted)], dim=0))
    return total


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize(
    "question", [ONE_TOKEN, WORDS, BEGINNINGS, LEVELS], ids=lambda asked: str(len(asked.options))
)
def test_keep_all_gives_the_probabilities_of_hugging_face(
    subject: Subject, name: str, question: Question
) -> None:
    pipeline, inputs = subject.keep_all, subject.inputs(name)
    (decision,) = pipeline.iter_decisions(evidence(name), [question])
    ends = pipeline.manifest.text.stop_token_ids if question is BEGINNINGS else ()
    logs = []
    for option in question.options:
        ways = ways_of(pipeline, option.name)
        logs.append(
            np.logaddexp.reduce(
                [log_probability(subject.model, inputs, tokens, ends_with=ends) for tokens in ways]
            )
        )
    np.testing.assert_allclose(np.log(decision.probabilities), shares(logs), **LOG_PROBABILITY)
    np.testing.assert_allclose(np.log(decision.label_mass), np.logaddexp.reduce(logs), **LOG_PROBABILITY)
    assert decision.choice == question.options[int(np.argmax(logs))].name


@pytest.mark.parametrize("name", SHOWN)
def test_reduced_bundle_gives_the_probabilities_of_its_own_answers(subject: Subject, name: str) -> None:
    """Its answers equal plain torch; an answer that is forced to be an option has the option's probability."""
    pipeline = subject.reduced
    decisions = list(pipeline.iter_decisions(evidence(name), [WORDS, ONE_TOKEN, LEVELS]))
    for question, decision in zip([WORDS, ONE_TOKEN, LEVELS], decisions):
        logs = []
        for option in question.options:
            log, answer = forced_log(pipeline, partial(pipeline.chat, PRODUCT[name]), option.name)
            logs.append(log)
        np.testing.assert_allclose(np.log(decision.probabilities), shares(logs), **LOG_PROBABILITY)
        assert [kept.tolist() for kept in decision.kept] == [kept.tolist() for kept in answer.kept]
        assert decision.statistics.visual_tokens == answer.statistics.visual_tokens
    assert [decision.statistics.image_was_kept for decision in decisions] == [False, True, True]


def test_a_question_without_an_image(subject: Subject) -> None:
    for pipeline in (subject.keep_all, subject.reduced):
        (decision,) = pipeline.decide(None, ONE_TOKEN)
        ask = partial(pipeline.generate, None, TEXT)
        logs = [forced_log(pipeline, ask, option.name)[0] for option in ONE_TOKEN.options]
        np.testing.assert_allclose(np.log(decision.probabilities), shares(logs), **LOG_PROBABILITY)
        assert [len(kept) for kept in decision.kept] == [0] * len(pipeline.manifest.schedule.stages)


def test_several_questions_are_answered_as_each_alone(subject: Subject) -> None:
    for pipeline in (subject.keep_all, subject.reduced):
        several = list(pipeline.iter_decisions(evidence("wide"), [ONE_TOKEN, LEVELS, WORDS]))
        for question, decision in zip([ONE_TOKEN, LEVELS, WORDS], several):
            (alone,) = pipeline.iter_decisions(evidence("wide"), [question])
            assert decision.probabilities == alone.probabilities
