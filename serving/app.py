"""The HTTP interface as an ASGI app: OpenAI's chat completions, models, health, metrics and the page.

It uses Starlette and not FastAPI, because msgspec reads the requests and pydantic is not needed.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from trio_edge.serving.answers.endpoint import ChatEndpoint
from trio_edge.serving.answers.worker import Worker
from trio_edge.serving.guard import Guard
from trio_edge.serving.metrics import CONTENT_TYPE, Metrics
from trio_edge.serving.page.response import page
from trio_edge.serving.requests.body import BodyDrain
from trio_edge.serving.requests.errors import RequestError, request_error_from
from trio_edge.serving.requests.media import MediaReader
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from starlette.requests import Request

    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.pipeline import Pipeline
    from trio_edge.serving.answers.interface import ModelWorker

_STOP_S = 5.0  # for the running answer after all answers were cut, because a prefill cannot be interrupted


def make_app(
    models: Mapping[str, Callable[[], Pipeline]],
    settings: ServerSettings | None = None,
    *,
    media: MediaReader | None = None,
) -> Starlette:
    """Return the app; its lifespan loads the pipelines, each in its own thread, and closes them.

    Args:
        models: For each name, a function that returns the pipeline; for an open pipeline ``lambda: pipeline``.
        settings: Limits and policy.
        media: Reads images and videos; by default as ``settings`` allow.
    """
    settings, metrics = settings or ServerSettings(), Metrics()
    workers = {name: Worker(name, load, settings=settings, metrics=metrics) for name, load in models.items()}
    return app_of(workers, settings, metrics=metrics, media=media)


def app_of(
    workers: Mapping[str, ModelWorker],
    settings: ServerSettings,
    *,
    metrics: Metrics,
    media: MediaReader | None = None,
) -> Starlette:
    """Return the app for ``workers``, by the models' names, and their ``metrics``; its lifespan starts and stops them.

    ``media`` reads images and videos, by default as ``settings`` allow.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        for worker in workers.values():
            worker.start()
        try:
            yield
        finally:
            for worker in workers.values():
                await run_in_threadpool(worker.stop, timeout_s=_STOP_S)

    endpoint = ChatEndpoint(workers, settings=settings, metrics=metrics, media=media or MediaReader(settings))
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", endpoint, methods=["POST"]),
            Route("/v1/models", _models),
            Route("/v1/models/{name:path}", _model),
            Route("/health", _health),
            Route("/health/ready", _ready),
            Route("/metrics", _metrics),
            Route("/", page),
        ],
        middleware=[Middleware(BodyDrain), Middleware(Guard, settings=settings)],
        exception_handlers={RequestError: _refusal, HTTPException: _http_refusal, Exception: _failure},
        lifespan=lifespan,
    )
    app.state.workers, app.state.metrics, app.state.started = workers, metrics, int(time.time())
    return app


async def _models(request: Request) -> Response:
    described = [_described(worker, request) for worker in request.app.state.workers.values()]
    return JSONResponse({"object": "list", "data": described})


async def _model(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in request.app.state.workers:
        raise RequestError(
            404, f"model: expected a served one, got {name[:80]!r}", code="model_not_found", param="model"
        )
    return JSONResponse(_described(request.app.state.workers[name], request))


def _described(worker: ModelWorker, request: Request) -> dict[str, Any]:
    common = {"id": worker.name, "object": "model", "created": request.app.state.started}
    trio = _facts(worker.manifest) if worker.is_ready else None
    return {**common, "owned_by": "trio-edge", "trio": trio}


def _facts(manifest: Manifest) -> dict[str, Any]:
    """Return the facts about a bundle that clients may need."""
    most = manifest.visual_sizes[-1]
    return {
        "model": manifest.model,
        "family": manifest.family,
        "visual_tokens": most,
        "average_keep": manifest.average_keep_of(most, num_images=manifest.max_images),
        "stages": [{"layer": stage.layer, "keep": stage.keep} for stage in manifest.schedule.stages],
        "max_images": manifest.max_images,
        "takes_videos": manifest.video_processing is not None,
        "max_text": manifest.text_buckets[-1],
        "max_new_tokens": manifest.max_new_tokens,
    }


async def _health(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> Response:
    states = {name: worker.is_ready for name, worker in request.app.state.workers.items()}
    is_ready = all(states.values())
    return JSONResponse(
        {"status": "ready" if is_ready else "not ready", "models": states}, 200 if is_ready else 503
    )


async def _metrics(request: Request) -> Response:
    return Response(request.app.state.metrics.text(), headers={"content-type": CONTENT_TYPE})


async def _refusal(_request: Request, error: Exception) -> Response:
    told = request_error_from(error)
    return JSONResponse(told.body, told.status, headers=told.headers)


async def _http_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = RequestError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")
    return JSONResponse(told.body, told.status, headers=error.headers)


async def _failure(_request: Request, error: Exception) -> Response:
    told = request_error_from(error)
    return JSONResponse(told.body, told.status)
