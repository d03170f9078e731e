"""The runtime: opens a bundle and answers questions about images, without torch, transformers or onnx."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trio_edge.runtime.answer import Generation, Statistics
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
    from trio_edge.runtime.decisions.questions import Decision, Question
    from trio_edge.runtime.decisions.watcher import Watcher, WatchEvent
    from trio_edge.runtime.images.reading import from_bgr
    from trio_edge.runtime.pipeline import Pipeline

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "Decision",
    "Generation",
    "ImageError",
    "Manifest",
    "ManifestError",
    "Pipeline",
    "Question",
    "Schedule",
    "ScheduleError",
    "ShapeError",
    "Stage",
    "Statistics",
    "TrioEdgeError",
    "WatchEvent",
    "Watcher",
    "from_bgr",
    "open_bundle",
]

# Names are imported at first use: importing numpy, Pillow and Jinja takes longer than the rest of `trio-run --help`.
_MODULES = {
    "Bundle": "bundle.reader",
    "Decision": "decisions.questions",
    "Generation": "answer",
    "Manifest": "bundle.manifest",
    "Pipeline": "pipeline",
    "Question": "decisions.questions",
    "Schedule": "bundle.schedule",
    "Stage": "bundle.schedule",
    "Statistics": "answer",
    "WatchEvent": "decisions.watcher",
    "Watcher": "decisions.watcher",
    "from_bgr": "images.reading",
    "open_bundle": "bundle.reader",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'bundle.errors')}")
    return getattr(module, name)
