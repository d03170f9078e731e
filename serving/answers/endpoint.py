"""An endpoint that answers: reads a request, answers it whole or streamed, and stops when the client goes away."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar, final

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from trio_edge.runtime.bundle.errors import TrioEdgeError
from trio_edge.runtime.bundle.manifest import AUTO
from trio_edge.serving.answers.completion import CLOSED, StreamWriter
from trio_edge.serving.answers.interface import named_levels
from trio_edge.serving.answers.job import AnswerJob
from trio_edge.serving.answers.worker import answer_settings
from trio_edge.serving.requests.content import read_prompt
from trio_edge.serving.requests.errors import RequestError, invalid_value, request_error_from, unknown_model
from trio_edge.serving.requests.protocol import VideoPart

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from starlette.types import Message, Receive, Scope, Send

    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.serving.answers.completion import AnswerWriter
    from trio_edge.serving.answers.interface import ModelWorker
    from trio_edge.serving.metrics import Metrics
    from trio_edge.serving.requests.body import BodyReader
    from trio_edge.serving.requests.decisions import Asking
    from trio_edge.serving.requests.media import MediaReader
    from trio_edge.serving.requests.protocol import ChatRequest
    from trio_edge.serving.settings import ServerSettings

_T = TypeVar("_T")


@final
class AnswerEndpoint:
    """An ASGI app that answers many requests at a time."""

    def __init__(
        self,
        read: Callable[[bytearray, int], AnswerWriter],
        *,
        workers: Mapping[str, ModelWorker],
        settings: ServerSettings,
        metrics: Metrics,
        media: MediaReader,
        bodies: BodyReader,
        takes_forms: bool = False,
    ) -> None:
        """Answer requests that ``read`` reads from a body; its second argument is the maximum number of parts.

        Bodies are JSON and, with ``takes_forms``, multipart forms.
        """
        self._read, self._bodies, self._takes_forms = read, bodies, takes_forms
        self._workers, self._settings, self._metrics, self._media = workers, settings, metrics, media

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            RequestError: If the request is refused, or the answer fails before its first byte.
        """
        request, name, writer = Request(scope, receive), "", None
        try:
            async with self._bodies.read(request, takes_forms=self._takes_forms) as body:
                writer = await run_in_threadpool(self._read, body, self._settings.max_parts)
                worker, level = _chosen_worker(self._workers, writer.chat)
                name = worker.name
                chat = self._clamped(writer.chat, worker.manifest)
                trio = msgspec.structs.replace(chat.trio, level=level)
                chat = msgspec.structs.replace(chat, trio=trio)
                job = await self._submit(worker, chat, writer.asking)
                try:
                    writer.begin(name, job.events())
                    response = await self._response(request, job, writer)
                    await response(scope, receive, self._with_time_limit(send))
                finally:
                    worker.cancel(job)
            self._metrics.count_request(name, response.status_code)
        except (RequestError, TrioEdgeError) as error:
            refusal = request_error_from(error)
            refusal = refusal if writer is None else writer.renamed(refusal)
            self._metrics.count_request(name, refusal.status)
            raise refusal from None
        except asyncio.TimeoutError:  # the server closes the connection, as the response is incomplete
            self._metrics.count_request(name, CLOSED)

    def _with_time_limit(self, send: Send) -> Send:
        """Return ``send`` with a time limit: a client that never reads would keep its body in memory for ever."""

        async def sending(message: Message) -> None:
            await asyncio.wait_for(send(message), self._settings.body_s)

        return sending

    async def _submit(self, worker: ModelWorker, chat: ChatRequest, asking: Asking | None) -> AnswerJob:
        answer_settings(chat, worker.manifest)  # refuses a wrong setting before the images are read
        if asking is not None and worker.manifest.decisions is None:
            raise invalid_value(
                "model", "expected a bundle with a template for questions, got none; export it again"
            )
        prompt = await run_in_threadpool(read_prompt, chat, self._media, max_pixels=self._settings.max_pixels)
        job = AnswerJob(chat, prompt, asking)
        try:
            worker.submit(job)
        except BaseException:
            prompt.close()
            raise
        return job

    def _clamped(self, chat: ChatRequest, manifest: Manifest) -> ChatRequest:
        room = manifest.max_new_tokens
        if not self._settings.clamp_max_tokens or (chat.limit or 0) <= room:
            return chat
        return msgspec.structs.replace(chat, max_tokens=room, max_completion_tokens=None)

    async def _response(self, request: Request, job: AnswerJob, writer: AnswerWriter) -> Response:
        if not isinstance(writer, StreamWriter) or not job.chat.stream:
            answer = await _unless_gone(request, writer.whole())
            return Response(msgspec.json.encode(answer), media_type="application/json")
        # An error before the first event can still set the HTTP status.
        first = await _unless_gone(request, writer.first())
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(writer.stream(first), media_type="text/event-stream", headers=headers)


def _chosen_worker(workers: Mapping[str, ModelWorker], chat: ChatRequest) -> tuple[ModelWorker, str | None]:
    """Return the worker for a request and the level, by its ``model``, its ``level`` and its images' ``detail``.

    Without a level, "low" chooses the bundle of the same model, and the level, that keeps the fewest visual tokens, "high" the
    one that keeps the most, of those that can take the request.

    Raises:
        RequestError: If the model is not served or not loaded, or has no such level.
    """
    names = named_levels(workers)
    if chat.model not in names:
        if (base := workers.get(chat.model.rpartition("@")[0])) is not None:
            _ = base.manifest  # while it loads, its levels are not known
        raise unknown_model(chat.model, names)
    (named, level), asked = names[chat.model], chat.trio.level
    manifest = named.manifest
    known, where, hint = (AUTO, *manifest.level_names), "the model's levels", "choose one"
    if level is not None:
        known, where, hint = (level,), "the one in the model's name", "leave one out"
    if asked is not None and asked not in known:
        problem = f"expected {' or '.join(known)} ({where}), got {asked!r:.80}; {hint}"
        raise invalid_value("trio.level", problem)
    level = level or asked
    if level is not None or not chat.details:
        return named, level
    # The named one first: min and max return the first of equals.
    same = [
        (worker, one, at_level)
        for worker in (named, *workers.values())
        if worker.is_ready and worker.manifest.model == manifest.model
        for one in dict.fromkeys((worker.manifest.level, *worker.manifest.level_names))
        if _takes(at_level := worker.manifest.at_level(one), chat)
    ]
    choose = min if chat.details == {"low"} else max
    worker, level, _ = choose(
        same or [(named, manifest.level, manifest)], key=lambda found: _kept_tokens(found[2])
    )
    return worker, level


def _takes(manifest: Manifest, chat: ChatRequest) -> bool:
    has_video = any(isinstance(part, VideoPart) for turn in chat.messages for part in turn.parts)
    has_room = len(chat.images) <= manifest.max_images and (chat.limit or 0) <= manifest.max_new_tokens
    return has_room and (not has_video or manifest.video_processing is not None)


def _kept_tokens(manifest: Manifest) -> float:
    most = manifest.visual_sizes[-1]
    return most * manifest.average_keep_of(most, num_images=manifest.max_images)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of ``work``; raise ``RequestError`` if the client goes away before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError(CLOSED, "client: closed the connection before the answer")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
