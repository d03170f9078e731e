"""Joins a Ray cluster, or starts one on this machine, and runs the replicas on it until the server stops.

Ray Serve restarts dead replicas, queues requests and scales, on one machine or many. Own code would be a second scheduler.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.errors import BackendError, ShapeError, install_command
from trio_edge.runtime.bundle.reader import open_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ray.serve import Application
    from starlette.applications import Starlette

    from trio_edge.serving.fleet.worker import FleetWorker
    from trio_edge.serving.metrics import Metrics
    from trio_edge.serving.settings import ServerSettings

# Holds requests with their images. Ray's default is 30 % of the memory.
_OBJECT_STORE_BYTES = 512 * 2**20
# Autoscaling aims at this load of a replica. docs/serving-operation.md has the waits at each load.
_TARGET_LOAD = 0.7
_HEALTH_S = 2.0
# First and longest pause between looks for a free replica. Ray's default, up to 0.5 s, leaves replicas idle.
_BACKOFF_S = (0.005, 0.02)
_REACH_S = 5.0
# More attempts to start the first replica would repeat the same error for a minute.
_MAX_STARTS = 1


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """Number of replicas of each model, and the needs of each."""

    min_replicas: int = 1
    max_replicas: int = 1
    """If larger than ``min_replicas``, Ray Serve adds replicas under load and removes them later."""
    gpus: float = 0.0
    """GPUs of each replica; may be a fraction."""
    ray_address: str | None = None
    """Address of the cluster to join, or "auto" for this machine's; None starts one here."""


