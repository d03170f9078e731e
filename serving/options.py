"""The options of ``trio-serve`` that Ray Serve's configuration has, too, and what follows from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from trio_edge.runtime.cli.console import backend_options, lookup_option
from trio_edge.serving.fleet.cluster import FleetSettings
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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


_OPTIONS = (
    click.option(
        "--api-key",
        "api_keys",
        multiple=True,
        envvar="TRIO_SERVE_API_KEY",
        show_envvar=True,
        help="Key that clients must send; repeat it for more keys. Prefer the variable: other users of this machine cannot see it.",
    ),
    click.option(
        "--keep-images",
        type=int,
        default=0,
        help="Number of images whose visual tokens stay in memory for further questions.",
    ),
    click.option(
        "--max-queue",
        type=click.IntRange(0, 10_000),
        default=_DEFAULT.max_queue,
        help="Maximum number of waiting requests for each BUNDLE; more get status 429.",
    ),
    click.option(
        "--busy-queue",
        type=click.IntRange(1),
        metavar="N",
        help='Requests with the level "auto" run at the lowest level only while N others wait. [default: off]',
    ),
    click.option(
        "--max-wait",
        "max_wait_s",
        type=click.FloatRange(0),
        default=_DEFAULT.max_wait_s,
        help="Longest expected wait in seconds; requests that would wait longer get status 429.",
    ),
    click.option(
        "--max-body",
        type=click.IntRange(1024),
        default=_DEFAULT.max_body,
        help="Maximum size of a request, a fetched image or a local file, in bytes.",
    ),
    click.option(
        "--max-pixels",
        type=click.IntRange(1),
        default=_DEFAULT.max_pixels,
        help="Maximum pixels of all images of a request together, checked before decoding.",
    ),
    click.option(
        "--allowed-media-domains",
        multiple=True,
        metavar="HOST",
        help="Exact host name from which images may be fetched; repeat it for more hosts. [default: none]",
    ),
    click.option(
        "--allowed-local-media-path",
        type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
        help="Folder whose files file:// addresses may name. [default: none]",
    ),
    click.option(
        "--clamp-max-tokens",
        is_flag=True,
        help="Lower a request's max_tokens to the BUNDLE's limit; otherwise a larger one gets status 400.",
    ),
    click.option(
        "--allowed-origins",
        multiple=True,
        metavar="ORIGIN",
        help="Origin, as https://robot.example, whose web pages may ask (CORS); repeat it for more. [default: none]",
    ),
    click.option(
        "--shutdown-timeout",
        "shutdown_s",
        type=click.FloatRange(0, 3600),
        default=_DEFAULT.shutdown_s,
        help="Seconds that running answers get to finish after Ctrl-C or SIGTERM.",
    ),
    click.option(
        "--replicas",
        metavar="N|MIN-MAX",
        callback=_replica_range,
        help="Number of processes for each BUNDLE, run by Ray Serve; MIN-MAX follows the load."
        " [default: one thread in this process]",
    ),
    click.option(
        "--gpus",
        type=click.FloatRange(0),
        default=FleetSettings.gpus,
        help="Number of GPUs for each replica; may be a fraction.",
    ),
)


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return backend_options()(lookup_option()(command))


def settings_from_options(options: dict[str, Any]) -> tuple[ServerSettings, dict[str, Any]]:
    """Return the server's settings, and the keyword arguments of ``Pipeline.from_bundle``.

    Raises:
        UsageError: If a setting is wrong.
    """
    loading = {
        name: options[name] for name in ("backend", "threads", "cpu_accuracy", "keep_images", "lookup")
    }
    limits = ServerSettings(
        **{name: value for name, value in options.items() if name in ServerSettings.__annotations__}
    )
    if (busy := limits.busy_queue) is not None and busy >= limits.max_queue:
        raise click.UsageError(
            f"--busy-queue: expected less than --max-queue ({limits.max_queue}), got {busy}; choose less"
        )
    for key in limits.api_keys:
        if not key.isascii() or not key.isprintable() or " " in key or not key:
            raise click.UsageError(
                "--api-key: expected ASCII without spaces, got other characters or none; choose another key"
            )
    for domain in limits.allowed_media_domains:
        if urlsplit(f"//{domain}").netloc != domain or "@" in domain:
            raise click.UsageError(
                f"--allowed-media-domains: expected a host such as images.example, got {domain!r:.80};"
                " remove the scheme and the path"
            )
    return limits, loading


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
            # The name of a link stays when it comes to lead to another bundle.
            name, path = Path(given).name, given
            name = Path(given).resolve().name if name in ("", "..") else name
        if name in folders:
            raise click.UsageError(f"BUNDLE: expected different names, got {name!r} twice; write NAME=BUNDLE")
        open_bundle(Path(path))
        folders[name] = Path(path)
    return folders


def fleet_of(given: dict[str, Any], limits: ServerSettings) -> FleetSettings | None:
    """Return the replicas that the options ask for, if any.

    Raises:
        UsageError: If an option contradicts another.
    """
    replicas, gpus = given["replicas"], given["gpus"]
    if replicas is None:
        if given.get("ray_address") is not None or gpus:
            raise click.UsageError("--ray-address, --gpus: expected --replicas with them, got none; add it")
        return None
    if limits.max_queue < 1:
        raise click.UsageError("--max-queue: expected at least 1 with --replicas, got 0; choose more")
    address = given.get("ray_address")
    return FleetSettings(min_replicas=replicas[0], max_replicas=replicas[1], gpus=gpus, ray_address=address)
