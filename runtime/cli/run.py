"""``trio-run BUNDLE --image FILE --prompt TEXT``: streams an answer, draws the kept tokens, compares with keep-all."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trio_edge.runtime.bundle.errors import BundleError, ImageError, printable
from trio_edge.runtime.bundle.files import check_outputs, write_output
from trio_edge.runtime.bundle.limits import MAX_IMAGE_PIXELS, MOST_IMAGE_PIXELS
from trio_edge.runtime.cli.console import backend_options, level_option, lookup_option, run
from trio_edge.runtime.cli.decide import NAMES as DECISION_NAMES
from trio_edge.runtime.cli.decide import OPTIONS as DECISION_OPTIONS
from trio_edge.runtime.cli.decide import decide, described_level, question_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from PIL import Image

    from trio_edge.runtime.answer import Generation
    from trio_edge.runtime.decisions.questions import Decision
    from trio_edge.runtime.engines.cpu import CpuAccuracy
    from trio_edge.runtime.model.answers.drafts import LookupTokens
    from trio_edge.runtime.pipeline import Pipeline


_PATH = click.Path(path_type=Path)
_SAMPLING = {
    "--temperature": (float, "Sampling temperature; 0 is greedy."),
    "--top-p": (float, "Sample only from the most likely tokens whose probabilities sum to this."),
    "--top-k": (int, "Sample only from this many most likely tokens; 0 means all."),
    "--repetition-penalty": (float, "Divisor for logits of tokens that occurred before; 1 means none."),
    "--no-repeat-ngram-size": (int, "Length of token sequences that may not occur twice; 0 means no limit."),
    "--min-new-tokens": (int, "Shortest answer in tokens."),
}
_IMAGES = "Image to ask about. May be repeated; leave it out for a question without an image."
_FPS = "Frames per second to sample from the video. [default: the checkpoint's]"
_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.option("--image", "images", multiple=True, type=_PATH, help=_IMAGES),
    click.option("--video", type=_PATH, help="Video file, or folder of frames, to ask about (Qwen-VL only)."),
    click.option("--fps", type=float, help=_FPS),
    click.option("--num-frames", type=int, help="Frames to sample from the whole video, instead of --fps."),
    click.option("--source-fps", type=float, help="Frame rate of a folder of frames, in frames per second."),
    click.option(
        "--max-pixels",
        type=click.IntRange(1, MOST_IMAGE_PIXELS),
        default=MAX_IMAGE_PIXELS,
        show_default=True,
        help="Largest image in pixels; a larger one is refused before it is decoded.",
    ),
    click.option("--prompt", required=True, help="Question to answer."),
    click.option("--system", help="System prompt, where the chat template takes one."),
    backend_options(),
    click.option(
        "--max-new-tokens",
        type=int,
        help="Longest answer in tokens. [default: the checkpoint's, at most the bundle's]",
    ),
    *(
        click.option(name, type=kind, help=f"{text} [default: the checkpoint's]")
        for name, (kind, text) in _SAMPLING.items()
    ),
    click.option("--seed", type=int, help="Random seed that makes sampling repeatable."),
    *DECISION_OPTIONS,
    level_option(),
    lookup_option(),
    click.option(
        "--show-kept",
        type=_PATH,
        help="Image file to write: the input images with the kept visual tokens marked, one below the other.",
    ),
    click.option(
        "--compare-full",
        is_flag=False,
        flag_value="",
        metavar="[BUNDLE]",
        help="Keep-all bundle that answers as well, or none for BUNDLE's own level that keeps all; prints how answer, times and"
        " memory differ.",
    ),
)


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command("trio-run", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=_PATH)
@_with_options
def command(
    bundle: Path,
    images: tuple[Path, ...],
    prompt: str,
    backend: str,
    threads: int,
    cpu_accuracy: CpuAccuracy,
    max_pixels: int,
    show_kept: Path | None,
    compare_full: str | None,
    lookup: LookupTokens,
    **settings: Any,
) -> int:
    """Answer a question about images or a video with BUNDLE.

    Prints the answer while it is generated, then the number of visual tokens kept. Times go to standard error. With --yes-no,
    --choices or --levels it prints probabilities instead, which takes no decoding.
    """
    from trio_edge.runtime.pipeline import Pipeline  # slow to import, and --help needs none of it

    if not prompt.strip():
        raise click.UsageError("--prompt: expected a question, got no words; write one")
    if show_kept is not None:
        _check_drawing_target(show_kept, is_seen=bool(images) or settings["video"] is not None)
    full_level = None if compare_full is None else _keep_all_level(Path(compare_full or bundle))
    loading: dict[str, Any] = {"backend": backend, "threads": threads}
    loading |= {"cpu_accuracy": cpu_accuracy, "max_pixels": max_pixels, "lookup": lookup}
    decision = {name: settings.pop(name) for name in DECISION_NAMES}
    if any(value not in (None, False) for value in decision.values()):
        how = {name: decision.pop(name) for name in ("both_orders", "as_json")}
        settings |= {"compare_full": compare_full, "lookup": lookup or None}
        question = question_of(prompt, **decision)
        if show_kept is not None and settings["video"] is not None:
            raise click.UsageError(
                "--show-kept: expected images with these answers, got a video; leave it out"
            )
        with Pipeline.from_bundle(bundle, **loading) as pipeline:
            found, opened = decide(pipeline, images, question, max_pixels=max_pixels, **how, **settings)
            if show_kept is not None:
                _draw(pipeline, opened, found, show_kept)
        return 0
    with Pipeline.from_bundle(bundle, **loading) as pipeline:
        answer = pipeline.generate(images, prompt, **settings)
        for piece in answer:
            print(_shown(piece), end="", flush=True)
        print()
        statistics = answer.statistics
        graphs = ", ".join(f"{name} {ms:.1f}" for name, ms in statistics.graph_ms.items())
        speed = f"{statistics.tokens_per_second:.1f} tokens/s, decode steps: {statistics.steps}"
        times = f"first token {statistics.ttft_ms:.1f} ms ({graphs}), {speed}"
        kept = f"KV {statistics.kv_bytes / 1e6:.2f} MB, kept per stage {list(statistics.kept_tokens)}"
        redone = statistics.repaired_stages
        repaired = f"; {redone} stages redone on the host" if redone else ""
        level = f", {described_level(statistics)}" if pipeline.manifest.levels else ""
        print(f"{pipeline.backend_name}: {times}, {kept}{repaired}{level}", file=sys.stderr)
        for note in (*pipeline.notes, *_remarks(pipeline, prompt, answer)):  # the answer may add notes
            print(f"trio-run: {printable(note)}", file=sys.stderr)
        if show_kept is not None:
            _draw(pipeline, answer.images, answer, show_kept)
        if answer.images:
            kept = f"{statistics.average_keep * statistics.visual_tokens:.1f} kept on average"
            share = f"{100 * statistics.average_keep:.1f} %"
            print(f"visual tokens: {statistics.visual_tokens} in, {kept} ({share})")
    if compare_full is not None:
        with Pipeline.from_bundle(compare_full or bundle, **loading) as full:
            reference = full.generate(images, prompt, **{**settings, "level": full_level})
            _ = reference.text
        _print_comparison(answer, reference)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _shown(text: str) -> str:
    """Return a piece of an answer, escaped for a terminal; files and pipes get it unchanged."""
    return printable(text, but="\n\t") if sys.stdout.isatty() else text


def _remarks(pipeline: Pipeline, prompt: str, answer: Generation) -> Iterator[str]:
    """Yield what explains an answer that helps nobody."""
    if pipeline.tokenizer.has_only_unknown(prompt):
        num_known = pipeline.tokenizer.num_tokens
        yield f"--prompt: expected some of the {num_known} words that the model knows, got none of them; ask in its words"
    if not answer.text.strip():
        yield f"the answer has no words, {len(answer.token_ids)} tokens; ask in other words, or add --min-new-tokens"


_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def _keep_all_level(bundle: Path) -> str:
    """Return the name of the bundle's largest level without stages.

    Raises:
        BundleError: If there is none.
    """
    from trio_edge.runtime.bundle.reader import open_bundle

    manifest = open_bundle(bundle).manifest
    for name in reversed(manifest.level_names):
        if not manifest.at_level(name).schedule.stages:
            return name
    raise BundleError(
        f"{bundle}: expected a keep-all bundle, or a level that keeps all, got stages; export --keep all, or --level full=all"
    )


def _check_drawing_target(path: Path, *, is_seen: bool) -> None:
    if not is_seen:
        raise click.UsageError("--show-kept: expected --image or --video as well, got none; name one")
    if path.suffix.lower() not in _KINDS:
        raise click.UsageError(
            f"--show-kept: expected a .png, .jpg or .webp file, got {path.name!r}; rename it"
        )
    check_outputs({"--show-kept": path})


def _draw(
    pipeline: Pipeline, images: Sequence[Image.Image], answer: Generation | Decision, target: Path
) -> None:
    from trio_edge.runtime.images.overlay import draw_all

    schedule = pipeline.manifest.at_level(answer.statistics.level).schedule
    captions = [f"layer {layer}" for layer in schedule.layers]
    drawing, content = draw_all(images, answer.layouts, answer.kept, captions=captions), io.BytesIO()
    try:
        drawing.save(content, _KINDS[target.suffix.lower()])
    except (OSError, ValueError) as error:  # larger than the format allows
        raise ImageError(f"{target}: cannot be written ({error}); choose another file") from None
    write_output("--show-kept", target, content.getvalue())


def _print_comparison(answer: Generation, reference: Generation) -> None:
    from trio_edge.runtime.model.first_token import first_token_kl, summary_of

    reduced, full = answer.statistics, reference.statistics

    def ratio(ours: float, theirs: float) -> str:
        return f"{theirs / ours:.2f}x" if ours > 0 else "-"

    everything = summary_of(reference.first_logits, num_tokens=len(reference.first_logits))
    print(f"keep-all answer: {_shown(reference.text)}")
    print(f"KL of the first token: {first_token_kl(everything, answer.first_logits):.4f} nats")
    print(
        f"keep-all / reduced: first token {ratio(reduced.ttft_ms, full.ttft_ms)},"
        f" prefill {ratio(reduced.prefill_ms, full.prefill_ms)},"
        f" tokens/s {ratio(full.tokens_per_second, reduced.tokens_per_second)},"
        f" KV bytes {ratio(reduced.kv_bytes, full.kv_bytes)}"
    )
