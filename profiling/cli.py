"""``trio-profile BUNDLE``: time, memory and energy of a bundle on this machine, as tables, JSON, a trace and a page."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec
from rich.console import Console

from trio_edge.profiling.measure.machine_info import find_governor, find_power_mode, load_average
from trio_edge.profiling.measure.measuring import NEW_TOKENS, PROMPT, MeasureOptions, measure
from trio_edge.profiling.page.figures import check_matplotlib
from trio_edge.profiling.predict.options import (
    PREDICT_NAMES,
    PredictOptions,
    check_given,
    predict_options,
    predictions_of,
)
from trio_edge.profiling.predict.printing import print_prediction, summary_of
from trio_edge.profiling.report.profile import ProfileConditions
from trio_edge.profiling.report.summary import report_of
from trio_edge.profiling.report.table import print_profile
from trio_edge.runtime.backends.registry import with_accuracy
from trio_edge.runtime.bundle.errors import BundleError
from trio_edge.runtime.bundle.files import check_outputs, write_output
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.cli.console import backend_options, run
from trio_edge.runtime.cli.tables import wide_console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.profiling.measure.measuring import Measurement

PATH = click.Path(path_type=Path)


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
@click.option("--trace", "trace_file", type=PATH, metavar="FILE",
              help="Write a trace for Perfetto or chrome://tracing.")  # fmt: skip
@predict_options
def command(
    bundle: Path | None,
    compare: tuple[Path, ...],
    new_tokens: int | None,
    json_file: Path | None,
    html_file: Path | None,
    trace_file: Path | None,
    **settings: Any,
) -> int:
    """Measure BUNDLE on this machine: time per graph, memory, energy, and the share of the machine's peak rates.

    With --predict, predict the times on another device instead.
    """
    wishes = PredictOptions(**{name: settings.pop(name) for name in PREDICT_NAMES})
    check_given(predicting=wishes.predict is not None)
    outputs = _Outputs(json=json_file, html=html_file, trace=trace_file)
    _check(outputs)
    if wishes.predict is not None:
        _predict(wishes, outputs, bundle=bundle, num_new=new_tokens or NEW_TOKENS)
        return 0
    if not math.isfinite(settings["seconds"]):  # click's ranges let "nan" pass
        raise click.UsageError(f"--seconds: expected a time, got {settings['seconds']}; for instance 30")
    if bundle is None:
        raise BundleError("BUNDLE: expected a bundle folder, got none; make one with trio-export")
    _profile(MeasureOptions(bundles=(bundle, *compare), new_tokens=new_tokens, **settings), outputs)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


class _Outputs(NamedTuple):
    """Files to write, each if it is wanted."""

    json: Path | None
    html: Path | None
    trace: Path | None


def _check(outputs: _Outputs) -> None:
    """Raise before minutes of measuring if a file could not be written after them."""
    named = {"--json": outputs.json, "--html": outputs.html, "--trace": outputs.trace}
    check_outputs({option: path for option, path in named.items() if path is not None})
    if outputs.html is not None:
        check_matplotlib("--html", extra="profile")


def _predict(wishes: PredictOptions, outputs: _Outputs, *, bundle: Path | None, num_new: int) -> None:
    found = predictions_of(wishes, bundle=bundle, num_new=num_new)
    if outputs.json is not None:
        values = {"prediction": True, "found": [summary_of(*entry) for entry in found]}
        write_output("--json", outputs.json, _json(values))
    console = wide_console()  # last, so that the file is there if the output is closed early
    for plan, prediction in found:
        print_prediction(console, plan, prediction)


def _profile(options: MeasureOptions, outputs: _Outputs) -> None:
    for folder in options.bundles:
        open_bundle(folder)
    # before the first run, after which the load is this program's own
    busy, started = load_average(), datetime.datetime.now(datetime.timezone.utc)
    console = Console(stderr=True)
    with console.status("") as status:
        measurement = measure(options, on_step=status.update if console.is_terminal else lambda _step: None)
    report = report_of(measurement, _conditions(measurement, options, started=started, busy=busy))
    if outputs.json is not None:
        write_output("--json", outputs.json, _json(report))
    if outputs.html is not None:
        from trio_edge.profiling.page.page import page_html

        write_output("--html", outputs.html, page_html(report))
    if outputs.trace is not None:
        from trio_edge.profiling.report.trace import trace_json

        labels = [profile.label for profile in report.bundles]
        write_output("--trace", outputs.trace, trace_json(measurement, labels))
    print_profile(report)


def _json(values: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(values), indent=1) + b"\n"


def _conditions(
    measurement: Measurement, options: MeasureOptions, *, started: datetime.datetime, busy: float | None
) -> ProfileConditions:
    return ProfileConditions(
        started=started.isoformat(timespec="seconds"),
        backend=with_accuracy(measurement.backend_name, options.cpu_accuracy),
        threads=options.threads,
        clock=measurement.clock,
        power_mode=find_power_mode(),
        cpu_governor=find_governor(),
        load_average=busy,
        picture=measurement.question.image_words,
        prompt=measurement.question.prompt,
        new_tokens=measurement.question.new_tokens,
        warm_up=options.warm_up,
        runs=len(measurement.measured[0].answers),
        stopped=measurement.stopped,
        sensors=measurement.sensors,
        missing=measurement.missing,
    )
