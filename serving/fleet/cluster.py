"""A Ray cluster, joined or started on this machine for as long as the server runs, and the replicas on it.

Ray Serve keeps replicas alive on one machine or many, queues requests and scales: own code would be a second scheduler.
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
_TARGET_LOAD = (
    0.7  # of a replica, which autoscaling aims at: docs/serving-fleet.md has the waits that belong to it
)
_HEALTH_S = 2.0
_BACKOFF_S = (
    0.005,
    0.02,
)  # between looks for a free replica; Ray's own choice, up to 0.5 s, leaves replicas idle
_REACH_S = 5.0
_MAX_STARTS = 1  # of a replica at first; more would repeat the same error for a minute


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """How many replicas there are, and what each needs."""

    min_replicas: int = 1
    max_replicas: int = 1
    """Above ``min_replicas``, Ray Serve adds replicas while requests wait and takes them away later."""
    gpus: float = 0.0
    """GPUs of a replica; a part of one is allowed."""
    ray_address: str | None = None
    """Of a cluster to join, "auto" for this machine's; None to start one here."""


def cpu_threads(threads: int, fleet: FleetSettings) -> int:
    """Return the CPU threads of a replica. 0 shares this machine, if Ray is started here, among all replicas."""
    is_ours = fleet.ray_address is None
    return max(1, (os.cpu_count() or 1) // fleet.max_replicas) if is_ours and threads == 0 else threads


@contextlib.contextmanager
def ray_running(fleet: FleetSettings, *, cpus: float) -> Iterator[None]:
    """Join a cluster or start one, which only this machine can reach, until the block ends.

    Args:
        fleet: What will run on it.
        cpus: Of a replica.

    Raises:
        BackendError: If Ray is not installed, or cannot be reached.
        ShapeError: If this machine is too small for the replicas.
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
        raise BackendError(f"Ray: expected a cluster, got: {str(error)[:300]}") from None
    try:
        if fleet.ray_address is None:
            check_room(ray.cluster_resources(), fleet, cpus=cpus)
        with _quiet():
            serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        yield
    finally:
        ray.shutdown()  # ends all of Ray if it was started here


def _imported(*, is_local: bool) -> tuple[Any, Any]:
    # Ray reads these when it is imported. Nothing is reported to its makers unless the user wants it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if is_local:
        # Off, all of Ray's own ports listen on 127.0.0.1, as it does by itself on the systems in the name (2.60).
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
    """Refuse an address where nothing listens: Ray would try again for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise BackendError(
            f"--ray-address: expected HOST:PORT of a cluster, got {address!r:.80} ({error}); see: ray status"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Serve's remarks off the terminal; its files have them."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.serve")]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger in loggers:  # ray.init and serve.start set them
        logger.setLevel(logging.ERROR)


def check_room(room: Mapping[str, float], fleet: FleetSettings, *, cpus: float) -> None:
    """Refuse more replicas than a cluster of fixed size has room for: Ray would wait for more machines.

    Args:
        room: CPUs and GPUs of the cluster, by Ray's names.
        fleet: What is to run there.
        cpus: Of a replica of each model together.

    Raises:
        ShapeError: If they do not fit.
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
    """Return Ray Serve's description of a model's replicas.

    Args:
        name: Of the model.
        bundle: The folder, at the same place on every machine.
        loading: Keyword arguments of ``Pipeline.from_bundle``.
        settings: The server's limits.
        fleet: How many.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from trio_edge.serving.fleet.replica import Replica

    initial_s, max_s = _BACKOFF_S
    deployment = serve.deployment(
        name=deployment_name(name),
        max_ongoing_requests=1,
        max_queued_requests=settings.max_queue,
        max_constructor_retry_count=_MAX_STARTS,
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
    """Let replicas start, each model's as an application of its own, and remove them when the block ends.

    Raises:
        ShapeError: If the cluster has an application of the same name.
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
        yield {
            name: FleetWorker(
                name,
                handle,
                partial(status, apps[name], name),
                settings=settings,
                metrics=metrics,
            )
            for name, handle in handles.items()
        }
    finally:
        for app in apps.values():
            serve.delete(app, _blocking=False)


def status(app: str, model: str) -> Any:
    """Return what Ray Serve knows of a model's replicas."""
    from ray import serve

    return serve.status().applications[app].deployments[deployment_name(model)]
