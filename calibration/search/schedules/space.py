"""The space of schedules: stage layers, budgets, and the settings that stages share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import msgspec

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.trio.budgets import MAX_TOPK, ScheduleRequest, default_layers, stage_layers
from trio_edge.trio.methods import DEFAULT_METHOD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trio_edge.runtime.bundle.schedule import Positions

Stages = tuple[tuple[int, int], ...]
"""(layer, keep) of each stage."""

SETTING_KEEPS = (0.08, 0.111, 0.18)
"""Average keeps at which settings are compared."""
MAX_LAYERS = 16
"""Most candidate layers unless the user names them."""
_STEP = 1.25
"""Ratio of neighbouring budgets when a front is refined."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """The stages that a search may use."""

    num_layers: int
    num_visual: int
    layers: tuple[int, ...]
    """Candidate layers, ascending."""
    keeps: tuple[int, ...]
    """Candidate numbers of kept visual tokens, descending."""
    max_stages: int
    only_these_layers: bool = False
    """Whether the user named ``layers``, or no others have attention; otherwise refining may use those between them too."""
    linear_layers: tuple[int, ...] = ()
    """Layers with linear attention."""

    def allows(self, schedule: Schedule) -> bool:
        """Return whether the space allows the number and the layers of a schedule's stages."""
        layers = [stage.layer for stage in schedule.stages]
        return len(layers) <= self.max_stages and (
            not self.only_these_layers or set(layers) <= set(self.layers)
        )

    def stage_lists(self) -> Iterator[Stages]:
        """Yield every list of one to ``max_stages`` stages."""
        for count in range(1, self.max_stages + 1):
            for layers in combinations(self.layers, count):
                for keeps in combinations(self.keeps, count):
                    yield tuple(zip(layers, keeps))

    def average_keep(self, schedule: Schedule) -> float:
        """Return the mean over layers of the visual tokens processed, as a share of the largest image's."""
        return schedule.average_keep(num_layers=self.num_layers, num_visual=self.num_visual)

    def neighbours(self, schedule: Schedule) -> list[Schedule]:
        """Return the schedules with one stage moved by a layer, one budget by a step, or one stage less or more."""
        stages = [(stage.layer, stage.keep) for stage in schedule.stages]
        lists = [[*stages[:index], *stages[index + 1 :]] for index in range(len(stages))]
        for index, (layer, keep) in enumerate(stages):
            moved = [(other, keep) for other in self._next_to(layer)]
            moved += [(layer, max(1, round(keep * factor))) for factor in (_STEP, 1 / _STEP)]
            lists += [[*stages[:index], stage, *stages[index + 1 :]] for stage in moved]
        if 0 < len(stages) < self.max_stages:
            last_layer, last_keep = stages[-1]
            later = [layer for layer in self.layers if layer > last_layer]
            lists += [
                [*stages, (layer, max(1, last_keep // 2))] for layer in later[:: max(1, len(later) // 2)]
            ]
        result = [with_stages(schedule, found) for found in lists if found and self._possible(found)]
        return list(dict.fromkeys(result))

    def _next_to(self, layer: int) -> list[int]:
        if self.only_these_layers:
            index = self.layers.index(layer)
            return [*self.layers[max(0, index - 1) : index], *self.layers[index + 1 : index + 2]]
        return [other for other in (layer - 1, layer + 1) if 1 <= other < self.num_layers]

    def _possible(self, stages: Sequence[tuple[int, int]]) -> bool:
        if stages[0][1] >= self.num_visual or stages[0][1] > MAX_TOPK:
            return False
        return all(a[0] < b[0] and a[1] > b[1] for a, b in zip(stages, stages[1:]))


def make_space(
    *,
    num_layers: int,
    num_visual: int,
    layers: Sequence[int],
    keeps: Sequence[float],
    max_stages: int,
    linear_layers: Sequence[int] = (),
) -> Space:
    """Return the space for a decoder. Without ``layers`` it has ``MAX_LAYERS`` evenly spread ones and those of the presets.

    ``linear_layers`` have linear attention: then it has all others.

    Raises:
        ScheduleError: If a layer or budget is impossible.
    """
    if num_layers < 2:
        raise ScheduleError(
            f"schedule: expected a decoder of at least 2 layers, got {num_layers}; choose another model"
        )
    known = stage_layers(DEFAULT_METHOD, num_layers, linear_layers)
    for layer in layers:
        if layer not in known:
            which = ", ".join(map(str, known)) if linear_layers else f"1..{num_layers - 1}"
            raise ScheduleError(
                f"--layers: expected layers in {which} ({num_layers} decoder layers), got {layer}; leave it out"
            )
    if linear_layers and not layers:
        layers = known
    for keep in keeps:
        if not 0.0 < keep < 1.0:
            raise ScheduleError(f"--keeps: expected shares between 0 and 100%, got {100 * keep:g}%")
    counts = {min(max(1, round(keep * num_visual)), MAX_TOPK) for keep in keeps}
    counts = {count for count in counts if count < num_visual}
    if not counts:
        raise ScheduleError(
            f"schedule: expected an image of at least 2 visual tokens, got {num_visual}; add a larger one"
        )
    return Space(
        num_layers=num_layers,
        num_visual=num_visual,
        layers=tuple(sorted(set(layers))) or _default_layers(num_layers),
        keeps=tuple(sorted(counts, reverse=True)),
        max_stages=max_stages,
        only_these_layers=bool(layers),
        linear_layers=tuple(linear_layers),
    )


def setting_variants(
    positions: Sequence[Positions], thresholds: Sequence[float]
) -> list[tuple[str, Sequence[object]]]:
    """Return the settings of a schedule to compare, each with its values, the default first."""
    variants: list[tuple[str, Sequence[object]]] = [
        ("positions", positions),
        ("probe_rows", ("reference", "answer")),
        ("nms_threshold", (0.8, *(value for value in thresholds if value != 0.8))),
    ]
    return [(name, values) for name, values in variants if len(values) > 1]


def with_stages(settings: Schedule, stages: Sequence[tuple[int, int]]) -> Schedule:
    """Return ``settings`` with other stages."""
    return msgspec.structs.replace(
        settings, stages=tuple(Stage(layer=layer, keep=keep) for layer, keep in stages)
    )


def stages_of(schedule: Schedule) -> Stages:
    """Return (layer, keep) of the schedule's stages."""
    return tuple((stage.layer, stage.keep) for stage in schedule.stages)


def usual_schedules(space: Space, settings: Schedule, averages: Sequence[float]) -> list[Schedule]:
    """Return the schedules of ``trio-export --keep``, without those for averages that it refuses."""
    result = []
    for average in averages:
        try:
            made = ScheduleRequest(average=average).schedule(
                num_layers=space.num_layers, num_visual=space.num_visual, linear_layers=space.linear_layers
            )
        except ScheduleError:
            continue
        if made.stages:
            result.append(msgspec.structs.replace(settings, stages=made.stages))
    return list(dict.fromkeys(result))


def _default_layers(num_layers: int) -> tuple[int, ...]:
    last = num_layers - 1
    count = min(last, MAX_LAYERS)
    spread = {1 + round(index * (last - 1) / max(count - 1, 1)) for index in range(count)}
    usual = default_layers(DEFAULT_METHOD, num_layers=num_layers)
    return tuple(sorted(spread.union(*usual)))
