"""The closed form equals autograd over the whole layer and head."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.reference.saliency import autograd_saliency, decoder_layer
from tests.tolerances import SALIENCY_FLOAT64
from tests.trio.decoder_layers import (
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    SCALED,
    VOCAB,
    Decoder,
    merged_rotary_tables,
    random_decoder,
    rotary_tables,
)
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.trio.cost.selections import SaliencyForm
from trio_edge.trio.saliency import CandidateHead, ProbeHead, ProxySaliency, key_value_gram

LENGTH, START, NUM_VISUAL = 48, 5, 30
FORMS = get_args(SaliencyForm)


def _hidden(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(LENGTH, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(
        dtype
    )


def _scores(
    decoder: Decoder, hidden: Tensor, tables: tuple[Tensor, Tensor], *, length: int = LENGTH,
    max_visual: int = NUM_VISUAL, num_visual: int = NUM_VISUAL, start: int = START, **settings: Any,
) -> Tensor:  # fmt: skip
    module = ProxySaliency(
        decoder.layer, decoder.final_norm, decoder.lm_head, max_visual=max_visual, **settings
    )
    scalars = (torch.tensor([value], dtype=torch.int32) for value in (num_visual, length))
    with torch.no_grad():
        rows, positions = torch.arange(start, start + max_visual), torch.arange(len(hidden))
        return module(hidden, *tables, rows, *scalars, positions)


def _reference(
    decoder: Decoder, hidden: Tensor, tables: tuple[Tensor, Tensor], *, rows: int = 4, offset: int = 2,
    around_mlp: bool = False,
) -> Tensor:  # fmt: skip
    after = START + NUM_VISUAL
    probe = [max(row, after) for row in range(LENGTH - offset - rows + 1, LENGTH - offset + 1)]
    scores = autograd_saliency(
        decoder.layer, decoder.final_norm, decoder.lm_head, hidden, *tables, probe, around_mlp=around_mlp
    )
    return scores[START : START + NUM_VISUAL]


FULL = {"layer_types": ["full_attention"]}
DECODERS = {
    "llama with multi-head attention": ("llama", {"num_kv_heads": HEADS}),
    "llama with grouped-query attention": ("llama", {"num_kv_heads": 2}),
    "llama with multi-query attention": ("llama", {"num_kv_heads": 1}),
    "llama with biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2 with q, k and v biases": ("qwen2", {"num_kv_heads": 2}),
    "mistral with a sliding window": ("mistral", {"num_kv_heads": 2, "sliding_window": 24}),
    "ministral3 with scaled queries": ("ministral3", {"num_kv_heads": 2, **SCALED}),
    "ministral3 with a sliding window": ("ministral3", {"num_kv_heads": 2, "sliding_window": 24, **SCALED}),
    "qwen3 with norms of heads": ("qwen3", {"num_kv_heads": 2}),
    "qwen3 with multi-head attention": ("qwen3", {"num_kv_heads": HEADS}),
    "qwen3 with biases and a large epsilon": (
        "qwen3",
        {"num_kv_heads": 2, "attention_bias": True, "rms_norm_eps": 0.1},
    ),
    "qwen3_5 with a gate and a partial rotation": ("qwen3_5", {"num_kv_heads": 2, **FULL}),
    "lfm2": ("lfm2", {"num_kv_heads": 2, **FULL}),
    "qwen3_5 with biases": ("qwen3_5", {"num_kv_heads": HEADS, "attention_bias": True, **FULL}),
}


def _tables(family: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    size = HEAD_SIZE // 2 if family == "qwen3_5" else HEAD_SIZE
    return rotary_tables(torch.arange(LENGTH), dtype=dtype, size=size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "config"), DECODERS.values(), ids=DECODERS.keys())
def test_closed_form_equals_autograd(family: str, config: dict[str, Any], form: SaliencyForm) -> None:
    decoder, hidden, tables = random_decoder(family, **config), _hidden(), _tables(family)
    scores = _scores(decoder, hidden, tables, form=form)
    torch.testing.assert_close(scores, _reference(decoder, hidden, tables), **SALIENCY_FLOAT64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "config"), DECODERS.values(), ids=DECODERS.keys())
def test_the_gradient_of_a_quantized_layer_goes_around_the_mlp(
    family: str, config: dict[str, Any], form: SaliencyForm
) -> None:
    """Its forward half computes the same loss, with the values of all rows."""
    decoder, hidden, tables = random_decoder(family, **config), _hidden(), _tables(family)
    scores = _scores(decoder, hidden, tables, form=form, is_quantized=True)
    expected = _reference(decoder, hidden, tables, around_mlp=True)
    torch.testing.assert_close(scores, expected, **SALIENCY_FLOAT64)
    assert not torch.allclose(scores, _reference(decoder, hidden, tables), rtol=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_closed_form_follows_merged_mrope_tables(form: SaliencyForm) -> None:
    side = torch.arange(LENGTH)
    tables = merged_rotary_tables(torch.stack([side // 12, side // 6, side % 6]), [2, 3, 3])
    decoder, hidden = random_decoder("qwen2", num_kv_heads=2), _hidden()
    scores = _scores(decoder, hidden, tables, form=form)
    torch.testing.assert_close(scores, _reference(decoder, hidden, tables), **SALIENCY_FLOAT64)


def test_rotary_tables_may_carry_an_attention_scale() -> None:
    cos, sin = rotary_tables(torch.arange(LENGTH))
    decoder, hidden, tables = random_decoder(), _hidden(), (1.2 * cos, 1.2 * sin)
    scores = _scores(decoder, hidden, tables)
    torch.testing.assert_close(scores, _reference(decoder, hidden, tables), **SALIENCY_FLOAT64)


@pytest.mark.parametrize(
    ("rows", "offset"), [(4, 2), (4, 1), (1, 1), (10, 2)], ids=["reference", "answer", "one row", "ten rows"]
)
def test_probe_rows_end_at_the_offset(rows: int, offset: int) -> None:
    decoder, hidden, tables = random_decoder(num_kv_heads=2), _hidden(), rotary_tables(torch.arange(LENGTH))
    scores = _scores(decoder, hidden, tables, num_probe_rows=rows, last_probe_offset=offset)
    expected = _reference(decoder, hidden, tables, rows=rows, offset=offset)
    torch.testing.assert_close(scores, expected, **SALIENCY_FLOAT64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_padding_rows_change_nothing(garbage: float, form: SaliencyForm) -> None:
    decoder, hidden = random_decoder(num_kv_heads=2), _hidden()
    padded = torch.cat([hidden, torch.full((9, HIDDEN), garbage, dtype=hidden.dtype)])
    scores = _scores(decoder, padded, rotary_tables(torch.arange(LENGTH + 9)), form=form)
    expected = _scores(decoder, hidden, rotary_tables(torch.arange(LENGTH)), form=form)
    torch.testing.assert_close(scores, expected, **SALIENCY_FLOAT64)


@pytest.mark.parametrize("form", FORMS)
def test_rows_behind_the_visual_tokens_score_minus_one(form: SaliencyForm) -> None:
    decoder, hidden, tables = random_decoder(num_kv_heads=2), _hidden(), rotary_tables(torch.arange(LENGTH))
    scores = _scores(decoder, hidden, tables, max_visual=60, form=form)
    torch.testing.assert_close(scores[:NUM_VISUAL], _reference(decoder, hidden, tables), **SALIENCY_FLOAT64)
    assert (scores[NUM_VISUAL:] == -1).all()


def test_scalars_may_be_zero_dimensional_or_int64() -> None:
    decoder, hidden, tables = random_decoder(), _hidden(), rotary_tables(torch.arange(LENGTH))
    module = ProxySaliency(decoder.layer, decoder.final_norm, decoder.lm_head, max_visual=NUM_VISUAL)
    rows = torch.arange(START, START + NUM_VISUAL)
    scores = module(hidden, *tables, rows, *(torch.tensor(value) for value in (NUM_VISUAL, LENGTH)))
    torch.testing.assert_close(scores, _reference(decoder, hidden, tables), **SALIENCY_FLOAT64)


def test_probe_row_before_the_prompt_is_row_zero() -> None:
    decoder, hidden, tables = random_decoder(), _hidden(), rotary_tables(torch.arange(LENGTH))
    scores = _scores(decoder, hidden, tables, start=0, max_visual=1, num_visual=1, length=3)
    assert torch.isfinite(scores).all()


def test_float32_model_gives_float32_scores_near_float64_ones() -> None:
    tables64 = rotary_tables(torch.arange(LENGTH))
    expected = _reference(random_decoder(num_kv_heads=2), _hidden(), tables64)
    tables = rotary_tables(torch.arange(LENGTH), dtype=torch.float32)
    scores = _scores(random_decoder(num_kv_heads=2, dtype=torch.float32), _hidden(torch.float32), tables)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_scores_follow_the_exact_ones(dtype: torch.dtype, form: SaliencyForm) -> None:
    tables = rotary_tables(torch.arange(LENGTH))
    half = random_decoder(num_kv_heads=2, dtype=dtype)
    scores = _scores(half, _hidden(dtype), rotary_tables(torch.arange(LENGTH), dtype=dtype), form=form)
    exact = random_decoder(num_kv_heads=2, dtype=dtype)
    for module in (exact.layer, exact.final_norm, exact.lm_head):
        module.double()
    expected = _reference(exact, _hidden(dtype).double(), tables)
    assert scores.dtype == torch.float32
    tolerance = 0.05 if dtype == torch.float16 else 0.4  # 10 and 7 bits of mantissa, a few dozen roundings
    torch.testing.assert_close(scores.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_sure_half_precision_model_still_ranks_its_tokens(form: SaliencyForm) -> None:
    decoder = random_decoder(num_kv_heads=2, dtype=torch.float16)
    decoder.lm_head.weight.mul_(48)  # gradients near 1e-11, which float16 rounds to zero
    tables = rotary_tables(torch.arange(LENGTH), dtype=torch.float16)
    scores = _scores(decoder, _hidden(torch.float16), tables, form=form)
    assert 0 < scores.min() < scores.max() < 1e-9
    assert len(scores.unique()) == NUM_VISUAL


@pytest.mark.parametrize("family", ["llama", "mistral", "ministral3", "qwen2", "qwen3_5"])
def test_reference_layer_equals_hugging_faces(family: str) -> None:
    settings = {"ministral3": SCALED, "qwen3_5": FULL}.get(family, {})
    decoder = random_decoder(family, num_kv_heads=2, dtype=torch.float32, **settings)
    decoder.layer.self_attn.config._attn_implementation = "eager"
    hidden, tables = _hidden(torch.float32), _tables(family, torch.float32)
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
    expected = decoder.layer(
        hidden[None],
        attention_mask=mask,
        position_embeddings=tuple(table[None] for table in tables),
        position_ids=torch.arange(LENGTH)[None],
    )
    torch.testing.assert_close(
        decoder_layer(decoder.layer, hidden, *tables), expected[0], rtol=1e-4, atol=5e-5
    )


def test_halves_with_the_head_between_equal_the_whole() -> None:
    decoder, hidden, tables = random_decoder(num_kv_heads=2), _hidden(), rotary_tables(torch.arange(LENGTH))
    module = ProxySaliency(decoder.layer, decoder.final_norm, decoder.lm_head, max_visual=NUM_VISUAL)
    visual, length = torch.tensor([NUM_VISUAL]), torch.tensor([LENGTH])
    rows = torch.arange(START, START + NUM_VISUAL)
    probe_rows = LENGTH - 2 + torch.arange(-3, 1)
    state = module.attend(hidden, *tables, rows, probe_rows, length)
    scores = module.scores(state, module.head(state.output_RD), hidden, *tables, rows, visual)
    assert torch.equal(scores, module(hidden, *tables, rows, visual, length))


def test_without_rows_there_are_no_scores_and_no_error() -> None:
    """A graph with several pieces runs its probe like this while another piece runs."""
    for family in ("llama", "qwen3"):
        decoder = random_decoder(family, num_kv_heads=2)
        module = ProxySaliency(decoder.layer, decoder.final_norm, decoder.lm_head, max_visual=NUM_VISUAL)
        hidden, rows, zero = _hidden()[:0], torch.arange(0), torch.tensor([0])
        tables = rotary_tables(torch.arange(0))
        state = module.attend(hidden, *tables, rows, rows, zero)
        assert state.output_RD.shape == (0, HIDDEN)
        scores = module.scores(state, module.head(state.output_RD), hidden, *tables, rows, zero)
        assert scores.shape == (0,)


def test_multi_head_attention_is_computed_directly() -> None:
    decoder = random_decoder()
    module = ProxySaliency(decoder.layer, decoder.final_norm, decoder.lm_head, max_visual=NUM_VISUAL)
    assert module.form == "direct"
    assert not list(module.buffers())


def test_weights_are_the_layers_own() -> None:
    decoder = random_decoder(num_kv_heads=1)
    module = ProxySaliency(decoder.layer, decoder.final_norm, decoder.lm_head, max_visual=NUM_VISUAL)
    owned = {
        id(p) for part in (decoder.layer, decoder.final_norm, decoder.lm_head) for p in part.parameters()
    }
    assert {id(parameter) for parameter in module.parameters()} == owned


def test_gram_matrix_gives_the_squared_length_of_the_product() -> None:
    attention = random_decoder(num_kv_heads=2).layer.self_attn
    norm = torch.rand(HIDDEN, dtype=torch.float64)
    gram = key_value_gram(attention.k_proj.weight, attention.v_proj.weight, norm)
    e = torch.randn(len(gram), dtype=torch.float64)
    product = torch.cat([attention.k_proj.weight, attention.v_proj.weight]).T @ e * norm
    torch.testing.assert_close(e @ gram @ e, product.square().sum())


def test_gram_buffer_stays_without_values_under_fake_tensors() -> None:
    with FakeTensorMode():
        decoder = random_decoder(num_kv_heads=1, dtype=torch.float32)
        module = ProxySaliency(
            decoder.layer, decoder.final_norm, decoder.lm_head, max_visual=NUM_VISUAL, form="key_gram"
        )
    assert isinstance(module.key_value_gram, FakeTensor)
    assert module.key_value_gram.dtype == torch.float32


def test_other_activations_are_refused() -> None:
    decoder = random_decoder(hidden_act="gelu")
    with pytest.raises(CheckpointError, match=r"mlp\.act_fn: expected SiLU, got GELUActivation"):
        ProxySaliency(decoder.layer, decoder.final_norm, decoder.lm_head, max_visual=NUM_VISUAL)


def test_shapes_are_checked() -> None:
    """Guards jaxtyping's import hook: without it a wrong rank gives some plausible tensor."""
    with pytest.raises(Exception, match=r"value_weight"):
        key_value_gram(torch.ones(4, 8), torch.ones(6, 8), torch.ones(8))


