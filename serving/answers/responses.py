"""Answers in the form of OpenAI's ``/v1/responses``."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, final

import msgspec

from trio_edge.serving.answers.completion import StreamWriter
from trio_edge.serving.answers.job import Event, Failed, Finished, Kept, NewText
from trio_edge.serving.requests.responses import parse_response

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trio_edge.serving.requests.errors import RequestError


@final
class ResponseWriter(StreamWriter):
    """Writes a response, whose output is one message."""

    def __init__(self, body: bytearray, max_parts: int) -> None:
        """Read the request; raises RequestError as ``parse_response``."""
        self._asked, self.chat = parse_response(body, max_parts=max_parts)
        self._number = 0
        self._id, self._item_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        self._text, self._scores, self._trio = "", list[Any](), dict[str, Any]()

    def renamed(self, error: RequestError) -> RequestError:
        """Return an error with the names of a response's fields."""
        return self._asked.renamed(error)

    def result(self, events: Sequence[Event], usage: dict[str, Any]) -> dict[str, Any]:
        """Return a ``response``."""
        for event in events:
            self._note(event)
        last = events[-1]
        return self._response(last.reason if isinstance(last, Finished) else "", usage)

    def start(self) -> Iterator[bytes]:
        """Yield the events that an answer begins with."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response())
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._event("response.content_part.added", **self._place, part=self._part())

    def chunks(self, event: Event) -> Iterator[bytes]:
        """Yield the events of an answer's event."""
        self._note(event)
        if isinstance(event, NewText):
            yield self._event(
                "response.output_text.delta", **self._place, delta=event.text, logprobs=event.logprobs
            )
        elif isinstance(event, Failed):
            told = self.renamed(event.error).body["error"]
            yield self._event("error", **{name: told[name] for name in ("code", "message", "param")})
        elif isinstance(event, Finished):
            whole = {"text": self._text, "logprobs": self._scores}
            yield self._event("response.output_text.done", **self._place, **whole)
            yield self._event("response.content_part.done", **self._place, part=self._part())
            response = self._response(event.reason, event.usage)
            yield self._event("response.output_item.done", output_index=0, item=response["output"][0])
            yield self._event(f"response.{response['status']}", response=response)

    def _note(self, event: Event) -> None:
        if isinstance(event, NewText):
            self._text += event.text
            self._scores += event.logprobs
        elif isinstance(event, Kept):
            self._trio = {"trio": event.report}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": self._scores}

    def _item(self, status: str, content: list[Any]) -> dict[str, Any]:
        message = {"type": "message", "role": "assistant"}
        return {"id": self._item_id, **message, "status": status, "content": content}

    def _response(self, reason: str = "", usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the response: running without a ``usage``, else at its end."""
        asked, is_cut = self._asked, reason == "length"
        status = "in_progress" if usage is None else "incomplete" if is_cut else "completed"
        echoed = ("instructions", "max_output_tokens", "metadata", "temperature", "top_p", "top_logprobs")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._model,
            "output": [] if usage is None else [self._item(status, [self._part()])],
            "usage": None if usage is None else input_usage(usage),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            **{name: getattr(asked, name) for name in echoed},
            "text": {"format": {"type": "text"}} if asked.text is None else asked.text,
            "previous_response_id": None,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "store": False,
            **self._trio,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        data = {"type": kind, "sequence_number": self._number - 1, **fields}
        return f"event: {kind}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"


def input_usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Return a ``usage`` with the names of OpenAI's newer interfaces."""
    own = dict(usage)
    cached = own.pop("cached_tokens", 0)
    return {
        "input_tokens": own.pop("prompt_tokens"),
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": own.pop("completion_tokens"),
        "output_tokens_details": {"reasoning_tokens": 0},
        **own,
    }
