"""``trio-profile BUNDLE``: time, memory and energy of a bundle on this machine, as tables, JSON and a page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from click.core import ParameterSource
from rich.console import Console

from trio_edge.profiling.measure.measuring import NEW_TOKENS, PROMPT, MeasureOptions, measure
from trio_edge.profiling.page.page import check_matplotlib, page_html
from trio_edge.profiling.predict.answer import PRECISIONS, predict
from trio_edge.profiling.predict.plan import parse_size, plan_for
from trio_edge.profiling.predict.printing import print_prediction, summary_of
from trio_edge.profiling.report.summary import report_of
from trio_edge.profiling.report.table import print_profile
from trio_edge.runtime.bundle.errors import BundleError, TargetError
from trio_edge.runtime.bundle.files import check_outputs, write_output
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.cli.console import backend_options, run
from trio_edge.runtime.cli.interruption import interruptible
from trio_edge.runtime.cli.tables import wide_console
from trio_edge.runtime.model.levels import one_level
from trio_edge.trio.cost.devices import DEVICES, find_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trio_edge.profiling.report.profile import ProfileReport


PATH = click.Path(path_type=Path)
_PREDICTING = {"devices"}
"""Parameters of ``_predict`` and ``plan_for`` that are options; ``_wish`` adds the others."""
_SHARED = ("bundle", "new_tokens", "level", "json_file")
"""Parameters of both measuring and predicting."""


def _parsed_size(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> tuple[int, int] | None:
    return None if text is None else parse_size(text)


def _wish(name: str, parameter: str, text: str, **settings: Any) -> Callable[[Any], Any]:
    """Return an option that needs --predict."""
    _PREDICTING.add(parameter)
    return click.option(name, parameter, help=f"With --predict: {text}", **settings)


@click.command("trio-profile", context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle", type=PATH, required=False)
@click.option(
    "--compare",
    multiple=True,
    type=PATH,
    metavar="BUNDLE",
    help="Another bundle to measure in turns with the first. Repeatable.",
)
@backend_options()
@click.option("--image", type=PATH, help="Image to ask about. [default: random pixels]")
@click.option("--prompt", help=f"Question to ask. [default: {PROMPT}]")
@click.option(
    "--new-tokens", type=click.IntRange(1), help="Tokens of each answer. [default: 16, or the bundles' limit]"
)
@click.option(
    "--runs", type=click.IntRange(1), help="Answers per bundle. [default: as many as stable medians need]"
)
@click.option("--warm-up", type=click.IntRange(0), default=3, help="Answers before the measured ones.")
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), default=30.0,
    help="Start no new run after this time, unless --runs is given."
)  # fmt: skip
@click.option("--layers/--no-layers", default=True, help="Also time every layer, in separate runs.")
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="Write all values to this JSON file.")
@click.option(
    "--html", "html_file", type=PATH, metavar="FILE", help="Write a page with plots (needs matplotlib)."
)
@click.option("--level", metavar="NAME", help="Level of bundles with several. [default: the bundle's]")
@click.option(
    "--predict",
    "devices",
    metavar="DEVICE",
    help="Predict the times on this device and measure nothing; several names separated by commas, or all.",
)
@_wish("--model", "model", "predict for a released model instead of BUNDLE.", metavar="NAME")
@_wish("--keep", "keep", "average keep. [default: BUNDLE's schedule]", metavar="PERCENT")
@_wish(
    "--image-size", "image_size", "image size in pixels. [default: BUNDLE's largest]",
    metavar="WxH", callback=_parsed_size,
)  # fmt: skip
@_wish(
    "--image-form", "image_form", "form of the image, as of a level: base, or WxH. [default: the whole]",
    metavar="FORM",
)  # fmt: skip
@_wish(
    "--images", "num_images",
    "images per prompt, or pairs of video frames. [default: as many as BUNDLE allows]", type=click.IntRange(1),
)  # fmt: skip
@_wish(
    "--quantize", "precision", "weight format of the decoder. [default: BUNDLE's, or none]",
    type=click.Choice([*PRECISIONS]), callback=lambda _context, _option, name: PRECISIONS.get(name),
)  # fmt: skip
@_wish("--text", "num_text", "text tokens of the prompt.", type=click.IntRange(1), default=40)
def command(
    bundle: Path | None,
    compare: tuple[Path, ...],
    new_tokens: int | None,
    level: str | None,
    json_file: Path | None,
    html_file: Path | None,
    **settings: Any,
) -> int:
    """Measure BUNDLE on this machine: time per graph, memory, energy, and the share of the machine's peak rates.

    With --predict, predict the times on another device instead.
    """
    predicting = {name: settings.pop(name) for name in _PREDICTING}
    _check_given(predicting=predicting["devices"] is not None)
    named = {"--json": json_file, "--html": html_file}
    outputs = {option: path for option, path in named.items() if path is not None}
    check_outputs(outputs)
    if html_file is not None:
        check_matplotlib()
    if predicting["devices"] is not None:
        _predict(bundle, json_file, num_new=new_tokens or NEW_TOKENS, level=level, **predicting)
        return 0
    if not math.isfinite(settings["seconds"]):  # click's ranges let "nan" pass
        raise click.UsageError(f"--seconds: expected a time, got {settings['seconds']}; for instance 30")
    if bundle is None:
        raise BundleError("BUNDLE: expected a bundle folder, got none; make one with trio-export")
    _profile(outputs, bundles=(bundle, *compare), new_tokens=new_tokens, level=level, **settings)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _check_given(*, predicting: bool) -> None:
    """Raise TargetError if the command was given an option of measuring with --predict, or the other way round."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in _SHARED or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if (name in _PREDICTING) != predicting:
            option = parameter.opts[0]
            if predicting:
                raise TargetError(f"{option}: expected no --predict with it, got both; leave one out")
            raise TargetError(
                f"{option}: expected --predict DEVICE with it, got none; add it, or leave out {option}"
            )


def _predict(
    bundle: Path | None,
    json_file: Path | None,
    *,
    devices: str,
    model: str | None,
    level: str | None,
    **wishes: Any,
) -> None:
    """Predict for each of ``devices``; ``wishes`` are keyword arguments of ``plan_for``.

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
    if level is not None and bundle is None:
        raise TargetError("--level: expected a BUNDLE with it, got none; leave out --level")
    manifest = None if bundle is None else open_bundle(bundle).manifest
    if manifest is not None:
        manifest = manifest.at_level(one_level(manifest, level))
    setting = plan_for(manifest=manifest, model=model, **wishes)
    predictions = [predict(setting, device) for device in found.values()]
    if json_file is not None:
        values = {"prediction": True, "found": [summary_of(one) for one in predictions]}
        write_output("--json", json_file, _json(values))
    console = wide_console()  # last, so that the file is there if the output is closed early
    for prediction in predictions:
        print_prediction(console, prediction)


def _profile(outputs: dict[str, Path], **settings: Any) -> None:
    console = Console(stderr=True)
    with interruptible(), console.status("") as status:
        if console.is_terminal:
            settings["on_step"] = status.update
        measurement = measure(MeasureOptions(**settings))
    report = report_of(measurement)
    contents: dict[str, Callable[[ProfileReport], bytes]] = {"--json": _json, "--html": page_html}
    for option, path in outputs.items():
        write_output(option, path, contents[option](report))
    print_profile(report)


def _json(values: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(values), indent=1) + b"\n"
