"""When the level "auto" goes up: margins found on samples with answers, checked on others, and stored in the bundle.

Every sample is answered at every level once. Chains of one, two or three levels with their margins are then compared without
running anything again: a sample stops at the first level of the chain whose first token has a margin that is large enough.
FLOPs of a level after another leave out what it takes from there.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from trio_edge.calibration.evaluate.answer_cost import level_flops
from trio_edge.calibration.metrics import check_metric, metric_for
from trio_edge.calibration.progress import SILENT
from trio_edge.calibration.questions import read_questions
from trio_edge.calibration.search.samples import split_samples
from trio_edge.profiling.statistics import paired_interval, score_interval
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.files import write_output
from trio_edge.runtime.model.levels import MARGINS_NAME, margin_of
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from PIL import Image

    from trio_edge.calibration.metrics import Metric
    from trio_edge.calibration.progress import StepProgress
    from trio_edge.calibration.questions import Sample

WANTED_ACCURACY = 0.99
_STEPS = 40
"""Margins to try for a chain of two levels."""
_STEPS_OF_THREE = 12
_MAX_TOKENS = 32


class Answered(NamedTuple):
    """One sample at every level."""

    image_id: str
    score: dict[str, float]
    margin: dict[str, float]
    """Difference between the first token's two highest probabilities."""
    flops: dict[tuple[str | None, str], float]
    """FLOPs of the prefill at the second level, after the first one has run; None for the first stands for no level."""


class Chain(NamedTuple):
    """Levels from low to high, each with the margin that ends there."""

    margins: dict[str, float]

    def stops(self, sample: Answered) -> list[str]:
        """Return the levels that run for a sample; the last one answers."""
        levels = []
        for level, margin in self.margins.items():
            levels.append(level)
            if sample.margin[level] >= margin:
                break
        return levels

    def scores(self, samples: Sequence[Answered]) -> list[float]:
        """Return each sample's score."""
        return [sample.score[self.stops(sample)[-1]] for sample in samples]

    def flops_of(self, samples: Sequence[Answered]) -> float:
        """Return the mean FLOPs of a prefill."""
        return float(np.mean([self._flops(sample) for sample in samples]))

    def _flops(self, sample: Answered) -> float:
        levels = self.stops(sample)
        return sum(sample.flops[pair] for pair in zip([None, *levels], levels))


class JudgedChain(NamedTuple):
    """A chain on held-out samples."""

    label: str
    accuracy: float
    interval: tuple[float, float]
    difference: tuple[float, float]
    """Interval of the accuracy minus that of the highest level, on the same samples."""
    flops: float
    """Mean, as a share of the highest level's."""
    up: float
    """Share of samples that did not stop at the lowest level."""


class FoundMargins(NamedTuple):
    """The chosen chain, and all that it was compared with."""

    chain: Chain
    judged: list[JudgedChain]
    num_samples: int
    num_held_out: int


def find_margins(
    bundle: Path,
    samples: Path,
    *,
    accuracy: float = WANTED_ACCURACY,
    mean_flops: float | None = None,
    count: int | None = None,
    held_out: float,
    seed: int,
    progress: StepProgress = SILENT,
) -> FoundMargins:
    """Find the margins of the level "auto" and store them in the bundle.

    ``accuracy`` is a share of the highest level's, at which the fewest FLOPs are wanted; with ``mean_flops``, a share of the
    highest level's FLOPs, the highest accuracy is wanted instead.

    Raises:
        DataError: If the samples cannot be read or have no answers, or the bundle has one level.
        BundleError: If the bundle is broken.
    """
    questions = read_questions(samples, count=count)
    metric = metric_for(questions)
    check_metric(questions, metric)
    split = split_samples(questions, held_out=held_out, seed=seed)
    with Pipeline.from_bundle(bundle) as pipeline:
        names = pipeline.manifest.level_names
        if len(names) < 2:
            raise DataError(
                f"--levels: expected a bundle with several levels, got one in {bundle}; export with --level"
            )
        progress.step("asking", len(questions))
        searched = [answered(pipeline, sample, metric, progress) for sample in split.search]
        held = [answered(pipeline, sample, metric, progress) for sample in split.held_out]
    chain = best_chain(searched, names, accuracy=accuracy, mean_flops=mean_flops)
    content = msgspec.json.format(msgspec.json.encode(chain.margins)) + b"\n"
    write_output("--levels", bundle / MARGINS_NAME, content)
    fixed = [Chain({name: 0.0}) for name in names]
    judged = [judged_on(one, held, top=fixed[-1]) for one in (*fixed, chain)]
    return FoundMargins(chain, judged, len(searched), len(held))


