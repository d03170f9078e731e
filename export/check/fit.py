"""Whether a bundle fits a device's memory, estimated before any work, and which changes would make it fit.

Pure functions of plain numbers. In memory at the same time are, with the letters of ``trio.saliency``, I the
intermediate size, b bytes per element and w bytes per weight of a part (INT4 blocks: 0.30 of float16, scales and
padding included; INT8 and FP8: 1):

    decoder weights     L (2 D H E + 2 D G E + 3 D I) w
    head, vision        V D w, and the vision tower's and projector's parameters times w
    repeated weights    what stages hold again: with TRIO nothing, but of quantized weights each probed layer and once the
                        head; with other methods of a stage's layer what makes keys and queries
    KV caches           per layer 2 G E b times its rows: visual rows of its range + largest text + new tokens;
                        b is 1 for keys and values in INT8
    activations         the largest of the graphs, by ``trio/cost/memory.py``

A selection before the decoder leaves K visual rows for the first range.

Graphs run one after the other, so their activations are taken to share one buffer. Not counted: the workspace of TensorRT's
tactics, building (which takes several times an engine's weights), and the token embeddings, which stay in a mapped file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from trio_edge.export.quantize.plan import QuantizePlan, parse_plan
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.trio.budgets import combined_schedule, parse_keep
from trio_edge.trio.cost.memory import (
    Texts,
    Tiles,
    TokenSelection,
    WeightBytes,
    bundle_bytes,
    layers_and_rows,
    scratch_before,
    tiles_of,
)
from trio_edge.trio.methods import DEFAULT_METHOD
from trio_edge.trio.methods import token_method as method_row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from trio_edge.export.families.base import FamilyModel
    from trio_edge.export.graphs.layout import Layout
    from trio_edge.export.quantize.numerics import Format
    from trio_edge.runtime.bundle.manifest import Dimensions
    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.trio.cost.devices import DeviceSpec

INT4_SHARE = 0.30
"""Bytes of 4-bit blocks over those of the same weights in float16: 4.125 / 16 with scales, and some padding."""
SMALL_TEXT = 64
"""Text tokens, and new tokens, of the remedy that shortens the text."""
USUAL_KEEP = "11.1%"
"""Average keep of the remedy that reduces tokens."""
SMALL_PICTURE = (336, 336)
"""Width and height of the remedy with a smaller camera."""
_INT4 = "all=int4"


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """The largest picture that a bundle has shapes for."""

    num_visual: int
    """N, rows of the visual span."""
    tiles: Tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class FitInputs:
    """Numbers that the memory of a bundle follows from."""

    decoder: Dimensions
    element_bytes: int = 2
    """b, of all weights, activations and KV caches that are not quantized."""
    vision_params: int
    """Parameters of the vision tower and the projector, and of CLIP's text tower where there is one."""
    picture: Picture
    most_visual: int = 0
    """Visual tokens of the largest prompt with several pictures that enter the decoder; 0 where there is one picture."""
    schedule: Schedule
    max_text: int
    """Largest prompt in text tokens."""
    max_new_tokens: int
    quantize: QuantizePlan = field(default_factory=QuantizePlan)
    """Formats of the weights."""
    small_picture: Picture | None = None
    """A picture of ``SMALL_PICTURE``, where it is smaller than ``picture``."""
    token_selection: TokenSelection | None = None
    """Before the decoder."""
    texts: Texts | None = None
    """Texts of CLIP's text tower, where there is one."""

    @property
    def entering(self) -> int:
        """Visual rows of the first layer range."""
        one = self.picture.num_visual if self.token_selection is None else self.token_selection.num_keep
        return max(one, self.most_visual)

    @property
    def layers_and_rows(self) -> tuple[tuple[int, int], ...]:
        """Number of layers and visual rows of every layer range."""
        return layers_and_rows(self.schedule, num_layers=self.decoder.num_layers, entering=self.entering)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Bytes that must be in memory at once, against those that a device has."""

    parts: dict[str, int]
    """Bytes per category."""
    usable_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all categories."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether they are no more than the device has."""
        return self.total_bytes <= self.usable_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """A change and what it would come to."""

    label: str
    fit: Fit


def estimate(inputs: FitInputs, *, usable_bytes: int) -> Fit:
    """Return the bytes of every category against ``usable_bytes``; the formulas are this module's head."""
    plan, size, before = inputs.quantize, inputs.element_bytes, 0
    per_weight: dict[Format, float] = {"none": size, "int4": 2 * INT4_SHARE, "int8": 1.0, "fp8": 1.0}
    if inputs.token_selection is not None:
        rows = inputs.picture.num_visual
        before = scratch_before(inputs.token_selection, inputs.texts, num_visual=rows, element_bytes=size)
    formats = plan.of_layers(inputs.schedule, num_layers=inputs.decoder.num_layers)
    found = bundle_bytes(
        inputs.decoder,
        inputs.schedule,
        WeightBytes(
            layers=[per_weight[kind] for kind in formats],
            head=per_weight[plan.of_part("head")],
            vision=per_weight[plan.of_part("vision")],
            select=per_weight[plan.of_part("select")],
        ),
        vision_params=inputs.vision_params,
        ranges=inputs.layers_and_rows,
        text_rows=inputs.max_text,
        new_rows=inputs.max_new_tokens,
        bytes_per_cached=1 if plan.has_cache else size,
        tiles=inputs.picture.tiles,
        before=before,
        element_bytes=size,
    )
    parts = {
        "decoder weights": round(found.layers),
        "head and vision weights": round(found.head_and_vision),
        "repeated weights": round(found.repeated),
        "KV caches": found.kv_caches,
        "activations": found.activations,
    }
    return Fit(parts=parts, usable_bytes=usable_bytes)


