"""The body of ``POST /v1/decisions``: OpenAI's questions with a fixed set of answers.

A request becomes a conversation: its input, then a turn for each question with the images of its instructions.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.decisions.questions import MOST_QUESTIONS, Option, Question
from trio_edge.runtime.decisions.wording import Sharing
from trio_edge.serving.requests.errors import RequestError, invalid_value
from trio_edge.serving.requests.protocol import (
    ChatRequest,
    ImagePart,
    LevelOptions,
    Part,
    Spec,
    TextPart,
    TrioOptions,
    Turn,
    checked,
    decoded,
    json_text,
)
from trio_edge.serving.requests.responses import InputImage, InputText, OutputText, image_of

if TYPE_CHECKING:
    from collections.abc import Sequence


class DecisionOptions(LevelOptions, kw_only=True, frozen=True):
    """Our own options: keyword arguments of ``Pipeline.iter_decisions``, and what an answer tells."""

    sharing: Sharing = "auto"
    both_orders: bool = False
    kept: bool = False
    """Whether the diagnostics have the boxes of the kept tokens and the times of the graphs."""


class Asking(msgspec.Struct, frozen=True):
    """Questions that stand in the last turns of a conversation."""

    questions: list[Question]
    options: DecisionOptions


class PlacedTurn(NamedTuple):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    parts: list[tuple[str, Part]]
    """Each with the client's name of its field."""


class Conversation(NamedTuple):
    """A request with questions, as a worker takes it."""

    chat: ChatRequest
    asking: Asking
    places: dict[str, str]
    """The client's name for each field of ``chat`` that an error can name."""


class InputJson(Spec, kw_only=True, frozen=True, tag="input_json", tag_field="type"):
    """JSON, which the model reads as compact text."""

    data: dict[str, Any] | list[dict[str, Any]]

    @property
    def text(self) -> str:
        """The text; raises RequestError if it has too many levels."""
        return json_text(self.data, where="data")


class RefusalText(Spec, kw_only=True, frozen=True, tag="refusal", tag_field="type"):
    """An earlier refusal."""

    text: str = msgspec.field(name="refusal")


QuestionPart: TypeAlias = InputText | InputImage | InputJson
DecisionPart: TypeAlias = QuestionPart | OutputText | RefusalText


