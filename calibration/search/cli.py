"""``trio-calibrate MODEL --samples … --target … --out DIR``: a schedule found from samples, and a bundle with it."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trio_edge.runtime.bundle.errors import CheckpointError, DataError
from trio_edge.runtime.bundle.files import atomic_folder, check_place
from trio_edge.runtime.cli.console import run
from trio_edge.runtime.cli.interruption import ctrl_c_held, interruptible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from trio_edge.calibration.search.calibrate import Calibrated
    from trio_edge.calibration.search.calibrate import Progress as Callbacks
    from trio_edge.calibration.search.report.calibration_file import Calibration, Options
    from trio_edge.export.options import ExportOptions

_REPORT_BYTES = 16 << 20
_WAY_OUT = "choose another --out"


@click.command("trio-calibrate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option(
    "--samples", help="'shapes' (synthetic), a JSON-lines file, or a folder of pictures with --prompt."
)
@click.option(
    "--target", metavar="DEVICE", help="Device to predict times for: docs/targets.md has the names."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to create.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="Repeat a calibration.json; other options win."
)
@click.option("--prompt", help="What is asked about every picture of a folder.")
@click.option("--count", type=click.IntRange(2), help="Samples at most.")
@click.option(
    "--seed", type=click.IntRange(0), help="Of the split, and of the synthetic samples. [default: 0]"
)
@click.option(
    "--held-out", metavar="PERCENT", help="Pictures that only the report looks at. [default: 33.3%]"
)
@click.option(
    "--max-kl", type=float, metavar="NATS", help="Choose the cheapest surely within this KL. [default: 0.05]"
)
@click.option(
    "--target-ms", type=float, metavar="MS", help="Choose the lowest KL within this predicted time."
)
@click.option("--keep", metavar="PERCENT", help="Choose the lowest KL within this average keep.")
@click.option("--answer-tokens", type=int, help="Answer tokens compared with keep-all's. [default: 4]")
@click.option("--layers", metavar="N,N,…", help="Candidate stage layers. [default: evenly spread]")
@click.option(
    "--keeps", metavar="PERCENT,…", help="Candidate budgets of the largest picture's visual tokens."
)
@click.option("--max-stages", type=int, help="Stages at most. [default: 3]")
@click.option(
    "--nms-thresholds", metavar="τ,…", help="Candidate similarity thresholds. [default: 0.7,0.8,0.9]"
)
@click.option("--evaluations", type=int, help="Schedules of several stages measured, at most. [default: 120]")
@click.option(
    "--cost",
    type=click.Choice(["auto", "time", "flops"]),
    help="What is traded against error. [default: auto: time where a schedule is predicted to save some]",
)
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float16", "float32"]), help="Element type of the bundle."
)
@click.option(
    "--quantize",
    metavar="FORMAT|PART=FORMAT,…",
    help="Formats of the bundle's parts, which are calibrated: int4, int8, fp8 or by part (docs/quantization.md).",
)
@click.option(
    "--max-visual", type=int, help="Most visual tokens of a picture, where the family can scale down."
)
@click.option("--max-new-tokens", type=int, help="Room for the answer. [default: 256]")
@click.option(
    "--only-image-sizes", is_flag=True, default=None, help="No shapes for pictures larger than the samples."
)
@click.option("--device", help="torch's device to run samples on. [default: cpu]")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Folder of measurements; an interrupted run goes on."
)
@click.option("--no-export", is_flag=True, help="Write calibration.json and the page only, no bundle.")
@click.option("--force", is_flag=True, help="Replace an existing calibration.")
@click.option("--quiet", is_flag=True, help="No progress display.")
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
    """Find a schedule for MODEL (an alias, a Hub id or a checkpoint folder) from your pictures and prompts."""
    given = {name: value for name, value in settings.items() if value is not None}
    for name in ("held_out", "keep"):
        if name in given:
            given[name] = _share(name, given[name])
    for name, parse in (("layers", int), ("keeps", _share_in_list), ("nms_thresholds", float)):
        if name in given:
            given[name] = _list(name, given[name], parse)
    with interruptible() as check:
        try:
            with ctrl_c_held():
                from trio_edge.calibration.search.calibrate import calibrate
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"trio-calibrate: expected its packages to be installed, got no {error.name};"
                " pip install 'trio-edge[calibrate]'"
            ) from None
        from trio_edge.calibration.search.report.page import check_plots

        check_plots()
        options, expected_samples = read_given(model, config, given)
        check_place(out, num_bytes=_REPORT_BYTES, error=DataError, way_out=_WAY_OUT)
        _check_out(out, force=force)
        with _progress(check, quiet=quiet) as progress:
            calibrated = calibrate(options, work=work, samples_sha256=expected_samples, progress=progress)
            with atomic_folder(
                out,
                num_bytes=_REPORT_BYTES,
                error=DataError,
                what="calibration",
                way_out=_WAY_OUT,
                before_rename=lambda: _check_out(out, force=force),
            ) as folder:
                _write(calibrated, folder, progress, export=not no_export)
        print(_summary(calibrated.calibration, out, exported=not no_export))
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def read_given(model: str | None, config: Path | None, given: dict[str, Any]) -> tuple[Options, str | None]:
    """Return the options, and the digest of the samples that a config was made with if they are asked for again.

    Args:
        model: MODEL, if it was given.
        config: A ``calibration.json``, if one was given.
        given: Fields of ``Options`` that were given beside it, which win.

    Raises:
        UsageError: If without a config something is missing.
        DataError: If the config is not one.
    """
    import msgspec

    from trio_edge.calibration.search.report.calibration_file import Options, read_options

    if model is not None:
        given["model"] = model
    if config is not None:
        options, samples = read_options(config)
        if {"max_kl", "target_ms", "keep"} & given.keys():  # another rule replaces the config's
            given = {"max_kl": None, "target_ms": None, "keep": None, **given}
        same = not {"samples", "prompt", "count", "seed"} & given.keys()
        return msgspec.structs.replace(options, **given), samples if same else None
    for name, what in (("model", "MODEL"), ("samples", "--samples"), ("target", "--target")):
        if name not in given:
            raise click.UsageError(f"expected {what}, got none; give it, or --config")
    return Options(**given), None


def _check_out(out: Path, *, force: bool) -> None:
    """Raise DataError if ``out`` exists and may not be replaced."""
    from trio_edge.calibration.search.report.calibration_file import CALIBRATION_NAME

    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise DataError(f"{out}: expected no such folder, it exists; choose another --out or add --force")
    if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not (out / CALIBRATION_NAME).exists()):
        raise DataError(f"{out}: expected a calibration to replace, got something else; choose another --out")


def _write(calibrated: Calibrated, folder: Path, progress: Callbacks, *, export: bool) -> None:
    from trio_edge.calibration.search.report.calibration_file import (
        BUNDLE_NAME,
        CALIBRATION_NAME,
        REPORT_NAME,
        json_of,
    )
    from trio_edge.calibration.search.report.page import page_of

    calibration = calibrated.calibration
    (folder / CALIBRATION_NAME).write_bytes(json_of(calibration))
    page = page_of(calibration, calibrated.overlays, command=_export_command(calibration))
    (folder / REPORT_NAME).write_text(page, encoding="utf-8")
    if export:
        from trio_edge.export.bundle import export_bundle
        from trio_edge.export.options import Progress as ExportProgress

        export_bundle(
            _export_options(calibration, folder / BUNDLE_NAME),
            schedule_for=lambda _inputs: calibration.schedule,
            scales=calibrated.scales,
            progress=ExportProgress(step=lambda text: progress.step(text, 0)),
        )


def _export_options(calibration: Calibration, out: Path) -> ExportOptions:
    from trio_edge.export.options import ExportOptions
    from trio_edge.export.quantize.plan import parse_plan

    options, shapes = calibration.options, calibration.shapes
    return ExportOptions(
        model=options.model,
        out=out,
        revision=options.revision,
        dtype=options.dtype,
        image_sizes=shapes.image_sizes,
        only_image_sizes=options.only_image_sizes,
        max_visual=options.max_visual,
        max_text=shapes.text_buckets[-1],
        text_buckets=shapes.text_buckets,
        max_new_tokens=options.max_new_tokens,
        quantize=parse_plan(options.quantize),
    )


def _export_command(calibration: Calibration) -> str:
    """Return the command that makes the same bundle; calibrated factors are in no command line of ``trio-export``."""
    if calibration.quantization is not None:
        return "trio-calibrate --config calibration.json --out AGAIN"
    options, schedule, shapes = calibration.options, calibration.schedule, calibration.shapes
    parts = ["trio-export", options.model]
    if schedule.stages:
        stages = ",".join(f"{stage.layer}:{stage.keep}" for stage in schedule.stages)
        parts += ["--schedule", stages, "--probe-rows", schedule.probe_rows]
        parts += ["--nms-threshold", f"{schedule.nms_threshold:g}", "--nms-rounds", str(schedule.nms_rounds)]
    else:
        parts += ["--keep", "all"]
    parts += ["--positions", schedule.positions]
    parts += [word for size in shapes.image_sizes for word in ("--image-size", "{}x{}".format(*size))]
    parts += ["--only-image-sizes"] if options.only_image_sizes else []
    parts += ["--max-visual", str(options.max_visual)] if options.max_visual is not None else []
    parts += ["--revision", options.revision] if options.revision is not None else []
    parts += ["--max-text", str(shapes.text_buckets[-1])]
    parts += ["--text-buckets", ",".join(map(str, shapes.text_buckets))]
    parts += ["--max-new-tokens", str(options.max_new_tokens), "--dtype", options.dtype]
    parts += ["--quantize", options.quantize] if options.quantize != "none" else []
    return " ".join(parts)


def _summary(calibration: Calibration, out: Path, *, exported: bool) -> str:
    from trio_edge.calibration.search.report.calibration_file import BUNDLE_NAME, REPORT_NAME

    chosen = calibration.chosen
    stages = ", ".join(f"layer {layer}: {keep}" for layer, keep in chosen.stages) or "none"
    kl, agreement = chosen.held_out.kl, chosen.held_out.agreement
    within = f"({kl.interval_95[0]:.4f} to {kl.interval_95[1]:.4f})"
    same = f"({100 * agreement.interval_95[0]:.1f} to {100 * agreement.interval_95[1]:.1f})"
    flops, milliseconds = chosen.flops / 1e9, chosen.first_token_ms
    whole_flops, whole_ms = calibration.keep_all_flops / 1e9, calibration.keep_all_ms
    lines = [
        f"{calibration.rule}: stages {stages}, average keep {100 * chosen.average_keep:.1f} %",
        f"held out, {chosen.held_out.samples} samples: KL {kl.value:.4f} {within} nats",
        f"same answer as keep-all: {100 * agreement.value:.1f} {same} %",
        *_quantized_lines(calibration),
        f"to the first token: {flops:.4g} GFLOPs (keep-all {whole_flops:.4g})",
        f"predicted for {calibration.options.target}: {milliseconds:.3g} ms (keep-all {whole_ms:.3g})",
        f"{out / REPORT_NAME}{f', {out / BUNDLE_NAME}' if exported else ''}",
    ]
    return "\n".join(lines)


def _quantized_lines(calibration: Calibration) -> list[str]:
    found = calibration.quantized_held_out
    if found is None:
        return []
    low, high = found.kl.interval_95
    within, same = f"({low:.4f} to {high:.4f})", 100 * found.agreement.value
    return [
        f"with {calibration.options.quantize}, held out: KL {found.kl.value:.4f} {within} nats, same answer {same:.1f} %"
    ]


def _share(name: str, text: str) -> float:
    """Return the share that a percentage such as 11.1% (or 0.111) is."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    if match is None:
        option = name.replace("_", "-")
        raise click.UsageError(f"--{option}: expected a percentage, got {text!r}; for instance 11.1%")
    return float(match[1]) / (100 if match[2] else 1)


def _share_in_list(text: str) -> float:
    return _share("keeps", text)


def _list(name: str, text: str, parse: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(parse(part) for part in text.split(","))
    except ValueError:
        option = name.replace("_", "-")
        raise click.UsageError(f"--{option}: expected numbers with commas between, got {text!r}") from None


@contextmanager
def _progress(check: Callable[[], None], *, quiet: bool) -> Iterator[Callbacks]:
    """Yield callbacks that show a bar for each step; they notice a Ctrl-C that was lost."""
    from trio_edge.calibration.search.calibrate import Progress as Callbacks

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

        yield Callbacks(step=step, sample=sample, warn=warn)
