"""Answers in OpenAI's form: one JSON object, or chunks as server-sent events."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any, final

import msgspec

from trio_edge.serving.answers.job import Event, Failed, Finished, Kept, NewText

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


_CHUNK = "chat.completion.chunk"


@final
class Completion:
    """Writes one answer in OpenAI's form."""

    def __init__(self, model: str, *, include_usage: bool = False) -> None:
        """Start an answer by ``model``; with ``include_usage`` the last chunk of a stream has the usage."""
        self._model, self._include_usage = model, include_usage
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, events: Sequence[Event], end: Finished) -> dict[str, Any]:
        """Return the whole answer; ``events`` are those before its end."""
        text = "".join(event.text for event in events if isinstance(event, NewText))
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.reason}
        reports = [event.report for event in events if isinstance(event, Kept)]
        trio = {"trio": reports[0]} if reports else {}
        return self._frame("chat.completion", choices=[choice], usage=end.usage, **trio)

    def first_chunk(self) -> bytes:
        """Return the chunk that names the role."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunks(self, event: Event) -> Iterator[bytes]:
        """Yield the chunks of an event."""
        if isinstance(event, NewText):
            yield self._chunk({"content": event.text})
        elif isinstance(event, Kept):
            yield self._event(self._frame(_CHUNK, choices=[], trio=event.report))
        elif isinstance(event, Failed):
            yield self._event(event.error.body)
        else:
            yield self._chunk({}, reason=event.reason)
            if self._include_usage:
                yield self._event(self._frame(_CHUNK, choices=[], usage=event.usage))
            yield b"data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], *, reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self._include_usage else {}
        return self._event(self._frame(_CHUNK, choices=[choice], **usage))

    def _frame(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, **fields}

    @staticmethod
    def _event(value: dict[str, Any]) -> bytes:
        return b"data: " + msgspec.json.encode(value) + b"\n\n"
