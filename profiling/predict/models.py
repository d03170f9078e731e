"""Released models and their shapes, so that times can be predicted without a bundle."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from trio_edge.runtime.bundle.errors import TargetError
from trio_edge.runtime.bundle.manifest import Dimensions, VisionDimensions
from trio_edge.runtime.images.interface import image_processing
from trio_edge.runtime.images.internvl import InternVlImages
from trio_edge.runtime.images.llava import ONEVISION_PINPOINTS, LlavaImages
from trio_edge.runtime.images.qwen import Qwen3Images, QwenImages
from trio_edge.runtime.images.smolvlm import SmolVlmImages

if TYPE_CHECKING:
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.images.interface import ImageProcessing


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model that times can be predicted for."""

    name: str
    decoder: Dimensions
    vision: VisionDimensions | None
    """None where nothing is known of it, or none is wanted."""
    pictures: ImageProcessing
    """Gives the number of visual tokens of an image."""


def model_of(manifest: Manifest) -> Model:
    """Return the model that a bundle was made of; its vision tower where the manifest describes it."""
    pictures = image_processing(manifest.image_processing, encoder_keep=manifest.encoder_keep)
    return Model(name=manifest.model, decoder=manifest.dimensions, vision=manifest.vision, pictures=pictures)


def find_model(name: str) -> Model:
    """Return the released model called ``name``.

    Raises:
        TargetError: If there is none; the message has the nearest name and all others.
    """
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name, MODELS, n=1)
    hint = f"did you mean {near[0]}?" if near else "choose one of these, or predict from a bundle"
    raise TargetError(f"--model: expected one of {', '.join(MODELS)}, got {name!r}; {hint}")


_CLIP = VisionDimensions(
    num_layers=23,
    hidden_size=1024,
    intermediate_size=4096,
    patches_per_tile=577,
    projected_per_tile=576,
    projector_weights=0,
)
_QWEN_VISION = VisionDimensions(
    num_layers=32,
    hidden_size=1280,
    intermediate_size=3420,
    patches_per_tile=None,
    patches_per_token=4,
    mlp_matrices=3,
    patches_per_window=64,
    num_full_layers=4,
    projector_weights=0,
)
_INTERN_VIT = VisionDimensions(
    num_layers=24,
    hidden_size=1024,
    intermediate_size=4096,
    patches_per_tile=1025,
    projector_weights=0,
)
_HALF = (0.5, 0.5, 0.5)
_SIGLIP = VisionDimensions(
    num_layers=26,
    hidden_size=1152,
    intermediate_size=4304,
    patches_per_tile=729,
    projected_per_tile=729,
    projector_weights=0,
)
_SIGLIP_BASE = VisionDimensions(
    num_layers=12,
    hidden_size=768,
    intermediate_size=3072,
    patches_per_tile=1024,
    projector_weights=0,
)
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def _decoder(
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    vocab_size: int,
    *,
    head_size: int = 128,
) -> Dimensions:
    return Dimensions(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
    )


def _llava(name: str, decoder: Dimensions, *, tiles: bool) -> Model:
    processing = LlavaImages(
        kind="anyres" if tiles else "single",
        tile_size=336,
        patch_size=14,
        resize_size=336,
        grid_pinpoints=_PINPOINTS if tiles else (),
    )
    hidden = decoder.hidden_size
    return Model(
        name=name,
        decoder=decoder,
        vision=msgspec.structs.replace(_CLIP, projector_weights=(1024 + hidden) * hidden),
        pictures=processing,
    )


def _onevision(name: str, decoder: Dimensions) -> Model:
    processing = LlavaImages(
        kind="anyres",
        tile_size=384,
        patch_size=14,
        resize_size=384,
        grid_pinpoints=ONEVISION_PINPOINTS,
        max_grid_tiles=9,
    )
    hidden = decoder.hidden_size
    return Model(
        name=name,
        decoder=decoder,
        vision=msgspec.structs.replace(_SIGLIP, projector_weights=(1152 + hidden) * hidden),
        pictures=processing,
    )


def _qwen(name: str, decoder: Dimensions) -> Model:
    processing = QwenImages(patch_size=14, window_size=112, max_pixels=12845056)
    merged = 1280 * 4
    return Model(
        name=name,
        decoder=decoder,
        vision=msgspec.structs.replace(
            _QWEN_VISION, projector_weights=merged * (merged + decoder.hidden_size)
        ),
        pictures=processing,
    )


