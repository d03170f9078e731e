"""Every command with odd flags and names, in this process: exit code 0, or 2 and one line."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuzz.subject import Outcome, Subject, is_clear, judged
from tests.fuzz.values import NUMBERS, TEXTS
from trio_edge.calibration.evaluate import cli as cli_eval
from trio_edge.calibration.search import cli as cli_calibrate
from trio_edge.export import cli as cli_export
from trio_edge.profiling import cli as cli_profile
from trio_edge.runtime.cli import build as cli_build
from trio_edge.runtime.cli import inspect as cli_inspect
from trio_edge.runtime.cli import run as cli_run

if TYPE_CHECKING:
    import random

_COMMANDS = {
    module.command.name: module
    for module in (cli_run, cli_inspect, cli_build, cli_export, cli_eval, cli_calibrate, cli_profile)
}
_NAMES = (
    "n" * 300,
    "n" * 5000,
    "a/" * 200 + "b",
    "a\0b",
    "/",
    "",
    ".",
    "/dev/null",
    "/proc/1/mem",
    "no such",
    "-",
    "--",
    "\x1b[31m",
    "\u202e",
)


def run_command(rng: random.Random, subject: Subject) -> Outcome:
    """One command line."""
    name = rng.choice(sorted(_COMMANDS))
    arguments = _arguments(rng, subject, name)
    return judged(lambda: _run(name, arguments))


def _run(name: str, arguments: list[str]) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(Path("/tmp")):
        code = _COMMANDS[name].main(arguments)
    lines = err.getvalue().strip().splitlines()
    assert code in (0, 2), f"{name} {arguments}: exit code {code}"
    if code == 2:
        assert len(lines) >= 1, f"{name} {arguments}: no message"
        assert is_clear(lines[-1]), f"{name} {arguments}: {lines[-1]!r}"
        assert len(lines) == 1 or name != "trio-run", f"{name} {arguments}: {lines}"
        return "clear"
    return "ok"


def _arguments(rng: random.Random, subject: Subject, name: str) -> list[str]:
    bundle = rng.choice((str(subject.bundle), str(subject.bundle), rng.choice(_NAMES)))
    if name == "trio-run":
        base = [
            bundle,
            "--image",
            str(subject.picture),
            "--prompt",
            "what?",
            "--max-new-tokens",
            "2",
            "--threads",
            "1",
        ]
    elif name == "trio-build":
        base = [bundle, "--dry-run"]
    elif name == "trio-inspect":
        base = [bundle]
    elif name == "trio-eval":
        base = [bundle, "--data", str(subject.folder / "no.jsonl")]
    elif name == "trio-profile":
        base = [rng.choice(_NAMES)]
    else:
        base = [rng.choice(_NAMES), "--out", rng.choice((str(subject.folder / "out"), "/", ".."))]
    odd = rng.choice((0, 1, 1, 2))
    for option in rng.sample(_options(name), odd):
        base += [option, _value(rng)]
    return base


def _options(name: str) -> list[str]:
    """Return the names of a command's options, without those that would start a long run or leave the machine."""
    command = _COMMANDS[name].command
    left_out = {"--help", "--out", "--revision", "--force", "--data"}
    return sorted(
        {option for param in command.params for option in param.opts if option.startswith("--")} - left_out
    )


def _value(rng: random.Random) -> str:
    return str(rng.choice(rng.choice((NUMBERS, TEXTS, _NAMES))))
