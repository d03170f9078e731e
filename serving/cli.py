"""``trio-serve BUNDLE…``: serves bundles with OpenAI's API."""

from __future__ import annotations

import contextlib
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.cli.backend_options import backend_options
from trio_edge.runtime.cli.console import run
from trio_edge.serving.fleet.cluster import FleetSettings
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from socket import socket

    from starlette.applications import Starlette

_DEFAULT = ServerSettings()


def _replica_range(
    _context: click.Context, _option: click.Parameter, given: str | None
) -> tuple[int, int] | None:
    """Return the least and the most replicas from ``3`` or ``1-4``."""
    if given is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?", given, re.ASCII)
    if found is None or int(found[2] or found[1]) < int(found[1]):
        raise click.BadParameter(f"expected a number such as 3 or a range such as 1-4, got {given[:40]!r}")
    return int(found[1]), int(found[2] or found[1])


@click.command("trio-serve", context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundles", metavar="[NAME=]BUNDLE...", nargs=-1, required=True)
@click.option(
    "--host",
    default="127.0.0.1",
    help="Address to listen on; any address but loopback needs --api-key.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--api-key",
    envvar="TRIO_SERVE_API_KEY",
    show_envvar=True,
    help="Key that clients must send. Other users of this machine can see the option, but not the variable.",
)
@backend_options()
@click.option(
    "--keep-images",
    type=int,
    default=0,
    help="Number of recent images whose visual tokens are kept, to answer further questions about them faster.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(0, 10_000),
    default=_DEFAULT.max_queue,
    help="Most requests that wait for one bundle; further ones get status 429.",
)
@click.option(
    "--max-wait",
    "max_wait_s",
    type=click.FloatRange(0),
    default=_DEFAULT.max_wait_s,
    help="Longest expected wait in seconds; a request that would wait longer gets status 429.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1024),
    default=_DEFAULT.max_body,
    help="Largest request in bytes.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=_DEFAULT.max_pixels,
    help="Most pixels in all images of a request; more are refused before they are decoded.",
)
@click.option(
    "--allowed-media-domains",
    multiple=True,
    metavar="HOST",
    help="Host to fetch images from; must match exactly. May be repeated. [default: none]",
)
@click.option(
    "--allowed-local-media-path",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    help="Folder whose files clients may name with file:// URLs. [default: none]",
)
@click.option(
    "--shutdown-timeout",
    "shutdown_s",
    type=click.FloatRange(0, 3600),
    default=_DEFAULT.shutdown_s,
    help="Seconds for running answers to finish after Ctrl-C or SIGTERM.",
)
@click.option(
    "--replicas",
    metavar="N|MIN-MAX",
    callback=_replica_range,
    help="Replicas of each BUNDLE, processes run by Ray Serve; MIN-MAX follows the load. [default: none, answer in"
    " this process]",
)
@click.option(
    "--ray-address",
    metavar="HOST:PORT",
    help="Ray cluster to join; auto joins this machine's. [default: start one here]",
)
@click.option(
    "--gpus",
    type=click.FloatRange(0),
    default=FleetSettings.gpus,
    help="GPUs per replica; may be a fraction.",
)
@click.option("--access-log", is_flag=True, help="Print one line per request.")
def command(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    access_log: bool,
    backend: str,
    threads: int,
    cpu_accuracy: str,
    keep_images: int,
    replicas: tuple[int, int] | None,
    ray_address: str | None,
    gpus: float,
    **settings: Any,
) -> int:
    """Serve each BUNDLE over HTTP with OpenAI's API.

    Clients name a BUNDLE as their model: by NAME, or by the name of its folder.
    """
    _check_installed()
    from trio_edge.serving.server import BundleServer, is_loopback, listen, serve

    limits = ServerSettings(**settings)
    _check_settings(limits)
    fleet = _fleet(replicas, ray_address, gpus, limits)
    folders = named_bundles(bundles)
    loading: dict[str, Any] = {"backend": backend, "threads": threads, "cpu_accuracy": cpu_accuracy}
    loading["keep_images"] = keep_images
    with listen(host, port) as listener:
        if not limits.api_key and not is_loopback(listener):
            raise click.UsageError(
                f"--host: expected --api-key with {host}, got none; add a key, because other machines can connect"
            )
        with _app(folders, limits, loading=loading, fleet=fleet) as app:
            server = BundleServer(app, shutdown_s=limits.shutdown_s, access_log=access_log)
            serve(server, listener, on_ready=partial(_announce, app, listener))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _check_installed() -> None:
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f'server: expected {error.name}, found none; run pip install "trio-edge[serve]"'
        ) from None


def _check_settings(limits: ServerSettings) -> None:
    key = limits.api_key or ""
    if not key.isascii() or any(character <= " " for character in key):
        raise click.UsageError("--api-key: expected ASCII without spaces, got another; choose another key")
    for domain in limits.allowed_media_domains:
        if urlsplit(f"//{domain}").netloc != domain or "@" in domain:
            raise click.UsageError(
                f"--allowed-media-domains: expected a host such as images.example, got {domain!r:.80}; correct it"
            )


def _fleet(
    replicas: tuple[int, int] | None, ray_address: str | None, gpus: float, limits: ServerSettings
) -> FleetSettings | None:
    if replicas is None:
        if ray_address is not None or gpus:
            raise click.UsageError("--ray-address, --gpus: expected --replicas as well, got none; add it")
        return None
    if limits.max_queue < 1:
        raise click.UsageError("--max-queue: expected at least 1 with --replicas, got 0; choose 1 or more")
    return FleetSettings(
        min_replicas=replicas[0], max_replicas=replicas[1], gpus=gpus, ray_address=ray_address
    )


@contextlib.contextmanager
def _app(
    bundles: dict[str, Path], limits: ServerSettings, *, loading: dict[str, Any], fleet: FleetSettings | None
) -> Iterator[Starlette]:
    if fleet is not None:
        from trio_edge.serving.fleet.app import fleet_app

        with fleet_app(bundles, limits, loading=loading, fleet=fleet) as app:
            yield app
        return
    from trio_edge.runtime.pipeline import Pipeline
    from trio_edge.serving.app import make_app

    models = {name: partial(Pipeline.from_bundle, path, **loading) for name, path in bundles.items()}
    yield make_app(models, limits)


def named_bundles(bundles: Sequence[str]) -> dict[str, Path]:
    """Return the folders of ``[NAME=]BUNDLE`` by the models' names.

    Raises:
        UsageError: If two have one name.
        BundleError: If one is broken.
    """
    from trio_edge.runtime.bundle.reader import open_bundle

    folders: dict[str, Path] = {}
    for given in bundles:
        name, path = _named(given)
        if name in folders:
            raise click.UsageError(f"BUNDLE: expected different names, got {name!r} twice; write NAME=BUNDLE")
        open_bundle(path)
        folders[name] = path
    return folders


def _named(given: str) -> tuple[str, Path]:
    name, separator, path = given.partition("=")
    if separator and name and "/" not in name:
        return name, Path(path)
    return Path(given).resolve().name, Path(given)


def _announce(app: Starlette, listener: socket) -> None:
    host, port, *_ = listener.getsockname()
    shown = f"[{host}]" if ":" in host else host
    names = [f"{worker.name} ({worker.backend_name})" for worker in app.state.workers.values()]
    print(f"trio-serve: http://{shown}:{port}/v1 answers with {', '.join(names)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
