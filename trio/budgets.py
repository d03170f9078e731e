"""Schedules from a request: an average keep or stages, a method, and settings.

The *average keep* is the mean number of visual tokens that a decoder layer processes, as a fraction of the image's tokens.
Papers count differently: some give the tokens after the only stage, others count the scoring layer at its reduced length.
Here every method gets the same true budget. Layers and proportions are in ``trio_edge.trio.methods``.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.schedule import Budget, Positions, ProbeRows, Schedule, Stage
from trio_edge.trio.methods import DEFAULT_METHOD, stage_method, total

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.trio.methods import Shape

    Stages = tuple[tuple[int, int], ...]
    """Pairs of layer and visual tokens kept."""

MAX_TOPK = 3839
"""Most tokens that a stage can keep. TensorRT documents K <= 3840 for TopK in one place and K < 3840 in another."""
USUAL_KEEP = "11.1%"
"""Average keep if none is given."""
LEAST_FOR_REFERENCE_ROWS = 0.1
"""Below this average keep, "answer" probe rows lose less accuracy (measured in docs/results/selectors.md)."""
PRINTED = 0.0005
"""Rounding error of a percentage with one decimal: 11.1 % stands for 64 of 576."""
_DEPTH = 32
"""Depth of the decoder that the published stage layers belong to."""
_SETTINGS = ("probe_rows", "num_probe_rows", "nms_threshold", "nms_rounds", "positions", "budget")
"""Fields of a schedule besides its stages and method."""
PRESETS: dict[tuple[int, int], tuple[Stages, ...]] = {
    # LLaVA-1.5-7B at 11.1 %, 22.2 % and 33.3 %: two of the reference, continued linearly
    (576, 576): (
        ((1, 92), (10, 54), (15, 22)),
        ((1, 218), (10, 128), (15, 54)),
        ((1, 344), (10, 202), (15, 86)),
    ),
    # LLaVA-1.5-7B with encoder reduction, at the same keeps: one of the reference, and two of the same pattern
    (576, 96): (((16, 32),),),
    (576, 192): (((16, 64),),),
    (576, 288): (((16, 96),),),
    # LLaVA-NeXT-7B at 11.1 % and 12.0 %: derived, and that of the reference's benchmark script
    (2880, 2880): (((1, 460), (10, 270), (15, 110)), ((1, 436), (10, 255), (15, 173))),
    # LLaVA-NeXT-7B with encoder reduction at 11.1 %: five tiles of LLaVA-1.5's
    (2880, 480): (((16, 160),),),
}
"""TRIO's published schedules of decoders with 32 layers, by an image's visual tokens and those that enter the decoder."""


def parse_stages(text: str) -> Stages:
    """Return the stages written as ``LAYER:KEPT`` pairs, for example ``1:460,10:270,15:110``.

    Raises:
        ScheduleError: If the text has another form.
    """
    stages = []
    for part in text.split(","):
        layer, colon, keep = part.strip().partition(":")
        if not (colon and re.fullmatch("[0-9]{1,9}", layer) and re.fullmatch("[0-9]{1,9}", keep)):
            raise ScheduleError(
                f"schedule {text!r}: expected LAYER:KEPT pairs, got {part.strip()!r}; write it as 1:460,10:270,15:110"
            )
        stages.append((int(layer), int(keep)))
    return tuple(stages)


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
    _check_keep(value, repr(text))
    return value


def _check_keep(value: float, text: str) -> None:
    if not 0.0 < value <= 1.0:
        raise ScheduleError(
            f"keep {text}: expected a fraction in (0, 1], got {text}; write it as 11.1% or 0.111"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleRequest:
    """The wanted schedule of a model whose sizes are not known yet; None leaves a choice to ``schedule``."""

    average: float | None = parse_keep(USUAL_KEEP)
    """Average keep in (0, 1]; None for no stages."""
    stages: Stages = ()
    """Pairs of layer and visual tokens kept; if there are any, ``average`` is not read."""
    method: str = DEFAULT_METHOD
    layers: tuple[int, ...] | None = None
    """Stage layers for ``average``, ascending; None for the method's own."""
    is_strict: bool = False
    """Whether an average above what enters the decoder is an error; otherwise it gives no stages."""
    probe_rows: ProbeRows | None = None
    """None for "answer" below an average keep of ``LEAST_FOR_REFERENCE_ROWS``, else "reference"."""
    num_probe_rows: int | None = None
    nms_threshold: float | None = None
    nms_rounds: int | None = None
    positions: Positions | None = None
    """None for the rule of the method's original code, if the model supports it."""
    budget: Budget | None = None

    def __post_init__(self) -> None:
        """Raise ScheduleError for values that are wrong whatever the model is."""
        self._schedule(self.stages)
        stage_method(self.method)
        if self.average is not None:
            _check_keep(self.average, str(self.average))

    @classmethod
    def like(cls, schedule: Schedule, *, average: float | None, is_strict: bool = False) -> ScheduleRequest:
        """Return the request of another average keep with the method and all settings of ``schedule``."""
        settings = {name: getattr(schedule, name) for name in _SETTINGS}
        return cls(average=average, method=schedule.method, is_strict=is_strict, **settings)

    def schedule(
        self,
        *,
        num_layers: int,
        num_visual: int,
        linear_layers: Sequence[int] = (),
        image_tokens: int | None = None,
        positions: Sequence[Positions] = (),
    ) -> Schedule:
        """Return the schedule with the largest average keep that does not exceed the wanted one.

        For TRIO this is the preset, where one has the same sizes and printed budget (11.1 % stands for 64 of 576); after
        another reduction it is one stage at half the depth, as in the paper, if the budget allows it. Stages that would keep
        everything are left out, and so are the last ones if the budget is too small for them.

        Args:
            num_layers: L, decoder layers.
            num_visual: N, visual tokens that enter the decoder.
            linear_layers: Layers with linear attention; see ``stage_layers``.
            image_tokens: Visual tokens before any reduction, of which the average keep is a share; N by default.
            positions: Rules for position ids that the model supports, its default first; all by default.

        Raises:
            ScheduleError: If the layers before the first stage exceed the budget, a stage would keep more than ``MAX_TOPK``,
                or a stage is not inside the model.
        """
        row, whole = stage_method(self.method), image_tokens or num_visual
        stages, layers = self.stages, stage_layers(self.method, num_layers, linear_layers)
        if not stages and self.average is not None:
            stages = self._stages(self.average, layers, num_layers, num_visual=num_visual, whole=whole)
        schedule = self._schedule(stages)
        if self.positions is None:
            own = row.positions
            rule = own if own in (positions or [own]) else positions[0]
            schedule = msgspec.structs.replace(schedule, positions=rule)
        if self.probe_rows is None and row.has_probe and stages:
            schedule.check_fits(num_layers=num_layers, max_visual=num_visual)
            average = schedule.average_keep(num_layers=num_layers, num_visual=num_visual) * num_visual / whole
            # Whole tokens put the average of --keep 10% slightly below 10 %.
            if average + PRINTED < LEAST_FOR_REFERENCE_ROWS:
                schedule = msgspec.structs.replace(schedule, probe_rows="answer")
        return schedule

    def _schedule(self, stages: Stages) -> Schedule:
        """Return the schedule of ``stages`` with the given settings; the others have their defaults."""
        for layer, keep in stages:
            if keep > MAX_TOPK:
                raise ScheduleError(
                    f"stage at layer {layer}: expected to keep <= {MAX_TOPK} tokens (TensorRT's TopK), got {keep}; keep fewer"
                )
        given = {name: value for name in _SETTINGS if (value := getattr(self, name)) is not None}
        made = tuple(Stage(layer=layer, keep=keep) for layer, keep in stages)
        return Schedule(stages=made, method=self.method, **given)

    def _stages(
        self, average: float, layers: Sequence[int], num_layers: int, *, num_visual: int, whole: int
    ) -> Stages:
        """Return the stages for the average keep; ``whole`` are the visual tokens before any reduction."""
        if self.is_strict and average * whole >= num_visual + 1:
            raise ScheduleError(
                f"--keep: expected at most {num_visual / whole:.1%}, which is what enters the decoder ({num_visual} of the"
                f" image's {whole} visual tokens), got {100 * average:g}%; give 'all' for no reduction in the decoder"
            )
        share = min(average * whole / num_visual, 1.0)
        # A printed keep may be slightly low: 16.7 % of 576 stands for 96 tokens.
        if share == 1.0 or (num_visual < whole and (average + PRINTED) * whole >= num_visual):
            return ()
        candidates = default_layers(self.method, layers, num_layers=num_layers)
        if self.layers is not None:
            _check_layers(self.layers, num_layers=num_layers)
            candidates = [self.layers]
        elif stage_method(self.method).has_presets:
            half = _nearest(num_layers // 2, layers or [0])
            if stages := _preset(average, layers, num_layers, whole, num_visual):
                return stages
            halfway = half * num_visual + num_layers - half
            if num_visual != whole and half >= 1 and share * num_layers * num_visual >= halfway:
                candidates = [(half,)]
            elif stages := _preset(share, layers, num_layers, num_visual, num_visual):
                return stages
        return _fitted(self.method, candidates, share, num_layers=num_layers, num_visual=num_visual)


def stage_layers(method: str, num_layers: int, linear_layers: Sequence[int] = ()) -> list[int]:
    """Return the layers that a stage of ``method`` can stand before: it reads the attention of this layer, or the one before.

    ``linear_layers`` have linear attention, which no method reads.
    """
    before = 1 if stage_method(method).reads_previous else 0
    return [layer for layer in range(1, num_layers) if layer - before not in linear_layers]


def check_stage_layers(schedule: Schedule, *, num_layers: int, linear_layers: Sequence[int]) -> None:
    """Raise ScheduleError if the method of ``schedule`` cannot read a layer at one of its stages; see ``stage_layers``."""
    known = stage_layers(schedule.method, num_layers, linear_layers)
    if unread := sorted({*schedule.layers} - {*known}):
        raise ScheduleError(
            f"stage at layer {unread[0]}: expected one of {', '.join(map(str, known))}, where {schedule.method} reads a layer"
            f" with full attention, got one where it is linear; choose one of these"
        )


def default_layers(
    method: str, known: Sequence[int] | None = None, *, num_layers: int
) -> list[tuple[int, ...]]:
    """Return the method's stage layers, then earlier alternatives for budgets that the first cannot meet.

    ``known`` are those of ``stage_layers``, ascending; each layer is the nearest of them. By default all are.
    """
    row = stage_method(method)
    candidates = (layers if row.at_any_depth else _scaled(layers, num_layers) for layers in row.layers)
    inside = (tuple(layer for layer in layers if layer < num_layers) for layers in candidates)
    if known is not None:
        inside = (
            tuple(dict.fromkeys(_nearest(layer, known) for layer in layers)) for layers in inside if known
        )
    return list(dict.fromkeys(layers for layers in inside if layers))


def _nearest(layer: int, known: Sequence[int]) -> int:
    return min(known, key=lambda other: abs(other - layer))


def _scaled(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Return ``layers`` scaled to the decoder's depth, strictly ascending from 1 on."""
    result: list[int] = []
    for layer in layers:
        nearest = math.floor(layer * num_layers / _DEPTH + 0.5)
        result.append(max(nearest, result[-1] + 1 if result else 1))
    return tuple(result)


def _check_layers(layers: Sequence[int], *, num_layers: int) -> None:
    ascending = all(earlier < later for earlier, later in zip(layers, layers[1:]))
    if not (layers and ascending and layers[0] >= 1 and layers[-1] < num_layers):
        raise ScheduleError(
            f"stage layers: expected ascending layers in 1..{num_layers - 1}, got {', '.join(map(str, layers)) or 'none'};"
            f" choose layers of the decoder"
        )


def _preset(average: float, layers: Sequence[int], num_layers: int, whole: int, entering: int) -> Stages:
    """Return the preset of this average keep, or no stages; ``layers`` are those that a stage can stand before."""
    for stages in PRESETS.get((whole, entering), ()) if num_layers == _DEPTH else ():
        if not {layer for layer, _ in stages} <= {*layers}:
            continue
        ends = [*(layer for layer, _ in stages[1:]), num_layers]
        spent = stages[0][0] * entering + sum((end - at) * keep for (at, keep), end in zip(stages, ends))
        if abs(spent / (num_layers * whole) - average) < PRINTED:
            return stages
    return ()


def _fitted(
    method: str, candidates: Sequence[tuple[int, ...]], share: float, *, num_layers: int, num_visual: int
) -> Stages:
    """Return layer and keep of each stage, for the first of ``candidates`` that can meet the budget."""
    shape: Shape = stage_method(method).shape
    # The 1e-6 keeps rounding from taking a token off a budget that is a whole number.
    budget = math.floor(share * num_layers * num_visual + 1e-6)
    last = candidates[-1] if candidates else ()
    for layers in [*candidates, *(last[:count] for count in range(len(last) - 1, 0, -1))]:
        weights = [end - start for start, end in zip(layers, (*layers[1:], num_layers))]
        rest = budget - layers[0] * num_visual
        wanted = shape(rest, weights, num_visual, layers[0] == last[0]) if rest > 0 else None
        keeps = wanted and integer_keeps(wanted, budget=rest, weights=weights, num_visual=num_visual)
        if keeps:
            return tuple((layer, keep) for layer, keep in zip(layers, keeps) if keep < num_visual)
    raise _too_small(share, method, last[0] if last else num_layers, num_layers, num_visual)


def _too_small(share: float, method: str, first: int, num_layers: int, num_visual: int) -> ScheduleError:
    """Return the error for a budget that the layers before the ``first`` stage exceed."""
    least = (first * num_visual + num_layers - first) / (num_layers * num_visual)
    return ScheduleError(
        f"keep {share:.1%}: expected an average of at least {math.ceil(least * 1000) / 10:.1f}% for {method} (the first {first}"
        f" of {num_layers} layers see all {num_visual} visual tokens), got {share:.1%}; keep more"
    )


def integer_keeps(
    real_keeps: Sequence[float], *, budget: int, weights: Sequence[int], num_visual: int
) -> tuple[int, ...] | None:
    """Return strictly decreasing keeps near ``real_keeps`` that spend most of ``budget``; None if there are none.

    ``budget`` is the ``rest`` of ``methods.Shape``, and ``weights`` are its weights.
    """
    least = sum(weight * (len(weights) - index) for index, weight in enumerate(weights))
    if budget < least or num_visual < len(weights):
        return None
    keeps = [math.floor(keep) for keep in real_keeps]
    for index in range(len(keeps) - 1, -1, -1):  # strictly decreasing, at least 1
        low = keeps[index + 1] + 1 if index + 1 < len(keeps) else 1
        keeps[index] = min(max(keeps[index], low), num_visual - index)
    # Raising small keeps may have exceeded the budget: lower the largest ones.
    for index in range(len(keeps)):
        floor = len(keeps) - index
        while total(weights, keeps) > budget and keeps[index] > floor:
            if index + 1 < len(keeps) and keeps[index] == keeps[index + 1] + 1:
                break
            keeps[index] -= 1
    return _spend_rest(budget, weights=weights, keeps=keeps, num_visual=num_visual)


def _spend_rest(
    budget: int, *, weights: Sequence[int], keeps: list[int], num_visual: int
) -> tuple[int, ...] | None:
    """Return the keeps near ``keeps`` that leave least of the budget; of equals, the nearest."""
    # Varying two stages within the largest weight reaches every remainder; varying more only costs time.
    reach = [max(weights) if index < 2 else 0 for index in range(len(keeps) - 1)]
    heads = itertools.product(*(range(keep - far, keep + far + 1) for keep, far in zip(keeps, reach)))
    best: tuple[tuple[int, int], tuple[int, ...] | None] = (budget + 1, 0), None
    for head in heads:
        rest = budget - total(weights, head)
        full = (*head, min(rest // weights[-1], (head[-1] - 1) if head else num_visual))
        if full[-1] >= 1 and full[0] <= num_visual and all(a > b for a, b in zip(full, full[1:])):
            cost = (budget - total(weights, full), sum(abs(a - b) for a, b in zip(full, keeps)))
            best = min(best, (cost, full), key=lambda found: found[0])
    return best[1]
