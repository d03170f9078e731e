"""Measured and estimated schedules, their Pareto front, and the result of a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from trio_edge.profiling.statistics import bootstrap_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trio_edge.calibration.model.divergence import MeasuredSchedule
    from trio_edge.calibration.search.schedules.prefill_cost import CostKind, ScheduleCost
    from trio_edge.runtime.bundle.schedule import Schedule


class Tried(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One value of a setting compared with the default, on the same schedules and samples."""

    setting: str
    value: str
    kl: float
    minus_default: float
    interval_95: tuple[float, float]
    """95 % interval of ``minus_default``; samples are paired by image."""
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A measured schedule."""

    schedule: Schedule
    cost: ScheduleCost
    kind: CostKind
    results: list[MeasuredSchedule]
    """One per search sample."""
    images: list[str]

    @property
    def kl(self) -> float:
        """Mean over the samples, nats."""
        return sum(result.kl for result in self.results) / len(self.results)

    def is_within(self, kl: float) -> bool:
        """Return whether the divergence is at most ``kl`` with 95 % confidence."""
        if self.kl > kl:
            return False
        values = [result.kl for result in self.results]
        return bootstrap_interval(values, self.images)[1] <= kl

    @property
    def point(self) -> tuple[float, float]:
        """Cost and error."""
        return self.cost.of(self.kind), self.kl


def cheapest_within(candidates: Iterable[Candidate], kl: float) -> Candidate:
    """Return the cheapest candidate whose divergence is at most ``kl`` with 95 % confidence; keep-all's is 0."""
    return next(one for one in sorted(candidates, key=lambda one: one.point) if one.is_within(kl))


class EstimatedSchedule(NamedTuple):
    """A list of stages with its estimated divergence."""

    cost: ScheduleCost
    kl: float
    stages: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Result of a search."""

    settings: Schedule
    """The chosen settings, without stages."""
    tried: list[Tried]
    single: dict[tuple[int, int], float]
    """Divergence of each single stage (layer, keep)."""
    candidates: list[Candidate]
    """All schedules measured with the chosen settings, keep-all first."""

    @property
    def front(self) -> list[Candidate]:
        """Cheapest first."""
        return pareto_front(self.candidates, key=lambda candidate: candidate.point)


Point = TypeVar("Point")


def pareto_front(points: Iterable[Point], *, key: Callable[[Point], tuple[float, float]]) -> list[Point]:
    """Return the points that are better than all cheaper ones, cheapest first; of equal ones the first."""
    front: list[Point] = []
    lowest = float("inf")
    for point in sorted(points, key=key):
        if key(point)[1] < lowest:
            front.append(point)
            lowest = key(point)[1]
    return front


def first_fronts(
    points: Iterable[Point], *, key: Callable[[Point], tuple[float, float]], count: int
) -> list[Point]:
    """Return at most ``count`` points: the front, then the front of the rest, and so on."""
    left, chosen = list(points), list[Point]()
    while left and len(chosen) < count:
        front = pareto_front(left, key=key)
        taken = {id(point) for point in front}
        left = [point for point in left if id(point) not in taken]
        chosen += spread(front, count - len(chosen))
    return chosen


def spread(front: list[Point], count: int) -> list[Point]:
    """Return at most ``count`` points, evenly spread along a front, with both ends."""
    if len(front) <= count:
        return front
    if count == 1:
        return front[-1:]
    return [front[round(index * (len(front) - 1) / (count - 1))] for index in range(count)]
