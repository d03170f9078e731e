"""LLaVA-OneVision's vision graph in torch against Hugging Face; exported it is in ``tests/spec/test_llava_onevision.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from trio_edge.export.families.llava import feature_layers_of
from trio_edge.export.graphs.attention import TILE_ATTENTION_NAME, register_attention
from trio_edge.export.graphs.vision.siglip import SiglipVision, weighted_rows
from trio_edge.runtime.images.llava import LlavaImages

TILE, PATCH = 22, 4
PINPOINTS = ((22, 22), (22, 44), (44, 44), (66, 44))
IMAGES = LlavaImages(
    kind="anyres",
    tile_size=TILE,
    patch_size=PATCH,
    resize_size=TILE,
    grid_pinpoints=PINPOINTS,
    max_grid_tiles=2,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "released": {},
    "all_layers_but_one": {"vision_feature_layer": -2},
    "several_layers": {"vision_feature_layer": [0, -1, 1]},
    "projector_without_bias": {"multimodal_projector_bias": False, "projector_hidden_act": "relu"},
    "with_head": {"vision": {"vision_use_head": True, "hidden_act": "gelu"}},
}
SIZES = [(20, 21), (90, 80), (41, 100)]


@pytest.fixture(scope="module", autouse=True)
def _attention() -> None:
    register_attention()


def random_model(*, attention: str = "eager", vision: dict[str, Any] | None = None, **settings: Any) -> Any:
    torch.manual_seed(5)
    config = hf.LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2", "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 9,
        },
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 20, "image_size": TILE, "patch_size": PATCH, "vision_use_head": False,
            **(vision or {}),
        },
        image_token_index=1,
        image_grid_pinpoints=[list(pinpoint) for pinpoint in PINPOINTS],
        vision_aspect_ratio="anyres_max_2",
        **settings,
    )  # fmt: skip
    config.vision_config._attn_implementation = attention
    model = hf.LlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def vision_module(model: Any) -> SiglipVision:
    inner = model.model
    return SiglipVision(
        inner.vision_tower,
        inner.multi_modal_projector,
        inner.image_newline,
        feature_layers=feature_layers_of(model.config),
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_visual_tokens_equal_hugging_face(variant: str, size: tuple[int, int]) -> None:
    num_tiles = IMAGES.sizes(*size)["B"]
    pixels = torch.randn(num_tiles, 3, TILE, TILE)
    padded = torch.cat([pixels, torch.zeros(2, 3, TILE, TILE)])
    index, weights = map(torch.from_numpy, IMAGES.weighted_index(*size, num_tiles=num_tiles + 2))
    with torch.no_grad():
        theirs = random_model(**VARIANTS[variant])
        (expected,) = theirs.get_image_features(pixels[None], torch.tensor([size[::-1]])).pooler_output
        module = vision_module(random_model(attention=TILE_ATTENTION_NAME, **VARIANTS[variant]))
        tokens = module(padded, index, weights)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_is_the_checkpoints_own() -> None:
    model = random_model()
    theirs = {id(parameter) for parameter in model.parameters()}
    module = vision_module(model)
    assert {id(parameter) for parameter in module.parameters()} <= theirs
    assert [name for name, _ in module.named_buffers()] == ["embeddings.position_ids"]


def test_layers_that_nothing_reads_do_not_run() -> None:
    assert len(vision_module(random_model(vision_feature_layer=-3)).layers) == 1


def test_sums_of_float16_rows_are_rounded_once() -> None:
    rows = torch.tensor([[2048.0], [1.0], [1.0], [-2048.0]], dtype=torch.float16)
    index, weights = torch.arange(4)[None], torch.ones(1, 4)
    assert weighted_rows(rows, index, weights).tolist() == [[2.0]]


def test_float16_scores_beyond_its_range_after_the_product_do_not_overflow() -> None:
    layer = random_model(attention=TILE_ATTENTION_NAME).model.vision_tower.encoder.layers[0].self_attn.half()
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(layer, name).bias.fill_(100.0)  # 8 * 100 * 100 > 65504 before scaling by 8 ** -0.5
        output, _ = layer(torch.zeros(1, 5, 16, dtype=torch.float16))
    assert torch.isfinite(output).all()
