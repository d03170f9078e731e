"""``trio-calibrate MODEL --samples … --target … --out DIR``: finds a schedule from samples, and exports a bundle with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from trio_edge.calibration.progress import progress_bars
from trio_edge.calibration.search.options import CalibrationOptions
from trio_edge.runtime.bundle.errors import CheckpointError, DataError, install_command, printable
from trio_edge.runtime.bundle.files import atomic_folder, check_place
from trio_edge.runtime.cli.console import run
from trio_edge.runtime.cli.interruption import ctrl_c_held, interruptible
from trio_edge.runtime.cli.tables import print_table, wide_console
from trio_edge.runtime.model.levels import MARGINS_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PATH = click.Path(path_type=Path)
_REPORT_BYTES = 16 << 20
_WAY_OUT = "choose another --out"
_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in msgspec.structs.fields(CalibrationOptions)
}


def _share(text: str) -> float:
    """Return the share of a percentage such as 11.1%, or of 0.111."""
    number = text.strip()
    return float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)


def _parsed(parse: Callable[[str], Any], what: str) -> Callable[..., Any]:
    """Return a callback for an option that is ``what`` in words."""

    def callback(_context: click.Context, option: click.Parameter, text: str | None) -> Any:
        try:
            return None if text is None else parse(text)
        except ValueError:
            raise click.UsageError(f"{option.opts[0]}: expected {what}, got {text!r}") from None

    return callback


def _list_of(parse: Callable[[str], Any], what: str) -> Callable[..., Any]:
    return _parsed(lambda text: tuple(map(parse, text.split(","))), f"{what} separated by commas")


def _option(name: str, text: str, default: str | None = None, **settings: Any) -> Callable[[Any], Any]:
    """Return an option without a value of its own; its help names the default of ``CalibrationOptions``."""
    shown = default or _DEFAULTS.get(name.removeprefix("--").replace("-", "_"), msgspec.NODEFAULT)
    words = "" if shown in (None, msgspec.NODEFAULT) else f" [default: {shown}]"
    return click.option(name, help=text + words, **settings)


@click.command("trio-calibrate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@_option("--samples", "JSON-lines file, or folder of images (with --prompt).")
@_option("--target", "Device to predict times for; docs/prediction.md has the names.", metavar="DEVICE")
@click.option("--out", type=PATH, help="Folder to create.")
@click.option(
    "--temperatures",
    is_flag=True,
    help="MODEL is a bundle: fit how sure its decisions are on --samples with answers, and store it there.",
)
@click.option(
    "--levels",
    is_flag=True,
    help="MODEL is a bundle with several levels: find on --samples with answers when 'auto' goes up, and store it there.",
)
@click.option(
    "--accuracy",
    metavar="PERCENT",
    callback=_parsed(_share, "a percentage, for instance 99%"),
    help="With --levels: wanted accuracy, as a share of the highest level's. [default: 99%]",
)
@click.option(
    "--mean-flops",
    metavar="PERCENT",
    callback=_parsed(_share, "a percentage, for instance 60%"),
    help="With --levels: wanted mean FLOPs of a prefill, as a share of the highest level's, instead of --accuracy.",
)
@click.option("--config", type=PATH, help="Repeat this calibration.json; other options change it.")
@_option("--prompt", "Question about every image of a folder.")
@_option("--count", "Most samples to use.", "all", type=click.IntRange(1, 1_000_000))
@_option("--seed", "Seed of the split.", type=int)
@_option(
    "--held-out",
    "Share of the images to hold out for the report.",
    f"{_DEFAULTS['held_out']:.1%}",
    metavar="PERCENT",
    callback=_parsed(_share, "a percentage, for instance 33%"),
)
@_option(
    "--max-kl",
    "Choose the cheapest schedule with at most this KL to keep-all, with 95 % confidence.",
    type=float,
    metavar="NATS",
)
@_option("--answer-tokens", "Answer tokens to compare with keep-all's.", type=int)
@_option(
    "--layers",
    "Layers to try stages at.",
    "evenly spread",
    metavar="N,N,…",
    callback=_list_of(int, "numbers"),
)
@_option(
    "--keeps",
    "Budgets to try, as shares of the largest image's visual tokens.",
    ",".join(f"{keep:.0%}" for keep in _DEFAULTS["keeps"]),
    metavar="PERCENT,…",
    callback=_list_of(_share, "percentages"),
)
@_option("--max-stages", "Most stages of a schedule.", type=int)
@_option(
    "--nms-thresholds",
    "NMS similarity thresholds to try.",
    ",".join(map(str, _DEFAULTS["nms_thresholds"])),
    metavar="τ,…",
    callback=_list_of(float, "numbers"),
)
@_option("--evaluations", "Most schedules of several stages to measure.", type=int)
@_option(
    "--cost",
    "Cost to compare schedules by.",
    "auto, predicted time, or FLOPs if no schedule is faster than keep-all",
    type=click.Choice(["auto", "time", "flops"]),
)
@_option("--revision", "Branch, tag or commit on the Hub.")
@_option("--dtype", "Element type of the bundle.", type=click.Choice(["auto", "float16", "float32"]))
@_option(
    "--quantize",
    "Quantize the bundle to int4, int8 or fp8, also by part (docs/quantization.md), with calibrated scales.",
    metavar="FORMAT|PART=FORMAT,…",
)
@_option("--max-visual", "Most visual tokens of an image, in families that can scale images down.", type=int)
@_option("--max-new-tokens", "Most new tokens of an answer.", type=int)
@click.option(
    "--only-image-sizes",
    is_flag=True,
    default=None,
    help="Make no shapes for images larger than the samples.",
)
@_option(
    "--gradients",
    "Samples on which each layer's saliency is compared with the whole model's gradient.",
    type=int,
)
@_option("--device", "torch device to run the samples on.")
@click.option("--work", type=PATH, help="Folder for measurements; an interrupted run continues from it.")
@click.option("--no-export", is_flag=True, help="Write calibration.json, but no bundle.")
@click.option("--force", is_flag=True, help="Replace an existing calibration.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    model: str | None,
    out: Path | None,
    temperatures: bool,
    levels: bool,
    accuracy: float | None,
    mean_flops: float | None,
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
    wanted = {"accuracy": accuracy, "mean_flops": mean_flops}
    goals = {name: value for name, value in wanted.items() if value is not None}
    if len(goals) > 1 or (goals and not levels):
        raise click.UsageError(
            "--accuracy and --mean-flops: expected one of them, and --levels with it, got others; correct it"
        )
    if temperatures or levels:
        others = {
            "out": out,
            "config": config,
            "work": work,
            "force": force or None,
            "no_export": no_export or None,
        }
        given |= {name: value for name, value in others.items() if value is not None}
        if temperatures and levels:
            raise click.UsageError(
                "--temperatures and --levels: expected one of them, got both; run them in turn"
            )
        fit: Callable[..., None] = partial(_find_margins, **dict[str, Any](goals))
        if temperatures:
            fit = _fit_temperatures
        return _fit(fit, model, given, option="--temperatures" if temperatures else "--levels", quiet=quiet)
    if out is None:
        raise click.UsageError("expected --out, got none; name a folder to create")
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
                f" {install_command('calibrate')}"
            ) from None
        options, expected_samples = read_given(model, config, given)
        check_place(out, num_bytes=_REPORT_BYTES, error=DataError, way_out=_WAY_OUT)
        check_out = partial(
            check_output, out, force=force, what="calibration", marker=CALIBRATION_NAME, error=DataError
        )
        check_out()
        with progress_bars("trio-calibrate", quiet=quiet, check=check) as progress:
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
        print(printable(summary_of(calibrated.calibration, out, exported=not no_export), but="\n"))
        return 0


def _fit(
    fit: Callable[..., None], model: str | None, given: dict[str, Any], *, option: str, quiet: bool
) -> int:
    """Call ``fit`` with a bundle and samples: what is found is stored in the bundle, and no torch is needed."""
    wanted = {"samples", "count", "held_out", "seed"}
    if model is None or "samples" not in given or given.keys() - wanted:
        other = next((f"--{name.replace('_', '-')}" for name in given.keys() - wanted), "none")
        raise click.UsageError(
            f"{option}: expected a bundle and --samples, and only --count, --held-out and --seed besides, got {other};"
            " correct it"
        )
    how = {name: _DEFAULTS[name] for name in ("held_out", "seed")} | given
    samples = Path(how.pop("samples"))
    with interruptible(), progress_bars("trio-calibrate", quiet=quiet) as progress:
        fit(Path(model), samples, progress=progress, **how)
    return 0


def _fit_temperatures(bundle: Path, samples: Path, **how: Any) -> None:
    from trio_edge.calibration.temperatures import fit_temperatures

    fitted = fit_temperatures(bundle, samples, **how)
    rows = [
        (
            one.kind,
            f"{one.temperature:.2f}",
            str(one.samples),
            f"{one.before.calibration_error:.4f} -> {one.after.calibration_error:.4f}",
            f"{one.before.log_loss:.4f} -> {one.after.log_loss:.4f}",
        )
        for one in fitted
    ]
    headers = ("kind", "temperature", "samples", "held-out calibration error", "held-out log loss")
    print_table(wide_console(), headers, rows)


def _find_margins(bundle: Path, samples: Path, **how: Any) -> None:
    from trio_edge.calibration.levels import find_margins

    found = find_margins(bundle, samples, **how)
    rows = [
        (
            one.label,
            f"{100 * one.accuracy:.1f} % ({100 * one.interval[0]:.1f} to {100 * one.interval[1]:.1f})",
            f"{100 * one.difference[0]:+.1f} to {100 * one.difference[1]:+.1f}",
            f"{100 * one.flops:.1f} %",
            f"{100 * one.up:.1f} %",
        )
        for one in found.judged
    ]
    headers = ("level", "accuracy", "against the highest, points", "mean FLOPs", "went up")
    title = f"{found.num_held_out} held-out samples; margins found on {found.num_samples} others"
    print_table(wide_console(), headers, rows, title=title)
    margins = ", ".join(f"{name} {margin:g}" for name, margin in found.chain.margins.items())
    print(f"stored in {bundle / MARGINS_NAME}: {margins}")


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
        same = not {"samples", "prompt", "count", "seed"} & given.keys()
        return msgspec.structs.replace(options, **given), samples if same else None
    for name, what in (("model", "MODEL"), ("samples", "--samples"), ("target", "--target")):
        if name not in given:
            raise click.UsageError(f"expected {what}, got none; give it, or --config")
    return CalibrationOptions(**given), None
