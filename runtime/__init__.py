"""The runtime: opens a bundle and answers questions about images. Needs no torch, transformers or onnx."""

from trio_edge.runtime.bundle.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    ImageError,
    ManifestError,
    ScheduleError,
    ShapeError,
    TrioEdgeError,
)
from trio_edge.runtime.bundle.manifest import Manifest
from trio_edge.runtime.bundle.reader import Bundle, open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Generation, Pipeline, Statistics

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
