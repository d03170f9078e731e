"""Schedules from presets, from text and from a wanted average keep.

The *average keep* is the mean number of visual tokens that a decoder layer processes, as a fraction of the image's tokens.
Papers count differently: some give the tokens after the only stage, others count the scoring layer at its reduced length.
Here every method gets the same true budget. Layers and proportions are in ``trio_edge.trio.methods`` and
``trio_edge.trio.keeps``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.trio.keeps import integer_keeps
from trio_edge.trio.methods import DEFAULT_METHOD, stage_method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.bundle.schedule import Positions

MAX_TOPK = 3839
"""Most tokens that a stage can keep. TensorRT documents K <= 3840 for TopK in one place and K < 3840 in another."""
_DEPTH = 32
"""Depth of the decoder that the published stage layers belong to."""
LEAST_FOR_REFERENCE_ROWS = 0.1
"""Below this average keep, "answer" probe rows lose less accuracy (measured in docs/results/selector-choices.md)."""
PRINTED = 0.0005
"""Rounding error of a percentage with one decimal: 11.1 % stands for 64 of 576."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published schedule of one model, or one derived from it."""

    name: str
    """Its keep as given on a command line, for example ``11.1%``."""
    stages: tuple[tuple[int, int], ...]
    """Pairs of layer and visual tokens kept."""
    num_layers: int
    num_visual: int
    """Visual tokens of an image before any reduction."""
    source: str
    """"reference", "reference benchmark script", "continued linearly" or "derived"."""
    encoder_keep: int | None = None
    """Visual tokens per tile after encoder reduction; None without it."""

    def schedule(self, **settings: Any) -> Schedule:
        """Return the schedule; ``settings`` are its other fields."""
        return _schedule(self.stages, settings)

    @property
    def average_keep(self) -> float:
        """Mean over layers of the visual tokens processed, as a fraction of ``num_visual``."""
        entering = self.num_visual if self.encoder_keep is None else self.encoder_keep
        share = self.schedule().average_keep(num_layers=self.num_layers, num_visual=entering)
        return share * entering / self.num_visual


def _llava(name: str, *stages: tuple[int, int], **fields: Any) -> Preset:
    return Preset(name=name, stages=stages, num_layers=32, **fields)


PRESETS: dict[str, tuple[Preset, ...]] = {
    "llava-1.5-7b": (
        _llava("11.1%", (1, 92), (10, 54), (15, 22), num_visual=576, source="reference"),
        _llava("22.2%", (1, 218), (10, 128), (15, 54), num_visual=576, source="reference"),
        _llava("33.3%", (1, 344), (10, 202), (15, 86), num_visual=576, source="continued linearly"),
    ),
    "llava-1.5-7b-encoder": (
        _llava("11.1%", (16, 32), num_visual=576, source="reference", encoder_keep=96),
        _llava("22.2%", (16, 64), num_visual=576, source="same pattern", encoder_keep=192),
        _llava("33.3%", (16, 96), num_visual=576, source="same pattern", encoder_keep=288),
    ),
    "llava-next-7b": (
        _llava("11.1%", (1, 460), (10, 270), (15, 110), num_visual=2880, source="derived"),
        _llava("12.0%", (1, 436), (10, 255), (15, 173), num_visual=2880, source="reference benchmark script"),
    ),
}
"""Presets by model, most reduced first. ``llava-1.5-7b-encoder`` is for encoder reduction."""


def preset_schedule(model: str, keep: str, **settings: Any) -> Schedule:
    """Return the preset ``keep`` (for example ``11.1%``) of ``model``.

    Raises:
        ScheduleError: If there is no such model or keep; the message lists the known ones.
    """
    if model not in PRESETS:
        raise ScheduleError(
            f"preset: expected one of {', '.join(PRESETS)}, got {model!r}; or give a schedule"
        )
    for preset in PRESETS[model]:
        if abs(parse_keep(preset.name) - parse_keep(keep)) < PRINTED:
            return preset.schedule(**settings)
    names = ", ".join(preset.name for preset in PRESETS[model])
    raise ScheduleError(f"preset of {model}: expected one of {names}, got {keep!r}; or give a schedule")


def parse_schedule(text: str, **settings: Any) -> Schedule:
    """Return the schedule written as ``LAYER:KEPT`` pairs, for example ``1:460,10:270,15:110``.

    ``settings`` are ``Schedule``'s other fields.

    Raises:
        ScheduleError: If the text has another form, stages are out of order, or one keeps more than ``MAX_TOPK``.
    """
    stages = []
    for part in text.split(","):
        layer, colon, keep = part.strip().partition(":")
        if not (colon and re.fullmatch("[0-9]{1,9}", layer) and re.fullmatch("[0-9]{1,9}", keep)):
            raise ScheduleError(
                f"schedule {text!r}: expected LAYER:KEPT pairs, got {part.strip()!r}; write it as 1:460,10:270,15:110"
            )
        stages.append((int(layer), int(keep)))
    _check_topk(stages)
    return _schedule(stages, settings)


