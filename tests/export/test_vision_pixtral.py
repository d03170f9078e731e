"""Pixtral's vision graph in torch against Hugging Face; exported it is in ``tests/spec/test_mistral3.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from tests.mistral3_checkpoints import whole_image
from tests.pictures import random_picture
from trio_edge.export.graphs.vision.pixtral import PixtralVision, inverse_frequencies
from trio_edge.runtime.images.pixtral import PixtralImages

VARIANTS: dict[str, dict[str, Any]] = {
    "ministral3": {"vision": {"hidden_act": "silu"}},
    "gelu": {},
    "no_merging": {"spatial_merge_size": 1},
    "projector_bias": {"multimodal_projector_bias": True},
    "other_frequencies": {"vision": {"rope_parameters": {"rope_type": "axial", "rope_theta": 7.0}}},
    "three_heads": {"vision": {"num_attention_heads": 3, "hidden_size": 24}},
}


def random_model(*, vision: dict[str, Any] | None = None, **settings: Any) -> Any:
    torch.manual_seed(3)
    config = hf.Mistral3Config(
        text_config={
            "model_type": "mistral", "hidden_size": 20, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 20,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 20, "image_size": 60, "patch_size": 3, "initializer_range": 0.4,
            **(vision or {}),
        },
        image_token_index=1,
        **settings,
    )  # fmt: skip
    model = hf.Mistral3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def our_vision(model: Any) -> PixtralVision:
    tower = model.model.vision_tower
    inv_freq = torch.from_numpy(inverse_frequencies(tower))
    return PixtralVision(tower, model.model.multi_modal_projector, inv_freq=inv_freq, max_patches=400)


@pytest.mark.parametrize("size", [(60, 60), (23, 51), (7, 40), (13, 5)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_visual_tokens_equal_hugging_face(variant: str, size: tuple[int, int]) -> None:
    """With padding, and next to a larger image in the same call of Hugging Face's tower."""
    model = random_model(**VARIANTS[variant])
    images = PixtralImages(patch_size=3, merge_size=model.config.spatial_merge_size, longest_edge=60)
    picture, own = random_picture(*size), images.sizes(*size)
    padded = {"P": own["P"] + 4 * images.merge_size**2, "N": own["N"] + 3}
    inputs = [torch.from_numpy(array) for array in images.prepare(picture, padded).values()]
    pixels = whole_image(images, picture)
    both = torch.randn(2, 3, 60, 60)
    both[0, :, : pixels.shape[2], : pixels.shape[3]] = pixels[0]
    sizes = torch.tensor([pixels.shape[2:], (60, 60)])
    with torch.no_grad():
        expected = model.get_image_features(both, image_sizes=sizes).pooler_output[0]
        tokens = our_vision(model)(*inputs)
    torch.testing.assert_close(tokens[: own["N"]], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens[own["N"] :], expected[[0, 0, 0]], rtol=1e-4, atol=1e-5)


def test_rows_and_columns_have_frequencies_of_their_own() -> None:
    row, column = inverse_frequencies(random_model().model.vision_tower)
    assert row.shape == column.shape == (1, 2)
    assert (row > column).all()


def test_every_parameter_is_the_checkpoints_own() -> None:
    model = random_model()
    theirs = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in theirs for parameter in our_vision(model).parameters())


def test_linear_groups_name_every_product_once() -> None:
    vision = our_vision(random_model())
    named = [id(linear) for group in vision.linear_groups() for linear in group.linears]
    every = [id(module) for module in vision.modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(named) == sorted(every)
