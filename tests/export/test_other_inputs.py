"""A selector with an input that no runtime has heard of: its bundle runs with the runtime as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from torch import nn

from tests.bundles import export
from tests.pictures import random_picture
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.trio import methods
from trio_edge.trio.selectors.interface import (
    OtherInput,
    Selection,
    StageInputs,
    StageParts,
    best_tokens,
    check_num_keep,
)
from trio_edge.trio.selectors.stages.row_attention import at_visual_tokens, real_rows, settled

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
EARLIER = "rows_of_the_first_range"
SCHEDULE = Schedule(
    stages=(Stage(layer=1, keep=20), Stage(layer=2, keep=9)), method="recall", positions="preserved"
)


class Recall(nn.Module):
    """Keeps the tokens that are most like the first row of the prompt, as the first layer range left it."""

    needs_previous = False
    needs_prompt = False

    def __init__(self, *, num_keep: int, width: int) -> None:
        super().__init__()
        check_num_keep(num_keep)
        self.num_keep = num_keep
        self.other_inputs = {EARLIER: OtherInput("float32", (1, "F", width), "prefix.hidden_states_out")}

    @classmethod
    def for_stage(cls, parts: StageParts) -> Recall:
        return cls(num_keep=parts.num_keep, width=parts.final_norm.weight.shape[0])

    def forward(self, inputs: StageInputs) -> Selection:
        rows_SD = real_rows(inputs.hidden_SD, inputs.length)
        scores_N = at_visual_tokens((rows_SD * inputs.others[EARLIER][0, :1]).sum(-1), inputs)
        kept_K = best_tokens(scores_N, inputs.num_visual, num_keep=self.num_keep)
        return Selection(kept_K, scores_N, settled(inputs))


class _Row(methods.StageMethod):
    def load(self) -> Any:
        return Recall


@pytest.fixture
def bundle(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    row = _Row(
        name="recall",
        summary="likeness to the first row",
        selector="",
        positions="preserved",
        layers=((2,), (1,)),
        repeats="nothing",
        flops=lambda _decoder, _schedule, _sizes: 0.0,
    )
    monkeypatch.setitem(methods.STAGE_METHODS, "recall", row)
    return export(checkpoint, schedule=SCHEDULE)


def test_the_manifest_names_the_source(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    selects = [launch for launch in manifest.program("prefill").launches if launch.runs.startswith("select_")]
    assert [launch.inputs[EARLIER] for launch in selects] == ["prefix.hidden_states_out"] * 2
    assert not [
        path
        for path in (ROOT / "runtime").rglob("*.py")
        if re.search(rf"{EARLIER}|recall", path.read_text(encoding="utf-8"))
    ]


def test_both_stages_keep_the_tokens_that_the_input_decides(bundle: Path) -> None:
    with Pipeline.from_bundle(bundle, backend="onnxruntime", threads=1) as pipeline:
        answer = pipeline.generate(random_picture(70, 45, seed=1), "w1 w2 w3 w4", max_new_tokens=1)
        assert answer.text is not None
        memory, num_visual = pipeline._level.decoder._memory, answer.statistics.visual_tokens
        first = _rows(pipeline, "prefix.hidden_states_out")
        rows = memory.host("prompt.visual_rows", (num_visual,))
        scores = first[rows] @ first[0]
        kept = _best(scores, 20)
        np.testing.assert_array_equal(answer.kept[0], kept)
        # Rows of the kept tokens without the others before them.
        entering = rows[kept] - kept + np.arange(20)
        again = _best(_rows(pipeline, "segment_1.hidden_states_out")[entering] @ first[0], 9)
        np.testing.assert_array_equal(answer.kept[1], kept[again])


def _rows(pipeline: Pipeline, place: str) -> NDArray[np.float32]:
    """Return what the last prefill left at ``place``."""
    tensor = pipeline._level.decoder._memory.tensor(place)
    found = np.empty(tensor.shape, np.float32)
    pipeline._graphs.device.download(found, tensor)
    pipeline._graphs.device.synchronize()
    return found[0]


def _best(scores: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    return np.sort(np.argsort(-scores, kind="stable")[:count])
