"""trio-edge and other runtimes on a CPU: time to load, to the first token and per further token, and peak memory.

    python benchmarks/peers.py --folder /tmp/peers --install /tmp/peers/environments --json peers.json

All answer one question about one image with one checkpoint: the widths of Qwen2.5-VL-3B, fewer layers, random weights.
``--install`` installs OpenVINO GenAI and onnxruntime-genai into their own virtual environments (gigabytes, once);
``--openvino-python`` and ``--genai-python`` name interpreters that have them. Models are made once and stay in ``--folder``;
delete a model's folder to make it again. A runtime that is missing or fails gives a row with the reason.

Each measurement is its own process, and each round measures all rows once, so that other programs affect all alike. Processor
seconds are compared; the wall clock, in the second table, includes the effect of other programs. "Load" starts before the first
import and ends when a question can be asked; the page cache is as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from parts.arguments import parser_for, positive
from parts.peer_files import QUESTION, make_image, make_qwen, make_text_only, num_text_tokens
from parts.tables import markdown
from parts.watched_command import Peaks, folder_bytes, gigabytes

from trio_edge.profiling.measure.machine_info import find_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Found = TypeVar("Found")
RUNS = Path(__file__).parent / "peer_runs"
ROOT = Path(__file__).parents[1]
EXPORT = (
    "import sys\nfrom trio_edge.export.cli import main as export\nfrom trio_edge.runtime.cli.build import main as build\n"
    "sys.exit(export() or build([sys.argv[-1], '--backend', 'onnxruntime', '--quiet']))"
)
"""Exports a bundle and prepares its graphs for this CPU."""
TOKEN_SIDE = 28  # a visual token of Qwen2.5-VL is a square of 28 pixels per side
PACKAGES = {
    "openvino": (
        "optimum-intel==2.2.0",
        "transformers==5.0.0",
        "openvino-genai==2026.4.1.0",
        "nncf==3.4.0",
        "pillow",
    ),
    "genai": ("onnxruntime-genai==0.18.0", "transformers==5.23.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
}
TORCH = "torch==2.13.0"  # installed first, so that pip takes the one without CUDA if the index has it
# optimum-intel requires it, but with a torch without CUDA it cannot be imported
UNUSABLE = {"openvino": ("torchvision",)}


class MissingError(Exception):
    """A row that cannot be measured; the text is the reason, in one line."""


@dataclass(frozen=True)
class Measured:
    """One answer in its own process. Times are (wall, processor) seconds, memory is in bytes."""

    load: Sequence[float]
    first: Sequence[float]
    tokens: Sequence[Sequence[float]]
    prompt_tokens: int
    versions: dict[str, str]
    resident: int
    anonymous: int


@dataclass
class Row:
    """One runtime with one model: the commands to make the model and to answer, and the results."""

    name: str
    script: str
    """In ``peer_runs``."""
    python: Path | None
    model: Path
    make: list[str] = field(default_factory=list)
    """Command that writes the model to the folder in its last argument; empty if the model is the checkpoint."""
    request: dict[str, Any] = field(default_factory=dict)
    rounds: list[Measured] = field(default_factory=list)
    reason: str = ""
    """Reason why there are no more rounds."""


def rows_of(options: argparse.Namespace) -> list[Row]:
    """Return all rows of the options, before any measurement."""
    folder, here = options.folder, Path(sys.executable)
    checkpoint, text = str(folder / "checkpoint"), str(folder / "text")
    form = options.quantize or "float16"
    export = [
        str(here), "-c", EXPORT, checkpoint, *(("--quantize", form) if options.quantize else ()),
        "--only-image-sizes", "--image-size", f"{options.side}x{options.side}", "--max-text", "64", "--quiet",
    ]  # fmt: skip
    rows = [
        Row(
            f"ours, {form}, {label}", "ours.py", here, folder / f"ours-{keep}-{form}",
            [*export, "--keep", keep, "--out"],
        )
        for keep, label in ((options.keep, f"reduced to {options.keep}"), ("all", "all tokens"))
    ]  # fmt: skip
    if options.torch:
        rows.append(Row("torch, float32, eager, all tokens", "torch_eager.py", here, Path(checkpoint)))
    python = options.openvino_python
    convert = [
        str(python and python.with_name("optimum-cli")), "export", "openvino", "--model", checkpoint,
        "--weight-format", "int4", "--task", "image-text-to-text",
    ]  # fmt: skip
    rows += [
        Row(
            f"OpenVINO GenAI, int4, {label}", "openvino_vlm.py", python, folder / "openvino-int4", convert,
            {"prune_percent": cut},
        )
        for label, cut in (("all tokens", 0), (f"CDPruner, {options.prune} % cut", options.prune))
    ]  # fmt: skip
    python = options.genai_python
    build = [
        str(python), "-m", "onnxruntime_genai.models.builder", "-m", text, "-p", "int4", "-e", "cpu",
        "-c", str(folder / "cache"), "--extra_options", "accuracy_level=4", "-o",
    ]  # fmt: skip
    name = "onnxruntime-genai, int4, decoder only: no image, as many text tokens"
    return [*rows, Row(name, "onnxruntime_text.py", python, folder / "onnxruntime-genai-int4", build)]


def install(environments: Path, name: str) -> Path | None:
    """Return the interpreter of the virtual environment ``name``, made if needed; None if that fails."""
    folder = environments.absolute() / name
    if not folder.exists():
        print(f"installing {name}", file=sys.stderr, flush=True)
        venv.create(folder, symlinks=True, with_pip=True)
        pip = [str(folder / "bin/python"), "-m", "pip"]
        try:
            for packages in ((TORCH,), (TORCH, *PACKAGES[name])):
                subprocess.run([*pip, "install", "-q", *packages], check=True)
            if name in UNUSABLE:
                subprocess.run([*pip, "uninstall", "-q", "-y", *UNUSABLE[name]], check=True)
        except subprocess.CalledProcessError:
            shutil.rmtree(folder)
            return None
    return folder / "bin/python"


def make_model(row: Row) -> None:
    """Make the row's model if it is not there.

    Raises:
        MissingError: If the interpreter is missing, or the command fails.
    """
    if row.python is None or not row.python.exists():
        raise MissingError("not installed: see --install")
    if row.model.exists():
        return
    partial = row.model.with_name(f"{row.model.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    print(f"making {row.model.name}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [*row.make, str(partial)], env=environment(row), capture_output=True, text=True, check=False
    )
    if done.returncode:
        row.model.with_suffix(".log").write_text(done.stdout + done.stderr)
        raise MissingError(f"no model: {last_line(done.stderr)}")
    partial.rename(row.model)


def environment(row: Row) -> dict[str, str]:
    """Return the environment of the row's processes: nothing is fetched, and only ours sees our packages."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ours = {"PYTHONPATH": str(ROOT)} if row.python == Path(sys.executable) else {}
    return {**inherited, **ours, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def measure(row: Row, request: dict[str, Any], *, seconds: int) -> Measured:
    """Answer once in a new process.

    Args:
        row: Names the script.
        request: Its argument without the row's own part: image, question, new_tokens, threads, prompt_tokens.
        seconds: Time limit of the process.

    Raises:
        MissingError: If the process fails, takes too long, or stops before its last token.
    """
    argument = json.dumps({**request, **row.request, "model": str(row.model)})
    peaks = Peaks()
    with subprocess.Popen(
        [str(row.python), str(RUNS / row.script), argument],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(row),
    ) as child:  # fmt: skip
        try:
            with peaks.watching(lambda: [child.pid]):
                output, errors = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            raise MissingError(f"no answer after {seconds} s") from None
    if child.returncode:
        raise MissingError(f"exit code {child.returncode}: {last_line(errors)}")
    measured = Measured(
        **json.loads(output.splitlines()[-1]), resident=peaks.resident, anonymous=peaks.anonymous
    )
    if len(measured.tokens) + 1 != request["new_tokens"]:
        raise MissingError(f"gave {len(measured.tokens) + 1} of {request['new_tokens']} tokens")
    return measured


def undisturbed(measure: Callable[[], Found], *, others: float | None, tries: int = 5) -> Found:
    """Return what ``measure`` returns while other programs use less than the share ``others`` of one CPU.

    Measures again where they use more, and takes the least disturbed of ``tries``. None: measures once. Needs Linux.
    """
    if others is None:
        return measure()
    best: tuple[float, Found] | None = None
    for _ in range(tries):
        start, before = time.perf_counter(), _seconds_of_others()
        found = measure()
        share = (_seconds_of_others() - before) / (time.perf_counter() - start)
        if best is None or share < best[0]:
            best = share, found
        if share < others:
            break
        print(f"other programs used {share:.0%} of a CPU", file=sys.stderr, flush=True)
    assert best is not None
    return best[1]


def _seconds_of_others() -> float:
    """Return the processor seconds of all programs but this one and its ended children, stolen time included."""
    user, nice, system, _idle, _wait, *more = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def last_line(text: str) -> str:
    """Return the last line that is not empty, shortened: the error of a traceback."""
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "no message")


