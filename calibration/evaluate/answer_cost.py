"""FLOPs of one answer's prefill, at its own number of visual and text tokens.

Decoder layers are counted at the visual tokens that they processed, selections by their methods' formulas. The manifest has
the vision tower's FLOPs for one image size; they are scaled by visual tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.graph_io import num_clip_texts
from trio_edge.trio.cost.bundle_work import clip_text_flops, reduce_cost
from trio_edge.trio.cost.flops import count_prefill, decoder_flops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from trio_edge.runtime.answer import Statistics
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.model.levels import Level
    from trio_edge.runtime.pipeline import Pipeline


def image_tokens(level: Level, images: Sequence[Image.Image], *, is_video: bool = False) -> list[int]:
    """Return the visual tokens of each of a prompt's images, or pairs of a video's frames, before the ``reduce`` graph."""
    if is_video and level.videos is not None:
        return [level.videos.sizes(2 * len(images), *image.size)["N"] for image in images]
    own = level.images if len(images) == 1 else level.images.of_several()
    return [own.sizes(*image.size)["N"] for image in images]


def tokens_per_layer(manifest: Manifest, *, image_tokens: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Return the visual tokens that each decoder layer processed; ``kept`` has those left after each stage."""
    entering, ranges = _entering(manifest, image_tokens), manifest.ranges
    counts = (entering, *(kept or [entering] * (len(ranges) - 1)))
    return [count for graph, count in zip(ranges, counts, strict=True) for _ in range(graph.num_layers)]


def processed_tokens(manifest: Manifest, *, image_tokens: Sequence[int], kept: Sequence[int]) -> float:
    """Return the mean over decoder layers of the visual tokens processed."""
    counts = tokens_per_layer(manifest, image_tokens=image_tokens, kept=kept)
    return sum(counts) / manifest.dimensions.num_layers


def answer_flops(
    pipeline: Pipeline,
    statistics: Statistics,
    images: Sequence[Image.Image],
    *,
    select: bool = True,
    is_video: bool = False,
) -> float:
    """Return the FLOPs of the prefills of all levels that ran for an answer, without what a level took from the one below."""
    total, before = 0.0, None
    for name in (*statistics.levels_below, statistics.level):
        level = pipeline.level_named(name)
        asked: dict[str, Any] = {"before": before, "select": select, "is_video": is_video}
        total += level_flops(level, images, num_text=statistics.text_tokens, **asked)
        before = level
    return total


def level_flops(
    level: Level,
    images: Sequence[Image.Image],
    *,
    num_text: int,
    before: Level | None = None,
    select: bool = True,
    is_video: bool = False,
) -> float:
    """Return the FLOPs of a level's prefill; ``before`` is the level that has just run the same prompt."""
    manifest, counts = level.manifest, image_tokens(level, images, is_video=is_video)
    kept = [_entering(manifest, counts)]
    for stage in manifest.schedule.stages:
        kept.append(min(stage.keep, kept[-1]))
    whole = prefill_flops(manifest, image_tokens=counts, kept=kept[1:], num_text=num_text, select=select)
    if before is None or before.vision is not level.vision:
        return whole
    first = manifest.ranges[0].num_layers
    rows = [count + num_text for count in tokens_per_layer(manifest, image_tokens=counts, kept=kept[1:])]
    same = decoder_flops(manifest.dimensions, rows) - decoder_flops(manifest.dimensions, rows[first:])
    return whole - same - manifest.cost.reduced_flops["vision"] * sum(counts) / manifest.cost.num_visual


def prefill_flops(
    manifest: Manifest,
    *,
    image_tokens: Sequence[int],
    kept: Sequence[int],
    num_text: int,
    select: bool = True,
) -> float:
    """Return the FLOPs of one prefill: vision tower, selection before the decoder, decoder, head, stages if ``select``."""
    num_visual, stages = sum(image_tokens), 0.0
    rows = [count + num_text for count in tokens_per_layer(manifest, image_tokens=image_tokens, kept=kept)]
    decoder = decoder_flops(manifest.dimensions, rows)
    if not num_visual:
        return decoder
    vision = manifest.cost.reduced_flops["vision"] * num_visual / manifest.cost.num_visual
    if select:
        stages = count_prefill(
            manifest.dimensions,
            manifest.schedule,
            num_visual=_entering(manifest, image_tokens),
            num_text=num_text,
            one_size=len(manifest.visual_sizes) == 1,
        ).select_flops
    before = sum(_before_decoder(manifest, num_visual=count, num_text=num_text) for count in image_tokens)
    return decoder + vision + stages + before


def _entering(manifest: Manifest, image_tokens: Sequence[int]) -> int:
    """Return the visual tokens of all images that enter the decoder."""
    keep = manifest.token_keep
    return sum(image_tokens if keep is None else (min(keep, count) for count in image_tokens))


def _before_decoder(manifest: Manifest, *, num_visual: int, num_text: int) -> float:
    """Return the FLOPs of one image's ``reduce`` graph, and of the text tower that it needs."""
    if manifest.token_method is None:
        return 0.0
    tower = 0.0
    if manifest.clip_text is not None:
        texts = num_clip_texts(num_text, length=manifest.clip_text.length)
        tower = clip_text_flops(manifest, num_texts=texts)
    return tower + reduce_cost(manifest, num_visual=num_visual, num_text=num_text).flops
