"""Makes the selector in front of the decoder: the only place that knows its methods by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.trio.nms import FeatureNms
from trio_edge.trio.saliency import ProxySaliency
from trio_edge.trio.selectors.stages.trio import Trio

if TYPE_CHECKING:
    from trio_edge.export.families.base import FamilyModel
    from trio_edge.runtime.bundle.manifest import TokenMethod
    from trio_edge.runtime.bundle.schedule import Schedule
    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.trio.selectors.interface import StageSelector, TokenSelector

CLIP_METHODS: tuple[TokenMethod, ...] = ("cdpruner", "eadp")
"""Those that read the question, and can compare it with the picture in CLIP's space."""


def token_selector(
    method: TokenMethod, *, num_keep: int, clip: bool = False, grid: tuple[int, int] | None = None
) -> TokenSelector:
    """Return the selector ``method`` that keeps ``num_keep`` tokens of a picture.

    Args:
        method: Its name.
        num_keep: K.
        clip: Whether it compares the text with the picture in CLIP's space; one of ``CLIP_METHODS``.
        grid: Rows and columns if every picture is one full grid of tokens.
    """
    if method == "visionzip":
        from trio_edge.trio.selectors.tokens.visionzip import VisionZip

        return VisionZip(num_keep=num_keep)
    if method == "holov":
        from trio_edge.trio.selectors.tokens.holov import HoloV

        return HoloV(num_keep=num_keep)
    if method == "scope":
        from trio_edge.trio.selectors.tokens.scope import Scope

        return Scope(num_keep=num_keep)
    if method == "divprune":
        from trio_edge.trio.selectors.tokens.divprune import DivPrune

        return DivPrune(num_keep=num_keep)
    if method == "cdpruner":
        from trio_edge.trio.selectors.tokens.cdpruner import CdPruner

        return CdPruner(num_keep=num_keep, clip=clip)
    if method == "eadp":
        from trio_edge.trio.selectors.tokens.eadp import Eadp

        return Eadp(num_keep=num_keep, clip=clip, grid=grid)
    from trio_edge.trio.selectors.tokens.uniform import Uniform

    return Uniform(num_keep=num_keep)


def full_grid(processing: ImageProcessing) -> tuple[int, int] | None:
    """Return rows and columns where every picture is one full grid of tokens, as with LLaVA-1.5; else None."""
    if not isinstance(processing, LlavaImages) or processing.encoder_keep is not None:
        return None
    if processing.kind != "single":
        return None
    side = processing.patches_per_side
    return side, side


# Makes the selector of a stage from its schedule: the only place that knows the methods by name.


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
