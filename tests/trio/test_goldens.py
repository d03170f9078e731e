"""The reference code's own outputs: scores and kept indices of every stage, in torch.

tests/spec/test_goldens_through_exported_graphs.py compares the exported graphs with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

from tests.goldens import GOLDEN_NAMES, Golden, load_golden, needs_goldens
from tests.tolerances import SALIENCY_FLOAT32
from tests.trio.select_graph import SelectGraph
from trio_edge.trio.nms import FeatureNms
from trio_edge.trio.saliency import ProxySaliency

pytestmark = needs_goldens
STAGES = [(name, stage) for name in GOLDEN_NAMES for stage in range(3 if name == "three_stage_mha" else 1)]


def _model(golden: Golden) -> Any:
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**golden.settings["config"]))
    model.load_state_dict(golden.weights)
    return model.eval().requires_grad_(False)


def _select(golden: Golden, model: Any, stage: int) -> SelectGraph:
    entering, settings = len(golden.arrays[f"stage{stage}_scores"]), golden.settings
    saliency = ProxySaliency(
        model.model.layers[settings["stage_layers"][stage]], model.model.norm, model.lm_head, max_visual=entering,
        num_probe_rows=settings["probe_positions"],
    )  # fmt: skip
    keep = min(settings["stage_keep"][stage], entering)
    return SelectGraph(saliency, FeatureNms(num_keep=keep, threshold=settings["nms_threshold"], rounds=16))


def _inputs(golden: Golden, model: Any, stage: int) -> tuple[Tensor, ...]:
    hidden = torch.from_numpy(golden.arrays[f"stage{stage}_features"])
    cos, sin = model.model.rotary_emb(hidden, torch.arange(len(hidden))[None])
    start, num_visual = golden.settings["visual_start"], len(golden.arrays[f"stage{stage}_scores"])
    scalars = (torch.tensor([value], dtype=torch.int32) for value in (num_visual, len(hidden)))
    return hidden, cos[0], sin[0], torch.arange(start, start + num_visual, dtype=torch.int32), *scalars


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_torch_reproduces_the_reference_stage(name: str, stage: int) -> None:
    golden = load_golden(name)
    model = _model(golden)
    kept, scores, unsettled, _, _ = _select(golden, model, stage)(*_inputs(golden, model, stage))
    np.testing.assert_allclose(scores, golden.arrays[f"stage{stage}_scores"], **SALIENCY_FLOAT32)
    np.testing.assert_array_equal(kept, golden.arrays[f"stage{stage}_kept"])
    assert int(unsettled) == 0


@pytest.mark.parametrize("form", ["direct", "key_gram", "key_value_gram"])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_every_form_reproduces_the_reference_scores(name: str, form: Any) -> None:
    golden = load_golden(name)
    model = _model(golden)
    expected = golden.arrays["stage0_scores"]
    layer = model.model.layers[golden.settings["stage_layers"][0]]
    saliency = ProxySaliency(layer, model.model.norm, model.lm_head, max_visual=len(expected), form=form)
    np.testing.assert_allclose(saliency(*_inputs(golden, model, 0)), expected, **SALIENCY_FLOAT32)


def test_rows_gathered_between_stages_are_the_reference_rows() -> None:
    golden = load_golden("three_stage_mha")
    model = _model(golden)
    for stage in range(2):
        inputs = _inputs(golden, model, stage)
        kept, _, _, rows, _ = _select(golden, model, stage)(*inputs)
        length = len(inputs[0]) - int(inputs[4]) + len(kept)
        hidden, first = inputs[0][rows[:length]], golden.settings["stage_layers"][stage]
        for layer in model.model.layers[first : golden.settings["stage_layers"][stage + 1]]:
            tables = model.model.rotary_emb(hidden, torch.arange(len(hidden))[None])
            hidden = layer(hidden[None], position_embeddings=tables)[0]
        np.testing.assert_allclose(hidden, golden.arrays[f"stage{stage + 1}_features"], rtol=1e-4, atol=1e-4)
