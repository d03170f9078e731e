"""FP8: the GPUs that support it, and the message for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

FIRST_CAPABILITY = 89
"""Compute capability of Ada. tensorrt-rtx 1.7 compiles no graph with FP8 for 8.6."""


def fp8_refusal(
    formats: Mapping[Any, str | None], *, capability: int, where: str, device: str | None = None
) -> str | None:
    """Return why a GPU cannot run the parts in FP8; None if it can, or if there are none.

    Args:
        formats: Quantized format by part.
        capability: The GPU's compute capability; 89 is 8.9.
        where: Start of the message: the option or the GPU's name.
        device: Name of the GPU, if ``where`` is an option.
    """
    parts = [part for part, kind in formats.items() if kind == "fp8"]
    if not parts or capability >= FIRST_CAPABILITY:
        return None
    return (
        f"{where}: expected compute capability 8.9 or later (Ada, Hopper, Blackwell, Jetson Thor), as {', '.join(parts)}"
        f" {'is' if len(parts) == 1 else 'are'} in FP8, got {capability / 10:.1f}{f' of {device}' if device else ''};"
        " export with int8 in place of fp8"
    )
