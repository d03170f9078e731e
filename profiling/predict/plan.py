"""The input of a prediction: a bundle or a released model, the average keep, the image size, the precision.

Without another keep, image size or precision, a bundle has its own schedule and shapes. With one, the prediction is for a bundle
exported with it, and the image size has exact shapes. A released model has the exporter's default text buckets.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from trio_edge.profiling.predict.answer import Precision, Setting
from trio_edge.profiling.predict.models import find_model, model_of
from trio_edge.profiling.predict.speed import Formats
from trio_edge.runtime.bundle.errors import ScheduleError, TargetError
from trio_edge.runtime.bundle.graph_io import CLIP_TEXT, MAX_TEXT, bucket_of, num_clip_texts, text_buckets
from trio_edge.runtime.bundle.limits import MOST_TOKENS
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.runtime.devices.memory import estimate
from trio_edge.runtime.images.interface import at_form
from trio_edge.trio.cost.bundle_work import clip_text_flops, fixed_sizes, reduce_cost, vision_flops
from trio_edge.trio.cost.work import counted_work, sum_of

if TYPE_CHECKING:
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.trio.cost.work import WeightKind, Work

KEEP_ALL = "100%"
WITHOUT_STAGES = "all"
"""The keep without stages in the decoder."""
USUAL_SIZE = (672, 672)
"""Default image width and height for a released model."""


def plan_for(
    *,
    manifest: Manifest | None = None,
    model: str | None = None,
    keep: str | None = None,
    image_size: tuple[int, int] | None = None,
    image_form: str | None = None,
    precision: Precision | None = None,
    num_text: int = 40,
    num_new: int = 16,
    num_images: int | None = None,
) -> Setting:
    """Return the setting for a bundle's manifest, or for a released model by name.

    The defaults of ``keep``, ``image_size``, ``precision`` and ``num_images`` are the bundle's schedule, largest shapes,
    precision and most images; for a released model 100 %, ``USUAL_SIZE``, float16 and one image. ``image_form`` is a
    level's, for an ``image_size``.

    Raises:
        TargetError: If no released model has the name.
        ScheduleError: If a number of tokens is out of range, the model cannot keep so little, or the image has fewer tokens
            than the bundle keeps.
        ImageError: If the model cannot process images of this size.
    """
    for name, value in (("--text", num_text), ("--new-tokens", num_new)):
        if not 1 <= value <= MOST_TOKENS:
            raise ScheduleError(
                f"{name}: expected 1..{MOST_TOKENS} tokens, got {value}; choose a number in this range"
            )
    if manifest is None:
        known, keep, image_size = find_model(model or ""), keep or KEEP_ALL, image_size or USUAL_SIZE
    else:
        known = model_of(manifest)
    if image_form is not None:
        known = dataclasses.replace(known, images=at_form(known.images, image_form))
    is_own = keep is None and image_size is None and precision in (None, _precision_of(manifest))
    if num_images is None:
        num_images = 1 if manifest is None or image_size is not None else manifest.cost.num_images
    entering = None if manifest is None else manifest.token_keep
    if image_size is None:
        assert manifest is not None
        graph = manifest.graph("vision")
        sizes = {**fixed_sizes(graph), **graph.profiles[-1].sizes}
    else:
        sizes = known.images.sizes(*image_size)
        if entering is not None and sizes["N"] <= entering:
            raise ScheduleError(
                f"--image-size: expected an image of more than {entering} visual tokens, as many as the bundle keeps before"
                f" the decoder, got {sizes['N']}; choose a larger one"
            )
    num_layers, num_visual = known.decoder.num_layers, num_images * min(sizes["N"], entering or sizes["N"])
    schedule = Schedule() if manifest is None else manifest.schedule
    if keep is not None:
        # the exporter's own arithmetic, which needs no torch: predictions must have its stages
        from trio_edge.trio.budgets import ScheduleRequest, parse_keep

        average = None if keep == WITHOUT_STAGES else parse_keep(keep)
        schedule = ScheduleRequest.like(schedule, average=average, is_strict=True).schedule(
            num_layers=num_layers,
            linear_layers=known.decoder.linear_layers,
            num_visual=num_visual,
            image_tokens=num_images * _image_tokens(manifest, sizes["N"]),
        )
    schedule.check_fits(num_layers=num_layers, max_visual=num_images * (entering or sizes["N"]))
    buckets = text_buckets(MAX_TEXT) if manifest is None else manifest.text_buckets
    setting = Setting(
        model=known,
        keep=keep,
        image_size=image_size,
        schedule=schedule,
        sizes=sizes,
        num_images=num_images,
        num_text=num_text,
        text_bucket=bucket_of(num_text, buckets),
        num_new=num_new,
        formats=Formats(layer=precision or _precision_of(manifest)),
        manifest=manifest,
        entering=entering,
    )
    if manifest is None:
        return setting
    more = _from_manifest(manifest, setting)
    fits = setting.text_bucket <= buckets[-1] and num_new <= manifest.max_new_tokens
    if is_own and fits and num_images <= manifest.cost.num_images:
        weight_bytes = sum(graph.weight_bytes for graph in manifest.graphs)
        more["memory"] = estimate(manifest, manifest.graphs, weight_bytes=weight_bytes)
    return dataclasses.replace(setting, **more)


def _image_tokens(manifest: Manifest | None, num_visual: int) -> int:
    """Return the image's visual tokens before the encoder removes any; a keep is a share of these."""
    whole = None if manifest is None else manifest.cost.image_tokens
    if manifest is None or whole is None:
        return num_visual
    return round(num_visual * whole / manifest.cost.num_visual)


