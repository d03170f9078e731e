"""One replica: a process with one pipeline that answers one request at a time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, final

from trio_edge.runtime.bundle.manifest import json_from_manifest
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving.answers.job import AnswerJob, Failed, Finished
from trio_edge.serving.answers.worker import Worker
from trio_edge.serving.fleet.wire import packed_events, unpacked_request
from trio_edge.serving.metrics import Metrics
from trio_edge.serving.requests.content import Prompt
from trio_edge.serving.requests.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio_edge.serving.answers.job import Event
    from trio_edge.serving.settings import ServerSettings

TURN_HAS_COME = b""
"""Marks that the request has left the queue; precedes the events."""
_STOP_S = 5.0


@final
class Replica:
    """Answers requests from Ray Serve."""

    def __init__(self, name: str, bundle: str, *, loading: dict[str, Any], settings: ServerSettings) -> None:
        """Load the folder ``bundle``; Ray Serve sends requests afterwards.

        ``loading`` are keyword arguments of ``Pipeline.from_bundle``.

        Raises:
            TrioEdgeError: If the bundle cannot be loaded.
        """
        # Ray Serve has the queue. A request may arrive while a cancelled one has not yet reached its next token.
        settings = replace(settings, max_queue=2, max_wait_s=float("inf"))
        load = partial(Pipeline.from_bundle, bundle, **loading)
        self._worker = Worker(name, load, settings=settings, metrics=Metrics())
        self._worker.start()
        self._worker.loaded.result()

    async def describe(self) -> tuple[str, bytes]:
        """Return the name of the backend and the manifest as JSON."""
        return self._worker.backend_name, json_from_manifest(self._worker.manifest)

    async def answer(self, request: bytes) -> AsyncIterator[bytes]:
        """Yield ``TURN_HAS_COME``, then the events of an answer; Ray Serve closes it when the client goes away."""
        yield TURN_HAS_COME
        try:
            chat, messages = unpacked_request(request)
            job = AnswerJob(chat, await asyncio.to_thread(Prompt, messages))
            self._worker.submit(job)
        except RequestError as error:
            yield packed_events([Failed(error)])
            return
        try:
            events: list[Event] = []
            async for event in job.events():
                events.append(event)
                # A message costs about a millisecond, so an answer that is not streamed is one message.
                if chat.stream or isinstance(event, (Finished, Failed)):
                    yield packed_events(events)
                    events.clear()
        finally:
            self._worker.cancel(job)

    def check_health(self) -> None:
        """Raise if all the last answers failed; Ray Serve then replaces the replica."""
        assert self._worker.is_ready, "the last answers failed"

    def __del__(self) -> None:
        """Release the pipeline when Ray Serve no longer needs the replica."""
        self._worker.stop(timeout_s=_STOP_S)
