"""Cost of a schedule's prefill: FLOPs, and the predicted time to the first token on a device that is not at hand.

Times are ``profiling.predict``'s, in float16. Graphs have fixed shapes, so padding counts; the cost is the mean over the samples.
Parts with equal rows cost the same and are computed once, so any list of stages is a short sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from trio_edge.calibration.search.schedules.space import stages_of
from trio_edge.profiling.predict.speed import Formats, fitted_for, graph_time, rates_of
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost.flops import stage_work
from trio_edge.trio.cost.selections import StageSizes
from trio_edge.trio.cost.work import head_work, range_work, vision_work

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trio_edge.calibration.search.schedules.space import Space
    from trio_edge.runtime.bundle.manifest import Dimensions, VisionDimensions
    from trio_edge.trio.cost.devices import DeviceSpec
    from trio_edge.trio.cost.work import Work

CostKind = Literal["time", "flops"]
_USUAL = Schedule()
_FORMATS = Formats()


class ScheduleCost(NamedTuple):
    """Cost of one prefill, or of a part of it."""

    milliseconds: float
    flops: float

    def of(self, kind: CostKind) -> float:
        """Return the cost that schedules are compared by."""
        return self.milliseconds if kind == "time" else self.flops

    def plus(self, other: ScheduleCost, times: float = 1.0) -> ScheduleCost:
        """Return this cost plus ``times`` the other one."""
        return ScheduleCost(self.milliseconds + times * other.milliseconds, self.flops + times * other.flops)


class Situation(NamedTuple):
    """Shapes at which a share of the samples runs."""

    share: float
    sizes: Mapping[str, int]
    """Sizes of the vision profile, N among them."""
    num_text: int


@dataclass(frozen=True)
class PrefillCost:
    """Costs of schedules on one device."""

    decoder: Dimensions
    vision: VisionDimensions
    situations: Sequence[Situation]
    target: DeviceSpec
    _parts: dict[tuple[object, ...], ScheduleCost] = field(default_factory=dict, init=False, compare=False)

    def of(self, schedule: Schedule) -> ScheduleCost:
        """Return a schedule's cost."""
        return self.of_stages(stages_of(schedule), schedule)

    def of_stages(self, stages: Sequence[tuple[int, int]], settings: Schedule = _USUAL) -> ScheduleCost:
        """Return the cost of (layer, keep) pairs; ``settings`` has probe rows and NMS rounds."""
        starts = [0, *(layer for layer, _ in stages)]
        stops = [*starts[1:], self.decoder.num_layers]
        rows: list[int | None] = [None, *(keep for _, keep in stages)]
        total = self._mean(("vision",), lambda one: vision_work(self.vision, one.sizes))
        total = total.plus(self._mean(("head",), lambda _one: head_work(self.decoder)))
        for index, (start, stop, keep) in enumerate(zip(starts, stops, rows)):
            if index:
                total = total.plus(self._select(rows[index - 1], settings))
            total = total.plus(self._layer(keep), stop - start)
        return total

    def kind(self, wanted: Literal["auto", "time", "flops"], space: Space) -> CostKind:
        """Return the kind of cost that the schedules of ``space`` are compared by.

        Raises:
            ScheduleError: If it must be time, and no schedule is predicted to be faster than keep-all.
        """
        if wanted == "flops":
            return "flops"
        fastest = min(space.stage_lists(), key=lambda stages: self.of_stages(stages).milliseconds)
        least, whole = (self.of_stages(stages).milliseconds for stages in (fastest, ()))
        if least < whole:
            return "time"
        if wanted == "time":
            written = ",".join(f"{layer}:{keep}" for layer, keep in fastest)
            raise ScheduleError(
                f"--cost time: expected a schedule faster than keep-all ({whole:.3g} ms predicted for"
                f" {self.target.name}), got {least:.3g} ms at best (stages {written}); use --cost flops"
            )
        return "flops"

    def _layer(self, keep: int | None) -> ScheduleCost:
        """Return the cost of one decoder layer with ``keep`` visual rows; None for all of the image's."""

        def work(one: Situation) -> Work:
            return range_work(self.decoder, layers=(0,), rows=_visual_rows(one, keep) + one.num_text)

        return self._mean(("layer", keep), work)

    def _select(self, entering: int | None, settings: Schedule) -> ScheduleCost:
        def work(one: Situation) -> Work:
            # TRIO's work does not depend on the number of kept tokens
            sizes = StageSizes(_visual_rows(one, entering), 1, one.num_text, one.sizes["N"])
            return stage_work(self.decoder, settings, sizes)

        return self._mean(("select", entering, settings.num_probe_rows), work)

    def _mean(self, key: tuple[object, ...], work: Callable[[Situation], Work]) -> ScheduleCost:
        """Return the mean cost over the samples of a part, which ``key`` names; it is computed once."""
        if key not in self._parts:
            total = ScheduleCost(0.0, 0.0)
            for situation in self.situations:
                total = total.plus(self._timed(work(situation)), situation.share)
            self._parts[key] = total
        return self._parts[key]

    def _timed(self, work: Work) -> ScheduleCost:
        efficiency, rates = fitted_for(self.target).efficiency, rates_of(self.target)
        time = graph_time(work, formats=_FORMATS, rates=rates, efficiency=efficiency)
        return ScheduleCost(1e3 * time.seconds, work.flops)


def _visual_rows(situation: Situation, keep: int | None) -> int:
    return situation.sizes["N"] if keep is None else keep
