"""``trio-export MODEL --out BUNDLE`` and ``optimum-cli export trio --model MODEL BUNDLE``: checkpoint to bundle."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.cli.console import run
from trio_edge.runtime.cli.interruption import ctrl_c_held, interruptible
from trio_edge.trio.methods import DEFAULT_METHOD, STAGE_METHODS, TOKEN_METHODS, described

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trio_edge.export.options import ExportOptions, ScheduleInputs
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.bundle.schedule import Schedule

DEFAULT_KEEP = "11.1%"
_SCHEDULE_SETTINGS = ("probe_rows", "num_probe_rows", "nms_threshold", "nms_rounds", "positions", "budget")


def _image_size(text: str) -> tuple[int, int]:
    """Return width and height."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise click.UsageError(
            f"--image-size: expected WIDTHxHEIGHT in pixels, got {text!r}; for instance 640x480"
        )
    return int(match[1]), int(match[2])


def _text_buckets(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(
            f"--text-buckets: expected numbers with commas between, got {text!r}; for instance 32,64"
        ) from None


def _count(option: str) -> Callable[[str], int | float]:
    """Return the parser of ``option``: a number, or a share below 1 for a percentage."""

    def parse(text: str) -> int | float:
        match = re.fullmatch(r"(\d{1,2}(?:\.\d+)?)%|(\d{1,6})", text)
        if match is None or (match[1] is not None and float(match[1]) == 0):
            raise click.UsageError(
                f"{option}: expected a number or a percentage, got {text!r}; for instance 96 or 16.7%"
            )
        return int(match[2]) if match[1] is None else float(match[1]) / 100

    return parse


@click.command("trio-export", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to create (default: MODEL's name).")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option(
    "--keep",
    metavar="PERCENT",
    help="Average over all layers, of the image's tokens before any reduction, for instance 11.1%; 'all' for no"
    f" reduction in the decoder. [default: {DEFAULT_KEEP}]",
)
@click.option("--schedule", "stages", metavar="STAGES", help="Stages as LAYER:KEEP,…; instead of --keep.")
@click.option(
    "--method",
    type=click.Choice(tuple(STAGE_METHODS)),
    help=f"Selector of visual tokens inside the decoder. {described(STAGE_METHODS)}. [default: {DEFAULT_METHOD}]",
)
@click.option(
    "--token-method",
    type=click.Choice(tuple(TOKEN_METHODS)),
    help="Selector of visual tokens before the decoder; combines with --keep all or any --method."
    f" {described(TOKEN_METHODS)}.",
)
@click.option(
    "--token-keep",
    type=_count("--token-keep"),
    metavar="N|PERCENT",
    help="Visual tokens that --token-method passes on.",
)
@click.option(
    "--clip",
    metavar="MODEL",
    help="CLIP model (folder or Hub id) of the vision tower:"
    f" {' and '.join(row.name for row in TOKEN_METHODS.values() if row.takes_clip)} then compare the question in its space.",
)
@click.option(
    "--probe-rows",
    type=click.Choice(["auto", "reference", "answer"]),
    help="Prompt rows with the proxy loss: 'reference' is S-5..S-2, 'answer' is S-4..S-1; 'auto' takes 'answer' where"
    " the average keep is below 10%. [default: auto]",
)
@click.option("--num-probe-rows", type=int, help="How many of them.")
@click.option("--nms-threshold", type=float, help="Cosine similarity at which a token suppresses another.")
@click.option("--nms-rounds", type=int, help="Rounds of the parallel NMS.")
@click.option("--positions", type=click.Choice(["compact", "preserved"]), help="Position ids after a stage.")
@click.option(
    "--budget",
    type=click.Choice(["prompt", "image"]),
    help="With --max-images: 'prompt' keeps the best tokens of all images together, 'image' an equal share of each at least."
    " [default: prompt]",
)
@click.option(
    "--encoder-keep",
    type=_count("--encoder-keep"),
    metavar="N|PERCENT",
    help="Patches that the vision encoder keeps per tile (a multiple of 32), tokens per image (Qwen2.5-VL), or 33.3%.",
)
@click.option(
    "--image-size",
    "image_sizes",
    multiple=True,
    type=_image_size,
    metavar="WxH",
    help="Exact shapes for images of this size (a fixed camera); may be repeated.",
)
@click.option(
    "--only-image-sizes", is_flag=True, default=None, help="No shapes for images of any other size."
)
@click.option(
    "--max-visual",
    type=int,
    help="Most visual tokens of an image, where the family can scale down: Qwen-VL (pixels), InternVL, LLaVA-OneVision and"
    " SmolVLM2 (tiles).",
)
@click.option(
    "--max-images",
    type=int,
    help="Images of a prompt, each of the largest size; --keep is then a share of the tokens of all. [default: 1]",
)
@click.option(
    "--max-frames",
    type=int,
    help="Frames of a video (Qwen-VL): room for half as many images, as two frames are seen together.",
)
@click.option(
    "--follow-ups",
    is_flag=True,
    default=None,
    help="Let a further question about kept images start at its own rows in the first layer range; for bundles with --keep all.",
)
@click.option("--max-text", type=int, help="Largest prompt in text tokens.")
@click.option(
    "--text-buckets",
    type=_text_buckets,
    metavar="N,N,…",
    help="Sizes that prompts are padded to, below --max-text.",
)
@click.option("--max-new-tokens", type=int, help="Room for the answer.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float16", "float32"]), help="Element type of the graphs."
)
@click.option(
    "--quantize",
    metavar="FORMAT|PART=FORMAT,…",
    help="int4, int8 or fp8 for the decoder, or by part: suffix=int4,head=int8,vision=none (docs/quantization.md).",
)
@click.option("--opset", type=int, help="ONNX opset, 18 or 19.")
@click.option(
    "--target", metavar="DEVICE", help="Warn if the bundle cannot fit it: docs/targets.md has the names."
)
@click.option("--force", is_flag=True, default=None, help="Replace an existing bundle.")
@click.option("--list", "list_models", is_flag=True, help="Print the known model names and exit.")
@click.option("--quiet", is_flag=True, help="No progress display.")
def command(
    model: str | None,
    out: Path | None,
    keep: str | None,
    stages: str | None,
    list_models: bool,
    quiet: bool,
    method: str | None,
    quantize: str | None,
    **settings: Any,
) -> int:
    """Export MODEL (an alias, a Hub id or a checkpoint folder) into a bundle.

    Hub downloads use huggingface_hub's own settings: the token of 'hf auth login' or HF_TOKEN, the cache under
    HF_HOME, and HF_HUB_OFFLINE=1 for no network.
    """
    if list_models:
        _print_models()
        return 0
    if model is None:
        raise click.UsageError("expected MODEL, got none; see --list")
    if keep is not None and stages is not None:
        raise click.UsageError("expected --keep or --schedule, got both; choose one")
    shared = {name: value for name in _SCHEDULE_SETTINGS if (value := settings.pop(name)) is not None}
    chosen = {name: value for name, value in settings.items() if value is not None}
    with interruptible() as check:
        _import_exporter(quiet=quiet)
        from trio_edge.export.options import ExportOptions
        from trio_edge.export.quantize.plan import QuantizePlan, parse_plan

        options = ExportOptions(
            model=model,
            out=out if out is not None else Path(Path(model).name + "-bundle"),
            quantize=QuantizePlan() if quantize is None else parse_plan(quantize),
            **chosen,
        )
        schedule_for = _schedule_rule(keep, stages, shared, method=method or DEFAULT_METHOD)
        manifest = _export(options, schedule_for, Console(stderr=True, quiet=quiet), check)
        print(_summary(manifest, options.out))
        return 0


