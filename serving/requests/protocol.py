"""The body of ``POST /v1/chat/completions``: OpenAI's fields, some of vLLM's, and our own under ``trio``.

Each field takes effect or is refused by name; none is ignored. ``user`` and its like have no effect at OpenAI either.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec

from trio_edge.runtime.bundle.limits import typed_json
from trio_edge.serving.requests.errors import RequestError, invalid_value

_T = TypeVar("_T")

_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 256
_MAX_CHOICES = 256
_MAX_CHOICE_CHARACTERS = 1024
_MAX_ANSWERS = 16
_MAX_BIASES = 1024
_MAX_LOGPROBS = 20  # as at OpenAI
_MAX_SCHEMA_LEVELS = 32  # the grammar's compiler recurses
_MAX_JSON_LEVELS = 32  # as at OpenAI
_MAX_SCHEMA_BYTES = 1 << 16
# llguidance (1.9) needs 4 times as long for 2 more patterns that must hold together, and builds a state for each remainder.
_MAX_PATTERNS = 12
_MAX_MULTIPLE = 10_000

# Fields that are known but not supported, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "store": (False,),
    "metadata": ({},),
}
_NEUTRAL_IN_TURN: dict[str, tuple[object, ...]] = {
    "name": (),
    "refusal": (),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "annotations": ([],),
}
_TOOLS = ("tools", "functions", "tool_choice", "function_call", "tool_calls")

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Positive: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
_Seed: TypeAlias = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_Penalty: TypeAlias = Annotated[float, msgspec.Meta(ge=-2, le=2)]
_Bias: TypeAlias = Annotated[float, msgspec.Meta(ge=-100, le=100)]
_Choice: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_CHOICE_CHARACTERS)]
_Stop: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_STOP_CHARACTERS)]


class Spec(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A JSON object whose fields are all known."""


class ImageAddress(Spec, kw_only=True, frozen=True):
    """The address of an image."""

    url: str
    detail: Literal["low", "high", "auto"] = "auto"


class VideoAddress(Spec, kw_only=True, frozen=True):
    """The address of a video, and the sampling of its frames."""

    url: str
    fps: float | None = None
    num_frames: int | None = None


class TextPart(Spec, kw_only=True, frozen=True, tag="text", tag_field="type"):
    """A piece of text."""

    text: str


class ImagePart(Spec, kw_only=True, frozen=True, tag="image_url", tag_field="type"):
    """An image."""

    image_url: ImageAddress


class VideoPart(Spec, kw_only=True, frozen=True, tag="video_url", tag_field="type"):
    """A video, in vLLM's form."""

    video_url: VideoAddress


Part: TypeAlias = TextPart | ImagePart | VideoPart


class Turn(Spec, kw_only=True, frozen=True):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], msgspec.Meta(min_length=1)]
    # openai-python sends these with earlier answers. All must be empty.
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


class StreamOptions(Spec, kw_only=True, frozen=True):
    """Options of a streamed answer."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = None  # there is none


class JsonSchema(Spec, kw_only=True, frozen=True):
    """The JSON schema of the answer."""

    name: str = ""
    schema: dict[str, Any]
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Spec, kw_only=True, frozen=True):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Spec, kw_only=True, frozen=True):
    """vLLM's field for an answer that is one of several texts."""

    choice: Annotated[list[_Choice], msgspec.Meta(min_length=1, max_length=_MAX_CHOICES)]


class LevelOptions(Spec, kw_only=True, frozen=True):
    """Our own options of all requests."""

    level: str | None = None
    """One of the bundle's levels, or "auto"; None for its default."""


class TrioOptions(LevelOptions, kw_only=True, frozen=True):
    """Our own options of chats."""

    kept: bool = False
    """Whether the answer has the boxes of the kept tokens and the times of the graphs."""


