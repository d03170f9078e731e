"""The options of a calibration, their only defaults, and their rules; without torch, so that ``--help`` is fast."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, Literal

import msgspec

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.cost.devices import find_device

_BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "count": (lambda count: count >= 2, "2 or more samples"),
    "seed": (lambda seed: seed >= 0, "a number of 0 or more"),
    "held_out": (lambda share: 0.0 < share < 1.0, "a share between 0 and 100%"),
    "answer_tokens": (lambda count: 1 <= count <= 64, "1..64"),
    "max_kl": (lambda nats: 0.0 <= nats < inf, "nats of 0 or more"),
    "max_stages": (lambda count: 1 <= count <= 4, "1..4"),
    "nms_thresholds": (lambda values: all(0.0 < value <= 1.0 for value in values), "values in (0, 1]"),
    "evaluations": (lambda count: 0 <= count <= 10_000, "0..10000"),
    "max_new_tokens": (lambda count: count >= 1, "1 or more"),
    "gradients": (lambda count: count >= 0, "0 or more samples"),
}
"""Checks of the options' values, and each rule in words."""


class CalibrationOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of ``trio-calibrate``, which explains them, under their names. The only defaults are here."""

    model: str
    samples: str
    target: str
    revision: str | None = None
    prompt: str | None = None
    count: int | None = None
    seed: int = 0
    held_out: float = 1 / 3
    answer_tokens: int = 4
    max_kl: float = 0.05
    layers: tuple[int, ...] = ()
    keeps: tuple[float, ...] = (0.03, 0.06, 0.1, 0.16, 0.25, 0.4, 0.6)
    """Shares of the largest image's visual tokens."""
    max_stages: int = 3
    nms_thresholds: tuple[float, ...] = (0.7, 0.8, 0.9)
    evaluations: int = 120
    cost: Literal["auto", "time", "flops"] = "auto"
    dtype: Literal["auto", "float16", "float32"] = "auto"
    quantize: str = "none"
    max_visual: int | None = None
    max_new_tokens: int = 256
    only_image_sizes: bool = False
    gradients: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        from trio_edge.export.quantize.plan import parse_plan

        find_device(self.target)
        parse_plan(self.quantize)
        for name, (holds, rule) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ScheduleError(f"--{name.replace('_', '-')}: expected {rule}, got {value}")
