"""``trio-calibrate MODEL --samples … --target … --out DIR``: finds a schedule from samples, and exports a bundle with it."""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trio_edge.calibration.search.options import CalibrationOptions
from trio_edge.calibration.search.samples import DEFAULT_SYNTHETIC_COUNT
from trio_edge.calibration.search.schedules.selection_rule import DEFAULT_MAX_KL
from trio_edge.runtime.bundle.errors import CheckpointError, DataError
from trio_edge.runtime.bundle.files import atomic_folder, check_place
from trio_edge.runtime.cli.console import run
from trio_edge.runtime.cli.interruption import ctrl_c_held, interruptible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from trio_edge.calibration.search.schedules.search import SearchProgress

PATH = click.Path(path_type=Path)
_REPORT_BYTES = 16 << 20
_WAY_OUT = "choose another --out"
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(CalibrationOptions)}


def _share(option: str, text: str) -> float:
    """Return the share of a percentage such as 11.1%, or of 0.111."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    if match is None:
        raise click.UsageError(f"{option}: expected a percentage, got {text!r}; for instance 11.1%")
    return float(match[1]) / (100 if match[2] else 1)


def _one(_context: click.Context, option: click.Parameter, text: str | None) -> float | None:
    return None if text is None else _share(option.opts[0], text)


def _shares(_context: click.Context, option: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    return None if text is None else tuple(_share(option.opts[0], part) for part in text.split(","))


def _numbers(kind: type[int | float]) -> Callable[..., tuple[float, ...] | None]:
    def parse(_context: click.Context, option: click.Parameter, text: str | None) -> tuple[float, ...] | None:
        try:
            return None if text is None else tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise click.UsageError(
                f"{option.opts[0]}: expected numbers separated by commas, got {text!r}"
            ) from None

    return parse


@click.command(
    "trio-calibrate", context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.argument("model", required=False)
@click.option(
    "--samples", help="JSON-lines file, folder of images (with --prompt), or 'shapes' (a synthetic set)."
)
@click.option(
    "--target", metavar="DEVICE", help="Device to predict times for; docs/targets.md has the names."
)
@click.option("--out", type=PATH, required=True, help="Folder to create.")
@click.option("--config", type=PATH, help="Repeat this calibration.json; other options change it.")
@click.option("--prompt", help="Question about every image of a folder.")
@click.option(
    "--count",
    type=click.IntRange(1, 1_000_000),
    help=f"Most samples to use. [default: all, {DEFAULT_SYNTHETIC_COUNT} of a synthetic set]",
)
@click.option(
    "--seed", type=int, help=f"Seed of the split and of a synthetic set. [default: {_DEFAULTS['seed']}]"
)
@click.option(
    "--held-out",
    metavar="PERCENT",
    callback=_one,
    help=f"Share of the images to hold out for the report. [default: {_DEFAULTS['held_out']:.1%}]",
)
@click.option(
    "--max-kl",
    type=float,
    metavar="NATS",
    help=f"Choose the cheapest schedule with at most this KL to keep-all, with 95 % confidence. [default: {DEFAULT_MAX_KL:g}]",
)
@click.option(
    "--target-ms",
    type=float,
    metavar="MS",
    help="Choose the lowest KL within this predicted time to the first token.",
)
@click.option(
    "--keep", metavar="PERCENT", callback=_one, help="Choose the lowest KL up to this average keep."
)
@click.option(
    "--answer-tokens",
    type=int,
    help=f"Answer tokens to compare with keep-all's. [default: {_DEFAULTS['answer_tokens']}]",
)
@click.option(
    "--layers",
    metavar="N,N,…",
    callback=_numbers(int),
    help="Layers to try stages at. [default: evenly spread]",
)
@click.option(
    "--keeps",
    metavar="PERCENT,…",
    callback=_shares,
    help="Budgets to try, as shares of the largest image's visual tokens."
    f" [default: {','.join(f'{keep:.0%}' for keep in _DEFAULTS['keeps'])}]",
)
@click.option(
    "--max-stages", type=int, help=f"Most stages of a schedule. [default: {_DEFAULTS['max_stages']}]"
)
@click.option(
    "--nms-thresholds",
    metavar="τ,…",
    callback=_numbers(float),
    help=f"NMS similarity thresholds to try. [default: {','.join(map(str, _DEFAULTS['nms_thresholds']))}]",
)
@click.option(
    "--evaluations",
    type=int,
    help=f"Most schedules of several stages to measure. [default: {_DEFAULTS['evaluations']}]",
)
@click.option(
    "--cost",
    type=click.Choice(["auto", "time", "flops"]),
    help="Cost to compare schedules by. [default: auto, predicted time, or FLOPs if no schedule is faster than keep-all]",
)
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float16", "float32"]),
    help=f"Element type of the bundle. [default: {_DEFAULTS['dtype']}]",
)
@click.option(
    "--quantize",
    metavar="FORMAT|PART=FORMAT,…",
    help="Quantize the bundle to int4, int8 or fp8, also by part (docs/quantization.md), with calibrated scales.",
)
@click.option(
    "--max-visual", type=int, help="Most visual tokens of an image, in families that can scale images down."
)
@click.option(
    "--max-new-tokens",
    type=int,
    help=f"Most new tokens of an answer. [default: {_DEFAULTS['max_new_tokens']}]",
)
@click.option(
    "--only-image-sizes",
    is_flag=True,
    default=None,
    help="Make no shapes for images larger than the samples.",
)
@click.option("--device", help=f"torch device to run the samples on. [default: {_DEFAULTS['device']}]")
@click.option(
    "--work",
    type=PATH,
    help="Folder for measurements. The same command continues an interrupted run from it.",
)
@click.option("--no-export", is_flag=True, help="Write calibration.json and the page, but no bundle.")
@click.option("--force", is_flag=True, help="Replace an existing calibration.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    model: str | None,
    out: Path,
    config: Path | None,
    work: Path | None,
    no_export: bool,
    force: bool,
    quiet: bool,
    **settings: Any,
) -> int:
    """Find the best schedule for your images and prompts, and export MODEL with it.

    MODEL is an alias, a Hub id or a checkpoint folder.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    with interruptible() as check:
        try:
            with ctrl_c_held():  # importing torch turns Ctrl-C into other errors
                from trio_edge.calibration.search.calibrate import calibrate
                from trio_edge.calibration.search.calibration_file import CALIBRATION_NAME
                from trio_edge.calibration.search.output import summary_of, write_calibration
                from trio_edge.export.bundle import check_output
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"trio-calibrate: expected its packages to be installed, got no {error.name};"
                " pip install 'trio-edge[calibrate]'"
            ) from None
        from trio_edge.calibration.search.page import check_plots

        check_plots()
        options, expected_samples = read_given(model, config, given)
        check_place(out, num_bytes=_REPORT_BYTES, error=DataError, way_out=_WAY_OUT)
        check_out = partial(
            check_output, out, force=force, what="calibration", marker=CALIBRATION_NAME, error=DataError
        )
        check_out()
        with _progress(check, quiet=quiet) as progress:
            calibrated = calibrate(options, work=work, samples_sha256=expected_samples, progress=progress)
            with atomic_folder(
                out,
                num_bytes=_REPORT_BYTES,
                error=DataError,
                what="calibration",
                way_out=_WAY_OUT,
                before_rename=check_out,
            ) as folder:
                write_calibration(calibrated, folder, progress, export=not no_export)
        print(summary_of(calibrated.calibration, out, exported=not no_export))
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def read_given(
    model: str | None, config: Path | None, given: dict[str, Any]
) -> tuple[CalibrationOptions, str | None]:
    """Return the options, and the digest of the samples of ``config`` if they are used again.

    ``given`` fields replace those of ``config``, a ``calibration.json``.

    Raises:
        UsageError: If something is missing and there is no config.
        DataError: If the config is not a ``calibration.json``.
    """
    from trio_edge.calibration.search.calibration_file import read_options

    if model is not None:
        given["model"] = model
    if config is not None:
        options, samples = read_options(config)
        if {"max_kl", "target_ms", "keep"} & given.keys():  # only one rule can hold
            given = {"max_kl": None, "target_ms": None, "keep": None, **given}
        same = not {"samples", "prompt", "count", "seed"} & given.keys()
        return msgspec.structs.replace(options, **given), samples if same else None
    for name, what in (("model", "MODEL"), ("samples", "--samples"), ("target", "--target")):
        if name not in given:
            raise click.UsageError(f"expected {what}, got none; give it, or --config")
    return CalibrationOptions(**given), None


@contextmanager
def _progress(check: Callable[[], None], *, quiet: bool) -> Iterator[SearchProgress]:
    """Yield callbacks that show a bar for each step, and that call ``check`` for a Ctrl-C."""
    from trio_edge.calibration.search.schedules.search import SearchProgress

    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=quiet) as bars:
        bar = bars.add_task("", total=None)

        def step(text: str, total: int) -> None:
            check()
            bars.reset(bar, total=total or None, description=text)
            if not console.is_terminal:
                console.print(text)

        def sample() -> None:
            check()
            bars.advance(bar)

        def warn(text: str) -> None:
            visible = Console(stderr=True) if console.quiet else console
            visible.print(f"trio-calibrate: warning: {text}", soft_wrap=True, markup=False, highlight=False)

        yield SearchProgress(step=step, sample=sample, warn=warn)
