"""One request on its way through a worker: what it asks for, and what comes back while it runs."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias, final

import msgspec

from trio_edge.serving.requests.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio_edge.runtime.answer import Generation
    from trio_edge.serving.requests.content import Prompt
    from trio_edge.serving.requests.protocol import ChatRequest


class NewText(msgspec.Struct, frozen=True, tag=True):
    """More text of the answer."""

    text: str


class Kept(msgspec.Struct, frozen=True, tag=True):
    """The report on the kept tokens."""

    report: dict[str, Any]


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The end of an answer."""

    reason: str
    """"stop" or "length"."""
    usage: dict[str, Any]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The end of an answer that went wrong."""

    error: RequestError


Event: TypeAlias = NewText | Kept | Finished | Failed


@final
class AnswerJob:
    """A request for a worker. Events come from its thread and are read on the event loop."""

    def __init__(self, chat: ChatRequest, prompt: Prompt) -> None:
        """Take the request; called on the event loop."""
        self.chat, self.prompt = chat, prompt
        self.generation: Generation | None = None
        """Set by the worker while the answer runs."""
        self.is_cancelled = False
        self.has_ended = False
        """Whether the last event was handed over."""
        self.submitted = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    def emit(self, event: Event | None) -> None:
        """Hand an event over; None if nothing more comes. Any thread may call it."""
        self.has_ended = self.has_ended or event is None or isinstance(event, (Finished, Failed))
        with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """Let the answer end at the next token, or not begin."""
        self.is_cancelled = True
        if self.generation is not None:
            self.generation.cancel()

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events until the last one."""
        while (event := await self._events.get()) is not None:
            yield event
            if isinstance(event, (Finished, Failed)):
                return
