"""``trio-serve BUNDLE…``: serves bundles over HTTP with OpenAI's interface."""

from __future__ import annotations

import re
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.cli.console import backend_options, run
from trio_edge.serving.fleet.cluster import FleetSettings, fleet_app
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from socket import socket

    from starlette.applications import Starlette

_DEFAULT = ServerSettings()


def _replica_range(
    _context: click.Context, _option: click.Parameter, given: str | None
) -> tuple[int, int] | None:
    """Return the minimum and maximum of ``3`` or ``1-4``."""
    if given is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?", given, re.ASCII)
    if found is None or int(found[2] or found[1]) < int(found[1]):
        raise click.BadParameter(f"expected a number, or two as 1-4, got {given[:40]!r}")
    return int(found[1]), int(found[2] or found[1])


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
@click.option(
    "--api-key",
    envvar="TRIO_SERVE_API_KEY",
    show_envvar=True,
    help="Key that clients must send. Prefer the variable: other users of this machine cannot see it.",
)
@backend_options()
@click.option(
    "--keep-images",
    type=int,
    default=0,
    help="Number of images whose visual tokens stay in memory for further questions.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(0, 10_000),
    default=_DEFAULT.max_queue,
    help="Maximum number of waiting requests for each BUNDLE; more get status 429.",
)
@click.option(
    "--max-wait",
    "max_wait_s",
    type=click.FloatRange(0),
    default=_DEFAULT.max_wait_s,
    help="Longest expected wait in seconds; requests that would wait longer get status 429.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1024),
    default=_DEFAULT.max_body,
    help="Maximum size of a request, a fetched image or a local file, in bytes.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=_DEFAULT.max_pixels,
    help="Maximum pixels of all images of a request together, checked before decoding.",
)
@click.option(
    "--allowed-media-domains",
    multiple=True,
    metavar="HOST",
    help="Exact host name from which images may be fetched; repeat it for more hosts. [default: none]",
)
@click.option(
    "--allowed-local-media-path",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    help="Folder whose files file:// addresses may name. [default: none]",
)
@click.option(
    "--shutdown-timeout",
    "shutdown_s",
    type=click.FloatRange(0, 3600),
    default=_DEFAULT.shutdown_s,
    help="Seconds that running answers get to finish after Ctrl-C or SIGTERM.",
)
@click.option(
    "--replicas",
    metavar="N|MIN-MAX",
    callback=_replica_range,
    help="Number of processes for each BUNDLE, run by Ray Serve; MIN-MAX follows the load."
    " [default: one thread in this process]",
)
@click.option(
    "--ray-address",
    metavar="HOST:PORT",
    help="Ray cluster to join; auto: this machine's. [default: start one here]",
)
@click.option(
    "--gpus",
    type=click.FloatRange(0),
    default=FleetSettings.gpus,
    help="Number of GPUs for each replica; may be a fraction.",
)
@click.option("--access-log", is_flag=True, help="Print a line for each request.")
def command(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    access_log: bool,
    replicas: tuple[int, int] | None,
    ray_address: str | None,
    gpus: float,
    **options: Any,
) -> int:
    """Answer questions about images over HTTP with OpenAI's chat completions.

    Clients name a BUNDLE as their model: by its folder's name, or by NAME. The command prints the server's address when all
    bundles are loaded, and serves until Ctrl-C.
    """
    _check_installed()
    from trio_edge.serving.server import BundleServer, is_loopback, listen, serve

    limits, loading = settings_from_options(options)
    fleet = _fleet(replicas, ray_address, gpus, limits)
    folders = named_bundles(bundles)
    with listen(host, port) as listener:
        if not limits.api_key and not is_loopback(listener):
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
                f'server: expected {name} to be installed, it is not; run pip install "trio-edge[serve]"'
            )


def settings_from_options(options: dict[str, Any]) -> tuple[ServerSettings, dict[str, Any]]:
    """Return the server's settings, and the keyword arguments of ``Pipeline.from_bundle``.

    Raises:
        UsageError: If a setting is wrong.
    """
    loading = {name: options[name] for name in ("backend", "threads", "cpu_accuracy", "keep_images")}
    limits = ServerSettings(
        **{name: value for name, value in options.items() if name in ServerSettings.__annotations__}
    )
    key = limits.api_key or ""
    if not key.isascii() or any(character <= " " for character in key):
        raise click.UsageError(
            "--api-key: expected ASCII without spaces, got other characters; choose another key"
        )
    for domain in limits.allowed_media_domains:
        if urlsplit(f"//{domain}").netloc != domain or "@" in domain:
            raise click.UsageError(
                f"--allowed-media-domains: expected a host such as images.example, got {domain!r:.80};"
                " remove the scheme and the path"
            )
    return limits, loading


def _fleet(
    replicas: tuple[int, int] | None, ray_address: str | None, gpus: float, limits: ServerSettings
) -> FleetSettings | None:
    if replicas is None:
        if ray_address is not None or gpus:
            raise click.UsageError("--ray-address, --gpus: expected --replicas with them, got none; add it")
        return None
    if limits.max_queue < 1:
        raise click.UsageError("--max-queue: expected at least 1 with --replicas, got 0; choose more")
    return FleetSettings(
        min_replicas=replicas[0], max_replicas=replicas[1], gpus=gpus, ray_address=ray_address
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


def named_bundles(bundles: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each ``[NAME=]BUNDLE`` by model name.

    Raises:
        UsageError: If two bundles have the same name.
        BundleError: If a bundle is broken.
    """
    from trio_edge.runtime.bundle.reader import open_bundle

    folders: dict[str, Path] = {}
    for given in bundles:
        name, separator, path = given.partition("=")
        if not (separator and name and "/" not in name):
            name, path = Path(given).resolve().name, given
        if name in folders:
            raise click.UsageError(f"BUNDLE: expected different names, got {name!r} twice; write NAME=BUNDLE")
        open_bundle(Path(path))
        folders[name] = Path(path)
    return folders


def _announce(app: Starlette, listener: socket) -> None:
    host, port, *_ = listener.getsockname()
    shown = f"[{host}]" if ":" in host else host
    names = [f"{worker.name} ({worker.backend_name})" for worker in app.state.workers.values()]
    print(f"trio-serve: http://{shown}:{port}/v1 answers with {', '.join(names)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
