"""Calibration in torch computes what the exported bundle does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.calibration.question_files import questions_about, write_questions
from tests.conftest import REDUCED_STAGES
from tests.mistral3_checkpoints import save_mistral3_checkpoint
from tests.qwen_checkpoints import CAMERA, save_qwen3_vl_checkpoint
from tests.qwen_checkpoints import REDUCED as DEEPSTACK_STAGES
from tests.schedules import schedule_of
from tests.smolvlm_checkpoints import save_smolvlm_checkpoint
from trio_edge.calibration.model.greedy import KeepAll, greedy_answer, keep_all
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.model.sequence import Sequence, advanced, order_of
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.questions import read_questions
from trio_edge.calibration.search.measuring import measure
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.model.first_token import first_token_kl, summary_of
from trio_edge.runtime.model.host_selection import greedy_nms
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.trio.nms import FeatureNms

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.questions import Sample

SCHEDULE = Schedule(stages=tuple(Stage(layer=layer, keep=keep) for layer, keep in REDUCED_STAGES))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return read_questions(write_questions(tmp_path_factory.mktemp("samples"), questions_about(3)))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> TorchModel:
    return load_model(str(checkpoint))


class Crowd(NamedTuple):
    """Tokens in few directions, so that they suppress each other in long chains."""

    sequence: Sequence
    features: torch.Tensor
    scores: torch.Tensor


@pytest.fixture
def crowd() -> Crowd:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(120, 3, generator=generator)
    sequence = Sequence(
        hidden_SD=torch.cat([torch.zeros(4, 3), features, torch.zeros(6, 3)]),
        positions_AS=torch.arange(130, dtype=torch.int32)[None],
        visual_rows_N=torch.arange(4, 124),
        original_N=torch.arange(120),
        next_position=130,
    )
    return Crowd(sequence, features, torch.rand(120, generator=generator))


def test_kept_tokens_and_divergence_are_the_bundles(
    model: TorchModel, questions: list[Sample], keep_all_bundle: Path, reduced_bundle: Path
) -> None:
    with (
        Pipeline.from_bundle(keep_all_bundle, threads=1) as full,
        Pipeline.from_bundle(reduced_bundle, threads=1) as reduced,
    ):
        for question in questions:
            theirs = [_answered(pipeline, question) for pipeline in (full, reduced)]
            prompt = make_prompt(model, question)
            ours = greedy_answer(model, prompt, SCHEDULE, max_tokens=3)
            assert [kept.tolist() for kept in ours.kept] == [kept.tolist() for kept in theirs[1].kept]
            assert ours.tokens == theirs[1].token_ids
            np.testing.assert_allclose(ours.logits_TV[0], theirs[1].first_logits, atol=1e-3)
            whole = keep_all(model, prompt, num_tokens=1)
            ((_, measured),) = measure(model, whole, [SCHEDULE])
            expected = first_token_kl(summary_of(theirs[0].first_logits), theirs[1].first_logits)
            assert measured.kl == pytest.approx(expected, rel=1e-3)
            assert measured.agrees == (theirs[0].token_ids[0] == theirs[1].token_ids[0])


def test_kept_tokens_and_answers_are_the_bundles_with_deepstack(
    questions: list[Sample], tmp_path: Path
) -> None:
    """Some planes are added before a stage, some after it."""
    folder = save_qwen3_vl_checkpoint(tmp_path / "ck")
    model = load_model(str(folder))
    prompt = make_prompt(model, questions[0])
    ours = greedy_answer(model, prompt, DEEPSTACK_STAGES, max_tokens=3)
    bundle = export(folder, schedule=DEEPSTACK_STAGES, image_sizes=(CAMERA,))
    with Pipeline.from_bundle(bundle, threads=1) as pipeline:
        theirs = _answered(pipeline, questions[0])
    assert [kept.tolist() for kept in ours.kept] == [kept.tolist() for kept in theirs.kept]
    assert ours.tokens == theirs.token_ids
    np.testing.assert_allclose(ours.logits_TV[0], theirs.first_logits, atol=1e-3)


@pytest.mark.parametrize("save", [save_smolvlm_checkpoint, save_mistral3_checkpoint])
def test_kept_tokens_and_answers_are_the_bundles_with_text_between_tokens(
    save: Any, questions: list[Sample], tmp_path: Path
) -> None:
    """Ministral 3's queries have scales besides."""
    folder = save(tmp_path / "ck")
    model = load_model(str(folder))
    schedule = Schedule(stages=(Stage(layer=1, keep=13), Stage(layer=2, keep=5)))
    with Pipeline.from_bundle(export(folder, schedule=schedule), threads=1) as pipeline:
        for question in questions:
            prompt = make_prompt(model, question)
            ours = greedy_answer(model, prompt, schedule, max_tokens=3)
            theirs = _answered(pipeline, question)
            assert [kept.tolist() for kept in ours.kept] == [kept.tolist() for kept in theirs.kept]
            assert ours.tokens == theirs.token_ids
            np.testing.assert_allclose(ours.logits_TV[0], theirs.first_logits, atol=1e-3)


