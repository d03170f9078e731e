"""Stops commands, a server and further questions at random moments, and checks what they leave.

    python benchmarks/stopped_commands.py WORK_FOLDER --moments 200 --seconds 3600

Each command runs over a good result, with --force if it has that option. It is stopped by SIGKILL, by SIGTERM or by a full disk
(a limit on the size of files; a server gets SIGTERM afterwards). After each stop the bundle and the old or the new result must be
whole, and no process may live on. Only SIGKILL may leave temporary files. After the next whole run nothing else may be left.
"""

from __future__ import annotations

import base64
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

from parts.arguments import errors_in_one_line, parser_for, positive
from parts.drawn_questions import drawn_questions
from parts.tables import markdown
from PIL import Image

from trio_edge.runtime.bundle.errors import TrioEdgeError
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

_STOPS = ("SIGKILL", "SIGTERM", "full disk")
_DONE = "done"
_LIBRARIES = (".ses", "torchinductor_")  # temporary files that onnxruntime and torch leave in any case
_PICTURE = str(Path(__file__).parents[1] / "examples" / "pictures" / "shapes-96x96.png")
_QUESTION = "what color is the circle ?"
_FURTHER = """
import sys
from trio_edge.runtime.pipeline import Pipeline
with Pipeline.from_bundle(sys.argv[1], threads=1, keep_images=1) as pipeline:
    for number in range(60):
        question = ("what color is the circle ?", "how many squares are there ?", "is there a star ?")[number % 3]
        answer = pipeline.generate(sys.argv[2], question, max_new_tokens=4)
        print(answer.text, answer.statistics.prefix_was_kept)
"""


@dataclass(frozen=True, slots=True)
class _Command:
    """A command, and the check of its result."""

    name: str
    program: Sequence[str]
    is_whole: Callable[[], bool]
    folder: Path
    """The folder that it writes to."""
    expected: frozenset[str]
    """All names in ``folder`` after a whole run."""
    share: int
    """Relative number of its runs."""
    port: int | None = None
    """Port of a server, which runs until it is stopped."""


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--moments", type=positive, default=200, help="stops before a command's end")
    parser.add_argument("--seconds", type=positive, default=3600, help="stop after this time")
    parser.add_argument("--seed", type=positive, default=1)
    parser.add_argument("--only", nargs="+", help="names of commands; all by default")
    options = parser.parse_args()
    with errors_in_one_line(parser):
        run(options)


def run(options: argparse.Namespace) -> None:
    temporary = options.work.absolute() / "temporary"
    temporary.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(temporary)
    commands, rng = _commands(options.work), random.Random(options.seed)
    commands = [command for command in commands if command.name in (options.only or command.name)]
    end = time.monotonic() + options.seconds
    seconds = {command.name: _whole_run(command.program, command.port) for command in commands}
    counts: Counter[tuple[str, str, str]] = Counter()
    stops = 0
    while stops < options.moments and time.monotonic() < end:
        (command,) = rng.choices(commands, [command.share for command in commands])
        stop = rng.choice(_STOPS)
        ended = _stopped(command, stop, rng, seconds[command.name])
        stops += ended != _DONE
        outcome = "whole" if command.is_whole() else "BROKEN"
        left = [path.name for path in temporary.iterdir() if not path.name.startswith(_LIBRARIES)]
        if left and stop != "SIGKILL":
            print(command.name, stop, ended, left)
            outcome += ", TEMPORARY FILES"
        shutil.rmtree(temporary)
        temporary.mkdir()
        counts[command.name, stop, f"{ended}, {outcome}"] += 1
        if rng.random() < 0.1:
            seconds[command.name] = min(seconds[command.name], _whole_run(command.program, command.port))
            names = {path.name for path in command.folder.iterdir()}
            found = "clean" if names == command.expected else f"LEFTOVERS {names ^ command.expected}"
            counts[command.name, "then a whole run", found] += 1
        print(f"{stops} of {options.moments} stops", end="\r", file=sys.stderr, flush=True)
    rows = [(*key, str(count)) for key, count in sorted(counts.items())]
    print(markdown(("command", "stopped by", "ended, and what is there", "times"), rows))


