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
from typing import TYPE_CHECKING

import msgspec

from trio_edge.calibration.search.schedules.candidates import (
    Candidate,
    EstimatedSchedule,
    Found,
    Tried,
    cheapest_within,
    first_fronts,
    pareto_front,
)
from trio_edge.calibration.search.schedules.space import (
    SETTING_KEEPS,
    setting_variants,
    stages_of,
    usual_schedules,
    with_stages,
)
from trio_edge.profiling.statistics import paired_interval
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.calibration.model.prompts import SampleShape
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.progress import StepProgress
    from trio_edge.calibration.search.bundle_shape import BundleShape
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
    digest: str
    model: TorchModel
    samples: list[SampleShape]
    shape: BundleShape
    space: Space
    cost: PrefillCost
    kind: CostKind
    progress: StepProgress

    def begin(self, text: str) -> None:
        """Report the start of a step over all search samples."""
        self.progress.step(text, len(self.split.search))


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
    return Found(settings=settings, tried=tried, single=single, candidates=list(candidates.values()))


def _front_points(candidates: dict[Schedule, Candidate]) -> list[tuple[float, float]]:
    return pareto_front([one.point for one in candidates.values()], key=lambda point: point)


def _settings(setup: Setup, measurements: Measurements) -> tuple[Schedule, list[Tried]]:
    """Return the settings without stages, and all values that were compared."""
    settings, tried = Schedule(positions=setup.model.positions[0]), list[Tried]()
    for values in setting_variants(setup.model.positions, setup.options.nms_thresholds):
        name = _differing(values)
        setup.begin(f"comparing {name.replace('_', ' ')}")
        # with the settings chosen so far
        options = [msgspec.structs.replace(settings, **{name: getattr(value, name)}) for value in values]
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


def _differing(values: Sequence[Schedule]) -> str:
    first, second = values[0], values[1]
    return next(name for name in first.__struct_fields__ if getattr(first, name) != getattr(second, name))


def _sample_kls(setup: Setup, measurements: Measurements, settings: Schedule) -> list[float]:
    """Return each sample's mean divergence over the schedules on which settings are compared."""
    schedules = usual_schedules(setup.space, settings, SETTING_KEEPS)
    table = measurements.of(schedules, setup.split.search)
    return [sum(result.kl for result in results) / len(results) for results in zip(*table.values())]


def _promising(setup: Setup, settings: Schedule, single: dict[tuple[int, int], float]) -> list[Schedule]:
    """Return the schedules whose estimates are on the first fronts, or the cheapest near the bound."""
    estimates = list[EstimatedSchedule]()
    for stages in setup.space.stage_lists():
        if len(stages) > 1:
            kl = sum(single[stage] for stage in stages)
            estimates.append(EstimatedSchedule(setup.cost.of_stages(stages, settings), kl, stages))
    count = max(1, int(_FIRST_SHARE * setup.options.evaluations))

    def point(estimate: EstimatedSchedule) -> tuple[float, float]:
        return estimate.cost.of(setup.kind), estimate.kl

    chosen = [estimate.stages for estimate in first_fronts(estimates, key=point, count=count)]
    within = [estimate for estimate in estimates if estimate.kl <= _HOPEFUL * setup.options.max_kl]
    cheapest = sorted(within, key=point)[:_NEAR_THE_BOUND]
    chosen += [estimate.stages for estimate in cheapest if estimate.stages not in chosen]
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
            schedule=schedule, cost=setup.cost.of(schedule), kind=setup.kind, results=results, images=images
        )
        for schedule, results in table.items()
    }
