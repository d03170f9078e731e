"""Finds the schedules worth having: the front of cost (predicted time, or FLOPs) against divergence from keep-all.

Four steps, each measured on the search samples only:

    settings   position rule, probe rows and τ, one after the other, on the schedules that ``trio-export`` would make; a value
               replaces the default only where its divergence is lower with 95 % confidence
    table      every single stage: each candidate layer with each budget
    estimate   every list of stages; its divergence is taken to be the sum of its stages' own. The first fronts of cost
               against that sum are measured, and those next to what the user asked for
    refine     neighbours of the measured front (a stage one layer on, a budget a quarter up or down, one stage less or
               more) until none is better or the allowance is used up

The space is small, discrete and ordered, and candidates that begin alike are cheap together, so all of it is ranked and
hundreds are measured for the price of a few dozen. A general optimizer (Optuna was looked at: well kept, but its samplers
ask for one point at a time and know nothing of shared beginnings) would measure fewer at a higher price each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from trio_edge.calibration.search.schedules.candidates import (
    Candidate,
    EstimatedSchedule,
    Found,
    Searching,
    Tried,
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

    from trio_edge.calibration.search.schedules.selection_rule import SelectionRule

USUAL_KEEPS = (0.06, 0.08, 0.111, 0.15, 0.222, 0.333, 0.5)
"""Average keeps whose ``trio-export`` schedules are measured beside the others, where the space has them."""
_FIRST_SHARE = 0.5  # the other half follows what was measured, which estimates are not
"""Share of the allowance that the estimate's fronts may use."""
_NEAR_THE_RULE = 16
"""Estimated schedules measured because they are next to what the user asked for."""


def search(searching: Searching, rule: SelectionRule) -> Found:
    """Return what was found; ``wish`` only directs where to look more closely."""
    settings, tried = _settings(searching)
    searching.on_step("single stages")
    singles = [
        with_stages(settings, [(layer, keep)])
        for layer in searching.space.layers
        for keep in searching.space.keeps
    ]
    candidates = _measured(searching, [settings, *singles])
    single = {stages_of(schedule)[0]: candidates[schedule].kl for schedule in singles}
    searching.on_step("several stages")
    promising = _promising(searching, settings, single, rule)
    usual = usual_schedules(searching.space, settings, [*USUAL_KEEPS, *rule.average_keeps])
    allowed = [schedule for schedule in usual if searching.space.allows(schedule)]
    candidates |= _measured(searching, [*promising, *allowed])
    left = searching.evaluations - len(promising)
    while left > 0 and (near := _neighbours(searching, candidates, rule)[:left]):
        searching.on_step("refining the front")
        left -= len(near)
        before = _front_points(candidates)
        candidates |= _measured(searching, near)
        if _front_points(candidates) == before:  # nothing near the front improved it
            break
    return Found(settings=settings, tried=tried, single=single, candidates=list(candidates.values()))


def _front_points(candidates: dict[Schedule, Candidate]) -> list[tuple[float, float]]:
    return pareto_front([one.point for one in candidates.values()], key=lambda point: point)


def _settings(searching: Searching) -> tuple[Schedule, list[Tried]]:
    """Return the settings without stages, and all values that were compared."""
    settings, tried = Schedule(positions=searching.positions[0]), list[Tried]()
    for values in setting_variants(searching.positions, searching.thresholds):
        name = _differing(values)
        searching.on_step(f"comparing {name.replace('_', ' ')}")
        # each setting is compared with those found before it in force
        options = [msgspec.structs.replace(settings, **{name: getattr(value, name)}) for value in values]
        kls = [_sample_kls(searching, option) for option in options]
        if not kls[0]:
            continue  # so small a decoder that trio-export makes no schedule for it
        images = [question.image_id for question in searching.questions]
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


def _sample_kls(searching: Searching, settings: Schedule) -> list[float]:
    """Return for each sample the mean divergence of the schedules that settings are compared on."""
    schedules = usual_schedules(searching.space, settings, SETTING_KEEPS)
    table = searching.measurements.of(schedules, searching.questions)
    return [sum(result.kl for result in results) / len(results) for results in zip(*table.values())]


def _promising(
    searching: Searching, settings: Schedule, single: dict[tuple[int, int], float], rule: SelectionRule
) -> list[Schedule]:
    """Return the lists of stages whose estimates are on the first fronts, or next to what the rule would choose."""
    space = searching.space
    estimates = list[EstimatedSchedule]()
    for stages in space.stage_lists():
        if len(stages) > 1:
            kl = sum(single[stage] for stage in stages)
            estimates.append(EstimatedSchedule(searching.cost.of_stages(stages, settings), kl, stages))
    count = max(1, int(_FIRST_SHARE * searching.evaluations))

    def point(estimate: EstimatedSchedule) -> tuple[float, float]:
        return estimate.cost.of(searching.kind), estimate.kl

    chosen = [estimate.stages for estimate in first_fronts(estimates, key=point, count=count)]
    chosen += [
        stages for stages in rule.nearest(estimates, searching, count=_NEAR_THE_RULE) if stages not in chosen
    ]
    return [with_stages(settings, stages) for stages in chosen[: searching.evaluations]]


def _neighbours(
    searching: Searching, candidates: dict[Schedule, Candidate], rule: SelectionRule
) -> list[Schedule]:
    """Return what is next to the front and not measured yet, next to what would be chosen now first."""
    front = pareto_front(candidates.values(), key=lambda candidate: candidate.point)
    chosen = rule.choice(list(candidates.values()), searching.space)
    around = [*([] if chosen is None else [chosen]), *front]
    near = [other for candidate in around for other in searching.space.neighbours(candidate.schedule)]
    return [schedule for schedule in dict.fromkeys(near) if schedule not in candidates]


def _measured(searching: Searching, schedules: Sequence[Schedule]) -> dict[Schedule, Candidate]:
    table = searching.measurements.of(list(dict.fromkeys(schedules)), searching.questions)
    images = [question.image_id for question in searching.questions]
    return {
        schedule: Candidate(
            schedule=schedule,
            cost=searching.cost.of(schedule),
            kind=searching.kind,
            results=results,
            images=images,
        )
        for schedule, results in table.items()
    }
