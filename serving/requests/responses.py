"""The body of ``POST /v1/responses``, OpenAI's newer interface, and the chat request that it stands for."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from trio_edge.serving.requests.errors import RequestError
from trio_edge.serving.requests.protocol import (
    AnyRequest,
    ChatRequest,
    ImageAddress,
    ImagePart,
    JsonSchema,
    Part,
    Positive,
    ResponseFormat,
    Spec,
    TextPart,
    Turn,
    checked,
    decoded,
)

_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}


class InputText(Spec, kw_only=True, frozen=True, tag="input_text", tag_field="type"):
    """A piece of text."""

    text: str
    prompt_cache_breakpoint: Any = None  # no effect, like all about caching


class OutputText(Spec, kw_only=True, frozen=True, tag="output_text", tag_field="type"):
    """The text of an earlier answer, as a response has it."""

    text: str
    annotations: Any = None
    logprobs: Any = None


class InputImage(Spec, kw_only=True, frozen=True, tag="input_image", tag_field="type"):
    """An image."""

    image_url: str
    detail: Literal["low", "high", "auto", "original"] | None = None
    file_id: None = None
    prompt_cache_breakpoint: Any = None


InputPart: TypeAlias = InputText | OutputText | InputImage


class InputTurn(Spec, kw_only=True, frozen=True):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputPart], msgspec.Meta(min_length=1)]
    type: Literal["message"] = "message"
    # Earlier answers have these.
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class TextFormat(Spec, kw_only=True, frozen=True):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(Spec, kw_only=True, frozen=True):
    """Options of the answer's text."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseRequest(AnyRequest, kw_only=True, frozen=True):
    """A request for a response. Nothing is stored, whatever ``store`` says."""

    input: str | Annotated[list[InputTurn], msgspec.Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    text: TextOptions | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = None

    def chat(self) -> ChatRequest:
        """Return the chat request that this one stands for."""
        turns = [InputTurn(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        system = [] if self.instructions is None else [Turn(role="system", content=self.instructions)]
        shared: dict[str, Any] = {name: getattr(self, name) for name in AnyRequest.__struct_fields__}
        shared |= {"stream_options": None, "store": None, "metadata": None}
        shared["top_logprobs"] = self.top_logprobs or None
        return ChatRequest(
            messages=[*system, *(Turn(role=turn.role, content=_content(turn)) for turn in turns)],
            max_tokens=self.max_output_tokens,
            response_format=None if self.text is None else _format(self.text.format),
            logprobs=bool(self.include) or bool(self.top_logprobs),
            **shared,
        )

    def renamed(self, error: RequestError) -> RequestError:
        """Return the error of a chat request with the names of this one's fields."""
        shift = int(self.instructions is not None)
        text = re.sub(r"^messages\[(\d+)\]", lambda found: f"input[{int(found[1]) - shift}]", error.message)
        for old, new in _NAMES.items():
            text = re.sub(rf"^{old}\b", new, text)
        return replace(error, message=text, param=_NAMES.get(error.param or "", error.param))


def parse_response(body: bytes | bytearray, *, max_parts: int) -> tuple[ResponseRequest, ChatRequest]:
    """Return the request in ``body``, and the chat request that it stands for.

    Raises:
        RequestError: As ``parse_chat``.
    """
    asked = decoded(body, ResponseRequest)
    try:
        return asked, checked(asked.chat(), max_parts=max_parts)
    except RequestError as error:
        raise asked.renamed(error) from None


def _content(turn: InputTurn) -> str | list[Part]:
    if isinstance(turn.content, str):
        return turn.content
    return [
        TextPart(text=part.text) if not isinstance(part, InputImage) else image_of(part)
        for part in turn.content
    ]


def image_of(part: InputImage) -> ImagePart:
    """Return an image in the form of chat completions."""
    detail = "high" if part.detail == "original" else part.detail or "auto"
    return ImagePart(image_url=ImageAddress(url=part.image_url, detail=detail))


def _format(form: TextFormat | None) -> ResponseFormat | None:
    if form is None:
        return None
    schema = None if form.schema is None else JsonSchema(name=form.name, schema=form.schema)
    return ResponseFormat(type=form.type, json_schema=schema)