def _commands(work: Path) -> list[_Command]:
    bundle, built, asked = (work / name / "bundle" for name in ("exported", "built", "asked"))
    answered, calibrated, drawing = work / "answered", work / "calibrated", asked.parent / "drawing.png"
    for folder in (bundle.parent, asked.parent, answered, calibrated):
        folder.mkdir(exist_ok=True)
    tiny = "trio-export tiny --dtype float32 --max-text 64 --max-new-tokens 16 --force --out"
    export, further = _program(tiny, bundle), [sys.executable, "-c", _FURTHER, str(asked), _PICTURE]
    if not (built.exists() and asked.exists()):
        _call(export)
        shutil.copytree(bundle, built, dirs_exist_ok=True)
        _call(_program(f"{tiny[:-6]} --follow-ups --out", asked))
    content, answers = _content(asked), _call(further)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    search = f"trio-calibrate tiny --samples {drawn_questions(6)} --target jetson-orin-nano-8 --no-export"
    search += " --layers 1,2 --keeps 10%,40% --evaluations 1 --max-stages 2 --nms-thresholds 0.8"
    serve = _program("trio-serve --port", port, asked)
    question = ["--image", _PICTURE, "--prompt", _QUESTION]

    def is_whole() -> bool:
        return _content(asked) == content and _parse(asked.parent)

    written = asked.parent, frozenset({"bundle", "drawing.png", "profile.json"})
    return [
        _Command("trio-export", export, lambda: _answers(bundle), bundle.parent, frozenset({"bundle"}), 1),
        _Command("trio-build", _program("trio-build --backend onnxruntime --force", built), lambda: _answers(built),
                 built / "engines", frozenset({"onnxruntime-cpu"}), 3),
        _Command("trio-eval", _program("trio-eval --data", drawn_questions(24), "--work", answered / "work", "--json",
                 answered / "report.json", built), lambda: _answers(built) and _parse(answered), answered,
                 frozenset({"work", "report.json"}), 4),
        _Command("trio-calibrate", _program(f"{search} --force --out", calibrated / "result"), lambda: _parse(calibrated),
                 calibrated, frozenset({"result"}), 1),
        _Command("trio-run", _program("trio-run", asked, "--show-kept", drawing, *question), is_whole, *written, 5),
        _Command("trio-profile", _program("trio-profile --runs 2 --seconds 2 --json", asked.parent / "profile.json",
                 asked, *question), is_whole, *written, 5),
        _Command("trio-serve", serve, lambda: is_whole() and _whole_run(serve, port) > 0, *written, 6, port),
        _Command("further questions", further, lambda: is_whole() and _call(further) == answers, *written, 4),
    ]  # fmt: skip


def _program(start: str, *arguments: object) -> list[str]:
    name, *options = start.split()
    return [str(Path(sys.executable).with_name(name)), *options, *map(str, arguments)]


def _content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _answers(bundle: Path) -> bool:
    try:
        with Pipeline.from_bundle(bundle, backend="onnxruntime", threads=1) as pipeline:
            return bool(pipeline.generate(None, "what is this?", max_new_tokens=2).text)
    except TrioEdgeError as error:
        print(error)
        return False


def _parse(folder: Path) -> bool:
    """Return whether ``folder`` has results in JSON, and every one of them and every drawing is whole."""
    results = list(folder.glob("**/*.json"))
    try:
        for path in folder.glob("*.png"):
            Image.open(path).load()
        return bool(results) and all(json.loads(path.read_text("utf-8")) for path in results)
    except (OSError, ValueError) as error:
        print(error)
        return False


def _whole_run(program: Sequence[str], port: int | None) -> float:
    """Run a command to its end, or a server until it answers, and return the seconds."""
    start = time.monotonic()
    if port is None:
        _call(program)
        return time.monotonic() - start
    with subprocess.Popen(program, stderr=subprocess.DEVNULL) as process:
        while not _ask(port):
            if process.poll() is not None or time.monotonic() > start + 120:
                raise SystemExit(f"{program}: expected an answer, got none; code {process.poll()}")
        seconds = time.monotonic() - start
        process.terminate()
    return seconds


def _call(program: Sequence[str]) -> str:
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(program)}: {result.stderr[-500:]}")
    return result.stdout


def _ask(port: int, kind: str = "image") -> bool:
    """Ask a server about a picture, also one that is called a video, and return whether it answers."""
    url = f"data:{kind}/png;base64,{base64.b64encode(Path(_PICTURE).read_bytes()).decode()}"
    content = [{"type": f"{kind}_url", f"{kind}_url": {"url": url}}, {"type": "text", "text": _QUESTION}]
    body = json.dumps({"model": "bundle", "messages": [{"role": "user", "content": content}]})
    with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        try:
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            time.sleep(0.02)
            return False


def _ask_on(process: subprocess.Popen[bytes], port: int) -> None:
    """Ask a server until it has ended."""
    while process.poll() is None:
        _ask(port)
        _ask(port, "video")


def _stopped(command: _Command, stop: str, rng: random.Random, seconds: float) -> str:
    """Run a command, stop it, and return how it ended."""
    limit = None
    if stop == "full disk":
        files = (path for path in command.folder.rglob("*") if path.is_file())
        largest = max(path.stat().st_size for path in files)
        size = int(largest ** rng.uniform(0, 1))

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    if rng.random() < 0.5:
        shutil.rmtree(command.folder / "work", ignore_errors=True)  # so trio-eval asks again
    process = subprocess.Popen(
        command.program,
        preexec_fn=limit,
        start_new_session=True,  # and a process group, in which nothing may live on
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if serves := command.port is not None:
        threading.Thread(target=_ask_on, args=(process, command.port), daemon=True).start()
        seconds *= 2  # half of the stops come after it has loaded
    if stop != "full disk" or serves:
        time.sleep(rng.uniform(0, seconds))
        process.send_signal(signal.SIGKILL if stop == "SIGKILL" else signal.SIGTERM)
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "NO END"
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        return "A CHILD LIVES ON"
    if b"Traceback" in errors:
        print(command.name, stop, errors.decode()[-1500:])
        return "TRACEBACK"
    ends = {0: "code 0" if serves else _DONE, 2: "one line", 130: "interrupted"}
    return ends.get(process.returncode, f"code {process.returncode}")


if __name__ == "__main__":
    main()
