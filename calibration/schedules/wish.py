"""What the user asked for: an error, a time or an average keep, and which candidate that chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trio_edge.runtime.errors import ScheduleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.calibration.schedules.predicted_time import TimeModel
    from trio_edge.calibration.schedules.search import Candidate
    from trio_edge.calibration.schedules.space import Space

    Stages = tuple[tuple[int, int], ...]

DEFAULT_MAX_KL = 0.05
"""Nats, if nothing is asked for."""
_HOPEFUL = 1.5
"""Estimated divergence over the allowed one up to which a schedule is measured: sums of stages overestimate."""
_ROUNDING = 0.0005
"""Of percentages with one decimal."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One rule and its bound."""

    rule: Literal["max_kl", "target_ms", "keep"]
    bound: float
    """Nats, milliseconds, or a share in (0, 1]."""

    @property
    def average_keeps(self) -> tuple[float, ...]:
        """Average keeps whose usual schedule must be among the candidates."""
        return (self.bound,) if self.rule == "keep" else ()

    @property
    def text(self) -> str:
        """The rule in words."""
        if self.rule == "max_kl":
            return f"the fastest with a KL of at most {self.bound:g} nats"
        if self.rule == "target_ms":
            return f"the lowest KL within {self.bound:g} ms"
        return f"the lowest KL with an average keep of at most {100 * self.bound:.1f} %"

    def check(self, space: Space, time: TimeModel, *, target: str) -> None:
        """Raise ScheduleError, naming the nearest that is possible, if no schedule of the space can do it."""
        if self.rule == "target_ms":
            fastest = min(space.stage_lists(), key=time.staged_ms)
            least = min(time.staged_ms(fastest), time.staged_ms([]))
            if least > self.bound:
                raise ScheduleError(
                    f"--target-ms: expected at least {_up(least)} (predicted for {target}, {_written(fastest)}),"
                    f" got {self.bound:g}; allow more time, a smaller picture or another target"
                )
        if self.rule == "keep":
            sparsest = min(space.stage_lists(), key=lambda stages: average_keep(stages, space))
            lowest = average_keep(sparsest, space)
            if lowest > self.bound + _ROUNDING:
                raise ScheduleError(
                    f"--keep: expected at least {_up(100 * lowest)}% ({_written(sparsest)}), got {100 * self.bound:g}%;"
                    " keep more, or allow earlier --layers or smaller --keeps"
                )

    def nearest(
        self, estimates: Sequence[tuple[tuple[float, float], Stages]], space: Space, *, count: int
    ) -> list[Stages]:
        """Return at most ``count`` lists of stages that are likely to be chosen.

        Args:
            estimates: Predicted milliseconds and estimated divergence of each list of stages.
            space: That they are of.
            count: How many.
        """
        if self.rule == "max_kl":
            within = [entry for entry in estimates if entry[0][1] <= _HOPEFUL * self.bound]
            ranked = sorted(within, key=lambda entry: entry[0])
        else:
            within = [entry for entry in estimates if self._allows(entry[0][0], entry[1], space)]
            ranked = sorted(within, key=lambda entry: entry[0][::-1])
        return [stages for _, stages in ranked[:count]]

    def choice(self, candidates: Sequence[Candidate], space: Space) -> Candidate | None:
        """Return what the rule chooses; None if nothing fits."""
        if self.rule == "max_kl":
            within = [candidate for candidate in candidates if candidate.kl <= self.bound]
            return min(within, key=lambda candidate: candidate.point, default=None)
        within = [
            candidate
            for candidate in candidates
            if self._allows(candidate.milliseconds, stages_of(candidate), space)
        ]
        return min(within, key=lambda candidate: candidate.point[::-1], default=None)

    def _allows(self, milliseconds: float, stages: Stages, space: Space) -> bool:
        if self.rule == "target_ms":
            return milliseconds <= self.bound
        return average_keep(stages, space) <= self.bound + _ROUNDING


def stages_of(candidate: Candidate) -> Stages:
    """Return (layer, keep) of the candidate's stages."""
    return tuple((stage.layer, stage.keep) for stage in candidate.schedule.stages)


def average_keep(stages: Stages, space: Space) -> float:
    """Return the mean over layers of the visual tokens processed, as a share of the largest picture's."""
    bounds = [*(layer for layer, _ in stages), space.num_layers]
    processed = bounds[0] * space.num_visual
    processed += sum((stop - layer) * keep for (layer, keep), stop in zip(stages, bounds[1:]))
    return processed / (space.num_layers * space.num_visual)


def _written(stages: Stages) -> str:
    return "stages " + ",".join(f"{layer}:{keep}" for layer, keep in stages)


def _up(value: float) -> str:
    """Return a number rounded up to three digits, so that what is asked for next can be had."""
    step = 10.0 ** (len(f"{value:.0f}") - 3) if value >= 1 else 10.0 ** (int(f"{value:e}"[-3:]) - 2)
    return f"{-(-value // step) * step:.6g}"
