"""``trio-serve BUNDLE…``: bundles behind OpenAI's interface."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.cli.backend_options import backend_options
from trio_edge.runtime.cli.console import run
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from socket import socket

    from starlette.applications import Starlette

    from trio_edge.runtime.pipeline import Pipeline

_DEFAULT = ServerSettings()


@click.command("trio-serve", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundles", metavar="[NAME=]BUNDLE...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Others than loopback need --api-key.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one."
)
@click.option(
    "--api-key",
    envvar="TRIO_SERVE_API_KEY",
    show_envvar=True,
    help="Key that clients must send; in the variable no other user of this machine sees it.",
)
@backend_options()
@click.option(
    "--keep-images",
    type=int,
    default=0,
    show_default=True,
    help="Images whose visual tokens are kept for further questions.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(0, 10_000),
    default=_DEFAULT.max_queue,
    show_default=True,
    help="Requests that may wait for one bundle; more get status 429.",
)
@click.option(
    "--max-wait",
    "max_wait_s",
    type=click.FloatRange(0),
    default=_DEFAULT.max_wait_s,
    show_default=True,
    help="Seconds of expected wait above which a request gets status 429.",
)
@click.option(
    "--max-body",
    type=click.IntRange(1024),
    default=_DEFAULT.max_body,
    show_default=True,
    help="Bytes of a request.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=_DEFAULT.max_pixels,
    show_default=True,
    help="Pixels of all images of a request, checked before they are decoded.",
)
@click.option(
    "--allowed-media-domains",
    multiple=True,
    metavar="HOST",
    help="Host that images may be fetched from, written exactly so; may be repeated. [default: none]",
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
    show_default=True,
    help="Seconds that answers have to finish at Ctrl-C or SIGTERM.",
)
@click.option("--access-log", is_flag=True, help="Print a line for each request.")
def command(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    access_log: bool,
    backend: str,
    threads: int,
    cpu_accuracy: str,
    keep_images: int,
    **settings: Any,
) -> int:
    """Answer questions about images over HTTP with each BUNDLE, in OpenAI's form.

    A bundle is a model by its folder's name, or by NAME.
    """
    _check_installed()
    from trio_edge.serving.app import make_app
    from trio_edge.serving.server import BundleServer, is_loopback, listen, serve

    limits = ServerSettings(**settings)
    _check_settings(limits)
    loading = {"backend": backend, "threads": threads, "cpu_accuracy": cpu_accuracy}
    models = _models(bundles, {**loading, "keep_images": keep_images})
    app = make_app(models, limits)
    with listen(host, port) as listener:
        if not limits.api_key and not is_loopback(listener):
            raise click.UsageError(f"--host: expected --api-key with {host}, got none; others could ask too")
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
        raise click.UsageError("--api-key: expected ASCII without spaces, got another; headers carry no more")
    for domain in limits.allowed_media_domains:
        if urlsplit(f"//{domain}").netloc != domain or "@" in domain:
            raise click.UsageError(
                f"--allowed-media-domains: expected a host such as images.example, got {domain!r:.80}"
            )


def _models(bundles: Sequence[str], loading: dict[str, Any]) -> dict[str, Callable[[], Pipeline]]:
    """Return a function that loads each bundle by the model's name; broken bundles are told at once."""
    from trio_edge.runtime.bundle.reader import open_bundle
    from trio_edge.runtime.pipeline import Pipeline

    models: dict[str, Callable[[], Pipeline]] = {}
    for given in bundles:
        name, path = _named(given)
        if name in models:
            raise click.UsageError(f"BUNDLE: expected different names, got {name!r} twice; write NAME=BUNDLE")
        open_bundle(path)
        models[name] = partial(Pipeline.from_bundle, path, **loading)
    return models


def _named(given: str) -> tuple[str, Path]:
    name, separator, path = given.partition("=")
    if separator and name and "/" not in name:
        return name, Path(path)
    return Path(given).resolve().name, Path(given)


def _announce(app: Starlette, listener: socket) -> None:
    host, port, *_ = listener.getsockname()
    shown = f"[{host}]" if ":" in host else host
    names = [f"{worker.name} ({worker.pipeline.backend_name})" for worker in app.state.workers.values()]
    print(f"trio-serve: http://{shown}:{port}/v1 answers with {', '.join(names)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
