"""The server as a Ray Serve application, for ``serve run``, a Serve configuration file or KubeRay.

    serve run trio_edge.serving.ray_app:build bundles=small=/models/small,all=/models/all replicas=1-4 threads=2

``trio-serve --replicas`` needs no such command; its own HTTP server is also stricter with slow and large requests than Ray's.
"""

from __future__ import annotations

import os
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
