"""Schedules for tests, as short as on a command line."""

from __future__ import annotations

from typing import Any

from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.trio.budgets import ScheduleRequest, parse_stages


def schedule_of(text: str, **settings: Any) -> Schedule:
    """Return the schedule of ``LAYER:KEPT`` pairs; ``settings`` are its other fields."""
    return Schedule(
        stages=tuple(Stage(layer=layer, keep=keep) for layer, keep in parse_stages(text)), **settings
    )


def schedule_for(average: float, *, num_layers: int, num_visual: int, **wanted: Any) -> Schedule:
    """Return the schedule of an average keep; ``wanted`` are other fields of ``ScheduleRequest``."""
    return ScheduleRequest(average=average, **wanted).schedule(num_layers=num_layers, num_visual=num_visual)
