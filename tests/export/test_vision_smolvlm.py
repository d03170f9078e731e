"""SmolVLM2's vision graph in torch against Hugging Face."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from trio_edge.export.graphs.attention import TILE_ATTENTION_NAME, register_attention
from trio_edge.export.graphs.vision.internvl import shuffled
from trio_edge.export.graphs.vision.smolvlm import SmolVlmVision, patch_positions

VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "as_small_releases": (4, {"image_size": 32, "patch_size": 4}),
    "patches_that_do_not_fill_a_tile": (3, {"image_size": 29, "patch_size": 3}),
    "positions_that_transformers_rounds": (5, {"image_size": 25, "patch_size": 1}),
    "one_token": (2, {"image_size": 8, "patch_size": 4}),
    "one_patch_a_token": (1, {"image_size": 10, "patch_size": 5}),
    "other_activation": (2, {"hidden_act": "gelu", "num_attention_heads": 1, "num_hidden_layers": 3}),
    "one_layer": (2, {"num_hidden_layers": 1, "layer_norm_eps": 1e-2}),
}


def random_model(*, scale_factor: int = 2, attention: str = "eager", **vision: Any) -> Any:
    torch.manual_seed(7)
    config = hf.SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 24,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 9,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 20,
            "image_size": 24,
            "patch_size": 3,
            "initializer_range": 0.2,
            **vision,
        },
        image_token_id=1,
        scale_factor=scale_factor,
    )
    config.vision_config._attn_implementation = attention
    model = hf.SmolVLMForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def vision_module(model: Any) -> SmolVlmVision:
    vision = model.config.vision_config
    positions = torch.from_numpy(patch_positions(vision.image_size // vision.patch_size))
    return SmolVlmVision(model.model.vision_model, model.model.connector, position_ids=positions)


@pytest.fixture(scope="module", autouse=True)
def _attention() -> None:
    register_attention()


@pytest.mark.parametrize("variant", VARIANTS)
def test_visual_tokens_equal_hugging_face(variant: str) -> None:
    scale_factor, vision = VARIANTS[variant]
    theirs = random_model(scale_factor=scale_factor, **vision)
    side = theirs.config.vision_config.image_size
    pixels = torch.randn(3, 3, side, side)
    with torch.no_grad():
        (expected,) = theirs.get_image_features(pixels[None]).pooler_output
        count = len(expected)
        index = torch.tensor([*range(count), 0, 0], dtype=torch.int32)
        module = vision_module(
            random_model(scale_factor=scale_factor, attention=TILE_ATTENTION_NAME, **vision)
        )
        tokens = module(pixels, index)
    torch.testing.assert_close(tokens[:count], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[count:], expected[[0, 0]], rtol=1e-5, atol=1e-5)


def test_a_mask_without_padding_changes_nothing() -> None:
    """Hugging Face's processor sends one all the same."""
    model, pixels = random_model(), torch.randn(1, 2, 3, 24, 24)
    mask = torch.ones(1, 2, 24, 24, dtype=torch.int64)
    with torch.no_grad():
        (masked,) = model.get_image_features(pixels, mask).pooler_output
        tokens = vision_module(model)(pixels[0], torch.arange(32, dtype=torch.int32))
    torch.testing.assert_close(tokens, masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merge", [1, 2, 4])
def test_the_pixel_shuffle_equals_hugging_face(merge: int) -> None:
    patches = torch.arange(2 * 64 * 4).reshape(2, 64, 4)
    theirs = random_model().model.connector.pixel_shuffle(patches, merge)
    torch.testing.assert_close(shuffled(patches, merge=merge), theirs)


@pytest.mark.parametrize("side", [1, 2, 27, 32], ids=str)
def test_patches_of_most_tiles_are_numbered_in_raster_order(side: int) -> None:
    np.testing.assert_array_equal(patch_positions(side), np.arange(side**2))


def test_positions_do_not_depend_on_the_type_that_is_exported() -> None:
    expected = patch_positions(25)
    assert not np.array_equal(expected, np.arange(625))
    torch.set_default_dtype(torch.float16)
    try:
        np.testing.assert_array_equal(patch_positions(25), expected)
        assert torch.get_default_dtype() == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)


def test_every_parameter_is_the_checkpoints_own() -> None:
    model = random_model()
    theirs = {id(parameter) for parameter in model.parameters()}
    module = vision_module(model)
    assert {id(parameter) for parameter in module.parameters()} <= theirs
    assert [name for name, _ in module.named_buffers()] == ["position_ids"]


def test_all_linear_layers_are_grouped_by_what_they_read() -> None:
    module = vision_module(random_model())
    groups = module.linear_groups()
    linears = {id(linear) for group in groups for linear in group.linears}
    assert linears == {id(part) for part in module.modules() if isinstance(part, torch.nn.Linear)}
    assert [group.name for group in groups if not group.can_smooth] == ["fc2", "fc2", "projector_1"]


def test_float16_pixels_and_scores_stay_finite() -> None:
    model = random_model(attention=TILE_ATTENTION_NAME)
    layer = model.model.vision_model.encoder.layers[0].self_attn
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(layer, name).bias.fill_(100.0)  # 8 * 100 * 100 > 65504 before scaling by 8 ** -0.5
        tokens = vision_module(model.half())(torch.zeros(1, 3, 24, 24), torch.arange(16, dtype=torch.int32))
    assert tokens.dtype == torch.float16
    assert torch.isfinite(tokens).all()
