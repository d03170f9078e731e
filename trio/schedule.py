"""Schedules from presets, from text and from a wished average keep.

The *average keep* is the mean over all decoder layers of the visual tokens that a layer processes, as a
fraction of those that the picture has.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trio_edge.runtime.errors import ScheduleError
from trio_edge.runtime.schedule import Schedule, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_TOPK = 3839
"""The most tokens that a stage can keep: TensorRT's TopK is documented to take K up to 3840, or less than it."""

_SHAPE_LAYERS = (1, 10, 15)
_SHAPE_KEEPS = (460, 270, 110)
_SHAPE_NUM_LAYERS = 32
PRINTED = 0.0005
"""Half of the last digit of a percentage printed with one decimal: 11.1 % means 64 of 576."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A schedule that is published for one model, or derived from one that is."""

    name: str
    """As wished on a command line: ``11.1%``."""
    stages: tuple[tuple[int, int], ...]
    """(layer, visual tokens kept)."""
    num_layers: int
    num_visual: int
    """Visual tokens of a picture before any reduction."""
    source: str
    """"reference", "reference benchmark script", "continued linearly" or "derived"."""
    encoder_keep: int | None = None
    """Visual tokens per tile that an encoder-side selector passes on; None without one."""

    def schedule(self, **settings: Any) -> Schedule:
        """Return the preset with ``Schedule``'s other fields set."""
        return _schedule(self.stages, settings)

    @property
    def average_keep(self) -> float:
        """Mean over layers of the visual tokens processed, as a fraction of ``num_visual``."""
        entering = self.num_visual if self.encoder_keep is None else self.encoder_keep
        schedule = self.schedule()
        return (
            schedule.average_keep(num_layers=self.num_layers, num_visual=entering)
            * entering
            / self.num_visual
        )


def _llava(
    name: str, *stages: tuple[int, int], num_visual: int, source: str, encoder_keep: int | None = None
) -> Preset:
    return Preset(
        name=name,
        stages=stages,
        num_layers=32,
        num_visual=num_visual,
        source=source,
        encoder_keep=encoder_keep,
    )


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
"""By model key, most reduced first. ``llava-1.5-7b-encoder`` goes with the encoder-side selector."""


def preset_schedule(model: str, keep: str, **settings: Any) -> Schedule:
    """Return the preset ``keep`` (for example ``11.1%``) of ``model``.

    Raises:
        ScheduleError: If there is no such model key or budget; the message names those that there are.
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
    """Return the schedule written as ``layer:kept`` pairs, for instance ``1:460,10:270,15:110``.

    ``settings`` are ``Schedule``'s other fields.

    Raises:
        ScheduleError: If the text is not of that form, the stages are not in order, or one keeps more than ``MAX_TOPK``.
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
        ScheduleError: If the text is no number, or not in (0, 1].
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
    """Return the stage layers for a decoder of ``num_layers``: the preset's 1, 10, 15 of 32 in proportion.

    Each is rounded to the nearest layer, is at least 1 and lies behind the one before it; layers past the end
    are left out, so a decoder of 3 layers has two stages, one of 2 layers has one, and one of a single layer
    has none.
    """
    layers: list[int] = []
    for layer in _SHAPE_LAYERS:
        scaled = math.floor(layer * num_layers / _SHAPE_NUM_LAYERS + 0.5)
        layers.append(max(scaled, layers[-1] + 1 if layers else 1))
    return tuple(layer for layer in layers if layer < num_layers)


def schedule_for_keep(
    average: float, *, num_layers: int, num_visual: int, layers: Sequence[int] | None = None, **settings: Any
) -> Schedule:
    """Return a schedule whose average keep is as near to ``average`` as integers allow, never above.

    Where number of layers and of visual tokens are a preset's and ``average`` is its budget as printed (11.1
    % stands for 64 of 576), the preset itself is returned. Otherwise the stages keep tokens in the proportion
    460 : 270 : 110; where that would keep more than there are, later stages keep more instead, and a stage
    that would keep everything is left out. With too few tokens or layers for three stages there are two, or
    one.

    Args:
        average: Wished average keep, in (0, 1]; 1 gives a schedule without stages.
        num_layers: L, decoder layers.
        num_visual: N, visual tokens of the picture.
        layers: Stage layers, ascending; by default ``default_stage_layers``.
        settings: ``Schedule``'s other fields.

    Raises:
        ScheduleError: If the layers before the first stage alone exceed the wished average, or a stage would
            keep more than ``MAX_TOPK``.
    """
    if not 0.0 < average <= 1.0:
        raise ScheduleError(
            f"keep {average}: expected a fraction in (0, 1], got {average}; write it as 11.1% or 0.111"
        )
    if average == 1.0:
        return _schedule((), settings)
    if layers is None:
        for presets in PRESETS.values():
            for preset in presets:
                fits = (preset.num_layers, preset.num_visual, preset.encoder_keep) == (
                    num_layers,
                    num_visual,
                    None,
                )
                if fits and abs(preset.average_keep - average) < PRINTED:
                    return preset.schedule(**settings)
        layers = default_stage_layers(num_layers)
    _check_layers(layers, num_layers=num_layers)
    budget = math.floor(average * num_layers * num_visual + 1e-6)
    for count in range(len(layers), 0, -1):
        chosen = tuple(layers[:count])
        keeps = _keeps(budget, layers=chosen, num_layers=num_layers, num_visual=num_visual)
        if keeps is not None:
            stages = [(layer, keep) for layer, keep in zip(chosen, keeps) if keep < num_visual]
            _check_topk(stages)
            return _schedule(stages, settings)
    first = layers[0] if layers else num_layers
    least = (first * num_visual + num_layers - first) / (num_layers * num_visual)
    raise ScheduleError(
        f"keep {average:.1%}: expected an average of at least {math.ceil(least * 1000) / 10:.1f}% (layers 0..{first - 1} of"
        f" {num_layers} see all {num_visual} visual tokens), got {average:.1%}; keep more"
    )


