"""Time to the first token on a device that is not at hand, from counted FLOPs and bytes and the device's peak rates.

Each part takes max(FLOPs / rate, bytes / bandwidth). Bytes are the part's weights, read once, and the KV rows that it
writes; activations are taken to stay in caches. Rates are peaks and launches cost nothing, so this is a lower bound: good
for comparing schedules of one model, not a promise of milliseconds.

    decoder layer   ``cost.decoder_layer_flops`` at its rows; its weights and KV rows
    select          ``cost.probe_flops`` and ``nms_flops``; the probed layer and the head, forwards and backwards
    vision, head    their FLOPs and weights, the same for all schedules

Graphs have fixed shapes, so rows are those of the profile that a sample runs at, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from trio_edge.trio.cost import decoder_layer_flops, head_flops, nms_flops, probe_flops, vision_flops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.schedule import Schedule
    from trio_edge.runtime.targets import Target
    from trio_edge.trio.cost import ModelShape


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A size at which some of the samples run."""

    share: float
    """Of the samples."""
    shape: ModelShape
    """With the vision shape of its pictures; ``bytes_per_element`` is also the weights'."""
    num_visual: int
    """N, rows of the visual span."""
    num_text: int
    """Text bucket."""


@dataclass(frozen=True)
class TimeModel:
    """Predicts schedules' times; layers of equal rows cost the same, so each is counted once."""

    situations: Sequence[Situation]
    target: Target
    vision_params: int
    """Parameters of vision encoder and projector."""
    _layers: dict[int | None, float] = field(default_factory=dict, init=False, compare=False)
    _selects: dict[tuple[int | None, int], float] = field(default_factory=dict, init=False, compare=False)

    def first_token_ms(self, schedule: Schedule) -> float:
        """Return the mean over the samples of the milliseconds from picture to first token."""
        stages = [(stage.layer, stage.keep) for stage in schedule.stages]
        return self.staged_ms(stages, num_probe_rows=schedule.num_probe_rows)

    def staged_ms(self, stages: Sequence[tuple[int, int]], *, num_probe_rows: int = 4) -> float:
        """Return the same of (layer, keep) pairs."""
        layers = self.situations[0].shape.num_layers
        bounds = [*(layer for layer, _ in stages), layers]
        total = self.fixed_ms + bounds[0] * self._layer_ms(None)
        entering: int | None = None
        for (layer, keep), stop in zip(stages, bounds[1:]):
            total += self._select_ms(entering, num_probe_rows) + (stop - layer) * self._layer_ms(keep)
            entering = keep
        return total

    @cached_property
    def fixed_ms(self) -> float:
        """Vision and head, which no schedule changes."""
        total = 0.0
        for situation in self.situations:
            shape = situation.shape
            vision = vision_flops(shape, num_visual=situation.num_visual)
            head = shape.hidden_size * shape.vocab_size
            total += situation.share * (
                self._ms(vision, self.vision_params * shape.bytes_per_element)
                + self._ms(head_flops(shape), head * shape.bytes_per_element)
            )
        return total

    def _layer_ms(self, keep: int | None) -> float:
        """Return one decoder layer with ``keep`` visual rows, None for those of the picture."""
        if keep not in self._layers:
            self._layers[keep] = sum(
                situation.share * self._one_layer_ms(situation, keep) for situation in self.situations
            )
        return self._layers[keep]

    def _one_layer_ms(self, situation: Situation, keep: int | None) -> float:
        shape = situation.shape
        rows = (situation.num_visual if keep is None else keep) + situation.num_text
        kv_row = 2 * shape.num_kv_heads * shape.head_size
        return self._ms(
            decoder_layer_flops(shape, num_rows=rows),
            (_layer_params(shape) + rows * kv_row) * shape.bytes_per_element,
        )

    def _select_ms(self, entering: int | None, num_probe_rows: int) -> float:
        key = entering, num_probe_rows
        if key not in self._selects:
            self._selects[key] = sum(
                situation.share * self._one_select_ms(situation, *key) for situation in self.situations
            )
        return self._selects[key]

    def _one_select_ms(self, situation: Situation, entering: int | None, num_probe_rows: int) -> float:
        shape = situation.shape
        num_visual = situation.num_visual if entering is None else entering
        flops = nms_flops(num_visual, hidden_size=shape.hidden_size) + probe_flops(
            shape,
            num_rows=num_visual + situation.num_text,
            num_visual=num_visual,
            num_probe_rows=num_probe_rows,
        )
        weights = _layer_params(shape) + shape.hidden_size * shape.vocab_size
        return self._ms(flops, 2 * weights * shape.bytes_per_element)

    def _ms(self, flops: float, num_bytes: float) -> float:
        # float32 runs as TF32, at half of the rate of float16
        rate = self.target.fp16_flops / (self.situations[0].shape.bytes_per_element / 2)
        return 1e3 * max(flops / rate, num_bytes / self.target.bandwidth_bytes_per_s)


def _layer_params(shape: ModelShape) -> int:
    queries, keys = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    return shape.hidden_size * (2 * queries + 2 * keys + 3 * shape.intermediate_size)
