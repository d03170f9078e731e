"""The token-reduction schedule: the decoder layers that a selection stage precedes, and its settings.

A schedule is a plain value in the manifest. ``trio_edge.trio.budgets`` builds one from presets, percentages or text.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

import msgspec

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.limits import MOST_TOKENS

ProbeRows = Literal["reference", "answer"]
Positions = Literal["compact", "preserved"]
Budget = Literal["prompt", "image"]


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One selection before decoder layer ``layer``."""

    layer: int
    """0-based decoder layer whose input is reduced; the probe runs this layer. At least 1."""
    keep: int
    """K, number of visual tokens to keep. At least 1."""

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise ScheduleError(
                f"stage at layer {self.layer}: expected a layer >= 1, got {self.layer}; layer 0 always sees all tokens"
            )
        if not 1 <= self.keep <= MOST_TOKENS:
            raise ScheduleError(
                f"stage at layer {self.layer}: expected to keep 1..{MOST_TOKENS} tokens, got {self.keep}; choose another number"
            )


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All stages of a model and their common settings. A schedule without stages keeps all tokens."""

    stages: tuple[Stage, ...] = ()
    """In ascending order of layer, with strictly decreasing ``keep``."""
    method: str = "trio"
    """Selector of every stage, by its name in ``trio_edge.trio.methods``; only TRIO has probe rows and NMS."""
    probe_rows: ProbeRows = "reference"
    """Rows that carry the proxy loss: "reference" ends at S-2 (the paper's code), "answer" ends at S-1."""
    num_probe_rows: int = 4
    """R, number of probe rows."""
    nms_threshold: float = 0.8
    """τ, cosine similarity at and above which the less salient of two tokens is suppressed."""
    nms_rounds: int = 16
    """Unrolled rounds of the parallel NMS; it is exact for suppression chains up to this length."""
    positions: Positions = "compact"
    """Position ids after a stage: "compact" re-indexes 0..S'-1, "preserved" keeps the original ids."""

    budget: Budget = "prompt"
    """"prompt": ``keep`` counts the best tokens of all images together. "image": each image keeps at least an equal share."""

    def __post_init__(self) -> None:
        for earlier, later in zip(self.stages, self.stages[1:]):
            if later.layer <= earlier.layer:
                raise ScheduleError(
                    f"schedule: expected ascending layers, got {earlier.layer} before {later.layer}; order the stages"
                )
            if later.keep >= earlier.keep:
                raise ScheduleError(
                    f"stage at layer {later.layer}: expected to keep < {earlier.keep} (the stage before it),"
                    f" got {later.keep}; keep fewer tokens in later stages"
                )
        # Only the exporter knows the selectors' names. A runtime also runs graphs of selectors newer than itself.
        if not re.fullmatch("[a-z][a-z0-9_-]*", self.method):
            raise ScheduleError(f"method: expected a name in small letters, got {self.method!r}; correct it")
        for name, choices in (("probe_rows", ProbeRows), ("positions", Positions), ("budget", Budget)):
            first, second = get_args(choices)
            if (value := getattr(self, name)) not in (first, second):
                raise ScheduleError(f"{name}: expected {first!r} or {second!r}, got {value!r}")
        if not 1 <= self.num_probe_rows <= 64:
            raise ScheduleError(f"num_probe_rows: expected 1..64, got {self.num_probe_rows}")
        if not 0.0 < self.nms_threshold <= 1.0:
            raise ScheduleError(f"nms_threshold: expected 0 < τ <= 1, got {self.nms_threshold}")
        if not 1 <= self.nms_rounds <= 4096:
            raise ScheduleError(f"nms_rounds: expected 1..4096, got {self.nms_rounds}")

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of each stage."""
        return tuple(stage.layer for stage in self.stages)

    @property
    def last_probe_offset(self) -> int:
        """Distance of the last probe row from the end of the prompt: 2 is row S-2, 1 is row S-1."""
        return 2 if self.probe_rows == "reference" else 1

    def check_fits(self, *, num_layers: int, max_visual: int) -> None:
        """Raise ScheduleError unless every stage lies inside the model and keeps at most ``max_visual`` tokens."""
        for stage in self.stages:
            if stage.layer >= num_layers:
                raise ScheduleError(
                    f"stage at layer {stage.layer}: expected a layer in 1..{num_layers - 1}"
                    f" ({num_layers} decoder layers); choose an earlier layer"
                )
            if stage.keep > max_visual:
                raise ScheduleError(
                    f"stage at layer {stage.layer}: expected to keep <= {max_visual} (all visual tokens),"
                    f" got {stage.keep}; keep fewer"
                )

    def rows_of(self, num_ranges: int, num_visual: int) -> tuple[int, ...]:
        """Return the visual tokens that enter each of ``num_ranges`` layer ranges, of at most ``num_visual``."""
        keeps = [stage.keep for stage in self.stages] or [num_visual] * (num_ranges - 1)
        return (num_visual, *keeps)

    def tokens_per_layer(self, *, num_layers: int, num_visual: int) -> tuple[int, ...]:
        """Return the visual tokens that each decoder layer processes, for an image of ``num_visual`` tokens."""
        counts = [num_visual] * num_layers
        for stage in self.stages:
            kept = min(stage.keep, counts[stage.layer])
            counts[stage.layer :] = [kept] * (num_layers - stage.layer)
        return tuple(counts)

    def average_keep(self, *, num_layers: int, num_visual: int) -> float:
        """Return the mean over layers of the visual tokens processed, as a fraction of ``num_visual``."""
        if num_visual == 0:
            return 1.0
        counts = self.tokens_per_layer(num_layers=num_layers, num_visual=num_visual)
        return sum(counts) / (num_layers * num_visual)