def _schedule(stages: Sequence[tuple[int, int]], settings: dict[str, Any]) -> Schedule:
    return Schedule(stages=tuple(Stage(layer=layer, keep=keep) for layer, keep in stages), **settings)


def _check_layers(layers: Sequence[int], *, num_layers: int) -> None:
    ascending = all(earlier < later for earlier, later in zip(layers, layers[1:]))
    if layers and not (ascending and layers[0] >= 1 and layers[-1] < num_layers):
        raise ScheduleError(
            f"stage layers: expected ascending layers in 1..{num_layers - 1}, got {', '.join(map(str, layers))};"
            f" choose layers of the decoder"
        )


def _check_topk(stages: Sequence[tuple[int, int]]) -> None:
    for layer, keep in stages:
        if keep > MAX_TOPK:
            raise ScheduleError(
                f"stage at layer {layer}: expected to keep <= {MAX_TOPK} tokens (TensorRT's TopK), got {keep}; keep fewer"
            )


def _keeps(
    budget: int, *, layers: tuple[int, ...], num_layers: int, num_visual: int
) -> tuple[int, ...] | None:
    """Return strictly decreasing keeps that use the budget as fully as they can; None if there are none."""
    weights = [end - start for start, end in zip(layers, (*layers[1:], num_layers))]
    budget -= layers[0] * num_visual
    least = sum(weight * (len(weights) - index) for index, weight in enumerate(weights))
    if budget < least or num_visual < len(weights):
        return None
    return integer_keeps(
        _real_keeps(budget, weights=weights, num_visual=num_visual),
        budget=budget,
        weights=weights,
        num_visual=num_visual,
    )


def integer_keeps(
    real_keeps: Sequence[float], *, budget: int, weights: Sequence[int], num_visual: int
) -> tuple[int, ...] | None:
    """Return strictly decreasing keeps near ``real_keeps`` that leave the least of the budget; None if there are none.

    Args:
        real_keeps: Wished visual tokens of each stage.
        budget: Sum over the layers behind the first stage of the visual tokens that they may process.
        weights: Layers that each stage's tokens go through.
        num_visual: N.
    """
    keeps = [math.floor(keep) for keep in real_keeps]
    for index in range(len(keeps) - 1, -1, -1):  # strictly decreasing, at least 1
        keeps[index] = min(
            max(keeps[index], keeps[index + 1] + 1 if index + 1 < len(keeps) else 1), num_visual - index
        )
    for index in range(
        len(keeps)
    ):  # raising small keeps may have overdrawn the budget: take it from the largest
        floor = len(keeps) - index
        while sum(w * k for w, k in zip(weights, keeps)) > budget and keeps[index] > floor:
            if index + 1 < len(keeps) and keeps[index] == keeps[index + 1] + 1:
                break
            keeps[index] -= 1
    return _spend_rest(budget, weights=weights, keeps=keeps, num_visual=num_visual)


def _real_keeps(budget: int, *, weights: Sequence[int], num_visual: int) -> list[float]:
    """Return real-valued keeps of the preset's shape; past its largest size, between that and keeping all."""
    count = len(weights)
    if count == len(_SHAPE_KEEPS):
        shape: list[float] = [float(keep) for keep in _SHAPE_KEEPS]
    else:  # geometric between the same ends
        ratio = _SHAPE_KEEPS[-1] / _SHAPE_KEEPS[0]
        shape = [_SHAPE_KEEPS[0] * ratio ** (index / max(count - 1, 1)) for index in range(count)]
    unit = sum(weight * keep for weight, keep in zip(weights, shape))
    largest = [keep * num_visual / shape[0] for keep in shape]
    most = sum(weight * keep for weight, keep in zip(weights, largest))
    if budget <= most:
        return [keep * budget / unit for keep in shape]
    share = (budget - most) / (num_visual * sum(weights) - most)
    return [keep + share * (num_visual - keep) for keep in largest]


def _spend_rest(
    budget: int, *, weights: Sequence[int], keeps: list[int], num_visual: int
) -> tuple[int, ...] | None:
    """Return keeps near ``keeps`` that leave the least of the budget, and of those the nearest."""
    candidates: list[tuple[int, ...]] = [()]
    reach = [max(weights) if index < 2 else 0 for index in range(len(keeps) - 1)]
    for keep, distance in zip(keeps, reach):
        steps = range(-distance, distance + 1)
        candidates = [(*head, keep + step) for head in candidates for step in steps]
    best: tuple[tuple[int, int], tuple[int, ...]] | None = None
    for head in candidates:
        rest = budget - sum(weight * keep for weight, keep in zip(weights, head))
        last = min(rest // weights[-1], (head[-1] - 1) if head else num_visual)
        full = (*head, last)
        if last < 1 or full[0] > num_visual or any(a <= b for a, b in zip(full, full[1:])):
            continue
        cost = (rest - last * weights[-1], sum(abs(a - b) for a, b in zip(full, keeps)))
        if best is None or cost < best[0]:
            best = (cost, full)
    return None if best is None else best[1]
