"""The body of ``POST /v1/systemone``: TypeSafe's questions about a state, by name.

Assets are images. A text names one wherever it belongs; the model reads "[image 1]" there, and sees all images before the text.
"""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast

import msgspec

from trio_edge.runtime.decisions.questions import MOST_QUESTIONS, Question
from trio_edge.serving.requests.body import form_parts
from trio_edge.serving.requests.decisions import (
    Asking,
    Conversation,
    DecisionOptions,
    PlacedTurn,
    checked_question,
    conversation,
    renamed,
)
from trio_edge.serving.requests.errors import RequestError, invalid_value
from trio_edge.serving.requests.protocol import (
    ImageAddress,
    ImagePart,
    Spec,
    TextPart,
    decoded,
    json_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_MAX_ASSETS = 64
_PRIVATE_USE = 0xF0000

Content: TypeAlias = str | dict[str, Any] | list[Any]


class Asset(Spec, kw_only=True, frozen=True):
    """An image: a part of the request's form, or Base64."""

    type: Literal["image"] | None = None
    format: Literal["png", "jpg", "jpeg"] | None = None
    data_base64: str | None = None
    part: str | None = None


class NoulCriteria(Spec, kw_only=True, frozen=True):
    """When the answer is yes, and when no."""

    true: Content | None = None
    false: Content | None = None


class NoulQuestion(Spec, kw_only=True, frozen=True, tag="noul", tag_field="type"):
    """A yes-no question."""

    instructions: Content | None = None
    criteria: NoulCriteria | None = None


class OptionQuestion(Spec, kw_only=True, frozen=True, tag="choice", tag_field="type"):
    """A question with several options; ``criteria`` describes each."""

    instructions: Content | None = None
    criteria: dict[str, Content | None]


class RubricQuestion(Spec, kw_only=True, frozen=True, tag="score", tag_field="type"):
    """A question with ordered levels."""

    instructions: Content | None = None
    criteria: list[Content]


NamedQuestion: TypeAlias = NoulQuestion | OptionQuestion | RubricQuestion
_DEFAULT_TEXTS = {
    NoulQuestion: "Is it yes or no?",
    OptionQuestion: "Which of these is it?",
    RubricQuestion: "Which level is it?",
}


class SystemOneRequest(Spec, kw_only=True, frozen=True):
    """A request to System One. A question is read later, so that its errors can name it."""

    model: str
    state: Content
    questions: Annotated[dict[str, msgspec.Raw], msgspec.Meta(min_length=1, max_length=MOST_QUESTIONS)]
    assets: Annotated[dict[str, Asset], msgspec.Meta(min_length=1, max_length=_MAX_ASSETS)] | None = None
    trio: DecisionOptions = DecisionOptions()


def parse_system_one(
    body: bytes | bytearray, *, max_parts: int
) -> tuple[dict[str, NamedQuestion], Conversation]:
    """Return the questions in ``body``, JSON or a form, by name, and the conversation that it stands for.

    Raises:
        RequestError: As ``parse_decisions``.
    """
    parts = form_parts(body) if body.startswith(b"--") else {"request": body}
    asked = decoded(parts.pop("request", b""), SystemOneRequest)
    given = asked.assets or {}
    assets = {name: _part(asset, parts, where=f"assets.{name}") for name, asset in given.items()}
    for part in parts:
        problem = f"expected an asset for each part of the form, got none for {part!r:.80}; add it"
        raise invalid_value("assets", problem)
    write, shared, shown = _writer(assets), dict[str, int](), dict[str, int]()

    def turn(images: Iterable[str], text: str, where: str) -> PlacedTurn:
        placed = ((f"assets.{name}", assets[name]) for name in images)
        return PlacedTurn("user", [*placed, (where, TextPart(text=text))])

    state = write(asked.state, shared, "state")
    is_image = isinstance(asked.state, str) and asked.state in assets
    turns = [turn(shared, "" if is_image else state, "state")]
    named, questions = dict[str, NamedQuestion](), list[Question]()
    for name, data in asked.questions.items():
        seen, where = dict(shared), f"questions.{name}"
        named[name] = _decoded_question(data, where=where)
        questions.append(checked_question(_question(named[name], write, seen, where), where=where))
        turns.append(turn(list(seen)[len(shared) :], questions[-1].text, where))
        shown |= seen
    for name in assets.keys() - shown.keys() - shared.keys():
        problem = "expected its name in the state or a question, got none; add it"
        raise invalid_value(f"assets.{name}", problem)
    asking = Asking(questions, asked.trio)
    return named, conversation(asked.model, turns, asking, default="state", max_parts=max_parts)


def refused_by_system_one(error: RequestError, places: dict[str, str]) -> RequestError:
    """Return the error with the client's names, and with System One's status for a wrong field."""
    error = renamed(error, places)
    is_field = error.status == 400 and error.param is not None
    return replace(error, status=422) if is_field else error


def _decoded_question(data: msgspec.Raw, *, where: str) -> NamedQuestion:
    try:
        return decoded(bytes(data), cast("type[NamedQuestion]", NamedQuestion))
    except RequestError as error:
        inside = "" if error.param is None else f".{error.param}"
        problem = error.message.partition(": ")[2]
        raise replace(error, message=f"{where}{inside}: {problem}", param=where + inside) from None


def _part(asset: Asset, parts: dict[str, bytes | bytearray], *, where: str) -> ImagePart:
    """Return an asset as an image; its part leaves ``parts``."""
    data = asset.data_base64
    if asset.part is not None:
        if asset.part not in parts:
            raise invalid_value(
                where, f"expected a part {asset.part!r:.80} of the request's form, got none; send it"
            )
        data = base64.b64encode(parts.pop(asset.part)).decode()
    elif data is None or asset.format is None:
        raise invalid_value(where, "expected a part, or data_base64 and format, got neither; send the image")
    return ImagePart(image_url=ImageAddress(url=f"data:image/{asset.format or 'png'};base64,{data}"))


def _writer(assets: dict[str, ImagePart]) -> Callable[[Content, dict[str, int], str], str]:
    """Return a function that writes content as text, with the numbers of images for their names.

    It adds the names to its second argument, the numbers of the images shown; the third one is the field, for errors.
    """
    # One character stands for a name first, as the text with a number could hold another name. It is replaced in linear
    # time, which one expression of all names would not take.
    longest_first = sorted(filter(None, assets), key=len, reverse=True)
    names = {chr(_PRIVATE_USE + number): name for number, name in enumerate(longest_first)}

    def write(content: Content, shown: dict[str, int], where: str) -> str:
        text = content if isinstance(content, str) else json_text(content, where=where)
        for mark, name in names.items():
            text = text.replace(name, mark).replace(msgspec.json.encode(name).decode()[1:-1], mark)

        def number(found: re.Match[str]) -> str:
            return f"[image {shown.setdefault(names[found[0]], len(shown) + 1)}]"

        return re.sub(f"[{''.join(names)}]", number, text) if names else text

    return write


def _question(
    asked: NamedQuestion,
    write: Callable[[Content, dict[str, int], str], str],
    shown: dict[str, int],
    where: str,
) -> Question:
    def text(content: Content | None, field: str) -> str:
        return "" if content is None else write(content, shown, f"{where}.{field}")

    given = text(asked.instructions, "instructions") or _DEFAULT_TEXTS[type(asked)]
    if isinstance(asked, NoulQuestion):
        criteria = asked.criteria or NoulCriteria()
        return Question.yes_no(
            given, yes=text(criteria.true, "criteria"), no=text(criteria.false, "criteria")
        )
    if isinstance(asked, OptionQuestion):
        return Question.choice(given, {name: text(one, "criteria") for name, one in asked.criteria.items()})
    return Question.score(given, [text(one, "criteria") for one in asked.criteria])
