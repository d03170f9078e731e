"""Counted FLOPs and KV bytes, against hand counts and the paper's ratios."""

from __future__ import annotations

import msgspec
import pytest

from tests.schedules import schedule_of
from trio_edge.profiling.predict.models import MODELS
from trio_edge.runtime.bundle.manifest import Dimensions
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost.flops import CountedPrefill, count_prefill, decoder_flops, stage_work
from trio_edge.trio.cost.selections import (
    SALIENCY_FORMS,
    ProbeSizes,
    StageSizes,
    cheapest_form,
    nms_products,
    saliency_products,
    trio_work,
)
from trio_edge.trio.cost.work import flops_of, head_work, layer_weights, range_work, vision_work

TINY = Dimensions(
    num_layers=2, hidden_size=4, num_heads=2, num_kv_heads=1, head_size=2, intermediate_size=8, vocab_size=10
)
LLAVA_NEXT_7B = MODELS["llava-next-7b"]
DECODER = LLAVA_NEXT_7B.decoder
PRESET = schedule_of("1:460,10:270,15:110")
"""11.1 %."""
LLAMA_8B = msgspec.structs.replace(DECODER, num_kv_heads=8, intermediate_size=14336, vocab_size=128256)


def vision_flops() -> float:
    """Return the FLOPs of LLaVA-NeXT-7B's tower on five tiles."""
    assert LLAVA_NEXT_7B.vision is not None
    return vision_work(LLAVA_NEXT_7B.vision, {"B": 5, "N": 2880}).flops


def prefill(schedule: Schedule, *, num_text: int) -> CountedPrefill:
    """Return LLaVA-NeXT-7B's prefill with five tiles."""
    return count_prefill(DECODER, schedule, num_visual=2880, num_text=num_text)


def reference_probe_flops(decoder: Dimensions, *, num_rows: int) -> float:
    """Return the FLOPs of the paper's probe: the layer and the whole head over all rows, forwards and backwards.

    Only the input's gradient is counted, the weights of a frozen model get none. So backwards costs what forwards costs
    for the weights, and twice that for the attention, where both factors of each product depend on the input.
    """
    (attention,) = range_work(decoder, layers=range(1), rows=num_rows).attention
    head = 2 * num_rows * head_work(decoder).flops
    return 4.0 * num_rows * layer_weights(decoder) + 3.0 * attention.flops + head


def test_decoder_layer_counts_products_and_full_attention() -> None:
    q, k, v, o, mlp = 4 * 4, 4 * 2, 4 * 2, 4 * 4, 3 * 4 * 8
    assert range_work(TINY, layers=range(1), rows=5).flops == 2 * 5 * (q + k + v + o + mlp) + 4 * 5**2 * 4


def test_llava_next_vision_tower_is_about_two_teraflops() -> None:
    assert vision_flops() == pytest.approx(2.0e12, rel=0.1)


def test_keep_all_costs_what_the_full_prefill_costs() -> None:
    cost = prefill(Schedule(), num_text=50)
    assert cost.flops == decoder_flops(DECODER, [2930] * 32)
    assert cost.select_flops == 0.0


def test_prompt_without_an_image_costs_its_text_only() -> None:
    cost = count_prefill(TINY, Schedule(), num_visual=0, num_text=5)
    assert cost.kv_bytes == 2 * 2 * 5 * 2 * 1 * 2  # layers, key and value, rows, bytes, heads, size


@pytest.mark.parametrize("num_text", [40, 50, 60])
def test_llava_next_ratios_are_those_of_the_documents(num_text: int) -> None:
    """Ours count the preset's exact 320 of 2880 tokens, the stages, and for the first ratio the vision tower."""
    whole = prefill(Schedule(), num_text=num_text)
    cost = prefill(PRESET, num_text=num_text)
    tower = vision_flops()
    assert (tower + whole.flops) / (tower + cost.flops) == pytest.approx(6.0, abs=0.3)
    assert whole.flops / cost.flops == pytest.approx(8.0, abs=0.5)
    assert whole.kv_bytes / cost.kv_bytes == pytest.approx((2880 + num_text) / (320 + num_text))


@pytest.mark.parametrize(
    ("num_visual", "stages", "whole", "reduced", "ratio"),
    [
        (576, "1:92,10:54,15:22", 318.0, 62.0, 5.13),
        (2252, "1:436,10:255,15:173", 1156.0, 192.4, 6.01),
    ],
    ids=["llava-1.5", "llava-next"],
)
def test_the_papers_kv_sizes_are_those_of_sixty_text_rows(
    num_visual: int, stages: str, whole: float, reduced: float, ratio: float
) -> None:
    """In MiB. The paper has 1156 and 191 for LLaVA-NeXT, 6.05 times; its own number of visual tokens is 2252."""
    counted = [
        count_prefill(DECODER, schedule, num_visual=num_visual, num_text=60).kv_bytes / 2**20
        for schedule in (Schedule(), schedule_of(stages))
    ]
    assert counted == pytest.approx([whole, reduced], abs=0.05)
    assert counted[0] / counted[1] == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize(("num_visual", "tera"), [(576, 2.986), (2880, 16.67)])
