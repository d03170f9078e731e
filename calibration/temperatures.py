"""Temperatures of a bundle's decisions, fitted on samples with answers and stored in the bundle.

Part of the images is held out, so that the table says what the temperatures are worth on others. A kind of question with few
samples keeps 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from trio_edge.calibration.evaluate.decisions import (
    Judged,
    at_temperature,
    fitted_temperature,
    question_of,
    reliability,
    right_option,
    with_options,
)
from trio_edge.calibration.progress import SILENT
from trio_edge.calibration.questions import read_questions
from trio_edge.calibration.search.samples import split_samples
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.files import write_output
from trio_edge.runtime.decisions.wording import TEMPERATURES_NAME
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trio_edge.calibration.evaluate.decisions import Reliability
    from trio_edge.calibration.progress import StepProgress
    from trio_edge.calibration.questions import Sample

LEAST_SAMPLES = 20
"""Fewest samples of a kind of question whose temperature is fitted."""


class FittedKind(NamedTuple):
    """One kind of question, with its measures on held-out samples."""

    kind: str
    temperature: float
    samples: int
    before: Reliability
    """At temperature 1."""
    after: Reliability


def fit_temperatures(
    bundle: Path,
    samples: Path,
    *,
    count: int | None = None,
    held_out: float,
    seed: int,
    progress: StepProgress = SILENT,
) -> list[FittedKind]:
    """Fit a temperature for each kind of question, and store them in the bundle.

    Raises:
        DataError: If the samples cannot be read, or too few are of one kind.
        BundleError: If the bundle is broken.
    """
    split = split_samples(with_options(read_questions(samples, count=count)), held_out=held_out, seed=seed)
    with Pipeline.from_bundle(bundle) as pipeline:
        progress.step("asking", len(split.search))
        searched = [_judged(pipeline, sample, progress) for sample in split.search]
        progress.step("asking held-out samples", len(split.held_out))
        held = [_judged(pipeline, sample, progress) for sample in split.held_out]
    kinds = {one.kind: [other for other in searched if other.kind == one.kind] for one in held}
    fitted = {kind: found for kind, found in kinds.items() if len(found) >= LEAST_SAMPLES}
    if not fitted:
        raise DataError(
            f"--samples {samples}: expected at least {LEAST_SAMPLES} samples of one kind of question besides those held out, got"
            f" {max(map(len, kinds.values()), default=0)}; add some"
        )
    temperatures = {kind: fitted_temperature(found) for kind, found in fitted.items()}
    content = msgspec.json.format(msgspec.json.encode(temperatures)) + b"\n"
    write_output("--temperatures", bundle / TEMPERATURES_NAME, content)
    return [_fitted(kind, temperatures[kind], kinds[kind], held) for kind in temperatures]


def _judged(pipeline: Pipeline, sample: Sample, progress: StepProgress) -> Judged:
    """Return a sample's probabilities at temperature 1."""
    (decision,) = pipeline.decide(list(sample.images), question_of(sample))
    progress.sample()
    kind = decision.question.kind
    judged = Judged(
        kind=kind, shares=decision.probabilities, right=right_option(sample), label_mass=decision.label_mass
    )
    return at_temperature(judged, 1 / pipeline.wording.temperature(decision.question))


def _fitted(kind: str, temperature: float, searched: Sequence[Judged], held: Sequence[Judged]) -> FittedKind:
    own = [one for one in held if one.kind == kind]
    after = [at_temperature(one, temperature) for one in own]
    return FittedKind(kind, temperature, len(searched), reliability(own), reliability(after))
