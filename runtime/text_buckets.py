"""The text sizes that prompts are padded to: an exporter's defaults, and which of them a prompt runs at."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_TEXT = 256
"""Largest prompt in text tokens, where none is wished."""
MOST_TOKENS = 1 << 20
"""Largest prompt, and longest answer, that can be wished."""
_SMALLEST_BUCKET = 32


def text_buckets(max_text: int) -> tuple[int, ...]:
    """Return the text sizes that prompts are padded to: doublings from 32, and ``max_text`` itself."""
    sizes, size = [], _SMALLEST_BUCKET
    while size < max_text:
        sizes.append(size)
        size *= 2
    return (*sizes, max_text)


def bucket_of(num_text: int, buckets: Sequence[int]) -> int:
    """Return the first of the ascending ``buckets`` with room for ``num_text`` tokens; a longer prompt is one of its own."""
    return next((bucket for bucket in buckets if bucket >= num_text), num_text)
