"""Posts JSON to an address from a thread of its own, so that nothing waits for a slow or missing server."""

from __future__ import annotations

import re
import threading
import time
from http.client import HTTPException
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, final
from urllib.request import HTTPRedirectHandler, Request, build_opener

from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS_TO_ANSWER, SECONDS_TO_CLOSE = 5.0, 10.0
MOST_TRIES, MOST_WAITING = 3, 100


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **_named: Any) -> None:
        """Refuse: a redirected POST becomes a GET without the event, and may go to another protocol."""


@final
class Webhook:
    """An address that gets a POST for each event."""

    def __init__(self, address: str, note: Callable[[str], None]) -> None:
        """Start the thread; connects to nothing yet.

        Args:
            address: http:// or https://, without user and password.
            note: Called with one line for the first event that is lost, and for the first one after a delivery.

        Raises:
            DataError: If the address is another one.
        """
        if not (found := re.fullmatch(r"(https?://[^\s/@?#\\]+)([/?][!-~]*)?", address, re.ASCII)):
            raise DataError(
                "webhook: expected http://host/path or https://…, without user, got another; correct it"
            )
        self._address, self._name, self._note, self._has_failed = address, found[1], note, False
        self._opener = build_opener(_NoRedirects)
        self._waiting: SimpleQueue[bytes | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._deliver_all, name="webhook", daemon=True)
        self._thread.start()

    def post(self, body: bytes) -> None:
        """Deliver ``body`` later; drop it if ``MOST_WAITING`` others wait already."""
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put(body)
        else:
            self._fail("no answer in time")

    def close(self) -> None:
        """Deliver what waits, for at most ``SECONDS_TO_CLOSE``."""
        self._waiting.put(None)
        self._thread.join(SECONDS_TO_CLOSE)

    def _deliver_all(self) -> None:
        for body in iter(self._waiting.get, None):
            for attempt in range(MOST_TRIES):
                time.sleep(attempt)  # a server may be starting again
                try:
                    request = Request(self._address, body, {"Content-Type": "application/json"})
                    self._opener.open(request, timeout=SECONDS_TO_ANSWER).close()
                except (OSError, HTTPException, ValueError) as error:  # the last: a host that is no name
                    problem = f"{type(error).__name__}: {error}"
                else:
                    self._has_failed = False
                    break
            else:
                self._fail(problem)

    def _fail(self, got: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._note(
                f"webhook {self._name}: expected an answer 200, got {got}; events are lost until it comes"
            )