def run_round(
    rows: Iterable[Row], request: dict[str, Any], *, seconds: int, others: float | None = None
) -> None:
    """Measure every row once that has not failed before."""
    for row in rows:
        if row.reason:
            continue
        try:
            make_model(row)
            once = partial(measure, row, request, seconds=seconds)
            row.rounds.append(undisturbed(once, others=others))
        except MissingError as error:
            row.reason = str(error)
        print(f"{row.name}: {row.reason or 'measured'}", file=sys.stderr, flush=True)


def spread(values: Sequence[float], digits: int) -> str:
    """Return the median with the smallest and the largest value."""
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} – {high})"


def times(row: Row, clock: int) -> tuple[str, str, str]:
    """Return the row's cells for load, first token and a further token by the ``clock`` 0 (wall) or 1 (processor)."""
    decode = [1e3 * median(step[clock] for step in one.tokens) for one in row.rounds]
    return (
        spread([one.load[clock] for one in row.rounds], 2),
        spread([one.first[clock] for one in row.rounds], 2),
        spread(decode, 1),
    )


def tables(rows: Sequence[Row]) -> str:
    """Return the table of processor seconds and memory, then the one of the wall clock."""
    times_heads = ("load, s", "first token, s", "ms a token")
    main, wall = [], []
    for row in rows:
        if row.reason or not row.rounds:
            main.append((row.name, row.reason or "not measured", *("" for _ in range(6))))
            continue
        memory = (
            spread([getattr(one, kind) / 1e9 for one in row.rounds], 2) for kind in ("resident", "anonymous")
        )
        disk = gigabytes(folder_bytes(row.model))
        main.append((row.name, *times(row, 1), *memory, disk, str(row.rounds[0].prompt_tokens)))
        wall.append((row.name, *times(row, 0)))
    heads = ("processor time", *times_heads, "peak GB", "anonymous GB", "on disk", "prompt tokens")
    return f"{markdown(heads, main)}\n\n{markdown(('wall clock', *times_heads), wall)}"


