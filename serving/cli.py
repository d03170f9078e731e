"""``trio-serve BUNDLE…``: serves bundles over HTTP with OpenAI's interface."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from trio_edge.runtime.bundle.errors import BackendError, install_command
from trio_edge.runtime.cli.console import run
from trio_edge.serving.fleet.cluster import fleet_app
from trio_edge.serving.options import fleet_of, named_bundles, server_options, settings_from_options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from socket import socket

    from starlette.applications import Starlette

    from trio_edge.serving.fleet.cluster import FleetSettings
    from trio_edge.serving.settings import ServerSettings


@click.command("trio-serve", context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundles", metavar="[NAME=]BUNDLE...", nargs=-1, required=True)
@click.option(
    "--host",
    default="127.0.0.1",
    help="Address to listen on; one that other machines can reach needs --api-key.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 for any free one."
)
@server_options
@click.option(
    "--ray-address",
    metavar="HOST:PORT",
    help="Ray cluster to join; auto: this machine's. [default: start one here]",
)
@click.option("--access-log", is_flag=True, help="Print a line for each request.")
def command(bundles: tuple[str, ...], host: str, port: int, access_log: bool, **options: Any) -> int:
    """Answer questions about images over HTTP with OpenAI's chat completions.

    Clients name a BUNDLE as their model: by its folder's name, or by NAME. The command prints the server's address when all
    bundles are loaded, and serves until Ctrl-C.
    """
    _check_installed()
    from trio_edge.serving.server import BundleServer, is_loopback, listen, serve

    limits, loading = settings_from_options(options)
    fleet = fleet_of(options, limits)
    folders = named_bundles(bundles)
    with listen(host, port) as listener:
        if not limits.api_keys and not is_loopback(listener):
            raise click.UsageError(
                f"--host: expected --api-key with {host}, got none; set a key, as others can reach this address"
            )
        with _app(folders, limits, loading=loading, fleet=fleet) as app:
            server = BundleServer(app, shutdown_s=limits.shutdown_s, access_log=access_log)
            serve(server, listener, on_ready=partial(_announce, app, listener))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _check_installed() -> None:
    for name in ("llguidance", "prometheus_client", "starlette", "uvicorn"):
        if find_spec(name) is None:
            raise BackendError(
                f"server: expected {name} to be installed, it is not; run {install_command('serve')}"
            )


def _app(
    bundles: dict[str, Path], limits: ServerSettings, *, loading: dict[str, Any], fleet: FleetSettings | None
) -> AbstractContextManager[Starlette]:
    if fleet is not None:
        return fleet_app(bundles, limits, loading=loading, fleet=fleet)
    from trio_edge.runtime.pipeline import Pipeline
    from trio_edge.serving.app import make_app

    models = {name: partial(Pipeline.from_bundle, path, **loading) for name, path in bundles.items()}
    return nullcontext(make_app(models, limits))


def _announce(app: Starlette, listener: socket) -> None:
    host, port, *_ = listener.getsockname()
    shown = f"[{host}]" if ":" in host else host
    names = [f"{worker.name} ({worker.backend_name})" for worker in app.state.workers.values()]
    print(f"trio-serve: http://{shown}:{port}/v1 answers with {', '.join(names)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