class DecisionTurn(Spec, kw_only=True, frozen=True):
    """A message of the input."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[DecisionPart], msgspec.Meta(min_length=1)]
    type: Literal["message"] = "message"
    phase: Literal["commentary", "final_answer"] | None = None


class _AnyQuestion(Spec, kw_only=True, frozen=True):
    instructions: str | list[QuestionPart]
    name: str | None = None


class PredicateQuestion(_AnyQuestion, kw_only=True, frozen=True, tag="predicate", tag_field="type"):
    """A statement that is true or not."""


class ChoiceValue(Spec, kw_only=True, frozen=True):
    """An option of a choice."""

    value: str | bool
    description: str | None = None

    @property
    def option(self) -> Option:
        """The option; true and false are words to the model."""
        name = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return Option(name, self.description or "")


class ChoiceQuestion(_AnyQuestion, kw_only=True, frozen=True, tag="choice", tag_field="type"):
    """A question with several options."""

    choices: list[ChoiceValue]


class ScoreLevel(Spec, kw_only=True, frozen=True):
    """A level of a score."""

    label: str
    description: str | None = None


class ScoreQuestion(_AnyQuestion, kw_only=True, frozen=True, tag="score", tag_field="type"):
    """A question with ordered levels."""

    levels: list[ScoreLevel]


AskedQuestion: TypeAlias = PredicateQuestion | ChoiceQuestion | ScoreQuestion


class DecisionRequest(Spec, kw_only=True, frozen=True):
    """A request for decisions."""

    model: str
    input: str | Annotated[list[DecisionTurn], msgspec.Meta(min_length=1)]
    questions: Annotated[list[AskedQuestion], msgspec.Meta(min_length=1, max_length=MOST_QUESTIONS)]
    trio: DecisionOptions = DecisionOptions()
    # Clients send these; none has an effect on an answer here.
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    safety_identifier: str | None = None


def parse_decisions(body: bytes | bytearray, *, max_parts: int) -> tuple[DecisionRequest, Conversation]:
    """Return the request in ``body``, and the conversation that it stands for.

    Raises:
        RequestError: As ``parse_chat``, or if a question cannot be asked.
    """
    asked, questions = decoded(body, DecisionRequest), list[Question]()
    given = asked.input
    messages = [DecisionTurn(role="user", content=given)] if isinstance(given, str) else given
    turns = [
        PlacedTurn(turn.role, _placed(turn.content, where=f"input[{number}].content"))
        for number, turn in enumerate(messages)
    ]
    if messages[-1].role == "user":
        turns[-1] = _with_numbers(turns[-1], where=f"input[{len(turns) - 1}].content", before=turns[:-1])
    shared = turns[:]
    for number, one in enumerate(asked.questions):
        where = f"questions[{number}]"
        own = PlacedTurn("user", _placed(one.instructions, where=f"{where}.instructions"))
        turns.append(_with_numbers(own, where=f"{where}.instructions", before=shared))
        text = "\n".join(part.text for _, part in turns[-1].parts if isinstance(part, TextPart))
        questions.append(checked_question(_question(one, text), where=where))
    asking = Asking(questions, asked.trio)
    return asked, conversation(asked.model, turns, asking, default="input", max_parts=max_parts)


def conversation(
    model: str, turns: Sequence[PlacedTurn], asking: Asking, *, default: str, max_parts: int
) -> Conversation:
    """Return a conversation; the last turns are those of the questions, which count as parts beyond ``max_parts``.

    ``default`` is the client's name of a field that has no name of its own. Raises RequestError if a part is wrong or too many.
    """
    messages = [Turn(role=turn.role, content=[part for _, part in turn.parts]) for turn in turns]
    places = {
        f"messages[{number}].content[{place}]": name
        for number, turn in enumerate(turns)
        for place, (name, _) in enumerate(turn.parts)
    }
    chat = ChatRequest(model=model, messages=messages, trio=TrioOptions(level=asking.options.level))
    found = Conversation(chat, asking, {"messages": default, **places})
    try:
        checked(found.chat, max_parts=max_parts + 2 * len(asking.questions))
    except RequestError as error:
        raise renamed(error, found.places) from None
    return found


def checked_question(question: Question, *, where: str) -> Question:
    """Return the question; raises RequestError for the field ``where`` if it cannot be asked."""
    try:
        return question.checked()
    except ShapeError as error:
        raise invalid_value(where, str(error)) from None


def renamed(error: RequestError, places: dict[str, str]) -> RequestError:
    """Return the error of a chat request with the client's names of its fields."""
    field, separator, rest = error.message.partition(": ")
    place = places.get(field, field)
    param = error.param
    if param == "messages":
        param = place if field in places else places["messages"]
    return replace(error, message=f"{place}{separator}{rest}", param=param)


def _placed(content: str | Sequence[DecisionPart], *, where: str) -> list[tuple[str, Part]]:
    if isinstance(content, str):
        return [(where, TextPart(text=content))]
    parts = [image_of(part) if isinstance(part, InputImage) else TextPart(text=part.text) for part in content]
    return [(f"{where}[{place}]", part) for place, part in enumerate(parts)]


def _with_numbers(turn: PlacedTurn, *, where: str, before: Sequence[PlacedTurn]) -> PlacedTurn:
    """Return a turn that the model sees with its images first: text between them becomes one with "[image 1]" for each."""
    seen = [isinstance(part, ImagePart) for _, part in turn.parts]
    images = [part for part, is_image in zip(turn.parts, seen) if is_image]
    if not images or all(seen[seen.index(True) : len(seen) - seen[::-1].index(True)]):
        return turn
    numbers = itertools.count(
        1 + sum(isinstance(part, ImagePart) for other in before for _, part in other.parts)
    )
    texts = [
        part.text if isinstance(part, TextPart) else f"[image {next(numbers)}]" for _, part in turn.parts
    ]
    return PlacedTurn(turn.role, [*images, (where, TextPart(text="\n".join(texts)))])


def _question(asked: AskedQuestion, text: str) -> Question:
    if isinstance(asked, PredicateQuestion):
        return Question.yes_no(text, name=asked.name)
    if isinstance(asked, ChoiceQuestion):
        return Question("choice", text, tuple(choice.option for choice in asked.choices), asked.name)
    levels = (Option(level.label, level.description or "") for level in asked.levels)
    return Question("score", text, tuple(levels), asked.name)
