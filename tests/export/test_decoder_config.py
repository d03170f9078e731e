"""Decoder configurations that the graphs can express, and their largest lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2_5_VLConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from trio_edge.export.families.base import (
    check_decoder,
    check_positions,
    max_positions,
    sliding_window,
)
from trio_edge.export.graphs.attention import RotaryTables
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.schedule import Schedule, Stage

FOLDER = Path("checkpoint")
LONG_FACTORS = {"short_factor": [1.5] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 100}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 100,
}


def llama(rope: dict[str, Any] | None = None, **settings: Any) -> LlamaConfig:
    """A decoder with heads of 16 and 200 positions."""
    parameters = None if rope is None else {"rope_theta": 10000.0, **rope}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 200}
    return LlamaConfig(rope_parameters=parameters, **{**sizes, **settings})


ROPES: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({"rope_type": "default"}, 200),
    "linear": ({"rope_type": "linear", "factor": 2.0}, 200),
    "llama3": (LLAMA3, 800),
    "yarn": (YARN, 400),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 200),
    "longrope": ({"rope_type": "longrope", **LONG_FACTORS}, 100),
}


@pytest.mark.parametrize("name", list(ROPES))
def test_constant_tables_are_those_of_transformers_up_to_the_limit(name: str) -> None:
    rope, limit = ROPES[name]
    config = llama(rope)
    check_decoder(config, folder=FOLDER)
    assert max_positions(config) == limit
    rotary = LlamaRotaryEmbedding(config)
    tables = RotaryTables(rotary.inv_freq[None], attention_scaling=rotary.attention_scaling)
    positions = torch.arange(limit)[None]
    for ours, theirs in zip(tables(positions), rotary(torch.zeros(1), positions)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_growing_rope_differs_behind_the_limit_and_is_refused_there(name: str) -> None:
    rope, limit = ROPES[name]
    config = llama(rope)
    rotary = LlamaRotaryEmbedding(config)
    tables = RotaryTables(rotary.inv_freq[None], attention_scaling=rotary.attention_scaling)
    positions = torch.arange(limit + 1)[None]
    assert (tables(positions)[0] - rotary(torch.zeros(1), positions)[0]).abs().max() > 1e-3
    check_positions(config, num_visual=limit - 30, max_text=20, max_new_tokens=10)
    with pytest.raises(
        ScheduleError, match=f"at most {limit} positions .beyond it RoPE type '{name}' depends on the length"
    ):
        check_positions(config, num_visual=limit - 29, max_text=20, max_new_tokens=10)


def test_more_positions_than_the_model_has_are_refused_with_their_parts() -> None:
    with pytest.raises(
        ScheduleError, match=r"at most 200 .* got 201 = 150 visual \+ 41 text \+ 10 new; lower"
    ):
        check_positions(llama(), num_visual=150, max_text=41, max_new_tokens=10)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (llama({"rope_type": "su"}), "rope_type: expected one for all layers, .* got 'su'"),
        (llama({"rope_type": "proportional", "partial_rotary_factor": 0.5}), "got 'proportional'"),
        (
            llama({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}),
            "partial_rotary_factor",
        ),
        (llama(partial_rotary_factor=0.25), "partial_rotary_factor: expected 1, got 0.25"),
        (
            Qwen2Config(num_hidden_layers=2, layer_types=["full_attention", "chunked_attention"]),
            "layer_types: .* got chunked_attention",
        ),
    ],
    ids=["unknown_rope", "proportional_rope", "partial_linear_rope", "partial_rope", "chunked_attention"],
)
def test_decoder_that_graphs_cannot_express_is_refused(config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_decoder(config, folder=FOLDER)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MistralConfig(), (0, 4096)),
        (MistralConfig(sliding_window=None), None),
        (
            llama(sliding_window=50),
            (0, 50),
        ),  # Llama's mask has none, but transformers' cache drops older keys
        (llama(attention_chunk_size=60), (0, 60)),
        (Qwen2Config(sliding_window=50), None),
        (
            Qwen2Config(sliding_window=50, use_sliding_window=True, num_hidden_layers=4, max_window_layers=4),
            None,
        ),
        (
            Qwen2Config(sliding_window=50, use_sliding_window=True, num_hidden_layers=4, max_window_layers=3),
            (3, 50),
        ),
        (Qwen2_5_VLConfig().text_config, None),
    ],
    ids=[
        "mistral",
        "mistral_none",
        "llama",
        "llama_chunks",
        "qwen2_off",
        "qwen2_no_layer",
        "qwen2_last_layer",
        "qwen2_5_vl",
    ],
)
def test_window_is_that_of_the_first_layer_with_one(config: Any, window: tuple[int, int] | None) -> None:
    assert sliding_window(config) == window


def test_window_may_hold_the_whole_sequence_but_not_less() -> None:
    config = MistralConfig(sliding_window=100)
    check_positions(config, num_visual=70, max_text=20, max_new_tokens=10)
    with pytest.raises(ScheduleError, match=r"at most 100 positions \(the model's sliding window\), got 101"):
        check_positions(config, num_visual=71, max_text=20, max_new_tokens=10)


@pytest.mark.parametrize(
    ("layer", "fits"),
    [(1, True), (2, True), (3, False)],
    ids=["early", "just_before", "at_the_windowed_layer"],
)
def test_window_counts_the_rows_that_a_schedule_leaves_in_front_of_its_layer(layer: int, fits: bool) -> None:
    """Also a stage at the first such layer: its probe runs the layer on all rows."""
    config = Qwen2Config(
        sliding_window=100, use_sliding_window=True, num_hidden_layers=5, max_window_layers=3
    )
    sizes = {"num_visual": 500, "max_text": 20, "max_new_tokens": 10}
    schedule = Schedule(stages=(Stage(layer=layer, keep=70),))
    if fits:
        check_positions(config, **sizes, schedule=schedule)
        schedule = Schedule(stages=(Stage(layer=layer, keep=71),))
    got = "101 = 71 visual" if fits else "530 = 500 visual"
    with pytest.raises(ScheduleError, match=rf"sliding window\), got {got} .* before layer 3"):
        check_positions(config, **sizes, schedule=schedule)


def test_window_of_every_layer_has_to_hold_all_tokens_whatever_the_schedule() -> None:
    config = MistralConfig(sliding_window=100)
    with pytest.raises(ScheduleError, match=r"got 101 = 71 visual"):
        check_positions(
            config,
            num_visual=71,
            max_text=20,
            max_new_tokens=10,
            schedule=Schedule(stages=(Stage(layer=1, keep=5),)),
        )


def test_multimodal_rope_of_qwen_is_accepted() -> None:
    text = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1000000.0}
    config = Qwen2_5_VLConfig(text_config=text).text_config
    check_decoder(config, folder=FOLDER)
    check_positions(config, num_visual=1000, max_text=256, max_new_tokens=256)