def conditions(options: argparse.Namespace, rows: Sequence[Row]) -> str:
    """Return the conditions of the measurement in words."""
    versions = {name: text for row in rows for one in row.rounds[:1] for name, text in one.versions.items()}
    checkpoint = gigabytes(folder_bytes(options.folder / "checkpoint"))
    return (
        f"{find_machine().name}, {os.cpu_count()} CPUs, {platform.machine()}; {options.threads} thread(s),"
        f" {options.rounds} rounds, {options.new_tokens} new tokens, greedy; widths of Qwen2.5-VL-3B with"
        f" {options.layers} decoder and {options.vision_layers} vision layers, random weights ({checkpoint} in bfloat16);"
        f" an image of {options.side}x{options.side}, {(options.side // TOKEN_SIDE) ** 2} visual tokens;"
        f" {', '.join(f'{name} {text}' for name, text in sorted(versions.items()))}."
        " Medians (smallest – largest)."
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("out/peers"), help="folder of checkpoint and models; reused")
    add("--layers", type=positive, default=12, help="decoder layers of a new checkpoint")
    add(
        "--vision-layers", type=positive, default=8, help="its vision layers; every fourth has full attention"
    )
    add("--side", type=positive, default=672, help="side of the image in pixels, a multiple of 28")
    add("--keep", default="11.1%", help="average keep of our reduced row")
    add("--prune", type=positive, default=89, help="percent that OpenVINO's CDPruner removes")
    add("--quantize", default="int4,head=int8,vision=int8", help="--quantize of our export; '' for float16")
    add(
        "--torch",
        action="store_true",
        help="also measure transformers' model, with 4 bytes of memory per weight",
    )
    add("--install", type=Path, help="folder for virtual environments, made if missing")
    add("--openvino-python", type=Path, help="interpreter with openvino-genai and optimum-intel")
    add("--genai-python", type=Path, help="interpreter with onnxruntime-genai")
    add("--only", nargs="+", default=[""], help="only rows whose name contains one of these texts")
    add("--threads", type=positive, default=1)
    add("--rounds", type=positive, default=5)
    add("--new-tokens", type=positive, default=16)
    add("--timeout", type=positive, default=1800, help="most seconds of one answer")
    add(
        "--others",
        type=float,
        metavar="SHARE",
        help="measure again while other programs use more of a CPU, up to five times",
    )
    add("--json", type=Path, help="write all measurements to this file")
    options = parser.parse_args(arguments)
    options.folder = options.folder.absolute()
    return options


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Make missing checkpoint, image and environments; return the request for all scripts."""
    checkpoint, image = options.folder / "checkpoint", options.folder / f"image-{options.side}.png"
    if not checkpoint.exists():
        make_qwen(checkpoint, layers=options.layers, vision_layers=options.vision_layers)
    if not (options.folder / "text").exists():
        make_text_only(options.folder / "text", checkpoint)
    make_image(image, options.side)
    if options.install:
        options.openvino_python = options.openvino_python or install(options.install, "openvino")
        options.genai_python = options.genai_python or install(options.install, "genai")
    return {
        "image": str(image),
        "question": QUESTION,
        "threads": options.threads,
        "new_tokens": options.new_tokens,
        "prompt_tokens": (options.side // TOKEN_SIDE) ** 2 + num_text_tokens(checkpoint),
        "prune_percent": 0,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    request = prepare(options)
    rows = [row for row in rows_of(options) if any(text in row.name for text in options.only)]
    for _ in range(options.rounds):
        run_round(rows, request, seconds=options.timeout, others=options.others)
    text = conditions(options, rows)
    print(f"{text}\n\n{tables(rows)}")
    if options.json:
        found = [
            {"name": row.name, "reason": row.reason, "rounds": list(map(asdict, row.rounds))} for row in rows
        ]
        options.json.write_text(json.dumps({"conditions": text, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
