"""Makes schedules: from a preset, from a wished average keep, or from text."""

from __future__ import annotations

import re
from typing import Any

from trio_edge.runtime.errors import ScheduleError
from trio_edge.runtime.schedule import Schedule, Stage

MAX_TOPK = 3839
"""Largest K of TensorRT's TopK, so the largest number of tokens that a stage may keep."""

PRESETS: dict[tuple[int, int], dict[float, tuple[tuple[int, int], ...]]] = {
    (32, 576): {  # LLaVA-1.5-7B
        0.111: ((1, 92), (10, 54), (15, 22)),
        0.222: ((1, 218), (10, 128), (15, 54)),
        0.333: ((1, 344), (10, 202), (15, 86)),
    },
    (32, 2880): {0.111: ((1, 460), (10, 270), (15, 110))},  # LLaVA-NeXT-7B
}
"""(decoder layers, visual tokens) -> average keep -> (layer, keep) of each stage. Source: the reference code; the third
row is its linear continuation, the LLaVA-NeXT row five times LLaVA-1.5's."""

_SHAPE_LAYERS = 32
_STAGE_LAYERS = (1, 10, 15)
_STAGE_SHAPE = (460, 270, 110)
_PRESET_TOLERANCE = 0.0006  # "11.1%" means the preset made for 1/9


def parse_schedule(text: str, **settings: Any) -> Schedule:
    """Return the schedule written as ``LAYER:KEEP,LAYER:KEEP,…``.

    Args:
        text: For instance ``1:460,10:270,15:110``.
        settings: Further fields of ``Schedule``.

    Raises:
        ScheduleError: If the text has another form or the stages are impossible.
    """
    stages = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6}):(\d{1,6})\s*", part)
        if match is None:
            raise ScheduleError(f"--schedule: expected LAYER:KEEP,…, got {part!r}; for instance 1:460,10:270,15:110")
        stages.append(Stage(layer=int(match[1]), keep=int(match[2])))
    return _checked(Schedule(stages=tuple(stages), **settings))


def parse_keep(text: str) -> float:
    """Return a fraction from ``11.1%`` or ``0.111``.

    Raises:
        ScheduleError: If it is no number in (0, 1].
    """
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,9})?|\.\d{1,9})\s*(%?)\s*", text)
    if match is None:
        raise ScheduleError(f"--keep: expected a percentage such as 11.1%, got {text!r}")
    value = float(match[1]) / (100.0 if match[2] else 1.0)
    if not 0.0 < value <= 1.0:
        raise ScheduleError(f"--keep: expected more than 0% and at most 100%, got {text!r}")
    return value


def schedule_for_keep(
    average: float, *, num_layers: int, num_visual: int, layers: tuple[int, ...] | None = None, **settings: Any
) -> Schedule:
    """Return a schedule whose average keep over all layers is as near to ``average`` as integers allow, never above.

    A known model gets its preset. Any other gets the preset's form: stage layers at 1/32, 10/32 and 15/32 of the depth,
    and keeps in the ratio 460 : 270 : 110; shallow models get fewer stages.

    Args:
        average: Wished mean of the visual tokens per layer, as a fraction of ``num_visual``.
        num_layers: Decoder layers.
        num_visual: Visual tokens that enter layer 0.
        layers: Stage layers to use instead.
        settings: Further fields of ``Schedule``.

    Raises:
        ScheduleError: If the layers before the first stage already exceed the average, or a stage would keep nothing.
    """
    if average >= 1.0:
        return Schedule(**settings)
    if layers is None:
        for known, stages in PRESETS.get((num_layers, num_visual), {}).items():
            if abs(known - average) < _PRESET_TOLERANCE:
                return Schedule(stages=tuple(Stage(layer=at, keep=keep) for at, keep in stages), **settings)
    chosen = _stage_layers(num_layers) if layers is None else layers
    if not chosen or chosen[0] >= num_layers:
        raise ScheduleError(f"--keep: expected at least 2 decoder layers, got {num_layers}; export with --keep all")
    budget = int(average * num_layers * num_visual + 1e-9) - chosen[0] * num_visual
    keeps = _keeps(budget, chosen, num_layers=num_layers, num_visual=num_visual)
    if keeps is None:
        smallest = (chosen[0] * num_visual + sum(_minimal(chosen, num_layers))) / (num_layers * num_visual)
        raise ScheduleError(
            f"--keep: expected at least {100 * smallest:.1f}% (layers before {chosen[0]} see all tokens and {num_layers}"
            f" layers is not many), got {100 * average:.1f}%; keep more"
        )
    stages = tuple(Stage(layer=at, keep=keep) for at, keep in zip(chosen, keeps))
    return _checked(Schedule(stages=stages, **settings))


def _stage_layers(num_layers: int) -> tuple[int, ...]:
    """Return the preset's stage layers scaled to the depth: at least 1, ascending, at least one layer apart."""
    layers: list[int] = []
    for at in _STAGE_LAYERS:
        layer = max(1, round(at * num_layers / _SHAPE_LAYERS))
        if layers:
            layer = max(layer, layers[-1] + 1)
        if layer < num_layers:
            layers.append(layer)
    return tuple(layers)


def _spans(layers: tuple[int, ...], num_layers: int) -> list[int]:
    """Return how many decoder layers each stage's tokens go through."""
    return [stop - start for start, stop in zip(layers, (*layers[1:], num_layers))]


def _minimal(layers: tuple[int, ...], num_layers: int) -> list[int]:
    """Return the token-layers of each stage when the last keeps one token, the one before two, and so on."""
    count = len(layers)
    return [span * (count - index) for index, span in enumerate(_spans(layers, num_layers))]


def _keeps(budget: int, layers: tuple[int, ...], *, num_layers: int, num_visual: int) -> list[int] | None:
    """Return strictly decreasing keeps whose token-layers come as near below ``budget`` as possible, or None."""
    spans, shape = _spans(layers, num_layers), _STAGE_SHAPE[: len(layers)]
    if budget < sum(_minimal(layers, num_layers)):
        return None
    scale = budget / sum(part * span for part, span in zip(shape, spans))
    count = len(layers)
    keeps = [max(count - index, int(part * scale)) for index, part in enumerate(shape)]
    keeps[0] = min(keeps[0], num_visual)
    for index in range(1, count):
        keeps[index] = min(keeps[index], keeps[index - 1] - 1)
    while sum(keep * span for keep, span in zip(keeps, spans)) > budget:  # minima pushed it over: take from the top
        index = max(range(count), key=lambda i: keeps[i] - (keeps[i + 1] if i + 1 < count else 0))
        keeps[index] -= 1
    _spend_rest(keeps, spans, budget, num_visual=num_visual)
    return keeps if keeps[-1] >= 1 else None


def _spend_rest(keeps: list[int], spans: list[int], budget: int, *, num_visual: int) -> None:
    """Give single tokens to stages, dearest first, while the budget lasts and keeps stay strictly decreasing."""
    progress = True
    while progress:
        progress = False
        for index in sorted(range(len(keeps)), key=lambda i: -spans[i]):
            left = budget - sum(keep * span for keep, span in zip(keeps, spans))
            limit = keeps[index - 1] - 1 if index else num_visual
            if spans[index] <= left and keeps[index] < limit:
                keeps[index] += 1
                progress = True
                break


def _checked(schedule: Schedule) -> Schedule:
    for stage in schedule.stages:
        if stage.keep > MAX_TOPK:
            raise ScheduleError(
                f"stage at layer {stage.layer}: expected to keep at most {MAX_TOPK} (TensorRT's TopK limit),"
                f" got {stage.keep}; keep fewer"
            )
    return schedule
