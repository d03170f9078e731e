"""Predictions of all combinations of values, and the first one that reaches a speed goal.

A sweep is written ``keep,image-size,dtype``, an axis with its own values ``keep=33.3%/11.1%``, and a speed goal
``answers-per-second=10``. Settings are sorted by what they lose: more kept tokens, larger images and finer weights come first.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trio_edge.profiling.predict.answer import PRECISIONS, Prediction, predict
from trio_edge.runtime.bundle.errors import ScheduleError, TargetError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.profiling.predict.plan import Plan
    from trio_edge.trio.cost.devices import DeviceSpec

AXES: dict[str, tuple[str, ...]] = {
    "keep": ("100%", "33.3%", "22.2%", "11.1%"),
    "image-size": ("1008x1008", "672x672", "336x336"),
    "dtype": PRECISIONS,
}
"""Axes of a sweep, and their default values."""
_FIELDS = {"keep": "keep", "image-size": "picture", "dtype": "precision"}
"""Field of a plan for each axis."""
METRICS = {"answers-per-second": False, "tokens-per-second": False, "ttft-ms": True}
"""Speeds that a goal may have, and whether less is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedGoal:
    """A speed to reach."""

    metric: str
    value: float

    def met_by(self, prediction: Prediction) -> bool:
        """Return whether ``prediction`` is fast enough and fits the device's memory."""
        return prediction.memory.fits and self.shortfall(prediction) <= 1.0

    def shortfall(self, prediction: Prediction) -> float:
        """Return how many times too slow ``prediction`` is; at most 1 if it is fast enough."""
        got = metric_of(prediction, self.metric)
        return got / self.value if METRICS[self.metric] else self.value / got


def metric_of(prediction: Prediction, metric: str) -> float:
    """Return one of ``METRICS``."""
    if metric == "ttft-ms":
        return 1e3 * prediction.seconds("prefill")
    if metric == "tokens-per-second":
        return 1.0 / prediction.seconds("decode")
    return 1.0 / prediction.answer_seconds


def parse_goal(text: str) -> SpeedGoal:
    """Return the goal written in ``text``.

    Raises:
        TargetError: If it is not of the form METRIC=NUMBER.
    """
    metric, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if metric not in METRICS or not 0 < value < math.inf:
        raise TargetError(
            f"--want: expected METRIC=NUMBER with one of {', '.join(METRICS)}, got {text!r};"
            " write it as answers-per-second=10"
        )
    return SpeedGoal(metric=metric, value=value)


def parse_sweep(text: str) -> dict[str, list[Any]]:
    """Return for each axis in ``text`` the field of a plan and its values.

    Raises:
        TargetError: If an axis is unknown, is given twice, or has a value that cannot be read.
    """
    fields: dict[str, list[Any]] = {}
    for part in text.split(","):
        name, sign, values = part.strip().partition("=")
        if name not in AXES or _FIELDS[name] in fields:
            raise TargetError(
                f"--sweep: expected each of {', '.join(AXES)} at most once, got {part.strip()!r} in {text!r};"
                " write it as keep,image-size,dtype or keep=33.3%/11.1%"
            )
        fields[_FIELDS[name]] = [
            _parsed(name, value) for value in (values.split("/") if sign else AXES[name])
        ]
    return fields


def _parsed(axis: str, value: str) -> Any:
    if axis == "image-size":
        return parse_size(value)
    if axis == "dtype" and value not in PRECISIONS:
        raise TargetError(
            f"dtype: expected one of {', '.join(PRECISIONS)}, got {value!r}; choose one of these"
        )
    return value