_OPTIMUM_STYLE: dict[str, click.Parameter] = {
    "model": click.Option(["-m", "--model"], help="An alias, a Hub id or a checkpoint folder; see --list."),
    "out": click.Argument(["out"], required=False, type=click.Path(path_type=Path)),
}
optimum_command = click.Command(
    "optimum-cli export trio",
    params=[_OPTIMUM_STYLE.get(parameter.name or "", parameter) for parameter in command.params],
    callback=command.callback,
    help=(command.help or "").replace("Export MODEL", "Export --model").replace("a bundle", "the bundle OUT"),
    context_settings=command.context_settings,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def optimum_main(argv: Sequence[str] | None = None) -> int:
    """Run the same command as ``optimum-cli export trio --model MODEL OUT`` and return its exit code."""
    return run(optimum_command, argv)


def _import_exporter(*, quiet: bool) -> None:
    """Import torch and the other packages first: it takes seconds, and Ctrl-C has to wait for the end of it."""
    try:
        with ctrl_c_held():
            import trio_edge.export.bundle  # noqa: F401
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"export: expected its packages to be installed, got no {error.name}; pip install 'trio-edge[export]'"
        ) from None
    if quiet:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # as documented

        disable_progress_bars()


def _schedule_rule(
    keep: str | None, stages: str | None, shared: dict[str, Any], *, method: str
) -> Callable[[ScheduleInputs], Schedule]:
    """Return the function that makes the schedule once layers and visual tokens are known."""
    from trio_edge.runtime.bundle.schedule import Schedule
    from trio_edge.trio.budgets import (
        check_combined_keep,
        combined_schedule,
        default_positions,
        parse_keep,
        parse_schedule,
        with_probe_rows,
    )

    rows_by_keep = shared.get("probe_rows", "auto") == "auto"
    shared = {name: value for name, value in shared.items() if value != "auto"}
    text = keep if keep is not None else DEFAULT_KEEP
    average = None if stages is not None or text == "all" else parse_keep(text)
    if stages is not None:
        parse_schedule(stages, **shared)  # refuse a wrong one before the checkpoint is read

    def schedule_for(inputs: ScheduleInputs) -> Schedule:
        schedule = with_stages(inputs)
        if not rows_by_keep:
            return schedule
        return with_probe_rows(
            schedule,
            num_layers=inputs.num_layers,
            picture_tokens=inputs.image_tokens,
            entering=inputs.num_visual,
        )

    def with_stages(inputs: ScheduleInputs) -> Schedule:
        own = default_positions(method)
        positions = own if own in inputs.positions else inputs.positions[0]
        settings = {"positions": positions, **shared}
        if stages is not None:
            return parse_schedule(stages, method=method, **settings)
        if average is None:
            return Schedule(**settings)
        if keep is not None:
            check_combined_keep(keep, picture_tokens=inputs.image_tokens, entering=inputs.num_visual)
        return combined_schedule(
            method,
            average,
            num_layers=inputs.num_layers,
            picture_tokens=inputs.image_tokens,
            entering=inputs.num_visual,
            **settings,
        )

    return schedule_for


