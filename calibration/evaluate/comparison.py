"""Report of an evaluation: each run's accuracy, cost and time, and its comparison with keep-all.

Only questions that every run answered count. The structs are the schema of ``trio-eval --json``, described in
``docs/evaluation.md``.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import msgspec

from trio_edge.calibration.evaluate.decisions import Reliability, reliability
from trio_edge.calibration.evaluate.runs import RunInfo  # noqa: TC001 - msgspec reads it
from trio_edge.calibration.metrics import YesNoRates, exact_normal, yes_no_rates
from trio_edge.profiling.statistics import paired_interval, score_interval

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio_edge.calibration.evaluate.answering import Outcome

SCHEMA_VERSION = 3


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A value with its 95 % confidence interval."""

    value: float
    interval_95: tuple[float, float]
    questions: int


class AgainstReference(msgspec.Struct, frozen=True, kw_only=True):
    """One run against keep-all, on the same questions."""

    difference: Estimate
    """Accuracy minus keep-all's; paired bootstrap over images."""
    retained: float | None
    """Accuracy divided by keep-all's; None if that is 0."""
    agreement: Estimate
    """Share of questions with keep-all's reading."""
    first_token_kl: float | None
    """Mean, in nats."""
    flops_ratio: float
    """Keep-all's mean FLOPs divided by this run's."""
    ttft_ratio: float
    """Keep-all's median time to the first token divided by this run's."""


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle with one selection."""

    run: RunInfo
    accuracy: Estimate
    by_kind: dict[str, Estimate]
    yes_no: YesNoRates | None
    visual_tokens: float
    """Mean per question, before the ``reduce`` graph."""
    processed_tokens: float
    """Visual tokens per decoder layer, mean over layers and questions."""
    average_keep: float
    """``processed_tokens`` divided by keep-all's ``visual_tokens``; by its own without a reference."""
    flops: float
    """Mean per prefill: vision tower, decoder, head, selection."""
    ttft_ms: float
    """Median."""
    tokens_per_second: float | None
    """Rate of the tokens after the first; None if no answer had any."""
    kv_bytes: float
    """Mean at the end of an answer."""
    repaired_stages: int
    against_reference: AgainstReference | None
    reliability: Reliability | None
    """Only with --decide."""
    outcomes: list[dict[str, Any]]


class EvaluationData(msgspec.Struct, frozen=True, kw_only=True):
    """The questions."""

    name: str
    sha256: str
    metric: str
    questions: int
    compared: int
    """Answered by every run."""


class EvaluationConditions(msgspec.Struct, frozen=True, kw_only=True):
    """Machine, versions and settings of the measurement."""

    versions: dict[str, str]
    backend: str
    threads: int
    answer_tokens: int
    machine: dict[str, str]


class EvaluationReport(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``--json``."""

    schema_version: int
    data: EvaluationData
    conditions: EvaluationConditions
    runs: list[RunReport]
    failures: list[dict[str, str]]


def compare(runs: Sequence[tuple[RunInfo, Mapping[int, Outcome]]], *, metric: str) -> list[RunReport]:
    """Return each run's report over the questions that all answered. The reference, if there is one, is the first of ``runs``."""
    # a question that one run could not answer would move the others' means only
    common = sorted(set.intersection(*(set(outcomes) for _, outcomes in runs)))
    if not common:
        return []
    answered = [(info, [outcomes[index] for index in common]) for info, outcomes in runs]
    first, reference = answered[0]
    return [
        _run_report(info, outcomes, reference if first.is_reference else None, metric=metric)
        for info, outcomes in answered
    ]


def _run_report(
    info: RunInfo, outcomes: list[Outcome], reference: list[Outcome] | None, *, metric: str
) -> RunReport:
    kinds = sorted({outcome.kind for outcome in outcomes})
    processed = _mean(outcomes, "processed_tokens")
    decode_ms = sum(outcome.decode_ms for outcome in outcomes)
    # the first token of an answer comes with its prefill
    decoded = sum(outcome.new_tokens - 1 for outcome in outcomes)
    return RunReport(
        run=info,
        accuracy=_accuracy(outcomes),
        by_kind={kind: _accuracy([one for one in outcomes if one.kind == kind]) for kind in kinds},
        yes_no=yes_no_rates(
            [one.reading for one in outcomes], [exact_normal(one.answers[0]) for one in outcomes]
        )
        if metric == "yes-no"
        else None,
        visual_tokens=_mean(outcomes, "visual_tokens"),
        processed_tokens=processed,
        average_keep=processed / _mean(reference or outcomes, "visual_tokens"),
        flops=_mean(outcomes, "flops"),
        ttft_ms=_ttft_ms(outcomes),
        tokens_per_second=1e3 * decoded / decode_ms if decoded and decode_ms > 0 else None,
        kv_bytes=_mean(outcomes, "kv_bytes"),
        repaired_stages=sum(outcome.repaired_stages for outcome in outcomes),
        against_reference=(None if reference is None or info.is_reference else _against(outcomes, reference)),
        reliability=reliability(judged)
        if (judged := [one.judged for one in outcomes if one.judged])
        else None,
        # the first token's summary is for resuming
        outcomes=[msgspec.to_builtins(msgspec.structs.replace(one, first_token=None)) for one in outcomes],
    )


def _against(outcomes: list[Outcome], reference: list[Outcome]) -> AgainstReference:
    scores, theirs = ([one.score for one in answered] for answered in (outcomes, reference))
    divergences = [one.first_token_kl for one in outcomes if one.first_token_kl is not None]
    ours, full = statistics.fmean(scores), statistics.fmean(theirs)
    return AgainstReference(
        difference=Estimate(
            value=ours - full,
            interval_95=paired_interval(scores, theirs, [one.image_id for one in outcomes]),
            questions=len(outcomes),
        ),
        retained=ours / full if full else None,
        agreement=_estimate(
            outcomes, [float(one.reading == other.reading) for one, other in zip(outcomes, reference)]
        ),
        first_token_kl=statistics.fmean(divergences) if divergences else None,
        flops_ratio=_mean(reference, "flops") / _mean(outcomes, "flops"),
        ttft_ratio=_ttft_ms(reference) / _ttft_ms(outcomes),
    )


def _accuracy(outcomes: list[Outcome]) -> Estimate:
    return _estimate(outcomes, [outcome.score for outcome in outcomes])


def _estimate(outcomes: list[Outcome], values: list[float]) -> Estimate:
    return Estimate(
        value=statistics.fmean(values),
        interval_95=score_interval(values, [outcome.image_id for outcome in outcomes]),
        questions=len(values),
    )


def _mean(outcomes: list[Outcome], name: str) -> float:
    return statistics.fmean(getattr(outcome, name) for outcome in outcomes)


def _ttft_ms(outcomes: list[Outcome]) -> float:
    return statistics.median(outcome.ttft_ms for outcome in outcomes)
