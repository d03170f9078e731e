"""Makes the selector in front of the decoder: the only place that knows its methods by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trio_edge.runtime.manifest import TokenMethod
    from trio_edge.trio.selection import TokenSelector


def token_selector(method: TokenMethod, *, num_keep: int) -> TokenSelector:
    """Return the selector ``method`` that keeps ``num_keep`` tokens of a picture."""
    if method == "visionzip":
        from trio_edge.trio.selectors.visionzip import VisionZip

        return VisionZip(num_keep=num_keep)
    if method == "holov":
        from trio_edge.trio.selectors.holov import HoloV

        return HoloV(num_keep=num_keep)
    if method == "scope":
        from trio_edge.trio.selectors.scope import Scope

        return Scope(num_keep=num_keep)
    if method == "divprune":
        from trio_edge.trio.selectors.divprune import DivPrune

        return DivPrune(num_keep=num_keep)
    if method == "cdpruner":
        from trio_edge.trio.selectors.cdpruner import CdPruner

        return CdPruner(num_keep=num_keep)
    if method == "eadp":
        from trio_edge.trio.selectors.eadp import Eadp

        return Eadp(num_keep=num_keep)
    from trio_edge.trio.selectors.uniform import Uniform

    return Uniform(num_keep=num_keep)
