"""A real server on loopback, in a thread of this process, and ways to talk to it below the level of a client library."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import openai

from tests.pictures import random_picture
from trio_edge.serving.app import make_app
from trio_edge.serving.server import BundleServer, listen, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from PIL import Image

    from trio_edge.runtime.answer import Generation
    from trio_edge.runtime.decisions.questions import Decision
    from trio_edge.runtime.pipeline import Pipeline
    from trio_edge.serving.answers.worker import Worker
    from trio_edge.serving.requests.media import MediaReader
    from trio_edge.serving.settings import ServerSettings


class RunningServer:
    """A server that answers."""

    def __init__(self, port: int, workers: dict[str, Worker], connections: set[Any]) -> None:
        self.port, self.workers, self.connections = port, workers, connections
        self.clients = ExitStack()
        """Closed with the server."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **settings: Any) -> openai.OpenAI:
        return self.clients.enter_context(openai.OpenAI(**self._settings(settings)))

    def async_client(self, **settings: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._settings(settings))

    def _settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60, **settings}

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def post(
        self, body: bytes, *, path: str = "/v1/chat/completions", **headers: str
    ) -> tuple[int, dict[str, Any]]:
        """Return status and JSON of a request with these very bytes."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        own = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        return self.exchange(_request(body, {**own, **given}, path=path))

    def ask(self, **fields: Any) -> tuple[int, dict[str, Any]]:
        """Return status and JSON of a request with these fields."""
        return self.post(json.dumps({"model": "reduced", "messages": question("w1 w2"), **fields}).encode())

    def exchange(self, request: bytes) -> tuple[int, dict[str, Any]]:
        with self.connect() as connection:
            connection.sendall(request)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)


def _request(body: bytes, headers: Mapping[str, str], *, path: str) -> bytes:
    lines = {"Host": "127.0.0.1", "Connection": "close", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


@contextmanager
def running(
    models: Mapping[str, Callable[[], Pipeline]],
    settings: ServerSettings | None = None,
    *,
    media: MediaReader | None = None,
) -> Iterator[RunningServer]:
    """Serve ``models`` until the block ends."""
    app, ready = make_app(models, settings, media=media), threading.Event()
    listener = listen("127.0.0.1", 0)
    server = BundleServer(app, shutdown_s=1.0)
    thread = threading.Thread(target=serve, args=(server, listener), kwargs={"on_ready": ready.set})
    connections = server.server_state.connections
    running_server = RunningServer(listener.getsockname()[1], app.state.workers, connections)
    thread.start()
    try:
        assert ready.wait(60), "the server did not start"
        yield running_server
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        running_server.clients.close()
    assert not thread.is_alive()


def image_url(image: Image.Image | None = None, *, format: str = "PNG") -> str:
    """Return an image as a data URL."""
    file = io.BytesIO()
    (image or random_picture(48, 48)).save(file, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def question(text: str, *urls: str, detail: str = "auto") -> list[dict[str, Any]]:
    """Return the messages of a question about images."""
    images = [{"type": "image_url", "image_url": {"url": url, "detail": detail}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def slowed(pipeline: Pipeline, seconds: float) -> Pipeline:
    """Let each piece of the pipeline's answers take longer: random models are too fast to be interrupted."""
    chat = pipeline.chat

    def slow_chat(*args: Any, **settings: Any) -> Generation:
        answer = chat(*args, **settings)
        steps = answer._steps

        def slow_steps() -> Iterator[str]:
            for piece in steps:
                time.sleep(seconds)
                yield piece

        answer._steps = slow_steps()
        return answer

    pipeline.chat = slow_chat  # type: ignore[method-assign]
    return pipeline


def slowed_decisions(pipeline: Pipeline, seconds: float) -> Pipeline:
    """Let each of the pipeline's decisions take longer."""
    iter_decisions = pipeline.iter_decisions

    def slow_decisions(*args: Any, **options: Any) -> Iterator[Decision]:
        for decision in iter_decisions(*args, **options):
            time.sleep(seconds)
            yield decision

    pipeline.iter_decisions = slow_decisions  # type: ignore[method-assign]
    return pipeline


def until(is_so: Callable[[], bool], *, seconds: float = 10.0) -> None:
    """Wait until something is so; each look takes what it takes, and only the pauses between them count."""
    for _ in range(round(seconds / 0.01)):
        if is_so():
            return
        time.sleep(0.01)
    assert is_so(), "it did not happen"
