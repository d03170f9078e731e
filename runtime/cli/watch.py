"""``trio-watch SOURCE --bundle BUNDLE --questions FILE``: a line of JSON for each decision about a camera's newest frame."""

from __future__ import annotations

import io
import re
import sys
from contextlib import ExitStack, closing, suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trio_edge.runtime.bundle.errors import DataError, printable
from trio_edge.runtime.bundle.files import write_output
from trio_edge.runtime.cli.console import backend_options, lose, run
from trio_edge.runtime.cli.interruption import interruptible

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image

    from trio_edge.runtime.decisions.watcher import Watcher, WatchEvent

_PATH = click.Path(path_type=Path)
_LIVE = "Of a video file or a folder, too, take only the newest frame; a file plays at its own speed."
_CHANGES = "Print a decision only if its answer is another than before."
_HOLD = "Frames in a row that must have an answer before it counts as a change."
_MARGIN = "Smallest difference of the two highest probabilities with which an answer counts as a change."
_THRESHOLD = (
    "Difference of gray levels, 0 to 255, from which a frame is not like the last one that the model saw; 0 runs the model for"
    " every frame. [default: 2]"
)
_WEBHOOK = "Address, http or https, that gets each line as a POST."
_SAVE = "Folder for a JPEG of each event, with the kept visual tokens."


@click.command("trio-watch", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source")
@click.option("--bundle", required=True, type=_PATH, help="Bundle that answers.")
@click.option("--questions", required=True, type=_PATH, help="JSON file of questions.")
@click.option("--live", is_flag=True, help=_LIVE)
@click.option("--changes", "only_changes", is_flag=True, help=_CHANGES)
@click.option("--hold", type=click.IntRange(1, 1 << 20), default=1, show_default=True, help=_HOLD)
@click.option("--margin", type=click.FloatRange(0, 1), default=0.0, show_default=True, help=_MARGIN)
@click.option("--threshold", type=click.FloatRange(0, 255), help=_THRESHOLD)
@click.option("--webhook", "address", metavar="URL", help=_WEBHOOK)
@click.option("--save-frames", "folder", type=_PATH, help=_SAVE)
@click.option(
    "--max-saved",
    type=click.IntRange(1, 1 << 20),
    default=1000,
    show_default=True,
    help="Most files of --save-frames; the oldest ones are deleted.",
)
@backend_options()
def command(source: str, **options: Any) -> int:
    """Answer questions about each new frame of SOURCE, in lines of JSON.

    SOURCE is a camera (0 or /dev/video0), an address (rtsp, rtsps, http, https), a video file or a folder of images. A camera or an
    address is read until Ctrl-C, and always at its newest frame. Files and folders are read whole.
    """
    with suppress(KeyboardInterrupt), interruptible() as check:  # Ctrl-C is the usual end
        try:
            _watch(source, check=check, **options)
        except BrokenPipeError:  # the reading program has ended
            lose(sys.stdout)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _watch(
    source: str,
    *,
    bundle: Path,
    questions: Path,
    live: bool,
    threshold: float | None,
    address: str | None,
    folder: Path | None,
    max_saved: int,
    check: Callable[[], None],
    only_changes: bool,
    hold: int,
    margin: float,
    **loading: Any,
) -> None:
    from trio_edge.runtime.cli.webhook import Webhook
    from trio_edge.runtime.decisions.question_file import read_questions
    from trio_edge.runtime.decisions.watcher import THRESHOLD, Watcher
    from trio_edge.runtime.pipeline import Pipeline  # slow to import, and --help needs none of it
    from trio_edge.runtime.videos.live import open_frames, source_of

    place, asked = source_of(source), read_questions(questions)
    if folder is not None:
        _make_folder(folder)
    settings: dict[str, Any] = {"only_changes": only_changes, "hold": hold, "margin": margin}
    settings["threshold"] = THRESHOLD if threshold is None else threshold
    with ExitStack() as stack:
        hook = None if address is None else stack.enter_context(closing(Webhook(address, _note)))
        pipeline = stack.enter_context(Pipeline.from_bundle(bundle, **loading))
        watcher = Watcher(pipeline, asked, **settings)
        stack.push(partial(_note_count, watcher))
        frames = stack.enter_context(
            open_frames(place, live=live, note=_note)
        )  # opened when the bundle is ready
        for frame in frames:
            for event in watcher.see(frame.image(), frame=frame.number, at=frame.time):
                line = event.to_json(source=frame.source)
                print(line, flush=True)
                if hook is not None:
                    hook.post(line.encode())
                if folder is not None:
                    _save(folder, event, watcher.drawing(event), most=max_saved)
            check()


def _note(text: str) -> None:
    print(f"trio-watch: {printable(text)}", file=sys.stderr)


def _note_count(watcher: Watcher, kind: type[BaseException] | None, *_: object) -> None:
    if kind in (None, KeyboardInterrupt):  # an error is one line
        _note(f"{watcher.num_frames} frames, {watcher.num_runs} of them not like the one before")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"--save-frames {folder}: cannot be created ({error}); choose another folder"
        ) from None


def _save(folder: Path, event: WatchEvent, drawing: Image.Image, *, most: int) -> None:
    """Write a drawing, and delete the oldest ones above ``most``; their names begin with the time."""
    when = datetime.fromtimestamp(event.time, timezone.utc)
    words = (event.decision.question.name or "", event.decision.choice)
    told = "-".join(re.sub(r"\W+", "_", word)[:60] for word in words)
    content = io.BytesIO()
    drawing.save(content, "JPEG", quality=90)
    name = f"trio-watch-{when:%Y%m%dT%H%M%S.%fZ}-frame{event.frame}-{told}.jpg"
    write_output("--save-frames", folder / name, content.getvalue())
    for old in sorted(folder.glob("trio-watch-*.jpg"))[:-most]:
        old.unlink(missing_ok=True)