def test_probe_rows_that_would_lie_in_the_image_are_the_first_one_after_it() -> None:
    decoder, hidden, tables = random_decoder("llama"), _hidden(), rotary_tables(torch.arange(LENGTH))
    scores = _scores(decoder, hidden, tables, num_probe_rows=20)  # 13 rows come after the image
    torch.testing.assert_close(scores, _reference(decoder, hidden, tables, rows=20), **SALIENCY_FLOAT64)


def _logits(decoder: Decoder, output: Tensor) -> Tensor:
    """Return the head's logits without the norm's own forward, which rounds to float32."""
    scale = torch.rsqrt((output * output).mean(-1, keepdim=True) + decoder.final_norm.variance_epsilon)
    logits: Tensor = decoder.lm_head(output * scale * decoder.final_norm.weight)
    return logits


def _candidates(decoder: Decoder, output: Tensor, count: int) -> Tensor:
    """Return the gradient at ``output`` [R, D] over the ``count`` likeliest tokens of each row."""
    with torch.no_grad():
        logits, ids = torch.topk(_logits(decoder, output), count)
        return CandidateHead(decoder.final_norm)(output, logits, decoder.lm_head.weight[ids])


@pytest.mark.parametrize("count", [2, 8, VOCAB])
def test_gradient_over_candidates_equals_autograd_of_the_loss_over_them(count: int) -> None:
    decoder, output = random_decoder(), _hidden()[:4].requires_grad_()
    logits = _logits(decoder, output)
    ids = torch.topk(logits, count).indices
    torch.nn.functional.cross_entropy(logits.gather(1, ids), torch.zeros(4, dtype=torch.long)).backward()  # type: ignore[no-untyped-call]
    assert output.grad is not None
    torch.testing.assert_close(_candidates(decoder, output.detach(), count), output.grad, **SALIENCY_FLOAT64)


def test_gradient_over_all_tokens_is_the_exact_heads() -> None:
    decoder, output = random_decoder(), _hidden()[:4]
    with torch.no_grad():
        exact = ProbeHead(decoder.final_norm, decoder.lm_head)(output)
    torch.testing.assert_close(_candidates(decoder, output, VOCAB), exact, **SALIENCY_FLOAT64)


def test_gradient_over_candidates_does_not_cancel_where_the_model_is_certain() -> None:
    decoder, output = random_decoder(), _hidden()[:4]
    with torch.no_grad():
        decoder.lm_head.weight.mul_(30.0)
        exact = _candidates(decoder, output, 8)
        single = Decoder(*(copy.deepcopy(part).float() for part in vars(decoder).values()))
        found = _candidates(single, output.float(), 8).double()
    # of a row whose other tokens have no probability left in float32, nothing is expected
    rows = exact.norm(dim=1) > 1e-30
    assert rows.any()
    torch.testing.assert_close(found[rows] / exact[rows].norm(dim=1, keepdim=True),
                               exact[rows] / exact[rows].norm(dim=1, keepdim=True), rtol=0, atol=1e-3)  # fmt: skip