def parse_keep(text: str) -> float:
    """Return the fraction written as ``11.1%`` or ``0.111``.

    Raises:
        ScheduleError: If the text is not a number in (0, 1].
    """
    stripped = text.strip()
    try:
        value = float(stripped.removesuffix("%")) / (100 if stripped.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0.0 < value <= 1.0:
        raise ScheduleError(
            f"keep {text!r}: expected a fraction in (0, 1], got {text!r}; write it as 11.1% or 0.111"
        )
    return value


def default_stage_layers(num_layers: int) -> tuple[int, ...]:
    """Return TRIO's stage layers: the preset's 1, 10 and 15 of 32, scaled to ``num_layers``.

    Decoders of 3, 2 and 1 layers have two, one and no stage.
    """
    return next(iter(default_layers(DEFAULT_METHOD, num_layers=num_layers)), ())


def default_layers(method: str, *, num_layers: int) -> list[tuple[int, ...]]:
    """Return the method's stage layers, then earlier alternatives for budgets that the first cannot meet."""
    row = stage_method(method)
    candidates = (layers if row.at_any_depth else _scaled(layers, num_layers) for layers in row.layers)
    inside = (tuple(layer for layer in layers if layer < num_layers) for layers in candidates)
    return list(dict.fromkeys(layers for layers in inside if layers))


def _scaled(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return ``layers`` scaled to the decoder's depth, strictly ascending from 1 on."""
    result: list[int] = []
    for layer in layers:
        nearest = math.floor(layer * num_layers / _DEPTH + 0.5)
        result.append(max(nearest, result[-1] + 1 if result else 1))
    return tuple(result)


def default_positions(method: str) -> Positions:
    """Return the rule for position ids after a stage in the method's original code."""
    return stage_method(method).positions


def schedule_for_keep(average: float, **sizes_and_settings: Any) -> Schedule:
    """Return TRIO's schedule for an average keep; see ``method_schedule``."""
    return method_schedule(DEFAULT_METHOD, average, **sizes_and_settings)


def method_schedule(
    method: str,
    average: float,
    *,
    num_layers: int,
    num_visual: int,
    layers: Sequence[int] | None = None,
    **settings: Any,
) -> Schedule:
    """Return the method's schedule with the largest average keep that does not exceed ``average``.

    For TRIO this is the preset, where one has the same layers, visual tokens and printed budget (11.1 % stands for 64 of
    576). Stages that would keep everything are left out, and so are the last ones if the budget is too small for them.

    Args:
        method: Key of ``STAGE_METHODS``.
        average: Wanted average keep, in (0, 1]; 1 gives a schedule without stages.
        num_layers: L, decoder layers.
        num_visual: N, visual tokens of the image.
        layers: Stage layers, ascending; by default the method's own.
        settings: ``Schedule``'s other fields; positions are the method's by default.

    Raises:
        ScheduleError: If the layers before the first stage exceed the budget, or a stage would keep more than ``MAX_TOPK``.
    """
    settings = {"method": method, "positions": default_positions(method), **settings}
    if not 0.0 < average <= 1.0:
        raise ScheduleError(
            f"keep {average}: expected a fraction in (0, 1], got {average}; write it as 11.1% or 0.111"
        )
    if average == 1.0:
        return _schedule((), settings)
    if layers is not None:
        _check_layers(layers, num_layers=num_layers)
    elif stage_method(method).has_presets:
        for preset in _presets(average, (num_layers, num_visual, None)):
            return preset.schedule(**settings)
    own = default_layers(method, num_layers=num_layers) if layers is None else [tuple(layers)]
    stages = _stages(method, own, average, num_layers=num_layers, num_visual=num_visual)
    _check_topk(stages)
    return _schedule(stages, settings)


def _presets(average: float, sizes: tuple[int, int, int | None]) -> list[Preset]:
    """Return the presets of this budget; ``sizes`` are layers, visual tokens, and those that enter the decoder."""
    return [
        preset
        for presets in PRESETS.values()
        for preset in presets
        if (preset.num_layers, preset.num_visual, preset.encoder_keep) == sizes
        and abs(preset.average_keep - average) < PRINTED
    ]


def _stages(
    method: str, candidates: Sequence[tuple[int, ...]], average: float, *, num_layers: int, num_visual: int
) -> list[tuple[int, int]]:
    """Return layer and keep of each stage, for the first of ``candidates`` that can meet the budget."""
    # The 1e-6 keeps rounding from taking a token off a budget that is a whole number.
    budget = math.floor(average * num_layers * num_visual + 1e-6)
    last = candidates[-1] if candidates else ()
    for layers in [*candidates, *(last[:count] for count in range(len(last) - 1, 0, -1))]:
        weights = [end - start for start, end in zip(layers, (*layers[1:], num_layers))]
        rest = budget - layers[0] * num_visual
        shape = stage_method(method).shape
        wanted = shape(rest, weights, num_visual, layers[0] == last[0]) if rest > 0 else None
        keeps = wanted and integer_keeps(wanted, budget=rest, weights=weights, num_visual=num_visual)
        if keeps:
            return [(layer, keep) for layer, keep in zip(layers, keeps) if keep < num_visual]
    first = last[0] if last else num_layers
    least = (first * num_visual + num_layers - first) / (num_layers * num_visual)
    whose = "" if method == DEFAULT_METHOD else f" for {method}"
    raise ScheduleError(
        f"keep {average:.1%}: expected an average of at least {math.ceil(least * 1000) / 10:.1f}%{whose} (the first {first}"
        f" of {num_layers} layers see all {num_visual} visual tokens), got {average:.1%}; keep more"
    )


def combined_schedule(
    method: str, average: float, *, num_layers: int, picture_tokens: int, entering: int, **settings: Any
) -> Schedule:
    """Return the schedule of a decoder that only ``entering`` of the image's ``picture_tokens`` visual tokens reach.

    After another reduction TRIO has one stage at half the depth, as in the paper, if the budget allows it.
    ``average`` is a share of ``picture_tokens``; the schedule has no stage if ``entering`` meets it already. Other
    arguments and errors are those of ``method_schedule``.
    """
    share = min(average * picture_tokens / entering, 1.0)
    # A printed keep may be slightly low: 16.7 % of 576 stands for 96 tokens.
    if entering < picture_tokens and (average + PRINTED) * picture_tokens >= entering:
        share = 1.0
    halfway, layers = num_layers // 2, None
    if stage_method(method).has_presets and entering != picture_tokens and share < 1.0 and halfway >= 1:
        for preset in _presets(average, (num_layers, picture_tokens, entering)):
            return preset.schedule(**settings)
        if share * num_layers * entering >= halfway * entering + num_layers - halfway:
            layers = (halfway,)
    return method_schedule(
        method, share, num_layers=num_layers, num_visual=entering, layers=layers, **settings
    )


def with_probe_rows(schedule: Schedule, *, num_layers: int, picture_tokens: int, entering: int) -> Schedule:
    """Return TRIO's schedule with the probe rows that suit its average keep; other schedules are returned as they are.

    These are "answer" rows below ``LEAST_FOR_REFERENCE_ROWS``, else "reference" rows. Arguments are those of
    ``combined_schedule``.

    Raises:
        ScheduleError: If a stage is not inside the model.
    """
    if schedule.method != DEFAULT_METHOD or not schedule.stages:
        return schedule
    schedule.check_fits(num_layers=num_layers, max_visual=entering)
    average = schedule.average_keep(num_layers=num_layers, num_visual=entering) * entering / picture_tokens
    # Whole tokens put the average of --keep 10% slightly below 10 %.
    is_small = average + PRINTED < LEAST_FOR_REFERENCE_ROWS
    return msgspec.structs.replace(schedule, probe_rows="answer" if is_small else "reference")


def check_combined_keep(text: str, *, picture_tokens: int, entering: int) -> None:
    """Raise ScheduleError if the average keep ``text`` (``11.1%``) needs more than ``entering`` of the image's tokens."""
    if parse_keep(text) * picture_tokens >= entering + 1:
        raise ScheduleError(
            f"--keep: expected at most {entering / picture_tokens:.1%}, which is what enters the decoder ({entering} of the"
            f" image's {picture_tokens} visual tokens), got {text}; give 'all' for no reduction in the decoder"
        )


def _schedule(stages: Sequence[tuple[int, int]], settings: dict[str, Any]) -> Schedule:
    return Schedule(stages=tuple(Stage(layer=layer, keep=keep) for layer, keep in stages), **settings)


def _check_layers(layers: Sequence[int], *, num_layers: int) -> None:
    ascending = all(earlier < later for earlier, later in zip(layers, layers[1:]))
    if not (layers and ascending and layers[0] >= 1 and layers[-1] < num_layers):
        raise ScheduleError(
            f"stage layers: expected ascending layers in 1..{num_layers - 1}, got {', '.join(map(str, layers)) or 'none'};"
            f" choose layers of the decoder"
        )


def _check_topk(stages: Sequence[tuple[int, int]]) -> None:
    for layer, keep in stages:
        if keep > MAX_TOPK:
            raise ScheduleError(
                f"stage at layer {layer}: expected to keep <= {MAX_TOPK} tokens (TensorRT's TopK), got {keep}; keep fewer"
            )
