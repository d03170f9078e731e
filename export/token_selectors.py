"""Makes selectors from the registry ``trio_edge.trio.methods`` and a family's modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.trio.methods import STAGE_METHODS, stage_method, token_method
from trio_edge.trio.selectors.interface import StageParts
from trio_edge.trio.selectors.stages.trio import Trio

if TYPE_CHECKING:
    from trio_edge.export.families.base import FamilyModel
    from trio_edge.runtime.bundle.schedule import Schedule
    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.trio.saliency import ProxySaliency
    from trio_edge.trio.selectors.interface import StageSelector, TokenSelector


def token_selector(
    method: str, *, num_keep: int, clip: bool = False, grid: tuple[int, int] | None = None
) -> TokenSelector:
    """Return the selector ``method`` that keeps ``num_keep`` tokens of an image; raise ScheduleError if there is none.

    With ``clip`` it compares text and image in CLIP's space. ``grid`` is the result of ``full_grid``.
    """
    row = token_method(method)
    options: dict[str, Any] = {"clip": clip} if row.takes_clip else {}
    if row.takes_grid:
        options["grid"] = grid
    selector: TokenSelector = row.load()(num_keep=num_keep, **options)
    return selector


def full_grid(processing: ImageProcessing) -> tuple[int, int] | None:
    """Return rows and columns if every image is one full grid of tokens, as with LLaVA-1.5; else None."""
    if not isinstance(processing, LlavaImages) or processing.kind != "single" or processing.encoder_keep:
        return None
    return processing.patches_per_side, processing.patches_per_side


def needs_previous(schedule: Schedule) -> bool:
    """Return whether the schedule's method reads the input of the layer before a stage."""
    return bool(schedule.stages) and stage_method(schedule.method).load().needs_previous


def probe_of(selector: StageSelector) -> ProxySaliency | None:
    """Return the probe whose scores the selector reads, or None."""
    return selector.saliency if isinstance(selector, Trio) else None


def check_image_shares(schedule: Schedule, *, max_images: int) -> None:
    """Raise ScheduleError if ``--budget image`` is set and the method does not support it, or a share would be empty."""
    if schedule.budget != "image" or not schedule.stages:
        return
    row, keep = stage_method(schedule.method), min(stage.keep for stage in schedule.stages)
    if not (row.has_image_shares and keep >= max_images):
        able = " or ".join(name for name, other in STAGE_METHODS.items() if other.has_image_shares)
        raise ScheduleError(
            f"--budget image: expected --method {able}, and at least {max_images} kept tokens (one for each image), got"
            f" {row.name} and {keep} tokens; leave out --budget"
        )


def stage_selector(
    model: FamilyModel,
    schedule: Schedule,
    *,
    stage: int,
    max_visual: int,
    max_images: int = 1,
    is_quantized: bool = False,
) -> StageSelector:
    """Return the selector of stage number ``stage``, which holds the model's own modules.

    ``max_visual`` is its largest N; ``is_quantized`` tells whether the weights of its layer are going to be quantized.
    """
    keep, layer = schedule.stages[stage].keep, schedule.stages[stage].layer
    parts = StageParts(
        previous_layer=model.layers[layer - 1],
        layer=model.layers[layer],
        final_norm=model.final_norm,
        lm_head=model.lm_head,
        num_keep=keep,
        max_visual=max_visual,
        settings=schedule,
        image_share=keep // max_images if schedule.budget == "image" else None,
        is_quantized=is_quantized,
    )
    selector: StageSelector = stage_method(schedule.method).load().for_stage(parts)
    return selector