@contextlib.contextmanager
def fleet_app(
    bundles: Mapping[str, Path], settings: ServerSettings, *, loading: dict[str, Any], fleet: FleetSettings
) -> Iterator[Starlette]:
    """Yield an app whose answers come from replicas. They start now and end with the block.

    Args:
        bundles: Bundle folder by model name.
        settings: Limits and policy.
        loading: Keyword arguments of ``Pipeline.from_bundle``.
        fleet: Number and needs of the replicas of each model.

    Raises:
        BackendError: If Ray is not installed, or cannot be reached.
        ShapeError: If the cluster is too small, or already runs a model of the same name.
    """
    from trio_edge.serving.app import app_of
    from trio_edge.serving.metrics import Metrics

    if loading["threads"] == 0 and fleet.ray_address is None:  # the replicas share this machine's cores
        loading = {**loading, "threads": max(1, (os.cpu_count() or 1) // fleet.max_replicas)}
    metrics = Metrics()
    with _ray_running(fleet, threads=max(loading["threads"], 1), num_models=len(bundles)):
        applications = {
            name: replicas(name, bundle, loading=loading, settings=settings, fleet=fleet)
            for name, bundle in bundles.items()
        }
        with _deployed(applications, settings=settings, metrics=metrics) as workers:
            yield app_of(workers, settings, metrics=metrics)


@contextlib.contextmanager
def _ray_running(fleet: FleetSettings, *, threads: int, num_models: int) -> Iterator[None]:
    """Join a cluster, or start one that only this machine can reach, until the block ends."""
    ray, serve = _imported(is_local=fleet.ray_address is None)
    if fleet.ray_address not in (None, "auto"):
        _check_reachable(fleet.ray_address)
    own: dict[str, Any] = {"object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        with _quiet():
            options = own if fleet.ray_address is None else {"address": fleet.ray_address}
            ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace="trio-serve", **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise BackendError(f"Ray: expected a cluster, got: {str(error)[:300]}; see: ray status") from None
    try:
        if fleet.ray_address is None:
            check_room(ray.cluster_resources(), fleet, threads=threads, num_models=num_models)
        with _quiet():
            serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        yield
    finally:
        ray.shutdown()  # also stops the cluster if it was started here


def _imported(*, is_local: bool) -> tuple[Any, Any]:
    # Ray reads these variables at import. It reports usage to its makers unless the first one is 0.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if is_local:
        # With 0, all of Ray's own ports listen on 127.0.0.1 (2.60).
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise BackendError(
            f"--replicas: expected {error.name} to be installed, it is not; run {install_command('ray')}"
        ) from None
    return ray, serve


def _check_reachable(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise BackendError(
            f"--ray-address: expected HOST:PORT of a cluster, got {address!r:.80} ({error}); see: ray status"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray's remarks off the terminal. Its log files have them."""
    _silence_loggers()
    yield
    _silence_loggers()  # again, because ray.init and serve.start set the levels


def _silence_loggers() -> None:
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def check_room(room: Mapping[str, float], fleet: FleetSettings, *, threads: int, num_models: int) -> None:
    """Refuse more replicas than a cluster of fixed size can hold: Ray itself would wait for more machines.

    Args:
        room: The cluster's resources, "CPU" and "GPU".
        fleet: Number and needs of the replicas of each model.
        threads: CPU threads of each replica.
        num_models: Number of models.

    Raises:
        ShapeError: If the replicas do not fit.
    """
    count = num_models * fleet.max_replicas
    for name, each in (("CPU", threads), ("GPU", fleet.gpus)):
        if each * count > room.get(name, 0.0):
            raise ShapeError(
                f"--replicas: expected at most {room.get(name, 0.0):g} {name}s in all, got {count} replicas with"
                f" {each:g} each; choose fewer, or join a cluster with --ray-address"
            )


def replicas(
    name: str, bundle: Path, *, loading: dict[str, Any], settings: ServerSettings, fleet: FleetSettings
) -> Application:
    """Return the Ray Serve application with the replicas of the model ``name``.

    The bundle's folder has the same path on every machine. ``loading`` has the keyword arguments of ``Pipeline.from_bundle``.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from trio_edge.serving.fleet.replica import Replica

    initial_s, max_s = _BACKOFF_S
    least, most = fleet.min_replicas, fleet.max_replicas
    batch = open_bundle(bundle).manifest.batch
    scaling: dict[str, Any] = {"num_replicas": least}
    if least < most:
        limits = {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": _TARGET_LOAD * batch,
        }
        scaling = {"autoscaling_config": limits}
    deployment = serve.deployment(
        name=deployment_name(name),
        max_ongoing_requests=batch,
        max_queued_requests=settings.max_queue,
        max_constructor_retry_count=_MAX_STARTS,
        graceful_shutdown_timeout_s=settings.shutdown_s,
        health_check_period_s=_HEALTH_S,
        ray_actor_options={"num_cpus": loading["threads"] or 1, "num_gpus": fleet.gpus},
        request_router_config=RequestRouterConfig(initial_backoff_s=initial_s, max_backoff_s=max_s),
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        **scaling,
    )
    return deployment(Replica).bind(name, str(bundle.resolve()), loading=loading, settings=settings)


def deployment_name(model: str) -> str:
    """Return a model's name without the characters that Ray Serve refuses."""
    return re.sub(r"[^\w.-]", "_", model)


@contextlib.contextmanager
def _deployed(
    applications: Mapping[str, Application], *, settings: ServerSettings, metrics: Metrics
) -> Iterator[dict[str, FleetWorker]]:
    """Start each model's replicas as an application of its own, and remove them when the block ends."""
    from ray import serve

    from trio_edge.serving.fleet.worker import FleetWorker

    apps = {name: f"trio-serve-{deployment_name(name)}" for name in applications}
    taken = set(serve.status().applications)
    for app in apps.values():
        if app in taken:  # of another server, or of a model whose name differs in replaced characters only
            raise ShapeError(
                f"Ray: expected no application {app}, got one; choose another NAME=BUNDLE, or run: serve delete {app}"
            )
        taken.add(app)
    targets = [
        serve.RunTarget(application, name=apps[name], route_prefix=None)
        for name, application in applications.items()
    ]
    with _quiet():
        handles = dict(zip(applications, serve.run_many(targets, wait_for_applications_running=False)))
    try:
        yield {
            name: FleetWorker(name, handle, settings=settings, metrics=metrics)
            for name, handle in handles.items()
        }
    finally:
        for app in apps.values():
            serve.delete(app, _blocking=False)
