"""The rule that chooses a candidate: a bound on the error, the time or the average keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trio_edge.calibration.search.schedules.space import average_keep, stages_of
from trio_edge.runtime.bundle.errors import ScheduleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.calibration.search.schedules.candidates import Candidate, EstimatedSchedule
    from trio_edge.calibration.search.schedules.prefill_cost import CostKind, PrefillCost
    from trio_edge.calibration.search.schedules.space import Space, Stages

DEFAULT_MAX_KL = 0.05
"""Nats, without any other rule."""
_HOPEFUL = 1.5
"""A schedule is measured up to this multiple of the bound, because estimates are too high."""
_ROUNDING = 0.0005
"""Rounding error of percentages with one decimal."""


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """One rule and its bound."""

    bounded: Literal["max_kl", "target_ms", "keep"]
    bound: float
    """Nats, milliseconds, or a share in (0, 1]."""

    @property
    def average_keeps(self) -> tuple[float, ...]:
        """Average keeps whose ``trio-export`` schedule must be among the candidates."""
        return (self.bound,) if self.bounded == "keep" else ()

    def text(self, kind: CostKind) -> str:
        """Return the rule in words."""
        if self.bounded == "max_kl":
            return f"the {'fastest' if kind == 'time' else 'cheapest'} whose KL is at most {self.bound:g} nats with 95 % confidence"
        if self.bounded == "target_ms":
            return f"the lowest KL within {self.bound:g} ms"
        return f"the lowest KL with an average keep of at most {100 * self.bound:.1f} %"

    def kind(self, wanted: Literal["auto", "time", "flops"], space: Space, cost: PrefillCost) -> CostKind:
        """Return the kind of cost that schedules are compared by.

        Raises:
            ScheduleError: If it must be time, no schedule is predicted to be faster than keep-all, and the rule bounds
                only the error.
        """
        if wanted == "flops":
            return "flops"
        fastest = min(space.stage_lists(), key=lambda stages: cost.of_stages(stages).milliseconds)
        least, whole = (cost.of_stages(stages).milliseconds for stages in (fastest, ()))
        if least < whole:
            return "time"
        if wanted == "auto":
            return "flops"
        if self.bounded == "max_kl":
            raise ScheduleError(
                f"--cost time: expected a schedule faster than keep-all ({whole:.3g} ms predicted for"
                f" {cost.target.name}), got {least:.3g} ms at best ({_written(fastest)}); use --cost flops"
            )
        return "time"

    def check(self, space: Space, cost: PrefillCost) -> None:
        """Raise ScheduleError, which names the nearest possible bound, if no schedule of the space meets the rule."""
        if self.bounded == "target_ms":
            lists = [(), *space.stage_lists()]
            fastest = min(lists, key=lambda stages: cost.of_stages(stages).milliseconds)
            least = cost.of_stages(fastest).milliseconds
            if least > self.bound:
                raise ScheduleError(
                    f"--target-ms: expected at least {_up(least)} (predicted for {cost.target.name}, {_written(fastest)}),"
                    f" got {self.bound:g}; allow more time, or choose a smaller image or another target"
                )
        if self.bounded == "keep":
            sparsest = min(space.stage_lists(), key=lambda stages: average_keep(stages, space))
            lowest = average_keep(sparsest, space)
            if lowest > self.bound + _ROUNDING:
                raise ScheduleError(
                    f"--keep: expected at least {_up(100 * lowest)}% ({_written(sparsest)}), got {100 * self.bound:g}%;"
                    " keep more, or allow earlier --layers or smaller --keeps"
                )

    def nearest(
        self, estimates: Sequence[EstimatedSchedule], space: Space, kind: CostKind, *, count: int
    ) -> list[Stages]:
        """Return at most ``count`` lists of stages that the rule is likely to choose."""

        def cost(estimate: EstimatedSchedule) -> float:
            return estimate.cost.of(kind)

        if self.bounded == "max_kl":
            within = [estimate for estimate in estimates if estimate.kl <= _HOPEFUL * self.bound]
            ranked = sorted(within, key=lambda estimate: (cost(estimate), estimate.kl))
        else:
            within = [
                estimate
                for estimate in estimates
                if self._allows(estimate.cost.milliseconds, estimate.stages, space)
            ]
            ranked = sorted(within, key=lambda estimate: (estimate.kl, cost(estimate)))
        return [estimate.stages for estimate in ranked[:count]]

    def choice(self, candidates: Sequence[Candidate], space: Space) -> Candidate | None:
        """Return the candidate that the rule chooses; None if none meets it."""
        if self.bounded == "max_kl":
            cheapest_first = sorted(candidates, key=lambda candidate: candidate.point)
            return next((one for one in cheapest_first if one.is_within(self.bound)), None)
        within = [
            candidate
            for candidate in candidates
            if self._allows(candidate.cost.milliseconds, stages_of(candidate.schedule), space)
        ]
        return min(within, key=lambda candidate: candidate.point[::-1], default=None)

    def _allows(self, milliseconds: float, stages: Stages, space: Space) -> bool:
        if self.bounded == "target_ms":
            return milliseconds <= self.bound
        return average_keep(stages, space) <= self.bound + _ROUNDING


def _written(stages: Stages) -> str:
    return "stages " + (",".join(f"{layer}:{keep}" for layer, keep in stages) or "none")


def _up(value: float) -> str:
    """Return a number rounded up to three digits, so that it is a possible bound."""
    step = 10.0 ** (len(f"{value:.0f}") - 3) if value >= 1 else 10.0 ** (int(f"{value:e}"[-3:]) - 2)
    return f"{-(-value // step) * step:.6g}"
