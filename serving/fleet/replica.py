"""A replica: a process with one pipeline, which answers as many requests at once as its bundle's answers decode together."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, final

from trio_edge.runtime.bundle.graph_io import STEP_ROWS
from trio_edge.runtime.bundle.manifest import json_from_manifest
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving.answers.job import AnswerJob, Event, Failed, Finished
from trio_edge.serving.answers.worker import Worker
from trio_edge.serving.fleet.wire import packed_events, unpacked_request
from trio_edge.serving.metrics import Metrics
from trio_edge.serving.requests.content import Prompt
from trio_edge.serving.requests.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio_edge.serving.settings import ServerSettings

STARTED = b""
"""The first item of an answer, before its events: the request has left the queue."""
_STOP_S = 5.0


@final
class Replica:
    """Answers requests that Ray Serve hands over."""

    def __init__(self, name: str, bundle: str, *, loading: dict[str, Any], settings: ServerSettings) -> None:
        """Load the bundle with the keyword arguments ``loading`` of ``Pipeline.from_bundle``.

        Raises:
            TrioEdgeError: If the bundle cannot be loaded.
        """
        # Ray Serve has the queue. Requests wait here while cancelled ones reach their next token, or for another level.
        settings = replace(settings, max_queue=2 * STEP_ROWS[-1], busy_queue=None, max_wait_s=float("inf"))
        load = partial(Pipeline.from_bundle, bundle, **loading)
        self._worker = Worker(name, load, settings=settings, metrics=Metrics())
        self._worker.start()
        self._worker.loaded.result()

    async def describe(self) -> tuple[str, bytes, tuple[str, ...]]:
        """Return the backend's name, the manifest as JSON, and the levels that "auto" may run."""
        worker = self._worker
        return worker.backend_name, json_from_manifest(worker.manifest), worker.auto_levels

    async def answer(self, request: bytes) -> AsyncIterator[bytes]:
        """Yield ``STARTED``, then the events of an answer. Ray Serve closes it when the client goes away."""
        yield STARTED
        try:
            chat, messages, asking = unpacked_request(request)
            job = AnswerJob(chat, await asyncio.to_thread(Prompt, messages), asking)
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
        """Raise if the last answers all failed. Ray Serve then replaces the replica."""
        assert self._worker.is_ready, "the last answers failed"

    def __del__(self) -> None:
        """Release the pipeline. Ray Serve calls this when it removes the replica."""
        self._worker.stop(timeout_s=_STOP_S)
