"""Estimates before an export whether the bundle fits a device's memory, and which changes would make it fit.

Pure functions of numbers. The following is in memory at the same time, by ``trio/cost/memory.py``. Letters as in
``trio.saliency``; I intermediate size, b bytes per element, w bytes per weight of a part (INT4: 0.30 of float16, scales and
padding included; INT8, FP8: 1):

    decoder weights     L (2 D H E + 2 D G E + 3 D I) w
    head, vision        V D w, and the parameters of vision tower and projector times w
    repeated weights    weights that stages hold a second time: with TRIO those of a quantized layer's keys, values and output;
                        with other methods those of a layer's keys and queries
    KV caches           per layer 2 G E b times its rows: visual rows of its range + largest text + new tokens;
                        b is 1 for INT8 caches
    buffers             inputs, results and new KV rows of the layer ranges, visual tokens, and pixels
    workspace           the largest graph's activations without fused attention. The runtime and ``trio-profile --predict`` count
                        fused attention; which kernels TensorRT will choose is not known here

A selector before the decoder leaves K visual rows for the first range. Not counted: the workspace of TensorRT's tactics,
building (several times an engine's weights), and the token embeddings, which stay in a mapped file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from trio_edge.export.quantize.plan import QuantizePlan, parse_plan
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.trio.budgets import USUAL_KEEP, ScheduleRequest, parse_keep
from trio_edge.trio.cost import memory
from trio_edge.trio.methods import token_method as method_row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from trio_edge.export.families.base import FamilyModel
    from trio_edge.export.families.clip import ClipGraphs
    from trio_edge.export.plan import Layout
    from trio_edge.export.quantize.plan import Format
    from trio_edge.runtime.bundle.manifest import Dimensions
    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.trio.cost.devices import DeviceSpec

INT4_SHARE = 0.30
"""Bytes of INT4 weights as a share of float16: 4.125 / 16 with scales, and some padding."""
SMALL_TEXT = 64
"""--max-text and --max-new-tokens of the remedy with a shorter text."""
SMALL_IMAGE = (336, 336)
_INT4 = "all=int4"


@dataclass(frozen=True, kw_only=True, slots=True)
class FitImage:
    """The largest image that a bundle has shapes for."""

    num_visual: int
    """N, rows of the visual span."""
    tiles: memory.Tiles
    pixel_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FitInputs:
    """Numbers that determine a bundle's memory."""

    decoder: Dimensions
    element_bytes: int = 2
    """b of weights, activations and KV caches that are not quantized."""
    vision_params: int
    """Parameters of the vision tower and the projector, and of CLIP's text tower, if there is one."""
    image: FitImage
    most_visual: int = 0
    """Visual tokens that enter the decoder, in the largest prompt with several images; 0 if prompts have one image."""
    schedule: Schedule
    max_text: int
    """Largest prompt in text tokens."""
    max_new_tokens: int
    quantize: QuantizePlan = field(default_factory=QuantizePlan)
    small_image: FitImage | None = None
    """An image of ``SMALL_IMAGE``, if that is smaller than ``image``."""
    token_selection: memory.TokenSelection | None = None
    texts: memory.Texts | None = None
    """Texts of CLIP's text tower, if there is one."""

    @property
    def entering(self) -> int:
        """Visual rows of the first layer range."""
        one = self.image.num_visual if self.token_selection is None else self.token_selection.num_keep
        return max(one, self.most_visual)

    @property
    def layers_and_rows(self) -> tuple[tuple[range, int], ...]:
        """Layers and visual rows of every layer range."""
        return memory.layers_and_rows(
            self.schedule, num_layers=self.decoder.num_layers, entering=self.entering
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Bytes needed in memory at once, and bytes that a device has."""

    parts: dict[str, int]
    usable_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all categories."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the device has enough."""
        return self.total_bytes <= self.usable_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """A change of the options, and the memory with it."""

    label: str
    fit: Fit


def estimate(inputs: FitInputs, *, usable_bytes: int) -> Fit:
    """Return the bytes of every category by the formulas above, next to ``usable_bytes``."""
    plan, size, before = inputs.quantize, inputs.element_bytes, 0
    int4 = 2 * INT4_SHARE + plan.outliers * size
    per_weight: dict[Format, float] = {"none": size, "int4": int4, "int8": 1.0, "fp8": 1.0}
    if inputs.token_selection is not None:
        rows = inputs.image.num_visual
        before = memory.scratch_before(
            inputs.token_selection, inputs.texts, num_visual=rows, element_bytes=size
        )
    formats = plan.of_layers(inputs.schedule, num_layers=inputs.decoder.num_layers)
    others = (per_weight[plan.of_part(part)] for part in ("head", "vision", "select"))
    sizes = memory.BundleSizes(
        inputs.decoder,
        inputs.schedule,
        ranges=inputs.layers_and_rows,
        text_rows=inputs.max_text,
        new_rows=inputs.max_new_tokens,
        num_visual=inputs.image.num_visual + inputs.most_visual,
        pixel_bytes=inputs.image.pixel_bytes,
        bytes_per_cached=1 if plan.has_cache else size,
        element_bytes=size,
    )
    weights = memory.WeightBytes([per_weight[kind] for kind in formats], *others)
    found = memory.bundle_bytes(sizes, weights, vision_params=inputs.vision_params)
    found = found._replace(workspace=memory.unfused_bytes(sizes, inputs.image.tiles, before=before))
    of_weights = ("decoder weights", "head and vision weights", "repeated weights")
    names = (*of_weights, "KV caches", "buffers", "workspace")
    return Fit(parts=dict(zip(names, map(round, found))), usable_bytes=usable_bytes)


def remedies(inputs: FitInputs, *, usable_bytes: int) -> list[Remedy]:
    """Return the effect of each change alone, then of all changes up to each; changes without effect are left out."""
    alone, together = [], []
    current, labels = inputs, list[str]()
    for label, change in _CHANGES:
        if (changed := _changed(inputs, change)) is not None:
            alone.append(Remedy(label=label, fit=estimate(changed, usable_bytes=usable_bytes)))
        if (changed := _changed(current, change)) is not None:
            current, labels = changed, [*labels, label]
            if len(labels) > 1:
                fit = estimate(current, usable_bytes=usable_bytes)
                together.append(Remedy(label=" + ".join(labels), fit=fit))
    return alone + together


def _changed(inputs: FitInputs, change: Callable[[FitInputs], FitInputs | None]) -> FitInputs | None:
    """Return the changed inputs; None if they are the same, or the model has too few layers or tokens for the change."""
    try:
        changed = change(inputs)
    except ScheduleError:
        return None
    return None if changed == inputs else changed


def check_fit(inputs: FitInputs, target: DeviceSpec) -> str | None:
    """Return one line with the estimate and the changes that would fit ``target``; None if the bundle fits."""
    fit = estimate(inputs, usable_bytes=target.usable_bytes)
    if fit.fits:
        return None
    parts = ", ".join(f"{name} {_gib(count)}" for name, count in fit.parts.items())
    advice = _advice(remedies(inputs, usable_bytes=target.usable_bytes))
    return (
        f"--target {target.name}: expected at most {_gib(target.usable_bytes)} GiB ({_gib(target.memory_bytes)} less"
        f" {_gib(target.reserve_bytes)} for the system), got an estimate of {_gib(fit.total_bytes)} ({parts}); {advice}"
    )


def _advice(options: Sequence[Remedy]) -> str:
    """Return the single changes that fit; if none does, the best single change and the first combination that fits."""
    if not options:
        return "no option makes it smaller; choose a smaller model"
    single = [option for option in options if " + " not in option.label]
    fitting = [option for option in single if option.fit.fits]
    if fitting:
        return " or ".join(f"{option.label} would fit ({_gib(option.fit.total_bytes)})" for option in fitting)
    best = min(single, key=lambda option: option.fit.total_bytes)
    text = f"{best.label} alone would not fit ({_gib(best.fit.total_bytes)})"
    combined = next((option for option in options if option.fit.fits), None)
    if combined is not None:
        return f"{text}; {combined.label} would fit ({_gib(combined.fit.total_bytes)})"
    last = options[-1]
    if last is not best:
        text += f", nor {last.label} ({_gib(last.fit.total_bytes)})"
    return f"{text}; choose a smaller model"


def _with_float16(inputs: FitInputs) -> FitInputs:
    return dataclasses.replace(inputs, element_bytes=min(inputs.element_bytes, 2))


def _with_int4(inputs: FitInputs) -> FitInputs:
    formats = {**inputs.quantize.formats, **parse_plan(_INT4).formats}
    return dataclasses.replace(inputs, quantize=dataclasses.replace(inputs.quantize, formats=formats))


def _with_keep(inputs: FitInputs) -> FitInputs | None:
    wanted = ScheduleRequest.like(inputs.schedule, average=parse_keep(USUAL_KEEP)).schedule(
        num_layers=inputs.decoder.num_layers,
        num_visual=inputs.entering,
        linear_layers=inputs.decoder.linear_layers,
        image_tokens=max(inputs.image.num_visual, inputs.most_visual),
    )
    changed = dataclasses.replace(inputs, schedule=wanted)
    before, after = (
        sum(len(layers) * rows for layers, rows in one.layers_and_rows) for one in (inputs, changed)
    )
    return changed if after < before else None


def _with_small_image(inputs: FitInputs) -> FitInputs | None:
    image, selection = inputs.small_image, inputs.token_selection
    if image is None or (selection is not None and image.num_visual <= selection.num_keep):
        return None
    share = image.num_visual / inputs.image.num_visual
    stages = tuple(
        Stage(layer=stage.layer, keep=max(1, round(stage.keep * share))) for stage in inputs.schedule.stages
    )
    schedule = msgspec.structs.replace(inputs.schedule, stages=stages)
    return dataclasses.replace(inputs, image=image, schedule=schedule, small_image=None)


def _with_short_text(inputs: FitInputs) -> FitInputs:
    text, new = min(inputs.max_text, SMALL_TEXT), min(inputs.max_new_tokens, SMALL_TEXT)
    return dataclasses.replace(inputs, max_text=text, max_new_tokens=new)


_CHANGES: tuple[tuple[str, Callable[[FitInputs], FitInputs | None]], ...] = (
    ("--dtype float16", _with_float16),
    (f"--quantize {_INT4}", _with_int4),
    (f"--keep {USUAL_KEEP}", _with_keep),
    ("--image-size {}x{} --only-image-sizes".format(*SMALL_IMAGE), _with_small_image),
    (f"--max-text {SMALL_TEXT} --max-new-tokens {SMALL_TEXT}", _with_short_text),
)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


def fit_inputs(
    model: FamilyModel,
    dimensions: Dimensions,
    *,
    layout: Layout,
    processing: ImageProcessing,
    quantize: QuantizePlan,
    token_method: str | None = None,
    clip: ClipGraphs | None = None,
) -> FitInputs:
    """Return the numbers of a model to export, and of CLIP if a selector reads its texts, without reading weights."""
    towers: list[nn.Module] = [model.vision.module]
    texts = None
    if clip is not None:
        towers.append(clip.text)
        texts = memory.Texts(
            layout.clip_texts[-1], clip.text.position_embedding.num_embeddings, clip.projection_size
        )
    largest = max(layout.vision_sizes, key=lambda sizes: (sizes["N"], *sizes.values()))
    tower = model.vision_dimensions
    image, small = (
        FitImage(
            num_visual=sizes["N"],
            tiles=memory.tiles_of(tower, sizes),
            pixel_bytes=memory.pixel_bytes_of(processing.to_dict(), sizes),
        )
        for sizes in (largest, processing.sizes(*SMALL_IMAGE))
    )
    selection = None
    if token_method is not None and layout.token_keep is not None:
        by_features = method_row(token_method).compares == "features"
        width = tower.hidden_size if by_features else dimensions.hidden_size
        selection = memory.TokenSelection(token_method, layout.token_keep, width)
    return FitInputs(
        decoder=dimensions,
        element_bytes=2 if layout.dtype == "float16" else 4,
        vision_params=sum(parameter.numel() for module in towers for parameter in module.parameters()),
        quantize=quantize,
        image=image,
        most_visual=layout.visual_sizes[-1] if layout.max_images > 1 else 0,
        schedule=layout.schedule,
        max_text=layout.text_buckets[-1],
        max_new_tokens=layout.max_new_tokens,
        small_image=small if small.num_visual < image.num_visual else None,
        token_selection=selection,
        texts=texts,
    )