def test_the_references_flops_are_multiply_adds_of_visual_rows_and_two_mlp_matrices(
    num_visual: int, tera: float
) -> None:
    """Its numbers of the whole model; the reduced one's, 2.68 of 16.67, could not be rebuilt."""
    width, inner = DECODER.hidden_size, DECODER.intermediate_size
    weights = 4 * width**2 + 2 * width * inner
    assert 32 * (num_visual * weights + 2 * num_visual**2 * width) == pytest.approx(tera * 1e12, rel=5e-4)


def test_full_and_reduced_prefill_have_the_size_the_specification_gives() -> None:
    whole, cost = (prefill(schedule, num_text=50) for schedule in (Schedule(), PRESET))
    assert vision_flops() + whole.flops == pytest.approx(44e12, rel=0.05)
    assert 5e12 < vision_flops() + cost.flops < 7.5e12


def test_stages_cost_at_most_a_twentieth_of_the_pruned_prefill() -> None:
    cost = prefill(PRESET, num_text=50)
    assert cost.select_flops / (vision_flops() + cost.flops) <= 0.05


@pytest.mark.parametrize(
    ("decoder", "num_visual", "fraction"),
    [
        (DECODER, 576, 8), (DECODER, 1152, 8), (DECODER, 2880, 8),
        (LLAMA_8B, 576, 30), (LLAMA_8B, 1152, 30), (LLAMA_8B, 2880, 30),
    ],
    ids=["mha 576", "mha 1152", "mha 2880", "gqa 576", "gqa 1152", "gqa 2880"],
)  # fmt: skip
def test_closed_form_costs_a_small_fraction_of_the_reference(
    decoder: Dimensions, num_visual: int, fraction: int
) -> None:
    sizes = StageSizes(num_visual, 10, 50, num_visual)
    closed = trio_work(decoder, Schedule(), sizes, pieces=("probe", "gradient", "saliency")).flops
    assert closed * fraction <= reference_probe_flops(decoder, num_rows=num_visual + 50)


def test_reference_probe_is_what_the_specification_says() -> None:
    assert reference_probe_flops(DECODER, num_rows=2930) == pytest.approx(4.3e12, rel=0.05)


@pytest.mark.parametrize(
    ("num_kv_heads", "num_probe_rows", "form"),
    [
        (32, 4, "direct"),
        (8, 4, "key_gram"),
        (4, 4, "key_gram"),
        (4, 64, "key_value_gram"),
        (1, 16, "key_value_gram"),
    ],
)
def test_cheapest_form_depends_on_key_heads_and_probe_rows(
    num_kv_heads: int, num_probe_rows: int, form: str
) -> None:
    sizes = ProbeSizes(2880, 2880, 4096, 32, num_kv_heads, 128, num_probe_rows)
    assert cheapest_form(sizes) == form
    flops = {other: flops_of(saliency_products(other, sizes)) for other in SALIENCY_FORMS}
    assert flops[cheapest_form(sizes)] == min(flops.values())


def test_nms_grows_no_faster_than_the_square() -> None:
    for count in (576, 1152, 2880):
        once, twice = (
            flops_of(nms_products(tokens, hidden_size=4096, rounds=16)) for tokens in (count, 2 * count)
        )
        assert twice <= 4 * once


@pytest.mark.parametrize("num_visual", [300, 1100, 2880])
@pytest.mark.parametrize("name", MODELS)
def test_a_stage_has_the_flops_of_the_written_formulas(name: str, num_visual: int) -> None:
    """The formulas of ``trio_edge.trio.saliency``'s three forms, for 4 probe rows and 16 rounds."""
    decoder, S, N = MODELS[name].decoder, num_visual + 40, num_visual
    D, E = decoder.hidden_size, decoder.head_size
    P, K = 4 * decoder.num_heads, decoder.num_kv_heads * E
    queries = D * decoder.num_heads * E
    rows = (
        4 * 4 * (queries + 3 * D * decoder.intermediate_size)
        + 2 * 4 * queries
        + 4 * 4 * D * decoder.vocab_size
    )
    common = 2 * S * D * K + 2 * P * E * (S + N) + 2 * P * S * D + 4 * P * E * D
    direct = 2 * N * P * D + 2 * N * D * (K + P)
    key_gram = 2 * N * P * D + 2 * P * D * (K + P) + 2 * N * (K * K + P * K + P * P)
    key_value_gram = 2 * N * D * K + 4 * N * P * E + 8 * N * K * K
    similarity = 2 * N * N * D * (5 / 8 if N >= 1024 else 1)
    work = stage_work(decoder, Schedule(), StageSizes(num_visual, 10, 40, num_visual))
    expected = rows + common + min(direct, key_gram, key_value_gram) + similarity + 2 * 16 * N * N
    assert work.flops == expected
