"""A camera for tests: an HTTP server that sends JPEG frames, or any bytes, and hangs up."""

from __future__ import annotations

import io
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MULTIPART = "multipart/x-mixed-replace; boundary=frame"


def jpeg_part(image: Image.Image) -> bytes:
    """Return a frame of a multipart stream."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data + b"\r\n"


def gray_part(level: int, *, size: tuple[int, int] = (64, 48)) -> bytes:
    """Return a frame of one gray level."""
    return jpeg_part(Image.fromarray(np.full((size[1], size[0], 3), level, np.uint8)))


class CameraServer(ThreadingHTTPServer):
    """What each connection gets is a list of bytes from ``answer``, which is told the connection's number."""

    daemon_threads = True

    def __init__(self, answer: Callable[[int], Sequence[bytes]], *, content_type: str = MULTIPART) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.content_type = answer, content_type
        self.status, self.headers = 200, dict[str, str]()
        self.paths: list[str] = []
        self.posts: list[bytes] = []
        self.post_paths: list[str] = []
        self.is_held = threading.Event()
        """Set it to let ended connections hang up; see ``holds``."""
        self.holds = False
        """Send nothing after the answer, but keep the connection."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: CameraServer

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self._start()
        with suppress(OSError):  # the reader has hung up
            for part in self.server.answer(len(self.server.paths) - 1):
                self.wfile.write(part)
            if self.server.holds:
                self.server.is_held.wait(60)

    def do_POST(self) -> None:
        self.server.post_paths.append(self.path)
        self.server.posts.append(self.rfile.read(int(self.headers["Content-Length"])))
        self._start()

    def _start(self) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Type", self.server.content_type)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(answer: Callable[[int], Sequence[bytes]], **settings: Any) -> Iterator[CameraServer]:
    """Yield a running server."""
    with CameraServer(answer, **settings) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.is_held.set()
            server.shutdown()
            thread.join()
