"""InternVL's vision graph in torch against Hugging Face; exported it is in ``tests/spec/test_internvl.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from trio_edge.export.graphs.attention import TILE_ATTENTION_NAME, register_attention
from trio_edge.export.graphs.vision.internvl import TileVision, shuffled

VARIANTS: dict[str, dict[str, Any]] = {
    "300M": {"attention_bias": True},
    "6B": {"use_qk_norm": True, "norm_type": "rms_norm"},
    "final_norm": {"use_mean_pooling": False},
    "no_positions": {"use_absolute_position_embeddings": False},
    "mask_token": {"use_mask_token": True},
}


def random_model(*, attention: str = "eager", **vision: Any) -> Any:
    torch.manual_seed(3)
    config = hf.InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "hidden_size": 24,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 9,
        },
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 20,
            "image_size": [24, 24],
            "patch_size": [3, 3],
            "initializer_range": 0.2,
            **vision,
        },
        image_token_id=1,
    )
    config.vision_config._attn_implementation = attention
    model = hf.InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith(("_token", "position_embeddings")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", autouse=True)
def _attention() -> None:
    register_attention()


@pytest.mark.parametrize("variant", VARIANTS)
def test_visual_tokens_equal_hugging_face(variant: str) -> None:
    pixels = torch.randn(3, 3, 24, 24)
    ours = random_model(attention=TILE_ATTENTION_NAME, **VARIANTS[variant]).model
    index = torch.tensor([*range(48), 0, 0], dtype=torch.int32)
    with torch.no_grad():
        expected = random_model(**VARIANTS[variant]).get_image_features(pixels).pooler_output.flatten(0, 1)
        tokens = TileVision(ours.vision_tower, ours.multi_modal_projector, merge=2)(pixels, index)
    torch.testing.assert_close(tokens[:48], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens[48:], expected[[0, 0]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merge", [1, 2, 4])
def test_the_pixel_shuffle_equals_hugging_face(merge: int) -> None:
    patches = torch.arange(2 * 64 * 4).reshape(2, 64, 4)
    theirs = random_model().model.pixel_shuffle(patches.reshape(2, 8, 8, 4), scale_factor=1 / merge)
    torch.testing.assert_close(shuffled(patches, merge=merge), theirs.flatten(1, 2))


def test_every_parameter_is_the_checkpoints_own() -> None:
    model = random_model()
    theirs = {id(parameter) for parameter in model.parameters()}
    module = TileVision(model.model.vision_tower, model.model.multi_modal_projector, merge=2)
    assert {id(parameter) for parameter in module.parameters()} <= theirs
    assert not list(module.named_buffers())


def test_float16_scores_beyond_its_range_after_the_product_do_not_overflow() -> None:
    model = random_model(attention=TILE_ATTENTION_NAME, attention_bias=True)
    layer = model.model.vision_tower.encoder.layer[0].attention.half()
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(layer, name).bias.fill_(100.0)  # 8 * 100 * 100 > 65504 before scaling by 8 ** -0.5
        output, _ = layer(torch.zeros(1, 5, 16, dtype=torch.float16))
    assert torch.isfinite(output).all()
