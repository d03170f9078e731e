"""``trio-profile --predict``: its options, and its output."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from trio_edge.profiling.predict.answer import PRECISIONS
from trio_edge.profiling.predict.plan import plan_for
from trio_edge.profiling.predict.printing import goal_summary, print_prediction, print_sweep, summary_of
from trio_edge.profiling.predict.sweep import choose, parse_goal, parse_size, parse_sweep, sweep, unmet_text
from trio_edge.runtime.bundle.errors import TargetError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.cli.tables import wide_console
from trio_edge.trio.cost.devices import DEVICES, find_device

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trio_edge.profiling.predict.answer import Precision, Prediction
    from trio_edge.profiling.predict.plan import Plan
    from trio_edge.profiling.predict.sweep import Choice
    from trio_edge.trio.cost.devices import DeviceSpec

_GOAL_AXES = "keep,image-size,dtype"
_OPTIONS = (
    click.option(
        "--predict",
        metavar="DEVICE",
        help="Predict the times on this device and measure nothing; several names separated by commas, or all.",
    ),
    click.option(
        "--model", metavar="NAME", help="With --predict: predict for a released model instead of BUNDLE."
    ),
    click.option(
        "--keep", metavar="PERCENT", help="With --predict: average keep. [default: BUNDLE's schedule]"
    ),
    click.option(
        "--image-size",
        metavar="WxH",
        help="With --predict: image size in pixels. [default: BUNDLE's largest]",
    ),
    click.option(
        "--images",
        type=click.IntRange(1),
        help="With --predict: images per prompt, or pairs of video frames. [default: as many as BUNDLE allows]",
    ),
    click.option(
        "--dtype", type=click.Choice(PRECISIONS), help="With --predict: format of the decoder's weights."
    ),
    click.option(
        "--text", type=click.IntRange(1), default=40, help="With --predict: text tokens of the prompt."
    ),
    click.option(
        "--sweep",
        metavar="AXES",
        help="With --predict: predict all combinations of keep, image-size and dtype, such as keep=33.3%/11.1%,dtype.",
    ),
    click.option(
        "--want",
        metavar="METRIC=NUMBER",
        help="With --predict: find the setting that reaches answers-per-second, tokens-per-second or ttft-ms.",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictOptions:
    """Values of the options."""

    predict: str | None
    model: str | None
    keep: str | None
    image_size: str | None
    images: int | None
    dtype: Precision | None
    text: int
    sweep: str | None
    want: str | None


PREDICT_NAMES = frozenset(field.name for field in dataclasses.fields(PredictOptions))
_SHARED = ("bundle", "new_tokens", "json_file", "html_file")
"""Parameters of both measuring and predicting."""


def check_given(*, predicting: bool) -> None:
    """Raise TargetError if the command was given an option of measuring with --predict, or the other way round."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in _SHARED or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if (name in PREDICT_NAMES) != predicting:
            option = parameter.opts[0]
            if predicting:
                raise TargetError(f"{option}: expected no --predict with it, got both; leave one out")
            raise TargetError(
                f"{option}: expected --predict DEVICE with it, got none; add it, or leave out {option}"
            )


def predict_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with the options of ``PredictOptions``, which it receives by their names."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """The result of ``trio-profile --predict``."""

    values: dict[str, Any]
    """Content of the JSON."""
    found: list[tuple[Plan, Prediction]]
    is_sweep: bool
    choices: list[Choice]
    """One choice per device, if there is a goal."""

    @property
    def unmet(self) -> str | None:
        """The error message if there is a goal that no device meets."""
        if not self.choices or any(choice.met for choice in self.choices):
            return None
        return unmet_text(self.choices)


def run_prediction(options: PredictOptions, *, bundle: Path | None, num_new: int) -> Predictions:
    """Return the predictions for ``options``; ``bundle`` is a folder, or None if the options name a model.

    Raises:
        TargetError: If a name, a sweep or a goal cannot be read.
        TrioEdgeError: If the bundle cannot be read, or cannot have the wished shapes.
    """
    if (bundle is None) == (options.model is None):
        got = "none" if bundle is None else "both"
        raise TargetError(f"--predict: expected a BUNDLE or --model NAME, got {got}; give one of them")
    devices = _devices(options.predict or "")
    plan = plan_for(
        manifest=None if bundle is None else open_bundle(bundle).manifest,
        model=options.model,
        keep=options.keep,
        picture=None if options.image_size is None else parse_size(options.image_size),
        precision=options.dtype,
        num_text=options.text,
        num_new=num_new,
        num_images=options.images,
    )
    goal = None if options.want is None else parse_goal(options.want)
    axes = _GOAL_AXES if options.sweep is None and goal is not None else options.sweep
    found = sweep(plan, {} if axes is None else parse_sweep(axes), devices)
    values: dict[str, Any] = {"prediction": True, "found": [summary_of(*entry) for entry in found]}
    choices: list[Choice] = []
    if goal is not None:
        choices = [
            choose([entry for entry in found if entry[1].device == device], goal) for device in devices
        ]
        values["wish"] = goal_summary(choices)
        values["chosen"] = [summary_of(choice.plan, choice.prediction) for choice in choices if choice.met]
    return Predictions(values=values, found=found, is_sweep=axes is not None, choices=choices)


def print_predictions(predictions: Predictions) -> None:
    """Print the predictions to standard output."""
    console = wide_console()
    if predictions.is_sweep:
        print_sweep(console, predictions.found)
    else:
        for plan, prediction in predictions.found:
            print_prediction(console, plan, prediction)
    for choice in predictions.choices:
        goal = f"[bold]{choice.goal.metric} {choice.goal.value:g}[/]"
        text = f"{goal} on {choice.prediction.device.name}: {choice.text}"
        console.print(text, highlight=False, soft_wrap=True)


def _devices(text: str) -> list[DeviceSpec]:
    if text.strip() == "all":
        return list(DEVICES.values())
    named = [find_device(name.strip(), option="--predict") for name in text.split(",")]
    return list({device.name: device for device in named}.values())
