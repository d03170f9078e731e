"""Several tokens a decode step: the answers of one token a step, with fewer steps."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.bundles import INT8_CACHES, export
from tests.checkpoints import save_checkpoint
from tests.pictures import random_picture
from tests.tolerances import LOGITS_FLOAT16, LOGITS_FLOAT32
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.model.answers.drafts import Payoff, PromptLookup
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from trio_edge.runtime.answer import Generation
    from trio_edge.runtime.model.answers.drafts import LookupTokens

PICTURE = random_picture(48, 48)
PROMPT = "w1 w2 w3 w1 w2 w3 w1"
STAGES = Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)))


@pytest.fixture(scope="module")
def pipelines(checkpoint: Path) -> Iterator[dict[int, Pipeline]]:
    """The same bundle with steps of up to 1 and 8 rows."""
    found = {
        rows: Pipeline.from_bundle(export(checkpoint, schedule=STAGES, decode_rows=rows)) for rows in (1, 8)
    }
    yield found
    for pipeline in found.values():
        pipeline.close()


def done(answer: Generation) -> Generation:
    assert answer.text is not None
    return answer


@pytest.mark.parametrize("lookup", [0, 1, 3, 7, "auto"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 1.5, "seed": 3},
        {"repetition_penalty": 1.3},
        {"num_logprobs": 2, "temperature": 0.7, "top_k": 3, "seed": 1},
        {"min_new_tokens": 12, "no_repeat_ngram_size": 3},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_drafts(
    how: dict[str, Any], lookup: LookupTokens, pipelines: dict[int, Pipeline]
) -> None:
    plain = done(pipelines[1].generate(PICTURE, PROMPT, **how))
    answer = done(pipelines[8].generate(PICTURE, PROMPT, lookup=lookup, **how))
    assert answer.token_ids == plain.token_ids
    for one, other in zip(answer.logprobs, plain.logprobs, strict=True):
        assert one.top_ids == other.top_ids
        assert one.chosen == pytest.approx(other.chosen, abs=1e-4)
    statistics = answer.statistics
    assert plain.statistics.steps == len(plain.token_ids) - 1
    assert statistics.steps + statistics.accepted_tokens == len(answer.token_ids) - 1
    assert len(statistics.token_ms) == len(answer.token_ids) - 1
    assert statistics.kv_bytes == plain.statistics.kv_bytes
    assert 0 <= statistics.accepted_tokens <= statistics.draft_tokens


def test_a_repetitive_answer_takes_fewer_steps(pipelines: dict[int, Pipeline]) -> None:
    """A bias lets the model repeat one token."""
    how: dict[str, Any] = {"logit_bias": {9: 100.0}, "max_new_tokens": 30}
    answer = done(pipelines[8].generate(PICTURE, PROMPT, lookup=7, **how))
    assert answer.token_ids == [9] * 30 == done(pipelines[1].generate(PICTURE, PROMPT, **how)).token_ids
    assert answer.statistics.steps <= 7
    # "auto" learns from what it sees, and drafts in later answers.
    steps = [
        done(pipelines[8].generate(PICTURE, PROMPT, lookup="auto", **how)).statistics.steps for _ in range(3)
    ]
    assert steps[-1] <= 15


@pytest.mark.parametrize("rows", [2, 5, 8])
def test_rows_at_once_are_rows_one_by_one_in_every_format(rows: int, bundle_of_a_format: Path) -> None:
    with Pipeline.from_bundle(bundle_of_a_format, cpu_accuracy="float32") as pipeline:
        decoder, tokens = pipeline._level.decoder, np.arange(5, 5 + rows)
        embeds = pipeline._embedding[tokens]
        found: list[NDArray[np.float32]] = []
        for sizes in ([1] * rows, [rows]):
            done(pipeline.generate(PICTURE, PROMPT, max_new_tokens=1))
            first, logits = 0, []
            for size in sizes:
                decoder.decode(embeds[first : first + size])
                logits += [decoder.logits(row) for row in range(size)]
                first += size
            found.append(np.stack(logits))
        is_half = pipeline.manifest.dtype == "float16"
        np.testing.assert_allclose(*found, **(LOGITS_FLOAT16 if is_half else LOGITS_FLOAT32))


@pytest.fixture(
    scope="module", params=["float32", "int4", "int8", "kv=int8", "float16", "follow-ups", "keep all"]
)
def bundle_of_a_format(request: pytest.FixtureRequest, checkpoint: Path) -> Path:
    how: dict[str, dict[str, Any]] = {
        "float32": {},
        "int4": {"quantize": parse_plan("all=int4")},
        "int8": {"quantize": parse_plan("all=int8")},
        "kv=int8": {"quantize": parse_plan("kv=int8"), "scales": INT8_CACHES},
        "float16": {"dtype": "float16"},
        "follow-ups": {"follow_ups": True},
        "keep all": {"schedule": Schedule()},
    }
    return export(checkpoint, **{"schedule": STAGES, **how[request.param]})


def test_rows_that_are_taken_back_leave_no_trace(pipelines: dict[int, Pipeline]) -> None:
    decoder, embedding = pipelines[8]._level.decoder, pipelines[8]._embedding
    found = []
    for wrong in (0, 1, 6):
        done(pipelines[8].generate(PICTURE, PROMPT, max_new_tokens=1))
        decoder.decode(embedding[np.array([5, 6, *[11] * wrong])])
        decoder.skip(-wrong)
        decoder.decode(embedding[np.array([7, 8])])
        found.append(decoder.logits(1))
    for logits in found[1:]:
        np.testing.assert_allclose(logits, found[0], **LOGITS_FLOAT32)


def test_sampled_tokens_have_the_distribution_of_one_token_a_step(tmp_path: Path) -> None:
    """Chi-square over the last four tokens of many seeds, of which drafts give some."""
    folder = save_checkpoint(tmp_path / "checkpoint", num_layers=3, num_kv_heads=2, seed=3)
    bundle = export(folder, schedule=STAGES, max_new_tokens=8)
    how: dict[str, Any] = {
        "temperature": 1.0,
        "top_k": 3,
        "max_new_tokens": 8,
        "logit_bias": {9: 100.0, 10: 100.0},
    }
    counts: dict[LookupTokens, Counter[tuple[int, ...]]] = {0: Counter(), 3: Counter()}
    accepted = 0
    with Pipeline.from_bundle(bundle, threads=1) as pipeline:
        for lookup, counter in counts.items():
            for seed in range(300):
                answer = done(
                    pipeline.generate(None, PROMPT, lookup=lookup, seed=seed + 1000 * lookup, **how)
                )  # type: ignore[operator]
                counter[tuple(answer.token_ids[4:8])] += 1
                accepted += answer.statistics.accepted_tokens
    assert accepted > 100
    seen = [pair for pair in counts[0] | counts[3] if counts[0][pair] + counts[3][pair] >= 10]
    assert len(seen) > 3
    chi_square = sum(
        (counts[0][pair] - counts[3][pair]) ** 2 / (counts[0][pair] + counts[3][pair]) for pair in seen
    )
    assert chi_square < len(seen) + 4 * np.sqrt(2 * len(seen))


def test_cancelling_ends_in_the_middle_of_a_step(pipelines: dict[int, Pipeline]) -> None:
    answer = pipelines[8].generate(
        PICTURE, PROMPT, lookup=7, logit_bias={9: 100.0}, num_logprobs=0, max_new_tokens=30
    )
    pieces = iter(answer)
    while answer.statistics.accepted_tokens == 0:
        next(pieces)
    answer.cancel()
    assert len(list(pieces)) <= 1
    assert len(answer.logprobs) == len(answer.token_ids) == answer.statistics.new_tokens < 30


class Spelled:
    """A constraint that allows one sequence after a free first token."""

    def __init__(self, tokens: list[int], *, num_tokens: int) -> None:
        self.tokens, self.place, self.num_tokens = tokens, 0, num_tokens

    def allowed(self) -> NDArray[np.bool_]:
        allowed_V = np.zeros(self.num_tokens, np.bool_)
        allowed_V[self.tokens[self.place] if self.place else slice(None)] = True
        return allowed_V

    def add(self, token: int) -> None:
        self.place += 1


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("how", [{}, {"num_logprobs": 1}, {"temperature": 2.0, "seed": 1}], ids=str)
def test_tokens_that_must_come_are_not_decoded(
    rows: int, how: dict[str, Any], pipelines: dict[int, Pipeline]
) -> None:
    pipeline = pipelines[rows]
    (stop, *_), num_tokens = pipeline.manifest.text.stop_token_ids, pipeline.manifest.token_embedding.shape[0]
    tokens = [0, *range(9, 20), stop]
    answer = done(
        pipeline.generate(PICTURE, PROMPT, constraint=Spelled(tokens, num_tokens=num_tokens), **how)
    )
    assert answer.token_ids[1:] == tokens[1:]
    assert len(answer.statistics.token_ms) == len(tokens) - 1
    # Log probabilities need the logits of each token.
    assert answer.statistics.steps == (len(tokens) - 1 if "num_logprobs" in how else 0)
    assert len(answer.logprobs) == (len(tokens) if "num_logprobs" in how else 0)


def test_decoding_goes_on_after_tokens_that_had_to_come(pipelines: dict[int, Pipeline]) -> None:
    """Eleven tokens need two steps of eight rows, or eleven of one; then the constraint is free again."""

    class Half(Spelled):
        def allowed(self) -> NDArray[np.bool_]:
            return super().allowed() if self.place < len(self.tokens) else np.ones(self.num_tokens, np.bool_)

    num_tokens = pipelines[1].manifest.token_embedding.shape[0]
    found = {}
    for rows, pipeline in pipelines.items():
        constraint = Half([0, *range(9, 20)], num_tokens=num_tokens)
        found[rows] = done(pipeline.generate(PICTURE, PROMPT, constraint=constraint, max_new_tokens=20))
    assert found[1].token_ids == found[8].token_ids
    assert [found[rows].statistics.steps for rows in (1, 8)] == [
        len(found[1].token_ids) - 1,
        len(found[1].token_ids) - 1 - 10,
    ]


@pytest.mark.parametrize("lookup", [-1, 8, 1.5, True, "always"])
def test_other_drafts_are_refused(lookup: Any, pipelines: dict[int, Pipeline]) -> None:
    with pytest.raises(
        ShapeError, match=r"lookup: expected auto or 0..7 .*export with a larger --decode-rows"
    ):
        pipelines[8].generate(PICTURE, PROMPT, lookup=lookup)


def test_a_bundle_with_one_row_a_step_has_no_room_for_drafts(pipelines: dict[int, Pipeline]) -> None:
    with pytest.raises(ShapeError, match=r"expected auto or 0..0"):
        pipelines[1].generate(PICTURE, PROMPT, lookup=1)
    assert done(pipelines[1].generate(PICTURE, PROMPT, lookup="auto")).statistics.draft_tokens == 0


def test_the_longest_and_latest_match_is_found() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 9, 7, 2, 3, 4, 8, 3, 4, 6, 5])
    assert lookup.find() == (0, [])
    for tokens, found in (
        ([2], (0, [])),
        ([3], (2, [4, 8, 3, 4, 6, 5, 2, 3])),
        ([4], (3, [8, 3, 4, 6, 5, 2, 3, 4])),
    ):
        lookup.add(tokens)
        assert lookup.find() == found
    lookup = PromptLookup([1, 2, 3, 4, 5, 0, 1, 2, 3, 4])
    assert lookup.find() == (4, [5, 0, 1, 2, 3, 4, 5, 0])


def test_auto_drafts_as_many_tokens_as_pay() -> None:
    """By what was right and what steps take; nothing before it has seen anything."""
    payoff = Payoff([1, 2, 4, 8])
    assert payoff.most_drafts(2) == 0
    for _ in range(5):
        for rows, milliseconds in ((1, 10.0), (2, 12.0), (4, 16.0), (8, 40.0)):
            payoff.ran(rows, milliseconds)
    assert payoff.most_drafts(2) == 0
    for _ in range(60):
        payoff.saw(2, is_right=True)
        payoff.saw(3, is_right=False)
    assert (payoff.most_drafts(2), payoff.most_drafts(3)) == (3, 0)
    for _ in range(60):
        payoff.saw(2, is_right=False)
    assert payoff.most_drafts(2) == 0
