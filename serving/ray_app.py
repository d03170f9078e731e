"""The server as a Ray Serve application, for ``serve run``, a Serve configuration file or KubeRay.

    serve run trio_edge.serving.ray_app:build bundles=small=/models/small,all=/models/all replicas=1-4 threads=2

``trio-serve --replicas`` needs no such command, and its HTTP server is stricter with slow and large requests than Ray's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click
from ray import serve

from trio_edge.runtime.bundle.errors import TrioEdgeError
from trio_edge.serving.app import app_of
from trio_edge.serving.cli import command, named_bundles
from trio_edge.serving.fleet.cluster import FleetSettings, deployment_name, replicas, status
from trio_edge.serving.fleet.worker import FleetWorker
from trio_edge.serving.metrics import Metrics
from trio_edge.serving.server import MOST_CONNECTIONS
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.applications import Starlette

_LOADING = ("backend", "threads", "cpu_accuracy", "keep_images")
_NOT_HERE = ("host", "port", "ray_address", "access_log")


def build(options: dict[str, Any]) -> Application:
    """Return the application: one process with the HTTP interface, and the replicas of each model.

    Args:
        options: ``bundles``, separated by commas, and options of ``trio-serve`` with underscores, such as ``max_queue``.
            Options of the HTTP server are given to Ray instead.

    Raises:
        ClickException: If an option is unknown or wrong, or a bundle is broken.
    """
    given = _parsed(options)
    loading = {name: given[name] for name in _LOADING}
    settings = ServerSettings(**{key: given[key] for key in ServerSettings.__annotations__ if key in given})
    least, most = given["replicas"] or (1, 1)
    fleet = FleetSettings(min_replicas=least, max_replicas=most, gpus=given["gpus"])
    try:
        bundles = named_bundles(given["bundles"])
    except TrioEdgeError as error:
        raise click.ClickException(str(error)) from None
    names = list(bundles)

    def make_front() -> Starlette:
        return _front(names, settings)

    front = serve.deployment(
        name="front",
        max_ongoing_requests=MOST_CONNECTIONS,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
    )
    return front(serve.ingress(make_front)()).bind(
        *(
            replicas(name, bundle, loading=loading, settings=settings, fleet=fleet)
            for name, bundle in bundles.items()
        )
    )


def _parsed(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as ``trio-serve`` reads them."""
    wrong = [name for name in _NOT_HERE if name in options]
    if wrong:
        raise click.UsageError(
            f"{wrong[0]}: expected none in Ray Serve, got one; configure Ray instead, for instance its http_options"
        )
    named = {name: str(value) for name, value in options.items() if name != "bundles"}
    words = [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", value)]
    bundles = str(options.get("bundles", "")).split(",")
    given = command.make_context("serve run", [*words, "--", *filter(None, bundles)]).params
    if given["max_queue"] < 1:
        raise click.UsageError("max_queue: expected at least 1, got 0; choose 1 or more")
    return given


def _front(names: list[str], settings: ServerSettings) -> Starlette:
    app, metrics = serve.get_replica_context().app_name, Metrics()
    workers = {
        name: FleetWorker(
            name,
            serve.get_deployment_handle(deployment_name(name), app),
            partial(status, app, name),
            settings=settings,
            metrics=metrics,
        )
        for name in names
    }
    return app_of(workers, settings, metrics=metrics)
