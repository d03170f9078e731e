"""Makes the selector in front of the decoder: the only place that knows its methods by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.runtime.vision_inputs import TilePictures

if TYPE_CHECKING:
    from trio_edge.runtime.manifest import TokenMethod
    from trio_edge.runtime.vision_inputs import PictureProcessing
    from trio_edge.trio.selectors.interface import TokenSelector

CLIP_METHODS: tuple[TokenMethod, ...] = ("cdpruner", "eadp")
"""Those that read the question, and can compare it with the picture in CLIP's space."""


def token_selector(
    method: TokenMethod, *, num_keep: int, clip: bool = False, grid: tuple[int, int] | None = None
) -> TokenSelector:
    """Return the selector ``method`` that keeps ``num_keep`` tokens of a picture.

    Args:
        method: Its name.
        num_keep: K.
        clip: Whether it compares the text with the picture in CLIP's space; one of ``CLIP_METHODS``.
        grid: Rows and columns if every picture is one full grid of tokens.
    """
    if method == "visionzip":
        from trio_edge.trio.selectors.tokens.visionzip import VisionZip

        return VisionZip(num_keep=num_keep)
    if method == "holov":
        from trio_edge.trio.selectors.tokens.holov import HoloV

        return HoloV(num_keep=num_keep)
    if method == "scope":
        from trio_edge.trio.selectors.tokens.scope import Scope

        return Scope(num_keep=num_keep)
    if method == "divprune":
        from trio_edge.trio.selectors.tokens.divprune import DivPrune

        return DivPrune(num_keep=num_keep)
    if method == "cdpruner":
        from trio_edge.trio.selectors.tokens.cdpruner import CdPruner

        return CdPruner(num_keep=num_keep, clip=clip)
    if method == "eadp":
        from trio_edge.trio.selectors.tokens.eadp import Eadp

        return Eadp(num_keep=num_keep, clip=clip, grid=grid)
    from trio_edge.trio.selectors.tokens.uniform import Uniform

    return Uniform(num_keep=num_keep)


def full_grid(processing: PictureProcessing) -> tuple[int, int] | None:
    """Return rows and columns where every picture is one full grid of tokens, as with LLaVA-1.5; else None."""
    if not isinstance(processing, TilePictures) or processing.encoder_keep is not None:
        return None
    if processing.processing.kind != "single":
        return None
    side = processing.processing.patches_per_side
    return side, side
