"""Search for the best schedules: the front of cost (predicted time, or FLOPs) against divergence from keep-all.

Four steps, each on the search samples only:

    settings   compares position rules, probe rows and τ one after the other, on the schedules of ``trio-export``; a value
               replaces the default only if its divergence is lower with 95 % confidence
    table      measures every single stage: each candidate layer with each budget
    estimate   takes the divergence of every list of stages as the sum of its single stages', and measures the first fronts
               of cost against that sum, and the cheapest ones near the bound on the divergence
    refine     measures neighbours of the front (a stage one layer on, a budget a quarter up or down, one stage less or more)
               until none is better or the allowance is used up

The space is small, discrete and ordered, and schedules that begin alike share work. So all lists are ranked, and hundreds are
measured for the price of a few dozen. A general optimizer such as Optuna asks for one point at a time and cannot use that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import msgspec

from trio_edge.calibration.search.calibration_file import Tried
from trio_edge.calibration.search.schedules.space import (
    SETTING_KEEPS,
    setting_variants,
    stages_of,
    usual_schedules,
    with_stages,
)
from trio_edge.profiling.statistics import bootstrap_interval, paired_interval
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.progress import StepProgress
    from trio_edge.calibration.search.bundle_shape import BundleShape
    from trio_edge.calibration.search.calibration_file import CalibrationData
    from trio_edge.calibration.search.measuring import Measurements
    from trio_edge.calibration.search.options import CalibrationOptions
    from trio_edge.calibration.search.samples import Split
    from trio_edge.calibration.search.schedules.prefill_cost import CostKind, PrefillCost
    from trio_edge.calibration.search.schedules.space import Space
    from trio_edge.export.quantize.plan import QuantizePlan

USUAL_KEEPS = (0.06, 0.08, 0.111, 0.15, 0.222, 0.333, 0.5)
"""Average keeps whose ``trio-export`` schedules are measured too, if the space has them."""
_FIRST_SHARE = 0.5  # the other half refines the front by measurements, which are exact
"""Share of the allowance for the estimate's fronts."""
_NEAR_THE_BOUND = 16
"""Cheapest schedules to measure because their estimates are near the bound on the divergence."""
_HOPEFUL = 1.5
"""A schedule is measured up to this multiple of the bound, because estimates are too high."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that is known before the search."""

    options: CalibrationOptions
    plan: QuantizePlan
    split: Split
    data: CalibrationData
    model: TorchModel
    shape: BundleShape
    space: Space
    cost: PrefillCost
    kind: CostKind
    progress: StepProgress

    def begin(self, text: str) -> None:
        """Report the start of a step over all search samples."""
        self.progress.step(text, len(self.split.search))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A measured schedule."""

    schedule: Schedule
    cost: float
    """Milliseconds or FLOPs."""
    kls: list[float]
    """One per search sample, nats."""
    images: list[str]

    @property
    def kl(self) -> float:
        """Mean over the samples, nats."""
        return sum(self.kls) / len(self.kls)

    def is_within(self, kl: float) -> bool:
        """Return whether the divergence is at most ``kl`` with 95 % confidence."""
        if self.kl > kl:
            return False
        return bootstrap_interval(self.kls, self.images)[1] <= kl

    @property
    def point(self) -> tuple[float, float]:
        """Cost and error."""
        return self.cost, self.kl


def cheapest_within(candidates: Iterable[Candidate], kl: float) -> Candidate:
    """Return the cheapest candidate whose divergence is at most ``kl`` with 95 % confidence; keep-all's is 0."""
    return next(one for one in sorted(candidates, key=lambda one: one.point) if one.is_within(kl))


@dataclass(frozen=True, kw_only=True)
class Found:
    """Result of a search."""

    tried: list[Tried]
    single: dict[tuple[int, int], float]
    """Divergence of each single stage (layer, keep)."""
    candidates: list[Candidate]
    """All schedules measured with the chosen settings, keep-all first."""

    @property
    def front(self) -> list[Candidate]:
        """Cheapest first."""
        return pareto_front(self.candidates, key=lambda candidate: candidate.point)


