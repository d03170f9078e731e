"""The commands ``trio-export MODEL --out BUNDLE`` and ``optimum-cli export trio --model MODEL BUNDLE``."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from trio_edge.export.options import ExportOptions, LevelRequest
from trio_edge.export.options import Progress as Callbacks
from trio_edge.export.quantize.plan import FORMATS, parse_plan
from trio_edge.runtime.bundle.errors import (
    CheckpointError,
    ScheduleError,
    ShapeError,
    install_command,
    printable,
)
from trio_edge.runtime.bundle.schedule import Budget, Positions, ProbeRows, Schedule
from trio_edge.runtime.cli.console import run, usage_line
from trio_edge.runtime.cli.interruption import ctrl_c_held, interruptible
from trio_edge.trio import budgets, methods

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trio_edge.runtime.bundle.manifest import Manifest

KEEP_ALL = "all"
_Level: TypeAlias = "tuple[str, str, str | None]"
"""Name, keep and image form."""
_PRESET: tuple[_Level, ...] = (
    ("usual", budgets.USUAL_KEEP, None),
    ("quick", budgets.USUAL_KEEP, "low"),
    ("full", KEEP_ALL, None),
)
"""The levels of ``--level preset``."""
_DTYPES = ("auto", "float16", "float32")
_DEFAULTS = {
    **{field.name: field.default for field in dataclasses.fields(ExportOptions)},
    **msgspec.structs.asdict(Schedule()),
}


def _dtype(text: str) -> str:
    if text not in _DTYPES:
        advice = f"write --quantize {text}" if text in FORMATS else "choose one of them"
        raise click.UsageError(f"--dtype: expected one of {', '.join(_DTYPES)}, got {text!r:.80}; {advice}")
    return text


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


def _levels(text: str) -> tuple[_Level, ...]:
    """Return the levels of one --level: one, or those of the preset."""
    if text == "preset":
        return _PRESET
    match = re.fullmatch(r"([^=@]+)=([^=@]+)(?:@([^=@]+))?", text)
    if match is None:
        raise click.UsageError(
            f"--level: expected NAME=KEEP[@FORM], got {text!r}; write it as quick=7.5%@base"
        )
    return ((match[1], match[2], match[3]),)


class _SelectorOption(click.Option):
    """An option that takes a selector; its help names those of other packages, too, which are read for it alone."""

    def type_cast_value(self, ctx: click.Context, value: str | None) -> str | None:
        try:
            return (
                value
                and (methods.stage_method if self.name == "method" else methods.token_method)(value).name
            )
        except ScheduleError as error:
            raise click.UsageError(f"{self.opts[0]}: {str(error).partition(': ')[2]}", ctx) from None

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        kind = methods.StageMethod if self.name == "method" else methods.TokenMethod
        record = super().get_help_record(ctx)
        return record and (record[0], record[1].replace("SELECTORS", methods.described(kind)))


def _option(names: str, kind: Any, text: str, metavar: str | None = None, **settings: Any) -> click.Option:
    """Return an option of type ``kind``, or a flag; its help ends with the default, unless ``text`` names it."""
    settings |= {"is_flag": True} if kind is bool else {"type": kind}
    made = _SelectorOption if "SELECTORS" in text else click.Option
    option = made(names.split(), metavar=metavar, help=text, **settings)
    default = _DEFAULTS.get(option.name or "")
    if default and "[default" not in text:
        option.help = f"{text} [default: {default}]"
    return option


_OPTIONS = (
    _option(
        "--out", click.Path(path_type=Path), "Bundle folder to create. [default: MODEL's name and -bundle]"
    ),
    _option("--revision", str, "Branch, tag or commit of the model on the Hub. [default: its main branch]"),
    _option(
        "--keep",
        str,
        "Average share of the image's visual tokens (before any reduction) that a decoder layer processes; 'all' for no"
        f" reduction in the decoder. [default: {budgets.USUAL_KEEP}]",
        "PERCENT",
    ),
    _option(
        "--schedule stages",
        str,
        "Stages with the visual tokens that they keep, such as 1:460,10:270,15:110; replaces --keep.",
        "LAYER:KEPT,…",
    ),
    _option(
        "--level levels",
        _levels,
        "One of several budgets in one bundle: KEEP is as for --keep or --schedule, FORM is 'base' (the tile with the whole image),"
        " WIDTHxHEIGHT (smaller images), or 'low' (base, or a quarter of the pixels). May be repeated; the first is the default."
        f" 'preset' is {' '.join(f'{name}={keep}' + f'@{form}' * bool(form) for name, keep, form in _PRESET)}."
        " Replaces --keep.",
        "NAME=KEEP[@FORM]|preset",
        multiple=True,
    ),
    _option("--method", str, "Selector inside the decoder. SELECTORS.", "NAME"),
    _option(
        "--token-method",
        str,
        "Selector before the decoder, with --token-keep; works with any --method and --keep. SELECTORS. [default: none]",
        "NAME",
    ),
    _option(
        "--token-keep",
        _count("--token-keep"),
        "Visual tokens of each image that --token-method keeps, as a number or a share.",
        "N|PERCENT",
    ),
    _option(
        "--clip",
        str,
        "CLIP model (folder or Hub id) that the vision tower comes from; with"
        f" {' and '.join(row.name for row in methods.TOKEN_METHODS.values() if row.takes_clip)}, compares question and image in its"
        " space.",
        "MODEL",
    ),
    _option(
        "--probe-rows",
        click.Choice(["auto", *get_args(ProbeRows)]),
        "Rows that carry TRIO's loss, in a prompt of S rows: 'reference' is S-5..S-2, 'answer' is S-4..S-1, and 'auto' is"
        f" 'answer' if the average keep is below {budgets.LEAST_FOR_REFERENCE_ROWS:.0%}, else 'reference'. [default: auto]",
    ),
    _option("--num-probe-rows", int, "Number of probe rows."),
    _option(
        "--nms-threshold",
        float,
        "Cosine similarity from which on TRIO's NMS suppresses the less salient token.",
    ),
    _option("--nms-rounds", int, "Rounds of TRIO's parallel NMS; the runtime redoes stages that need more."),
    _option(
        "--positions",
        click.Choice(get_args(Positions)),
        "Position ids after a stage: renumbered, or as before. [default: the method's, if the model family allows it]",
    ),
    _option(
        "--budget",
        click.Choice(get_args(Budget)),
        "With --max-images: 'prompt' keeps the best tokens of all images together, 'image' at least an equal share of each.",
    ),
    _option(
        "--encoder-keep",
        _count("--encoder-keep"),
        "What the vision encoder keeps: patches per tile (LLaVA, a multiple of 32), visual tokens per image (Qwen2.5-VL),"
        " or a share such as 33.3%. [default: all]",
        "N|PERCENT",
    ),
    _option(
        "--image-size image_sizes",
        _image_size,
        "Size in pixels that images of a fixed camera have; makes exact shapes for it. May be repeated.",
        "WxH",
        multiple=True,
    ),
    _option(
        "--pad-images",
        bool,
        "Pads images to squares with the mean colour, as LLaVA-1.5's own evaluation does; without it they are cropped, as by the"
        " checkpoint's processor.",
    ),
    _option("--only-image-sizes", bool, "Makes no shapes for images of other sizes."),
    _option(
        "--max-visual",
        int,
        "Most visual tokens of an image; larger images are scaled down (Qwen-VL, Ministral 3) or cut into fewer tiles"
        " (InternVL, LLaVA-OneVision, SmolVLM2). [default: 1280 for Qwen-VL, else the checkpoint's]",
    ),
    _option(
        "--min-visual",
        int,
        "Least visual tokens of an image; smaller images are enlarged (Qwen-VL). [default: the checkpoint's]",
    ),
    _option(
        "--max-images",
        int,
        "Most images of the largest size in a prompt; --keep is a share of all their tokens.",
    ),
    _option(
        "--max-frames",
        int,
        "Most frames of a video (Qwen-VL); a pair of frames takes the room of one image. [default: none]",
    ),
    _option(
        "--follow-ups",
        bool,
        "Lets the runtime keep an image's rows before the first reduction for further questions; pays most with --keep all.",
    ),
    _option(
        "--decode-rows",
        int,
        "Most rows of a decode step, 1, 2, 4 or 8: a token, and drafts of those after it.",
    ),
    _option(
        "--batch",
        int,
        "Answers that decode together, 1, 2, 4 or 8, for a server; each takes memory for its own KV cache.",
    ),
    _option(
        "--outputs",
        click.Choice(["tokens", "hidden"]),
        "What the runtime can return; 'hidden' adds the last hidden states, for action heads (docs/reference/python.md).",
    ),
    _option("--max-text", int, "Largest prompt, in text tokens."),
    _option(
        "--text-buckets",
        _text_buckets,
        "Text lengths in tokens that prompts are padded to, besides --max-text. [default: powers of two from 32]",
        "N,N,…",
    ),
    _option("--max-new-tokens", int, "Longest answer, in tokens."),
    _option(
        "--dtype",
        _dtype,
        "Element type of weights and activations; 'auto' is float32 for a float32 checkpoint, else float16.",
        f"[{'|'.join(_DTYPES)}]",
    ),
    _option(
        "--quantize",
        str,
        "Weight format int4, int8 or fp8 of the decoder, or of each part: suffix=int4,head=int8,vision=none"
        " (docs/quantization.md). [default: none]",
        "FORMAT|PART=FORMAT,…",
    ),
    _option("--opset", int, "ONNX opset, 18 or 19."),
    _option(
        "--target",
        str,
        "Device whose memory is checked; warns if the bundle cannot fit (names: docs/prediction.md).",
        "DEVICE",
    ),
    _option("--force", bool, "Replaces an existing bundle."),
    _option("--list list_models", bool, "Prints the known models and other packages' selectors, and exits."),
    _option("--quiet", bool, "Shows no progress."),
)


def _run(
    model: str | None,
    out: Path | None,
    keep: str | None,
    stages: str | None,
    levels: tuple[tuple[_Level, ...], ...],
    list_models: bool,
    quiet: bool,
    **settings: Any,
) -> int:
    """Export MODEL (an alias, a Hub id or a checkpoint folder) into a bundle.

    Prints the bundle's folder, sizes and schedule. Downloads follow huggingface_hub's settings: the token of 'hf auth
    login' or HF_TOKEN, the cache in HF_HOME, and HF_HUB_OFFLINE=1 for no network.
    """
    if list_models:
        _print_names()
        return 0
    if model is None:
        raise click.UsageError(
            "expected MODEL, got none; name one of --list, a Hub id or a checkpoint folder"
        )
    options = _options(model, out, keep, stages, levels, **settings)
    with interruptible() as check:
        with ctrl_c_held():  # importing torch turns Ctrl-C into other errors
            _import_exporter(quiet=quiet)
        manifest = _export(options, Console(stderr=True, quiet=quiet), check)
        print(printable(_summary(manifest, options.out), but="\n"))
        return 0


def _options(
    model: str,
    out: Path | None,
    keep: str | None,
    stages: str | None,
    levels: tuple[tuple[_Level, ...], ...],
    **settings: Any,
) -> ExportOptions:
    if keep is not None and stages is not None:
        raise click.UsageError("--keep and --schedule: expected one of them, got both; leave one out")
    given = {name: value for name, value in settings.items() if value not in (None, "auto")}
    if "quantize" in given:
        given["quantize"] = parse_plan(given["quantize"])
    of_schedule = {field.name for field in dataclasses.fields(budgets.ScheduleRequest)} & given.keys()
    if levels and (keep or stages) is not None:
        raise click.UsageError(
            "--level: expected neither --keep nor --schedule with it, got one; leave it out"
        )
    asked = budgets.ScheduleRequest(**{name: given.pop(name) for name in of_schedule})
    schedule = _request(asked, keep)
    if stages is not None:
        schedule = dataclasses.replace(asked, stages=budgets.parse_stages(stages))
    return ExportOptions(
        model=model,
        out=out if out is not None else Path(Path(model).name + "-bundle"),
        schedule=schedule,
        levels=tuple(
            LevelRequest(name, _request(asked, text), form) for name, text, form in itertools.chain(*levels)
        ),
        **given,
    )


def _request(asked: budgets.ScheduleRequest, text: str | None) -> budgets.ScheduleRequest:
    """Return the request for a keep, 'all', stages such as 1:460,10:270, or None for the usual keep."""
    if text is not None and ":" in text:
        return dataclasses.replace(asked, average=None, stages=budgets.parse_stages(text))
    average = None if text == KEEP_ALL else budgets.parse_keep(text or budgets.USUAL_KEEP)
    return dataclasses.replace(asked, average=average, is_strict=text is not None)


command = click.Command(
    "trio-export",
    params=[click.Argument(["model"], required=False), *_OPTIONS],
    callback=_run,
    help=inspect.getdoc(_run),
    context_settings={"help_option_names": ["-h", "--help"]},
)
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


def options_from(model: str, arguments: Sequence[str]) -> ExportOptions:
    """Return the options of ``trio-export MODEL ARGUMENTS``.

    Raises:
        ShapeError: If an argument is wrong.
        ScheduleError: If their values do not fit each other.
    """
    try:
        found = command.make_context("trio-export", [*arguments, "--", model]).params
        return _options(**{name: found[name] for name in found.keys() - {"list_models", "quiet"}})
    except click.ClickException as error:
        raise ShapeError(f"trio-export: {usage_line(error, 'trio-export')}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def optimum_main(argv: Sequence[str] | None = None) -> int:
    """Run the same command as ``optimum-cli export trio --model MODEL OUT`` and return its exit code."""
    return run(optimum_command, argv)


def _import_exporter(*, quiet: bool) -> None:
    """Import torch and other packages, which takes seconds."""
    try:
        import transformers

        import trio_edge.export.bundle  # noqa: F401
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"export: expected its packages to be installed, got no {error.name}; {install_command('export')}"
        ) from None
    transformers.logging.set_verbosity_error()  # our line says what is wrong
    if quiet:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # as documented

        disable_progress_bars()


def _export(options: ExportOptions, console: Console, check: Callable[[], None]) -> Manifest:
    """Export with a progress display on ``console``; ``check`` raises if the user has interrupted."""
    from trio_edge.export.bundle import export_bundle

    texts, times = TextColumn("{task.description}"), TimeElapsedColumn()
    columns = SpinnerColumn(), texts, BarColumn(), DownloadColumn(), times
    bars = Progress(*columns, console=console, transient=True)
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

    progress = Callbacks(
        step=step,
        warn=warn,
        expect_bytes=lambda count: bars.update(task, total=count, completed=0),
        wrote_bytes=wrote_bytes,
    )
    try:
        return export_bundle(options, progress=progress)
    finally:
        bars.stop()


def _print_names() -> None:
    """Print the known models, and the selectors of other packages, if there are any."""
    from trio_edge.export.checkpoints.checkpoint import ALIASES

    rows = [("MODEL", "CHECKPOINT", "FAMILY")]
    rows += [
        (name, alias.repository or "comes with this package", alias.family) for name, alias in ALIASES.items()
    ]
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(2)]
    for name, repository, family in rows:
        print(f"{name:{widths[0]}}{repository:{widths[1]}}{family}")
    for found in methods.installed_methods():
        if isinstance(found, ScheduleError):
            print(found)
        else:
            print(f"{found.name}: {found.summary} (selector of the package {found.package})")


def _summary(manifest: Manifest, out: Path) -> str:
    stages = ", ".join(f"layer {stage.layer}: {stage.keep}" for stage in manifest.schedule.stages) or "none"
    return (
        f"{out}: {manifest.family}, {manifest.dimensions.num_layers} layers, {manifest.dtype},"
        f" {manifest.max_visual} visual tokens, stages {stages}, average keep {100 * manifest.average_keep:.1f} %"
    )
