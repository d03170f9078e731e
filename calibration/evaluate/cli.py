"""``trio-eval BUNDLE …``: accuracy, cost and time of bundles on the same questions, beside a keep-all bundle."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trio_edge.calibration.evaluate.baselines import BASELINES
from trio_edge.calibration.evaluate.comparison import SCHEMA_VERSION, Conditions, Data, Report, compare
from trio_edge.calibration.evaluate.metrics import METRICS, Metric, check_metric, metric_for
from trio_edge.calibration.evaluate.plot import check_plot, draw_plot
from trio_edge.calibration.evaluate.questions import (
    digest_of,
    parse_shard,
    read_questions,
    shard_of,
    synthetic_questions,
)
from trio_edge.calibration.evaluate.report_table import print_report
from trio_edge.calibration.evaluate.running.answering import DEFAULT_ANSWER_TOKENS, OWN_SELECTION
from trio_edge.calibration.evaluate.running.ray_workers import check_ray
from trio_edge.calibration.evaluate.running.runs import Answers, Settings, answer_runs, keys_of, plan_runs
from trio_edge.runtime.backends.registry import BACKENDS_HELP
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.files import check_outputs, write_output
from trio_edge.runtime.cli.console import EXIT_USER_ERROR, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from trio_edge.calibration.evaluate.questions import Question
    from trio_edge.calibration.evaluate.running.runs import Run
    from trio_edge.calibration.evaluate.running.work_folder import RunKey

SYNTHETIC = "shapes"
DEFAULT_SYNTHETIC_COUNT = 500
_PACKAGES = ("trio-edge", "numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class _DataOptions:
    data: str
    metric: str
    count: int | None
    seed: int
    split: str | None
    suffix: str
    shard: str


@dataclass(frozen=True)
class _Asked:
    """The data set, and the part of it that is asked here."""

    name: str
    metric: Metric
    sha256: str
    total: int
    shard: str
    questions: list[Question]


@click.command("trio-eval", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--reference", type=click.Path(path_type=Path), help="A keep-all bundle that all are compared with."
)
@click.option(
    "--data",
    default=SYNTHETIC,
    show_default=True,
    help=f"'{SYNTHETIC}' (synthetic, held out) or a JSON-lines file.",
)
@click.option(
    "--metric",
    type=click.Choice(["auto", *METRICS]),
    default="auto",
    show_default=True,
    help="auto: what the file's fields fit.",
)
@click.option(
    "--count",
    type=click.IntRange(1),
    help=f"Questions at most; default all of a file, {DEFAULT_SYNTHETIC_COUNT} of '{SYNTHETIC}'.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the synthetic set.")
@click.option("--split", help="Only the file's lines with this split.")
@click.option(
    "--suffix",
    default="",
    help="Appended to every prompt, for instance 'Answer the question using a single word or phrase.'",
)
@click.option(
    "--answer-tokens",
    type=click.IntRange(1, 4096),
    default=DEFAULT_ANSWER_TOKENS,
    show_default=True,
    help="New tokens at most, where the bundle has room for them.",
)
@click.option(
    "--selection",
    "selections",
    multiple=True,
    type=click.Choice([OWN_SELECTION, *BASELINES]),
    default=(OWN_SELECTION,),
    show_default=True,
    help="The bundle's own selection, or a baseline at the same schedule; repeatable.",
)
@click.option("--backend", default="auto", show_default=True, help=BACKENDS_HELP)
@click.option(
    "--threads",
    type=click.IntRange(0, 1024),
    default=1,
    show_default=True,
    help="CPU threads of each worker; 0 lets the backend choose.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Processes, or actors with --ray.",
)
@click.option("--ray", "ray_address", help="Let a Ray cluster answer: 'auto' or its address.")
@click.option(
    "--shard", default="1/1", show_default=True, help="I/N: only every N-th question, from the I-th."
)
@click.option(
    "--work",
    "--resume",
    type=click.Path(path_type=Path),
    help="Folder of outcomes; an interrupted run goes on.",
)
@click.option(
    "--merge",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Take over the outcomes of another work folder; repeatable, with --work.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the report to this file.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw accuracy against FLOPs into this .png or .svg file."
)
@click.option("--quiet", is_flag=True, help="No progress display.")
def command(
    bundles: tuple[Path, ...],
    reference: Path | None,
    data: str,
    metric: str,
    count: int | None,
    seed: int,
    split: str | None,
    suffix: str,
    answer_tokens: int,
    selections: tuple[str, ...],
    backend: str,
    threads: int,
    workers: int,
    ray_address: str | None,
    shard: str,
    work: Path | None,
    merge: tuple[Path, ...],
    json_file: Path | None,
    plot: Path | None,
    quiet: bool,
) -> int:
    """Measure BUNDLEs on the same questions: accuracy, agreement with keep-all, FLOPs and time."""
    _check_outputs(json_file, plot, ray_address=ray_address, merge=merge, work=work)
    runs = plan_runs(bundles, reference=reference, selections=tuple(dict.fromkeys(selections)))
    asked = _ask(_DataOptions(data, metric, count, seed, split, suffix, shard))
    settings = Settings(
        metric=asked.metric.name,
        answer_tokens=min([answer_tokens, *(run.bundle.manifest.max_new_tokens for run in runs)]),
        backend=backend,
        threads=threads,
        workers=workers,
        ray_address=ray_address,
    )
    keys = keys_of(runs, settings, data_sha256=asked.sha256)
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trio-eval-")))
        on_start, on_answer = stack.enter_context(_progress(len(asked.questions), quiet=quiet))
        answers = answer_runs(
            runs,
            keys,
            asked.questions,
            settings,
            folder=folder,
            merge=merge,
            on_start=on_start,
            on_answer=on_answer,
        )
    report = _report(asked, answers, settings, keys)
    if report.runs:
        _write(report, json_file, plot)
        print_report(report)
    return _fail(answers) if answers.failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _check_outputs(
    json_file: Path | None,
    plot: Path | None,
    *,
    ray_address: str | None,
    merge: tuple[Path, ...],
    work: Path | None,
) -> None:
    """Refuse before hours of work what could not be written after them."""
    if json_file is not None:
        check_outputs({"--json": json_file})
    if plot is not None:
        check_plot(plot)
    if ray_address is not None:
        check_ray()
    if merge and work is None:
        raise click.UsageError(
            "--merge: expected --work, the folder to merge into, got none; add --work FOLDER"
        )


def _ask(options: _DataOptions) -> _Asked:
    shard, num_shards = parse_shard(options.shard)
    if options.data == SYNTHETIC:
        if options.split is not None or options.suffix:
            raise click.UsageError(f"--split and --suffix: expected a JSON-lines file, got '{SYNTHETIC}'")
        count = DEFAULT_SYNTHETIC_COUNT if options.count is None else options.count
        questions = synthetic_questions(count, seed=options.seed)
    else:
        path = Path(options.data)
        questions = read_questions(path, split=options.split, suffix=options.suffix, count=options.count)
    metric = _metric(options, questions)
    check_metric(questions, metric)
    part = shard_of(questions, shard=shard, num_shards=num_shards)
    if not part:
        raise DataError(
            f"--shard {options.shard}: expected at most {len(questions)} shards (questions), got more; use fewer"
        )
    return _Asked(
        name=options.data if options.data == SYNTHETIC else Path(options.data).name,
        metric=metric,
        sha256=digest_of(questions, metric=metric.name),
        total=len(questions),
        shard=f"{shard}/{num_shards}",
        questions=part,
    )


def _metric(options: _DataOptions, questions: list[Question]) -> Metric:
    if options.metric != "auto":
        return METRICS[options.metric]
    return METRICS["exact"] if options.data == SYNTHETIC else metric_for(questions)


def _report(asked: _Asked, answers: Answers, settings: Settings, keys: Sequence[RunKey]) -> Report:
    runs = compare(answers.runs, metric=asked.metric.name)
    return Report(
        schema_version=SCHEMA_VERSION,
        data=Data(
            name=asked.name,
            sha256=asked.sha256,
            metric=asked.metric.name,
            questions=asked.total,
            compared=runs[0].accuracy.questions if runs else 0,
            shard=asked.shard,
        ),
        conditions=Conditions(
            versions=_versions(),
            backend=keys[0].backend,
            threads=settings.threads,
            workers=settings.workers,
            answer_tokens=settings.answer_tokens,
            machine={
                "system": platform.system(),
                "architecture": platform.machine(),
                "processor": _processor(),
                "cpus": str(os.cpu_count()),
            },
        ),
        runs=runs,
        failures=[
            {"run": label, "where": failure.where, "reason": failure.reason}
            for label, failure in answers.failures
        ],
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _write(report: Report, json_file: Path | None, plot: Path | None) -> None:
    if json_file is not None:
        write_output("--json", json_file, json.dumps(msgspec.to_builtins(report), indent=1).encode())
    if plot is not None:
        draw_plot(report, plot)


def _fail(answers: Answers) -> int:
    label, first = answers.failures[0]
    others = len(answers.failures) - 1
    more = f" (and {others} more)" if others else ""
    click.echo(
        f"trio-eval: {first.where}: {' '.join(first.reason.split())}, in {label}{more};"
        " the other questions were answered, mend it and run again with the same --work",
        err=True,
    )
    return EXIT_USER_ERROR


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[tuple[Callable[[Run, int], None], Callable[[], None]]]:
    """Yield what to call at the start of a run and after each answer."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as progress:
        bar = progress.add_task("", total=total, speed="")

        def start(run: Run, done: int) -> None:
            progress.reset(bar, total=total, completed=done, description=run.info.label, speed="")

        def advance() -> None:
            progress.advance(bar)
            speed = progress.tasks[0].speed
            progress.update(bar, speed="" if speed is None else f"{speed:.1f} answers/s")

        yield start, advance
