"""``trio-profile --predict``: its options."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from trio_edge.profiling.predict.answer import PRECISIONS, Prediction, predict
from trio_edge.profiling.predict.plan import Plan, plan_for
from trio_edge.runtime.bundle.errors import TargetError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.trio.cost.devices import DEVICES, find_device

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


_OPTIONS = (
    click.option(
        "--predict",
        "devices",
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
        callback=lambda _context, _option, text: None if text is None else parse_size(text),
        help="With --predict: image size in pixels. [default: BUNDLE's largest]",
    ),
    click.option(
        "--images",
        "num_images",
        type=click.IntRange(1),
        help="With --predict: images per prompt, or pairs of video frames. [default: as many as BUNDLE allows]",
    ),
    click.option(
        "--dtype",
        "precision",
        type=click.Choice(PRECISIONS),
        help="With --predict: format of the decoder's weights.",
    ),
    click.option(
        "--text",
        "num_text",
        type=click.IntRange(1),
        default=40,
        help="With --predict: text tokens of the prompt.",
    ),
)


PREDICT_NAMES = frozenset({"devices", "model", "keep", "image_size", "num_images", "precision", "num_text"})
"""Parameters of ``predictions_of`` and ``plan_for`` that are options."""
_SHARED = ("bundle", "new_tokens", "json_file")
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
    """Return ``function`` with the options in ``PREDICT_NAMES``."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def predictions_of(
    bundle: Path | None, *, devices: str, model: str | None, **wishes: Any
) -> list[tuple[Plan, Prediction]]:
    """Return the prediction on each of ``devices``; ``wishes`` are keyword arguments of ``plan_for``.

    ``bundle`` is a folder, or None with the name of a ``model``.

    Raises:
        TargetError: If a name cannot be read.
        TrioEdgeError: If the bundle cannot be read, or cannot have the wished shapes.
    """
    if (bundle is None) == (model is None):
        got = "none" if bundle is None else "both"
        raise TargetError(f"--predict: expected a BUNDLE or --model NAME, got {got}; give one of them")
    names = DEVICES if devices.strip() == "all" else map(str.strip, devices.split(","))
    # by name, because a device that is named twice is predicted once
    found = {device.name: device for device in (find_device(name, option="--predict") for name in names)}
    manifest = None if bundle is None else open_bundle(bundle).manifest
    plan = plan_for(manifest=manifest, model=model, **wishes)
    return [(plan, predict(plan.setting(), device)) for device in found.values()]


def parse_size(text: str) -> tuple[int, int]:
    """Return width and height written as ``672x672``.

    Raises:
        TargetError: If the text is not of that form.
    """
    match = re.fullmatch("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if match is None:
        raise TargetError(f"image-size: expected WIDTHxHEIGHT in pixels, got {text!r}; write it as 672x672")
    return int(match[1]), int(match[2])
