"""A small Hub on this machine, for huggingface_hub itself to talk to: one repository, its commits, and a log of requests."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves the files of a folder as ``repository`` at the branch main."""

    daemon_threads = True

    def __init__(self, folder: Path, *, repository: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository = repository
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        self.required_token: str | None = None
        self.gated = False
        self.stalls_at: str | None = None
        """Name of a file that is begun but never finished."""
        self.stalled = threading.Event()
        self.released = threading.Event()
        self.fetched: list[str] = []
        """Names of the files whose content was asked for."""

    def environment(self, cache: Path, **more: str) -> dict[str, str]:
        """Return the environment of a process that is to use this Hub and ``cache``."""
        cleared = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))
        }
        return {
            **cleared,
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_address[1]}",
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **more,
        }


@contextmanager
def serve(folder: Path, *, repository: str) -> Iterator[HubServer]:
    """Serve ``folder`` until the block ends."""
    with HubServer(folder, repository=repository) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self, *, body: bool) -> None:
        path, hub = self.path.partition("?")[0], self.server
        if hub.gated:
            return self._refuse(403, "GatedRepo")
        if hub.required_token and self.headers.get("Authorization") != f"Bearer {hub.required_token}":
            return self._refuse(401, "RepoNotFound")
        api, resolve = f"/api/models/{hub.repository}", f"/{hub.repository}/resolve/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            return self._json({"id": hub.repository, "sha": COMMIT, "siblings": []})
        if path == f"{api}/tree/{COMMIT}":
            files = hub.files.items()
            return self._json(
                [{"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in files]
            )
        if path.startswith((f"{api}/", resolve)) and path.split("/")[-2] not in (COMMIT, "main"):
            return self._refuse(404, "RevisionNotFound")
        if path.startswith(resolve):
            name = path[len(resolve) :].partition("/")[2]
            if name not in hub.files:
                return self._refuse(404, "EntryNotFound")
            return self._file(name, body=body)
        return self._refuse(404, "RepoNotFound")

    def _file(self, name: str, *, body: bool) -> None:
        data = self.server.files[name]
        self.send_response(200)
        self.send_header("ETag", f'"{_oid(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        self.server.fetched.append(name)
        if name == self.server.stalls_at:
            self.wfile.write(data[:100])
            self.wfile.flush()
            self.server.stalled.set()
            self.server.released.wait(60)
            return
        self.wfile.write(data)

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
