"""The HTTP interface as an ASGI app: OpenAI's chat, responses and decisions, System One, models, health, metrics, the page.

Starlette routes the requests and msgspec reads them, so FastAPI and its pydantic are not needed.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import re
import time
from functools import cache, partial
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any, final

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from trio_edge.runtime.bundle.manifest import AUTO
from trio_edge.serving.answers.completion import Completion
from trio_edge.serving.answers.decisions import DecisionWriter, SystemOneWriter
from trio_edge.serving.answers.endpoint import AnswerEndpoint
from trio_edge.serving.answers.interface import named_levels
from trio_edge.serving.answers.responses import ResponseWriter
from trio_edge.serving.answers.worker import Worker
from trio_edge.serving.metrics import Metrics
from trio_edge.serving.requests.body import BodyReader, OrderlyEnd
from trio_edge.serving.requests.errors import RequestError, request_error_from, unknown_model
from trio_edge.serving.requests.media import MediaReader
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from trio_edge.runtime.pipeline import Pipeline
    from trio_edge.serving.answers.interface import ModelWorker

_SYSTEM_ONE = "/v1/systemone"
_STOP_S = 5.0  # for the running prefill, which cannot be cut
# The page asks for the key itself. Probes of an orchestrator have none.
_OPEN_PATHS = frozenset({"/", "/health", "/health/ready"})
_NO_KEY = RequestError(401, "api key: expected this server's, got another or none", code="invalid_api_key")
_FOREIGN_HOST = RequestError(
    421,
    "host: expected localhost, got another name; start trio-serve with --api-key to allow it",
    code="invalid_host",
)
_OTHER_VERSION = RequestError(505, "request: expected HTTP/1.1, got another version; use that one")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::\d{1,5})?", re.ASCII)

# The page may use only its own script and style.
_POLICY = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {
    "cache-control": "no-cache",
    "permissions-policy": "camera=(self)",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def make_app(
    models: Mapping[str, Callable[[], Pipeline]],
    settings: ServerSettings | None = None,
    *,
    media: MediaReader | None = None,
) -> Starlette:
    """Return the app. Its lifespan loads each pipeline in a thread of its own, and closes it at the end.

    Args:
        models: Function that returns an open pipeline, by model name.
        settings: Limits and policy.
        media: Reader for images and videos; by default one with the policy of ``settings``.
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
    """Return the app for workers by model name. Its lifespan starts and stops them. ``metrics`` are the workers'."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        for worker in workers.values():
            worker.start()
        try:
            yield
        finally:
            for worker in workers.values():
                await run_in_threadpool(worker.stop, timeout_s=_STOP_S)

    answering = partial(
        AnswerEndpoint,
        workers=workers,
        settings=settings,
        metrics=metrics,
        media=media or MediaReader(settings),
        bodies=BodyReader(settings),
    )
    # Outside of the check of keys, because a browser asks for permission without one.
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", answering(Completion), methods=["POST"]),
            Route("/v1/responses", answering(ResponseWriter), methods=["POST"]),
            Route("/v1/decisions", answering(DecisionWriter), methods=["POST"]),
            Route(_SYSTEM_ONE, answering(SystemOneWriter, takes_forms=True), methods=["POST"]),
            Route("/v1/models", _models),
            Route("/v1/models/{name:path}", _model),
            Route("/version", _version),
            Route("/health", _health),
            Route("/health/ready", _ready),
            Route("/metrics", _metrics),
            Route("/", _page),
        ],
        middleware=[
            Middleware(OrderlyEnd),
            *([cors] if settings.allowed_origins else []),
            Middleware(_Guard, settings=settings),
        ],
        exception_handlers={HTTPException: _http_error, RequestError: _error, Exception: _error},
        lifespan=lifespan,
    )
    app.state.workers, app.state.metrics, app.state.started = workers, metrics, int(time.time())
    return app


@final
class _Guard:
    """Middleware that checks the API key or the host name."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer with status 401 or 421."""
        if scope["type"] == "http" and (error := self._error(scope)) is not None:
            response = _refusal(error, scope["path"])
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _error(self, scope: Scope) -> RequestError | None:
        headers, keys = Headers(scope=scope), self._settings.api_keys
        if not scope["http_version"].startswith(("1.", "2")):
            return _OTHER_VERSION
        if not keys:
            return None if self._is_allowed_host(headers.get("host", "")) else _FOREIGN_HOST
        if scope["path"] in _OPEN_PATHS:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # In constant time against timing attacks. As bytes, because compare_digest refuses text beyond ASCII.
        same = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
        return None if scheme.lower() == "bearer" and any(same) else _NO_KEY

    def _is_allowed_host(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        return found is not None and found[1].strip("[]").lower() in self._settings.allowed_hosts


async def _models(request: Request) -> Response:
    served = named_levels(request.app.state.workers)
    described = [_described(name, *served[name], request) for name in served]
    date = time.strftime("%Y-%m-%d", time.gmtime(request.app.state.started))
    own = {"description": "a trio-edge bundle", "release_date": date}
    models = [{"name": name, **own} for name in served]
    return JSONResponse(
        {"object": "list", "data": described, "models": models}
    )  # the last as System One lists them


async def _model(request: Request) -> Response:
    name = request.path_params["name"]
    served = named_levels(request.app.state.workers)
    if name not in served:
        raise unknown_model(name, served)
    return JSONResponse(_described(name, *served[name], request))


def _described(name: str, worker: ModelWorker, level: str | None, request: Request) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": request.app.state.started,
        "owned_by": "trio-edge",
        "trio": _facts(worker, level) if worker.is_ready else None,
    }


