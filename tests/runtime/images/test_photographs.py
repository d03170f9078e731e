"""Photographs, as files: every family prepares them as Hugging Face's default processor does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.pictures import PHOTOGRAPHS, photograph
from tests.torchvision_reference import PHOTOGRAPHED, PROCESSORS, TorchvisionReference
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.runtime.images.reading import open_image
from trio_edge.runtime.images.tiles import InternVlImages, SmolVlmImages

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _processing(config: dict[str, Any]) -> LlavaImages | InternVlImages | SmolVlmImages:
    kind = config["image_processor_type"]
    if kind == "GotOcr2ImageProcessor":
        return InternVlImages.from_preprocessor_config(config, tokens_per_side=4)
    if kind == "SmolVLMImageProcessor":
        return SmolVlmImages.from_preprocessor_config(config, token_size=10)
    return LlavaImages.from_preprocessor_config(config, patch_size=14)


def _levels(pixels: NDArray[np.float32], images: Any) -> NDArray[np.float32]:
    mean, std = (np.array(values)[:, None, None] for values in (images.image_mean, images.image_std))
    levels: NDArray[np.float32] = (pixels * std + mean) / images.rescale_factor
    return levels


@pytest.mark.parametrize("photo", PHOTOGRAPHS)
@pytest.mark.parametrize("name", PHOTOGRAPHED)
def test_pixels_equal_the_processor_that_hugging_face_uses_by_default(
    name: str, photo: str, torchvision_reference: TorchvisionReference
) -> None:
    images = _processing(PROCESSORS[name].config)
    ours = images.prepare(open_image(photograph(photo)))["pixel_values"]
    theirs = torchvision_reference.of_photograph(name, photo)["pixel_values"]
    theirs = theirs[0] if theirs.ndim == 5 else theirs
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(_levels(ours, images), _levels(theirs, images), atol=0.01)


@pytest.mark.parametrize("photo", PHOTOGRAPHS)
def test_the_bytes_of_a_file_are_the_file(photo: str) -> None:
    image = open_image(photograph(photo))
    assert image.mode == "RGB"
    assert np.std(np.asarray(image)) > 20
    np.testing.assert_array_equal(open_image(photograph(photo).read_bytes()), image)
