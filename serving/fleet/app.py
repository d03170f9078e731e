"""The app of a server whose answers come from a fleet of replicas."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

from trio_edge.serving.app import app_of
from trio_edge.serving.fleet.cluster import cpu_threads, deployed, ray_running, replicas
from trio_edge.serving.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from starlette.applications import Starlette

    from trio_edge.serving.fleet.cluster import FleetSettings
    from trio_edge.serving.settings import ServerSettings


@contextlib.contextmanager
def fleet_app(
    bundles: Mapping[str, Path], settings: ServerSettings, *, loading: dict[str, Any], fleet: FleetSettings
) -> Iterator[Starlette]:
    """Yield an app whose answers come from replicas, which start now and end with the block.

    ``bundles`` are folders by the models' names, ``loading`` keyword arguments of ``Pipeline.from_bundle``.

    Raises:
        BackendError: If Ray is not installed or cannot be reached.
        ShapeError: If the machine is too small for the replicas.
    """
    loading = {**loading, "threads": cpu_threads(loading["threads"], fleet)}
    metrics = Metrics()
    models = {
        name: partial(replicas, name, bundle, loading=loading, settings=settings, fleet=fleet)
        for name, bundle in bundles.items()
    }
    cpus = len(bundles) * max(loading["threads"], 1)
    running = ray_running(fleet, cpus=cpus)
    with running, deployed(models, settings=settings, metrics=metrics) as workers:
        yield app_of(workers, settings, metrics=metrics)
