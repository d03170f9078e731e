"""Released models and their sizes, for predictions without a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from trio_edge.runtime.bundle.errors import TargetError, did_you_mean
from trio_edge.runtime.bundle.manifest import Dimensions, LinearAttention, Manifest, VisionDimensions
from trio_edge.runtime.images.interface import ImageProcessing, image_processing
from trio_edge.runtime.images.llava import ONEVISION_PINPOINTS, LlavaImages
from trio_edge.runtime.images.pixtral import PixtralImages
from trio_edge.runtime.images.qwen import Qwen3Images, QwenImages
from trio_edge.runtime.images.tiles import InternVlImages, SmolVlmImages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


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


_DECODER = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "vocab_size")
_TOWER = ("num_layers", "hidden_size", "intermediate_size", "patches_per_tile")


def _decoder(*sizes: int, head_size: int = 128) -> Dimensions:
    named: dict[str, Any] = dict(zip(_DECODER, sizes, strict=True))
    return Dimensions(head_size=head_size, **named)


def _tower(*sizes: Any, **more: int) -> VisionDimensions:
    """Return the dimensions of a vision tower without its projector, which depends on the decoder."""
    return VisionDimensions(projector_weights=0, **dict(zip(_TOWER, sizes, strict=True)), **more)


_LLAVA: dict[str, Any] = {"tile_size": 336, "patch_size": 14, "resize_size": 336}
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_LLAVA_NEXT = LlavaImages(kind="anyres", grid_pinpoints=_PINPOINTS, **_LLAVA)
_ONEVISION = LlavaImages(
    kind="anyres",
    tile_size=384,
    patch_size=14,
    resize_size=384,
    grid_pinpoints=ONEVISION_PINPOINTS,
    max_grid_tiles=9,
)
_HALF = (0.5, 0.5, 0.5)
_QWEN3 = Qwen3Images(
    patch_size=16, table_size=48, min_pixels=65536, max_pixels=16777216, image_mean=_HALF, image_std=_HALF
)
_CLIP = _tower(23, 1024, 4096, 577, projected_per_tile=576)
_SIGLIP = _tower(26, 1152, 4304, 729, projected_per_tile=729)
_QWEN_VISION = _tower(
    32, 1280, 3420, None, patches_per_token=4, mlp_matrices=3, patches_per_window=64, num_full_layers=4
)


def _clip(hidden: int) -> int:
    return (1024 + hidden) * hidden


def _merger(width: int, count: int = 1) -> Callable[[int], int]:
    """Return the weights of ``count`` mergers of four patches; DeepStack has one more for each of its planes."""
    return lambda hidden: count * 4 * width * (4 * width + hidden)


_QWEN3_SMALL = _tower(24, 1024, 4096, None, patches_per_token=4), _QWEN3, _merger(1024, 4)
_QWEN3_LARGE = _tower(27, 1152, 4304, None, patches_per_token=4), _QWEN3, _merger(1152, 4)
_QWEN3_5_9B = msgspec.structs.replace(
    _decoder(32, 4096, 16, 4, 12288, 248320, head_size=256),
    linear=LinearAttention(
        layers=tuple(layer for layer in range(32) if layer % 4 != 3),
        num_key_heads=16,
        num_value_heads=32,
        key_size=128,
        value_size=128,
        kernel_size=4,
    ),
    has_attention_gate=True,
)
_VICUNA_7B = _decoder(32, 4096, 32, 32, 11008, 32064)
_VICUNA_13B = _decoder(40, 5120, 40, 40, 13824, 32064)
_QWEN3_2B = _decoder(28, 2048, 16, 8, 6144, 151936)
_QWEN3_8B = _decoder(36, 4096, 32, 8, 12288, 151936)
# Vision tower, image processing, the projector's weights as a function of the decoder's hidden size, and decoders by name.
_FAMILIES: tuple[
    tuple[VisionDimensions, ImageProcessing, Callable[[int], int], Mapping[str, Dimensions]], ...
] = (
    (
        _CLIP,
        LlavaImages(kind="single", **_LLAVA),
        _clip,
        {"llava-1.5-7b": _VICUNA_7B, "llava-1.5-13b": _VICUNA_13B},
    ),
    (
        _CLIP,
        _LLAVA_NEXT,
        _clip,
        {
            "llava-next-7b": _VICUNA_7B,
            "llava-next-mistral-7b": _decoder(32, 4096, 32, 8, 14336, 32064),
            "llava-next-13b": _VICUNA_13B,
        },
    ),
    (
        _SIGLIP,
        _ONEVISION,
        lambda hidden: (1152 + hidden) * hidden,
        {
            "llava-onevision-0.5b": _decoder(24, 896, 14, 2, 4864, 152000, head_size=64),
            "llava-onevision-7b": _decoder(28, 3584, 28, 4, 18944, 152128),
        },
    ),
    (
        _QWEN_VISION,
        QwenImages(patch_size=14, window_size=112, max_pixels=12845056),
        _merger(1280),
        {
            "qwen2.5-vl-3b": _decoder(36, 2048, 16, 2, 11008, 151936),
            "qwen2.5-vl-7b": _decoder(28, 3584, 28, 4, 18944, 152064),
        },
    ),
    (*_QWEN3_SMALL, {"qwen3-vl-2b": _QWEN3_2B, "qwen3-vl-4b": _decoder(36, 2560, 32, 8, 9728, 151936)}),
    (*_QWEN3_LARGE, {"qwen3-vl-8b": _QWEN3_8B}),
    (_QWEN3_LARGE[0], _QWEN3, _merger(1152), {"qwen3.5-9b": _QWEN3_5_9B}),
    (*_QWEN3_SMALL, {"cosmos-reason2-2b": _QWEN3_2B}),
    (*_QWEN3_LARGE, {"cosmos-reason2-8b": _QWEN3_8B}),
    (
        _tower(24, 1024, 4096, 1025),
        InternVlImages(tile_size=448, tokens_per_side=16),
        lambda hidden: (4 * 1024 + hidden) * hidden,
        {
            "internvl3-1b": _decoder(24, 896, 14, 2, 4864, 151674, head_size=64),
            "internvl3-2b": _decoder(28, 1536, 12, 2, 8960, 151674),
            "internvl3-8b": _decoder(28, 3584, 28, 4, 18944, 151674),
            "internvl3.5-1b": _decoder(28, 1024, 16, 8, 3072, 151936),
            "internvl3.5-2b": _decoder(28, 2048, 16, 8, 6144, 151936),
            "internvl3.5-4b": _decoder(36, 2560, 32, 8, 9728, 151936),
            "internvl3.5-8b": _decoder(36, 4096, 32, 8, 12288, 151936),
        },
    ),
    (
        _tower(24, 1024, 4096, None, patches_per_token=4, mlp_matrices=3),
        PixtralImages(patch_size=14, longest_edge=1540),
        lambda hidden: 4 * 1024**2 + (1024 + hidden) * hidden,
        {
            "ministral-3-3b": _decoder(26, 3072, 32, 8, 9216, 131072),
            "ministral-3-8b": _decoder(34, 4096, 32, 8, 14336, 131072),
            "ministral-3-14b": _decoder(40, 5120, 32, 8, 16384, 131072),
            "mistral-small-3.1-24b": _decoder(40, 5120, 32, 8, 32768, 131072),
        },
    ),
    (
        _tower(12, 768, 3072, 1024),
        SmolVlmImages(tile_size=512, token_size=64, longest_edge=2048),
        lambda hidden: 16 * 768 * hidden,
        {
            "smolvlm2-256m": _decoder(30, 576, 9, 3, 1536, 49280, head_size=64),
            "smolvlm2-500m": _decoder(32, 960, 15, 5, 2560, 49280, head_size=64),
        },
    ),
    (
        _tower(27, 1152, 4304, 729),
        SmolVlmImages(tile_size=384, token_size=42, longest_edge=1536),
        lambda hidden: 9 * 1152 * hidden,
        {"smolvlm2-2.2b": _decoder(24, 2048, 32, 32, 8192, 49280, head_size=64)},
    ),
)
MODELS = {
    name: Model(
        name=name,
        decoder=decoder,
        vision=msgspec.structs.replace(tower, projector_weights=projector_weights(decoder.hidden_size)),
        images=images,
    )
    for tower, images, projector_weights, decoders in _FAMILIES
    for name, decoder in decoders.items()
}
"""Released models by ``trio-export``'s aliases."""