def _precision_of(manifest: Manifest | None) -> Precision:
    """Return the precision of the first layers; float32 counts as float16, because devices have no rates for it."""
    formats = _formats(manifest)
    return formats.get("prefix") or formats.get("segments") or "float16"


def _formats(manifest: Manifest | None) -> dict[str, Precision]:
    """Return the formats of the quantized parts."""
    if manifest is None or manifest.quantization is None:
        return {}
    return dict(manifest.quantization.formats)


def _from_manifest(manifest: Manifest, setting: Setting) -> dict[str, Any]:
    """Return the fields of ``setting`` that only a manifest tells: formats, shapes, graphs outside the decoder."""
    num_visual, formats = setting.sizes["N"], _formats(manifest)
    more: dict[str, Any] = {
        "formats": dataclasses.replace(
            setting.formats,
            head=formats.get("head", "float16"),
            vision=formats.get("vision", "float16"),
            bytes_per_cached=1 if manifest.kv_dtype == "int8" else 2,
            inputs=_rounded_inputs(manifest, setting),
            outliers=0.0 if manifest.quantization is None else manifest.quantization.outliers,
        ),
    }
    if manifest.vision is None:
        flops = vision_flops(manifest, num_visual=num_visual)
        more["vision"] = counted_work(flops, rows=num_visual)
    if manifest.token_method is not None:
        more["before"] = _before_decoder(manifest, setting)
    return more


def _before_decoder(manifest: Manifest, setting: Setting) -> tuple[tuple[str, Work], ...]:
    """Return the names and work of the graphs between vision and decoder."""
    num_visual, num_text = setting.sizes["N"], setting.text_bucket
    works: list[tuple[str, Work]] = []
    if manifest.clip_text is not None:
        length = manifest.clip_text.length
        counts = sorted(profile.sizes["M"] for profile in manifest.graph(CLIP_TEXT).profiles)
        count = bucket_of(num_clip_texts(setting.num_text, length=length), counts)
        flops = clip_text_flops(manifest, num_texts=count)
        works.append((CLIP_TEXT, counted_work(flops, rows=count * length)))
        num_text = count * (length - 2)
    cost = reduce_cost(manifest, num_visual=num_visual, num_text=num_text)
    # the greedy loop is always in float32
    again = cost.read_again * 4 / setting.formats.bytes_per_element
    reduced = sum_of([counted_work(cost.flops, rows=num_visual, other=again)] * setting.num_images)
    return (*works, ("reduce", reduced))


def _rounded_inputs(manifest: Manifest, setting: Setting) -> frozenset[WeightKind]:
    """Return the kinds of weights whose inputs are rounded too, if ``setting`` has the bundle's format for them."""
    if manifest.quantization is None:
        return frozenset()
    quantization = manifest.quantization
    kinds: dict[WeightKind, bool] = {
        "vision": "vision" in quantization.inputs,
        "head": "head" in quantization.inputs,
        "layer": any(
            part in quantization.inputs and quantization.formats.get(part) == setting.formats.layer
            for part in ("prefix", "segments", "suffix")
        ),
    }
    return frozenset(kind for kind, rounded in kinds.items() if rounded)


def parse_size(text: str) -> tuple[int, int]:
    """Return width and height written as ``672x672``.

    Raises:
        TargetError: If the text is not of that form.
    """
    match = re.fullmatch("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if match is None:
        raise TargetError(f"image-size: expected WIDTHxHEIGHT in pixels, got {text!r}; write it as 672x672")
    return int(match[1]), int(match[2])
