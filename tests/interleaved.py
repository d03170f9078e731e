"""Answers that are read in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.answer import Generation


def interleaved(answers: Sequence[Generation]) -> list[str]:
    """Read the answers piece by piece in turn, to their ends; return their texts."""
    texts = [""] * len(answers)
    readers = {index: iter(answer) for index, answer in enumerate(answers)}
    while readers:
        for index, reader in list(readers.items()):
            if (piece := next(reader, None)) is None:
                del readers[index]
            else:
                texts[index] += piece
    return texts
