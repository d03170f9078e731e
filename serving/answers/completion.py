"""Answers in OpenAI's forms: one JSON object, or server-sent events. Here the form of chat completions."""

from __future__ import annotations

import abc
import time
import uuid
from typing import TYPE_CHECKING, Any, final

import msgspec

from trio_edge.serving.answers.job import Event, Failed, Finished, Kept, NewText, NextAnswer
from trio_edge.serving.requests.errors import RequestError
from trio_edge.serving.requests.protocol import parse_chat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from trio_edge.serving.requests.decisions import Asking
    from trio_edge.serving.requests.protocol import ChatRequest

CLOSED = 499
"""nginx's status for a client that went away; only the metrics show it."""
_CHUNK = "chat.completion.chunk"


class AnswerWriter(abc.ABC):
    """Reads a request in the form of one endpoint, and writes its answers in that form."""

    chat: ChatRequest
    """The request, or the chat request that it stands for."""
    asking: Asking | None = None
    """The questions that the last turns of ``chat`` ask; None for a chat."""

    def begin(self, model: str, events: AsyncIterator[Event]) -> None:
        """Start the answers of ``model``."""
        self._model, self._events, self._created = model, events, int(time.time())

    def renamed(self, error: RequestError) -> RequestError:
        """Return an error with the names of this form's fields."""
        return error

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer; raises ``RequestError`` if it failed or was cancelled."""
        events = [await self.first()]
        async for event in self._events:
            if isinstance(event, Failed):
                raise event.error
            events.append(event)
        if not isinstance(events[-1], Finished):
            raise RequestError(CLOSED, "answer: cancelled")
        return self.result(events, events[-1].usage)

    async def first(self) -> Event:
        """Return the first event; raises ``RequestError`` if the answer failed or was cancelled before."""
        async for event in self._events:
            if isinstance(event, Failed):
                raise event.error
            return event
        raise RequestError(CLOSED, "answer: cancelled")

    @abc.abstractmethod
    def result(self, events: Sequence[Event], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON of all events."""


class StreamWriter(AnswerWriter):
    """Writes answers that can be streamed, too."""

    async def stream(self, first: Event) -> AsyncIterator[bytes]:
        """Yield the chunks of the ``first`` event and the later ones."""
        for chunk in (*self.start(), *self.chunks(first)):
            yield chunk
        async for event in self._events:
            for chunk in self.chunks(event):
                yield chunk

    @abc.abstractmethod
    def start(self) -> Iterator[bytes]:
        """Yield the first chunks of a stream."""

    @abc.abstractmethod
    def chunks(self, event: Event) -> Iterator[bytes]:
        """Yield the chunks of an event."""


@final
class Completion(StreamWriter):
    """Writes a chat completion."""

    def __init__(self, body: bytearray, max_parts: int) -> None:
        """Read the request; raises RequestError as ``parse_chat``."""
        self.chat, self._index = parse_chat(body, max_parts=max_parts), 0
        options = self.chat.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        self._id = f"chatcmpl-{uuid.uuid4().hex}"

    def result(self, events: Sequence[Event], usage: dict[str, Any]) -> dict[str, Any]:
        """Return a ``chat.completion``."""
        choices, trio = list[Any](), dict[str, Any]()
        text, scores = "", list[Any]()
        for event in events:
            if isinstance(event, NewText):
                text += event.text
                scores += event.logprobs
            elif isinstance(event, Kept):
                trio = {"trio": event.report}
            elif isinstance(event, (NextAnswer, Finished)):
                message = {"role": "assistant", "content": text, "refusal": None}
                choices.append(self._choice(scores, event.reason, message=message))
                self._index, text, scores = self._index + 1, "", []
        return self._frame("chat.completion", choices=choices, usage=usage, **trio)

    def start(self) -> Iterator[bytes]:
        """Yield the chunk that an answer begins with."""
        yield self._chunk({"role": "assistant", "content": ""})

    def chunks(self, event: Event) -> Iterator[bytes]:
        """Yield the chunks of an event."""
        if isinstance(event, NewText):
            yield self._chunk({"content": event.text}, event.logprobs)
        elif isinstance(event, Kept):
            yield self._event(self._frame(_CHUNK, choices=[], trio=event.report))
        elif isinstance(event, Failed):
            yield self._event(event.error.body)
        elif isinstance(event, (NextAnswer, Finished)):
            yield self._chunk({}, reason=event.reason)
            if isinstance(event, Finished):
                if self._include_usage:
                    yield self._event(self._frame(_CHUNK, choices=[], usage=event.usage))
                yield b"data: [DONE]\n\n"
            else:
                self._index += 1
                yield from self.start()

    def _chunk(
        self, delta: dict[str, Any], scores: Sequence[Any] = (), *, reason: str | None = None
    ) -> bytes:
        usage = {"usage": None} if self._include_usage else {}
        return self._event(self._frame(_CHUNK, choices=[self._choice(scores, reason, delta=delta)], **usage))

    def _choice(self, scores: Sequence[Any], reason: str | None, **fields: Any) -> dict[str, Any]:
        logprobs = {"content": scores, "refusal": None} if self.chat.logprobs else None
        return {"index": self._index, **fields, "logprobs": logprobs, "finish_reason": reason}

    def _frame(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, **fields}

    @staticmethod
    def _event(value: dict[str, Any]) -> bytes:
        return b"data: " + msgspec.json.encode(value) + b"\n\n"
