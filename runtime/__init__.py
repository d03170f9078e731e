"""The runtime: opens a bundle and answers questions about pictures. Needs no torch, transformers or onnx."""

from trio_edge.runtime.bundle import Bundle, open_bundle
from trio_edge.runtime.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    ImageError,
    ManifestError,
    ScheduleError,
    ShapeError,
    TrioEdgeError,
)
from trio_edge.runtime.manifest import Manifest
from trio_edge.runtime.pipeline import Generation, Pipeline, Statistics
from trio_edge.runtime.schedule import Schedule, Stage

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "Generation",
    "ImageError",
    "Manifest",
    "ManifestError",
    "Pipeline",
    "Schedule",
    "ScheduleError",
    "ShapeError",
    "Stage",
    "Statistics",
    "TrioEdgeError",
    "open_bundle",
]
