"""The app whose answers come from replicas."""

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
    """Yield an app whose answers come from replicas. They start now and end with the block.

    ``bundles`` has the folders by model name, and ``loading`` the keyword arguments of ``Pipeline.from_bundle``.

    Raises:
        BackendError: If Ray is not installed, or cannot be reached.
        ShapeError: If the cluster is too small, or already runs a model of the same name.
    """
    loading = {**loading, "threads": cpu_threads(loading["threads"], fleet)}
    metrics = Metrics()
    models = {
        name: partial(replicas, name, bundle, loading=loading, settings=settings, fleet=fleet)
        for name, bundle in bundles.items()
    }
    with (
        ray_running(fleet, threads=max(loading["threads"], 1), num_models=len(bundles)),
        deployed(models, settings=settings, metrics=metrics) as workers,
    ):
        yield app_of(workers, settings, metrics=metrics)