class AnyRequest(Spec, kw_only=True, frozen=True):
    """The fields of chat completions and of responses."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=_MAX_LOGPROBS)] | None = None
    trio: TrioOptions = TrioOptions()
    # Clients send these; none has an effect on an answer here.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    # Known but not supported.
    tools: Any = None
    tool_choice: Any = None
    store: bool | None = None
    metadata: dict[str, str] | None = None


class ChatRequest(AnyRequest, kw_only=True, frozen=True):
    """A request for a chat completion."""

    messages: Annotated[list[Turn], msgspec.Meta(min_length=1)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    seed: _Seed | None = None
    stop: _Stop | Annotated[list[_Stop], msgspec.Meta(max_length=_MAX_STOPS)] | None = None
    response_format: ResponseFormat | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=_MAX_ANSWERS)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[int, _Bias], msgspec.Meta(max_length=_MAX_BIASES)] | None = None
    logprobs: bool | None = None
    modalities: list[Literal["text"]] | None = None
    functions: Any = None
    function_call: Any = None
    # Fields of vLLM.
    top_k: _Count | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    min_tokens: _Count | None = None
    ignore_eos: bool | None = False
    structured_outputs: StructuredOutputs | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Maximum number of new tokens; None for the checkpoint's setting, at most the bundle's limit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def images(self) -> list[ImageAddress]:
        """All images."""
        parts = (part for turn in self.messages for part in turn.parts)
        return [part.image_url for part in parts if isinstance(part, ImagePart)]

    @property
    def details(self) -> frozenset[str]:
        """The ``detail`` values of all images, without "auto"."""
        return frozenset(image.detail for image in self.images) - {"auto"}


def parse_chat(body: bytes | bytearray, *, max_parts: int) -> ChatRequest:
    """Return the request in ``body``.

    Args:
        body: JSON in UTF-8.
        max_parts: Maximum number of messages and content parts together.

    Raises:
        RequestError: If the body is not JSON, or a field is missing, unknown, wrong or not supported.
    """
    return checked(decoded(body, ChatRequest), max_parts=max_parts)


def decoded(body: bytes | bytearray, kind: type[_T]) -> _T:
    """Return the JSON in ``body`` as a ``kind``; raises RequestError if it is none."""
    try:
        return typed_json(body, kind)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(400, f"body: expected JSON in UTF-8, got: {error}", code="invalid_json") from None
    except RecursionError:
        message = "body: expected fewer nested levels of JSON, got too many; send fewer"
        raise RequestError(400, message, code="invalid_json") from None


def checked(chat: ChatRequest, *, max_parts: int) -> ChatRequest:
    """Return the request; raises RequestError if fields are not supported, too large, or contradict each other."""
    _check_neutral(chat)
    _check_sizes(chat, max_parts=max_parts)
    _check_together(chat)
    return chat


def _field_error(message: str) -> RequestError:
    """Return msgspec's error with the field's name first, such as ``messages[0].role: …``."""
    reason, _, path = re.sub(" - at `key` in `", " - at `", message).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", reason, re.DOTALL)
    missing = re.fullmatch(r"Object missing required field `(.*)`", reason)
    if found := unknown or missing:
        path = f"{path}.{' '.join(found[1].split())[:64]}".lstrip(".")
        reason = "not a field of this server; remove it" if unknown else "expected this field, got none"
    code = "unknown_parameter" if unknown else "missing_required_parameter" if missing else "invalid_value"
    return RequestError(
        400, f"{path or 'body'}: {' '.join(reason.split())[:300]}", code=code, param=path or None
    )


def _check_neutral(chat: ChatRequest) -> None:
    turns = [(f"messages[{number}].", turn, _NEUTRAL_IN_TURN) for number, turn in enumerate(chat.messages)]
    for where, holder, fields in (("", chat, _NEUTRAL), *turns):
        for name, neutral in fields.items():
            if (value := getattr(holder, name)) is None or value in neutral:
                continue
            only = f"only {neutral[0]!r}" if neutral else "no value"
            problem = f"expected {only}, got {value!r:.80}; this server does not support it, remove it"
            if name in _TOOLS:
                problem = "this server calls no functions; remove it, or ask for JSON and call the function yourself"
            raise RequestError(400, f"{where}{name}: {problem}", code="unsupported_parameter", param=name)


def _check_sizes(chat: ChatRequest, *, max_parts: int) -> None:
    num_parts = len(chat.messages) + sum(len(turn.parts) for turn in chat.messages)
    if num_parts > max_parts:
        problem = f"expected at most {max_parts} messages and parts, got {num_parts}; send fewer"
        raise invalid_value("messages", problem)
    form = chat.response_format
    if form is not None and form.json_schema is not None:
        _check_schema(form.json_schema.schema)


def _check_schema(schema: dict[str, Any]) -> None:
    """Refuse a schema that could hold a bundle: a small one may keep the grammar's compiler busy for hours."""
    level, named, problem = list[Any]([schema]), list[tuple[str, Any]](), None
    for _ in range(_MAX_SCHEMA_LEVELS):
        named += [pair for value in level if isinstance(value, dict) for pair in value.items()]
        level = [item for value in level for item in _items(value)]
    patterns = sum(name in ("pattern", "format") for name, _ in named)
    patterns += sum(len(_items(value)) for name, value in named if name == "patternProperties")
    multiples = [value for name, value in named if name == "multipleOf" and isinstance(value, (int, float))]
    factors = {Fraction(str(value + 0)).numerator for value in multiples}
    if level:
        problem = f"at most {_MAX_SCHEMA_LEVELS} levels, got more; make it flatter"
    elif (size := len(msgspec.json.encode(schema))) > _MAX_SCHEMA_BYTES:
        problem = f"at most {_MAX_SCHEMA_BYTES} bytes, got {size}; shorten it"
    elif patterns > _MAX_PATTERNS:
        problem = f"at most {_MAX_PATTERNS} patterns and formats, got {patterns}; use fewer"
    elif abs(math.prod(factors)) > _MAX_MULTIPLE:
        problem = f"multipleOf with a product up to {_MAX_MULTIPLE}, got more; use smaller ones"
    if problem is not None:
        raise invalid_value("response_format", f"expected a schema of {problem}")


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def json_text(value: Any, *, where: str) -> str:
    """Return JSON as compact text; raises RequestError for the field ``where`` if it has too many levels."""
    level = [value]
    for _ in range(_MAX_JSON_LEVELS + 1):
        level = [item for one in level for item in _items(one)]
    if level:
        raise invalid_value(
            where, f"expected at most {_MAX_JSON_LEVELS} levels of JSON, got more; make it flatter"
        )
    return msgspec.json.encode(value).decode()


