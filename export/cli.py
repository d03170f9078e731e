"""The commands ``trio-export MODEL --out BUNDLE`` and ``optimum-cli export trio --model MODEL BUNDLE``."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.graph_io import MAX_TEXT
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.runtime.cli.console import run
from trio_edge.runtime.cli.interruption import ctrl_c_held, interruptible
from trio_edge.trio.methods import DEFAULT_METHOD, STAGE_METHODS, TOKEN_METHODS, described

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trio_edge.export.options import ExportOptions, ScheduleInputs
    from trio_edge.runtime.bundle.manifest import Manifest

DEFAULT_KEEP = "11.1%"
_SCHEDULE = Schedule()  # for the defaults of its settings
_SCHEDULE_SETTINGS = ("probe_rows", "num_probe_rows", "nms_threshold", "nms_rounds", "positions", "budget")


def _image_size(text: str) -> tuple[int, int]:
    """Return width and height."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise click.UsageError(
            f"--image-size: expected WIDTHxHEIGHT in pixels, got {text!r}; write it as 640x480"
        )
    return int(match[1]), int(match[2])


def _text_buckets(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(
            f"--text-buckets: expected numbers separated by commas, got {text!r}; write it as 32,64"
        ) from None


def _count(option: str) -> Callable[[str], int | float]:
    """Return the parser of ``option``, which makes an int of a number and a share below 1 of a percentage."""

    def parse(text: str) -> int | float:
        match = re.fullmatch(r"(\d{1,2}(?:\.\d+)?)%|(\d{1,6})", text)
        if match is None or (match[1] is not None and float(match[1]) == 0):
            raise click.UsageError(
                f"{option}: expected a number or a percentage, got {text!r}; write it as 96 or 16.7%"
            )
        return int(match[2]) if match[1] is None else float(match[1]) / 100

    return parse


@click.command("trio-export", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Bundle folder to create. [default: MODEL's name and -bundle]",
)
@click.option("--revision", help="Branch, tag or commit of the model on the Hub. [default: its main branch]")
@click.option(
    "--keep",
    metavar="PERCENT",
    help="Average share of the image's visual tokens (before any reduction) that a decoder layer processes; 'all' for no"
    f" reduction in the decoder. [default: {DEFAULT_KEEP}]",
)
@click.option(
    "--schedule",
    "stages",
    metavar="LAYER:KEPT,…",
    help="Stages with the visual tokens that they keep, such as 1:460,10:270,15:110; replaces --keep.",
)
@click.option(
    "--method",
    type=click.Choice(tuple(STAGE_METHODS)),
    help=f"Selector inside the decoder. {described(STAGE_METHODS)}. [default: {DEFAULT_METHOD}]",
)
@click.option(
    "--token-method",
    type=click.Choice(tuple(TOKEN_METHODS)),
    help=f"Selector before the decoder, with --token-keep; works with any --method and --keep. {described(TOKEN_METHODS)}."
    " [default: none]",
)
@click.option(
    "--token-keep",
    type=_count("--token-keep"),
    metavar="N|PERCENT",
    help="Visual tokens of each image that --token-method keeps, as a number or a share.",
)
@click.option(
    "--clip",
    metavar="MODEL",
    help="CLIP model (folder or Hub id) that the vision tower comes from; with"
    f" {' and '.join(row.name for row in TOKEN_METHODS.values() if row.takes_clip)}, compares question and image in its space.",
)
@click.option(
    "--probe-rows",
    type=click.Choice(["auto", "reference", "answer"]),
    help="Rows that carry TRIO's loss, in a prompt of S rows: 'reference' is S-5..S-2, 'answer' is S-4..S-1, and 'auto' is"
    " 'answer' if the average keep is below 10%, else 'reference'. [default: auto]",
)
@click.option(
    "--num-probe-rows", type=int, help=f"Number of probe rows. [default: {_SCHEDULE.num_probe_rows}]"
)
@click.option(
    "--nms-threshold",
    type=float,
    help="Cosine similarity from which on TRIO's NMS suppresses the less salient token."
    f" [default: {_SCHEDULE.nms_threshold}]",
)
@click.option(
    "--nms-rounds",
    type=int,
    help=f"Rounds of TRIO's parallel NMS; the runtime redoes stages that need more. [default: {_SCHEDULE.nms_rounds}]",
)
@click.option(
    "--positions",
    type=click.Choice(["compact", "preserved"]),
    help="Position ids after a stage: renumbered, or as before. [default: the method's, if the model family allows it]",
)
@click.option(
    "--budget",
    type=click.Choice(["prompt", "image"]),
    help="With --max-images: 'prompt' keeps the best tokens of all images together, 'image' at least an equal share of each."
    " [default: prompt]",
)
@click.option(
    "--encoder-keep",
    type=_count("--encoder-keep"),
    metavar="N|PERCENT",
    help="What the vision encoder keeps: patches per tile (LLaVA, a multiple of 32), visual tokens per image (Qwen2.5-VL),"
    " or a share such as 33.3%. [default: all]",
)
@click.option(
    "--image-size",
    "image_sizes",
    multiple=True,
    type=_image_size,
    metavar="WxH",
    help="Size in pixels that images of a fixed camera have; makes exact shapes for it. May be repeated.",
)
@click.option(
    "--only-image-sizes", is_flag=True, default=None, help="Makes no shapes for images of other sizes."
)
@click.option(
    "--max-visual",
    type=int,
    help="Most visual tokens of an image; larger images are scaled down (Qwen-VL) or cut into fewer tiles (InternVL,"
    " LLaVA-OneVision, SmolVLM2). [default: 1280 for Qwen-VL, else the checkpoint's]",
)
@click.option(
    "--max-images",
    type=int,
    help="Most images of the largest size in a prompt; --keep is a share of all their tokens. [default: 1]",
)
@click.option(
    "--max-frames",
    type=int,
    help="Most frames of a video (Qwen-VL); a pair of frames takes the room of one image. [default: none]",
)
@click.option(
    "--follow-ups",
    is_flag=True,
    default=None,
    help="Lets the runtime keep an image for further questions, so that only their text runs; for --keep all.",
)
@click.option("--max-text", type=int, help=f"Largest prompt, in text tokens. [default: {MAX_TEXT}]")
@click.option(
    "--text-buckets",
    type=_text_buckets,
    metavar="N,N,…",
    help="Text lengths in tokens that prompts are padded to, besides --max-text. [default: powers of two from 32]",
)
@click.option("--max-new-tokens", type=int, help="Longest answer, in tokens. [default: 256]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float16", "float32"]),
    help="Element type of weights and activations; 'auto' is float32 for a float32 checkpoint, else float16."
    " [default: auto]",
)
@click.option(
    "--quantize",
    metavar="FORMAT|PART=FORMAT,…",
    help="Weight format int4, int8 or fp8 of the decoder, or of each part: suffix=int4,head=int8,vision=none"
    " (docs/quantization.md). [default: none]",
)
@click.option("--opset", type=int, help="ONNX opset, 18 or 19. [default: 18]")
@click.option(
    "--target",
    metavar="DEVICE",
    help="Device whose memory is checked; warns if the bundle cannot fit (names: docs/targets.md).",
)
@click.option("--force", is_flag=True, default=None, help="Replaces an existing bundle.")
@click.option("--list", "list_models", is_flag=True, help="Prints the known model names and exits.")
@click.option("--quiet", is_flag=True, help="Shows no progress.")
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

    Prints the bundle's folder, sizes and schedule. Downloads follow huggingface_hub's settings: the token of 'hf auth
    login' or HF_TOKEN, the cache in HF_HOME, and HF_HUB_OFFLINE=1 for no network.
    """
    if list_models:
        _print_models()
        return 0
    if model is None:
        raise click.UsageError(
            "expected MODEL, got none; name one of --list, a Hub id or a checkpoint folder"
        )
    if keep is not None and stages is not None:
        raise click.UsageError("--keep and --schedule: expected one of them, got both; leave one out")
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
    """Import torch and other packages, which takes seconds; Ctrl-C is held until they are complete."""
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
    """Return the function that makes the schedule as soon as layers and visual tokens are known."""
    from trio_edge.trio.budgets import (
        check_combined_keep,
        combined_schedule,
        default_positions,
        parse_keep,
        parse_schedule,
        with_probe_rows,
    )

    chooses_rows = shared.get("probe_rows", "auto") == "auto"
    shared = {name: value for name, value in shared.items() if value != "auto"}
    text = keep if keep is not None else DEFAULT_KEEP
    average = None if stages is not None or text == "all" else parse_keep(text)
    if stages is not None:
        parse_schedule(stages, **shared)  # an error is found before the checkpoint is read

    def schedule_for(inputs: ScheduleInputs) -> Schedule:
        tokens = {"picture_tokens": inputs.image_tokens, "entering": inputs.num_visual}
        schedule = with_stages(inputs, tokens)
        return with_probe_rows(schedule, num_layers=inputs.num_layers, **tokens) if chooses_rows else schedule

    def with_stages(inputs: ScheduleInputs, tokens: dict[str, int]) -> Schedule:
        own = default_positions(method)
        positions = own if own in inputs.positions else inputs.positions[0]
        settings = {"positions": positions, **shared}
        if stages is not None:
            return parse_schedule(stages, method=method, **settings)
        if average is None:
            return Schedule(**settings)
        if keep is not None:
            check_combined_keep(keep, **tokens)
        return combined_schedule(method, average, num_layers=inputs.num_layers, **tokens, **settings)

    return schedule_for


def _export(
    options: ExportOptions,
    schedule_for: Callable[[ScheduleInputs], Schedule],
    console: Console,
    check: Callable[[], None],
) -> Manifest:
    """Export with a progress display on ``console``; ``check`` raises if the user has interrupted."""
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
        (name, alias.repository or "comes with this package", alias.family) for name, alias in ALIASES.items()
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