def search(setup: Setup, measurements: Measurements) -> Found:
    """Return all measured schedules; the bound on the divergence only directs where to look more closely."""
    settings, tried = _settings(setup, measurements)
    setup.begin("single stages")
    singles = [
        with_stages(settings, [(layer, keep)]) for layer in setup.space.layers for keep in setup.space.keeps
    ]
    candidates = _measured(setup, measurements, [settings, *singles])
    single = {stages_of(schedule)[0]: candidates[schedule].kl for schedule in singles}
    setup.begin("several stages")
    promising = _promising(setup, settings, single)
    usual = usual_schedules(setup.space, settings, USUAL_KEEPS)
    allowed = [schedule for schedule in usual if setup.space.allows(schedule)]
    candidates |= _measured(setup, measurements, [*promising, *allowed])
    left = setup.options.evaluations - len(promising)
    while left > 0 and (near := _neighbours(setup, candidates)[:left]):
        setup.begin("refining the front")
        left -= len(near)
        before = _front_points(candidates)
        candidates |= _measured(setup, measurements, near)
        if _front_points(candidates) == before:  # nothing near the front improved it
            break
    return Found(tried=tried, single=single, candidates=list(candidates.values()))


def _front_points(candidates: dict[Schedule, Candidate]) -> list[tuple[float, float]]:
    return pareto_front([one.point for one in candidates.values()], key=lambda point: point)


def _settings(setup: Setup, measurements: Measurements) -> tuple[Schedule, list[Tried]]:
    """Return the settings without stages, and all values that were compared."""
    settings, tried = Schedule(positions=setup.model.positions[0]), list[Tried]()
    for name, values in setting_variants(setup.model.positions, setup.options.nms_thresholds):
        setup.begin(f"comparing {name.replace('_', ' ')}")
        # with the settings chosen so far
        options = [msgspec.structs.replace(settings, **{name: value}) for value in values]
        kls = [_sample_kls(setup, measurements, option) for option in options]
        if not kls[0]:
            continue  # the decoder is too small for any of trio-export's schedules
        images = [question.image_id for question in setup.split.search]
        intervals = [paired_interval(kl, kls[0], images) for kl in kls]
        surely_lower = [index for index, (_, high) in enumerate(intervals) if high < 0]
        best = min(surely_lower, key=lambda index: sum(kls[index]), default=0)
        settings = options[best]
        tried += [
            Tried(
                setting=name,
                value=str(getattr(option, name)),
                kl=sum(kl) / len(kl),
                minus_default=(sum(kl) - sum(kls[0])) / len(kl),
                interval_95=interval,
                chosen=index == best,
            )
            for index, (option, kl, interval) in enumerate(zip(options, kls, intervals))
        ]
    return settings, tried


def _sample_kls(setup: Setup, measurements: Measurements, settings: Schedule) -> list[float]:
    """Return each sample's mean divergence over the schedules on which settings are compared."""
    schedules = usual_schedules(setup.space, settings, SETTING_KEEPS)
    table = measurements.of(schedules, setup.split.search)
    return [sum(result.kl for result in results) / len(results) for results in zip(*table.values())]


def _promising(setup: Setup, settings: Schedule, single: dict[tuple[int, int], float]) -> list[Schedule]:
    """Return the schedules whose estimates are on the first fronts, or the cheapest near the bound."""
    estimates = {
        stages: (
            setup.cost.of_stages(stages, settings).of(setup.kind),
            sum(single[stage] for stage in stages),
        )
        for stages in setup.space.stage_lists()
        if len(stages) > 1
    }
    count = max(1, int(_FIRST_SHARE * setup.options.evaluations))
    chosen = first_fronts(estimates, key=estimates.__getitem__, count=count)
    within = [stages for stages, (_, kl) in estimates.items() if kl <= _HOPEFUL * setup.options.max_kl]
    cheapest = sorted(within, key=estimates.__getitem__)[:_NEAR_THE_BOUND]
    chosen += [stages for stages in cheapest if stages not in chosen]
    return [with_stages(settings, stages) for stages in chosen[: setup.options.evaluations]]


def _neighbours(setup: Setup, candidates: dict[Schedule, Candidate]) -> list[Schedule]:
    """Return the neighbours of the front that are not measured yet, those of the present choice first."""
    front = pareto_front(candidates.values(), key=lambda candidate: candidate.point)
    around = [cheapest_within(candidates.values(), setup.options.max_kl), *front]
    near = [other for candidate in around for other in setup.space.neighbours(candidate.schedule)]
    return [schedule for schedule in dict.fromkeys(near) if schedule not in candidates]


def _measured(
    setup: Setup, measurements: Measurements, schedules: Sequence[Schedule]
) -> dict[Schedule, Candidate]:
    table = measurements.of(list(dict.fromkeys(schedules)), setup.split.search)
    images = [question.image_id for question in setup.split.search]
    return {
        schedule: Candidate(
            schedule=schedule,
            cost=setup.cost.of(schedule).of(setup.kind),
            kls=[result.kl for result in results],
            images=images,
        )
        for schedule, results in table.items()
    }


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