def remedies(inputs: FitInputs, *, usable_bytes: int) -> list[Remedy]:
    """Return what each change, and then all up to each, would come to; changes that change nothing are left out."""
    alone, together = [], []
    current, labels = inputs, list[str]()
    for label, change in _CHANGES:
        changed, changed_too = change(inputs), change(current)
        if changed is not None:
            alone.append(Remedy(label=label, fit=estimate(changed, usable_bytes=usable_bytes)))
        if changed_too is None:
            continue
        current, labels = changed_too, [*labels, label]
        if len(labels) > 1:
            fit = estimate(current, usable_bytes=usable_bytes)
            together.append(Remedy(label=" + ".join(labels), fit=fit))
    return alone + together


def check_fit(inputs: FitInputs, target: DeviceSpec) -> str | None:
    """Return one line that says why the bundle cannot fit ``target`` and what would; None if it fits."""
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
    """Return the single changes that fit; if there is none the first combination that does, beside the best single one."""
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


def _cached_visual_rows(inputs: FitInputs) -> int:
    return sum(layers * rows for layers, rows in inputs.layers_and_rows)


def _with_float16(inputs: FitInputs) -> FitInputs | None:
    return None if inputs.element_bytes <= 2 else dataclasses.replace(inputs, element_bytes=2)


def _with_int4(inputs: FitInputs) -> FitInputs | None:
    plan = parse_plan(_INT4)
    changed = QuantizePlan(formats={**inputs.quantize.formats, **plan.formats})
    return None if changed == inputs.quantize else dataclasses.replace(inputs, quantize=changed)


def _with_keep(inputs: FitInputs) -> FitInputs | None:
    try:
        wished = combined_schedule(
            DEFAULT_METHOD,
            parse_keep(USUAL_KEEP),
            num_layers=inputs.decoder.num_layers,
            picture_tokens=max(inputs.picture.num_visual, inputs.most_visual),
            entering=inputs.entering,
        )
    except ScheduleError:
        return None  # too few layers or tokens for it
    changed = dataclasses.replace(inputs, schedule=wished)
    return changed if _cached_visual_rows(changed) < _cached_visual_rows(inputs) else None


def _with_small_picture(inputs: FitInputs) -> FitInputs | None:
    if inputs.small_picture is None:
        return None
    picture, selection = inputs.small_picture, inputs.token_selection
    if selection is not None and picture.num_visual <= selection.num_keep:
        return None
    share = picture.num_visual / inputs.picture.num_visual
    try:
        stages = tuple(
            Stage(layer=stage.layer, keep=max(1, round(stage.keep * share)))
            for stage in inputs.schedule.stages
        )
        schedule = msgspec.structs.replace(inputs.schedule, stages=stages)
    except ScheduleError:
        return None  # so few tokens that two stages would keep the same number
    return dataclasses.replace(inputs, picture=picture, schedule=schedule, small_picture=None)


def _with_short_text(inputs: FitInputs) -> FitInputs | None:
    text, new = min(inputs.max_text, SMALL_TEXT), min(inputs.max_new_tokens, SMALL_TEXT)
    if (text, new) == (inputs.max_text, inputs.max_new_tokens):
        return None
    return dataclasses.replace(inputs, max_text=text, max_new_tokens=new)


_CHANGES: tuple[tuple[str, Callable[[FitInputs], FitInputs | None]], ...] = (
    ("--dtype float16", _with_float16),
    (f"--quantize {_INT4}", _with_int4),
    (f"--keep {USUAL_KEEP}", _with_keep),
    ("--image-size {}x{} --only-image-sizes".format(*SMALL_PICTURE), _with_small_picture),
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
    text_tower: nn.Module | None = None,
    texts: Texts | None = None,
) -> FitInputs:
    """Return the numbers of a model that is about to be exported; reads no weight. ``texts`` are what ``text_tower`` runs on."""
    towers = [model.vision.module] if text_tower is None else [model.vision.module, text_tower]
    largest = max(layout.vision_sizes, key=lambda sizes: (sizes["N"], *sizes.values()))
    tower = model.vision_dimensions
    picture = Picture(num_visual=largest["N"], tiles=tiles_of(tower, largest))
    selection = None
    if token_method is not None and layout.token_keep is not None:
        by_features = method_row(token_method).compares == "features"
        width = tower.hidden_size if by_features else dimensions.hidden_size
        selection = TokenSelection(token_method, layout.token_keep, width)
    sizes = processing.sizes(*SMALL_PICTURE)
    small = Picture(num_visual=sizes["N"], tiles=tiles_of(tower, sizes))
    return FitInputs(
        decoder=dimensions,
        element_bytes=2 if layout.dtype == "float16" else 4,
        vision_params=sum(parameter.numel() for module in towers for parameter in module.parameters()),
        quantize=quantize,
        picture=picture,
        most_visual=layout.visual_sizes[-1] if layout.max_images > 1 else 0,
        schedule=layout.schedule,
        max_text=layout.text_buckets[-1],
        max_new_tokens=layout.max_new_tokens,
        small_picture=small if small.num_visual < picture.num_visual else None,
        token_selection=selection,
        texts=texts,
    )
