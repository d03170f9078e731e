"""Posts JSON to an address from a thread of its own, so that nothing waits for a slow or missing server."""

from __future__ import annotations

import queue
import threading
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import TYPE_CHECKING, final
from urllib.parse import urlsplit

from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS_TO_ANSWER = 5.0
SECONDS_TO_CLOSE = 10.0
MOST_TRIES, MOST_WAITING = 3, 100
_CONNECTIONS = {"http": HTTPConnection, "https": HTTPSConnection}


@final
class Webhook:
    """An address that gets a POST for each event. Redirects are not followed, and count as failures."""

    def __init__(self, address: str, note: Callable[[str], None]) -> None:
        """Start the thread; connects to nothing yet.

        Args:
            address: http:// or https://, without user and password.
            note: Called with one line for the first event that was not delivered, and again after a success.

        Raises:
            DataError: If the address is another one.
        """
        try:
            url = urlsplit(address)
            host, port = url.hostname, url.port
        except ValueError:  # a port that is no number, half an IPv6 address
            host = None
        is_plain = address.isascii() and address.isprintable() and " " not in address
        if not is_plain or not host or url.scheme not in _CONNECTIONS or url.username is not None:
            raise DataError(
                "webhook: expected an address such as http://host:8123/path, without user and password, got another; correct"
                " --webhook"
            )
        self._connect = partial(_CONNECTIONS[url.scheme], host, port, timeout=SECONDS_TO_ANSWER)
        self._path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        self._name, self._note, self._has_failed = f"webhook {url.scheme}://{host}", note, False
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._deliver_all, name="webhook", daemon=True)
        self._thread.start()

    def post(self, body: bytes) -> None:
        """Deliver ``body`` later; drop it if ``MOST_WAITING`` others wait already."""
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put(body)
        else:
            self._fail(f"{MOST_WAITING} events that wait")

    def close(self) -> None:
        """Deliver what waits, for at most ``SECONDS_TO_CLOSE``."""
        self._closed.set()
        self._waiting.put(None)
        self._thread.join(SECONDS_TO_CLOSE)

    def _deliver_all(self) -> None:
        while (body := self._waiting.get()) is not None:
            for attempt in range(MOST_TRIES):
                # 1 and 2 seconds, during which a server can start again.
                if attempt and not self._closed.is_set():
                    self._closed.wait(attempt)
                if not (problem := self._deliver(body)):
                    self._has_failed = False
                    break
            else:
                self._fail(problem)

    def _deliver(self, body: bytes) -> str:
        """Return what went wrong, or an empty text."""
        connection = self._connect()
        try:
            connection.request("POST", self._path, body, {"Content-Type": "application/json"})
            status = connection.getresponse().status
        except (OSError, HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            connection.close()
        return "" if 200 <= status < 300 else f"status {status}"

    def _fail(self, got: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._note(f"{self._name}: expected status 200, got {got}; events are lost until it answers")
