"""Questions about a drawn image, the packaged model that answers them without torch, and the allowed difference of two answers.

The package has the bundle's graphs, manifest and answers next to this file. The bundle's weights file equals the packaged
checkpoint's, so the package has it only once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
from PIL import Image

from trio_edge.runtime.bundle.errors import BundleError
from trio_edge.runtime.bundle.manifest import MANIFEST_NAME
from trio_edge.runtime.model.first_token import first_token_kl, summary_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.pipeline import Pipeline

GRAPHS = Path(__file__).parent / "bundle"
EXPECTED = Path(__file__).parent / "expected.json"
_WEIGHTS = "model.safetensors"
EXPORT_OPTIONS = ("--max-text", "64", "--max-new-tokens", "16")
"""Options with which the Makefile exports the packaged graphs, in float16."""
# a file in the working directory must not pass for a package
SAFE_ENVIRONMENT = {**os.environ, "PYTHONSAFEPATH": "1"}
NEW_TOKENS = 8
"""Tokens per answer: the second decode step is captured as a CUDA graph, and later ones replay it."""
LOGITS_RTOL = LOGITS_ATOL = 5e-2
"""For float16 weights and activations; ``tests/tolerances.py`` has the reason."""
LEAST_KEPT = 0.95
"""Share of kept tokens that two backends must have in common on a user's bundle: rounding decides between equal scores."""
MOST_KL = 0.05
"""Most nats between the first tokens' distributions of two backends on a user's bundle."""


class CheckQuestion(NamedTuple):
    """A question about the image ``draw(width, height)``."""

    width: int
    height: int
    prompt: str


QUESTIONS = (
    CheckQuestion(96, 96, "what color is the circle ?"),
    CheckQuestion(96, 96, "what color is the square ?"),
    CheckQuestion(200, 150, "how many squares are there ?"),
)
"""For the packaged model, whose vocabulary has only the words of its training images."""


class AnswerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One greedy answer."""

    prompt: str
    text: str
    ids: list[int]
    kept: list[list[int]]
    """Kept visual tokens of each stage."""
    logits: list[float]
    """The first token's, for the whole vocabulary."""


def put_together(target: Path, *, graphs: Path | None = None) -> Path:
    """Write the packaged bundle to ``target``, a new folder, and return it.

    Engines are built into this copy; the package's own folder may not be writable.

    Args:
        target: The new folder.
        graphs: Folder of graphs and manifest; None for the package's.

    A clone has no graphs: it exports the packaged model, which needs torch.

    Raises:
        BundleError: If there are no graphs and the export fails.
    """
    source = GRAPHS if graphs is None else graphs
    if not (source / MANIFEST_NAME).is_file():
        return _exported(target)
    shutil.copytree(source, target)
    weights = files("trio_edge.export").joinpath("tiny", _WEIGHTS)
    (target / "weights").mkdir(exist_ok=True)
    (target / "weights" / _WEIGHTS).write_bytes(weights.read_bytes())
    return target


def _exported(target: Path) -> Path:
    code = "import sys; from trio_edge.export.cli import main; sys.exit(main())"
    options = ["tiny", "--out", str(target), "--dtype", "float16", *EXPORT_OPTIONS]
    command = [sys.executable, "-c", code, *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=SAFE_ENVIRONMENT)
    if ended.returncode:
        problem = (ended.stderr.splitlines() or ["it printed nothing"])[-1]
        raise BundleError(
            f"{GRAPHS}: expected the graphs of a wheel, or trio-export to make them, got: {problem}; or name a bundle with"
            " --bundle"
        )
    return target


def stored_answers() -> list[AnswerRecord]:
    """Return the answers that ``benchmarks/record_check.py`` stored."""
    return msgspec.json.decode(EXPECTED.read_bytes(), type=list[AnswerRecord])


def draw(width: int, height: int) -> Image.Image:
    """Return an image of a red circle and a blue square, with the same pixels on every machine."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([100 + 40 * x // width, 100 + 40 * y // height, 120 + 0 * x], axis=-1)
    side = min(width, height)
    circle = (x - 0.25 * width) ** 2 + (y - 0.3 * height) ** 2 < (0.17 * side) ** 2
    square = (abs(x - 0.7 * width) < 0.15 * side) & (abs(y - 0.7 * height) < 0.15 * side)
    pixels[circle], pixels[square] = (220, 40, 40), (40, 80, 220)
    return Image.fromarray(pixels.astype(np.uint8))


def answer(pipeline: Pipeline, questions: Sequence[CheckQuestion]) -> list[AnswerRecord]:
    """Return the answers of a loaded bundle, all of the same length."""
    count = min(NEW_TOKENS, pipeline.manifest.max_new_tokens)
    records = []
    for question in questions:
        generation = pipeline.generate(
            draw(question.width, question.height),
            question.prompt,
            max_new_tokens=count,
            min_new_tokens=count,
            temperature=0.0,
        )
        text = generation.text  # runs the generation
        records.append(
            AnswerRecord(
                prompt=question.prompt,
                text=text,
                ids=generation.token_ids,
                kept=[kept.tolist() for kept in generation.kept],
                logits=generation.first_logits.tolist(),
            )
        )
    return records


def largest_difference(got: Sequence[AnswerRecord], expected: Sequence[AnswerRecord]) -> float:
    """Return the largest absolute difference of two logits."""
    pairs = [(np.asarray(a.logits), np.asarray(b.logits)) for a, b in zip(got, expected)]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def exact_difference(got: AnswerRecord, expected: AnswerRecord) -> str | None:
    """Return the first difference of two answers that may differ only by rounding; None if there is none."""
    if (kept := _kept_difference(got, expected, least=1.0)) is not None:
        return kept
    found, wanted = np.asarray(got.logits), np.asarray(expected.logits)
    if found.shape != wanted.shape:
        return f"{len(found)} logits for {len(wanted)}"
    if not np.allclose(found, wanted, rtol=LOGITS_RTOL, atol=LOGITS_ATOL):
        return f"a logit differs by {np.abs(found - wanted).max():.3g}, allowed are {LOGITS_ATOL:g}"
    if got.ids != expected.ids:
        return f"the answer is {got.text!r}, not {expected.text!r}"
    return None


def close_difference(got: AnswerRecord, expected: AnswerRecord) -> str | None:
    """Return the first difference of two answers that two backends' rounding cannot explain; None if there is none."""
    if (kept := _kept_difference(got, expected, least=LEAST_KEPT)) is not None:
        return kept
    reference = summary_of(np.asarray(expected.logits, np.float32))
    divergence = first_token_kl(reference, np.asarray(got.logits, np.float32))
    if not divergence <= MOST_KL:
        return f"the first token's distribution differs by {divergence:.3g} nats, allowed are {MOST_KL:g}"
    return None


def _kept_difference(got: AnswerRecord, expected: AnswerRecord, *, least: float) -> str | None:
    if len(got.kept) != len(expected.kept):
        return f"{len(got.kept)} stages for {len(expected.kept)}"
    for stage, (found, wanted) in enumerate(zip(got.kept, expected.kept), start=1):
        same = len(set(found) & set(wanted))
        if len(found) != len(wanted) or same < least * len(wanted):
            return f"stage {stage} keeps {same} of the {len(wanted)} expected tokens"
    return None
