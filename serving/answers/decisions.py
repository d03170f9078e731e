"""Answers to questions with a fixed set of answers, in the forms of OpenAI's ``/v1/decisions`` and of System One."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from trio_edge.serving.answers.completion import AnswerWriter
from trio_edge.serving.answers.job import Decided, Event
from trio_edge.serving.answers.responses import input_usage
from trio_edge.serving.requests.decisions import (
    AskedQuestion,
    ChoiceQuestion,
    PredicateQuestion,
    parse_decisions,
    renamed,
)
from trio_edge.serving.requests.errors import RequestError
from trio_edge.serving.requests.systemone import (
    NamedQuestion,
    NoulQuestion,
    OptionQuestion,
    parse_system_one,
    refused_by_system_one,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


@final
class DecisionWriter(AnswerWriter):
    """Writes a decision: a list of answers."""

    def __init__(self, body: bytearray, max_parts: int) -> None:
        """Read the request; raises RequestError as ``parse_decisions``."""
        self._asked, (self.chat, self.asking, self._places) = parse_decisions(body, max_parts=max_parts)

    def renamed(self, error: RequestError) -> RequestError:
        """Return an error with the names of a decision's fields."""
        return renamed(error, self._places)

    def result(self, events: Sequence[Event], usage: dict[str, Any]) -> dict[str, Any]:
        """Return a decision."""
        answers = [_answer(asked, one) for asked, one in zip(self._asked.questions, _in_order(events))]
        return {"model": self._model, "answers": answers, "usage": input_usage(usage)}


@final
class SystemOneWriter(AnswerWriter):
    """Writes a response of System One: answers by name."""

    def __init__(self, body: bytearray, max_parts: int) -> None:
        """Read the request; raises RequestError as ``parse_system_one``."""
        try:
            self._asked, (self.chat, self.asking, self._places) = parse_system_one(body, max_parts=max_parts)
        except RequestError as error:
            raise refused_by_system_one(error, {"messages": "state"}) from None

    def renamed(self, error: RequestError) -> RequestError:
        """Return an error with the names and the status of System One."""
        return refused_by_system_one(error, self._places)

    def result(self, events: Sequence[Event], usage: dict[str, Any]) -> dict[str, Any]:
        """Return a response."""
        found = dict(zip(self._asked, _in_order(events)))
        return {
            "model": self._model,
            "answers": {name: _named_answer(self._asked[name], one) for name, one in found.items()},
            "usage": input_usage(usage),
            "diagnostics": {name: one.diagnostics for name, one in found.items()},
        }


def _in_order(events: Sequence[Event]) -> list[Decided]:
    return sorted((event for event in events if isinstance(event, Decided)), key=lambda event: event.index)


def _answer(asked: AskedQuestion, found: Decided) -> dict[str, Any]:
    shares, own = found.probabilities, {"name": asked.name, "diagnostics": found.diagnostics}
    if isinstance(asked, PredicateQuestion):
        return {"type": "predicate", "probability": shares[0], **own}
    sure = {"confidence": max(shares), **own}
    if isinstance(asked, ChoiceQuestion):
        values = [choice.value for choice in asked.choices]
        listed = [{"value": value, "probability": share} for value, share in zip(values, shares)]
        return {"type": "choice", "choice": values[_likeliest(shares)], "probabilities": listed, **sure}
    levels = [
        {"label": level.label, "value": value, "probability": share}
        for value, (level, share) in enumerate(zip(asked.levels, shares))
    ]
    return {"type": "score", "score": found.score, "probabilities": levels, **sure}


def _named_answer(asked: NamedQuestion, found: Decided) -> dict[str, Any]:
    shares = found.probabilities
    if isinstance(asked, NoulQuestion):
        return {"type": "noul", "noul": shares[0]}
    sure = {"confidence": max(shares)}
    if isinstance(asked, OptionQuestion):
        names = list(asked.criteria)
        chosen = names[_likeliest(shares)]
        return {"type": "choice", "choice": chosen, "probabilities": dict(zip(names, shares)), **sure}
    legend = {str(level): content for level, content in enumerate(asked.criteria)}
    probabilities = dict(zip(legend, shares))
    return {"type": "score", "score": found.score, "legend": legend, "probabilities": probabilities, **sure}


def _likeliest(shares: list[float]) -> int:
    return shares.index(max(shares))
