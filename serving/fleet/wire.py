"""Requests and events as MessagePack between the server and a replica, read back into the same types."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from trio_edge.serving.answers.job import AnswerJob, Event
from trio_edge.serving.requests.decisions import Asking
from trio_edge.serving.requests.protocol import ChatRequest, Turn

if TYPE_CHECKING:
    from trio_edge.runtime.prompts.chat import Message

_NO_MESSAGES = [Turn(role="user", content="")]
# made here and not in threads: see ``typed`` in runtime/bundle/limits.py
_REQUEST = msgspec.msgpack.Decoder(tuple[ChatRequest, list[dict[str, Any]], Asking | None])
_EVENTS = msgspec.msgpack.Decoder(list[Event])


def packed_request(job: AnswerJob) -> bytes:
    """Return a request with the bytes of its images and videos, so that a replica fetches nothing."""
    # The client's own messages would carry every image a second time.
    chat = msgspec.structs.replace(job.chat, messages=_NO_MESSAGES)
    return msgspec.msgpack.encode((chat, job.prompt.messages, job.asking), enc_hook=Path.read_bytes)


def unpacked_request(data: bytes) -> tuple[ChatRequest, list[Message], Asking | None]:
    """Return the request without its messages, the messages, and the questions. A video is the bytes of its file."""
    return _REQUEST.decode(data)


def packed_events(events: list[Event]) -> bytes:
    """Return events as bytes."""
    return msgspec.msgpack.encode(events)


def unpacked_events(data: bytes) -> list[Event]:
    """Return the events in ``data``."""
    return _EVENTS.decode(data)