def _export(
    options: ExportOptions,
    schedule_for: Callable[[ScheduleInputs], Schedule],
    console: Console,
    check: Callable[[], None],
) -> Manifest:
    """Export with a progress display on ``console``; ``check`` raises where the user has interrupted."""
    from trio_edge.export.bundle import export_bundle

    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    try:
        return export_bundle(options, schedule_for=schedule_for, progress=_progress(bars, console, check))
    finally:
        bars.stop()


def _progress(bars: Progress, console: Console, check: Callable[[], None]) -> Any:
    from trio_edge.export.options import Progress as Callbacks

    task = bars.add_task("", total=None)
    steps = itertools.count()

    def step(text: str) -> None:
        check()
        bars.update(task, description=text)
        if next(steps) == 1:  # not in the first step: a download shows huggingface_hub's own progress
            bars.start()
        if not console.is_terminal:
            console.print(text)

    def warn(text: str) -> None:
        visible = Console(stderr=True) if console.quiet else console
        visible.print(f"trio-export: warning: {text}", soft_wrap=True, markup=False, highlight=False)

    def wrote_bytes(count: int) -> None:
        check()
        bars.advance(task, count)

    return Callbacks(
        step=step,
        warn=warn,
        expect_bytes=lambda count: bars.update(task, total=count, completed=0),
        wrote_bytes=wrote_bytes,
    )


def _print_models() -> None:
    from trio_edge.export.checkpoints.checkpoint import ALIASES

    rows = [("MODEL", "CHECKPOINT", "FAMILY")]
    rows += [
        (alias.name, alias.repository or "comes with this package", alias.family)
        for alias in ALIASES.values()
    ]
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(2)]
    for name, repository, family in rows:
        print(f"{name:{widths[0]}}{repository:{widths[1]}}{family}")


def _summary(manifest: Manifest, out: Path) -> str:
    stages = ", ".join(f"layer {stage.layer}: {stage.keep}" for stage in manifest.schedule.stages) or "none"
    return (
        f"{out}: {manifest.family}, {manifest.dimensions.num_layers} layers, {manifest.dtype},"
        f" {manifest.max_visual} visual tokens, stages {stages}, average keep {100 * manifest.average_keep:.1f} %"
    )
