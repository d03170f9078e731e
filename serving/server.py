"""Runs the app with uvicorn: a listening socket, a time limit for request headers, and one for the shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from typing import TYPE_CHECKING, final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trio_edge.runtime.bundle.errors import BackendError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from starlette.applications import Starlette

    from trio_edge.serving.answers.interface import ModelWorker

MAX_CONNECTIONS = 512
_HEADER_S = 15.0  # for the headers of a request
_KEEP_ALIVE_S = 20
_GRACE_S = 2  # for errors to reach the clients whose answers were cut


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 chooses any free one.

    Raises:
        ShapeError: If the host is not this machine, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.create_server((str(address[0]), port), family=family, backlog=MAX_CONNECTIONS)
        # Made from its descriptor, a socket knows its protocol. asyncio sets TCP_NODELAY only on sockets that do, and
        # without it each answer waits 40 ms for the client's acknowledgement.
        return socket.socket(fileno=made.detach())
    except (OSError, UnicodeError, OverflowError) as error:
        raise ShapeError(
            f"--host, --port: expected an address of this machine and a free port, got {host}:{port}"
            f" ({error}); choose another"
        ) from None


def is_loopback(listener: socket.socket) -> bool:
    """Return whether only this machine can reach the socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def serve(server: BundleServer, listener: socket.socket, *, on_ready: Callable[[], None]) -> None:
    """Serve until Ctrl-C or SIGTERM. ``on_ready`` is called when all bundles are loaded.

    Raises:
        TrioEdgeError: If a bundle cannot be loaded.
    """
    asyncio.run(_serve(server, listener, on_ready))


async def _serve(server: BundleServer, listener: socket.socket, on_ready: Callable[[], None]) -> None:
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not (serving.done() or server.started):  # the app's lifespan starts the workers
        await asyncio.sleep(0.01)
    loading = asyncio.ensure_future(_loaded(server.workers))
    await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done() or loading.exception() is not None:
        server.should_exit = True
    elif not server.should_exit:  # a signal that came while it loaded has closed the listener
        on_ready()
    await serving
    if loading.done():
        loading.result()  # raises why a bundle could not be loaded
    else:
        loading.cancel()


async def _loaded(workers: Sequence[ModelWorker]) -> None:
    for worker in workers:
        try:
            await asyncio.shield(asyncio.wrap_future(worker.loaded))
        except MemoryError as error:
            message = f"model {worker.name}: expected enough memory, got too little; close other programs"
            raise BackendError(message) from error


@final
class BundleServer(uvicorn.Server):
    """A uvicorn server that stops at a signal within a time limit."""

    def __init__(self, app: Starlette, *, shutdown_s: float, access_log: bool = False) -> None:
        """Configure uvicorn for the app of ``make_app`` or ``app_of``.

        Running answers get ``shutdown_s`` seconds to finish. ``access_log`` prints a line for each request.
        """
        config = uvicorn.Config(
            app,
            http=_HeaderTimeoutProtocol,
            ws="none",
            lifespan="on",
            log_level="info" if access_log else "warning",
            access_log=access_log,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(shutdown_s) + _GRACE_S,
        )
        super().__init__(config)
        self.workers: Sequence[ModelWorker] = list(app.state.workers.values())
        self._shutdown_s = shutdown_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, and at a second signal at once. uvicorn's own method would raise the signal again afterwards."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more requests, and wait for the running answers until the time limit."""
        timer = asyncio.get_running_loop().call_later(self._shutdown_s, self._cut)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _cut(self) -> None:
        for worker in self.workers:
            worker.cut()


@final
class _HeaderTimeoutProtocol(H11Protocol):
    """Closes a connection whose request headers do not come in time; uvicorn 0.54 keeps it open."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(_HEADER_S, transport.close)

    def data_received(self, data: bytes) -> None:
        """Parse some bytes of a request; stop the timer after the headers."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # the headers are complete
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEADER_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        with contextlib.suppress(AttributeError):  # uvicorn's state is incomplete before connection_made
            super().connection_lost(exc)
