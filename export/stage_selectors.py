"""Makes the selector of a stage from its schedule: the only place that knows the methods by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trio_edge.trio.nms import FeatureNms
from trio_edge.trio.saliency import ProxySaliency
from trio_edge.trio.selectors.stages.trio import Trio

if TYPE_CHECKING:
    from trio_edge.export.families.base import FamilyModel
    from trio_edge.runtime.schedule import Schedule
    from trio_edge.trio.selectors.interface import StageSelector

_LOOK_AT_THE_LAYER_BEFORE = ("fastv", "dart", "sparsevlm")


def needs_previous(schedule: Schedule) -> bool:
    """Return whether the method looks at the layer that has just run."""
    return bool(schedule.stages) and schedule.method in _LOOK_AT_THE_LAYER_BEFORE


def stage_selector(model: FamilyModel, schedule: Schedule, *, stage: int, max_visual: int) -> StageSelector:
    """Return the selector of ``stage``, holding the model's own modules.

    Args:
        model: The family's.
        schedule: With the method and its settings.
        stage: Which one.
        max_visual: Largest N of the stage.
    """
    layer, keep = schedule.stages[stage].layer, schedule.stages[stage].keep
    before: Any = model.layers[layer - 1]
    if schedule.method == "fastv":
        from trio_edge.trio.selectors.stages.fastv import FastV

        return FastV(before, num_keep=keep)
    if schedule.method == "dart":
        from trio_edge.trio.selectors.stages.dart import Dart

        return Dart(before, model.final_norm, num_keep=keep)
    if schedule.method == "sparsevlm":
        from trio_edge.trio.selectors.stages.sparse_vlm import SparseVlm

        return SparseVlm(before, num_keep=keep)
    if schedule.method == "pyramiddrop":
        from trio_edge.trio.selectors.stages.pyramid_drop import PyramidDrop

        return PyramidDrop(model.layers[layer], num_keep=keep)
    saliency = ProxySaliency(
        model.layers[layer],
        model.final_norm,
        model.lm_head,
        max_visual=max_visual,
        num_probe_rows=schedule.num_probe_rows,
        last_probe_offset=schedule.last_probe_offset,
    )
    nms = FeatureNms(num_keep=keep, threshold=schedule.nms_threshold, rounds=schedule.nms_rounds)
    return Trio(saliency, nms)
