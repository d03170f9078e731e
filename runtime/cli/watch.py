"""``trio-watch SOURCE --bundle BUNDLE --questions FILE``: a line of JSON for each decision about a camera's newest frame."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from contextlib import ExitStack, closing, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trio_edge.runtime.bundle.errors import printable
from trio_edge.runtime.bundle.files import check_outputs, write_output
from trio_edge.runtime.cli.console import backend_options, level_option, lose, run
from trio_edge.runtime.cli.interruption import interruptible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from trio_edge.runtime.decisions.watcher import WatchEvent
    from trio_edge.runtime.engines.cpu import CpuAccuracy

MOST_SAVED = 1000
"""Files of --save-frames; older ones are deleted."""
_PATH = click.Path(path_type=Path)
_LIVE = "Of a video file or a folder, too, take only the newest frame; a file plays at its own speed."
_CHANGES = "Print a decision only if its answer is another than before."
_HOLD = "Frames in a row that must have an answer before it counts as a change. [default: 1]"
_MARGIN = "Smallest difference of the two highest probabilities of an answer that counts. [default: 0]"
_THRESHOLD = (
    "Difference of gray levels, 0 to 255, from which a frame is not like the last one that the model saw; 0 runs the model for"
    " every frame. [default: 2]"
)
_SAVE = (
    f"Existing folder for a JPEG of each event, with the kept visual tokens; the newest {MOST_SAVED} stay."
)


@click.command("trio-watch", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source")
@click.option("--bundle", required=True, type=_PATH, help="Bundle that answers.")
@click.option("--questions", required=True, type=_PATH, help="JSON file of questions.")
@click.option("--live", is_flag=True, help=_LIVE)
@click.option("--changes", "only_changes", is_flag=True, help=_CHANGES)
@click.option("--hold", type=int, help=_HOLD)
@click.option("--margin", type=float, help=_MARGIN)
@click.option("--threshold", type=float, help=_THRESHOLD)
@click.option("--webhook", metavar="URL", help="Address, http or https, that gets each line as a POST.")
@click.option("--save-frames", type=_PATH, help=_SAVE)
@level_option()
@backend_options()
def command(
    source: str,
    bundle: Path,
    questions: Path,
    live: bool,
    webhook: str | None,
    save_frames: Path | None,
    backend: str,
    threads: int,
    cpu_accuracy: CpuAccuracy,
    **watching: Any,
) -> None:
    """Answer questions about each new frame of SOURCE, in lines of JSON.

    SOURCE is a camera (0 or /dev/video0), an address (rtsp, rtsps, http, https), a video file or a folder of images. A camera or an
    address is read until Ctrl-C, and always at its newest frame. Files and folders are read whole.
    """
    settings = {name: value for name, value in watching.items() if value is not None}
    # Ctrl-C is the usual end, also while the modules are imported.
    with suppress(KeyboardInterrupt), interruptible() as check, ExitStack() as stack:
        from trio_edge.runtime.cli.webhook import Webhook
        from trio_edge.runtime.decisions.question_file import read_questions
        from trio_edge.runtime.decisions.watcher import Watcher
        from trio_edge.runtime.pipeline import Pipeline
        from trio_edge.runtime.videos.live import read_frames

        # What can be wrong is read first, and the camera opened last, when the bundle is ready.
        frames, asked = read_frames(source, live=live, note=_note, check=check), read_questions(questions)
        if save_frames is not None:
            check_outputs({"--save-frames": save_frames / "trio-watch.jpg"})
        hook = None if webhook is None else stack.enter_context(closing(Webhook(webhook, _note)))
        loading: dict[str, Any] = {"backend": backend, "threads": threads, "cpu_accuracy": cpu_accuracy}
        watcher = Watcher(stack.enter_context(Pipeline.from_bundle(bundle, **loading)), asked, **settings)
        for frame in frames:
            for event in watcher.see(frame.image(), frame=frame.number, at=frame.time):
                line = event.to_json(source=frame.source)
                try:
                    print(line, flush=True)
                except BrokenPipeError:  # the reading program has ended
                    lose(sys.stdout)
                    return
                if hook is not None:
                    hook.post(line.encode())
                if save_frames is not None:
                    _save(save_frames, event, watcher.drawing(event))
            check()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    code = run(command, argv)
    if argv is None and any(thread.daemon for thread in threading.enumerate()):
        # It waits in FFmpeg for a frame. Python would end under its feet, and crash now and then.
        sys.stderr.flush()
        os._exit(code)
    return code


def _note(text: str) -> None:
    print(f"trio-watch: {printable(text)}", file=sys.stderr)


def _save(folder: Path, event: WatchEvent, drawing: Image.Image) -> None:
    """Write a drawing, and delete the oldest ones; names begin with the time."""
    when, content = datetime.fromtimestamp(event.time, timezone.utc), io.BytesIO()
    words = (event.decision.question.name or "", event.decision.choice)
    told = "-".join(re.sub(r"\W+", "_", word)[:60] for word in words)
    drawing.save(content, "JPEG", quality=90)
    name = f"trio-watch-{when:%Y%m%dT%H%M%S.%fZ}-frame{event.frame}-{told}.jpg"
    write_output("--save-frames", folder / name, content.getvalue())
    for old in sorted(folder.glob("trio-watch-*.jpg"))[:-MOST_SAVED]:
        old.unlink(missing_ok=True)
