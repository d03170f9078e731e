"""A Ray cluster, which the server joins or starts on this machine, and the replicas on it.

Ray Serve keeps replicas alive on one machine or several, queues requests and scales; own code would be a second scheduler.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.errors import BackendError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from ray.serve import Application

    from trio_edge.serving.fleet.worker import FleetWorker
    from trio_edge.serving.metrics import Metrics
    from trio_edge.serving.settings import ServerSettings

_OBJECT_STORE_BYTES = 512 * 2**20  # requests with their images; Ray's own choice is 30 % of the memory
_TARGET_LOAD = 0.7  # of a replica, for autoscaling; docs/serving-fleet.md has the resulting waits
_HEALTH_S = 2.0
_BACKOFF_S = (
    0.005,
    0.02,
)  # between searches for a free replica; Ray's default of up to 0.5 s leaves replicas idle
_REACH_S = 5.0
_MOST_STARTS = 1  # of a new replica; more would repeat the same error for a minute


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """The number of replicas, their GPUs, and the cluster."""

    min_replicas: int = 1
    max_replicas: int = 1
    """Above ``min_replicas``, Ray Serve adds replicas while requests wait and removes them later."""
    gpus: float = 0.0
    """GPUs per replica; may be a fraction."""
    ray_address: str | None = None
    """Address of a cluster to join; "auto" for this machine's cluster, None to start one here."""


def cpu_threads(threads: int, fleet: FleetSettings) -> int:
    """Return the CPU threads per replica. 0 divides this machine's CPUs by the replicas, if Ray is started here."""
    is_ours = fleet.ray_address is None
    return max(1, (os.cpu_count() or 1) // fleet.max_replicas) if is_ours and threads == 0 else threads


@contextlib.contextmanager
def ray_running(fleet: FleetSettings, *, cpus: float) -> Iterator[None]:
    """Join a cluster, or start one that only this machine can reach, until the block ends.

    Raises:
        BackendError: If Ray is not installed or cannot be reached.
        ShapeError: If this machine is too small for ``cpus`` CPUs for one replica of each model.
    """
    ray, serve = _imported(is_local=fleet.ray_address is None)
    if fleet.ray_address not in (None, "auto"):
        _check_reachable(fleet.ray_address)
    own: dict[str, Any] = {"object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        with _quiet():
            options = own if fleet.ray_address is None else {"address": fleet.ray_address}
            ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace="trio-serve", **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise BackendError(
            f"Ray: expected a cluster, got: {str(error)[:300]}; check it with ray status"
        ) from None
    try:
        if fleet.ray_address is None:
            check_room(ray.cluster_resources(), fleet, cpus=cpus)
        with _quiet():
            serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        yield
    finally:
        ray.shutdown()  # stops Ray completely if it was started here


def _imported(*, is_local: bool) -> tuple[Any, Any]:
    # Ray reads these variables at import. By default nothing is reported to Ray's makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if is_local:
        # With 0, all of Ray's ports listen on 127.0.0.1, which is its default on Windows and macOS (2.60).
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise BackendError(
            f'replicas: expected {error.name}, found none; run pip install "trio-edge[ray]"'
        ) from None
    return ray, serve


def _check_reachable(address: str) -> None:
    """Raise BackendError for an address where nothing listens, because Ray would retry for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise BackendError(
            f"--ray-address: expected HOST:PORT of a cluster, got {address!r:.80} ({error}); check it with ray status"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Serve's messages off the terminal; its log files have them."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.serve")]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger in loggers:  # ray.init and serve.start have changed the levels
        logger.setLevel(logging.ERROR)


def check_room(room: Mapping[str, float], fleet: FleetSettings, *, cpus: float) -> None:
    """Raise ShapeError for more replicas than a cluster of fixed size can hold: Ray would wait for more machines.

    ``room`` has the cluster's CPUs and GPUs by Ray's names; one replica of each model together needs ``cpus`` CPUs.
    """
    for name, each in (("CPU", cpus), ("GPU", fleet.gpus)):
        if each * fleet.max_replicas > room.get(name, 0.0):
            raise ShapeError(
                f"--replicas: expected at most {room.get(name, 0.0):g} {name}s in all, got {fleet.max_replicas} replicas"
                f" with {each:g} each; choose fewer, or join a cluster with --ray-address"
            )


def replicas(
    name: str,
    bundle: Path,
    *,
    loading: dict[str, Any],
    settings: ServerSettings,
    fleet: FleetSettings,
) -> Application:
    """Return Ray Serve's description of the replicas of the model ``name``.

    ``bundle`` is the folder, at the same place on every machine; ``loading`` are keyword arguments of
    ``Pipeline.from_bundle``.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from trio_edge.serving.fleet.replica import Replica

    initial_s, max_s = _BACKOFF_S
    deployment = serve.deployment(
        name=deployment_name(name),
        max_ongoing_requests=1,
        max_queued_requests=settings.max_queue,
        max_constructor_retry_count=_MOST_STARTS,
        graceful_shutdown_timeout_s=settings.shutdown_s,
        health_check_period_s=_HEALTH_S,
        ray_actor_options={"num_cpus": loading["threads"] or 1, "num_gpus": fleet.gpus},
        request_router_config=RequestRouterConfig(initial_backoff_s=initial_s, max_backoff_s=max_s),
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        **_numbers(fleet),
    )
    return deployment(Replica).bind(name, str(bundle.resolve()), loading=loading, settings=settings)


def deployment_name(model: str) -> str:
    """Return a model's name as Ray Serve accepts it."""
    return re.sub(r"[^\w.-]", "_", model)


def _numbers(fleet: FleetSettings) -> dict[str, Any]:
    if fleet.min_replicas == fleet.max_replicas:
        return {"num_replicas": fleet.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": fleet.min_replicas,
            "max_replicas": fleet.max_replicas,
            "target_ongoing_requests": _TARGET_LOAD,
        }
    }


@contextlib.contextmanager
def deployed(
    models: Mapping[str, Callable[[], Application]], *, settings: ServerSettings, metrics: Metrics
) -> Iterator[dict[str, FleetWorker]]:
    """Start replicas, with one Ray Serve application per model, and remove them when the block ends.

    Raises:
        ShapeError: If the cluster already has an application of the same name.
    """
    from ray import serve

    from trio_edge.serving.fleet.worker import FleetWorker

    apps = {name: f"trio-serve-{deployment_name(name)}" for name in models}
    for name in apps.values():
        if name in serve.status().applications:
            raise ShapeError(
                f"Ray: expected no application {name}, got one; choose another NAME=BUNDLE, or run: serve delete {name}"
            )
    targets = [serve.RunTarget(make(), name=apps[name], route_prefix=None) for name, make in models.items()]
    with _quiet():
        handles = dict(zip(models, serve.run_many(targets, wait_for_applications_running=False)))
    try:
        common: Any = {"settings": settings, "metrics": metrics}
        yield {
            name: FleetWorker(name, handle, partial(status, apps[name], name), **common)
            for name, handle in handles.items()
        }
    finally:
        for app in apps.values():
            serve.delete(app, _blocking=False)


def status(app: str, model: str) -> Any:
    """Return Ray Serve's status of a model's replicas."""
    from ray import serve

    return serve.status().applications[app].deployments[deployment_name(model)]
