"""Stops trio-export, trio-build, trio-eval and trio-calibrate at random moments, and checks what they leave.

    python benchmarks/stopped_commands.py WORK_FOLDER --moments 200 --seconds 3600

Each command runs over a good result, with --force if it has that option. It is stopped by SIGKILL, by SIGTERM or by a full disk (a
limit on the size of files). After each stop the old or the new result must be whole. After the next whole run nothing else may
be left.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parts.arguments import errors_in_one_line, parser_for, positive
from parts.drawn_questions import drawn_questions
from parts.tables import markdown

from trio_edge.runtime.bundle.errors import TrioEdgeError
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

_STOPS = ("SIGKILL", "SIGTERM", "full disk")
_DONE = "done"
_BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class _Command:
    """A command, and the check of its result."""

    name: str
    arguments: Sequence[str]
    is_whole: Callable[[], bool]
    folder: Path
    """The folder that it writes to."""
    expected: frozenset[str]
    """All names in ``folder`` after a whole run."""
    share: int
    """Relative number of its runs."""


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--moments", type=positive, default=200, help="stops before a command's end")
    parser.add_argument("--seconds", type=positive, default=3600, help="stop after this time")
    parser.add_argument("--seed", type=positive, default=1)
    options = parser.parse_args()
    with errors_in_one_line(parser):
        run(options)


def run(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    commands, rng = _commands(options.work), random.Random(options.seed)
    end = time.monotonic() + options.seconds
    seconds = {command.name: _whole_run(command) for command in commands}
    counts: Counter[tuple[str, str, str]] = Counter()
    stops = 0
    while stops < options.moments and time.monotonic() < end:
        (command,) = rng.choices(commands, [command.share for command in commands])
        stop = rng.choice(_STOPS)
        ended = _stopped(command, stop, rng, seconds[command.name])
        stops += ended != _DONE
        outcome = "whole" if command.is_whole() else "BROKEN"
        counts[command.name, stop, f"{ended}, {outcome}"] += 1
        if rng.random() < 0.1:
            seconds[command.name] = min(seconds[command.name], _whole_run(command))
            names = {path.name for path in command.folder.iterdir()}
            found = "clean" if names == command.expected else "LEFTOVERS"
            counts[command.name, "then a whole run", found] += 1
        print(f"{stops} of {options.moments} stops", end="\r", file=sys.stderr, flush=True)
    rows = [(*key, str(count)) for key, count in sorted(counts.items())]
    print(markdown(("command", "stopped by", "ended, and what is there", "times"), rows))


def _commands(work: Path) -> list[_Command]:
    bundle, built = work / "exported" / "bundle", work / "built" / "bundle"
    answered, calibrated = work / "answered", work / "calibrated"
    for folder in (bundle.parent, answered, calibrated):
        folder.mkdir(exist_ok=True)
    tiny = ["tiny", "--dtype", "float32", "--max-text", "64", "--max-new-tokens", "16"]
    _call("trio-export", [*tiny, "--out", str(bundle), "--force"])
    if not built.exists():
        shutil.copytree(bundle, built)
    evaluate = [str(built), "--data", str(drawn_questions(24)), "--work", str(answered / "work")]
    evaluate += ["--json", str(answered / "report.json")]
    search = ["tiny", "--samples", str(drawn_questions(6)), "--target", "jetson-orin-nano-8"]
    search += ["--evaluations", "2"]
    target = str(calibrated / "result")
    return [
        _Command("trio-export", [*tiny, "--out", str(bundle), "--force"], lambda: _answers(bundle), bundle.parent,
                 frozenset({"bundle"}), 2),
        _Command("trio-build", [str(built), "--backend", "onnxruntime", "--force"], lambda: _answers(built), built / "engines",
                 frozenset({"onnxruntime-cpu"}), 10),
        _Command("trio-eval", [*evaluate], lambda: _answers(built) and _parse(answered), answered,
                 frozenset({"work", "report.json"}), 6),
        _Command("trio-calibrate", [*search, "--no-export", "--out", target, "--force"], lambda: _parse(calibrated),
                 calibrated, frozenset({"result"}), 1),
    ]  # fmt: skip


def _answers(bundle: Path) -> bool:
    try:
        with Pipeline.from_bundle(bundle, backend="onnxruntime", threads=1) as pipeline:
            return bool(pipeline.generate(None, "what is this?", max_new_tokens=2).text)
    except TrioEdgeError as error:
        print(error)
        return False


def _parse(folder: Path) -> bool:
    """Return whether ``folder`` has results in JSON, and every one of them is whole."""
    results = list(folder.glob("**/*.json"))
    try:
        return bool(results) and all(json.loads(path.read_text("utf-8")) for path in results)
    except ValueError as error:
        print(error)
        return False


def _whole_run(command: _Command) -> float:
    start = time.monotonic()
    _call(command.name, command.arguments)
    return time.monotonic() - start


def _call(name: str, arguments: Sequence[str]) -> None:
    result = subprocess.run([_BIN / name, *arguments], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{name} {' '.join(arguments)}: {result.stderr[-500:]}")


def _stopped(command: _Command, stop: str, rng: random.Random, seconds: float) -> str:
    """Run a command, stop it, and return how it ended."""
    limit = None
    if stop == "full disk":
        files = (path for path in command.folder.rglob("*") if path.is_file())
        largest = max(path.stat().st_size for path in files)
        size = int(largest ** rng.uniform(0, 1))

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = subprocess.Popen(
        [_BIN / command.name, *command.arguments],
        preexec_fn=limit,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if stop != "full disk":
        time.sleep(rng.uniform(0, seconds))
        process.send_signal(signal.Signals[stop])
    _, errors = process.communicate()
    if b"Traceback" in errors:
        print(command.name, stop, errors.decode()[-1500:])
        return "TRACEBACK"
    return {0: _DONE, 2: "one line", 130: "interrupted", 1: "code 1"}.get(
        process.returncode, f"code {process.returncode}"
    )


if __name__ == "__main__":
    main()
