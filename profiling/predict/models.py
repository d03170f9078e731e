"""Released models and their sizes, for predictions without a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from trio_edge.runtime.bundle.errors import TargetError, did_you_mean
from trio_edge.runtime.bundle.manifest import Dimensions, Manifest, VisionDimensions
from trio_edge.runtime.images.interface import ImageProcessing, image_processing

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The sizes of a model."""

    name: str
    decoder: Dimensions
    vision: VisionDimensions | None
    """None if unknown or not wanted."""
    images: ImageProcessing
    """Its image processing, which gives an image's number of visual tokens."""


def model_of(manifest: Manifest) -> Model:
    """Return a bundle's model, with its vision tower if the manifest describes it."""
    images = image_processing(manifest.image_processing, encoder_keep=manifest.encoder_keep)
    return Model(name=manifest.model, decoder=manifest.dimensions, vision=manifest.vision, images=images)


def find_model(name: str) -> Model:
    """Return the released model called ``name``.

    Raises:
        TargetError: If there is none; the message has all names, and the nearest one.
    """
    if name in MODELS:
        return MODELS[name]
    hint = did_you_mean(name, MODELS, otherwise="choose one of these, or predict from a bundle")
    raise TargetError(f"--model: expected one of {', '.join(MODELS)}, got {name!r}; {hint}")


class _Family(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Models with one vision tower, as ``models.json`` has them."""

    vision: dict[str, Any]
    """Fields of ``VisionDimensions``, without the projector's weights, which depend on the decoder."""
    images: dict[str, Any]
    """Fields of the image processing."""
    projector: tuple[int, int, int]
    """Its weights are a + b D + c D², with the decoder's hidden size D."""
    decoders: dict[str, Dimensions]

    def models(self) -> Iterator[Model]:
        """Yield the models."""
        images = image_processing(self.images, encoder_keep=None)
        for name, decoder in self.decoders.items():
            size = decoder.hidden_size
            weights = sum(factor * size**power for power, factor in enumerate(self.projector))
            vision = VisionDimensions(projector_weights=weights, **self.vision)
            yield Model(name=name, decoder=decoder, vision=vision, images=images)


_FAMILIES = msgspec.json.decode(Path(__file__).with_name("models.json").read_bytes(), type=list[_Family])
MODELS = {model.name: model for family in _FAMILIES for model in family.models()}
"""Released models by ``trio-export``'s aliases."""