def parse_size(text: str) -> tuple[int, int]:
    """Return width and height written as ``672x672``.

    Raises:
        TargetError: If the text is not of that form.
    """
    match = re.fullmatch("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if match is None:
        raise TargetError(f"image-size: expected WIDTHxHEIGHT in pixels, got {text!r}; write it as 672x672")
    return int(match[1]), int(match[2])


def sweep(
    plan: Plan, fields: dict[str, list[Any]], devices: Sequence[DeviceSpec]
) -> list[tuple[Plan, Prediction]]:
    """Return the predictions of all combinations on all devices, without impossible ones and those of equal shapes.

    On each device, those that lose least come first.

    Raises:
        ScheduleError: If no combination is possible, for instance because the model cannot keep so little.
        TargetError: If one of the devices lacks the formats of all combinations.
    """
    plans = [
        dataclasses.replace(plan, **dict(zip(fields, values)))
        for values in itertools.product(*fields.values())
    ]
    plans.sort(key=_lost)
    return [entry for device in devices for entry in _on_device(plans, device)]


def _on_device(plans: Sequence[Plan], device: DeviceSpec) -> list[tuple[Plan, Prediction]]:
    found: list[tuple[Plan, Prediction]] = []
    refused: ScheduleError | TargetError | None = None
    seen = set()
    for plan in plans:
        try:
            setting = plan.setting()
            shape = (tuple(setting.sizes.items()), setting.schedule, setting.formats.layer)
            if shape not in seen:
                found.append((plan, predict(setting, device)))
                seen.add(shape)
        except (ScheduleError, TargetError) as error:
            refused = error
    if not found and refused is not None:
        raise refused
    return found


def _lost(plan: Plan) -> tuple[float, int, int]:
    """Return the sort key of plans: more kept tokens first, then larger images, then finer weights."""
    width, height = plan.picture or (0, 0)
    return -plan.kept_share, -width * height, PRECISIONS.index(plan.precision)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The setting that meets a goal on one device, or the nearest to it."""

    goal: SpeedGoal
    plan: Plan
    prediction: Prediction
    num_settings: int
    """Number of settings to choose from."""

    @property
    def met(self) -> bool:
        """Whether the setting meets the goal."""
        return self.goal.met_by(self.prediction)

    @property
    def shortfall(self) -> float:
        """Factor by which it is too slow; at most 1 if it is fast enough."""
        return self.goal.shortfall(self.prediction)

    @property
    def text(self) -> str:
        """The setting that meets the goal, or the nearest one, in words."""
        if self.met:
            return f"{self.plan.described()} ({metric_of(self.prediction, self.goal.metric):.3g})"
        return f"no setting; {self.nearest}"

    @property
    def nearest(self) -> str:
        """The nearest setting and what it lacks, in words."""
        lacks = [] if self.prediction.memory.fits else ["does not fit the memory"]
        if self.shortfall > 1:
            lacks.append(f"{self.shortfall:.2g} times too slow")
        return (
            f"{metric_of(self.prediction, self.goal.metric):.3g} as the nearest of {self.num_settings}"
            f" ({self.plan.described()}: {' and '.join(lacks)})"
        )


def choose(found: Sequence[tuple[Plan, Prediction]], goal: SpeedGoal) -> Choice:
    """Return the first combination that meets ``goal``, or the nearest one if none does."""
    choices = [
        Choice(goal=goal, plan=plan, prediction=prediction, num_settings=len(found))
        for plan, prediction in found
    ]
    fitting = [choice for choice in choices if choice.prediction.memory.fits] or choices
    nearest = min(fitting, key=lambda choice: choice.shortfall)
    return next((choice for choice in choices if choice.met), nearest)


def unmet_text(choices: Sequence[Choice]) -> str:
    """Return the message for a goal that no device meets, with the nearest setting of the nearest device."""
    nearest = min(choices, key=lambda choice: choice.shortfall)
    goal = nearest.goal
    side = "at most" if METRICS[goal.metric] else "at least"
    return (
        f"--want: expected a setting with {goal.metric} of {side} {goal.value:g} on"
        f" {', '.join(choice.prediction.device.name for choice in choices)}, got {nearest.nearest}"
        f"{f' on {nearest.prediction.device.name}' if len(choices) > 1 else ''};"
        " sweep more values, ask for fewer --new-tokens, or choose another device"
    )