def answered(pipeline: Pipeline, sample: Sample, metric: Metric, progress: StepProgress) -> Answered:
    """Answer a sample at every level."""
    found = Answered(sample.image_id, {}, {}, {})
    for name in pipeline.manifest.level_names:
        generation = pipeline.generate(
            list(sample.images),
            sample.question,
            max_new_tokens=min(_MAX_TOKENS, pipeline.manifest.max_new_tokens),
            temperature=0.0,
            level=name,
        )
        found.score[name] = metric.score(metric.read(generation.text, sample), sample)
        found.margin[name] = margin_of(generation.first_logits)
        add_flops(found, pipeline, name, generation.images, num_text=generation.statistics.text_tokens)
    progress.sample()
    return found


def add_flops(
    found: Answered, pipeline: Pipeline, name: str, images: Sequence[Image.Image], *, num_text: int
) -> None:
    """Add a level's FLOPs, alone and after each of the levels that ``found`` has already."""
    below = {lower for _, lower in found.flops}
    for lower in (None, *below):
        before = None if lower is None else pipeline.level_named(lower)
        level = pipeline.level_named(name)
        found.flops[lower, name] = level_flops(level, images, num_text=num_text, before=before)


def best_chain(
    samples: Sequence[Answered], names: Sequence[str], *, accuracy: float, mean_flops: float | None
) -> Chain:
    """Return the chain with the fewest FLOPs at the wanted accuracy, or the most accurate at the wanted cost."""
    top = Chain({names[-1]: 0.0})
    wanted, most = accuracy * float(np.mean(top.scores(samples))), top.flops_of(samples)
    best, best_key = top, (float("-inf"), float("-inf"))
    for chain in _chains(samples, names):
        score, flops = float(np.mean(chain.scores(samples))), chain.flops_of(samples)
        if mean_flops is None:
            is_enough, key = score >= wanted - 1e-9, (-flops, score)
        else:
            is_enough, key = flops <= mean_flops * most, (score, -flops)
        if is_enough and key > best_key:
            best, best_key = chain, key
    return best


def _chains(samples: Sequence[Answered], names: Sequence[str]) -> Iterable[Chain]:
    """Yield chains of one, two and three levels, with margins at quantiles of the samples'."""

    def quantiles(name: str, steps: int) -> list[float]:
        values = [sample.margin[name] for sample in samples]
        found = np.quantile(values, np.linspace(0, 1, steps + 1), method="higher")
        return sorted({float(f"{value:.4g}") for value in found})

    for name in names:
        yield Chain({name: 0.0})
    for low, high in itertools.combinations(names, 2):
        for margin in quantiles(low, _STEPS):
            yield Chain({low: margin, high: 0.0})
    for low, middle, high in itertools.combinations(names, 3):
        pairs = itertools.product(quantiles(low, _STEPS_OF_THREE), quantiles(middle, _STEPS_OF_THREE))
        for first, second in pairs:
            yield Chain({low: first, middle: second, high: 0.0})


def judged_on(chain: Chain, samples: Sequence[Answered], *, top: Chain) -> JudgedChain:
    """Return what a chain is worth on held-out ``samples``; ``top`` is the highest level alone."""
    scores, images = chain.scores(samples), [sample.image_id for sample in samples]
    label = next(iter(chain.margins))
    if len(chain.margins) > 1:
        label = "auto: " + " > ".join(chain.margins)
    return JudgedChain(
        label,
        float(np.mean(scores)),
        score_interval(scores, images),
        paired_interval(scores, top.scores(samples), images),
        chain.flops_of(samples) / top.flops_of(samples),
        float(np.mean([len(chain.stops(sample)) > 1 for sample in samples])),
    )