def _qwen3(name: str, decoder: Dimensions, *, large_tower: bool = False) -> Model:
    width, layers, inner = (1152, 27, 4304) if large_tower else (1024, 24, 4096)
    merged, mergers = 4 * width, 1 + 3  # of the last layer, and of the three planes of DeepStack
    vision = VisionDimensions(
        num_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        patches_per_tile=None,
        patches_per_token=4,
        projector_weights=mergers * merged * (merged + decoder.hidden_size),
    )
    pictures = Qwen3Images(
        patch_size=16, table_size=48, min_pixels=65536, max_pixels=16777216, image_mean=_HALF, image_std=_HALF
    )
    return Model(name=name, decoder=decoder, vision=vision, pictures=pictures)


def _intern(name: str, decoder: Dimensions) -> Model:
    processing = InternVlImages(tile_size=448, tokens_per_side=16)
    hidden = decoder.hidden_size
    return Model(
        name=name,
        decoder=decoder,
        vision=msgspec.structs.replace(_INTERN_VIT, projector_weights=(4 * 1024 + hidden) * hidden),
        pictures=processing,
    )


def _smolvlm(name: str, decoder: Dimensions) -> Model:
    vision = msgspec.structs.replace(_SIGLIP_BASE, projector_weights=16 * 768 * decoder.hidden_size)
    pictures = SmolVlmImages(tile_size=512, token_size=64, longest_edge=2048)
    return Model(name=name, decoder=decoder, vision=vision, pictures=pictures)


def _large_smolvlm(name: str, decoder: Dimensions) -> Model:
    vision = msgspec.structs.replace(
        _SIGLIP, num_layers=27, projected_per_tile=None, projector_weights=9 * 1152 * decoder.hidden_size
    )
    pictures = SmolVlmImages(tile_size=384, token_size=42, longest_edge=1536)
    return Model(name=name, decoder=decoder, vision=vision, pictures=pictures)


_VICUNA_7B = _decoder(32, 4096, 32, 32, 11008, 32064)
_VICUNA_13B = _decoder(40, 5120, 40, 40, 13824, 32064)
_QWEN3_2B = _decoder(28, 2048, 16, 8, 6144, 151936)
_QWEN3_8B = _decoder(36, 4096, 32, 8, 12288, 151936)
_ALL = (
    _llava("llava-1.5-7b", _VICUNA_7B, tiles=False),
    _llava("llava-1.5-13b", _VICUNA_13B, tiles=False),
    _llava("llava-next-7b", _VICUNA_7B, tiles=True),
    _llava("llava-next-mistral-7b", _decoder(32, 4096, 32, 8, 14336, 32064), tiles=True),
    _llava("llava-next-13b", _VICUNA_13B, tiles=True),
    _onevision("llava-onevision-0.5b", _decoder(24, 896, 14, 2, 4864, 152000, head_size=64)),
    _onevision("llava-onevision-7b", _decoder(28, 3584, 28, 4, 18944, 152128)),
    _qwen("qwen2.5-vl-3b", _decoder(36, 2048, 16, 2, 11008, 151936)),
    _qwen("qwen2.5-vl-7b", _decoder(28, 3584, 28, 4, 18944, 152064)),
    _qwen3("qwen3-vl-2b", _QWEN3_2B),
    _qwen3("qwen3-vl-4b", _decoder(36, 2560, 32, 8, 9728, 151936)),
    _qwen3("qwen3-vl-8b", _QWEN3_8B, large_tower=True),
    _qwen3("cosmos-reason2-2b", _QWEN3_2B),
    _qwen3("cosmos-reason2-8b", _QWEN3_8B, large_tower=True),
    _intern("internvl3-1b", _decoder(24, 896, 14, 2, 4864, 151674, head_size=64)),
    _intern("internvl3-2b", _decoder(28, 1536, 12, 2, 8960, 151674)),
    _intern("internvl3-8b", _decoder(28, 3584, 28, 4, 18944, 151674)),
    _intern("internvl3.5-1b", _decoder(28, 1024, 16, 8, 3072, 151936, head_size=128)),
    _intern("internvl3.5-2b", _decoder(28, 2048, 16, 8, 6144, 151936, head_size=128)),
    _intern("internvl3.5-4b", _decoder(36, 2560, 32, 8, 9728, 151936, head_size=128)),
    _intern("internvl3.5-8b", _decoder(36, 4096, 32, 8, 12288, 151936, head_size=128)),
    _smolvlm("smolvlm2-256m", _decoder(30, 576, 9, 3, 1536, 49280, head_size=64)),
    _smolvlm("smolvlm2-500m", _decoder(32, 960, 15, 5, 2560, 49280, head_size=64)),
    _large_smolvlm("smolvlm2-2.2b", _decoder(24, 2048, 32, 32, 8192, 49280, head_size=64)),
)
MODELS: dict[str, Model] = {model.name: model for model in _ALL}
"""Released models by the alias that ``trio-export`` knows them by."""
