"""The server as a Ray Serve application, for ``serve run``, a Serve configuration file or KubeRay.

    serve run trio_edge.serving.ray_app:build bundles=small=/models/small,all=/models/all replicas=1-4 threads=2

``trio-serve --replicas`` does not use it. Its own HTTP server is stricter with slow and large requests than Ray's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from ray import serve

from trio_edge.runtime.bundle.errors import TrioEdgeError
from trio_edge.serving.app import app_of
from trio_edge.serving.fleet.cluster import deployment_name, replicas
from trio_edge.serving.fleet.worker import FleetWorker
from trio_edge.serving.metrics import Metrics
from trio_edge.serving.options import fleet_of, named_bundles, server_options, settings_from_options
from trio_edge.serving.server import MAX_CONNECTIONS

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.applications import Starlette


_OPTIONS_OF_RAY = ("host", "port", "ray_address", "access_log")


@click.command("serve run")
@click.argument("bundles", nargs=-1, required=True)
@server_options
def _options(**_given: Any) -> None:
    """Name the options. Only their parser is used."""


def build(options: dict[str, Any]) -> Application:
    """Return the application: one process with the HTTP interface, and the replicas of each model.

    Args:
        options: ``bundles``, separated by commas, and options of ``trio-serve`` with underscores, such as ``max_queue``.
            Ray's own settings choose the host and the port.

    Raises:
        ClickException: If an option is unknown or wrong, or a bundle is broken.
    """
    given = _parsed(options)
    settings, loading = settings_from_options(given)
    fleet = fleet_of({**given, "replicas": given["replicas"] or (1, 1)}, settings)
    assert fleet is not None  # replicas are given
    try:
        bundles = named_bundles(given["bundles"])
    except TrioEdgeError as error:
        raise click.ClickException(str(error)) from None
    names = list(bundles)

    def make_front() -> Starlette:  # Ray Serve accepts no partial here
        app, metrics = serve.get_replica_context().app_name, Metrics()
        handles = {name: serve.get_deployment_handle(deployment_name(name), app) for name in names}
        workers = {
            name: FleetWorker(name, handle, settings=settings, metrics=metrics)
            for name, handle in handles.items()
        }
        return app_of(workers, settings, metrics=metrics)

    front = serve.deployment(
        name="front",
        max_ongoing_requests=MAX_CONNECTIONS,
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
    """Return the options as ``trio-serve`` parses them."""
    for name in _OPTIONS_OF_RAY:
        if name in options:
            raise click.UsageError(
                f"{name}: expected none here, got one; set it in Ray, as with http_options"
            )
    named = {name: str(value) for name, value in options.items() if name != "bundles"}
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in named.items()]
    words = [word for pair in pairs for word in pair if word.lower() != "true"]  # a flag has no value
    bundles = str(options.get("bundles", "")).split(",")
    return _options.make_context("serve run", [*words, "--", *filter(None, bundles)]).params