def _facts(worker: ModelWorker, level: str | None) -> dict[str, Any]:
    """Return the properties of a bundle at a level for clients; None is the default level."""
    whole, level = worker.manifest, level or worker.manifest.level
    manifest = whole if level == AUTO else whole.at_level(level)
    most = manifest.visual_sizes[-1]
    facts = {
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
    if whole.levels:
        flops = sum(manifest.cost.reduced_flops.values())
        facts |= {"level": level, "levels": whole.level_names, "flops": flops}
    if level == AUTO:  # depends on the question
        names = ("visual_tokens", "average_keep", "stages", "flops")
        facts |= {**dict.fromkeys(names), "levels": worker.auto_levels}
    return facts


async def _version(_request: Request) -> Response:
    return JSONResponse({"version": metadata.version("trio-edge")})


async def _health(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> Response:
    states = {name: worker.is_ready for name, worker in request.app.state.workers.items()}
    is_ready = all(states.values())
    return JSONResponse(
        {"status": "ready" if is_ready else "not ready", "models": states}, 200 if is_ready else 503
    )


async def _metrics(request: Request) -> Response:
    return Response(request.app.state.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


async def _error(request: Request, error: Exception) -> Response:
    return _refusal(request_error_from(error), request.scope["path"])


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    response = RequestError(error.status_code, f"{request.method} {path[:100]}: {error.detail}")
    return _refusal(response, path, headers=error.headers)


def _refusal(error: RequestError, path: str, *, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error response in the form of the interface at ``path``."""
    body = error.detail if path == _SYSTEM_ONE else error.body
    return JSONResponse(body, error.status, headers=error.headers if headers is None else headers)


async def _page(_request: Request) -> Response:
    """Return the page."""
    text = _page_text()
    policy = f"{_POLICY}; script-src {_digest(text, 'script')}; style-src {_digest(text, 'style')}"
    return HTMLResponse(text, headers={**_HEADERS, "content-security-policy": policy})


@cache
def _page_text() -> str:
    return resources.files("trio_edge.serving.page").joinpath("index.html").read_text(encoding="utf-8")


def _digest(text: str, tag: str) -> str:
    """Return the digest that allows the page's only ``tag`` element in a policy."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
