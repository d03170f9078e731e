"""``POST /v1/chat/completions``: reads a request, answers it whole or streamed, and stops when the client goes away."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, Any, TypeVar, final

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from trio_edge.runtime.bundle.errors import TrioEdgeError
from trio_edge.serving.answers.job import AnswerJob, Event, Failed, Finished, Kept, NewText
from trio_edge.serving.answers.worker import answer_settings
from trio_edge.serving.requests.body import BodyReader
from trio_edge.serving.requests.content import read_prompt
from trio_edge.serving.requests.errors import RequestError, request_error_from, unknown_model
from trio_edge.serving.requests.protocol import ChatRequest, parse_chat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping

    from starlette.types import Message, Receive, Scope, Send

    from trio_edge.serving.answers.interface import ModelWorker
    from trio_edge.serving.metrics import Metrics
    from trio_edge.serving.requests.media import MediaReader
    from trio_edge.serving.settings import ServerSettings

_T = TypeVar("_T")
_CHUNK = "chat.completion.chunk"
_CLOSED = 499  # nginx's status for a client that went away; only the metrics show it


@final
class ChatEndpoint:
    """An ASGI app that answers many requests at a time."""

    def __init__(
        self,
        workers: Mapping[str, ModelWorker],
        *,
        settings: ServerSettings,
        metrics: Metrics,
        media: MediaReader,
    ) -> None:
        self._workers, self._settings, self._metrics, self._media = workers, settings, metrics, media
        self._bodies = BodyReader(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            RequestError: If the request is refused, or the answer fails before its first byte.
        """
        request, name = Request(scope, receive), ""
        try:
            async with self._bodies.read(request) as body:
                chat = await run_in_threadpool(parse_chat, body, max_parts=self._settings.max_parts)
                worker = _chosen_worker(self._workers, chat)
                name = worker.name
                job = await self._submit(worker, chat)
                try:
                    response = await self._response(request, worker, job)
                    await response(scope, receive, self._with_time_limit(send))
                finally:
                    worker.cancel(job)
            self._metrics.count_request(name, response.status_code)
        except (RequestError, TrioEdgeError) as error:
            refusal = request_error_from(error)
            self._metrics.count_request(name, refusal.status)
            raise refusal from None
        except asyncio.TimeoutError:  # the server closes the connection, as the response is incomplete
            self._metrics.count_request(name, _CLOSED)

    def _with_time_limit(self, send: Send) -> Send:
        """Return ``send`` with a time limit: a client that never reads would keep its body in memory for ever."""

        async def sending(message: Message) -> None:
            await asyncio.wait_for(send(message), self._settings.body_s)

        return sending

    async def _submit(self, worker: ModelWorker, chat: ChatRequest) -> AnswerJob:
        answer_settings(chat, worker.manifest)  # refuses a wrong setting before the images are read
        prompt = await run_in_threadpool(read_prompt, chat, self._media, max_pixels=self._settings.max_pixels)
        job = AnswerJob(chat, prompt)
        try:
            worker.submit(job)
        except BaseException:
            prompt.close()
            raise
        return job

    async def _response(self, request: Request, worker: ModelWorker, job: AnswerJob) -> Response:
        options = job.chat.stream_options
        include_usage = options is not None and bool(options.include_usage)
        completion = Completion(worker.name, job.events(), include_usage=include_usage)
        if not job.chat.stream:
            answer = await _unless_gone(request, completion.whole())
            return Response(msgspec.json.encode(answer), media_type="application/json")
        # An error before the first event can still set the HTTP status.
        first = await _unless_gone(request, completion.first())
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(completion.stream(first), media_type="text/event-stream", headers=headers)


def _chosen_worker(workers: Mapping[str, ModelWorker], chat: ChatRequest) -> ModelWorker:
    """Return the worker for a request, by its ``model`` and its images' ``detail``.

    "low" chooses the bundle of the same model that keeps the fewest visual tokens, "high" the one that keeps the most.

    Raises:
        RequestError: If the model is not served or not loaded.
    """
    named = workers.get(chat.model)
    if named is None:
        raise unknown_model(chat.model, workers)
    model = named.manifest.model
    if not chat.details:
        return named
    candidates = (named, *workers.values())  # the named one first: min and max return the first of equals
    same = [worker for worker in candidates if worker.is_ready and worker.manifest.model == model]
    choose = min if chat.details == {"low"} else max
    return choose(same or [named], key=_kept_tokens)


def _kept_tokens(worker: ModelWorker) -> float:
    manifest = worker.manifest
    most = manifest.visual_sizes[-1]
    return most * manifest.average_keep_of(most, num_images=manifest.max_images)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of ``work``; raise ``RequestError`` if the client goes away before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError(_CLOSED, "client: closed the connection before the answer")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@final
class Completion:
    """Writes one answer in OpenAI's form: one JSON object, or chunks as server-sent events."""

    def __init__(self, model: str, events: AsyncIterator[Event], *, include_usage: bool = False) -> None:
        """Start an answer by ``model``; with ``include_usage`` the last chunk of a stream has the usage."""
        self._model, self._events, self._include_usage = model, events, include_usage
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer; raises ``RequestError`` if it failed or was cancelled."""
        text, trio = "", dict[str, Any]()
        async for event in self._events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                message = {"role": "assistant", "content": text, "refusal": None}
                choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.reason}
                return self._frame("chat.completion", choices=[choice], usage=event.usage, **trio)
            if isinstance(event, NewText):
                text += event.text
            else:
                trio = {"trio": event.report}
        raise RequestError(_CLOSED, "answer: cancelled")

    async def first(self) -> Event:
        """Return the first event; raises ``RequestError`` if the answer failed or was cancelled before."""
        async for event in self._events:
            if isinstance(event, Failed):
                raise event.error
            return event
        raise RequestError(_CLOSED, "answer: cancelled")

    async def stream(self, first: Event) -> AsyncIterator[bytes]:
        """Yield the chunks of the ``first`` event and the later ones."""
        yield self._chunk({"role": "assistant", "content": ""})
        for chunk in self._chunks(first):
            yield chunk
        async for event in self._events:
            for chunk in self._chunks(event):
                yield chunk

    def _chunks(self, event: Event) -> Iterator[bytes]:
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