def _check_together(chat: ChatRequest) -> None:
    """Refuse fields that contradict each other."""
    form, problem = chat.response_format, None
    has_format = form is not None and form.type != "text"
    if chat.max_tokens and chat.max_completion_tokens and chat.max_tokens != chat.max_completion_tokens:
        problem = ("max_tokens", "expected one limit, got two; send max_completion_tokens alone")
    elif chat.stream_options is not None and not chat.stream:
        problem = ("stream_options", 'expected it with "stream": true only, got it without; remove it')
    elif form is not None and (form.type == "json_schema") != (form.json_schema is not None):
        problem = (
            "response_format",
            'expected "json_schema" with the type "json_schema" only, got another combination; correct one',
        )
    elif has_format and chat.structured_outputs is not None:
        problem = ("structured_outputs", "expected this or response_format, got both; send one")
    elif chat.ignore_eos and (has_format or chat.structured_outputs is not None):
        problem = ("ignore_eos", "expected an answer that may end, as its form is given, got true; remove it")
    elif chat.top_logprobs is not None and not chat.logprobs:
        problem = ("top_logprobs", 'expected it with "logprobs": true only, got it without; add that')
    elif not any(
        part.text.strip() if isinstance(part, TextPart) else part for part in chat.messages[-1].parts
    ):
        problem = ("messages", "expected a question or an image in the last message, got none; write one")
    elif len(chat.details) > 1:
        problem = ("messages", 'expected one detail for all images, got "low" and "high"; choose one')
    if problem is not None:
        raise invalid_value(*problem)