@pytest.mark.parametrize("positions", ["compact", "preserved"])
def test_answer_tokens_behind_the_prompt_see_what_decoding_sees(
    model: TorchModel, questions: list[Sample], positions: Any
) -> None:
    schedule = schedule_of("1:14,2:6", positions=positions, probe_rows="answer")
    prompt = make_prompt(model, questions[0])
    decoded = greedy_answer(model, prompt, schedule, max_tokens=4)
    assert len(decoded.tokens) > 1
    sequence = prompt
    for place, token in enumerate(decoded.tokens[:-1]):
        row = model.embedding_VD[token][None]
        sequence = sequence.with_answer_row(row, position=prompt.next_position + place)
    inputs = [sequence]
    for layer in range(model.num_layers - 1):
        inputs.append(advanced(model, inputs[-1], range(layer, layer + 1)))
    log_probs = torch.log_softmax(decoded.logits_TV.double(), dim=-1)
    whole = KeepAll(inputs=inputs, tokens=decoded.tokens, log_probs_TV=log_probs)
    ((_, measured),) = measure(model, whole, [schedule])
    assert measured.agrees
    assert measured.kl == pytest.approx(0.0, abs=1e-7)


def test_keep_all_leaves_what_enters_every_layer(model: TorchModel, questions: list[Sample]) -> None:
    prompt = make_prompt(model, questions[1])
    whole = keep_all(model, prompt, num_tokens=3)
    assert whole.inputs[0].num_answer == len(whole.tokens) - 1
    again = whole.inputs[0]
    for layer in range(model.num_layers):
        torch.testing.assert_close(again.hidden_SD, whole.inputs[layer].hidden_SD, rtol=1e-4, atol=1e-4)
        again = advanced(model, again, range(layer, layer + 1))


def test_schedules_measured_together_are_as_each_alone(model: TorchModel, questions: list[Sample]) -> None:
    schedules = [
        Schedule(),
        schedule_of("1:14,2:6"),
        schedule_of("1:14,2:3"),
        schedule_of("1:20,2:6"),
        schedule_of("1:14"),
        schedule_of("2:6"),
        schedule_of("1:14,2:6", positions="preserved"),
        schedule_of("1:14,2:6", nms_threshold=0.5),
        schedule_of("1:14,2:6", probe_rows="answer", num_probe_rows=2),
    ]
    whole = keep_all(model, make_prompt(model, questions[2]), num_tokens=2)
    together = dict(measure(model, whole, schedules))
    assert list(map(dict(together).get, schedules)) == [
        dict(measure(model, whole, [schedule]))[schedule] for schedule in schedules
    ]
    assert together[Schedule()].kl == 0.0
    assert len({round(result.kl, 9) for result in together.values()}) == len(schedules)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_one_order_gives_the_greedy_choice_of_every_budget(crowd: Crowd, threshold: float) -> None:
    order = order_of(crowd.sequence, crowd.scores, threshold=threshold)
    for keep in (1, 5, 14, 40, len(crowd.scores)):
        expected = greedy_nms(
            crowd.features.numpy(), crowd.scores.numpy(), num_keep=keep, threshold=threshold
        )
        assert order.kept(keep).tolist() == expected.tolist()


def test_the_rounds_are_the_fewest_that_settle_in_a_graph(crowd: Crowd) -> None:
    rounds = order_of(crowd.sequence, crowd.scores, threshold=0.9).rounds
    assert rounds > 3
    num_visual = torch.tensor([len(crowd.scores)])
    graphs = [FeatureNms(num_keep=5, threshold=0.9, rounds=count) for count in (rounds - 1, rounds)]
    too_few, enough = (int(graph(crowd.features, crowd.scores, num_visual)[1]) for graph in graphs)
    assert too_few > 0
    assert enough == 0


def _answered(pipeline: Pipeline, question: Sample) -> Any:
    generation = pipeline.generate(list(question.images), question.question, max_new_tokens=3)
    assert generation.text is not None
    return generation
