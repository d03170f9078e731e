"""The kept tokens of an answer as boxes on its images, for the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.answer import Generation
    from trio_edge.runtime.bundle.schedule import Stage
    from trio_edge.runtime.images.processing import ImageLayout


def kept_report(answer: Generation, stages: Sequence[Stage]) -> dict[str, Any]:
    """Return the kept boxes of each image and stage in pixels, and the milliseconds of each graph.

    The answer must have its first token.
    """
    images, first = [], 0
    for image, layout in zip(answer.images, answer.layouts):
        after = first + len(layout.boxes)
        own = [indices[(indices >= first) & (indices < after)] - first for indices in answer.kept]
        entered = {"layer": 0, **_boxes(layout, np.arange(len(layout.boxes)))}
        kept = [{"layer": stage.layer, **_boxes(layout, chosen)} for stage, chosen in zip(stages, own)]
        images.append({"width": image.width, "height": image.height, "stages": [entered, *kept]})
        first = after
    graph_ms = {name: round(ms, 3) for name, ms in answer.statistics.graph_ms.items()}
    return {"images": images, "graph_ms": graph_ms}


def _boxes(layout: ImageLayout, chosen: NDArray[np.integer]) -> dict[str, Any]:
    is_overview = np.isin(chosen, layout.overview)
    return {
        "kept": len(chosen),
        "boxes": _drawable(layout.boxes[chosen[~is_overview]]),
        "overview_boxes": _drawable(layout.boxes[chosen[is_overview]]),
    }


def _drawable(boxes: NDArray[np.float32]) -> list[list[float]]:
    """Return the boxes that have an area: newline tokens have none."""
    with_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return [[round(edge, 1) for edge in box] for box in boxes[with_area].tolist()]
