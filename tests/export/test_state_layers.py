"""The gated delta rule in chunks equals its recurrence, row by row in float64; padding leaves states as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

from trio_edge.export.graphs.state_layers import delta_rule, state_layer

X, K, V = 3, 12, 20
SIZES = [1, 2, 63, 64, 65, 130, 200]


def inputs(rows: int, *, alike: bool) -> tuple[torch.Tensor, ...]:
    """Return query, key, value, decay, beta and state; ``alike`` rows have nearly the same keys, as a uniform image's."""
    made = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made)

    key = random(X, 1, K) + 1e-3 * random(X, rows, K) if alike else random(X, rows, K)
    key = key / key.norm(dim=-1, keepdim=True)
    decay = -0.01 * random(X, rows, 1).abs() if alike else -random(X, rows, 1).abs()
    beta = torch.sigmoid(random(X, rows, 1) + 4.0 * alike)
    return random(X, rows, K), key, random(X, rows, V), decay, beta, random(X, K, V)


def row_by_row(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, decay, beta, state = (tensor.double() for tensor in given)
    outputs = []
    for row in range(query.shape[1]):
        state = state * decay[:, row, :, None].exp()
        known = torch.einsum("xkv,xk->xv", state, key[:, row])
        state = state + torch.einsum("xk,xv->xkv", key[:, row], beta[:, row] * (value[:, row] - known))
        outputs.append(torch.einsum("xkv,xk->xv", state, query[:, row]))
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("alike", [False, True], ids=["any keys", "keys of a uniform image"])
@pytest.mark.parametrize("rows", SIZES)
def test_chunks_equal_the_recurrence(rows: int, alike: bool) -> None:
    given = inputs(rows, alike=alike)
    for found, expected in zip(delta_rule(*given), row_by_row(*given)):
        torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def layer() -> Any:
    torch.manual_seed(3)
    config = Qwen3_5TextConfig(
        hidden_size=48, intermediate_size=56, num_hidden_layers=1, layer_types=["linear_attention"],
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12,
    )  # fmt: skip
    layer = Qwen3_5DecoderLayer(config, 0).eval().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(std=0.3)
    return layer


def states(answers: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(answers, 1, 3, 2 * 2 * 8 + 4 * 12), torch.zeros(answers, 4, 8, 12)


@pytest.mark.parametrize("rows", SIZES)
def test_a_layer_equals_hugging_faces_whatever_its_padding_holds(layer: Any, rows: int) -> None:
    hidden, padding = torch.randn(1, rows, 48), torch.randn(1, 9, 48)
    expected = layer(hidden, position_embeddings=None)
    kept = []
    for padded in (hidden, torch.cat([hidden, padding], dim=1)):
        present: list[torch.Tensor] = []
        found = state_layer(layer, padded, num_rows=torch.tensor([rows]), past=states(1), present=present)
        torch.testing.assert_close(found[:, :rows], expected, rtol=1e-3, atol=1e-3)
        kept.append(present)
    for alone, with_padding in zip(*kept):
        torch.testing.assert_close(alone, with_padding, rtol=1e-3, atol=1e-4)


def test_answers_of_a_batch_do_not_see_each_other_and_go_on_from_their_states(layer: Any) -> None:
    hidden = torch.randn(2, 70, 48)
    present: list[torch.Tensor] = []
    counts = torch.tensor([70, 31])
    state_layer(layer, hidden, num_rows=counts, past=states(2), present=present)
    step = torch.randn(2, 1, 48)
    after = state_layer(layer, step, num_rows=torch.tensor([1, 1]), past=(present[0], present[1]), present=[])
    for answer, count in enumerate(counts):
        whole = torch.cat([hidden[answer : answer + 1, :count], step[answer : answer + 1]], dim=1)
        expected = layer(whole, position_embeddings=None)[:, -1:]
        torch.testing.assert_close(after[answer : answer + 1], expected, rtol=1e-3, atol=1e-3)
