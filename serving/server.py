"""Runs the app with uvicorn: a listening socket, time limits for slow clients, and a shutdown within a time limit."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from typing import TYPE_CHECKING, final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trio_edge.runtime.bundle.errors import BackendError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from starlette.applications import Starlette

    from trio_edge.serving.answers.interface import ModelWorker

MOST_CONNECTIONS = 512
_HEADER_S = 15.0  # for the first line and the headers of a request
_KEEP_ALIVE_S = 20
_GRACE_S = 2  # for errors to reach the clients of answers that were cut


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one.

    Raises:
        ShapeError: If the host is not an address of this machine, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(address[0]), port), family=family, backlog=MOST_CONNECTIONS)
    except (OSError, UnicodeError, OverflowError) as error:
        raise ShapeError(
            f"--host, --port: expected an address of this machine and a free port, got {host}:{port}"
            f" ({error}); choose another"
        ) from None


def is_loopback(listener: socket.socket) -> bool:
    """Return whether only this machine can reach the socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def serve(server: BundleServer, listener: socket.socket, *, on_ready: Callable[[], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; ``on_ready`` is called when all bundles are loaded.

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
    if loading.done() and loading.exception() is None:
        on_ready()
    else:
        server.should_exit = True
    await serving
    if loading.done():
        loading.result()  # raises the error of a bundle that could not be loaded
    else:
        loading.cancel()


async def _loaded(workers: Sequence[ModelWorker]) -> None:
    for worker in workers:
        try:
            await asyncio.shield(asyncio.wrap_future(worker.loaded))
        except MemoryError as error:
            raise BackendError(
                f"model {worker.name}: expected more memory, the system has none left; close other programs"
            ) from error


@final
class BundleServer(uvicorn.Server):
    """Ends quietly at a signal, and cuts answers that take too long to finish."""

    def __init__(self, app: Starlette, *, shutdown_s: float, access_log: bool = False) -> None:
        """Configure uvicorn for an app of ``make_app``; answers have ``shutdown_s`` seconds to finish."""
        config = uvicorn.Config(
            app,
            http=_ImpatientProtocol,
            ws="none",
            lifespan="on",
            log_level="info" if access_log else "warning",
            access_log=access_log,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(shutdown_s) + _GRACE_S,
        )
        super().__init__(config)
        self.workers: Sequence[ModelWorker] = list(app.state.workers.values())
        self._shutdown_s = shutdown_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, at a second signal immediately. uvicorn's own method would raise the signal again afterwards."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, and wait for the answers."""
        timer = asyncio.get_running_loop().call_later(self._shutdown_s, self._cut)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _cut(self) -> None:
        for worker in self.workers:
            worker.cut()


@final
class _ImpatientProtocol(H11Protocol):
    """Closes connections whose request headers do not arrive in time, which uvicorn 0.54 keeps open."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(_HEADER_S, transport.close)

    def data_received(self, data: bytes) -> None:
        """Receive bytes of a request; stop the timer after the headers."""
        super().data_received(data)
        is_waiting = self.conn.their_state.__name__ == "IDLE"  # for the rest of the headers
        if not is_waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif is_waiting and self._timer is None:
            self._timer = self.loop.call_later(_HEADER_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
        with contextlib.suppress(AttributeError):  # lost before it was made
            super().connection_lost(exc)
