"""The body of ``POST /v1/chat/completions``: OpenAI's fields, some of vLLM's, and our own under ``trio``.

Each field has an effect or is refused by name; none is ignored, except ``user``, which has no effect with OpenAI either.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from trio_edge.serving.requests.errors import RequestError, field_error

MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256
MOST_CHOICES = 256
DEEPEST_SCHEMA = 32
"""Most levels of a JSON schema, because the grammar's compiler is recursive."""

_NEUTRAL = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "store": False,
    "metadata": {},
}
"""Known but unsupported fields, and the value at which they have no effect."""
_NEUTRAL_IN_TURN: dict[str, Any] = {"tool_calls": [], "annotations": []}

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
_Positive: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
_Text: TypeAlias = Annotated[str, msgspec.Meta(min_length=1)]
_Stop: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=MOST_STOP_CHARACTERS)]


class _Spec(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    pass


class ImageAddress(_Spec, kw_only=True, frozen=True):
    """The address of an image."""

    url: str
    detail: Literal["low", "high", "auto"] = "auto"


class VideoAddress(_Spec, kw_only=True, frozen=True):
    """The address of a video, and the frames to sample from it."""

    url: str
    fps: float | None = None
    num_frames: int | None = None


class TextPart(_Spec, kw_only=True, frozen=True, tag="text", tag_field="type"):
    """A piece of text."""

    text: str


class ImagePart(_Spec, kw_only=True, frozen=True, tag="image_url", tag_field="type"):
    """An image."""

    image_url: ImageAddress


class VideoPart(_Spec, kw_only=True, frozen=True, tag="video_url", tag_field="type"):
    """A video, in vLLM's form."""

    video_url: VideoAddress


Part: TypeAlias = TextPart | ImagePart | VideoPart


class Turn(_Spec, kw_only=True, frozen=True):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    # openai-python adds these fields to an answer that is sent back; all must be empty.
    name: str | None = None
    refusal: str | None = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None
    annotations: Any = None

    @property
    def parts(self) -> list[Part]:
        """The content as parts."""
        return [TextPart(text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(_Spec, kw_only=True, frozen=True):
    """Options of a streamed answer."""

    include_usage: bool | None = False


class JsonSchema(_Spec, kw_only=True, frozen=True):
    """A schema that the answer must fit."""

    name: str = ""
    schema: dict[str, Any]
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(_Spec, kw_only=True, frozen=True):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Spec, kw_only=True, frozen=True):
    """vLLM's way to ask for one of several texts."""

    choice: Annotated[list[_Text], msgspec.Meta(min_length=1, max_length=MOST_CHOICES)]


class TrioOptions(_Spec, kw_only=True, frozen=True):
    """Our own options."""

    kept: bool = False
    """Whether the answer tells the boxes of the kept tokens and the times of the graphs."""


class ChatRequest(_Spec, kw_only=True, frozen=True):
    """A request for an answer."""

    model: str
    messages: Annotated[list[Turn], msgspec.Meta(min_length=1)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: _Positive | None = None
    max_completion_tokens: _Positive | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    seed: _Count | None = None
    stop: _Stop | Annotated[list[_Stop], msgspec.Meta(max_length=MOST_STOPS)] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    # Fields of vLLM.
    top_k: _Count | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    min_tokens: _Count | None = None
    ignore_eos: bool | None = False
    structured_outputs: StructuredOutputs | None = None
    trio: TrioOptions = TrioOptions()
    # Known but not supported, see ``_NEUTRAL``.
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    store: bool | None = None
    metadata: dict[str, str] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop texts, which end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens; None for the bundle's limit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def details(self) -> frozenset[str]:
        """The images' values of ``detail``, except "auto"."""
        parts = (part for turn in self.messages for part in turn.parts)
        return frozenset(part.image_url.detail for part in parts if isinstance(part, ImagePart)) - {"auto"}


_DECODER = msgspec.json.Decoder(ChatRequest)


def parse_chat(body: bytes, *, max_parts: int) -> ChatRequest:
    """Return the request in ``body``, JSON in UTF-8 with at most ``max_parts`` messages and content parts.

    Raises:
        RequestError: If it is no JSON, or a field is missing, unknown, wrong or not supported.
    """
    try:
        chat = _DECODER.decode(body)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(400, f"body: expected JSON in UTF-8, got: {error}", code="invalid_json") from None
    except RecursionError:
        raise RequestError(
            400, "body: expected JSON with fewer levels, got too many; make it flatter", code="invalid_json"
        ) from None
    _check_neutral(chat)
    _check_sizes(chat, max_parts=max_parts)
    _check_together(chat)
    return chat


def _field_error(message: str) -> RequestError:
    """Return msgspec's error with the field's name first, such as ``messages[0].role: …``."""
    reason, _, path = message.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", reason, re.DOTALL)
    missing = re.fullmatch(r"Object missing required field `(.*)`", reason)
    if found := unknown or missing:
        path = f"{path}.{' '.join(found[1].split())[:64]}".lstrip(".")
        reason = "not a field of this server; remove it" if unknown else "expected this field, got none"
    code = "unknown_parameter" if unknown else "missing_required_parameter" if missing else "invalid_value"
    return field_error(f"{path or 'body'}: {' '.join(reason.split())[:300]}", param=path or None, code=code)


def _check_neutral(chat: ChatRequest) -> None:
    for name, neutral in _NEUTRAL.items():
        _check_empty(name, getattr(chat, name), neutral)
    for number, turn in enumerate(chat.messages):
        for name in ("name", "refusal", "audio", "function_call", "tool_calls", "annotations"):
            _check_empty(f"messages[{number}].{name}", getattr(turn, name), _NEUTRAL_IN_TURN.get(name))


def _check_empty(name: str, value: object, neutral: object) -> None:
    if value is not None and value != neutral:
        only = "no value" if neutral is None else f"only {neutral!r}"
        raise field_error(
            f"{name}: expected {only}, got {value!r:.80}; this server does not support it",
            param=name.split("]")[-1].lstrip("."),
            code="unsupported_parameter",
        )


def _check_sizes(chat: ChatRequest, *, max_parts: int) -> None:
    num_parts = len(chat.messages) + sum(len(turn.parts) for turn in chat.messages)
    if num_parts > max_parts:
        raise field_error(
            f"messages: expected at most {max_parts} messages and parts, got {num_parts}; send fewer",
            param="messages",
        )
    form = chat.response_format
    if form is not None and form.json_schema is not None:
        _check_depth(form.json_schema.schema)


def _check_depth(schema: dict[str, Any]) -> None:
    level: list[Any] = [schema]
    for _ in range(DEEPEST_SCHEMA):
        level = [
            item
            for value in level
            for item in (
                value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            )
        ]
        if not level:
            return
    raise field_error(
        f"response_format: expected a schema of at most {DEEPEST_SCHEMA} levels, got more; make it flatter",
        param="response_format",
    )


def _check_together(chat: ChatRequest) -> None:
    """Raise RequestError for fields that contradict each other."""
    form, problem = chat.response_format, None
    has_format = form is not None and form.type != "text"
    if chat.max_tokens and chat.max_completion_tokens and chat.max_tokens != chat.max_completion_tokens:
        problem = ("max_tokens", "expected one limit, got two; send max_completion_tokens alone")
    elif chat.stream_options is not None and not chat.stream:
        problem = ("stream_options", 'expected it with "stream": true only; remove it')
    elif form is not None and (form.type == "json_schema") != (form.json_schema is not None):
        problem = ("response_format", 'expected "json_schema" with the type "json_schema", and with no other')
    elif has_format and chat.structured_outputs is not None:
        problem = ("structured_outputs", "expected it or response_format, got both; send one")
    elif chat.ignore_eos and (has_format or chat.structured_outputs is not None):
        problem = (
            "ignore_eos",
            "expected no ignore_eos with a given form, whose answer must be able to end; remove it",
        )
    elif len(chat.details) > 1:
        problem = ("messages", 'expected one detail for all images, got "low" and "high"; choose one')
    if problem is not None:
        raise field_error(f"{problem[0]}: {problem[1]}", param=problem[0])
